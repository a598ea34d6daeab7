"""Networks for videos of texts about the drawn world, before they are trained: benchmarks/text_to_video.py.

    python benchmarks/text_world.py runs/text/weights

The image VAE is the miniature's, whose encoder is one of images; the decoder, which looks along the frames, loses what
it does that for and learns to do without on frames of the world. The tokenizer has the words of the world's captions.
The text encoder is random and stays so; both UNets are random, and the motion modules' last layers 0, as AnimateDiff's
are at first, so that clips begin as images.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from osv_jax.convert import weights
from osv_jax.convert.text_to_video import TOKENIZER
from osv_jax.data import world
from osv_jax.models.clip_text import CLIPTextConfig
from osv_jax.models.layers import apply
from osv_jax.models.svd_vae import ImageVAE
from osv_jax.models.text_unet import MotionConfig, TextUNetConfig
from osv_jax.objectives.autoencoder import frame_psnr
from osv_jax.objectives.random_networks import random_params, shapes_of
from osv_jax.runtime import ending, paths
from osv_jax.runtime.arguments import Parser
from osv_jax.runtime.media import to_float
from osv_jax.runtime.ranges import COUNT

HEIGHT, WIDTH, FPS = 32, 48, 12.0
_WIDTHS = (64, 96)
UNET = TextUNetConfig(
    block_out_channels=_WIDTHS,
    layers_per_block=1,
    num_attention_heads=(2, 3),
    has_attention=(True, True),
    cross_attention_dim=64,
)
MOTION = MotionConfig(block_out_channels=_WIDTHS, motion_layers_per_block=1, motion_num_attention_heads=2)
_CAPTIONS, _MERGES = 2000, 400
_FRAMES, _TEST_FRAMES, _BATCH, _RATE = 2048, 64, 8, 1e-3

Params = Mapping[str, Any]


def make_weights(output: pathlib.Path, steps: int) -> float:
    """Writes a weights folder, whole or not at all; returns the VAE's PSNR [dB] on frames of other clips.

    Args:
        steps: updates of the VAE's decoder, on 8 frames each.
    """
    with paths.new_folder(output) as folder:
        vocabulary = save_tokenizer(folder / TOKENIZER)
        text = CLIPTextConfig(
            hidden_size=UNET.cross_attention_dim,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=vocabulary,
        )
        architectures: dict[str, Any] = {"unet_2d": UNET, "motion_adapter": MOTION, "text_encoder": text}
        for name, params in first_parameters(architectures).items():
            weights.save_component(folder / name, name, architectures[name], params, output)
        config = weights.load_config("miniature", "vae")
        made, psnr = image_vae(ImageVAE(config), weights.load_params("miniature", "vae", dtype=jnp.float32), steps)
        scaled = dataclasses.replace(config, scaling_factor=made.pop("scaling_factor"))
        weights.save_component(folder / "image_vae", "image_vae", scaled, jax.tree.map(np.asarray, made), output)
    return psnr


def save_tokenizer(folder: pathlib.Path) -> int:
    """Writes vocab.json and merges.txt as CLIP's, with every byte and the captions' words; returns how many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(letters) + _MERGES, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    addresses = (world.Address(0, "train", number) for number in range(_CAPTIONS))
    encoder.train_from_iterator((world.scene(address).caption.lower() for address in addresses), trainer)
    merges = [tuple(pair) for pair in json.loads(encoder.to_str())["model"]["merges"]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return len(tokens)


def first_parameters(architectures: Mapping[str, Any]) -> dict[str, Params]:
    """Of both UNets and the text encoder; NumPy arrays, float32."""
    shapes = shapes_of(architectures)
    made = {name: flatten_dict(random_params(tree, 0, np.float32)) for name, tree in shapes.items()}
    for path, leaf in made["motion_adapter"].items():
        if path[-2] == "proj_out":
            leaf[...] = 0
    for path, leaf in made["text_encoder"].items():
        if path[-1] == "embedding":
            # Of unit size, so that states tell which token they are of.
            leaf *= 1 / leaf.std()
    return {name: unflatten_dict(tree) for name, tree in made.items()}


def image_vae(vae: ImageVAE, video: Params, steps: int) -> tuple[dict[str, Any], float]:
    """An image VAE's parameters, with its `scaling_factor` beside them, and its PSNR [dB] on frames of the test split.

    Args:
        video: the parameters of a video VAE whose encoder, and so whose latents, it keeps.
    """
    images, tests = to_float(frames("train", _FRAMES)), to_float(frames("test", _TEST_FRAMES))
    params = {**video, "decoder": spatial(video["decoder"]), "post_quant_conv": identity(vae.config.latent_channels)}

    @jax.jit
    def encode(batch: Array) -> Array:
        return apply(vae, {"params": params}, batch, method="encode")[0]

    def loss(decoder: Params, latents: Array, batch: Array) -> Array:
        decoded = apply(vae, {"params": {**params, "decoder": decoder}}, latents, method="decode")
        return jnp.abs(decoded - batch).mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, max(steps, 1)))

    @jax.jit
    def update(decoder: Params, state: Any, latents: Array, batch: Array) -> tuple[Params, Any]:
        updates, state = optimizer.update(jax.grad(loss)(decoder, latents, batch), state)
        return optax.apply_updates(decoder, updates), state

    decoder, state, order = params["decoder"], optimizer.init(params["decoder"]), np.random.default_rng(0)
    for _ in range(steps):
        batch = images[order.integers(0, len(images), _BATCH)]
        decoder, state = update(decoder, state, encode(batch), batch)
    params["decoder"] = decoder
    latents = np.concatenate([np.asarray(encode(tests[i : i + _BATCH])) for i in range(0, len(tests), _BATCH)])
    decode = jax.jit(lambda z: apply(vae, {"params": params}, z, method="decode"))
    decoded = np.concatenate([np.asarray(decode(latents[i : i + _BATCH])) for i in range(0, len(tests), _BATCH)])
    return params | {"scaling_factor": float(1 / latents.std())}, float(frame_psnr(decoded[None], tests[None]).mean())


