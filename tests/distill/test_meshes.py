"""How devices share the work changes nothing: a step of both stages on every kind of mesh, and on one device.

With a toy for the UNet, for compiling the real one for eight devices takes long: `test_stage1` has that on one mesh.
"""

import functools

import jax
import pytest
import tiny
from conftest import relative_error
from students import GRADIENT, SGD, differences, run_on, toy_networks_and_frozen, trained_state

from osv_jax.distill import stage1, stage2
from osv_jax.distill.adversarial import AdversarialOptions
from osv_jax.distill.stage2 import Stage2Options
from osv_jax.runtime import mesh

MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4))
KEY = jax.random.key(3)


@functools.cache
def beginning():
    """Networks, frozen parameters, a batch and a state."""
    networks, frozen = toy_networks_and_frozen()
    return networks, frozen, tiny.tiny_batch(8, height=8), trained_state(networks, frozen)


def step_of(stage):
    networks, options = beginning()[0], AdversarialOptions()
    if stage == "stage1":
        return stage1.make_step(networks, *SGD, options)
    return stage2.make_step(networks, *SGD, options, Stage2Options())


@functools.cache
def on_one_device(stage):
    _, frozen, batch, state = beginning()
    return jax.jit(step_of(stage))(state, frozen, batch, KEY)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_devices_change_nothing(stage, sizes, monkeypatch):
    # So that the tiny parameters are split at all.
    monkeypatch.setattr(mesh, "_MIN_SHARDED_ELEMENTS", 2**8)
    _, frozen, batch, state = beginning()
    new, metrics = run_on(mesh.make_mesh(*sizes), step_of(stage), state, frozen, batch, KEY)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new)) == (sizes[1] == 1)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(new)} == {8}
    expected, expected_metrics = on_one_device(stage)
    for name, value in expected_metrics.items():
        assert relative_error(metrics[name], value) < (GRADIENT if name.startswith("grad_norm") else 1e-5), name
    for name in ("student", "ema", "disc"):
        value, change = differences(getattr(new, name), getattr(expected, name), getattr(state, name))
        print(f"{name}: relative error {value:.1e}, of the change {change:.1e}")
        assert value < 1e-5 and change < GRADIENT, name
