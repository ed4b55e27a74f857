"""Serves the page on one address, without the network."""

import socket
from collections.abc import Sequence
from typing import Any

import gradio
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The browser loads nothing from elsewhere, and no other site can embed the page.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"


def listen(host: str, port: int) -> socket.socket:
    """Opens the address; port 0 takes a free one.

    Raises:
        OSError: the address is in use or not this machine's; its filename names the address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while attempting")[0]  # which the address repeats
        raise OSError(error.errno, reason, f"{host}:{port}") from error


def serve(page: gradio.Blocks, server: socket.socket, host: str, max_upload: int, **look: Any) -> None:
    """Serves the page until SIGINT or SIGTERM, which are then raised again.

    Args:
        page: the page.
        server: from `listen`.
        host: its address. A page on this machine alone is shown under this machine's names only, so that no site can
            reach it by a name of its own.
        max_upload: the largest upload in bytes.
        look: options of `gradio.mount_gradio_app`.
    """
    app = FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=max_upload,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        **look,
    )
    app.add_middleware(_Headers)
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"], www_redirect=False)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[server])


class _Headers:
    """Adds `POLICY` to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers: Sequence[Any] = message.get("headers", [])
                message["headers"] = [*headers, (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)
