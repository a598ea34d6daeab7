"""I3D and VideoMAE behind one interface: from clips to feature vectors, on all devices of this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from osv_jax.convert import weights
from osv_jax.convert.architectures import ARCHITECTURES, Config
from osv_jax.errors import UserError
from osv_jax.evaluation.protocols import MIN_FRAMES
from osv_jax.models.i3d import SIDES, I3DConfig
from osv_jax.models.layers import apply
from osv_jax.models.videomae import VideoMAEConfig
from osv_jax.runtime.compiler import compiler_options
from osv_jax.runtime.finite import NotFinite, blame_weights, is_finite
from osv_jax.runtime.mesh import batch_shardings, make_mesh, replicated
from osv_jax.runtime.precision import matmul_precision

# What may be asked for, with what becomes of a pixel of 0 to 255: I3D takes -1 to 1, and CD-FVD gives VideoMAE 0 to 1.
_PIXELS = {"i3d": (1 / 127.5, -1.0), "videomae": (1 / 255, 0.0)}
NETWORKS = tuple(_PIXELS)


class FeatureNetwork:
    """A frozen network in float32, compiled once for one number of frames and clips.

    Args:
        name: one of `NETWORKS`.
        config: its sizes.
        params: its parameters.
        num_frames: of a clip, see `check_frames`.
        batch_size: clips in a batch, over all devices; fewer are padded.
        devices: by default those of this process.

    Attributes:
        name, num_frames, batch_size: as given.
        side: height and width of a clip [px].
        fingerprint: of its sizes and parameters.

    Raises:
        UserError: a batch that does not split over the devices.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        params: Mapping[str, Any],
        num_frames: int,
        batch_size: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = jax.local_devices() if devices is None else devices
        if batch_size % len(devices):
            raise UserError(
                f"--batch_size={batch_size} does not split over {len(devices)} devices; use a multiple of that."
            )
        self.name, self.num_frames, self.batch_size = name, num_frames, batch_size
        self.side = config.image_size if isinstance(config, VideoMAEConfig) else SIDES[-1]
        self.fingerprint = _fingerprint(config, params)
        self._mesh = mesh = make_mesh(len(devices), 1, devices=devices)
        self._params = jax.device_put(params, replicated(mesh))
        clips = jax.ShapeDtypeStruct((batch_size, num_frames, self.side, self.side, 3), jnp.float32)
        self._split = batch_shardings(mesh, clips)
        scale, offset = _PIXELS[name]
        network = ARCHITECTURES[name].network(config)

        def features(params: Mapping[str, Any], clips: Float[Array, "b f s s 3"]) -> Float[Array, "b c"]:
            return apply(network, {"params": params}, clips * scale + offset)

        inputs = jax.ShapeDtypeStruct(clips.shape, clips.dtype, sharding=self._split)
        # Its own mesh, also inside a training run, which has another.
        with jax.set_mesh(mesh), matmul_precision(jnp.float32):
            self._program = jax.jit(features).lower(self._params, inputs).compile(compiler_options())

    def __call__(self, clips: Float[np.ndarray, "n f s s 3"]) -> Float[np.ndarray, "n c"]:
        """The features of up to `batch_size` clips, of values from 0 to 255.

        Raises:
            UserError: features that are not finite, and whether the weights are to blame.
        """
        padded = np.pad(clips, [(0, self.batch_size - len(clips))] + [(0, 0)] * 4, mode="edge")
        with jax.set_mesh(self._mesh):
            vectors = np.asarray(self._program(self._params, jax.device_put(padded, self._split)))[: len(clips)]
        with blame_weights({self.name: self._params}):
            if not is_finite(vectors):
                raise NotFinite(f"{self.name} gives features that are NaN or infinite; use other weights.")
        return vectors


def load_network(folder: str, name: str, num_frames: int, batch_size: int | None = None) -> FeatureNetwork:
    """The network `name` of a weights folder, on all devices of this process.

    Args:
        batch_size: by default 4 clips for each device.

    Raises:
        UserError: as `weights.load_params`, `check_frames` and `FeatureNetwork`.
    """
    config = weights.load_config(folder, name)
    check_frames(config, num_frames)
    params = weights.load_params(folder, name, dtype=jnp.float32)
    return FeatureNetwork(name, config, params, num_frames, batch_size or 4 * jax.local_device_count())


def check_frames(config: Config, num_frames: int) -> None:
    """Raises UserError unless the network takes clips of so many frames."""
    if isinstance(config, I3DConfig) and num_frames < MIN_FRAMES:
        raise UserError(f"{num_frames} frames are too few for I3D, which halves them three times: use {MIN_FRAMES}.")
    if isinstance(config, VideoMAEConfig) and num_frames != config.num_frames:
        raise UserError(f"This VideoMAE takes clips of {config.num_frames} frames, not of {num_frames}.")


def _fingerprint(config: Config, params: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in sorted(flatten_dict(params).items()):
        digest.update(f"{'/'.join(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]
