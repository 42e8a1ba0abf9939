"""A TCP port and the UDP port of the same number: links come by the first, datagrams by the second.

Must not know: settings, what is sent.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from swarm.errors import SettingsError
from swarm.net.listener import Listener
from swarm.net.udp import Codec, Datagrams, Hear
from swarm.protocol.messages import Address

PORTS_TRIED = 16  # when the system chooses: a TCP port is skipped if its UDP port is taken


async def open_pair(
    hosts: Sequence[str], wanted: int, hear: Hear, *, codec: Codec, loopback_only: bool
) -> tuple[Listener, Datagrams]:
    """Sockets on `wanted`, 0 for any port that is free for both. Raises SettingsError."""
    for _ in range(PORTS_TRIED):
        listener = await Listener.open(hosts, wanted)
        where, port = listener.address
        try:
            return listener, Datagrams(listener.hosts, port, hear, codec=codec, loopback_only=loopback_only)
        except OSError as error:
            await listener.close()
            if wanted or error.errno != errno.EADDRINUSE:
                why = f"UDP port {port} on {where} cannot be had ({error.strerror}); members hear of each other there"
                raise SettingsError("listen", f"{why}: choose another port, or 0 for any free one") from error
    where = " and ".join(hosts)
    raise SettingsError("listen", f"no port of {where} is free for both TCP and UDP; choose one that is")


async def is_free(hosts: Sequence[str], port: int, *, codec: Codec) -> bool:
    """Whether a node could have this port now, for TCP and UDP."""
    try:
        listener = await Listener.open(hosts, port)
    except SettingsError:
        return False
    try:
        Datagrams(listener.hosts, port, _unheard, codec=codec, loopback_only=True).close()
    except OSError:
        return False
    finally:
        await listener.close()
    return True


def _unheard(source: Address, datagram: bytes) -> None:
    """For sockets that are closed at once."""
