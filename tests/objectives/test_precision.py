"""What half-precision networks compute in float32 all the same, and what their steps do not do.

Both are read off their programs: nothing is compiled or run. Results would not tell: a norm or a softmax in bfloat16
changes them no more than the rest of such a network does, and what a step does for nothing does not change them at all.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxprs import equations, kernel_gradients, place, products
from students import CONFIGS, TRAINABLE
from toy_text import toy_text_batch, toy_text_networks

from osv_jax.codec import Codec
from osv_jax.convert.architectures import expected_params
from osv_jax.models.discriminator import discriminate, init_discriminator
from osv_jax.objectives.add import ADD
from osv_jax.objectives.animatelcm import AnimateLCM
from osv_jax.objectives.avdm2 import AVDM2
from osv_jax.objectives.finetune import Finetune
from osv_jax.objectives.networks import build_networks
from osv_jax.objectives.options import LoRAOptions
from osv_jax.objectives.osv_stage1 import Stage1
from osv_jax.objectives.osv_stage2 import Stage2
from osv_jax.objectives.sf_v import SFV
from osv_jax.planning.traffic import traffic_of
from osv_jax.training import setup

BATCH, FRAMES = 2, 3
NETWORKS = build_networks(CONFIGS, discriminator_blocks=(0,), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

NORM, SOFTMAX, SINUSOIDS = {"reduce_sum", "rsqrt"}, {"reduce_max", "exp"}, {"sin", "cos"}
# None of them is an activation's: those are `logistic` and `erf`.
FORWARD = NORM | SOFTMAX | SINUSOIDS | {"exp2", "log", "log1p", "pow", "sqrt"}
# Backwards, `erf` has an `exp`, and what was broadcast, a bias for example, a sum.
BACKWARD = FORWARD - {"exp", "reduce_sum"}


def half_precision(jaxpr, delicate):
    """The equations that compute `delicate` primitives in less than float32, or one number a clip or in all, a loss
    for example, from more numbers or from one in float32."""
    found = []
    for eqn in equations(jaxpr):
        name, operand = eqn.primitive.name, eqn.invars[0].aval if eqn.invars else None
        for result in (variable.aval for variable in eqn.outvars):
            if not jnp.issubdtype(result.dtype, jnp.floating) or result.dtype == jnp.float32:
                continue
            single = result.shape in ((), (BATCH,))
            reduced = name.startswith("reduce") and operand.size > result.size
            rounded = name == "convert_element_type" and operand.dtype == jnp.float32 and not operand.weak_type
            if name in delicate or (single and (reduced or rounded)):
                found.append(str(eqn))
    return found


def params_of(name):
    shapes = unflatten_dict(expected_params(name, CONFIGS[name]))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def unet():
    arguments = floats(BATCH, FRAMES, 6, 10, 8), floats(BATCH), floats(BATCH, 8), floats(BATCH, 3)
    return NETWORKS.unet.apply, {"params": params_of("unet")}, *arguments


def vae_encoder():
    return NETWORKS.codec.encode_video, params_of("vae"), floats(BATCH, FRAMES, 8, 12, 3)


def vae_decoder():
    return NETWORKS.codec.decode_video, params_of("vae"), floats(BATCH, FRAMES, 4, 6, 4)


def image_encoder():
    return NETWORKS.image_encoder.apply, {"params": params_of("image_encoder")}, floats(BATCH, 28, 28, 3)


def dinov2():
    run = lambda params, images: NETWORKS.dinov2.apply({"params": params}, images, (0,))  # noqa: E731
    return run, params_of("dinov2"), floats(BATCH, 28, 42, 3)


def discriminator():
    modules = NETWORKS.discriminator, NETWORKS.dinov2
    variables = jax.eval_shape(lambda key: init_discriminator(modules[0], key, 64), jax.random.key(0))
    run = lambda *arguments: discriminate(*modules, *arguments, update_stats=True)  # noqa: E731
    return run, variables, params_of("dinov2"), floats(BATCH, FRAMES, 6, 10, 4)


def step_of(cls, **options):
    options |= {"lora": LoRAOptions(4, 4.0, "attention"), "trainable": TRAINABLE}
    objective, frozen = cls(NETWORKS, cls.Options(**options)), {name: params_of(name) for name in CONFIGS}
    state = jax.eval_shape(setup.make_init(objective), jax.random.key(0), frozen)
    return objective.step, state, frozen, tiny.tiny_batch(BATCH, FRAMES), jax.random.key(0)


def stage1():
    return step_of(Stage1)


def stage2():
    return step_of(Stage2, discriminator_input="decoded")


def denoising():
    return step_of(Finetune)


def animatelcm():
    return step_of(AnimateLCM, phases=())


def sf_v():
    return step_of(SFV)


def add():
    return step_of(ADD, discriminator_blocks=(0,))


def avdm2():
    networks, frozen = toy_text_networks(jnp.bfloat16)
    objective = AVDM2(networks, AVDM2.Options(sdm_frames=2, discriminator_width=8))
    state = jax.eval_shape(setup.make_init(objective), jax.random.key(0), frozen)
    return objective.step, state, frozen, toy_text_batch(BATCH, FRAMES), jax.random.key(0)


STEPS = (stage1, stage2, denoising, add, sf_v, animatelcm)
# What the programs of the steps read and write [MB], before any compiler has fused anything: it does not depend on the
# machine. A change that costs or saves more than 2 % of it comes with the new figure.
TRAFFIC = {
    stage1: 532.1,
    stage2: 2614.9,
    denoising: 358.4,
    animatelcm: 817.3,
    add: 1178.1,
    sf_v: 761.8,
    # Its simulation ends after a random number of steps: one is counted.
    avdm2: 33.1,
}


@functools.cache
def traced(case):
    run, *arguments = case()
    return jax.jit(run).trace(*arguments)


@pytest.mark.parametrize(
    ("case", "delicate", "there"),
    [
        (unet, FORWARD, NORM | SOFTMAX | SINUSOIDS),
        (vae_decoder, FORWARD, NORM | SOFTMAX),
        (image_encoder, FORWARD, NORM | SOFTMAX),
        (dinov2, FORWARD, NORM | SOFTMAX),
        (discriminator, FORWARD, NORM | SOFTMAX | {"sqrt"}),
        (stage1, BACKWARD, {"rsqrt", "reduce_max", "sin", "cos", "log", "sqrt"}),
        (stage2, BACKWARD, {"rsqrt", "reduce_max", "sin", "cos", "log", "sqrt", "pow"}),
        (denoising, BACKWARD, {"rsqrt", "reduce_max", "sin", "cos", "log"}),
        (add, BACKWARD, {"rsqrt", "reduce_max", "sin", "cos", "log"}),
        (sf_v, BACKWARD, {"rsqrt", "reduce_max", "sin", "cos", "log", "sqrt"}),
        (animatelcm, BACKWARD, {"rsqrt", "reduce_max", "sin", "cos", "log", "sqrt", "pow"}),
        (avdm2, BACKWARD, {"rsqrt", "log1p", "sqrt", "while", "cond"}),
    ],
)
def test_norms_softmax_embeddings_and_losses_are_in_float32(case, delicate, there):
    jaxpr = traced(case).jaxpr
    halves = {eqn.primitive.name for eqn in equations(jaxpr) if any(v.aval.dtype == jnp.bfloat16 for v in eqn.outvars)}
    assert halves & {"dot_general", "conv_general_dilated"}
    assert there <= {eqn.primitive.name for eqn in equations(jaxpr)}
    assert half_precision(jaxpr, delicate) == []
    if case not in (image_encoder, dinov2):
        # Predictions, moments, pixels and logits; of steps the state and the metrics.
        assert {v.aval.dtype for v in jaxpr.jaxpr.outvars} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("case", [*STEPS, avdm2])
def test_products_are_in_half_precision(case):
    """But for those that ask for every digit, as resampling of pixels, and a softmax' gradient, which is JAX's."""
    exact = (jax.lax.Precision.HIGHEST,) * 2
    found = products(traced(case).jaxpr)
    wide = [eqn for eqn in found if any(variable.aval.dtype == jnp.float32 for variable in eqn.invars)]
    others = [eqn for eqn in wide if eqn.params["precision"] != exact and place(eqn) != "dot_product_attention"]
    assert [(place(eqn), str(eqn.source_info.name_stack), str(eqn)) for eqn in others] == []
    assert len(wide) < len(found) / 2


@pytest.mark.parametrize("case", [*STEPS, avdm2])
def test_a_step_does_not_wait_for_the_host(case):
    jaxpr = traced(case).jaxpr
    assert not jaxpr.effects
    assert not [eqn.primitive.name for eqn in equations(jaxpr) if "callback" in eqn.primitive.name]


@pytest.mark.parametrize("case", STEPS)
def test_kernels_have_a_gradient_if_they_are_trained(case):
    """The frozen networks' have none, though gradients go through all of them."""
    _, state, frozen, *_ = case()
    classes = {"unet": "SVDUNet", "vae": "SVDVAE", "image_encoder": "CLIPVision", "dinov2": "Dinov2"}
    shapes = {(classes[path[0]], *path[1:]): leaf.shape for path, leaf in flatten_dict(frozen).items()}
    kernels = {path[:-1]: shape for path, shape in shapes.items() if path[-1] == "kernel"}
    tuned = {path for path in flatten_dict(state.players["student"].params.tuned) if path[-1] == "kernel"}
    assert tuned
    assert kernel_gradients(traced(case).jaxpr, kernels) == {("SVDUNet", *path[:-1]) for path in tuned}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic_with_memory_is_as_committed(case, monkeypatch):
    text = traced(case).lower().compiler_ir("hlo").as_hlo_text()
    # Of 180,000 calls the checks take most of the time.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    counted = traffic_of(text)
    assert counted.unknown_loops == (case is avdm2)
    assert counted.total / 1e6 == pytest.approx(TRAFFIC[case], rel=0.02), counted


