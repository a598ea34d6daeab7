"""The page on which results are looked at: a table and the films, side by side and in step.

`page.html` is the page without its data: HTML, CSS and plain JavaScript in one file, which works from disk.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Literal

from osv_jax.runtime import paths
from osv_jax.runtime.finite import strict_json
from osv_jax.runtime.paths import Path

_FILE = "index.html"
# In the template, where the data goes.
_DATA = "@DATA@"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        key: of its value in a row.
        title: above it.
        unit: of its numbers, after the title; "" for none.
        best: which of its numbers is marked and comes first when sorted, if one is better than another.
        digits: after the decimal point.
    """

    key: str
    title: str
    unit: str
    best: Literal["low", "high"] | None
    digits: int


def write_page(
    output: Path,
    title: str,
    about: Sequence[tuple[str, str]],
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, float | str | None]],
    films: Mapping[str, Sequence[str]],
) -> None:
    """Writes index.html, whole or not at all. All texts are shown as they are: none of them is read as HTML.

    Args:
        output: a folder that is there.
        about: what was measured and how: names and values.
        rows: a method each, in the order they are first shown in: its `name`, and values by the columns' keys. KEY_low
            and KEY_high are the interval of a number. What is missing, None or not finite is shown as missing.
        films: by method, the film of every clip: a file that a browser plays, as a path relative to `output`.

    `real` is the name of what methods are to come near to: as a row it is never the best.
    """
    data = {
        "title": title,
        "about": about,
        "columns": [dataclasses.asdict(column) for column in columns],
        "rows": rows,
        # A list, as JavaScript sorts the keys of an object that are numbers.
        "films": list(films.items()),
    }
    template = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    # No `</script>` ends the element that the data is in. What is not ASCII is escaped already.
    embedded = strict_json(data).replace("<", "\\u003c")
    paths.write_text(output / _FILE, template.replace(_DATA, embedded))
