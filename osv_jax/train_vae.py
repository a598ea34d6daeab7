"""Trains a VAE: `python -m osv_jax.train_vae --config=configs/vae.py:tiny --workdir=runs/vae`.

Started again with the same arguments it resumes, exactly, from the last checkpoint. The workdir receives config.json,
checkpoints/, metrics.jsonl, tensorboard/, pictures/, losses.png, and at the end `vae/`, part of a weights folder,
whose `scaling_factor` gives the training clips' latents unit variance. SIGTERM and Ctrl-C are taken as `osv_jax.train`
does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, UInt8
from ml_collections import ConfigDict, config_flags

from osv_jax.convert import weights
from osv_jax.convert.architectures import expected_params
from osv_jax.data import pixels
from osv_jax.errors import UserError
from osv_jax.models.layers import apply
from osv_jax.models.lpips import LPIPS, SMALLEST_SIDE, load_lpips
from osv_jax.models.svd_vae import SVDVAE, VAEConfig
from osv_jax.objectives.autoencoder import Autoencoder, AutoencoderOptions, frame_psnr, without_neighbours
from osv_jax.objectives.networks import Params
from osv_jax.objectives.options import DTYPES, from_config, setting
from osv_jax.objectives.players import TrainState, first_state
from osv_jax.objectives.random_networks import random_params
from osv_jax.runtime import checkpoint, command_line, media, mesh, metrics, paths
from osv_jax.runtime.finite import check_finite
from osv_jax.runtime.media import to_float
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.precision import matmul_precision
from osv_jax.runtime.ranges import COUNT, FPS, NUM_FRAMES, PIXELS, SEED
from osv_jax.training.clips import PixelClips, index_folder
from osv_jax.training.config import Phase, check_architectures
from osv_jax.training.loop import Picture, Run, run_phase

# Clips that reconstructions and the scaling factor are measured on, and those that are drawn.
_MEASURED_CLIPS, _DRAWN_CLIPS = 256, 7


@dataclasses.dataclass(frozen=True)
class VAEDataOptions:
    """The clips, described in configs/vae.py."""

    videos: str = "videos"
    test_videos: str = ""
    num_frames: int = setting(1, NUM_FRAMES)
    fps: float = setting(24.0, FPS)
    height: int = setting(64, PIXELS)
    width: int = setting(96, PIXELS)
    crop: tuple[int, ...] = setting((32, 48), PIXELS)


@dataclasses.dataclass(frozen=True)
class VAERunOptions:
    """What a run has beside `AutoencoderOptions`, described in configs/vae.py."""

    seed: int = setting(0, SEED)
    data: VAEDataOptions = dataclasses.field(default_factory=VAEDataOptions)
    batch_size: int = setting(8, COUNT)
    dtype: str = setting("float32", DTYPES)
    log_every: int = setting(20, COUNT)
    picture_every: int = setting(500, COUNT)
    checkpoint_every: int = setting(250, COUNT)
    keep_checkpoints: int = setting(2, COUNT)


def train_vae(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes one training run.

    Raises:
        UserError: on anything the user can fix, before compilation starts where it can be known by then.
    """
    architecture = check_config(config)
    if config.init_from:
        paths.check_apart(workdir / "vae", weights.locate(config.init_from) / "vae")
    checkpoint.check_workdir(workdir, config.to_dict())
    devices = mesh.make_mesh(-1, 1)
    if config.batch_size % devices.size:
        raise UserError(f"config.batch_size={config.batch_size} does not split over {devices.size} devices.")
    data = config.data
    index = index_folder(data.videos, data, data.height, data.width, workdir / "clips.json")
    test = index_folder(data.test_videos or data.videos, data, data.height, data.width, workdir / "test_clips.json")
    checkpoint.write_config(workdir, config.to_dict())

    objective = _objective(config, architecture)
    start = checkpoint.latest_step(workdir) or 0
    phase = Phase(0, config.num_steps, data.height, data.width)
    with (
        jax.set_mesh(devices),
        matmul_precision(config.dtype),
        checkpoint.open_checkpoints(workdir, config.keep_checkpoints) as checkpoints,
        contextlib.closing(metrics.MetricsWriter(workdir, start, jax.process_index())) as writer,
    ):
        params = jax.device_put(_first_params(config, architecture), mesh.replicated(devices))
        state = jax.device_put(
            first_state(objective.init(jax.random.key(0), {"vae": params})), mesh.replicated(devices)
        )
        rest = {name: part for name, part in params.items() if name not in state.players["vae"].params}
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        clips = PixelClips(config, index)
        if start:
            clips.check_position(phase, checkpoint.restore_data(checkpoints, start))
            state = checkpoint.restore_state(checkpoints, start, checkpoint.abstract(state, shardings))
            print(f"Resuming from step {start}.")
        size = sum(x.size for x in jax.tree.leaves(params))
        print(f"VAE of {size / 1e6:.2f} M on {len(index.clips)} clips of {config.data.num_frames} frame(s)", flush=True)

        def make_picture(phase: Phase) -> Picture:
            def picture(state: TrainState, frozen: Params) -> tuple[np.ndarray, dict[str, float]]:
                psnr, image = reconstruct(objective.networks, {**frozen["vae"], **state.players["vae"].params}, test)
                return image, {"test_psnr": psnr}

            return picture

        run = Run(
            *(config, workdir, objective, devices, clips, {"vae": rest}, shardings, checkpoints, writer),
            picture_name="reconstructions",
            make_picture=make_picture,
        )
        if start < phase.end:
            state = run_phase(run, phase, start, state)
        params = jax.tree.map(np.asarray, {**rest, **state.players["vae"].params})
    if jax.process_index() == 0:
        factor = (
            scaling_factor(objective.networks, params, index) if config.train == "all" else architecture.scaling_factor
        )
        save_vae(workdir, architecture, factor, params)
        print(f"Done: {workdir / 'vae'}, scaling_factor {factor:.5f}.")


