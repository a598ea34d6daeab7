"""Serves a page: what of it others may ask for, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import re
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osv_jax.errors import Stopped, UserError

# What Gradio's page asks for. Gradio has more: it fetches what a URL names, passes requests on, writes links to disk.
_PAGE = re.compile(
    r"/|/config/?|/(theme\.css|favicon\.ico|manifest\.json)|/(assets|static)/[\w./-]+|/gradio_api/(info/?|startup-events)"
)
_EVENTS = re.compile(r"/gradio_api/(queue/(join|data)|run/\w+/?|cancel|reset/?|heartbeat/\w+)")
_UPLOADS = re.compile(r"/gradio_api/upload(_progress)?")
_FILE = "/gradio_api/file="
# Browsers then load nothing from elsewhere, whatever a page asks for. Gradio makes functions of text.
_HEADERS = {
    b"content-security-policy": b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
_ENDING_SECONDS = 2
# A form has its own boundaries and names beside the file.
_ROOM = 10_000


class Gate:
    """Lets through what `serve` says, and answers 403 to all else, and 413 to what is too large.

    Args:
        uploads: where Gradio keeps what people upload, if they may.
        files: the beginning of the paths at which files of ours are.
        max_bytes: of an upload.
    """

    def __init__(self, app: ASGIApp, uploads: pathlib.Path | None, files: str, max_bytes: int):
        self._app, self._uploads, self._files, self._max_bytes = app, uploads, files, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not self._is_open(scope["method"], scope["path"]):
            await PlainTextResponse("There is nothing here.", 403)(scope, receive, send)
            return
        # Gradio counts, too, what is sent without its length.
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes + _ROOM:
            await PlainTextResponse(f"The file has more than {self._max_bytes:,} bytes.", 413)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _is_open(self, method: str, path: str) -> bool:
        if ".." in path:
            return False
        if method in ("GET", "HEAD"):
            is_ours = path.startswith(self._files)
            is_upload = self._uploads is not None and path.startswith(f"{_FILE}{self._uploads}{os.sep}")
            if is_ours or is_upload or _PAGE.fullmatch(path):
                return True
        is_known = _EVENTS.fullmatch(path) or (self._uploads is not None and _UPLOADS.fullmatch(path))
        return method in ("GET", "POST") and bool(is_known)


def make_app(
    page: gr.Blocks,
    files: str,
    find: Callable[[str], pathlib.Path | None],
    uploads: pathlib.Path | None,
    max_bytes: int,
) -> ASGIApp:
    """A page with its files.

    Args:
        files: where they are asked for: a path that begins and ends with `/`.
        find: the file of the rest of such a path, or None.
        uploads, max_bytes: see `Gate`.
    """
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    keep_to_uploads(page, uploads)

    @app.get(f"{files}{{name:path}}")
    def send_file(name: str) -> fastapi.Response:
        found = find(name)
        return PlainTextResponse("There is nothing here.", 404) if found is None else FileResponse(found)

    styles = pathlib.Path(__file__).with_name("page.css").read_text("utf-8")
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(**fonts),
        css=styles,
    )
    return Gate(app, uploads, files, max_bytes)


def keep_to_uploads(page: gr.Blocks, uploads: pathlib.Path | None) -> None:
    """Has a page refuse what names other files than uploads, whichever control it is given for.

    Gradio copies whatever file a request names, and what a URL does, to where uploads are; its own check is for pages
    that it serves itself.
    """
    preprocess = page.preprocess_data

    async def checked(function: Any, inputs: list[Any], *others: Any, **options: Any) -> Any:
        for path in _paths(inputs):
            if uploads is None or uploads not in pathlib.Path(os.path.realpath(path)).parents:
                raise gr.Error("That file was not uploaded here.", print_exception=False)
        return await preprocess(function, inputs, *others, **options)

    vars(page)["preprocess_data"] = checked


def _paths(value: Any) -> Iterator[str]:
    """Of files that are named somewhere in what a request says."""
    if isinstance(value, dict):
        if "path" in value:
            yield str(value["path"])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner)


def open_port(host: str, port: int) -> socket.socket:
    """Raises UserError if nothing can be served there. Port 0 is any that is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(socket.socket(family, kind, protocol))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            stack.pop_all()
            return opened
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port} cannot be served ({reason}): choose another --host or --port.") from error


def serve(app: ASGIApp, opened: socket.socket) -> None:
    """Serves until a signal comes.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        Stopped: SIGTERM.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise Stopped("SIGTERM: the page is closed.", signal.Signals(number))

    signal.signal(signal.SIGTERM, stop)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=_ENDING_SECONDS,
    )
    # Pages that are open wait for news when it ends, of which uvicorn tells with tracebacks.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "timeout graceful shutdown" not in _full_text(record))
    uvicorn.Server(config).run(sockets=[opened])


def _full_text(record: logging.LogRecord) -> str:
    return f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
