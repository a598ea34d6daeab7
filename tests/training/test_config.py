"""Every number of every configuration that comes with the project has a range, and what is not in it is refused."""

import dataclasses
import math
import pathlib
import typing

import jaxtyping
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from osv_jax import train_vae
from osv_jax.errors import UserError
from osv_jax.evaluation.options import TableOptions
from osv_jax.objectives import objective
from osv_jax.objectives.autoencoder import AutoencoderOptions
from osv_jax.objectives.options import RunOptions, check_stored, from_config
from osv_jax.runtime.ranges import Range
from osv_jax.training import setup
from osv_jax.training.config import check_architectures, check_config, default_config, read_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VARIANTS = {
    "stage1.py": ("", "tiny", "miniature"),
    "stage2.py": ("", "tiny", "miniature"),
    "finetune.py": ("", "tiny", "miniature", "miniature_lora"),
    "vae.py": ("", "temporal", "tiny"),
    "animatelcm.py": ("", "tiny", "miniature"),
    "sf_v.py": ("", "tiny", "miniature"),
    "add.py": ("", "tiny", "miniature"),
    "avdm2.py": ("", "tiny", "miniature"),
    "animatediff.py": ("", "unet", "tiny", "miniature", "miniature_unet"),
    "eval.py": ("", "tiny", "miniature"),
}
NAMES = [f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants]
# Checked by functions of their own, which have tests.
WITHOUT_RANGE = {"data.resolutions", "optimizer.group_learning_rates", "phases", "level_weights"}


@pytest.fixture(scope="module")
def configs():
    return {name: read_config(str(CONFIGS / name)).to_dict() for name in NAMES}


def flat(config):
    return flatten_dict(config, sep=".")


def classes_of(config):
    if "objective" in config:
        return RunOptions, objective.find(config["objective"]).Options
    if "methods" in config:
        return (TableOptions,)
    return train_vae.VAERunOptions, AutoencoderOptions


def check(config):
    for cls in classes_of(config):
        from_config(cls, config)
    for name in ("random_networks", "architecture"):
        check_architectures(config.get(name, {}), f"config.{name}.")