def test_half_precision_networks_encode_in_float32():
    """With products that TPUs and GPUs do not round; parameters in half precision are converted on their way."""
    run, *arguments = vae_encoder()
    jaxpr = jax.make_jaxpr(run)(*arguments)
    assert len(products(jaxpr)) > 20
    for eqn in products(jaxpr):
        assert {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)} == {jnp.dtype(jnp.float32)}
        assert eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert {eqn.primitive.name for eqn in equations(jaxpr)} >= NORM | SOFTMAX
    assert half_precision(jaxpr, FORWARD) == []
    # What is left in half precision is parameters that are given another shape.
    halves = {eqn.primitive.name for eqn in equations(jaxpr) if any(v.aval.dtype == jnp.bfloat16 for v in eqn.outvars)}
    assert halves <= {"reshape"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_the_decoder_computes_in_the_dtype_that_is_asked_for(dtype):
    codec = Codec(NETWORKS.vae.clone(dtype=dtype), NETWORKS.image_encoder)
    jaxpr = jax.make_jaxpr(codec.decode_video)(params_of("vae"), floats(BATCH, FRAMES, 4, 6, 4))
    # Attention's weights and the blend of both paths are float32 in any case.
    convolutions = [eqn for eqn in products(jaxpr) if eqn.primitive.name == "conv_general_dilated"]
    assert len(convolutions) > 20
    assert {v.aval.dtype for eqn in convolutions for v in (*eqn.invars, *eqn.outvars)} == {jnp.dtype(dtype)}
    assert half_precision(jaxpr, FORWARD) == []
    assert {v.aval.dtype for v in jaxpr.jaxpr.outvars} == {jnp.dtype(jnp.float32)}
