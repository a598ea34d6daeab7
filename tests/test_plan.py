"""What `osv_jax.planning` says about programs, and whether it compiles the step that training runs."""

import importlib.util
import multiprocessing
import operator
import re

import jax
import jax.numpy as jnp
import micro_finetune
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy_unet import toy_networks

from osv_jax.errors import UserError
from osv_jax.models import attention
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.planning import chips, compiling, hlo, report, topologies, traffic
from osv_jax.runtime import mesh
from osv_jax.training.config import phases_of


def test_operations_of_loops_count_as_often_as_they_run():
    def program(x, kernel):
        x = jax.lax.scan(lambda x, _: (jnp.sin(x @ kernel), None), x, length=5)[0]
        image = jax.lax.conv_general_dilated(
            x.reshape(2, 3, 4, 1), jnp.ones((3, 3, 1, 8)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.checkpoint(lambda y: jnp.einsum("bhwc,bhwc->b", y, y))(image)

    traced = jax.jit(program).trace(jnp.ones((6, 4)), jnp.ones((4, 4)))
    products, convolution, sums = 5 * 2 * 6 * 4 * 4, 2 * (2 * 3 * 4 * 8) * 9, 2 * 2 * 3 * 4 * 8
    assert hlo.operations(traced.jaxpr.jaxpr) == products + convolution + sums


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_operations_of_a_kernel_count_for_all_its_blocks_and_devices(sizes):
    q = jnp.ones((8, 256, 2, 64))
    with jax.set_mesh(mesh.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])):
        counts = [
            hlo.operations(jax.make_jaxpr(lambda x, kind=kind: attention.dot_product_attention(x, x, x, kind))(q).jaxpr)
            for kind in ("splash", "xla")
        ]
    assert counts == [2 * 2 * 8 * 2 * 256 * 256 * 64] * 2


def test_operations_of_cudnns_attention_are_those_of_its_products(monkeypatch):
    for requirement in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{requirement}", lambda *_: 99_000)
    q, k = (jnp.ones((2, length, 3, 64), jnp.bfloat16) for length in (256, 128))

    def count(function):
        return hlo.operations(jax.make_jaxpr(function)(q).jaxpr)

    def attend(q):
        return attention.dot_product_attention(q, k, k, "cudnn").astype(jnp.float32).sum()

    product = 2 * 2 * 3 * 256 * 128 * 64
    assert count(attend) == 2 * product
    assert count(jax.grad(attend)) == (2 + 5) * product


def test_collectives_are_counted_by_kind_with_their_bytes():
    devices = mesh.make_mesh(2, 4)
    rows, whole = NamedSharding(devices, PartitionSpec("fsdp")), NamedSharding(devices, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    gathered = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile()
    assert hlo.collectives_of(gathered.as_text()) == {"all-gather": (1, 64 * 32 * 4)}
    summed = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(x).compile()
    assert hlo.collectives_of(summed.as_text()) == {"all-reduce": (1, 32 * 4)}
    text = "  %a = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(f32[2,4]{1,0} %p), dimensions={0}"
    assert hlo.collectives_of(text) == {"all-gather": (1, 8 * 4 * 4)}
    # One that is hidden behind three computations, once more by itself, and two that were combined.
    part = "  %g = bf16[8,4]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, dimensions={0}"
    both = "  %r = (f32[6]{0}, f32[2]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add"
    fusions = [f"%async_collective_fusion.{i} (p: bf16[2,4]) -> bf16[8,4] {{\n{part}\n}}" for i in range(3)]
    text = "\n\n".join([*fusions, f"ENTRY %main (p: bf16[2,4]) -> f32[2] {{\n{part}\n{both}\n}}"])
    assert hlo.collectives_of(text) == {"all-gather": (2, 2 * 8 * 4 * 2), "all-reduce": (1, 8 * 4)}


def test_assigned_memory_is_that_of_the_finished_program(tmp_path):
    """XLA's text about its buffers tells what it tells about the compiled program."""

    def train_step(x, kernel):
        x, all_of_x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ kernel),) * 2, x, length=4)
        return x + 1, all_of_x.sum(axis=1)

    lowered = jax.jit(train_step, donate_argnums=0).lower(jnp.ones((64, 128)), jnp.ones((128, 128)))
    assert hlo.read_assignment(tmp_path, 5.0) is None
    compiled = lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_module_re": "train_step"})
    expected, actual = hlo.analyse(compiled, 5.0), hlo.read_assignment(tmp_path, 5.0)
    assert actual.arguments == expected.arguments == (64 * 128 + 128 * 128) * 4
    assert actual.total == pytest.approx(expected.total, rel=1e-3) and actual.temporaries > 4 * 64 * 128 * 4
    assert (actual.flops, actual.collectives) == (expected.flops, expected.collectives)

    # As soon as it is there, whatever is still being compiled.
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.send(5.0)
    assert compiling.first_result(receiver, tmp_path) == actual


