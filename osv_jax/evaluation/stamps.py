"""What a file was when it was used, so that what was made from it can be used again as long as it is that."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from osv_jax.runtime.paths import Path, files_below, in_bucket, size_of

# Size [bytes] and time of each file, by its name.
Stamp = dict[str, tuple[int, int]]


def modified(file: Path) -> int:
    """A number that changes with the file; in a bucket, seconds."""
    return int(file.stat().mtime) if in_bucket(file) else file.stat().st_mtime_ns


def stamp(*sources: Path) -> Stamp:
    """Of files, and of all files in folders; of what is not there, nothing."""
    files = [
        file
        for source in sources
        for file in ([source / name for name in files_below(source)] if source.is_dir() else [source])
    ]
    return {str(file): (size_of(file), modified(file)) for file in files if file.exists()}


def as_text(description: Any) -> str:
    """As JSON, the same for what is equal."""
    return json.dumps(description, sort_keys=True)


def fingerprint(description: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(as_text(description).encode()).hexdigest()[:32]
