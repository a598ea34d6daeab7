"""OpenVid-1M as it is published: a CSV about videos that lie in zip archives, some of which are split into parts.

Videos are read straight from the archives. A member's name serves to look up its row and for nothing else.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import pathlib
import re
import string
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

from osv_jax.data.cutting import Location, open_archive
from osv_jax.data.folder import Skipped, printable
from osv_jax.data.video import EXTENSIONS
from osv_jax.errors import UserError
from osv_jax.preparation.sources import SourceVideo
from osv_jax.runtime.paths import Path, files_below

SCORES = ("aesthetic score", "motion score", "temporal consistency score")
_COLUMNS = ("video", "caption", *SCORES)
# OpenVid_part73_partaa, OpenVid_part73_partab, ... or OpenVidHD_part_15_part_aa, ...: one archive in parts.
_PART = re.compile(r"(?P<parts>(?P<archive>.+)_part_?)[a-z]{2}$")


@dataclasses.dataclass(frozen=True)
class Row:
    """What the CSV says about a video."""

    caption: str
    scores: Mapping[str, float]


def read_openvid(
    folder: Path, minimum: Mapping[str, float], maximum: Mapping[str, float]
) -> tuple[list[SourceVideo], Skipped]:
    """The videos that have a row and whose scores lie within bounds, in the order of the archives.

    Args:
        folder: with the archives and the CSV, at any depth.
        minimum, maximum: bounds by the name of a score, see `SCORES`.

    Raises:
        UserError: if there is no CSV with the columns, no archive, or no video left.
    """
    rows, skipped = read_rows(_find_csv(folder))
    archives = list(find_archives(folder))
    if not archives:
        raise UserError(f"{folder} holds no archive of OpenVid-1M (OpenVid_part0.zip, ...); give the folder with them.")
    videos: dict[str, SourceVideo] = {}
    rejected: set[str] = set()
    for name, copies in archives:
        files, members = _open_first(name, copies, skipped)
        for index, member in enumerate(members):
            if member.filename.endswith("/"):
                continue
            source, key = f"{name}/{printable(member.filename)}", member.filename.rsplit("/", 1)[-1]
            row = rows.get(key)
            reason = _unusable(member) or (None if row else "has no row in the CSV")
            if row and not reason:
                reason = _out_of_bounds(row, minimum, maximum)
            if not reason and key in videos:
                reason = f"is there twice; {videos[key].name} was used"
            if reason:
                skipped.append((source, reason))
                rejected.add(key)
            elif row:
                location = Location(files, index)
                videos[key] = SourceVideo(source, location, member.file_size, row.caption)
    found = videos.keys() | rejected
    skipped += [(key, "is in the CSV, but in no archive") for key in rows if key not in found]
    if not videos:
        reasons = "".join(f"\n  {name} {reason}" for name, reason in skipped[:10])
        raise UserError(f"None of the videos in {folder} can be used; loosen the bounds or add archives:{reasons}")
    return list(videos.values()), skipped


def find_archives(folder: Path) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Names of the archives, and the files of each: whole, in parts, or both. Numbers in names count as numbers."""
    archives: dict[str, dict[str, list[str]]] = {}
    # In the order of their names `a.zip` comes before `a_partaa`.
    for name, size in files_below(folder).items():
        path = pathlib.PurePosixPath(name)
        part = _PART.match(path.name)
        if size >= 0 and (path.suffix.lower() == ".zip" or part):
            whole = path.with_name(part["archive"] + ".zip") if part else path
            copies = archives.setdefault(printable(whole.as_posix()), {})
            copies.setdefault(part["parts"] if part else path.name, []).append(str(folder / name))
    for name in sorted(archives, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]):
        yield name, [tuple(files) for files in archives[name].values()]


def _open_first(
    name: str, copies: Iterable[tuple[str, ...]], skipped: Skipped
) -> tuple[tuple[str, ...], list[zipfile.ZipInfo]]:
    """Files and directory of the first copy of an archive that opens; the others before it are added to `skipped`.

    A failed download leaves a whole archive that is empty or cut short beside its parts.
    """
    reasons: list[str] = []
    for files in copies:
        missing = _missing_part(files)
        if missing:
            reasons.append(f"cannot be joined from its parts, of which {missing} is missing")
            continue
        try:
            members = open_archive(files).infolist()
        except Exception as error:  # zipfile meets damage with exceptions of all kinds.
            reasons.append(f"cannot be opened as a zip archive ({error})")
            continue
        skipped += [(name, f"{reason}; {pathlib.Path(files[0]).name} beside it serves") for reason in reasons]
        return files, members
    skipped += [(name, reason) for reason in reasons]
    return (), []


def _missing_part(files: Sequence[str]) -> str | None:
    """The first part that is not there, though later ones are."""
    letters = map("".join, itertools.product(string.ascii_lowercase, repeat=2))
    for file, expected in zip(files, letters, strict=False):
        part = _PART.match(pathlib.PurePosixPath(file).name)
        if part and not file.endswith(expected):
            return part["parts"] + expected
    return None


def read_rows(file: Path) -> tuple[dict[str, Row], Skipped]:
    """The rows by the video's file name; of several about one video the first."""
    rows: dict[str, Row] = {}
    skipped: Skipped = []
    with _open_csv(file) as opened:
        reader = csv.DictReader(opened)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                skipped.append((f"{file.name}, line {reader.line_num}", f"cannot be read ({error})"))
                continue
            name = row["video"] or ""
            try:
                scores = {score: float(row[score]) for score in SCORES}
            except (TypeError, ValueError):
                skipped.append((name or f"{file.name}, line {reader.line_num}", "has a row without its scores"))
                continue
            if name in rows:
                skipped.append((name, "has two rows in the CSV; the first was used"))
            else:
                rows[name] = Row(row["caption"] or "", scores)
    return rows, skipped


def _find_csv(folder: Path) -> Path:
    """The CSV with the columns; OpenVid-1M.csv, which has all videos, before any other."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the one with OpenVid-1M's archives and its CSV.")
    files = [folder / name for name in files_below(folder) if name.endswith(".csv")]
    for file in sorted(files, key=lambda path: (path.name != "OpenVid-1M.csv", path)):
        with contextlib.suppress(OSError, csv.Error), _open_csv(file) as opened:
            if set(_COLUMNS) <= set(next(csv.reader(opened), [])):
                return file
    raise UserError(f"{folder} holds no CSV with the columns {', '.join(_COLUMNS)}; put OpenVid-1M.csv there.")


def _open_csv(file: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(file.open("rb"), newline="", encoding="utf-8-sig", errors="replace")


def _unusable(member: zipfile.ZipInfo) -> str | None:
    path = pathlib.PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        return "has a name that leads out of the archive"
    if member.flag_bits & 1:
        return "is encrypted"
    if path.suffix.lower() not in EXTENSIONS:
        return "does not end in the extension of a video, such as .mp4"
    return None


def _out_of_bounds(row: Row, minimum: Mapping[str, float], maximum: Mapping[str, float]) -> str | None:
    for score, bound in minimum.items():
        if not row.scores[score] >= bound:
            return f"has {score} {row.scores[score]:g}, below {bound:g}"
    for score, bound in maximum.items():
        if not row.scores[score] <= bound:
            return f"has {score} {row.scores[score]:g}, above {bound:g}"
    return None
