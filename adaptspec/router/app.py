"""The router as a web application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adaptspec.router.answers import error_answer
from adaptspec.router.counts import Counts
from adaptspec.router.relay import Limits, Relay
from adaptspec.router.servers import Servers
from adaptspec.router.table import RouteTable


def make_app(
    table: RouteTable,
    limits: Limits | None = None,
    *,
    connect_timeout: float = 5.0,
) -> Any:
    """The ASGI application that routes by ``table``.

    Its ``state`` has ``servers`` and ``counts``.
    """
    servers, counts = Servers(table, connect_timeout), Counts()
    relay = Relay(table, servers, counts, limits or Limits())

    async def health(request: Request) -> Response:
        found = await servers.health()
        well = [any(urls.values()) for urls in found.values()]
        status = "ok" if all(well) else "degraded" if any(well) else "down"
        told = {"status": status, "servers": found}
        return JSONResponse(told, 200 if any(well) else 503)

    async def metrics(request: Request) -> Response:
        text = counts.as_text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path}: {error.detail}"
        return error_answer(error.status_code, told, None, error.headers)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await servers.close()

    app = Starlette(
        routes=[
            # A browser asks by OPTIONS whether it may ask at all.
            Route("/v1/chat/completions", relay, methods=["POST", "OPTIONS"]),
            Route("/v1/completions", relay, methods=["POST", "OPTIONS"]),
            Route("/v1/models", relay, methods=["GET", "OPTIONS"]),
            Route("/v1/models/{model:path}", relay, methods=["GET", "OPTIONS"]),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )
    app.state.servers, app.state.counts = servers, counts
    return app
