"""The VAE trainer: its losses in NumPy, what each of its two parts trains, exact resume, and what it writes."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from bucket import stand_in
from synthetic_video import write_constant
from workdirs import metrics_of, state_of

from osv_jax import train_vae
from osv_jax.convert import weights
from osv_jax.data import pixels
from osv_jax.errors import UserError
from osv_jax.models.svd_vae import SVDVAE, VAEConfig
from osv_jax.objectives import autoencoder
from osv_jax.objectives.players import first_state
from osv_jax.runtime import paths
from osv_jax.training import loop
from osv_jax.training.config import read_config

STEPS = 2
TWO_LEVELS = {"architecture.block_out_channels": (32, 32)}


def vae_config(**changes):
    config = read_config(f"{pathlib.Path(__file__).parents[1] / 'configs' / 'vae.py'}:tiny")
    config.architecture.block_out_channels = (32,)  # One level compiles in half the time.
    config.data.height, config.data.width, config.data.crop = 8, 12, (6, 8)
    config.batch_size, config.num_steps = 2, STEPS
    config.log_every = config.checkpoint_every = 1
    config.picture_every, config.keep_checkpoints = 1000, 10
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One device, and one compilation for all runs with the same step."""
    mesh, compile_step, steps = tiny.one_device_mesh(), loop.compile_step, {}

    def compile_step_once(run, state, batch):
        apart = ("data", "init_from", "checkpoint_every", "picture_every", "log_every", "keep_checkpoints")
        settings = {name: value for name, value in run.config.to_dict().items() if name not in apart}
        key = f"{settings} {run.config.data.crop} {jax.tree.map(jax.typeof, (state, batch))}"
        if key not in steps:
            steps[key] = compile_step(run, state, batch)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae.mesh, "make_mesh", lambda *sizes: mesh)
        patch.setattr(loop, "compile_step", compile_step_once)
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_constant(folder / "grey.mp4", 8, 7, width=12, height=8, red_corner=True)
    return folder


@pytest.fixture(scope="module")
def images(videos, tmp_path_factory):
    """A run on images."""
    workdir = tmp_path_factory.mktemp("images") / "run"
    train_vae.train_vae(vae_config(**{"data.videos": str(videos)}), workdir)
    return workdir


@pytest.fixture(scope="module")
def clips(videos, images, tmp_path_factory):
    """One on clips, from the first."""
    workdir = tmp_path_factory.mktemp("clips") / "run"
    own = {"train": "decoder", "init_from": str(images), "checkpoint_every": STEPS}
    data = {"data.videos": str(videos), "data.num_frames": 2, "data.crop": (8, 12)}
    train_vae.train_vae(vae_config(**own, **data), workdir)
    return workdir


def params_of(workdir, step=STEPS):
    return state_of(workdir, step)["players"]["vae"]["params"]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def temporal_kernels(params):
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 5]


def test_gaussian_kl(rng):
    """Kingma and Welling 2014, appendix B."""
    mean, logvar = rng.standard_normal((2, 3, 2, 5, 4), np.float32)
    expected = [0.5 * sum((m**2 + np.exp(v) - 1 - v).ravel()) for m, v in zip(mean, logvar, strict=True)]
    np.testing.assert_allclose(autoencoder.gaussian_kl(mean, logvar), expected, rtol=1e-5)
    assert autoencoder.gaussian_kl(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4)))[0] == 0


def test_vae_losses(rng, monkeypatch):
    """Mean absolute error, and the KL divergence over the number of pixel values, for a VAE that halves pixels."""

    def halve(self, variables, x, method):
        scale = variables["params"]["scale"]
        return (scale * x[..., :2], jnp.full_like(x[..., :2], -40.0)) if method == "encode" else x[..., [0, 1, 1]]

    monkeypatch.setattr(SVDVAE, "apply", halve)
    video = rng.standard_normal((2, 3, 4, 4, 3), np.float32)

    def distance(x, y):
        return jnp.max(x - y, axis=(1, 2, 3))

    losses = autoencoder.vae_losses(SVDVAE(VAEConfig()), {"scale": 0.5}, video, jax.random.key(0), distance)
    output = 0.5 * video[..., [0, 1, 1]]
    np.testing.assert_allclose(losses["l1"], np.abs(output - video).mean(axis=(1, 2, 3, 4)), rtol=1e-4)
    terms = ((0.5 * video[..., :2]) ** 2 + np.exp(-40.0) - 1 + 40.0) / 2
    np.testing.assert_allclose(losses["lpips"], (output - video).max((2, 3, 4)).mean(1), rtol=1e-4)
    np.testing.assert_allclose(losses["kl"], terms.sum(axis=(1, 2, 3, 4)) / video[0].size, rtol=1e-5)


