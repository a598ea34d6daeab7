"""What the program `osv_jax.prepare` does, apart from its command line."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from osv_jax.codec import Codec, TextCodec, parameter_dtype
from osv_jax.convert import weights
from osv_jax.convert.text_to_video import tokenizer_of
from osv_jax.convert.tokenizer import Tokenizer
from osv_jax.data import demo, latents, world
from osv_jax.data.cutting import Cutting
from osv_jax.data.schemas import Schema, TextSchema
from osv_jax.errors import UserError
from osv_jax.models.clip_text import CLIPText
from osv_jax.models.clip_vision import CLIPVision
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.models.svd_vae import SVDVAE, ImageVAE
from osv_jax.objectives.options import DTYPES
from osv_jax.objectives.random_networks import random_components, random_frozen
from osv_jax.preparation import batches, report, shards
from osv_jax.preparation.decoding import Decoder
from osv_jax.preparation.encoder import ClipName, Encoder, TextEncoder
from osv_jax.preparation.openvid import SCORES, read_openvid
from osv_jax.preparation.sources import Source, read_folder, read_world, split_videos
from osv_jax.runtime import paths
from osv_jax.runtime.media import write_picture
from osv_jax.runtime.paths import Path, as_path
from osv_jax.runtime.ranges import COUNT
from osv_jax.training import setup
from osv_jax.training.config import check_config, read_config

_OPENVID = "openvid:"
_OPENVID_TEST_VIDEOS = 1000
# Of the world, which has no end.
_WORLD_VIDEOS = {"train": 4096, "test": 1024}
_SHEET = "contact_sheet.png"
# Settings of clips for videos from text: AnimateDiff's 16 frames of 512 x 512, every fourth of 30 a second.
_TEXT_CLIPS = {"num_frames": 16, "fps": 7.5, "height": 512, "width": 512}


def prepare(args: argparse.Namespace) -> None:
    """`--source`: prepares a dataset, or the part of it that `--shard` names.

    Raises:
        UserError: on anything the user can fix.
    """
    config = _read_config(args.config)
    folder, networks = _networks(args, config)
    index, count = _shard(args.shard)
    settings = _settings(args, config, networks)
    settings["networks"] = _fingerprint(folder, config, networks)
    output = as_path(args.output)
    paths.check_apart(output, *_source_folders(args), *([weights.locate(folder)] if folder else []))
    source = read_source(args)
    own = [chunk for chunk in shards.chunks_of(source, args.videos_per_file) if chunk.index % count == index]
    if _used(networks) == TextEncoder.networks:
        _tell_missing_captions(source)
    if not own:
        raise UserError(f"--shard={args.shard} has nothing to do: use fewer shards, or a smaller --videos_per_file.")
    plan = {
        "shard": f"{index}/{count}",
        "videos": {split: len(videos) for split, videos in source.splits.items()},
        "videos_hash": source.fingerprint(),
        **settings,
    }
    with shards.locked(output):
        shards.check_plan(output, plan)
        if (output / "dataset_info.json").exists():
            paths.remove_folder(output / shards.UNFINISHED)
            print(f"{output} is complete.\n{report.describe(output)}")
            return
        shards.write_source_chunk(output, source.skipped)
        progress = shards.resume(output, own)
        encoder = _encoder(folder, config, networks, settings)
        values = _run(args, own, progress, encoder, settings, output)
        metadata = {name: settings[name] for name in ("num_frames", "fps", "height", "width")}
        chunks = [shards.SOURCE_CHUNK, *(chunk.index for chunk in own)]
        shards.publish(output, chunks, encoder.schema, metadata | encoder.metadata | {"settings": settings})
    print(report.describe(output))
    print(report.summary(values))
    _draw_sheet(output, encoder)


def _tell_missing_captions(source: Source) -> None:
    captions = [video.caption for videos in source.splits.values() for video in videos]
    if missing := sum(not caption.strip() for caption in captions):
        print(f"{missing} of {len(captions)} videos have no caption: they are given the empty prompt.")


def _run(
    args: argparse.Namespace,
    chunks: Sequence[shards.Chunk],
    progress: Mapping[int, shards.Progress],
    encoder: Encoder,
    settings: Mapping[str, Any],
    output: Path,
) -> batches.Tally:
    """Decodes, encodes and commits what `progress` leaves to do."""
    total = sum(len(chunk.videos) for chunk in chunks)
    todo = [chunk for chunk in chunks if not progress[chunk.index].complete]
    left = sum(len(chunk.videos) - progress[chunk.index].video for chunk in todo)
    before = f", {total - left} of {total} were done before" if left < total else ""
    print(f"{left} videos to prepare{before}; {args.workers} decoding processes", flush=True)

    def encode(video: np.ndarray, names: Sequence[ClipName]) -> Mapping[str, np.ndarray]:
        return encoder(video, encoder.inputs(names, settings["seed"]))

    cutting = Cutting(**{name: settings[name] for name in Cutting.__dataclass_fields__})
    with contextlib.ExitStack() as stack:
        decoder = stack.enter_context(Decoder(args.workers))
        bar = stack.enter_context(
            tqdm(total=total, initial=total - left, desc="Preparing", unit="video", file=sys.stderr)
        )

        def on_commit(tally: batches.Tally) -> None:
            rate, busy = f"{tally.clips_per_second:.3g} clips/s", f"encoder busy {100 * tally.utilisation:.0f} %"
            bar.set_postfix_str(f"{tally.clips} clips, {rate}, {busy}", refresh=False)
            bar.update(total - left + tally.videos - bar.n)

        read = batches.read_batches(decoder, todo, progress, cutting, settings["batch_size"])
        features = encoder.schema.features()
        return batches.encode_batches(read, encode, features, settings["fps"], output, on_commit)


def merge(args: argparse.Namespace) -> None:
    """`--merge`: joins the datasets of all shards.

    Raises:
        UserError: parts that do not belong together, or of which one is missing or unfinished.
    """
    output = as_path(args.output)
    shards.merge([as_path(part) for part in args.merge], output)
    print(report.describe(output))


def inspect(args: argparse.Namespace) -> None:
    """`--inspect`: reports on a dataset; with weights, draws decoded samples.

    Raises:
        UserError: if it is no finished dataset.
    """
    folder = as_path(args.inspect)
    print(report.describe(folder))
    if not (args.weights or args.config):
        print(f"Give --weights (or --config) to draw decoded samples, {_SHEET}, too.")
        return
    paths.check_folder(folder, "--inspect, or leave --weights out")
    paths.check_file(folder / _SHEET, "--inspect, or leave --weights out")
    config = _read_config(args.config)
    weights_folder, networks = _networks(args, config)
    settings = _settings_of(folder)
    if _fingerprint(weights_folder, config, networks) != settings["networks"]:
        print("These are not the weights that the dataset was made with: the samples may look wrong.")
    _draw_sheet(folder, _encoder(weights_folder, config, networks, settings))


def _settings_of(folder: Path) -> dict[str, Any]:
    """What a dataset was prepared with, as far as drawing needs it."""
    settings = latents.read_metadata(folder).get("settings")
    sizes = ("num_frames", "height", "width", "num_augmented", "batch_size")
    if (
        not isinstance(settings, dict)
        or settings.get("dtype") not in DTYPES
        or not all(settings.get(name) in COUNT for name in sizes)
        or "networks" not in settings
    ):
        raise UserError(f"{folder} is damaged: its metadata.json does not say how it was prepared; copy it again.")
    return settings


def _draw_sheet(folder: Path, encoder: Encoder) -> None:
    split = report.splits(folder)[0]
    sheet = report.contact_sheet(latents.open_dataset(folder, split), encoder.decode)
    write_picture(folder / _SHEET, sheet)
    print(f"Decoded samples: {folder / _SHEET}")


def _source_folders(args: argparse.Namespace) -> list[Path]:
    """The folder that `--source` names; the world is in none."""
    if args.source == world.NAME:
        return []
    is_openvid = args.source.startswith(_OPENVID)
    return [as_path(args.source.removeprefix(_OPENVID)) if is_openvid else demo.video_folder(args.source)]


def read_source(args: argparse.Namespace) -> Source:
    """The videos that `--source` names, filtered and split.

    Raises:
        UserError: a missing folder, or nothing to use.
    """
    minimum, maximum = (
        {score: value for score in SCORES if (value := getattr(args, f"{side}_{score.replace(' ', '_')}")) is not None}
        for side in ("min", "max")
    )
    is_openvid = args.source.startswith(_OPENVID)
    if (minimum or maximum) and not is_openvid:
        raise UserError("Bounds on scores need --source=openvid:FOLDER: other videos have no scores.")
    num_test, num_train = args.test_videos, args.max_videos
    if args.source == world.NAME:
        given = {"train": num_train, "test": num_test}
        counts = {split: number if given[split] is None else given[split] for split, number in _WORLD_VIDEOS.items()}
        return Source(read_world(counts, args.seed), [])
    (folder,) = _source_folders(args)
    videos, skipped = read_openvid(folder, minimum, maximum) if is_openvid else read_folder(folder)
    if num_test is None:
        num_test = _OPENVID_TEST_VIDEOS if is_openvid else 0
    return Source(split_videos(videos, num_test, num_train, args.seed), skipped)


def _read_config(name: str | None) -> ConfigDict | None:
    if not name:
        return None
    config = read_config(name)
    check_config(config)
    return setup.with_num_frames(config)


def _networks(args: argparse.Namespace, config: ConfigDict | None) -> tuple[str, dict[str, Any]]:
    """The folder of the weights, if there is one, and the architectures."""
    if bool(args.weights) == bool(config):
        raise UserError("Give --weights (a folder of converted weights) or --config (a training configuration).")
    if config:
        return config.weights, setup.architectures_of(config)
    return args.weights, {name: weights.load_config(args.weights, name) for name in _components(args.weights)}


def _components(folder: str) -> tuple[str, str]:
    """The VAE of a weights folder, and what makes conditions: SVD's, unless it has only those for videos from text."""
    found = weights.locate(folder)
    is_text = (found / "image_vae").is_dir() and not (found / "vae").is_dir()
    return TextEncoder.networks if is_text else Encoder.networks


