"""OpenVid-1M as it is published: a CSV about videos that lie in zip archives, some of which are split into parts.

Videos are read straight from the archives. A member's name serves to look up its row and for nothing else.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping

from osv_jax.data.cutting import Location, open_archive
from osv_jax.data.video import EXTENSIONS
from osv_jax.errors import UserError
from osv_jax.preparation.sources import Skipped, SourceVideo, printable
from osv_jax.runtime.paths import Path, files_below

SCORES = ("aesthetic score", "motion score", "temporal consistency score")
_COLUMNS = ("video", "caption", *SCORES)
# OpenVid_part73_partaa, OpenVid_part73_partab, ...: one archive in parts.
_PART = re.compile(r"(?P<archive>.+)_part(?P<part>[a-z]{2})$")


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
    for name, files in archives:
        try:
            members = open_archive(files).infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            skipped.append((name, f"cannot be opened as a zip archive ({error})"))
            continue
        for index, member in enumerate(members):
            if member.is_dir():
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
            else:
                location = Location(files, index)
                videos[key] = SourceVideo(source, location, member.file_size, row.caption)
    found = videos.keys() | rejected
    skipped += [(key, "is in the CSV, but in no archive") for key in rows if key not in found]
    if not videos:
        reasons = "".join(f"\n  {name} {reason}" for name, reason in skipped[:10])
        raise UserError(f"None of the videos in {folder} can be used; loosen the bounds or add archives:{reasons}")
    return list(videos.values()), skipped


def find_archives(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and files of the archives; the numbers in names count as numbers."""
    archives: dict[str, list[Path]] = {}
    sizes = files_below(folder)
    for name, size in sizes.items():
        path = pathlib.PurePosixPath(name)
        part = _PART.match(path.name)
        if size >= 0 and (path.suffix.lower() == ".zip" or part):
            whole = path.with_name(part["archive"] + ".zip") if part else path
            # The joined archive, where somebody has made it, serves instead of its parts.
            if not (part and sizes.get(whole.as_posix(), -1) >= 0):
                archives.setdefault(printable(whole.as_posix()), []).append(folder / name)
    for name in sorted(archives, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]):
        yield name, tuple(str(path) for path in archives[name])


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
        with _open_csv(file) as opened:
            header = next(csv.reader(opened), [])
        if set(_COLUMNS) <= set(header):
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
