"""What was exported, put where programs look for what they have of a model hub: `from_pretrained("OWNER/NAME")`.

The layout is that of the cache of huggingface_hub, which programs without network read alone: in
`models--OWNER--NAME`, `snapshots/REVISION` has the files and `refs/main` the newest revision.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import re
from typing import Any

from osv_jax.errors import UserError
from osv_jax.runtime import paths
from osv_jax.runtime.paths import as_path, in_bucket

_CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def add_parser(commands: Any) -> None:
    """The command line of `run`."""
    push = commands.add_parser("push", help="an export, to where programs look for what is of a hub; without network")
    push.add_argument("source", metavar="EXPORTED", help="folder that export-lora has written")
    push.add_argument("name", metavar="OWNER/NAME", help="what programs ask for")
    push.add_argument("--hub", metavar="FOLDER", help="(default: HF_HUB_CACHE, or ~/.cache/huggingface/hub)")


def run(args: argparse.Namespace) -> None:
    """Pushes, and says where to."""
    snapshot = push(args.source, args.name, args.hub or default_hub())
    print(f"{snapshot} is the newest of {args.name}: with HF_HUB_OFFLINE=1, programs load it by that name.")


def default_hub() -> str:
    """Where huggingface_hub has its cache on this machine."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return os.environ.get("HF_HUB_CACHE") or f"{home}/hub"


def push(source: str | os.PathLike, name: str, hub: str | os.PathLike) -> pathlib.Path:
    """Copies an export into a hub's folder; the same files again are the same revision.

    Args:
        source: what `export-lora` has written.
        name: `OWNER/NAME`.
        hub: a folder of this machine.

    Returns:
        The folder of this revision.

    Raises:
        UserError: no export, a name that hubs do not have, or a folder that cannot be written to.
    """
    folder, target = as_path(source), as_path(hub)
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".", "-", ".git")):
        raise UserError(
            f"{name} is no name of a model on a hub: give OWNER/NAME, of letters, digits, -, _ and single dots."
        )
    if not (folder / _CARD).is_file():
        raise UserError(f"{folder} has no {_CARD}: give a folder that export-lora has written.")
    if in_bucket(folder) or in_bucket(target):
        raise UserError("Exports are pushed from a folder of this machine to another: copy them out of the bucket.")
    model = pathlib.Path(target, f"models--{name.replace('/', '--')}")
    paths.check_folder(model / "snapshots", "--hub")
    paths.check_folder(model / "refs", "--hub")
    revision = _revision(pathlib.Path(folder))
    snapshot = model / "snapshots" / revision
    if not snapshot.exists():
        with paths.new_folder(snapshot) as partial:
            paths.copy_folder(folder, partial)
    # Last: until then whoever asks has the revision before.
    paths.write_text(model / "refs" / "main", revision)
    return snapshot


def _revision(folder: pathlib.Path) -> str:
    """40 hexadecimal digits, as Git's, of the names and contents of all files."""
    found = hashlib.sha1(usedforsecurity=False)
    for name in paths.files_below(folder):
        with (folder / name).open("rb") as file:
            found.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
