"""Real video that costs little: decoding the demo's large ones takes longer than training the smallest networks."""

import contextlib
import pathlib

from osv_jax.data import demo

_FOLDER = pathlib.Path(__file__).parents[1] / ".cache" / "small_videos"


def small_videos() -> pathlib.Path:
    """A folder with the smallest of the demo's videos alone, 4 s of 176x144."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (_FOLDER / "carphone.mp4").symlink_to(next(demo.demo_videos().glob("carphone*.mp4")).resolve())
    return _FOLDER
