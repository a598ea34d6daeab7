"""How devices share the work changes nothing: a step of both stages on every kind of mesh, and on one device."""

import functools

import jax
import pytest
import tiny
from conftest import relative_error
from students import GRADIENT, SGD, differences, one_level_networks_and_frozen, toy_networks_and_frozen, trained_state

from osv_jax.distill import stage1, stage2
from osv_jax.distill.adversarial import AdversarialOptions
from osv_jax.distill.stage2 import Stage2Options
from osv_jax.runtime import mesh

MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4))
NETWORKS = {"toy": toy_networks_and_frozen, "real": one_level_networks_and_frozen}
# Compiling the real UNet for eight devices takes long, so it has one mesh a stage.
CASES = [(stage, "toy", sizes) for stage in ("stage1", "stage2") for sizes in MESHES]
CASES += [("stage1", "real", (2, 2, 2)), ("stage2", "real", (1, 2, 4))]
KEY = jax.random.key(3)


@functools.cache
def beginning(unet):
    """Networks, frozen parameters, a batch and a state."""
    networks, frozen = NETWORKS[unet]()
    return networks, frozen, tiny.tiny_batch(8, height=8), trained_state(networks, frozen)


def step_of(stage, unet):
    networks, options = beginning(unet)[0], AdversarialOptions()
    if stage == "stage1":
        return stage1.make_step(networks, *SGD, options)
    return stage2.make_step(networks, *SGD, options, Stage2Options())


@functools.cache
def on_one_device(stage, unet):
    _, frozen, batch, state = beginning(unet)
    return jax.jit(step_of(stage, unet))(state, frozen, batch, KEY)


@pytest.mark.parametrize(("stage", "unet", "sizes"), CASES)
def test_devices_change_nothing(stage, unet, sizes, monkeypatch):
    # So that the tiny parameters are split at all.
    monkeypatch.setattr(mesh, "_MIN_SHARDED_ELEMENTS", 2**8)
    devices = mesh.make_mesh(*sizes)
    _, frozen, batch, state = beginning(unet)
    shardings = mesh.parameter_shardings(devices, state)
    with jax.set_mesh(devices):
        step = jax.jit(step_of(stage, unet), out_shardings=(shardings, mesh.replicated(devices)))
        new, metrics = step(
            jax.device_put(state, shardings),
            jax.device_put(frozen, mesh.parameter_shardings(devices, frozen)),
            jax.device_put(batch, mesh.batch_shardings(devices, batch)),
            KEY,
        )
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new)) == (sizes[1] == 1)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(new)} == {8}
    expected, expected_metrics = on_one_device(stage, unet)
    for name, value in expected_metrics.items():
        assert relative_error(metrics[name], value) < (GRADIENT if name.startswith("grad_norm") else 1e-5), name
    for name in ("student", "ema", "disc"):
        value, change = differences(getattr(new, name), getattr(expected, name), getattr(state, name))
        print(f"{name}: relative error {value:.1e}, of the change {change:.1e}")
        assert value < 1e-5 and change < GRADIENT, name
