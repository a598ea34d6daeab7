"""How devices share the work changes nothing: a step of every student on kinds of meshes, and on one device.

With a toy for the UNet, for compiling the real one for eight devices takes long: that is done for the shortest step, on
the mesh that splits everything. Stage 2 is run on three meshes, and every student on every one by `make test-slow`.
`make test` has stage 2 on the mesh that splits everything, `make test-integration` the rest of what is quick.
"""

import functools
import itertools

import jax
import optax
import pytest
import tiny
from conftest import quick_jit
from students import (
    GRADIENT,
    SGD,
    TRAINABLE,
    add_of,
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

from osv_jax.objectives.add import ADDOptions
from osv_jax.objectives.animatelcm import AnimateLCM, AnimateLCMOptions
from osv_jax.objectives.options import LoRAOptions
from osv_jax.objectives.sf_v import SFV, R1Options, SFVOptions
from osv_jax.runtime import mesh

MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4))
ALL_SPLIT = (2, 2, 2)
# Parameters shared by all devices; a clip's height shared by more devices than divide its frames; everything split.
QUICK = ((1, 8, 1), (1, 2, 4), ALL_SPLIT)
KEY = jax.random.key(3)
STAGES = {"stage1": stage1, "stage2": stage2}
PEERS = ("animatelcm", "sf_v", "add")


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
    return networks, frozen, tiny.tiny_batch(8, height=12, width=12), state


@functools.cache
def started(name, unet):
    """Networks, frozen parameters, a batch, a state and the step of an objective."""
    if name == "add":
        networks, frozen = toy_networks_and_frozen() if unet == "toy" else one_level_networks_and_frozen()
        lora = LoRAOptions(4, 4.0, "attention" if unet == "real" else "all")
        options = ADDOptions(discriminator_blocks=(-1, 0), condition_width=8, trainable=("lora",), lora=lora)
        objective, frozen, state = add_of(networks, frozen, options, SGD | {"disc": optax.sgd(0.01)})
        # Two rows of patches: in one alone, norms have too little to take their variance from.
        return objective.networks, frozen, tiny.tiny_batch(8, height=12), state, objective.step
    networks, frozen, batch, state = beginning(unet)
    if name in STAGES:
        return networks, frozen, batch, state, STAGES[name](networks).step
    player = state.players["student"]
    if name == "animatelcm":
        objective = AnimateLCM(networks, AnimateLCMOptions(trainable=TRAINABLE, phases=()), SGD)
        return networks, frozen, batch, state.replace(players={"student": player}), objective.step
    # Its student learns from the discriminator alone: a large step of that would amplify rounding errors.
    rates = SGD | {"disc": optax.sgd(0.01)}
    objective = SFV(networks, SFVOptions(r1=R1Options(1e-3, kind="difference", step=0.1)), rates)
    disc = quick_jit(objective.init)(jax.random.key(0), frozen)["disc"]
    # More frames: second derivatives of norms over three are mostly rounding errors.
    batch = tiny.tiny_batch(8, frames=8, height=8)
    return networks, frozen, batch, state.replace(players={"student": player, "disc": disc}), objective.step


@functools.cache
def on_one_device(name, unet):
    _, frozen, batch, state, step = started(name, unet)
    return jax.jit(step)(state, frozen, batch, KEY)


def case(name, unet, sizes):
    # The stages share their step, and stage 2 does more in it; ADD's decoder takes long to compile.
    of_toy = (name == "stage2" and sizes in QUICK) or (sizes == ALL_SPLIT and name in ("animatelcm", "sf_v"))
    quick = of_toy if unet == "toy" else (name, sizes) == ("stage1", ALL_SPLIT)
    mark = pytest.mark.integration if quick else pytest.mark.slow
    return pytest.param(name, unet, sizes, marks=mark, id=f"{name}-{unet}-{sizes}")


@pytest.mark.parametrize(
    ("name", "unet", "sizes"),
    [case(*chosen) for chosen in itertools.product((*STAGES, *PEERS), ("real", "toy"), MESHES)],
)
def test_devices_change_nothing(name, unet, sizes, monkeypatch):
    # So that the tiny parameters are split at all.
    monkeypatch.setattr(mesh, "_MIN_SHARDED_ELEMENTS", 2**8)
    _, frozen, batch, state, step = started(name, unet)
    new, metrics = run_on(mesh.make_mesh(*sizes), step, state, frozen, batch, KEY)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new)) == (sizes[1] == 1)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(new)} == {8}
    expected, expected_metrics = on_one_device(name, unet)
    for metric, value in expected_metrics.items():
        # The mean of logits may be near zero; what logits are measured by is the hinge's 1.
        scale = 1.0 if metric.startswith("logits") else abs(float(value))
        bound = GRADIENT if metric.startswith("grad_norm") else 2 * GRADIENT if metric == "r1" else 1e-5
        if name in ("sf_v", "add") and metric in ("loss_adversarial", "loss_student"):
            # A mean of logits, too, and through a discriminator that has made a step with its gradient.
            scale, bound = 1.0, GRADIENT
        assert abs(float(metrics[metric]) - float(value)) < bound * scale, metric
    for part in (student_of, ema_of, disc_of)[: 2 + ("disc" in state.players)]:
        value, change = differences(part(new), part(expected), part(state))
        print(f"{part.__name__}: relative error {value:.1e}, of the change {change:.1e}")
        assert value < 1e-5 and change < GRADIENT, part.__name__
