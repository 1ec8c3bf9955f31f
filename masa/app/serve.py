"""serve(): the page on an address, nothing of it from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masa.app.asked import Adapter
from masa.app.runs import Desk
from masa.app.sessions import Sessions
from masa.errors import MasaError
from masa.pipeline import StableDiffusion
from masa.runtime.adapters import DEMO_ADAPTER

if TYPE_CHECKING:
    import uvicorn

HOST, PORT = "127.0.0.1", 7860
MOST_UPLOADED = "64mb"
WAITING = 16  # runs in the queue
# What gradio's pages name of other servers: how they look when they are shared, and examples of its programs' API.
ELSEWHERE = re.compile(rb"\s*<meta[^>]*(?:og:|twitter:)[^>]*>|https://(?:raw\.githubusercontent|github)\.com/[\w./-]*")

# A browser that is told so loads nothing from elsewhere, whatever a later version of gradio asks it for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "media-src 'self' blob:; frame-ancestors 'self'"
)


def serve(
    sd: StableDiffusion | Callable[[], StableDiffusion],
    *,
    host: str = HOST,
    port: int = PORT,
    adapters: Sequence[Adapter] = (),
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C.

    sd: the model, or a function that loads it, called once the port is known to be free. host: "127.0.0.1" is this
    machine alone. adapters: T2I-Adapters and ControlNets to choose from. announce: told the address when the page is
    there. MasaError where gradio is missing, or the port is taken.
    """
    check_installed()
    with bind(host, port) as listening, tempfile.TemporaryDirectory(prefix="masa-app-") as root:
        # gradio reads it when its components are made.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(root) / "gradio")
        model = sd if isinstance(sd, StableDiffusion) else sd()
        desk = Desk(model, Sessions(Path(root)), (*own_adapters(model), *adapters))
        try:
            server = build_server(desk)
            announce(f"http://{'localhost' if host in (HOST, '0.0.0.0') else host}:{listening.getsockname()[1]}")
            server.run(sockets=[listening])
        finally:
            desk.sessions.close_all()  # or the process would end with the run under way, not before it
            desk.worker.close()


def own_adapters(sd: StableDiffusion) -> tuple[Adapter, ...]:
    """What a model brings with it: the demo model's, of stick figures."""
    if sd.origin.checkpoint != "demo" or not DEMO_ADAPTER.is_file():
        return ()
    return (Adapter("stick figures", "T2I-Adapter", "demo"),)


def check_installed() -> None:
    """MasaError where the page's extra is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise MasaError("the page needs gradio, which is not installed; pip install 'masa[app]'")


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address. MasaError where it is taken, or is none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise MasaError(f"--host {host} --port {port} cannot be served ({error}); give another --port") from error
    return listening


def build_server(desk: Desk) -> uvicorn.Server:
    """The page as a server that is not running yet."""
    import uvicorn

    # A browser's open streams do not keep the server from ending.
    config = uvicorn.Config(build_app(desk), log_level="critical", timeout_graceful_shutdown=1)
    return uvicorn.Server(config)


def build_app(desk: Desk) -> Any:
    """The page as an ASGI application."""
    import fastapi
    import gradio

    from masa.app.page import CSS, THEME, build_page

    page = build_page(desk).queue(max_size=WAITING)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        max_file_size=MOST_UPLOADED,
        theme=THEME,
        css=CSS,
    )
    return Local(app)


class Local:
    """An ASGI application whose pages name no other server, and tell the browser to ask none."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: dict[str, Any] | None = None
        body = b""

        async def send_local(message: dict[str, Any]) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
                if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                    start = message  # held back: its length changes
                    return
            elif start is not None:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                body = ELSEWHERE.sub(b"", body)
                length = (b"content-length", str(len(body)).encode())
                kept = [header for header in start["headers"] if header[0] != b"content-length"]
                await send({**start, "headers": [*kept, length]})
                message = {**message, "body": body}
            await send(message)

        # Pages come uncompressed, so that they can be read here.
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self.app({**scope, "headers": plain}, receive, send_local)
