"""Collects the doctor's facts: opens a node with the settings of an engine's start, and lets it find and dial peers.

The node serves nothing, and leaves when done. Every wait has a deadline; a peer that does not answer is a fact.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import shutil
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence

from swarm import __version__
from swarm.checkpoint import hf_cache
from swarm.content.manifest import decode
from swarm.doctor.facts import (
    DialedPeer,
    DiskSpace,
    Facts,
    GossipMember,
    KeyFacts,
    LoadedLayout,
    LocalNode,
    MdnsFacts,
    PortFacts,
)
from swarm.engines import start_log
from swarm.engines.layout import Fingerprint, is_loaded
from swarm.errors import ManifestError, PeerError, PeerTimeout, SettingsError, SwarmError
from swarm.journal import Unreached
from swarm.net import cards, discovery, peer_names
from swarm.net.addresses import multicast_hosts
from swarm.node import agent_client, agent_reach, local_nodes, status_client
from swarm.node.node import Node
from swarm.node.trust import may_introduce, networks
from swarm.protocol.messages import Address
from swarm.runtime import new_node
from swarm.security import cluster_key
from swarm.security.certificates import visitor
from swarm.security.cluster_key import Keyring
from swarm.settings import Settings, is_loopback, split_address

WAIT_S = 6.0  # an unanswered dial takes 5 s
LEAST_S = 1.5  # for addresses from multicast and gossip
LOOK_EVERY_S = 0.05
MANIFEST_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 3.0


async def examine(settings: Settings, model_id: str | None, *, wait_s: float = WAIT_S) -> Facts:
    """The facts. Raises SettingsError for settings that no node can be opened with, except `listen` and the key."""
    key, keyring = _key(settings)
    host, _ = split_address("listen", settings.listen, default_port=0)
    facts = Facts(
        software=__version__,
        key=key,
        insecure=settings.insecure,
        loopback=is_loopback(host),
        trusted=settings.trusted,
        model_id=model_id,
        disks=_disks(settings),
        starts=tuple(start_log.recall(settings.cache)),
    )
    if key.error:
        return facts
    names = await _resolve(settings.peers)
    here = await asyncio.to_thread(_local_nodes, settings)
    given = {address for found in names.values() if not isinstance(found, str) for address in found}
    async with _opened(settings, here) as (node, port), _announced(settings, node) as (multicast, heard):
        own: set[str] = {node.address, node.local_address, *node.addresses}
        with node.seeking(None):
            agent = await _agent(settings, node)
            await _settle(node, given | agent, heard if multicast else own, wait_s=wait_s)
            mdns = MdnsFacts(multicast, not own.isdisjoint(heard), frozenset(heard - own))
            ways = {"given": given, "mdns": set(mdns.found), "here": {local.address for local in here}, "agent": agent}
            return dataclasses.replace(
                facts,
                port=dataclasses.replace(port, reached=await _reaches(node.local_address)),
                mdns=mdns if settings.mdns else None,
                names=names,
                dialed=await _with_clocks(_dialed(node, ways, settings), visitor(keyring) if keyring else None),
                members=_members(node),
                local_nodes=here,
                layouts=await _layouts(node, model_id),
            )


async def _agent(settings: Settings, node: Node) -> set[str]:
    """The address of the agent's node, if programs with these settings fetch through it; `node` meets it as they do."""
    async with agent_client.agent(settings.cache) as found:
        if found is None or not settings.agent or agent_reach.objection(settings, found.greeting):
            return set()
        node.meet(Address(found.greeting.node))
        return {found.greeting.node}


def _key(settings: Settings) -> tuple[KeyFacts, Keyring | None]:
    if settings.key_file is None:
        return KeyFacts(), None
    try:
        keyring = cluster_key.load(settings.key_file)
    except SettingsError as error:
        return KeyFacts(error=error.why), None
    return KeyFacts(fingerprint=str(keyring)), keyring


def _disks(settings: Settings) -> tuple[DiskSpace, ...]:
    found = []
    for purpose, path in (("models", hf_cache.cache_root()), ("manifests", settings.cache)):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        with contextlib.suppress(OSError):
            found.append(DiskSpace(purpose, path, shutil.disk_usage(existing).free))
    return tuple(found)


async def _resolve(peers: Sequence[str]) -> dict[str, tuple[str, ...] | str]:
    found: dict[str, tuple[str, ...] | str] = {}
    for name in peer_names.static(peers):
        try:
            found[name] = tuple(await peer_names.resolve(name))
        except PeerError as error:
            found[name] = str(error)
    return found


def _local_nodes(settings: Settings) -> tuple[LocalNode, ...]:
    found = []
    for address in local_nodes.addresses(settings.cache):
        try:
            status_client.ask(address)
        except PeerError as error:
            found.append(LocalNode(address, error=str(error)))
        else:
            found.append(LocalNode(address))
    return tuple(found)


@contextlib.asynccontextmanager
async def _opened(settings: Settings, here: Sequence[LocalNode]) -> AsyncIterator[tuple[Node, PortFacts]]:
    """An open node at the address of the settings, else at a free port of the same host."""
    host, wanted = split_address("listen", settings.listen, default_port=0)
    named = dataclasses.replace(settings, name=settings.name or "doctor")
    held_by = next((local.address for local in here if wanted and local.address.endswith(f":{wanted}")), None)
    error = None
    node, _ = new_node(named)
    try:
        await node.open()
    except SettingsError as failure:
        await node.close()
        if failure.setting != "listen":
            raise
        error = failure.why
        anywhere = f"[{host}]:0" if ":" in host else f"{host}:0"
        node, _ = new_node(dataclasses.replace(named, listen=anywhere))
        await node.open()
    try:
        yield node, PortFacts(node.address, error=error, held_by=held_by if error else None)
    finally:
        await node.close("the examination is over")


