"""Registry of origins: from a scheme to the factory of its origin, and from what a user names to both.

    org/model, hf://org/model   hf       the setting `origin` says whether plain ids are looked for there
    https://, http://           https    web servers
    file:///path                file     directories, NFS
    s3://, gs://, az://                  object stores; need the extra `objects`

A plugin is a package with an entry point of group `swarm.origins`: its name is the scheme, its object a factory. It is
imported only when an address has its scheme. docs/origins.md shows a complete plugin.

Must not know: peers, settings of a node.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeAlias

from swarm.errors import SettingsError
from swarm.origin import OriginReader
from swarm.origin.files import FileOrigin
from swarm.origin.hf import HubOrigin
from swarm.origin.objects import ObjectOrigin
from swarm.origin.web import WebOrigin

GROUP = "swarm.origins"
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]{0,15})://(.+)")
_HUB_PAGE = re.compile(r"(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/tree/([^/?#]+))?/?")  # of a model

Factory: TypeAlias = Callable[[], OriginReader]
"""Called on a thread. Raises SettingsError where the origin cannot be used."""

_BUILT_IN: Mapping[str, Factory] = {
    "hf": HubOrigin,
    "https": WebOrigin,
    "http": WebOrigin,
    "file": FileOrigin,
    **{scheme: functools.partial(ObjectOrigin, scheme) for scheme in ("s3", "gs", "az")},
}


@dataclass(frozen=True, slots=True)
class OriginAddress:
    """What a user names: a scheme, and the model as its origin and as the swarm call it."""

    scheme: str
    model: str
    model_id: str


def parse(text: str) -> OriginAddress | None:
    """The address in a text such as `s3://bucket/model`; None for a plain model id.

    Raises SettingsError for the page of a model at the hub, which is no directory of a web server.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    scheme, rest = match[1], match[2]
    if scheme.startswith("http") and (page := _HUB_PAGE.fullmatch(rest)):
        raise SettingsError("model_id", f"{text} is a page of the hub; say {'@'.join(filter(None, page.groups()))}")
    if scheme == "hf":
        return OriginAddress(scheme, rest.strip("/"), rest.strip("/"))
    return OriginAddress(scheme, text, text.rstrip("/"))


def make_origin(scheme: str) -> OriginReader:
    """The origin of a scheme. Raises SettingsError for a scheme without a usable origin."""
    if factory := _BUILT_IN.get(scheme):
        return factory()
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if scheme not in plugins:
        known = ", ".join([*_BUILT_IN, *sorted(plugins)])
        raise SettingsError("origin", f"{scheme!r} is not one of {known}; plugins have an entry point of {GROUP}")
    try:
        origin: OriginReader = plugins[scheme].load()()
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError("origin", f"{scheme}: {plugins[scheme].value} failed with {error!r}") from error
    return origin
