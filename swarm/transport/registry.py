"""Registry of transports: from a scheme to the factory that makes the node's transport of this scheme.

    inproc   named transports: nccl, gloo, ucc, plugins   cuda_ipc   tcp   tls        most preferred first

The transports on both sides are automatic: each is there wherever its factory does not return None. Named transports
are there when the setting `transports` names them, in its order.

A plugin is a package with an entry point of group `swarm.transports`: its name is the scheme, its object a factory. It
is imported only when `transports` names it. A plugin that fails is logged and left out; the node goes on
with its other transports. docs/transports.md shows a complete plugin.

Must not know: links, settings, peers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeAlias

from swarm.errors import SettingsError
from swarm.protocol.messages import unsayable_endpoint
from swarm.security.certificates import Identity
from swarm.store import cuda
from swarm.transport import Pace, Transport, nccl
from swarm.transport.cuda_ipc import CudaIpcTransport
from swarm.transport.inproc import InprocTransport
from swarm.transport.tcp import TcpTransport
from swarm.transport.torch_distributed import MAGIC, TorchDistTransport

GROUP = "swarm.transports"
TRANSPORTS_MAX = 8  # gossip tells every member the schemes of a node

log = logging.getLogger("swarm")


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """The values that a node hands to a factory."""

    local: tuple[str, int]  # host and port of the node's listener
    advertised: tuple[str, int]  # host and port under which peers dial it: differs from `local` behind a port mapping
    pace: Pace  # the node's upload cap; `slice_bytes` is None without a cap
    congestion: str | None  # TCP congestion control; None: the system's default
    identity: Identity | None  # the node's certificate; None without a cluster key
    encrypted: bool  # chunks must be encrypted outside this machine


Factory: TypeAlias = Callable[[TransportConfig], Transport | None]
"""Called on the loop when the node opens. Returns None, or raises SettingsError, where the transport cannot be used."""


def _inproc(config: TransportConfig) -> Transport | None:
    capped = config.pace.slice_bytes is not None  # a cap counts bytes that leave the process, so they must leave it
    return None if capped else InprocTransport()


def _cuda_ipc(config: TransportConfig) -> Transport | None:
    if not cuda.in_use():  # needs no encryption: its bytes stay within the machine
        return None
    return CudaIpcTransport(*config.advertised, pace=config.pace, congestion=config.congestion)


def _tcp(config: TransportConfig) -> Transport | None:
    if config.encrypted:
        return None
    return TcpTransport(*config.advertised, pace=config.pace, congestion=config.congestion)


def _tls(config: TransportConfig) -> Transport | None:
    if config.identity is None:
        return None
    return TcpTransport(*config.advertised, pace=config.pace, congestion=config.congestion, identity=config.identity)


def _nccl(config: TransportConfig) -> Transport:
    nccl.demand()
    return nccl.NcclTransport(*config.local, pace=config.pace, congestion=config.congestion)


def _torch_distributed(backend: str, config: TransportConfig) -> Transport:
    return TorchDistTransport(*config.local, backend=backend, pace=config.pace, congestion=config.congestion)


_NAMED: Mapping[str, Factory] = {"nccl": _nccl} | {each: functools.partial(_torch_distributed, each) for each in MAGIC}


def make_transports(named: Sequence[str], config: TransportConfig) -> list[Transport]:
    """The node's transports, most preferred first. Raises SettingsError for a name without a usable transport."""
    chosen = [_make_named(name, config) for name in named]
    made = [_inproc(config), *chosen, _cuda_ipc(config), _tcp(config), _tls(config)]
    usable = [transport for transport in made if transport is not None]
    if len(usable) > TRANSPORTS_MAX:
        raise SettingsError("transports", f"a node has at most {TRANSPORTS_MAX} transports, these are {len(usable)}")
    return usable


def _make_named(name: str, config: TransportConfig) -> Transport | None:
    if name in _NAMED:
        return _NAMED[name](config)
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name not in plugins:
        known = ", ".join([*_NAMED, *sorted(plugins)])
        raise SettingsError("transports", f"{name!r} is not one of {known}; plugins have an entry point of {GROUP}")
    try:
        transport: Transport | None = plugins[name].load()(config)
    except SettingsError:
        raise
    except Exception as error:
        log.warning("transport %s is left out: %s failed with %r", name, plugins[name].value, error)
        return None
    if transport is not None and (why := unsayable_endpoint(transport.scheme, transport.address)):
        raise SettingsError("transports", f"{name!r} of {plugins[name].value} cannot be announced: {why}")
    return transport
