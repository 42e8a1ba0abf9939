"""The DNS of a played cluster: `SERVICE.NAMESPACE.svc.cluster.local` has the addresses of the Service's pods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from dnslib import QTYPE, RCODE, RR, A
from dnslib.server import DNSServer

DOMAIN = "cluster.local"
TTL_S = 1


class ClusterDns:
    """Answers on UDP and TCP port 53 of `address`. `known`: the addresses of a name in the domain, None without one."""

    def __init__(self, address: str, known: Callable[[str], list[str] | None]) -> None:
        self.asked: Counter[str] = Counter()
        self._known = known
        self._servers = [DNSServer(self, address=address, port=53, tcp=tcp, logger=_Silent()) for tcp in (False, True)]
        for server in self._servers:
            server.start_thread()

    def resolve(self, request: Any, _handler: Any) -> Any:
        """The answer to a question, as dnslib calls it."""
        answer, name = request.reply(), str(request.q.qname).rstrip(".").lower()
        self.asked[name] += 1
        found = self._known(name)
        if found is None:
            answer.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype in (QTYPE.A, QTYPE.ANY):
            for address in found:
                answer.add_answer(RR(name, QTYPE.A, ttl=TTL_S, rdata=A(address)))
        return answer

    def close(self) -> None:
        """Stops answering."""
        for server in self._servers:
            server.server.shutdown()
            server.server.server_close()


class _Silent:
    """A log of dnslib that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
