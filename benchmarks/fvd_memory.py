"""Resident memory of `python -m osv_jax.evaluate fvd` by the number of videos.

    python benchmarks/fvd_memory.py [COUNT ...]

Makes COUNT videos (64 and 1,024) and scores them against themselves, in a process of its own, with a small random I3D,
whose own memory hides little. Reports how much was resident half way, which is between the two sets, and at most.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.convert.weights import save_packed
from osv_jax.models.i3d import I3DConfig
from osv_jax.objectives.random_networks import random_frozen
from osv_jax.runtime.media import write_video

CONFIG = I3DConfig(stem_channels=8)
FRAMES, HEIGHT, WIDTH, FPS = 10, 64, 96, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[64, 1024], metavar="COUNT")
    for count in parser.parse_args().counts:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            save_packed(folder / "weights" / "i3d", "i3d", CONFIG, random_i3d(), folder)
            write_videos(folder / "videos", count)
            half, peak, seconds = run(folder)
        print(f"{count:,} videos: {half:.0f} MiB half way, at most {peak:.0f} MiB; {seconds:.0f} s", flush=True)


def random_i3d() -> dict[str, Any]:
    """Parameters that keep signals alive."""
    params = flatten_dict(random_frozen({"i3d": CONFIG}, np.float32)["i3d"])
    return unflatten_dict({path: np.ones_like(x) if path[-1] == "running_var" else x for path, x in params.items()})


def write_videos(folder: pathlib.Path, count: int) -> None:
    """Clips of noise that drifts."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        picture = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        frames = np.stack([np.roll(picture, shift, axis=1) for shift in range(FRAMES)])
        write_video(folder / f"{number:05}.mp4", frames, FPS)


def run(folder: pathlib.Path) -> tuple[float, float, float]:
    """Resident memory when half of the program's time had passed, and the largest [MiB]; seconds."""
    given = [f"--{name}={folder / part}" for name, part in (("real", "videos"), ("fake", "videos"), ("cache", "cache"))]
    given += [f"--weights={folder / 'weights'}", "--protocol=stylegan-v", f"--frames={FRAMES}", "--bootstrap=2"]
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "osv_jax.evaluate", "fvd", *given], stdout=subprocess.PIPE) as program:
        status = pathlib.Path(f"/proc/{program.pid}/status")
        resident = []
        while program.poll() is None:
            resident += [int(size) / 1024 for size in re.findall(r"VmRSS:\s*(\d+)", status.read_text())]
            time.sleep(0.1)
    if program.returncode:
        raise SystemExit(program.returncode)
    return resident[len(resident) // 2], max(resident), time.monotonic() - started


if __name__ == "__main__":
    main()