@pytest.mark.integration
def test_images_train_everything_and_clips_the_decoder(images, clips):
    first, before, after = params_of(images, 1), params_of(images), weights.load_params(clips, "vae")
    assert list(params_of(clips)) == ["decoder"]
    for name in ("encoder", "quant_conv", "decoder"):
        assert not same(first[name], before[name])
        assert same(before[name], after[name]) == (name != "decoder")


@pytest.mark.integration
def test_images_leave_the_decoder_blind_to_neighbours(images, clips):
    """Every frame of a clip is decoded as if it were alone; only training on clips changes that."""
    kernels = temporal_kernels(params_of(images)["decoder"])
    assert len(kernels) > 10
    for kernel in kernels:
        assert np.any(kernel[1]) and not np.any(kernel[::2])
    assert all(np.any(kernel[::2]) for kernel in temporal_kernels(params_of(clips)["decoder"]))


@pytest.mark.integration
def test_a_stopped_run_continues_bit_for_bit(videos, images, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(images, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    train_vae.train_vae(vae_config(**{"data.videos": str(videos)}), workdir)
    assert "Resuming from step 1." in capsys.readouterr().out
    assert same(params_of(workdir), params_of(images))


@pytest.mark.integration
def test_a_run_in_a_bucket_is_that_of_this_machine(videos, images, clips, tmp_path, monkeypatch, capsys):
    """Stopped and resumed; and one on clips, from the first."""
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    bucket = paths.as_path("gs://bucket")
    paths.copy_folder(videos, bucket / "videos")
    data, run, second = {"data.videos": str(bucket / "videos")}, bucket / "run", bucket / "second"
    train_vae.train_vae(vae_config(**data), run)
    paths.remove_folder(run / "checkpoints" / str(STEPS))
    paths.remove_folder(run / "vae")
    train_vae.train_vae(vae_config(**data), run)
    assert "Resuming from step 1." in capsys.readouterr().out
    own = {"train": "decoder", "init_from": str(run), "checkpoint_every": STEPS}
    train_vae.train_vae(vae_config(**own, **data, **{"data.num_frames": 2, "data.crop": (8, 12)}), second)
    for made, expected in ((run, images), (second, clips)):
        assert same(weights.load_params(made, "vae"), weights.load_params(expected, "vae"))
        assert weights.load_config(made, "vae") == weights.load_config(expected, "vae")
        assert metrics_of(made) == metrics_of(expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_what_is_written_loads_and_gives_latents_unit_variance(videos, images, clips):
    config, params = weights.load_config(images, "vae"), weights.load_params(images, "vae")
    assert same(params, params_of(images))
    index = pixels.index_clips(videos, 1, 7.0, 8, 12)
    assert len(index.clips) == 8
    frames = np.concatenate([index.read(i)["video"] for i in range(8)]) / 127.5 - 1
    mean, _ = SVDVAE(config).apply({"params": params}, frames.astype(np.float32), method="encode")
    np.testing.assert_allclose(np.std(config.scaling_factor * mean), 1, rtol=1e-4)
    # A decoder that is trained on keeps its latents.
    assert weights.load_config(clips, "vae") == config


@pytest.mark.integration
def test_weights_that_are_not_finite_are_not_trained_on(videos, images, tmp_path, monkeypatch):
    params = weights.load_params(images, "vae")
    params["quant_conv"]["bias"] = params["quant_conv"]["bias"].at[0].set(np.nan)
    monkeypatch.setattr(weights, "load_params", lambda *_, **__: params)
    with pytest.raises(UserError, match=f"config.init_from={images} has values .* first in quant_conv/bias"):
        train_vae.train_vae(vae_config(init_from=str(images), **{"data.videos": str(videos)}), tmp_path / "run")


@pytest.mark.integration
def test_latents_that_are_all_equal_have_no_factor(videos, images, monkeypatch):
    monkeypatch.setattr(train_vae, "_encode", lambda vae, params, pixels: np.ones((1, 4, 4, 4)))
    index = pixels.index_clips(videos, 1, 7.0, 8, 12)
    with pytest.raises(UserError, match="The latents of all clips are the same value"):
        train_vae.scaling_factor(SVDVAE(weights.load_config(images, "vae")), {}, index)


def test_frame_psnr():
    """10 log10(peak^2 / mean squared error), the peak being the 2 from -1 to 1; what is beyond is clipped first."""
    video = np.zeros((1, 2, 4, 4, 3), np.float32)
    output = video + np.array([0.2, 5.0], np.float32)[:, None, None, None]
    np.testing.assert_allclose(autoencoder.frame_psnr(output, video), [[20.0, 10 * np.log10(4)]], rtol=1e-5)


def test_crops_are_parts_of_their_clips():
    """The same part of all frames, everywhere in the picture."""
    rows, columns = np.mgrid[:4, :6]
    video = jnp.asarray(np.stack([rows, columns, rows], -1)[None, None] * np.ones((8, 2, 1, 1, 1)), jnp.float32)
    places = set()
    for number in range(20):
        crops = np.asarray(autoencoder.random_crop(video, 2, 4, jax.random.key(number)))
        assert crops.shape == (8, 2, 2, 4, 3)
        corner = crops[:, :, :1, :1]
        expected = corner + np.stack([*np.mgrid[:2, :4], np.mgrid[:2, :4][0]], -1)
        np.testing.assert_array_equal(crops, expected)
        np.testing.assert_array_equal(corner[:, 0], corner[:, 1])
        places |= {tuple(map(int, c)) for c in corner[:, 0, 0, 0]}
    assert places == {(top, left, top) for top in range(3) for left in range(3)}


@pytest.mark.integration
def test_the_loss_falls():
    vae = SVDVAE(VAEConfig(block_out_channels=(32,), norm_num_groups=8))
    rng = np.random.default_rng(0)
    video = jnp.asarray(np.tanh(rng.standard_normal((2, 1, 1, 1, 3), np.float32))) * jnp.ones((2, 1, 8, 12, 3))
    shapes = train_vae.unflatten_dict(train_vae.expected_params("vae", vae.config))
    params = jax.tree.map(jnp.asarray, train_vae.random_params(shapes, 0, np.float32))
    objective = autoencoder.Autoencoder(vae, autoencoder.AutoencoderOptions(), {"vae": optax.adam(1e-3)})
    state = first_state(objective.init(jax.random.key(0), {"vae": params}))
    step = jax.jit(objective.step)
    losses = []
    for number in range(40):
        state, metrics = step(state, {"vae": {}}, video, jax.random.fold_in(jax.random.key(0), number))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_what_is_made_does_not_take_the_place_of_what_it_starts_from():
    with pytest.raises(UserError, match="is its source"):
        train_vae.train_vae(vae_config(init_from="miniature", **{"data.crop": (8, 8)}), weights.locate("miniature"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.height", 9, ["config.data.height=9", "multiple of 2"]),
        ("data.crop", (10, 8), ["config.data.crop=(10, 8)", "multiples of 2"]),
        ("train", "encoder", ["config.train='encoder'", "decoder"]),
        ("train", "decoder", ["config.init_from"]),
        ("data.crop", (8,), ["config.data.crop=(8,)", "a height and a width"]),
        ("kl_weight", -1.0, ["config.kl_weight=-1"]),
        ("learning_rate", float("nan"), ["config.learning_rate=nan"]),
        ("data.fps", float("inf"), ["config.data.fps=inf"]),
        ("seed", -1, ["config.seed=-1"]),
        ("dtype", "float16", ["config.dtype='float16'", "bfloat16"]),
        ("lpips_weight", 1.0, ["config.data.crop=(6, 8)", "31 pixels"]),
        ("batch_size", 0, ["config.batch_size=0"]),
        ("architecture.block_out_channels", (30,), ["block_out_channels", "multiples of 8"]),
    ],
)
def test_values_are_checked(key, value, words, tmp_path):
    with pytest.raises(UserError) as error:
        train_vae.train_vae(
            vae_config(**{"architecture.block_out_channels": (32, 32)} | {key: value}), tmp_path / "run"
        )
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "run").exists()
