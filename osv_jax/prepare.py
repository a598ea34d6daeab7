"""Prepares a dataset of latents: `python -m osv_jax.prepare --source=videos --output=latents --weights=weights/svd`.

--source is a folder of videos, openvid:FOLDER with OpenVid-1M as it is published, or world, whose clips are drawn.
Started again with the same arguments, a run continues where it was stopped. --shard=0/4 ... --shard=3/4 divide the work
among machines, each with an --output of its own; --merge joins these. --inspect says what a dataset holds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from osv_jax.errors import UserError
from osv_jax.runtime import ending
from osv_jax.runtime.arguments import Parser, compilation_cache
from osv_jax.runtime.ranges import COUNT, FINITE, FPS, NOT_NEGATIVE, NUM_FRAMES, PIXELS, SEED, WHOLE, Range


def main(given: Sequence[str] | None = None) -> None:
    """Prepares, merges or inspects.

    Raises:
        UserError: on anything the user can fix, before anything is decoded where it can be known by then.
    """
    args = _parser().parse_args(given)
    modes = [name for name in ("source", "merge", "inspect") if getattr(args, name)]
    if len(modes) != 1:
        raise UserError("Give one of --source (to prepare), --merge (to join shards) and --inspect; see --help.")
    if modes[0] != "inspect" and not args.output:
        raise UserError(f"--{modes[0]} needs --output, the folder of the dataset.")
    # Every decoding process imports this module, because it is the program they were started from; JAX, which they
    # have no use for, would take them seconds.
    from osv_jax.preparation import pipeline

    {"source": pipeline.prepare, "merge": pipeline.merge, "inspect": pipeline.inspect}[modes[0]](args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("prepare", __doc__)
    add = parser.add_argument
    add("--source", metavar="DIR", help="folder of videos, openvid:FOLDER, or world")
    add("--merge", nargs="+", metavar="PART", help="outputs of all shards, to be joined in --output")
    add("--inspect", metavar="DATASET", help="report on a dataset; with --weights, draw samples")
    add("--output", metavar="DIR", help="folder of the dataset")
    add("--weights", metavar="DIR", help="folder that osv_jax.convert_weights wrote, or `miniature`")
    add(
        "--config",
        metavar="FILE",
        help="training configuration, e.g. configs/stage1.py:tiny, instead of --weights: its networks, and its"
        " num_frames, fps, height and width where these are not given",
    )
    add("--height", type=PIXELS, metavar="PX", help="a multiple of 8 (default 576)")
    add("--width", type=PIXELS, metavar="PX", help="a multiple of 8 (default 1024)")
    add("--num_frames", type=NUM_FRAMES, help="of a clip (default: the UNet's own, 14 for SVD and 25 for SVD-XT)")
    add("--fps", type=FPS, help="of a clip, 0.1 to 240 (default 7)")
    add("--stride", type=Range(0.001), metavar="S", help="seconds from clip to clip (default: clips follow each other)")
    add("--max_clips", type=COUNT, help="of one video (default: all)")
    add(
        "--min_motion",
        type=NOT_NEGATIVE,
        default=0.3,
        help="of a clip, see --inspect; less is static (default %(default)s)",
    )
    add("--num_augmented", type=COUNT, default=4, help="noise-augmented first frames of a clip (default %(default)s)")
    add("--seed", type=SEED, default=0, help="of noise and split, 0 to 2^32 - 1 (default %(default)s)")
    add(
        "--test_videos",
        type=WHOLE,
        help="for the split `test` (default: 1000 of OpenVid-1M, 1024 of world, 0 of a folder)",
    )
    add("--max_videos", type=COUNT, help="of the split `train`, at random (default: all; 4096 of world)")
    for score in ("aesthetic_score", "motion_score", "temporal_consistency_score"):
        add(f"--min_{score}", type=FINITE, metavar="X", help="OpenVid-1M's, of a video")
        add(f"--max_{score}", type=FINITE, metavar="X", help=argparse.SUPPRESS)
    add("--shard", default="0/1", metavar="I/N", help="prepare every N-th record file, from the I-th on")
    add(
        "--workers", type=COUNT, default=os.cpu_count(), help="decoding processes (default: as many as there are cores)"
    )
    add("--batch_size", type=COUNT, default=8, help="clips encoded at a time, over all devices (default %(default)s)")
    add("--videos_per_file", type=COUNT, default=256, help="videos whose clips share a file (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of CLIP (default: float32 on a CPU, else bfloat16)")
    return parser


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    if folder := compilation_cache():
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    ending.run(main)


if __name__ == "__main__":
    run()
