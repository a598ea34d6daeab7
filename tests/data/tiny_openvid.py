"""An imitation of OpenVid-1M as it is published: a CSV, zips with videos inside, one zip split into parts."""

from __future__ import annotations

import csv
import pathlib
import zipfile

import synthetic_video

COLUMNS = (
    *("video", "caption", "aesthetic score", "motion score", "temporal consistency score"),
    *("camera motion", "frame", "fps", "seconds"),
)


def row(video: str, caption: str = "A caption.", aesthetic: object = 5.0, motion: object = 3.0) -> dict[str, object]:
    scores = {"aesthetic score": aesthetic, "motion score": motion, "temporal consistency score": 0.99}
    rest = {"camera motion": "static", "frame": 14, "fps": 10, "seconds": 1.4}
    return {"video": video, "caption": caption, **scores, **rest}


def write_csv(file: pathlib.Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def split_file(file: pathlib.Path) -> None:
    """Cuts a file into three, named as OpenVid-1M's."""
    data = file.read_bytes()
    third = len(data) // 3
    for name, part in zip(("aa", "ab", "ac"), (data[:third], data[third : 2 * third], data[2 * third :]), strict=True):
        file.with_name(f"{file.stem}_part{name}").write_bytes(part)
    file.unlink()


def write_openvid(folder: pathlib.Path, num_videos: int = 6, clip_frames: int = 14) -> None:
    """Archives 0, 2 and 10, the last split; one video without a row and one row without a video.

    Videos are 14 frames at 10 fps: three clips of 4 frames at 10 fps each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"video {i:02d}_é.mp4" for i in range(num_videos)]
    video = synthetic_video.write_constant(folder / "video.tmp.mp4", clip_frames, 10)
    data = video.read_bytes()
    video.unlink()
    groups = {"OpenVid_part0": names[:2], "OpenVid_part10": names[2:4], "OpenVid_part2": [*names[4:], "norow.mp4"]}
    for archive, members in groups.items():
        with zipfile.ZipFile(folder / f"{archive}.zip", "w") as opened:
            for i, member in enumerate(members):
                # Stored and compressed, at the top and in a folder.
                kind = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
                opened.writestr(f"videos/{member}" if i % 2 else member, data, kind)
    split_file(folder / "OpenVid_part10.zip")
    rows = [row(name, f'Line "{i}",\nand another.', aesthetic=4 + i) for i, name in enumerate(names)]
    write_csv(folder / "data" / "train" / "OpenVid-1M.csv", [*rows, row("novideo.mp4")])
