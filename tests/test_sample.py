"""From an image to a video: parity with diffusers' pipeline, the program, and what it says about bad input."""

import copy
import re

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import relative_error
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from osv_jax import sample
from osv_jax.convert import time_travel_scheduler
from osv_jax.convert.time_travel_scheduler import TimeTravelScheduler
from osv_jax.data.video import cover
from osv_jax.diffusion import samplers
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import EDMBackbone
from osv_jax.errors import UserError
from osv_jax.inference import programs
from osv_jax.inference.options import Options
from osv_jax.inference.pipeline import ImageToVideo, Noise
from osv_jax.inference.trained import load_trained
from osv_jax.models.lora import init_lora, target_modules
from osv_jax.objectives.players import Player, Student, TrainState
from osv_jax.runtime import checkpoint
from osv_jax.runtime.media import to_uint8

HEIGHT, WIDTH, FRAMES = 24, 40, 3
SIZE = [f"--height={HEIGHT}", f"--width={WIDTH}", f"--num_frames={FRAMES}", "--decode_chunk_size=2"]

# Whole programs, each of which compiles all networks; tests of what is said about arguments are another file's.
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("svd")


@pytest.fixture(scope="module")
def reference(folder):
    return tiny_pipeline.save_pipeline(folder / "diffusers")


@pytest.fixture(scope="module")
def weights(reference, folder):
    tiny_pipeline.import_all(folder / "diffusers", folder / "weights")
    return folder / "weights"


@pytest.fixture(scope="module")
def model(weights):
    return ImageToVideo.load(weights)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def images(folder):
    """A folder with two files of one picture, whose size is not the video's."""
    pixels = np.random.default_rng(1).integers(0, 256, (70, 50, 3), np.uint8)
    images = folder / "images"
    images.mkdir()
    for name in ("one.png", "two.png"):
        Image.fromarray(pixels).save(images / name)
    return images


