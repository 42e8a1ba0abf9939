"""`swarm.fetch` and `swarm.serve`: the public calls, and what engines and the command line use of them.

calls      fetch, fetch_async, serve
want       the arguments of `fetch`, checked
fetching   a fetch on an open node: find, prove, land
landing    stores, waits and records of a fetch
serving    sources for what users serve or sign
handles    what the calls return
bring      fetches for programs that read the Hugging Face cache by themselves
"""

from __future__ import annotations

from swarm.api.bring import BRING_FIND_S, bring, fetch_of_commit, manifest_of
from swarm.api.calls import fetch, fetch_async, serve
from swarm.api.fetching import CommitOf, fetch_on, find_on, is_commit, is_proven
from swarm.api.handles import HUB_CACHE, Served, Weights
from swarm.api.landing import part_of
from swarm.api.serving import open_source, serve_source, sign
from swarm.observe.progress import Progress

__all__ = [
    "BRING_FIND_S", "HUB_CACHE", "CommitOf", "Progress", "Served", "Weights", "bring", "fetch", "fetch_async",
    "fetch_of_commit", "fetch_on", "find_on", "is_commit", "is_proven", "manifest_of", "open_source",
    "part_of", "serve", "serve_source", "sign",
]  # fmt: skip
