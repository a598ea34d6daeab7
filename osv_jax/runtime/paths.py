"""Files and folders as people name them: on this machine, or in a bucket (`gs://BUCKET/NAME`).

On this machine a path is a `pathlib.Path`; in a bucket it is an `epath.Path`, which has the same methods. A bucket has
objects and no folders: each object is written whole or not at all, none can be appended to, renamed or locked, and a
folder is there as long as an object is in it. Imports no JAX, for the processes with which `osv_jax.prepare` decodes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Iterator

import fsspec
from etils import epath

from osv_jax.errors import UserError

Path = pathlib.Path | epath.Path
# The one kind of bucket that all that read and write here know: Orbax, TensorStore and ArrayRecord have no other.
_BUCKET = "gs://"
# epath would go through TensorFlow wherever that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")


def as_path(name: str | os.PathLike) -> Path:
    """What a name stands for; `~` is the user's home.

    Raises:
        UserError: a bucket for which the driver is missing or that has no name, another kind of URL, or `~` of nobody.
    """
    text = os.fspath(name)
    if text.startswith(_BUCKET):
        if not re.match(r"gs://[^/]+", text):
            raise UserError(f"{text} names no bucket; write gs://BUCKET/FOLDER.")
        try:
            fsspec.get_filesystem_class("gs")
        except ImportError as error:
            raise UserError(f"{text} is in a bucket, for which gcsfs is missing; run `pip install gcsfs`.") from error
        return epath.Path(name)
    if re.match(r"\w[\w+.-]*://", text):
        raise UserError(f"{text} is neither a local path nor in a bucket of Google Cloud Storage (gs://BUCKET/FOLDER).")
    if text.startswith("gs:/"):
        # pathlib makes one slash of two; a local folder called `gs:` is never meant.
        raise UserError(f"{text} has lost a slash of gs://; give it as a string.")
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} begins with the home of a user who has none here; write the path in full.") from error


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(_BUCKET)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[pathlib.Path]:
    """A local name to write to. At the end of the block the file becomes `path`; if the block raises, it is gone.

    It lies beside `path`, so that renaming it is atomic, or for a bucket in the folder for temporary files, from where
    it is uploaded. Its name has no ending: tell the format to what writes it.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder, "new")
            yield temporary
            epath.Path(temporary).copy(path, overwrite=True)
        return
    # Of its own for every writer, as several processes may write the same.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
