"""The last results, in a folder that outlives the program."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from osv_jax.runtime import paths
from osv_jax.runtime.finite import strict_json

_IDENTIFIER = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
_DESCRIPTION = "result.json"
# All that is ever served of a result.
_FILE = re.compile(r"(image\.png|(teacher|student)\.(mp4|gif))")
IMAGE = "image.png"


@dataclasses.dataclass(frozen=True)
class Result:
    """Videos made of an image at once.

    Attributes:
        identifier: the name of its folder; later ones sort after earlier ones.
        about: how it was made, see `studio.Studio.make`.
    """

    identifier: str
    about: dict[str, Any]


class Results:
    """A folder with a folder for each result, of which the newest are kept.

    Each is written under another name and renamed, so that a result is whole or not there.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        """Args:
        folder: one that can be written to; what else is in it is left alone.
        keep: how many.
        """
        self._folder, self._keep, self._lock = folder, keep, threading.Lock()
        for left in folder.glob(".*.partial"):
            if _IDENTIFIER.fullmatch(left.name[1:].removesuffix(".partial")):
                paths.remove_folder(left)

    def add(self, about: dict[str, Any], write: Callable[[pathlib.Path], None]) -> Result:
        """Keeps what `write` writes into a folder, and drops the oldest if these are too many."""
        identifier = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        with paths.new_folder(self._folder / identifier) as partial:
            write(partial)
            paths.write_text(partial / _DESCRIPTION, strict_json(about, indent=2) + "\n")
        with self._lock:
            for old in self._names()[self._keep :]:
                with contextlib.suppress(OSError):
                    paths.remove_folder(self._folder / old)
        return Result(identifier, about)

    def newest(self) -> list[Result]:
        """All there are, the newest first; what is damaged is left out."""
        return [result for name in self._names() if (result := self.get(name)) is not None]

    def get(self, identifier: str) -> Result | None:
        """The result of that name, if there is one."""
        if not _IDENTIFIER.fullmatch(identifier):
            return None
        with contextlib.suppress(OSError, ValueError):
            about = json.loads((self._folder / identifier / _DESCRIPTION).read_text())
            if isinstance(about, dict) and isinstance(about.get("videos"), list):
                return Result(identifier, about)
        return None

    def file(self, identifier: str, name: str) -> pathlib.Path | None:
        """A picture or a video of a result; None for any other name, whatever there is."""
        if not _IDENTIFIER.fullmatch(identifier) or not _FILE.fullmatch(name):
            return None
        file = self._folder / identifier / name
        return file if file.is_file() and not file.is_symlink() else None

    def _names(self) -> list[str]:
        return sorted((path.name for path in self._folder.iterdir() if _IDENTIFIER.fullmatch(path.name)), reverse=True)