def compile_toy(*arguments):
    with toy_networks():
        compiling.compile_for(*arguments)


@pytest.mark.integration
def test_a_step_is_compiled_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(compiling, "compile_for", compile_toy)
    config = small(**{"mesh.fsdp": 2, "mesh.data": -1})
    (phase,) = phases_of(config)
    made = compiling.plan_without_code(config, phase, "cpu:4")
    assert made.temporaries > 0 and made.flops > 0 and "all-reduce" in made.collectives
    with toy_networks():
        devices = mesh.make_mesh(2, 2, devices=jax.devices()[:4])
        expected = compiling.plan_step(config, phase, devices)
    assert (made.arguments, made.flops) == (expected.arguments, expected.flops)


def test_a_process_that_ends_without_a_plan_is_told_of(monkeypatch, capfd):
    monkeypatch.setattr(compiling, "compile_for", operator.neg)  # Which takes one argument.
    with pytest.raises(UserError, match=r"ended with status 1; -9 means that this machine's memory was not enough"):
        compiling.plan_without_code(small(), phases_of(small())[0], "cpu")
    assert "TypeError" in capfd.readouterr().err


def small(**changes):
    config = micro_finetune.get_config()
    config.lora.targets, config.batch_size = "all", 8
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def here(monkeypatch):
    """Compilation in this process, where things can be put in the place of others."""

    def plan_here(config, phase, topology):
        return compiling.plan_step(config, phase, topologies.layout(config, topologies.devices_of(topology)[1]))

    monkeypatch.setattr(compiling, "plan_without_code", plan_here)


@pytest.fixture
def toy(here):
    with toy_networks():
        yield


def test_the_memory_of_a_step(toy, capsys, monkeypatch):
    monkeypatch.setattr(mesh, "_MIN_SHARDED_ELEMENTS", 16)
    monkeypatch.setattr(topologies, "devices_of", lambda topology: (chips.Chip("chip", 1e9, 1e9, 1e9), jax.devices()))
    assert report.make_plan(small(**{"mesh.data": 2, "mesh.fsdp": 4}), "v5e:2x4")
    output = capsys.readouterr().out
    assert "finetune on 8 x chip (data 2 x fsdp 4 x context 1), batch 8, float32" in output
    assert "all-gather" in output and "of 1.00 GB" in output and "at the chip's peak" in output and "  fits (" in output
    assert "\n  roofline " in output and "GB products, convolutions, " in output


def test_what_is_said_about_traffic():
    counted = traffic.Traffic(
        {traffic.LOOPS: 40e9, traffic.PRODUCTS: 20e9}, [traffic.Cause(traffic.LOOPS, "norm*/mul", "a.py:7", 9e9, 3)], 2
    )
    plan = hlo.Plan(1e9, 2e9, 0.0, 3e12, {}, counted)
    text = report.describe(plan, chips.Chip("chip", 80e9, 1e12, 10e9, unknown="this"), "fits.")
    assert text.splitlines()[4:] == [
        "  time              3.00 s a step at the chip's peak: it cannot be faster",
        "  traffic          60.00 GB a step with the device's memory",
        "    elementwise loops           40.00 GB",
        "    products, convolutions      20.00 GB",
        "    Not known how often they run, and counted once: 2 loops.",
        "  roofline          7.00 s a step: the larger of 3.00 s (operations) and 2.00 s (their traffic), and 4.00 s"
        " (other traffic)",
        "  most traffic comes from",
        "         9.00 GB elementwise loops, 3 times, norm*/mul a.py:7",
        "  The compiler cannot know this.",
        "  fits.",
    ]
    # Without a bandwidth there is no time.
    assert "roofline" not in report.describe(plan, chips.CPU, "fits.")


def test_prepared_latents_need_not_be_there(toy, capsys):
    assert report.make_plan(small(**{"data.dataset": "nowhere"}), "cpu")
    assert "Planning for clips that are encoded in the step" in capsys.readouterr().out


