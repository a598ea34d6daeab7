"""Files and folders as people name them: on this machine, or in a bucket (`gs://BUCKET/NAME`).

On this machine a path is a `pathlib.Path`; in a bucket it is an `epath.Path`, which has the same methods. A bucket has
objects and no folders: each object is written whole or not at all, none can be appended to, renamed or locked, and a
folder is there as long as an object is in it. Imports no JAX, for the processes with which `osv_jax.prepare` decodes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from typing import TypeAlias, TypeGuard

import fsspec
from etils import epath

from osv_jax.errors import UserError

Path: TypeAlias = pathlib.Path | epath.Path
# The one kind of bucket that all that read and write here know: Orbax, TensorStore and ArrayRecord have no other.
_SCHEME = "gs://"
# epath would go through TensorFlow wherever that happens to be installed.
os.environ.setdefault("EPATH_USE_TF", "0")
# It logs the tracebacks of what it raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def as_path(name: str | os.PathLike) -> Path:
    """What a name stands for; `~` is the user's home.

    Raises:
        UserError: a bucket without a name, one that cannot be reached or for which the driver is missing; another kind
            of URL; `~` of nobody; a name that no file can have, or in a folder that may not be looked into.
    """
    text = os.fspath(name)
    if text.startswith(_SCHEME):
        bucket = text.removeprefix(_SCHEME).split("/")[0]
        if not bucket:
            raise UserError(f"{text} names no bucket; write gs://BUCKET/FOLDER.")
        _check_bucket(bucket)
        return epath.Path(text)
    if re.match(r"\w[\w+.-]*://", text):
        raise UserError(f"{text} is neither a local path nor in a bucket of Google Cloud Storage (gs://BUCKET/FOLDER).")
    if text.startswith("gs:/"):
        # pathlib makes one slash of two; a local folder called `gs:` is never meant.
        raise UserError(f"{text} has lost a slash of gs://; give it as a string.")
    try:
        path = pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} begins with the home of a user who has none here; write the path in full.") from error
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # Here, and not where `exists` is asked for the first time.
        raise UserError(
            f"{text} cannot be reached ({getattr(error, 'strerror', error)}); give another name."
        ) from error
    return path


@functools.lru_cache
def _check_bucket(bucket: str) -> None:
    """Once in a process, before any work: that the driver is there, and that it can list the bucket."""
    try:
        with contextlib.suppress(FileNotFoundError):
            _file_system().info(f"{bucket}/osv_jax")
    except ImportError as error:
        raise UserError(
            f"gs://{bucket} is a bucket, for which gcsfs is missing; run `pip install osv_jax[gcs]`."
        ) from error
    except Exception as error:  # gcsfs', aiohttp's and Google's own have no base in common
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"gs://{bucket} cannot be reached ({reason}); check the name, the network, and that you are logged in"
            " (`gcloud auth application-default login`)."
        ) from error


def _file_system() -> fsspec.AbstractFileSystem:
    """What epath goes through (the same object, as it remembers listings), for what it has no methods for."""
    return fsspec.filesystem("gcs", finalize_on_close=True)


def user_cache(name: str) -> pathlib.Path | None:
    """A folder for what can be made again, or None where there is no home, or one that cannot be written to."""
    with contextlib.suppress(OSError, RuntimeError):
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(cache, "osv_jax", name)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    return None


def in_bucket(path: str | os.PathLike) -> TypeGuard[epath.Path]:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def absolute(path: Path) -> Path:
    """`path.absolute()`, which would put a bucket into the current folder."""
    return path if in_bucket(path) else path.absolute()


def size_of(file: Path) -> int:
    """Of a file [bytes]."""
    return file.stat().length if isinstance(file, epath.Path) else file.stat().st_size


def files_below(folder: Path) -> dict[str, int]:
    """The files in a folder and in those inside it, sorted: the name relative to it -> size [bytes].

    Links to files are followed, links to folders are not. The size of a link to nowhere, or of what is no file, is -1.
    """
    if in_bucket(folder):
        root = os.fspath(folder).removeprefix(_SCHEME) + "/"
        found = _file_system().find(os.fspath(folder), detail=True)
        sizes = {name.removeprefix(root): info["size"] for name, info in found.items()}
    else:
        files = (pathlib.Path(root, name) for root, _, names in os.walk(folder) for name in names)
        # `isfile` is false also where nobody may look, for which pathlib's raises.
        sizes = {
            file.relative_to(folder).as_posix(): os.path.getsize(file) if os.path.isfile(file) else -1 for file in files
        }
    return dict(sorted(sizes.items()))


def remove_folder(folder: Path) -> None:
    """Deletes a folder and all that is in it, if it is there."""
    if in_bucket(folder):
        folder.rmtree(missing_ok=True)
    elif folder.exists():
        shutil.rmtree(folder)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file over another, or to where none is; between buckets no bytes pass through this machine."""
    if in_bucket(source) and in_bucket(target):
        _file_system().cp_file(os.fspath(source), os.fspath(target))
    elif in_bucket(source) or in_bucket(target):
        epath.Path(source).copy(target, overwrite=True)
    else:
        shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path) -> None:
    """Copies what is in a folder into a new one; a file whose name ends in config.json, which readers ask for, last."""
    for name in sorted(files_below(source), key=lambda name: (name.endswith("config.json"), name)):
        if not in_bucket(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, target / name)