@pytest.fixture(scope="module")
def workdir(model, folder):
    """What a run leaves behind: a LoRA with alpha twice the rank, a tuned layer, and another EMA of both."""
    workdir, params = folder / "run", model.params["unet"]

    def student(seed):
        rng = np.random.default_rng(seed)
        lora = init_lora(jax.random.key(seed), params, 4, target_modules(params, "all"))
        lora = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)), lora)
        path = ("mid_block", "attentions_0", "proj_in", "kernel")
        tuned = {path: jnp.asarray(rng.standard_normal(flatten_dict(params)[path].shape, np.float32))}
        return Student(lora=lora, tuned=unflatten_dict(tuned))

    players = {"student": Player(student(1), {}, (), student(2)), "disc": Player({"x": jnp.ones(3)}, {}, ())}
    state = TrainState(jnp.asarray(7), players)
    sizes = ((0, 16, 16), (5, HEIGHT, WIDTH), (7, 64, 64))  # The last one begins only after this checkpoint.
    data = {"resolutions": sizes, "num_frames": FRAMES}
    config = {"lora": {"alpha": 8.0, "rank": 4}, "boundary": "exact", "num_levels": 10, "data": data}
    checkpoint.write_config(workdir, config)
    checkpoints = checkpoint.open_checkpoints(workdir, 1)
    checkpoint.save(checkpoints, 7, state, {})
    checkpoints.wait_until_finished()
    checkpoints.close()
    return workdir, state


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' scheduler
def test_euler_is_the_pipeline_of_diffusers(reference, model, picture):
    frames = 4
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, frames, 4, HEIGHT // 2, WIDTH // 2, generator=generator)
    # The pipeline draws its image noise first of all.
    image_noise = torch.randn(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(6))
    options = {"height": HEIGHT, "width": WIDTH, "num_frames": frames, "fps": 9, "motion_bucket_id": 90}
    options |= {"noise_aug_strength": 0.1, "max_guidance_scale": 2.5}
    latents = reference(
        Image.fromarray(picture),
        num_inference_steps=6,
        latents=noise,
        generator=torch.Generator().manual_seed(6),
        output_type="latent",
        **options,
    ).frames
    with torch.no_grad():
        decoded = reference.decode_latents(latents, frames, 3)
        finished = reference.video_processor.postprocess_video(decoded, output_type="np")

    ours = Noise(
        jnp.asarray(image_noise.permute(0, 2, 3, 1).numpy()),
        jnp.asarray(noise.permute(0, 1, 3, 4, 2).numpy()),
        jax.random.key(0)[None],
    )
    sampled = model.sample(picture[None], ours, model.complete(Options(sampler="euler", steps=6, **options)))
    assert relative_error(sampled, latents.permute(0, 1, 3, 4, 2)) <= 1e-4
    # Each part as well as the whole: frames of the reference's latents, and of ours.
    expected = decoded.permute(0, 2, 3, 4, 1)
    assert relative_error(model.decode(jnp.asarray(latents.permute(0, 1, 3, 4, 2).numpy()), 3), expected) <= 1e-4
    ours = model.decode(sampled, 3)
    assert relative_error(ours, expected) <= 1e-3
    assert np.abs(to_uint8(ours) - (255 * finished).round()).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "steps", "boundary", "evaluations"),
    [("consistency", 1, "svd", 1), ("consistency", 2, "svd", 2), ("tts", 1, "svd", 2), ("tts", 2, "exact", 4)],
)
def test_the_scheduler_for_diffusers_is_our_sampler(
    reference, model, picture, monkeypatch, sampler, steps, boundary, evaluations
):
    """The student's own number of noise levels and boundary are in both."""
    ours = copy.copy(model)
    ours.boundary, ours.num_levels = boundary, 10
    given = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": 9, "noise_aug_strength": 0.0}
    options = ours.complete(Options(sampler=sampler, steps=steps, **given))
    noise = ours.noise(jax.random.key(0)[None], options)
    expected = ours.sample(picture[None], noise, options)

    theirs = copy.copy(reference)
    theirs.scheduler = TimeTravelScheduler.from_config(
        TimeTravelScheduler(sampler=sampler, boundary=boundary, num_levels=10).config
    )
    # The pipeline's own noise is made of the seed; the fresh noise is what ours draws.
    fresh = jax.random.normal(noise.keys[0], (1, *noise.latents.shape[1:]))
    monkeypatch.setattr(time_travel_scheduler, "randn_tensor", lambda *_, **__: channels_first(fresh))
    calls = []
    with theirs.unet.register_forward_pre_hook(lambda *_: calls.append(1)):
        latents = theirs(
            Image.fromarray(picture),
            num_inference_steps=steps,
            max_guidance_scale=1.0,
            latents=channels_first(noise.latents),
            output_type="latent",
            **given,
        ).frames
    assert relative_error(latents.permute(0, 1, 3, 4, 2), expected) <= 1e-3
    assert len(calls) == evaluations == samplers.num_evaluations(sampler, steps)


def channels_first(latents):
    """For diffusers, [b f c h w]."""
    return torch.tensor(np.asarray(latents)).permute(0, 1, 4, 2, 3)