def test_without_the_weights_the_sizes_are_svds(here, capsys, monkeypatch):
    class Traced(Exception):
        pass

    def trace(config, objective, *_):
        raise Traced(objective.networks.unet.config)

    monkeypatch.setattr(compiling, "trace", trace)
    config = small(**{"weights": "nowhere", "data.num_frames": 0})
    config.random_networks = {}
    config.lock()  # As those of the command line are.
    with pytest.raises(Traced) as traced:
        report.make_plan(config, "cpu")
    assert traced.value.args == (UNetConfig(),)
    output = capsys.readouterr().out
    assert "nowhere is not there: planning for the released networks' own sizes" in output and "\n14 x " in output


def test_what_does_not_fit_comes_with_advice(toy, capsys, monkeypatch):
    chip = chips.Chip("chip", 1e3, None)
    monkeypatch.setattr(topologies, "devices_of", lambda topology: (chip, jax.devices()[:1]))
    assert not report.make_plan(small(remat="full"), "v5e:1")
    assert "does not fit: compute a device's clips one after the other: config.grad_accum=8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sentence", "needed"),
    [
        ("Ran out of memory. Used 25.70G of 15.75G hbm. More", "Used 25.70G of 15.75G hbm"),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (600.00G) exceeds available HBM"
            " (15.75G).",
            "the total memory required for HLO temporaries (600.00G) exceeds available HBM (15.75G)",
        ),
        ("Something else.", "out of memory"),
    ],
)
def test_what_xla_refuses_does_not_fit(toy, capsys, monkeypatch, sentence, needed):
    class Refused:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {sentence}")

    traced = type("Traced", (), {"lower": lambda self: Refused(), "jaxpr": jax.make_jaxpr(jnp.sin)(1.0)})()
    monkeypatch.setattr(compiling, "trace", lambda *args: traced)
    chip = chips.Chip("chip", 1e3, None)
    monkeypatch.setattr(topologies, "devices_of", lambda topology: (chip, jax.devices()[:1]))
    assert not report.make_plan(small(remat="full", batch_size=1), "v5e:1")
    assert f"does not fit ({needed}): train less" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({"remat": "none"}, (1, 1, 1), "config.remat=full"),
        ({"discriminator_frames": 0}, (1, 8, 1), "config.discriminator_frames=1"),
        ({}, (1, 8, 1), "config.trainable=('lora',)"),
        ({"batch_size": 8, "grad_accum": 2}, (2, 1, 1), "config.grad_accum=4"),
        ({"batch_size": 2}, (2, 4, 1), "config.mesh.fsdp=8"),
        ({"trainable": ("lora",)}, (1, 4, 2), "config.mesh.context=4"),
    ],
)
def test_advice(changes, sizes, words):
    config = small(**({"remat": "full", "batch_size": sizes[1]} | changes))
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    assert words in report.advice(config, jax.sharding.Mesh(devices, mesh.AXES))


def test_this_machine_is_one_device_or_several(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    for topology, count in (("cpu", 1), ("cpu:4", 4)):
        chip, devices = topologies.devices_of(topology)
        assert chip.memory is None and len(devices) == count
    assert asked == {"jax_num_cpu_devices": 4}


@pytest.mark.parametrize(
    "topology", ["v9:2x2", "gpu:eight", "gpu", "v5e", "v5e:two", "v5e:0x4", "cpu:x", "h100", "h100:8x"]
)
def test_unknown_topologies_are_refused(topology):
    with pytest.raises(UserError, match=f"--topology={topology} is unknown; give a TPU slice .* GPUs .*h100:8, "):
        topologies.devices_of(topology)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("gpu:8x0GB", "a whole number from 1 to 10000 for the memory of each GPU"),
        (f"gpu:8x{10**400}GB", "a whole number from 1 to 10000 for the memory of each GPU"),
        ("gpu:0x80GB", "a whole number from 1 to 1024 for the number of GPUs"),
        ("h200:100000", "a whole number from 1 to 1024 for the number of GPUs"),
        ("h100:0x8", "a whole number from 1 to 1024 for the number of machines"),
        ("h100:64x32", "a whole number from 1 to 1024 for the number of GPUs"),
        ("cpu:0", "a whole number from 1 to 1024 for the number of devices"),
    ],
)
def test_impossible_numbers_of_devices_are_refused(topology, words):
    with pytest.raises(UserError, match=rf"--topology={topology} must have {words}"):
        topologies.devices_of(topology)


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [(80, "h100"), (40, "a100-40gb"), (48, "l40s"), (24, "rtx4090"), (141, "h200"), (192, "b200"), (1, "rtx4090")],
)
def test_a_gpu_of_a_size_is_the_nearest_that_is_described(gigabytes, name):
    """Of an A100 and an H100 with 80 GB the faster one."""
    assert chips.nearest_gpu(gigabytes) == name


