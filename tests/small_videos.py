"""Real video that costs little: decoding the demo's takes longer than training the smallest networks."""

import os
import pathlib

import av

from osv_jax.data import demo

_FOLDER = pathlib.Path(__file__).parents[1] / ".cache" / "small_videos"


def small_videos() -> pathlib.Path:
    """A folder with one of the demo's videos alone: its 4 s, but 44x36, and of frames that need no other to decode."""
    file = _FOLDER / "carphone.mp4"
    if not file.is_file() or file.is_symlink():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        # Under its name once it is whole, as another process may be here, too.
        written = _FOLDER.parent / f"carphone_{os.getpid()}.mp4"
        _reduce(next(demo.demo_videos().glob("carphone*.mp4")), written)
        written.replace(file)
    return _FOLDER


def _reduce(source: pathlib.Path, target: pathlib.Path) -> None:
    with av.open(source) as original, av.open(target, "w") as reduced:
        stream = reduced.add_stream("mpeg4", rate=original.streams.video[0].average_rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 44, 36, "yuv420p", 1
        stream.bit_rate = 1_000_000
        for frame in original.decode(video=0):
            reduced.mux(stream.encode(frame.reformat(44, 36, "yuv420p")))
        reduced.mux(stream.encode())