def test_clip_sees_the_whole_image_as_in_diffusers_and_the_vae_what_covers_the_video(reference, model, monkeypatch):
    """Of images of two other shapes, for which no other program is compiled."""
    monkeypatch.setattr(programs, "_PROGRAMS", {})
    watched, seen = copy.copy(model), {}

    class Enough(Exception):
        pass

    def run(part, *arguments, progress=""):
        if part == "UNet":
            raise Enough
        seen[part] = model._run(part, *arguments)
        return seen[part]

    watched._run = run
    options = model.complete(Options(height=HEIGHT, width=WIDTH, num_frames=FRAMES, noise_aug_strength=0.0))
    for shape in ((70, 50), (90, 600)):
        photo = np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)
        photo[:, : shape[1] // 4] = 255  # What is not in the video differs from what is.
        with pytest.raises(Enough):
            watched(photo, **{name: getattr(options, name) for name in ("height", "width", "noise_aug_strength")})
        with torch.no_grad():
            whole = reference._encode_image(Image.fromarray(photo), "cpu", 1, False)[:, 0]
            cropped = Image.fromarray(cover(photo, HEIGHT, WIDTH))
            crop = reference._encode_image(cropped, "cpu", 1, False)[:, 0]
            pixels = reference.video_processor.preprocess(cropped, height=HEIGHT, width=WIDTH)
            latents = reference._encode_vae_image(pixels, "cpu", 1, False)
        assert relative_error(seen["CLIP"], whole) <= 2e-5
        assert relative_error(seen["CLIP"], crop) > 1e-2
        assert relative_error(seen["VAE encode"], latents.permute(0, 2, 3, 1)) <= 1e-4
    assert [part for part, *_ in programs._PROGRAMS] == ["CLIP", "VAE encode"]


def test_the_decoder_has_a_dtype_of_its_own(model, weights):
    """And the VAE's parameters are float32 whatever the networks' dtype is."""
    assert model.codec.vae.dtype == jnp.float32
    half = ImageToVideo.load(weights, dtype="bfloat16")
    assert half.codec.vae.dtype == half.unet.dtype == half.codec.image_encoder.dtype == jnp.bfloat16
    chosen = ImageToVideo.load(weights, dtype="bfloat16", decode_dtype="float16")
    assert (chosen.codec.vae.dtype, chosen.unet.dtype) == (jnp.float16, jnp.bfloat16)
    held = {name: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for name, tree in chosen.params.items()}
    assert held == {"unet": {"bfloat16"}, "vae": {"float32"}, "image_encoder": {"bfloat16"}}
    with pytest.raises(UserError, match="decode_dtype 'int8' is not one of bfloat16, float32, float16"):
        ImageToVideo.load(weights, decode_dtype="int8")


def test_decoding_in_float16_is_nearly_that_in_float32(model, weights, float16):
    chosen = ImageToVideo.load(weights, decode_dtype="float16")
    latents = jax.random.normal(jax.random.key(0), (1, 2, HEIGHT // 2, WIDTH // 2, 4))
    error = relative_error(chosen.decode(latents, 2), model.decode(latents, 2))
    assert 0 < error < 0.01


@pytest.fixture(scope="module")
def one_step(model):
    """`(variables, cond, noise) -> latents`: the consistency function at the highest level."""

    @jax.jit
    def one_step(variables, cond, noise):
        x, sigma = 700 * noise, jnp.full(1, 700.0)
        return EDMBackbone(lambda *inputs: model.unet.apply(variables, *inputs), cond, "exact")(x, sigma)

    return one_step


@pytest.mark.parametrize("ema", [False, True])
def test_a_workdir_is_merged_before_sampling(model, weights, workdir, picture, one_step, ema):
    folder, state = workdir
    merged = ImageToVideo.load(weights, lora=folder, ema=ema)
    options = merged.complete(Options(sampler="consistency"))
    assert (options.height, options.width, options.num_frames) == (HEIGHT, WIDTH, FRAMES)
    noise = merged.noise(jax.random.key(1)[None], options)
    actual = merged.sample(picture[None], noise, options)

    pixels = jnp.asarray(picture, jnp.float32)[None] / 127.5 - 1
    cond = Conditioning(
        jax.jit(model.codec.embed_image)(model.params["image_encoder"], pixels),
        jax.jit(model.codec.encode_mode)(model.params["vae"], pixels + 0.02 * noise.image),
        jnp.array([[6.0, 127.0, 0.02]]),
    )
    trained, ema_params = state.players["student"].params, state.players["student"].ema
    wanted, other = (ema_params, trained) if ema else (trained, ema_params)
    expected, wrong = (
        one_step(student.variables(model.params["unet"], lora_scale=2.0), cond, noise.latents)
        for student in (wanted, other)
    )
    assert relative_error(actual, expected) <= 2e-5
    assert relative_error(actual, wrong) > 1e-2
    with pytest.raises(UserError, match="steps=10 is too many for tts: at most 9"):
        merged.complete(Options(steps=10))


def test_merging_comes_before_rounding(model, weights, workdir):
    merged = ImageToVideo.load(weights, lora=workdir[0], dtype="bfloat16").params["unet"]
    expected = load_trained(workdir[0]).merge_into(model.params["unet"], jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_the_default_is_one_step_of_time_travel(model, picture):
    options = model.complete(Options(height=HEIGHT, width=WIDTH, num_frames=FRAMES))
    assert (options.sampler, options.steps, options.num_evaluations) == ("tts", 1, 2)
    assert model.complete(Options(sampler="euler")).num_evaluations == 50
    assert model.complete(Options(sampler="euler", max_guidance_scale=1.0)).num_evaluations == 25
    assert (model.complete(Options()).height, model.complete(Options()).width) == (576, 1024)
    frames = model(picture, height=HEIGHT, width=WIDTH, num_frames=FRAMES)
    key = jax.random.fold_in(jax.random.key(0), 0)
    sampled = model.sample(picture[None], model.noise(key[None], options), options)
    np.testing.assert_array_equal(frames, to_uint8(model.decode(sampled, 7))[0])
    np.testing.assert_array_equal(frames, model(picture / 255, height=HEIGHT, width=WIDTH, num_frames=FRAMES))


def test_one_program_serves_any_number_of_steps_and_every_student_alike(weights, workdir, picture, monkeypatch):
    monkeypatch.setattr(programs, "_PROGRAMS", {})
    run, _ = workdir
    teacher, student, again = (ImageToVideo.load(weights, lora) for lora in (None, run, run))
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    options = student.complete(Options(sampler="consistency", **size))
    noise = student.noise(jax.random.key(5)[None], options)
    images = picture[None]
    first = student.sample(images, noise, options)
    compiled = student.seconds["compile"]
    for chosen, calls in (({"sampler": "consistency", "steps": 3}, 3), ({"sampler": "tts", "steps": 2}, 4)):
        parts = []
        student.on_part = parts.append
        student.sample(images, noise, student.complete(Options(**size, **chosen)))
        student.wait()
        assert parts == ["CLIP", "VAE encode", *(f"UNet {number} of {calls}" for number in range(1, calls + 1))]
    np.testing.assert_array_equal(again.sample(images, noise, options), first)
    assert student.seconds["compile"] == compiled > 0 and again.seconds["compile"] == 0
    # The teacher's outputs are made clean in another way than this student's.
    assert relative_error(teacher.sample(images, noise, options), first) > 1e-2


def test_devices_share_a_batch(model, weights, picture):
    """Each video of a batch on two devices is the one that its image and its key give alone."""
    many = ImageToVideo.load(weights, data=2)
    options = many.complete(Options("consistency", 2, height=HEIGHT, width=WIDTH, num_frames=FRAMES))
    images, keys = np.stack([picture, 255 - picture]), jax.random.split(jax.random.key(4))
    actual = many.sample(images, many.noise(keys, options), options)
    assert len(actual.sharding.device_set) == 2 and not actual.sharding.is_fully_replicated
    for i in range(2):
        alone = model.sample(images[i : i + 1], model.noise(keys[i : i + 1], options), options)
        assert relative_error(actual[i : i + 1], alone) <= 1e-5
    assert many.frames(actual, 2).shape == (2, FRAMES, HEIGHT, WIDTH, 3)


def test_devices_share_a_video(model, weights, picture):
    """The same video on two devices, each of which makes a part of its height."""
    many = ImageToVideo.load(weights, context=2)
    options = many.complete(Options(height=HEIGHT, width=WIDTH, num_frames=FRAMES))
    noise = model.noise(jax.random.key(4)[None], options)
    expected, actual = (each.sample(picture[None], noise, options) for each in (model, many))
    assert len(actual.sharding.device_set) == 2 and len(expected.sharding.device_set) == 1
    assert relative_error(actual, expected) <= 1e-5
    assert relative_error(many.decode(actual, 2), model.decode(expected, 2)) <= 2e-5
    with pytest.raises(UserError, match="context=2 does not divide the 11 rows of latents of height=22"):
        many.complete(Options(height=22, width=WIDTH))
    with pytest.raises(UserError, match=r"context=9 must lie in 1 \.\. 8, the devices of this machine"):
        ImageToVideo.load(weights, context=9)


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate), np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])


def test_the_program_makes_a_video_of_every_image(weights, images, tmp_path, capsys, monkeypatch):
    kept = {key: program for key, program in programs._PROGRAMS.items() if key[0] != "decode"}
    monkeypatch.setattr(programs, "_PROGRAMS", kept)
    arguments = [f"--weights={weights}", *SIZE, "--fps=8", "--seed=3", "--decode_dtype=bfloat16"]
    sample.main([*arguments, f"--image={images}", f"--output={tmp_path}/clips/{{name}}.mp4"])
    output = capsys.readouterr().out
    assert "tts, 1 step(s), 2 network evaluations (NFE) a video" in output
    one, two = (line for line in output.splitlines() if re.match(r"\[\d/2\]", line))
    assert re.search(r"one.png -> \S+one.mp4: [\d.]+ s \(compile .*, CLIP .*, VAE encode .*, UNet .*, decode ", one)
    assert "write" in two and "compile" not in two  # The compiled programs are used again.

    rate, video = decoded(tmp_path / "clips" / "one.mp4")
    assert rate == 8 and video.shape == (FRAMES, HEIGHT, WIDTH, 3)
    # Two images have different noise, the same one has the same whenever it is run.
    assert not np.array_equal(video, decoded(tmp_path / "clips" / "two.mp4")[1])
    sample.main([*arguments, f"--image={images / 'one.png'}", f"--output={tmp_path}/again"])
    pictures = [np.asarray(Image.open(tmp_path / "again" / f"{i:03d}.png")) for i in range(FRAMES)]
    assert len(list((tmp_path / "again").iterdir())) == FRAMES

    # A video is the same, byte by byte, whatever is made while it is written.
    sample.main([*arguments, f"--image={images / 'one.png'}", f"--output={tmp_path}/alone.mp4"])
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "clips" / "one.mp4").read_bytes()

    pixels = np.asarray(Image.open(images / "one.png"))
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "decode_chunk_size": 2}
    expected = ImageToVideo.load(weights, decode_dtype="bfloat16")(pixels, seed=3, fps=8, **size)
    np.testing.assert_array_equal(pictures, expected)
    # Compression and 4:2:0 colours of noise cost much, but this is the video.
    assert np.corrcoef(video.ravel(), expected.ravel())[0, 1] > 0.8


def test_frames_that_are_not_finite_are_refused(model, picture):
    """A network with one damaged value; and whole ones, with options that are too extreme."""
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    params = flatten_dict(model.params)
    name = ("unet", "conv_out", "bias")
    params[name] = params[name].at[0].set(jnp.nan)
    damaged = copy.copy(model)
    damaged.params = unflatten_dict(params)
    with pytest.raises(UserError, match="The weights are damaged: unet/conv_out/bias has values that are NaN"):
        damaged(picture, **size)
    with pytest.raises(UserError, match="The frames that were made have values that are NaN or infinite"):
        # The programs of `test_euler_is_the_pipeline_of_diffusers`.
        chosen = {"num_frames": 4, "decode_chunk_size": 3, "sampler": "euler", "steps": 2}
        model(picture, max_guidance_scale=1e38, **(size | chosen))
