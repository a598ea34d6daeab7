"""JSON that other programs wrote, read strictly: an object in which no name stands twice."""

from __future__ import annotations

import json
from typing import Any

from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, or see `parse_json`.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check the path and its permissions.") from error
    return parse_json(text, file)


def parse_json(text: str | bytes, source: Any) -> dict[str, Any]:
    """The object that `text` is.

    Args:
        source: what messages call it.

    Raises:
        UserError: no JSON, another value than an object, or a name twice in one object. (NaN and infinity are read: who
            asks for a number can say which one it must be.)
    """
    try:
        content = json.loads(text, object_pairs_hook=_object)
        # Half of a pair of surrogates is no text, and could not be printed.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # Among the first: bytes that are not UTF-8.
        raise UserError(f"{source} is not readable JSON ({error}): get another copy of it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} does not map names to values: get another copy of it.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} twice")
        found[name] = value
    return found
