"""Every number of every configuration that comes with the project has a range, and what is not in it is refused."""

import math
import pathlib

import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from osv_jax.errors import UserError
from osv_jax.training import keys, setup

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VARIANTS = {
    "stage1.py": ("", "tiny", "miniature"),
    "stage2.py": ("", "tiny", "miniature"),
    "finetune.py": ("", "tiny", "miniature", "miniature_lora"),
    "vae.py": ("", "temporal", "tiny"),
}
NAMES = [f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants]


@pytest.fixture(scope="module")
def configs():
    return {name: setup.read_config(str(CONFIGS / name)).to_dict() for name in NAMES}


def flat(config):
    return flatten_dict(config, sep=".")


def is_number(value):
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)


@pytest.mark.parametrize("name", NAMES)
def test_the_project_s_own_configurations_are_allowed(configs, name):
    keys.check_keys(configs[name])
    for key, value in flat(configs[name]).items():
        known = key in keys.RANGES or key.startswith(("random_networks.", "architecture."))
        assert known or not is_number(value), f"{key} has no range"


def test_no_range_is_of_a_key_that_nobody_has(configs):
    assert keys.RANGES.keys() <= {key for config in configs.values() for key in flat(config)}


def sentence(config, key, value) -> str:
    changed = unflatten_dict(flat(config) | {key: value}, sep=".")
    with pytest.raises(UserError) as error:
        keys.check_keys(changed)
    return str(error.value)


@pytest.mark.parametrize("name", ["stage2.py:tiny", "finetune.py:tiny", "vae.py:tiny"])
def test_no_number_may_be_something_else(configs, name):
    """Not a number, infinite, too small, a truth value, a text, nothing, or a fraction where things are counted."""
    for key, value in flat(configs[name]).items():
        if not is_number(value):
            continue
        bad = [math.nan, math.inf, -math.inf]
        if key in keys.RANGES:
            allowed = keys.RANGES[key]
            bad += [
                True,
                "7",
                None,
                *([1.5] if allowed.whole else []),
                *([allowed.low - 1] if allowed.low > -math.inf else []),
            ]
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
        ("of_my_own", math.nan, "config.of_my_own=nan must be a finite number."),
        ("of_my_own", (1, (2.0, math.inf)), "config.of_my_own=(1, (2.0, inf)) must be a finite number."),
        ("discriminator_blocks", (0, -1), "config.discriminator_blocks=(0, -1) must be a whole number of at least 0."),
        (
            "random_networks.unet.layers_per_block",
            0,
            "config.random_networks.unet.layers_per_block=0 must be a whole number of at least 1.",
        ),
        ("dtype", "float16", "config.dtype='float16' cannot be trained with: nearly all gradients would be rounded"),
    ],
)
def test_the_key_its_value_and_what_is_allowed_are_said(configs, key, value, words):
    assert sentence(configs["stage2.py:tiny"], key, value).startswith(words)


def test_one_axis_of_the_mesh_may_be_what_is_left(configs):
    keys.check_keys(unflatten_dict(flat(configs["stage1.py:tiny"]) | {"mesh.fsdp": -1}, sep="."))


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
        keys.check_numbers(stored, "run/config.json: ")
    assert str(error.value) == words
