"""Looks around as a start with the same settings would: opens a node, lets it find and dial, and writes down what came.

The node serves nothing and leaves when done. Everything here has a deadline; what does not answer is a fact like any
other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence

from swarm import __version__
from swarm.checkpoint import hf_cache
from swarm.content.manifest import decode
from swarm.doctor.facts import Contact, Facts, Key, LoadedTier, Mdns, Member, Port, Room, Running
from swarm.engines import start_log
from swarm.engines.layout import Fingerprint, is_loaded
from swarm.errors import ManifestError, PeerError, PeerTimeout, SettingsError, SwarmError
from swarm.journal import Unreached
from swarm.net import discovery
from swarm.net.environment import new_id
from swarm.node import local_nodes, status_client
from swarm.node.node import Node
from swarm.node.resolve import Network, may_introduce, networks
from swarm.runtime import new_node
from swarm.security import cluster_key
from swarm.security.certificates import visitor
from swarm.security.cluster_key import Keyring
from swarm.settings import Settings, is_loopback, split_address

WAIT_S = 6.0  # a dial that is not answered takes 5 s
LEAST_S = 1.5  # for those that multicast and gossip bring
LOOK_EVERY_S = 0.05
MANIFEST_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 3.0


async def examine(settings: Settings, model_id: str | None, *, wait_s: float = WAIT_S) -> Facts:
    """The facts. Raises SettingsError for settings that no node could be opened with, but for `listen` and the key."""
    key, keyring = _key(settings)
    host, _ = split_address("listen", settings.listen, default_port=0)
    facts = Facts(
        software=__version__,
        key=key,
        insecure=settings.insecure,
        loopback=is_loopback(host),
        trusted=settings.trusted,
        model_id=model_id,
        rooms=_rooms(settings),
        starts=tuple(start_log.recall(settings.cache)),
    )
    if key.error:
        return facts
    names = await _resolve(settings.peers)
    here = await asyncio.to_thread(_running, local_nodes.addresses(settings.cache))
    async with _opened(settings, here) as (node, port), _listening(settings, node) as multicast:
        with node.seeking(None):
            await _settled(node, _given(names), multicast, wait_s=wait_s)
            found = _mdns(multicast, node)
            contacts = _contacts(node, names, found, here, networks(settings.trusted))
            return dataclasses.replace(
                facts,
                port=dataclasses.replace(port, reached=await _reaches(node.address)),
                mdns=found if settings.mdns else None,
                names=names,
                contacts=await _with_clocks(contacts, visitor(keyring) if keyring else None),
                members=_members(node),
                running=here,
                loaded=await _loaded(node, model_id),
            )


def _key(settings: Settings) -> tuple[Key, Keyring | None]:
    if settings.key_file is None:
        return Key(), None
    try:
        keyring = cluster_key.load(settings.key_file)
    except SettingsError as error:
        return Key(error=error.why), None
    return Key(fingerprint=str(keyring)), keyring


def _rooms(settings: Settings) -> tuple[Room, ...]:
    found = []
    for purpose, path in (("models", hf_cache.cache_root()), ("manifests", settings.cache)):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        with contextlib.suppress(OSError):
            found.append(Room(purpose, path, shutil.disk_usage(existing).free))
    return tuple(found)


async def _resolve(peers: Sequence[str]) -> dict[str, tuple[str, ...] | str]:
    found: dict[str, tuple[str, ...] | str] = {}
    for name in discovery.static(peers):
        try:
            found[name] = tuple(await discovery.resolve(name))
        except PeerError as error:
            found[name] = str(error)
    return found


def _given(names: Mapping[str, tuple[str, ...] | str]) -> set[str]:
    return {address for found in names.values() if not isinstance(found, str) for address in found}


def _running(addresses: Sequence[str]) -> tuple[Running, ...]:
    found = []
    for address in addresses:
        try:
            report = status_client.ask(address)
        except PeerError as error:
            found.append(Running(address, error=str(error)))
        else:
            here = [member for member in report["members"] if member.get("state") in ("alive", "suspect")]
            found.append(Running(address, len(here)))
    return tuple(found)


@contextlib.asynccontextmanager
async def _opened(settings: Settings, here: Sequence[Running]) -> AsyncIterator[tuple[Node, Port]]:
    """An open node where the settings say, or else at any free port of the same host."""
    host, wanted = split_address("listen", settings.listen, default_port=0)
    named = dataclasses.replace(settings, name=settings.name or "doctor")
    held_by = next((each.address for each in here if wanted and each.address.endswith(f":{wanted}")), None)
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
        yield node, Port(node.address, error=error, held_by=held_by if error else None)
    finally:
        await node.close("the examination is over")


@dataclasses.dataclass
class _Multicast:
    """A second announcement of the same node, under another name: who hears it hears multicast."""

    started: bool = False
    found: set[str] = dataclasses.field(default_factory=set)


@contextlib.asynccontextmanager
async def _listening(settings: Settings, node: Node) -> AsyncIterator[_Multicast]:
    heard = _Multicast()
    if not settings.mdns:
        yield heard
        return
    mdns = discovery.Mdns()
    await mdns.start(node_id=new_id(), address=split_address("listen", node.address), found=heard.found.add)
    heard.started = mdns.started
    try:
        yield heard
    finally:
        await mdns.close()


async def _settled(node: Node, given: set[str], multicast: _Multicast, *, wait_s: float) -> None:
    """Waits until everybody who was found has answered or failed, and gossips; not for longer than `wait_s`."""
    began = node.now()

    def settled() -> bool:
        linked = {address for peer in node.peers.values() for address in (peer.hello.address, peer.link.remote)}
        gossiping = {member.node for member in node.members()}
        heard = node.address in multicast.found or not multicast.started
        return (
            given <= linked | _failures(node).keys()
            and node.peers.keys() <= gossiping
            and heard
            and not node.searching
            and node.now() - began >= LEAST_S
        )

    while not settled() and node.now() - began < wait_s:
        await node.changed(LOOK_EVERY_S)


def _failures(node: Node) -> dict[str, Unreached]:
    """The last failure of each address."""
    return {entry.event.address: entry.event for entry in node.journal if isinstance(entry.event, Unreached)}


def _mdns(multicast: _Multicast, node: Node) -> Mdns:
    return Mdns(multicast.started, node.address in multicast.found, frozenset(multicast.found - {node.address}))


def _contacts(
    node: Node,
    names: Mapping[str, tuple[str, ...] | str],
    mdns: Mdns,
    here: Sequence[Running],
    trusted: Sequence[Network],
) -> list[Contact]:
    ways = {"given": _given(names), "mdns": mdns.found, "here": {each.address for each in here}}
    gossiping = {member.node for member in node.members()}

    def how(*addresses: str) -> frozenset[str]:
        return frozenset(way for way, found in ways.items() if not found.isdisjoint(addresses)) or frozenset({"told"})

    contacts = []
    linked = set()
    for peer in node.peers.values():
        linked |= {peer.hello.address, peer.link.remote}
        contacts.append(
            Contact(
                peer.hello.address,
                how(peer.hello.address, peer.link.remote),
                name=peer.name,
                software=peer.hello.software,
                gossips=peer.node in gossiping,
                artifacts=tuple(peer.artifacts.values()),
                introduces=not trusted or may_introduce(peer, trusted),
            )
        )
    failed: dict[str, SwarmError] = {address: PeerTimeout(address, "no answer in time") for address in ways["given"]}
    failed |= {address: failure.error for address, failure in _failures(node).items()}
    for address, error in failed.items():
        if address not in linked and address != node.address:
            contacts.append(Contact(address, how(address), error=error))
    return sorted(contacts, key=lambda contact: contact.address)


async def _with_clocks(contacts: Sequence[Contact], context: ssl.SSLContext | None) -> tuple[Contact, ...]:
    async def with_clock(contact: Contact) -> Contact:
        if contact.error:
            return contact
        try:
            return dataclasses.replace(
                contact, clock_s=await asyncio.to_thread(status_client.clock_ahead_s, contact.address, context)
            )
        except PeerError as error:
            logging.getLogger("swarm").debug("%s", error)
            return contact

    return tuple(await asyncio.gather(*map(with_clock, contacts)))


def _members(node: Node) -> tuple[Member, ...]:
    """Those that gossip knows and no link leads to."""
    return tuple(
        Member(
            member.name,
            member.address,
            tuple((a.model_id, a.digest, a.tier, a.chunks / max(1, a.chunks_total)) for a in member.profile.artifacts),
            member.profile.software,
        )
        for member in node.members()
        if member.node not in node.peers
    )


async def _loaded(node: Node, model_id: str | None) -> tuple[LoadedTier, ...]:
    """Fingerprints of what members hold in an engine's layout."""
    found = []
    for peer in list(node.peers.values()):
        for artifact in peer.artifacts.values():
            if artifact.tier != "loaded" or not (model_id is None or is_loaded(artifact.model_id, model_id)):
                continue
            try:
                data = await node.manifest_requests.manifest(peer, artifact.digest, timeout_s=MANIFEST_TIMEOUT_S)
                fingerprint = Fingerprint.read(decode(data, digest=artifact.digest).fingerprint)
                found.append(LoadedTier(peer.name, artifact.model_id, fingerprint))
            except (PeerError, ManifestError, SettingsError) as error:
                found.append(LoadedTier(peer.name, artifact.model_id, error=str(error)))
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