@pytest.mark.parametrize("name", chips.gpu_names())
def test_descriptions_of_gpus_are_whole(name):
    described, h100 = chips.gpu(name), chips.gpu("h100")
    assert described.name.startswith("NVIDIA") and described.unknown
    assert 20e9 < described.memory < 200e9 and 0.8e12 < described.bandwidth < 9e12 and 1e14 < described.peak < 3e15
    # What XLA reads: every description says the same things, and nothing that XLA would not know.
    keys = [set(re.findall(r"\w+(?=:| \{)", text)) - {"feature_extension"} for text in (described.target, h100.target)]
    assert keys[0] == keys[1] and "bfloat16_operations_per_second" not in keys[0]


def test_gpus_of_several_machines(monkeypatch):
    asked = []
    described = type("Described", (), {"devices": jax.devices()})()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        topologies, "get_topology_desc", lambda name, **options: asked.append((name, options["topology"])) or described
    )
    for topology in ("h100:8", "a100-40gb:1", "h100:2x8", "gpu:4x80GB"):
        chip, _ = topologies.devices_of(topology)
    assert asked == [("h100", "1x1x8"), ("a100-40gb", "1x1x1"), ("h100", "2x1x8"), ("h100", "1x1x4")]
    assert chip.memory == pytest.approx(0.92 * 84978434048)


@pytest.mark.parametrize("name", chips.gpu_names())
def test_a_program_for_gpus_that_are_not_there(name):
    """Compiled by the GPU's own compiler: a product and a sum over two of them, and attention by cuDNN."""
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("needs the extra plan-gpu")
    chip, devices = topologies.devices_of(f"{name}:2x1")
    over = mesh.make_mesh(2, 1, devices=devices)
    rows, whole = (NamedSharding(over, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=rows)
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16, sharding=rows)

    def step(x, q):
        return (x @ jnp.ones((256, 64), x.dtype)).sum(axis=0), attention.dot_product_attention(q, q, q)

    with jax.set_mesh(over):
        compiled = jax.jit(step, out_shardings=(whole, rows)).lower(x, q).compile(compiling.GPU_OPTIONS)
    made = hlo.analyse(compiled, 1.0)
    assert made.arguments == 256 * 256 * 2 + 256 * 4 * 64 * 2 and made.total < chip.memory
    assert "all-reduce" in made.collectives
    # Queries, keys and values are one array, which is read once; the result is as large.
    assert made.traffic.by_kind[traffic.ATTENTION] == 2 * 256 * 4 * 64 * 2
    assert made.traffic.by_kind[traffic.PRODUCTS] >= (256 * 256 + 256 * 64 + 256 * 64) * 2


def test_gpus_without_their_compiler_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"compiler for GPUs is not installed: pip install .*\.\[plan-gpu\]"):
        topologies.devices_of("h100:8")


def test_one_chip_is_a_host_of_its_own(monkeypatch):
    """Or libtpu would refuse it: its hosts have four chips."""
    asked = []
    described = type("Described", (), {"devices": jax.devices()})()
    monkeypatch.setattr(
        topologies, "get_topology_desc", lambda name, **options: asked.append((name, options)) or described
    )
    for name in ("v5e:1x1", "v5p:1x1x1", "v5e:2x2"):
        topologies.devices_of(name)
    single = {"platform": "tpu", "chips_per_host_bounds": (1, 1, 1)}
    assert asked == [("v5e:1x1", single), ("v5p:1x1x1", single), ("v5e:2x2", {"platform": "tpu"})]


def test_a_slice_without_libtpu_is_refused():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed; that a slice is then compiled for is in docs/scaling.md, with its figures")
    with pytest.raises(UserError, match=r"cannot be compiled for: .* install libtpu"):
        topologies.devices_of("v5e:2x2")


def test_the_platform_is_that_of_the_devices_compiled_for(toy):
    """Or attention for a TPU that is not there would be XLA's."""
    absent = jax.sharding.AbstractDevice("TPU v5e", 1, "tpu")
    devices = jax.sharding.AbstractMesh((1, 1, 1), mesh.AXES, (AxisType.Auto,) * 3, abstract_device=absent)
    q = jnp.ones((2, 128, 2, 64))
    with jax.sharding.use_abstract_mesh(devices):
        assert "pallas" in str(jax.make_jaxpr(attention.dot_product_attention)(q, q, q))
    assert "pallas" not in str(jax.make_jaxpr(attention.dot_product_attention)(q, q, q))
