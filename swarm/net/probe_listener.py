"""The listener of probes and metrics: plain HTTP on an address of its own, for kubelets, load balancers and Prometheus.

    GET /healthz   /readyz   /metrics

It serves these paths and nothing else, to each program that reaches the address; with a token, metrics to its holders
alone. `http_server` and `listener` bound its connections.

Must not know: the contents of the pages.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from swarm.errors import SettingsError
from swarm.net.http_pages import PROBES, Bearer, Page, Pages
from swarm.net.http_server import HttpServer
from swarm.net.listener import Listener
from swarm.settings import join_address, split_address


class ProbeListener:
    """`pages`: those of PROBES, by path; others are left out."""

    def __init__(self, pages: Mapping[str, Page], bearer: Bearer) -> None:
        probes = {path: page for path, page in pages.items() if path in PROBES}
        self._pages = Pages(probes, bearer=bearer, open_to_all=True)
        self._server = HttpServer()
        self._listener: Listener | None = None

    async def open(self, address: str) -> str:
        """Listens at HOST:PORT; returns the address, with the port that it got. Raises SettingsError."""
        host, port = split_address("metrics_listen", address, least_port=0)
        try:
            self._listener = await Listener.open(host, port)
        except SettingsError as error:
            raise SettingsError("metrics_listen", error.why) from error
        app = web.Application(client_max_size=0)
        self._pages.add_to(app, self._server.arrived, self._server.stays)
        await self._server.open(app)
        self._listener.serve({}, self._server.adopt)
        return join_address(*self._listener.address)

    async def close(self) -> None:
        """Also before `open`, and twice."""
        self._pages.close()
        listener, self._listener = self._listener, None
        if listener:
            await listener.close()
        await self._server.close()
