"""What FVD with the real I3D says where the answer is known, and how fast:
`python benchmarks/fvd_anchors.py WEIGHTS OUTPUT [FILM ...]`.

WEIGHTS is a folder with i3d, see docs/weights.md; the FILMs are cut into clips of 16 frames. Prints zeros against ones,
each film's classes, the distance of the clips to damaged versions of themselves, which OUTPUT, a .png, shows, and how
the distance of different clips depends on their number.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np
from PIL import Image, ImageFilter

from osv_jax.data.video import probe, read_clip
from osv_jax.evaluation.features import resize
from osv_jax.evaluation.frechet import Sample, score
from osv_jax.evaluation.networks import FeatureNetwork, load_network
from osv_jax.evaluation.protocols import PROTOCOLS

PROTOCOL = PROTOCOLS["stylegan-v"]
SIDE = 128
CLIPS_OF_A_FILM = 8
# What the network was trained on.
CLASSIFIED_FRAMES = 64
# Clips that are compared with as many others, and how often they are drawn.
SAMPLE_SIZES, DRAWS = (4, 8, 16), 10
COMPARED = ("shuffled", 16)
# By how much each damage is done: standard deviation [px]; standard deviation [of 255]; frames at the end that repeat
# the last before them; length of the stretches inside which frames are shuffled.
DAMAGES = {"blur": (1, 2, 4), "noise": (8, 16, 32), "frozen": (4, 8, 15), "shuffled": (4, 8, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("output")
    parser.add_argument("films", nargs="*", type=pathlib.Path)
    parser.add_argument("--labels", type=pathlib.Path, help="names of Kinetics-400's classes, one a line")
    args = parser.parse_args()
    for num_frames, side in ((15, 224), (30, 64)):
        network = load_network(args.weights, "i3d", num_frames, batch_size=2)
        both = np.stack([np.full((num_frames, side, side, 3), value, np.uint8) for value in (0, 255)])
        zeros, ones = features(network, both).astype(np.float64)
        print(f"zeros against ones, {num_frames} frames of {side} x {side}: {((zeros - ones) ** 2).sum():.2f}")
    classify(load_network(args.weights, "i3d", CLASSIFIED_FRAMES, batch_size=1), args.films, args.labels)
    network = load_network(args.weights, "i3d", PROTOCOL.num_frames)
    clips = np.concatenate([cut(film) for film in args.films])
    started, used = time.perf_counter(), time.process_time()
    real = features(network, clips)
    rate = len(clips) / (time.perf_counter() - started)
    used = (time.process_time() - used) / len(clips)
    print(f"{len(clips)} clips decoded before: {rate:.2f} a second, {used:.2f} s of CPU each")
    print(f"against themselves: {distance(real, real):.1e}")
    curves: dict[str, list[float]] = {name: [] for name in DAMAGES}
    vectors = {}
    for name, amounts in DAMAGES.items():
        for amount in amounts:
            rng = np.random.default_rng(0)
            damaged = np.stack([damage(clip, name, amount, rng) for clip in clips])
            vectors[name, amount] = features(network, damaged)
            curves[name].append(distance(real, vectors[name, amount]))
            print(f"{name} {amount}: {curves[name][-1]:.1f}", flush=True)
    draw(curves, args.output)
    compare_sample_sizes(real, vectors[COMPARED])


def classify(network: FeatureNetwork, films: list[pathlib.Path], labels: pathlib.Path | None) -> None:
    """Prints each film's three likeliest classes, from its first frames and their middle square."""
    names = labels.read_text().splitlines() if labels else [str(i) for i in range(400)]
    for film in films:
        info = probe(film)
        frames = read_clip(film, 0, network.num_frames, info.fps, info.height, info.width)
        logits = features(network, frames[None])[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:3]
        print(f"{film.name}: {', '.join(f'{names[i]} {100 * probabilities[i]:.1f} %' for i in best)}")


def cut(film: pathlib.Path) -> np.ndarray:
    """Clips [n f h w 3] of uint8, evenly spread."""
    info = probe(film)
    count = min(CLIPS_OF_A_FILM, info.num_frames // PROTOCOL.num_frames)
    last = (info.num_frames - PROTOCOL.num_frames) / info.fps
    starts = np.linspace(0, last, count)
    clip = [read_clip(film, float(start), PROTOCOL.num_frames, info.fps, SIDE, SIDE) for start in starts]
    return np.stack(clip)


def features(network: FeatureNetwork, clips: np.ndarray) -> np.ndarray:
    """Of clips [n f h w 3]: [n c]."""
    size = network.batch_size
    batches = (clips[first : first + size] for first in range(0, len(clips), size))
    return np.concatenate([network(np.stack([resize(c, PROTOCOL, network.side) for c in batch])) for batch in batches])


def distance(real: np.ndarray, fake: np.ndarray) -> float:
    weights = np.ones(len(real))
    return score(Sample(real, weights), Sample(fake, weights), PROTOCOL.unbiased).value


def compare_sample_sizes(real: np.ndarray, shuffled: np.ndarray) -> None:
    """Prints distances of disjoint random parts, both of them real or one shuffled: means and standard deviations."""
    rng = np.random.default_rng(0)
    for size in SAMPLE_SIZES:
        distances = []
        for _ in range(DRAWS):
            ours, theirs = rng.permutation(len(real))[: 2 * size].reshape(2, size)
            distances.append([distance(real[ours], other[theirs]) for other in (real, shuffled)])
        (same, other), (same_std, other_std) = np.mean(distances, axis=0), np.std(distances, axis=0)
        print(f"{size} against {size} clips: {same:.0f} +- {same_std:.0f}, shuffled {other:.0f} +- {other_std:.0f}")


def damage(clip: np.ndarray, name: str, amount: int, rng: np.random.Generator) -> np.ndarray:
    if name == "blur":
        kernel = ImageFilter.GaussianBlur(amount)
        return np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in clip])
    if name == "noise":
        return (clip + rng.normal(0, amount, clip.shape)).round().clip(0, 255).astype(np.uint8)
    if name == "frozen":
        return clip[np.minimum(np.arange(len(clip)), len(clip) - 1 - amount)]
    order = [start + rng.permutation(amount) for start in range(0, len(clip), amount)]
    return clip[np.concatenate(order)]


def draw(curves: dict[str, list[float]], output: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 2.6), sharey=True, layout="constrained")
    units = {"blur": "σ [px]", "noise": "σ [of 255]", "frozen": "frames", "shuffled": "in stretches of [frames]"}
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        axis.plot([0, *DAMAGES[name]], [0, *values], marker="o")
        axis.set(title=name, xlabel=units[name])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FVD (stylegan-v)")
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main()