def check_config(config: ConfigDict) -> VAEConfig:
    """The architecture of a configuration whose values are possible.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    from_config(VAERunOptions, config)
    from_config(AutoencoderOptions, config)
    check_architectures(config.architecture.to_dict(), "config.architecture.")
    if config.train == "decoder" and not config.init_from:
        raise UserError("config.train='decoder' needs config.init_from, a trained VAE whose latents it keeps.")
    if config.init_from:
        architecture = weights.load_config(config.init_from, "vae")
    else:
        try:
            architecture = VAEConfig(**config.architecture.to_dict())
        except TypeError as error:
            raise UserError(
                f"config.architecture={config.architecture.to_dict()} has a key that VAEConfig lacks."
            ) from error
    factor, crop = architecture.downscale, tuple(config.data.crop)
    if len(crop) != 2:
        raise UserError(f"config.data.crop={crop} must be a height and a width, e.g. (32, 48).")
    for name, part in zip(("height", "width"), crop, strict=True):
        if config.data[name] % factor:
            raise UserError(f"config.data.{name}={config.data[name]} must be a multiple of {factor}, the VAE's factor.")
        if part > config.data[name] or part % factor:
            raise UserError(
                f"config.data.crop={crop} must be multiples of {factor}, the VAE's factor, and no more than height and"
                " width."
            )
    if config.lpips_weight and min(crop) < SMALLEST_SIDE:
        raise UserError(f"config.data.crop={crop} is too small for LPIPS, which needs {SMALLEST_SIDE} pixels a side.")
    if config.lpips_weight:
        load_lpips()  # Complains if it is missing.
    return architecture


def _first_params(config: ConfigDict, architecture: VAEConfig) -> Params:
    if config.init_from:
        params = weights.load_params(config.init_from, "vae", dtype=jnp.float32)
        check_finite(params, f"config.init_from={config.init_from}")
        return params
    shapes = unflatten_dict(expected_params("vae", architecture))
    return without_neighbours(random_params(shapes, config.seed, np.float32))


def _objective(config: ConfigDict, architecture: VAEConfig) -> Autoencoder:
    perceptual = None
    if config.lpips_weight:
        lpips = load_lpips()
        perceptual = lambda x, y: apply(LPIPS(), {"params": lpips}, x, y)  # noqa: E731
    vae = SVDVAE(architecture, dtype=jnp.dtype(config.dtype))
    return Autoencoder(vae, from_config(AutoencoderOptions, config), perceptual=perceptual)


def reconstruct(vae: SVDVAE, params: Params, index: pixels.ClipIndex) -> tuple[float, UInt8[np.ndarray, "h w 3"]]:
    """Clips through the mode of their latents: mean PSNR [dB] over the frames, and a picture of a few of them.

    Of an index with more than 256 clips, 256 spread over it are taken.
    """
    psnr, rows = [], []
    chosen = pixels.spread(len(index.clips), _MEASURED_CLIPS)
    drawn = {chosen[i] for i in pixels.spread(len(chosen), _DRAWN_CLIPS)}
    for i in chosen:
        video = index.read(i)["video"]
        output = _apply(vae, params, to_float(video)[None])
        psnr += np.asarray(frame_psnr(output, to_float(video)[None])).ravel().tolist()
        if i in drawn:
            frames = media.to_uint8(np.asarray(output[0]))
            rows.append((video[len(video) // 2], frames[len(frames) // 2]))
    originals, reconstructions = (np.stack(frames) for frames in zip(*rows, strict=True))
    picture = media.sample_grid({"originals": originals, "reconstructions": reconstructions}, _DRAWN_CLIPS)
    return float(np.mean(psnr)), picture


# Compiled once, not for every picture.
@functools.partial(jax.jit, static_argnums=0)
def _apply(vae: SVDVAE, params: Params, video: Array) -> Array:
    return apply(vae, {"params": params}, video)


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: SVDVAE, params: Params, images: Array) -> Array:
    return apply(vae, {"params": params}, images, method="encode")[0]


def scaling_factor(vae: SVDVAE, params: Params, index: pixels.ClipIndex) -> float:
    """1 / standard deviation of the latents' modes, over all elements of up to 256 clips spread over the index."""
    chosen = pixels.spread(len(index.clips), _MEASURED_CLIPS)
    with matmul_precision(vae.dtype):
        values = [np.asarray(_encode(vae, params, to_float(index.read(i)["video"])), np.float64) for i in chosen]
    deviation = float(np.std(values))
    if not deviation:
        raise UserError("The latents of all clips are the same value: no factor gives them unit variance; add videos.")
    return 1 / deviation


def save_vae(workdir: Path, architecture: VAEConfig, factor: float, params: Params) -> None:
    """Writes `workdir/vae`, whole or not at all."""
    made = dataclasses.replace(architecture, scaling_factor=factor)
    with paths.new_folder(workdir / "vae") as folder:
        weights.save_component(folder, "vae", made, params, workdir)


def run() -> None:
    """Parses the command line and trains; see `command_line.run`."""
    config = config_flags.DEFINE_config_file("config", help_string="A file of configs/, e.g. configs/vae.py:tiny.")
    workdir = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")

    def main(argv: list[str]) -> None:
        if config.value is None or workdir.value is None:
            raise UserError("Both --config and --workdir are needed, e.g. --config=configs/vae.py --workdir=runs/vae.")
        train_vae(config.value, as_path(workdir.value))

    command_line.run(main)


if __name__ == "__main__":
    run()