def _used(networks: Mapping[str, Any]) -> tuple[str, str]:
    """Of architectures those that encode clips; a configuration has others, too."""
    return TextEncoder.networks if "text_encoder" in networks else Encoder.networks


def _stored(config: ConfigDict | None, networks: Mapping[str, Any]) -> list[str]:
    """The components that are read from the folder of the weights; the others are random."""
    random = random_components(config) if config else ()
    return [name for name in _used(networks) if name not in random]


def _fingerprint(folder: str, config: ConfigDict | None, networks: Mapping[str, Any]) -> str:
    """Of what the networks are; weights may lie elsewhere the next time."""
    stored = _stored(config, networks)
    texts = [(weights.locate(folder) / name / "config.json").read_text() for name in stored]
    if config is not None and len(stored) < len(_used(networks)):
        texts.append(json.dumps(config.random_networks.to_dict(), sort_keys=True))
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()[:16]


def _encoder(
    folder: str, config: ConfigDict | None, networks: Mapping[str, Any], settings: Mapping[str, Any]
) -> Encoder:
    dtype, used = jnp.dtype(settings["dtype"]), _used(networks)
    options = {"dtype": dtype, "param_dtype": dtype}
    stored = _stored(config, networks)
    held = {name: parameter_dtype(name, dtype) for name in stored}
    params: dict[str, Any] = {name: weights.load_params(folder, name, dtype=held[name]) for name in stored}
    params |= random_frozen({name: networks[name] for name in used if name not in stored}, dtype)
    vae, height, width = networks[used[0]], settings["height"], settings["width"]
    sizes = settings["num_frames"], height // vae.downscale, width // vae.downscale, vae.latent_channels
    given = (height, width, settings["batch_size"])
    print(f"Compiling the encoder for {height} x {width} on {jax.local_device_count()} device(s) ...", flush=True)
    if used == TextEncoder.networks:
        text = networks["text_encoder"]
        text_schema = TextSchema(*sizes, num_tokens=text.max_position_embeddings, text_size=text.hidden_size)
        if not folder:
            raise UserError("Captions need the tokenizer of a weights folder: set config.weights, or give --weights.")
        tokenizer = Tokenizer(tokenizer_of(folder))
        if tokenizer.vocab_size != text.vocab_size:
            raise UserError(
                f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens, and the text encoder {text.vocab_size}:"
                " convert both from one checkpoint."
            )
        codec = TextCodec(ImageVAE(vae, **options), CLIPText(text, **options))
        return TextEncoder(tokenizer, codec, params, text_schema, *given)
    embedding = networks["image_encoder"].projection_dim
    schema = Schema(*sizes, embedding_size=embedding, num_augmented=settings["num_augmented"])
    images = Codec(SVDVAE(vae, **options), CLIPVision(networks["image_encoder"], **options))
    return Encoder(images, params, schema, *given)


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError as error:
        raise UserError(f"--shard={text} must look like 0/4: which shard, of how many.") from error
    if not 0 <= index < count:
        raise UserError(f"--shard={text}: shards of {count} count from 0 to {count - 1}.")
    return index, count


