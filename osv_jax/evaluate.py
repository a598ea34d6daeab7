"""Scores generated videos.

    python -m osv_jax.evaluate fvd --real=real_videos --fake=made_videos --protocol=stylegan-v --weights=weights

fvd: the Fréchet video distance. --protocol says what exactly that is: stylegan-v, cd-fvd, sf-v and osv give different
numbers for the same videos, see docs/evaluation.md. --weights is a folder that tools/convert_weights.py wrote, with
i3d or videomae in it. Features of the real videos are kept and used again as long as nothing changes that they depend
on; their file, which is printed, can be given instead of the folder, as --real or --fake.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from osv_jax.data.folder import FolderVideo, Skipped, list_videos
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
from osv_jax.evaluation.networks import NETWORKS, FeatureNetwork, load_network
from osv_jax.evaluation.protocols import PROTOCOLS, Protocol
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import COUNT, NUM_FRAMES, SEED, WHOLE

# Below, the distance says more about the number of videos than about them.
_FEW = 256
_MAX_WORKERS = 16


def main(given: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs the sub-command.

    Raises:
        UserError: on anything the user can fix.
    """
    args = _parser().parse_args(given)
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

    def make(source: _Source, kind: str, wanted: int | None = None) -> Features:
        videos, skipped = source.content
        total = min(len(videos), wanted or len(videos))
        with tqdm(total=total, desc=f"Features of {kind} videos", unit="video", file=sys.stderr) as bar:
            return make_features(videos, skipped, protocol, network, args.workers, wanted, bar.update)

    real_features = real.content
    if not isinstance(real_features, Features):
        key = fingerprint(*real.content, made_with)
        real_features, file = cached_features(cache, key, lambda: make(real, "real"))
        print(f"features of real videos: {file or 'not kept, as there is no --cache'}")
    _report("real", real_features)
    fake_features = fake.content
    if not isinstance(fake_features, Features):
        fake_features = make(fake, "generated", protocol.num_fake)
    _report("generated", fake_features)
    bar = functools.partial(tqdm, desc="Bootstrap", unit="draw", file=sys.stderr, leave=False)
    print(f"FVD by {protocol.name}: {fvd(real_features, fake_features, protocol, args.bootstrap, args.seed, bar)}")


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
    for name, reason in features.skipped:
        print(f"skipped: {name} {reason}")
    if len(features.vectors) < _FEW:
        print(f"warning: {len(features.vectors)} {kind} videos are few for a covariance; give {_FEW} or more.")


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser("evaluate", __doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = commands.add_parser("fvd", help="Fréchet video distance", description=__doc__)
    command.set_defaults(function=_fvd)
    add = command.add_argument
    add("--real", required=True, metavar="PATH", help=f"folder of real videos, or {SUFFIX} file of their features")
    add("--fake", required=True, metavar="PATH", help="the same of generated videos")
    add("--protocol", required=True, choices=PROTOCOLS, help="frames, resizing, network and covariance")
    add("--weights", required=True, metavar="DIR", help="folder that tools/convert_weights.py wrote")
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