def write_text(file: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    with new_file(file) as temporary:
        temporary.write_text(text)


def try_folder(folder: Path, option: str) -> None:
    """As `check_folder`, but nothing is left of a folder that was not there: the program may be refused yet."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    check_folder(folder, option)
    for place in missing:
        # Not where another process has begun to write by now; and a bucket has no empty folders.
        with contextlib.suppress(OSError):
            place.rmdir()


def check_folder(folder: Path, option: str) -> None:
    """Makes a folder, if it is not there, and tries to write to it, so that what cannot be is known before the work.

    Args:
        option: what gave the folder, for the message.

    Raises:
        UserError: it is a file, or cannot be made or written to.
    """
    trial = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_text("")
        trial.unlink()
    except FileExistsError as error:
        raise UserError(f"{folder} cannot be written to (it is a file): choose another {option}.") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written to ({reason}): choose another {option}.") from error


def check_file(file: Path, option: str) -> None:
    """Checks that a file can be made in a folder that can be written to, or be replaced there.

    Args:
        option: as in `check_folder`.

    Raises:
        UserError: it is a folder, is read-only, or has a name that cannot be.
    """
    if in_bucket(file):
        return
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): choose another {option}.") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{file} is a folder, where a file is to be written: choose another {option}.")
    # Who may do everything may write to a read-only file, too, but does not mean to.
    if not mode & 0o222 or not os.access(file, os.W_OK):
        raise UserError(f"{file} is read-only: choose another {option}, or make it writable.")


def check_apart(output: Path, *sources: Path) -> None:
    """Checks that nothing is overwritten that an output is made from; links are followed.

    Raises:
        UserError: the output is one of the sources, holds it or lies in it.
    """
    made = real(output)
    for source in sources:
        given = real(source)
        relation = (
            "is" if made == given else "holds" if made in given.parents else "lies in" if given in made.parents else ""
        )
        if relation:
            what = "its source" if relation == "is" else f"{source}, its source"
            raise UserError(f"The output {output} {relation} {what}: choose another output.")


def real(path: Path) -> Path:
    """Absolute, with links followed; two names of one file or folder are equal then."""
    return path if in_bucket(path) else pathlib.Path(os.path.realpath(path))


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
            copy_file(temporary, path)
        return
    # Of its own for every writer, as several processes may write the same.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
    """A local folder to fill, which at the end of the block takes the place of `path` and of what was there.

    On this machine it never exists half full under that name. To a bucket the files are uploaded one after the other;
    see `copy_folder`. If the block raises, `path` stays what it was.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            remove_folder(path)
            copy_folder(pathlib.Path(folder), path)
        return
    path = real(path)  # What a link names is replaced, not the link.
    partial = path.with_name(f".{path.name}.partial")
    try:
        remove_folder(partial)
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `new` to `target`; what was there before goes away last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def folder_of_package(module: str, advice: str) -> pathlib.Path:
    """The folder of an installed package, which is found but not imported: only its files are wanted.

    Args:
        module: what it is imported as.
        advice: how to get it, as a sentence.

    Raises:
        UserError: `advice`, if it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(advice)
    return pathlib.Path(spec.submodule_search_locations[0])