def _settings(args: argparse.Namespace, config: ConfigDict | None, networks: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the videos that decides what is in the records.

    Raises:
        UserError: on a value that no clip can have.
    """
    is_text = _used(networks) == TextEncoder.networks
    images = {"num_frames": UNetConfig.num_frames, "fps": 7.0, "height": 576, "width": 1024}
    defaults: dict[str, Any] = dict(_TEXT_CLIPS) if is_text else images
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if not is_text and args.weights and (weights.locate(args.weights) / "unet").is_dir():
        defaults["num_frames"] = weights.load_config(args.weights, "unet").num_frames
    if config is not None:
        _, height, width = config.data.resolutions[0]
        defaults = {"num_frames": config.data.num_frames, "fps": config.data.fps, "height": height, "width": width}
        dtype = config.dtype
    chosen = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()}
    chosen["stride"] = chosen["num_frames"] / chosen["fps"] if args.stride is None else args.stride
    for name in ("max_clips", "min_motion", "num_augmented", "seed", "batch_size", "videos_per_file"):
        chosen[name] = getattr(args, name)
    if chosen["height"] % 8 or chosen["width"] % 8:
        raise UserError(f"{chosen['height']} x {chosen['width']} is not divisible by 8, and the VAE needs that.")
    if chosen["batch_size"] % jax.local_device_count():
        raise UserError(
            f"--batch_size={chosen['batch_size']} does not split over the {jax.local_device_count()} devices; use a"
            " multiple of that."
        )
    # That of the encoder was the networks' once: what was begun then must not be continued in another.
    return chosen | {"dtype": args.dtype or dtype, "vae_dtype": "float32"}