def ranges_of(cls, prefix=""):
    """Key -> what is allowed, of every field of nested dataclasses."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= ranges_of(hints[field.name], f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field.metadata.get("allowed")
    return found


def is_number(value):
    numbers = value if isinstance(value, tuple) else (value,)
    return bool(numbers) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)


@pytest.mark.parametrize("name", NAMES)
def test_the_project_s_own_configurations_are_allowed(configs, name):
    check(configs[name])
    known = {key for cls in classes_of(configs[name]) for key, allowed in ranges_of(cls).items() if allowed}
    for key, value in flat(configs[name]).items():
        ranged = key in known | WITHOUT_RANGE or key.startswith(("random_networks.", "architecture."))
        assert ranged or not is_number(value), f"{key} has no range"


@pytest.mark.parametrize("name", ["stage1", "stage2", "finetune", "animatelcm", "sf_v", "add", "avdm2", "animatediff"])
def test_a_configuration_has_the_keys_of_its_run_and_its_objective_and_no_others(name):
    keys = {key for cls in (RunOptions, objective.find(name).Options) for key in ranges_of(cls)}
    config = default_config(name)
    flattened = flatten_dict(config.to_dict(), sep=".", keep_empty_nodes=True)
    assert {key.removesuffix(".") for key in flattened} == keys
    config.huber = 1.0
    with pytest.raises(UserError, match=rf"config\.huber is no key of {name}; its keys are .*batch_size, "):
        check_config(config)
    short = ConfigDict({key: value for key, value in default_config(name).items() if key != "seed"})
    with pytest.raises(UserError, match=r"config\.seed is missing"):
        check_config(short)


def sentence(config, key, value) -> str:
    changed = unflatten_dict(flat(config) | {key: value}, sep=".")
    with pytest.raises(UserError) as error:
        check(changed)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("stage2.py:tiny", "finetune.py:tiny", "vae.py:tiny", "animatelcm.py:tiny", "sf_v.py:tiny", "add.py:tiny"),
        *("avdm2.py:tiny", "animatediff.py:tiny", "eval.py:tiny"),
    ],
)
def test_no_number_may_be_something_else(configs, name):
    """Not a number, infinite, too small, a truth value, a text, nothing, or a fraction where things are counted."""
    ranges = {key: allowed for cls in classes_of(configs[name]) for key, allowed in ranges_of(cls).items()}
    for key, value in flat(configs[name]).items():
        if not is_number(value) or key in WITHOUT_RANGE:
            continue
        bad = [math.nan, math.inf, -math.inf]
        if isinstance(allowed := ranges.get(key), Range):
            bad += [True, "7", None]
            bad += [1.5] if allowed.whole else []
            bad += [allowed.low - 1] if allowed.low > -math.inf and allowed.low - 1 not in allowed else []
            bad += [allowed.low] if allowed.above_low else []
        else:
            bad += [0]
        for wrong in bad:
            wrong = (wrong,) if isinstance(value, tuple) else wrong
            assert sentence(configs[name], key, wrong).startswith(f"config.{key}={wrong!r} must be a "), key


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", -1, "config.seed=-1 must be a whole number from 0 to 4294967295."),
        ("seed", 2**32, "config.seed=4294967296 must be a whole number from 0 to 4294967295."),
        ("ema_decay", 1.0, "config.ema_decay=1.0 must be a number of at least 0 and below 1."),
        ("mesh.fsdp", 0, "config.mesh.fsdp=0 must be a whole number of at least 1, or -1."),
        ("mesh.context", -2, "config.mesh.context=-2 must be a whole number of at least 1, or -1."),
        ("huber_c", 0.0, "config.huber_c=0.0 must be a finite number of at least 1e-08."),
        ("guidance.max", math.inf, "config.guidance.max=inf must be a finite number."),
        ("guidance.kind", "cosine", "config.guidance.kind='cosine' is not one of linspace, constant, range."),
        ("accumulate", "later", "config.accumulate='later' is not one of together, in_turn."),
        ("trainable", ("lora", "head"), "config.trainable=('lora', 'head') is not one of lora, "),
        ("discriminator_blocks", (0, -2), "config.discriminator_blocks=(0, -2) must be a whole number of at least -1."),
        ("weights", 7, "config.weights=7 must be of type str."),
        (
            "random_networks.unet.layers_per_block",
            0,
            "config.random_networks.unet.layers_per_block=0 must be a whole number of at least 1.",
        ),
        ("dtype", "float16", "config.dtype='float16' is not supported: in training it rounds nearly all"),
        ("dtype", "float64", "config.dtype='float64' is not one of float32, bfloat16."),
        (
            "optimizer.group_learning_rates",
            (("head", 1e-3),),
            "config.optimizer.group_learning_rates=(('head', 0.001),) must be (name, rate) pairs",
        ),
    ],
)
def test_the_key_its_value_and_what_is_allowed_are_said(configs, key, value, words):
    assert sentence(configs["stage2.py:tiny"], key, value).startswith(words)


@pytest.mark.parametrize("phases", [((0, "spatial_transformer"),), (0, "spatial_transformer", 0.1)])
def test_phases_are_triples(configs, phases, monkeypatch):
    # As for users: the tests' own check of types would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert sentence(configs["animatelcm.py:tiny"], "phases", phases).startswith(
        f"config.phases={phases} must be (first"
    )


@pytest.mark.parametrize("weights", [(9, 17), ((9, 1.0, 2.0),), ((9.5, 1.0),), (("top", 1.0),), ((9, None),)])
def test_weights_of_levels_are_pairs(configs, weights, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert sentence(configs["stage2.py:tiny"], "level_weights", weights).startswith(
        f"config.level_weights={weights} must be (level, weight) pairs"
    )


def test_one_axis_of_the_mesh_may_be_what_is_left(configs):
    check(unflatten_dict(flat(configs["stage1.py:tiny"]) | {"mesh.fsdp": -1}, sep="."))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"lora": {"rank": 0, "alpha": 8.0}}, "run/config.json: lora.rank=0 must be a whole number of at least 1."),
        ({"lora": {"rank": 8, "alpha": None}}, "run/config.json: lora.alpha=None must be a finite number above 0."),
        ({"data": {"fps": math.nan}}, "run/config.json: data.fps=nan must be a number from 0.1 to 240."),
    ],
)
def test_a_stored_configuration_is_checked_as_far_as_it_goes(stored, words):
    with pytest.raises(UserError) as error:
        for cls in (RunOptions, objective.find("stage1").Options):
            check_stored(cls, stored, "run/config.json: ")
    assert str(error.value) == words


def test_clips_have_as_many_frames_as_the_unet_s_unless_it_is_said():
    config = read_config(str(CONFIGS / "stage1.py:tiny"))
    config.random_networks.unet.num_frames = 25
    config.discriminator_frames = 25
    check_config(config)
    assert config.data.num_frames == 0
    assert setup.with_num_frames(config).data.num_frames == 25
    config.data.num_frames = 7
    assert setup.with_num_frames(config).data.num_frames == 7
    config.data.num_frames, config.discriminator_frames = 0, 26
    with pytest.raises(UserError, match=r"config\.discriminator_frames=26 must lie in 1 \.\. 25"):
        setup.with_num_frames(config)
