"""How devices share the work changes nothing: a step of both stages on every kind of mesh, and on one device.

With a toy for the UNet, for compiling the real one for eight devices takes long: that is done for the shorter step, on
the mesh that splits everything, and for both on every mesh by `make test-slow`.
"""

import functools

import jax
import pytest
import tiny
from students import (
    GRADIENT,
    differences,
    disc_of,
    ema_of,
    one_level_networks_and_frozen,
    run_on,
    stage1,
    stage2,
    student_of,
    toy_networks_and_frozen,
    trained_state,
)

from osv_jax.runtime import mesh

MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4))
ALL_SPLIT = (2, 2, 2)
KEY = jax.random.key(3)


@functools.cache
def beginning(unet):
    """Networks, frozen parameters, a batch and a state."""
    if unet == "toy":
        networks, frozen = toy_networks_and_frozen()
        state = trained_state(networks, frozen)
    else:
        networks, frozen = one_level_networks_and_frozen()
        # Few parameters: what is new with this UNet is how its convolutions and attention are split.
        state = trained_state(networks, frozen, "attention", ("lora",))
    return networks, frozen, tiny.tiny_batch(8, height=8), state


def step_of(stage, unet):
    return {"stage1": stage1, "stage2": stage2}[stage](beginning(unet)[0]).step


@functools.cache
def on_one_device(stage, unet):
    _, frozen, batch, state = beginning(unet)
    return jax.jit(step_of(stage, unet))(state, frozen, batch, KEY)


def case(stage, unet, sizes):
    slow = unet == "real" and (stage, sizes) != ("stage1", ALL_SPLIT)
    return pytest.param(stage, unet, sizes, marks=[pytest.mark.slow] * slow, id=f"{stage}-{unet}-{sizes}")


@pytest.mark.parametrize(
    ("stage", "unet", "sizes"),
    [case(stage, unet, sizes) for unet in ("real", "toy") for stage in ("stage1", "stage2") for sizes in MESHES],
)
def test_devices_change_nothing(stage, unet, sizes, monkeypatch):
    # So that the tiny parameters are split at all.
    monkeypatch.setattr(mesh, "_MIN_SHARDED_ELEMENTS", 2**8)
    _, frozen, batch, state = beginning(unet)
    new, metrics = run_on(mesh.make_mesh(*sizes), step_of(stage, unet), state, frozen, batch, KEY)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new)) == (sizes[1] == 1)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(new)} == {8}
    expected, expected_metrics = on_one_device(stage, unet)
    for name, value in expected_metrics.items():
        # The mean of logits may be near zero; what logits are measured by is the hinge's 1.
        scale = 1.0 if name.startswith("logits") else abs(float(value))
        bound = GRADIENT if name.startswith("grad_norm") else 1e-5
        assert abs(float(metrics[name]) - float(value)) < bound * scale, name
    for part in (student_of, ema_of, disc_of):
        value, change = differences(part(new), part(expected), part(state))
        print(f"{part.__name__}: relative error {value:.1e}, of the change {change:.1e}")
        assert value < 1e-5 and change < GRADIENT, part.__name__
