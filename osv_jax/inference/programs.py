"""What pipelines have in common: parameters on devices, and programs that are compiled once and timed."""

from __future__ import annotations

import abc
import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt8

from osv_jax.errors import UserError
from osv_jax.inference.clock import Clock
from osv_jax.runtime.compiler import compiler_options
from osv_jax.runtime.finite import blame_weights
from osv_jax.runtime.media import to_uint8
from osv_jax.runtime.mesh import BATCH_AXES, batch_shardings, make_mesh, replicated
from osv_jax.runtime.precision import matmul_precision
from osv_jax.runtime.ranges import SEED

DTYPES = ("bfloat16", "float32")
# Activations of a decoder fit into float16, which is more exact than bfloat16.
DECODE_DTYPES = (*DTYPES, "float16")

# Compiled once in a process, and shared by all models of the same networks.
_PROGRAMS: dict[Hashable, Callable] = {}


class Pipeline(abc.ABC):
    """Networks that make videos. Nothing waits for the devices but what returns NumPy arrays, and `wait`.

    Attributes:
        notice: a sentence about the LoRA for the user, or empty.
        params: of the networks, by name.
        seconds: by part, of `parts`; what is started from now on adds its time there when it is done. May be replaced.
        clock: what measures them.
        on_part: called with the name of each part as it begins; for the UNet, with the number of the evaluation, too.
        before_part: called by who makes a video before each part is started; what it raises ends the video.
    """

    notice: str

    def __init__(self, parts: Sequence[str], params: Mapping[str, Any], context: int, data: int):
        """`context` devices share every video, `data` groups of them a batch."""
        self.devices = make_mesh(data, 1, context, jax.local_devices()[: data * context])
        self.params = jax.device_put(dict(params), replicated(self.devices))
        self.seconds = dict.fromkeys(parts, 0.0)
        self.clock = Clock()
        self.on_part: Callable[[str], None] = lambda part: None
        self.before_part: Callable[[], None] = lambda: None

    @property
    @abc.abstractmethod
    def identity(self) -> Hashable:
        """What programs depend on besides their inputs' shapes: the networks, without parameters."""

    @abc.abstractmethod
    def dtype_of(self, component: str) -> Any:
        """What a network computes in."""

    @abc.abstractmethod
    def complete(self, options: Any) -> Any:
        """Options with the model's own values for what is not said; those of `options.py` or `text_options.py`."""

    @abc.abstractmethod
    def __call__(self, *inputs: Any, **options: Any) -> UInt8[np.ndarray, "f height width 3"]:
        """Makes a video."""

    @abc.abstractmethod
    def start_decoding(
        self, latents: Float[Array | np.ndarray, "b f latent_h latent_w c"], chunk_size: int
    ) -> list[Float[Array, "b _f h w 3"]]:
        """Frames, about in [-1, 1], of scaled latents, `chunk_size` frames at a time."""

    def frames(
        self, latents: Float[Array | np.ndarray, "b f latent_h latent_w c"], chunk_size: int
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """Pixels of scaled latents; see `start_decoding` and `pixels`."""
        return self.pixels(self.start_decoding(latents, chunk_size))

    def pixels(self, decoded: list[Float[Array, "b _f h w 3"]]) -> UInt8[np.ndarray, "b f h w 3"]:
        """Waits for what `start_decoding` has started.

        Raises:
            UserError: values that are not finite, naming the weights if they are the cause.
        """
        with blame_weights(self.params):
            return to_uint8(np.concatenate([np.asarray(chunk) for chunk in decoded], axis=1))

    def wait(self) -> None:
        """Until all that has been started is done, and `seconds` has its time."""
        self.clock.last.result()

    def _run(self, part: str, component: str, function: Callable, *inputs: Any, progress: str = "") -> Any:
        """Starts `function(params, *inputs)`, compiled for these shapes, whose time is added up when it is done."""
        self.before_part()
        params, inputs = self.params[component], jax.device_put(inputs, batch_shardings(self.devices, inputs))
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(inputs))
        program = (part, self.identity, self.devices, jax.tree.structure(inputs), shapes)
        if program not in _PROGRAMS:
            self.on_part(f"compiling {part}")
            start = time.perf_counter()
            # Clips stay where they are made; of a clip, every device that shares it has the whole.
            split = NamedSharding(self.devices, PartitionSpec(BATCH_AXES))
            options = compiler_options()
            with jax.set_mesh(self.devices), matmul_precision(self.dtype_of(component)):
                compiled = jax.jit(function, out_shardings=split).lower(params, *inputs).compile(options)
            _PROGRAMS[program] = compiled
            self.seconds["compile"] += time.perf_counter() - start
        result = _PROGRAMS[program](params, *inputs)
        self.clock.add(self.seconds, part, result, functools.partial(self.on_part, part + progress))
        return result


def check_choices(choices: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Raises UserError unless each option, by name, has one of the values allowed for it."""
    for name, (chosen, allowed) in choices.items():
        if chosen not in allowed:
            raise UserError(f"{name} {chosen!r} is not one of {', '.join(allowed)}.")


def check_devices(context: int) -> None:
    """Raises UserError unless this machine has so many devices."""
    available = jax.local_device_count()
    if not 1 <= context <= available:
        raise UserError(f"context={context} must lie in 1 .. {available}, the devices of this machine.")


def default_dtype() -> str:
    """What networks compute in where nothing is said."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def video_key(seed: int, number: int) -> Key[Array, ""]:
    """What one of several videos draws its noise from.

    Raises:
        UserError: a seed or a number that is not in 0 to 2^32 - 1.
    """
    SEED.check("seed", seed)
    SEED.check("number", number)
    return jax.random.fold_in(jax.random.key(seed), number)


def chunks_of(
    latents: Float[Array | np.ndarray, "b f latent_h latent_w c"], size: int
) -> list[Float[Array | np.ndarray, "b _f latent_h latent_w c"]]:
    """The clips `size` frames at a time."""
    return [latents[:, start : start + size] for start in range(0, latents.shape[1], size)]


def normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise, float32, each sample's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
