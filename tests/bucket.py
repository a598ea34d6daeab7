"""A stand-in for a bucket: objects in memory, for epath as a file system and for C++ clients as a server.

Objects are written whole when they are closed, none can be appended to, and there are no folders. TensorStore (with
which Orbax writes arrays) and ArrayRecord have drivers of their own, which only a server that speaks Google Cloud
Storage's protocol can stand in for; it runs in a thread.
"""

import contextlib
import functools
import importlib
import io
import json
import re
import threading
import types
import urllib.parse
from http import server

import fsspec
from etils.epath import backend
from fsspec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils

from osv_jax.runtime import paths

# `BUCKET/NAME` -> its bytes. TensorStore, and with it what is left of a test's threads, outlives tests.
OBJECTS: dict[str, bytes] = {}


class BucketFileSystem(AbstractFileSystem):
    """What stands in for gcsfs."""

    protocol = ("gs", "gcs")
    cachable = False

    def ls(self, path, detail=True, **_):
        name = self._strip_protocol(path)
        if name in OBJECTS:
            found = {name: "file"}
        else:
            inside = [key[len(name) + 1 :] for key in list(OBJECTS) if key.startswith(f"{name}/")]
            found = {f"{name}/{rest.split('/')[0]}": "directory" if "/" in rest else "file" for rest in inside}
        if not found:
            raise FileNotFoundError(path)
        infos = [{"name": key, "type": kind, "size": len(OBJECTS.get(key, b""))} for key, kind in sorted(found.items())]
        return infos if detail else [info["name"] for info in infos]

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path])
        assert mode == "wb", mode
        return _Written(path)

    def rm(self, path, recursive=False, **_):
        name = self._strip_protocol(path)
        doomed = [key for key in list(OBJECTS) if key == name or (recursive and key.startswith(f"{name}/"))]
        if not doomed:
            raise FileNotFoundError(path)
        for key in doomed:
            OBJECTS.pop(key, None)

    def rmdir(self, path):
        raise FileNotFoundError(path)

    def cp_file(self, path1, path2, **_):
        OBJECTS[self._strip_protocol(path2)] = OBJECTS[self._strip_protocol(path1)]

    def mkdir(self, path, create_parents=True, **_):
        """There are none."""

    def makedirs(self, path, exist_ok=False):
        """There are none."""


class _Written(io.BytesIO):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def close(self):
        if not self.closed:
            OBJECTS[self.path] = self.getvalue()
        super().close()


class _Requests(server.BaseHTTPRequestHandler):
    """Google Cloud Storage's JSON interface, as far as TensorStore and ArrayRecord use it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        bucket, name, query = self._target()
        if name is None:
            inside = (key.removeprefix(f"{bucket}/") for key in sorted(OBJECTS) if key.startswith(f"{bucket}/"))
            first, end = query.get("startOffset", ""), query.get("endOffset")
            names = [name for name in inside if name >= first and (end is None or name < end)]
            self._answer_json({"items": [self._describe(f"{bucket}/{name}") for name in names]})
        elif f"{bucket}/{name}" not in OBJECTS:
            self._answer(404)
        else:
            data = OBJECTS[f"{bucket}/{name}"]
            start, end = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
            start, end = (int(start), int(end or len(data)) + 1) if start else (-int(end), len(data))
            start, end = max(0, start + len(data)) if start < 0 else start, min(end, len(data))
            ranges = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} if "Range" in self.headers else {}
            headers = {"x-goog-generation": self._generation(data), **ranges}
            self._answer(206 if ranges else 200, data[start:end], headers)

    def do_POST(self):
        bucket, _, query = self._target()
        name = f"{bucket}/{query['name']}"
        OBJECTS[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer_json(self._describe(name))

    def do_DELETE(self):
        bucket, name, _ = self._target()
        self._answer(204 if OBJECTS.pop(f"{bucket}/{name}", None) is not None else 404)

    def _target(self):
        url = urllib.parse.urlsplit(self.path)
        bucket, name = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path).groups()
        return bucket, name and urllib.parse.unquote(name), dict(urllib.parse.parse_qsl(url.query))

    def _describe(self, name):
        bucket, _, rest = name.partition("/")
        data = OBJECTS[name]
        return {"bucket": bucket, "name": rest, "size": str(len(data)), "generation": self._generation(data)}

    def _generation(self, data):
        return str(hash(data) & 0xFFFFFFFF)

    def _answer_json(self, content):
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status, body=b"", headers=types.MappingProxyType({})):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@functools.cache
def _server() -> str:
    """Its address. TensorStore asks once where to go, so there is one for all tests."""
    http = server.ThreadingHTTPServer(("127.0.0.1", 0), _Requests)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{http.server_port}"


def stand_in(monkeypatch, file_system=BucketFileSystem):
    """From here to the end of the test `gs://` means `OBJECTS`, which is empty at first."""
    OBJECTS.clear()
    for variable in ("TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        monkeypatch.setenv(variable, _server())
    registry = importlib.import_module("fsspec.registry")._registry
    for name in BucketFileSystem.protocol:
        monkeypatch.setitem(registry, name, file_system)
    # What remembers another file system, or that there is none.
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: fsspec.filesystem(name))
    monkeypatch.setattr(paths, "_check_bucket", paths._check_bucket.__wrapped__)
    # Orbax asks Google's own client what kind of bucket it is.
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: types.SimpleNamespace())
