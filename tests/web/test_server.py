"""What a server lets through, and to whom: to this machine alone, unless it is told otherwise."""

import asyncio
import pathlib
import socket

import gradio as gr
import pytest

from osv_jax import serve
from osv_jax.errors import UserError
from osv_jax.web import server

UPLOADS = pathlib.Path("/tmp/osv_jax-x")
FILE = "/gradio_api/file="


def answer(method, path, length=None, uploads=UPLOADS):
    """What a gate, whose page would answer 200 to everything, answers: its status and headers."""

    async def everything(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("a gate reads nothing")

    headers = [] if length is None else [(b"content-length", length)]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(server.Gate(everything, uploads, "/results/", 1000)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/config"),
        ("HEAD", "/assets/index-a1b2.js"),
        ("GET", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/upload"),
        ("GET", f"{FILE}{UPLOADS}/a/cat.png"),
        ("GET", "/results/20260101-000000-00000000/student.mp4"),
    ],
)
def test_what_the_page_needs_is_let_through_and_loads_nothing_from_elsewhere(method, path):
    status, headers = answer(method, path)
    assert status == 200
    policy = headers[b"content-security-policy"].decode()
    assert policy.startswith("default-src 'self' ") and "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        f"{FILE}/etc/passwd",
        f"{FILE}{UPLOADS}-of-others/a.png",
        f"{FILE}{UPLOADS}",
        f"{FILE}{UPLOADS}/../../etc/passwd",
        f"{FILE}{UPLOADS}/a/..",
        f"{FILE}/{UPLOADS}/a.png",
        f"{FILE}http://127.0.0.1/",
        f"{FILE}file://{UPLOADS}/a.png",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/results/../secret",
        "/static/../../routes.py",
        "/assets/..",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/deep_link",
        "/docs",
        "/openapi.json",
        "/monitoring",
        "/login",
    ],
)
def test_no_other_path_is_let_through(path):
    assert {answer(method, path)[0] for method in ("GET", "HEAD", "POST", "PUT", "DELETE")} == {403}


def test_a_page_without_uploads_takes_and_gives_none():
    for method, path in (("POST", "/gradio_api/upload"), ("GET", f"{FILE}{UPLOADS}/a.png")):
        assert answer(method, path)[0] == 200 and answer(method, path, uploads=None)[0] == 403
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert answer(method, "/")[0] == 403


@pytest.mark.parametrize(
    ("length", "status"), [(b"900", 200), (b"11000", 200), (b"11001", 413), (b"-1", 413), (b"x", 413)]
)
def test_uploads_are_limited(length, status):
    """The file itself has 1,000 bytes, and what stands around it 10,000."""
    assert answer("POST", "/gradio_api/upload", length)[0] == status


def recorded():
    """What stands for a page, and what it was asked."""
    page, asked = gr.Blocks.__new__(gr.Blocks), []

    async def preprocess_data(function, inputs, state=None):
        asked.append(inputs)
        return inputs

    page.preprocess_data = preprocess_data
    return page, asked


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path.resolve() / "uploads"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def named(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_requests_name_uploads_alone(uploads):
    """In whatever control's value, and however deep: Gradio looks for files everywhere."""
    page, asked = recorded()
    server.keep_to_uploads(page, uploads)
    fine = [["tts", 1, None, named(uploads / "a" / "cat.png")], [[{"x": named(uploads / "cat.png")}]], ["/etc/passwd"]]
    for inputs in fine:
        assert asyncio.run(page.preprocess_data(None, inputs)) == inputs
    refused = ["/etc/passwd", uploads, uploads / ".." / "secret.png", uploads / "a" / "link.png", "cat.png", ""]
    refused += [f"{uploads}-of-others/cat.png", "http://example.com/cat.png", "file:///etc/passwd"]
    for path in refused:
        for inputs in (["tts", named(path)], [{"x": [named(path)]}], [{"value": named(path)}]):
            with pytest.raises(gr.Error, match="That file was not uploaded here"):
                asyncio.run(page.preprocess_data(None, inputs))
    assert asked == fine


def test_a_page_without_uploads_is_given_no_files(uploads):
    page, _ = recorded()
    server.keep_to_uploads(page, None)
    assert asyncio.run(page.preprocess_data(None, [["first"], 0.5])) == [["first"], 0.5]
    with pytest.raises(gr.Error):
        asyncio.run(page.preprocess_data(None, [[named(uploads / "a" / "cat.png")]]))


def test_it_is_open_to_this_machine_alone_unless_told():
    args = serve._parser().parse_args([])
    with server.open_port(args.host, 0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"
        opened.listen()
        with socket.create_connection(opened.getsockname()[:2], 5):
            pass
        # Another address of this machine, at which it would be, too, if it were open to all.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", opened.getsockname()[1]), 5)
    args = serve._parser().parse_args(["--host=0.0.0.0"])
    with server.open_port(args.host, 0) as opened:
        opened.listen()
        with socket.create_connection(("127.0.0.2", opened.getsockname()[1]), 5):
            pass


def test_a_port_that_is_taken_is_one_sentence():
    with server.open_port("127.0.0.1", 0) as opened:
        opened.listen()
        port = opened.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be served .*choose another --host or --port"):
            server.open_port("127.0.0.1", port)