@contextlib.asynccontextmanager
async def _announced(settings: Settings, node: Node) -> AsyncIterator[tuple[bool, set[str]]]:
    """Announces the node a second time under another id, so that it receives its own announcement.

    Whether multicast is available, and the set of addresses found so far.
    """
    found = set[str]()
    if not settings.mdns:
        yield False, found
        return
    mdns, browser = discovery.Mdns(), discovery.Mdns()
    host, port = split_address("listen", node.address)
    await mdns.start(node_id=secrets.token_hex(8), hosts=(host,), port=port, found=found.update)
    if is_loopback(host) and settings.reaches_out and (beyond := multicast_hosts(cards.read())):
        await browser.start(node_id=node.id, hosts=beyond, port=0, found=found.update)
    try:
        yield mdns.started, found
    finally:
        await mdns.close()
        await browser.close()


async def _settle(node: Node, given: set[str], heard: set[str], *, wait_s: float) -> None:
    """Returns when all found peers have answered or failed, and gossip, and `heard` has the node; or after `wait_s`."""
    began = node.now()

    def settled() -> bool:
        linked = {address for peer in node.peers.values() for address in (*peer.addresses, peer.link.remote)}
        gossiping = {member.node for member in node.members()}
        return (
            given <= linked | _failures(node).keys()
            and node.peers.keys() <= gossiping
            and not heard.isdisjoint({node.address, node.local_address, *node.addresses})
            and not node.searching
            and node.now() - began >= LEAST_S
        )

    while not settled() and node.now() - began < wait_s:
        await node.changed(LOOK_EVERY_S)


def _failures(node: Node) -> dict[str, Unreached]:
    """The last failure of each address."""
    return {entry.event.address: entry.event for entry in node.journal if isinstance(entry.event, Unreached)}


def _dialed(node: Node, ways: Mapping[str, set[str]], settings: Settings) -> list[DialedPeer]:
    trusted = networks(settings.trusted)
    gossiping = {member.node for member in node.members()}

    def found_by(*addresses: str) -> frozenset[str]:
        return frozenset(way for way, found in ways.items() if not found.isdisjoint(addresses)) or frozenset({"told"})

    dialed, linked = list[DialedPeer](), set[str]()
    for peer in node.peers.values():
        addresses = *peer.addresses, peer.link.remote
        linked.update(addresses)
        dialed.append(
            DialedPeer(
                peer.address,
                found_by(*addresses),
                name=peer.name,
                software=peer.hello.software,
                gossips=peer.node in gossiping,
                artifacts=tuple(peer.artifacts.values()),
                introduces=not trusted or may_introduce(peer, trusted),
            )
        )
    failed: dict[str, SwarmError] = {address: PeerTimeout(address, "no answer in time") for address in ways["given"]}
    failed |= {address: failure.error for address, failure in _failures(node).items()}
    for address in failed.keys() - linked - {node.address, node.local_address, *node.addresses}:
        dialed.append(DialedPeer(address, found_by(address), error=failed[address]))
    return sorted(dialed, key=lambda peer: peer.address)


async def _with_clocks(peers: Sequence[DialedPeer], context: ssl.SSLContext | None) -> tuple[DialedPeer, ...]:
    async def with_clock(peer: DialedPeer) -> DialedPeer:
        if peer.error:
            return peer
        try:
            ahead_s = await asyncio.to_thread(status_client.clock_ahead_s, peer.address, context)
        except PeerError as error:
            logging.getLogger("swarm").debug("%s", error)
            return peer
        return dataclasses.replace(peer, clock_s=ahead_s)

    return tuple(await asyncio.gather(*map(with_clock, peers)))


def _members(node: Node) -> tuple[GossipMember, ...]:
    """The members that gossip alone knows."""
    return tuple(
        GossipMember(
            member.name,
            member.address,
            tuple((a.model_id, a.digest, a.tier, a.chunks / max(1, a.chunks_total)) for a in member.profile.artifacts),
            member.profile.software,
        )
        for member in node.members()
        if member.node not in node.peers
    )


async def _layouts(node: Node, model_id: str | None) -> tuple[LoadedLayout, ...]:
    found = []
    for peer in list(node.peers.values()):
        for artifact in peer.artifacts.values():
            if artifact.tier != "loaded" or not (model_id is None or is_loaded(artifact.model_id, model_id)):
                continue
            try:
                data = await node.manifest_requests.manifest(peer, artifact.digest, timeout_s=MANIFEST_TIMEOUT_S)
                fingerprint = Fingerprint.read(decode(data, digest=artifact.digest).fingerprint)
                found.append(LoadedLayout(peer.name, artifact.model_id, fingerprint))
            except (PeerError, ManifestError, SettingsError) as error:
                found.append(LoadedLayout(peer.name, artifact.model_id, error=str(error)))
    return tuple(found)


async def _reaches(address: str) -> bool:
    host, port = split_address("listen", address)
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