def spatial(decoder: Params) -> dict[str, Any]:
    """A video decoder's parameters without what looks along the frames; at its end, what that does to still frames."""
    flat = {}
    for path, leaf in flatten_dict(decoder).items():
        if not {"temporal_res_block", "time_mixer", "time_conv_out"} & set(path):
            flat[tuple(name for name in path if name != "spatial_res_block")] = leaf
    last = decoder["time_conv_out"]
    mixing = last["kernel"].sum(axis=(0, 1, 2))
    flat["conv_out", "kernel"] = flat["conv_out", "kernel"] @ mixing
    flat["conv_out", "bias"] = flat["conv_out", "bias"] @ mixing + last["bias"]
    return unflatten_dict(flat)


def identity(channels: int) -> dict[str, Array]:
    """A convolution that changes nothing."""
    return {"kernel": jnp.eye(channels)[None, None], "bias": jnp.zeros(channels)}


def frames(split: str, count: int) -> np.ndarray:
    """The first frames of so many clips of a split, uint8 [n h w 3]."""
    scenes = (world.scene(world.Address(0, split, number)) for number in range(count))
    return np.concatenate([world.draw(scene, 1, FPS, HEIGHT, WIDTH) for scene in scenes])


def main(given: Sequence[str] | None = None) -> None:
    """Writes the weights folder."""
    parser = Parser(prog="python benchmarks/text_world.py", description=__doc__)
    parser.add_argument("output", metavar="DIR", help="weights folder to write")
    parser.add_argument("--steps", type=COUNT, default=800, help="of the VAE's decoder (default %(default)s)")
    args = parser.parse_args(given)
    psnr = make_weights(pathlib.Path(args.output), args.steps)
    print(f"{args.output}: the image VAE has {psnr:.2f} dB on {_TEST_FRAMES} frames of other clips.")


if __name__ == "__main__":
    ending.run(main)
