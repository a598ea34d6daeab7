"""The traffic with memory of small programs for which it is known by arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from osv_jax.planning import program, traffic

# What a GPU's compiler writes, shortened: a product, a fusion of its result, and a loop of five rounds that reads one
# row of `%rows` and writes one row of `%out` in each.
LOOP = """\
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(bf16[64,32]{1,0})->f32[5,8]{1,0}}

FileNames
1 "/home/me/osv_jax/osv_jax/models/layers.py"
2 "/usr/lib/python3/jax/numpy.py"

FunctionNames
1 "__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=16 end_line=16 column=6 end_column=223}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=6 end_column=223}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%fused_silu (param_0.1: bf16[64,16], param_1: f32[64,16]) -> f32[64,16] {
  %param_0.1 = bf16[64,16]{1,0} parameter(0)
  %convert.3 = f32[64,16]{1,0} convert(%param_0.1)
  %param_1 = f32[64,16]{1,0} parameter(1)
  ROOT %multiply.1 = f32[64,16]{1,0} multiply(%convert.3, %param_1)
}

%fused_row (p.0: f32[5,8], p.1: s32[], p.2: f32[5,8]) -> f32[5,8] {
  %p.0 = f32[5,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[5,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
  %twice = f32[1,8]{1,0} add(%row, %row)
  ROOT %put = f32[5,8]{1,0} dynamic-update-slice(%p.2, %twice, %p.1, %zero)
}

%body (state: (s32[], f32[5,8], f32[5,8])) -> (s32[], f32[5,8], f32[5,8]) {
  %state = (s32[], f32[5,8]{1,0}, /*index=2*/f32[5,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %rows = f32[5,8]{1,0} get-tuple-element(%state), index=1
  %out = f32[5,8]{1,0} get-tuple-element(%state), index=2
  %next = f32[5,8]{1,0} fusion(%rows, %i, %out), kind=kLoop, calls=%fused_row, \
metadata={op_name="jit(f)/while/body/up_3/add"}
  ROOT %new = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) tuple(%i, %rows, /*index=2*/%next)
}

%condition (state.1: (s32[], f32[5,8], f32[5,8])) -> pred[] {
  %state.1 = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main.2 (x.1: bf16[64,32], k.1: bf16[32,16], g: f32[64,16], r: f32[5,8], o: f32[5,8]) -> f32[5,8] {
  %x.1 = bf16[64,32]{1,0} parameter(0)
  %k.1 = bf16[32,16]{1,0} parameter(1)
  %g = f32[64,16]{1,0} parameter(2)
  %r = f32[5,8]{1,0} parameter(3)
  %o = f32[5,8]{1,0} parameter(4)
  %start = s32[] constant(0)
  %gemm = (bf16[64,16]{1,0}, s8[33554432]{0}) custom-call(%x.1, %k.1), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(f)/attn_1/dot_general" stack_frame_id=2}, backend_config={"beta":0}
  %product = bf16[64,16]{1,0} get-tuple-element(%gemm), index=0
  %silu = f32[64,16]{1,0} fusion(%product, %g), kind=kLoop, calls=%fused_silu, metadata={op_name="jit(f)/attn_2/mul"}
  %silu.1 = f32[64,16]{1,0} fusion(%product, %g), kind=kLoop, calls=%fused_silu, metadata={op_name="jit(f)/attn_9/mul"}
  %copy = f32[64,16]{0,1} copy(%silu)
  %before = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) tuple(%start, %r, %o)
  %while = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) while(%before), condition=%condition, body=%body
  ROOT %result = f32[5,8]{1,0} get-tuple-element(%while), index=2
}
"""
PRODUCT = 64 * 32 * 2 + 32 * 16 * 2 + 64 * 16 * 2  # Its scratch memory is not read.
SILU = 64 * 16 * (2 + 4 + 4)
ROUND = 8 * 4 + 8 * 4 + 4  # One row read, one written, and the number of the round.


def test_traffic_by_kind():
    counted = traffic.traffic_of(LOOP)
    assert counted.by_kind == {
        traffic.LOOPS: 2 * SILU + 5 * ROUND,
        traffic.MOVES: 2 * 64 * 16 * 4,
        traffic.PRODUCTS: PRODUCT,
    }
    assert list(counted.by_kind) == [traffic.LOOPS, traffic.MOVES, traffic.PRODUCTS]  # The largest first.
    assert counted.total == 2 * SILU + 5 * ROUND + 2 * 64 * 16 * 4 + PRODUCT
    assert (counted.beside_operations, counted.unknown_loops) == (PRODUCT, 0)


def test_causes_are_places_in_the_code():
    """Layers that differ in their number are one; the place is our line that called the library's."""
    causes = traffic.traffic_of(LOOP, largest=4).causes
    assert causes == [
        traffic.Cause(traffic.LOOPS, "attn_*/mul", "", 2 * SILU, 2),
        traffic.Cause(traffic.MOVES, "copy", "", 2 * 64 * 16 * 4, 1),
        traffic.Cause(traffic.PRODUCTS, "attn_*/dot_general", "osv_jax/models/layers.py:16", PRODUCT, 1),
        traffic.Cause(traffic.LOOPS, "up_*/add", "", 5 * ROUND, 5),
    ]
    assert traffic.traffic_of(LOOP, largest=1).causes == causes[:1]


@pytest.mark.parametrize(
    ("attribute", "rounds", "unknown"),
    [
        (', backend_config={"known_trip_count":{"n":"7"}}', 7, 0),
        (', backend_config={"known_trip_count":{"n":7},"known_init_step":{"init":"0","step":"1"}}', 7, 0),
        ("", 1, 1),
    ],
)
def test_loops_count_as_often_as_they_run(attribute, rounds, unknown):
    """As XLA says; one whose end is computed is counted once, and told of."""
    text = LOOP.replace("body=%body\n", f"body=%body{attribute}\n").replace(
        "%end = s32[] constant(5)", "%end = s32[] negate(%i.1)"
    )
    counted = traffic.traffic_of(text)
    assert counted.by_kind[traffic.LOOPS] == 2 * SILU + rounds * ROUND
    assert counted.unknown_loops == unknown


def test_a_fusion_without_a_name_has_that_of_what_is_in_it():
    text = LOOP.replace(', metadata={op_name="jit(f)/attn_2/mul"}', "").replace(
        "convert(%param_0.1)", 'convert(%param_0.1), metadata={op_name="jit(f)/norm_4/convert" stack_frame_id=1}'
    )
    names = {(cause.operation, cause.source) for cause in traffic.traffic_of(text).causes}
    assert ("norm_*/convert", "osv_jax/models/layers.py:16") in names and ("attn_*/mul", "") in names


def entry(*lines, before=""):
    return "\n".join(["HloModule jit_f", before, "ENTRY %main (p: f32[8,4]) -> f32[8,4] {", *lines, "}"])


ARRAY, SMALL = 8 * 4 * 4, 2 * 4 * 4
P = "  %p = f32[8,4]{1,0} parameter(0)"
SUMMED = """
%sums (q: f32[8,4]) -> (f32[8], f32[8,4]) {
  %q = f32[8,4]{1,0} parameter(0)
  %z = f32[] constant(0)
  %s = f32[8]{0} reduce(%q, %z), dimensions={1}, to_apply=%add
  ROOT %t = (f32[8]{0}, f32[8,4]{1,0}) tuple(%s, %q)
}
"""
TRANSPOSED = """
%moved (q: f32[8,4]) -> bf16[4,8] {
  %q = f32[8,4]{1,0} parameter(0)
  %c = bf16[8,4]{1,0} convert(%q)
  ROOT %t = bf16[4,8]{1,0} transpose(%c), dimensions={1,0}
}
"""
WRAPPED = """
%wrapped (q: f32[8,4]) -> f32[2,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %s = f32[2,4]{1,0} slice(%q), slice={[0:2], [0:4]}
}
"""
BRANCHES = """
%one (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%q)
}

%two (q.2: f32[8,4]) -> f32[8,4] {
  ROOT %q.2 = f32[8,4]{1,0} parameter(0)
}
"""


FMHA = 'custom_call_target="__cudnn$fmhaSoftmax"'
ASYNC = "  %s = ((f32[8,4]{1,0}), f32[2,4]{1,0}, u32[]) async-start(%p), calls=%wrapped"
TO_CHIP = "  %s = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}) copy-start(%p)"
GATHER = "  %s = (f32[2,4]{1,0}, f32[8,4]{1,0:S(1)}) all-gather-start(%p), dimensions={0}"
CHOICE = "  ROOT %c = f32[8,4]{1,0} conditional(%b, %p, %p), branch_computations={%one, %two}"
# As XLA writes it where a boolean chooses.
CONDITION = "  ROOT %c = f32[8,4]{1,0} conditional(%b, %p, %p), true_computation=%two, false_computation=%one"


@pytest.mark.parametrize(
    ("kind", "size", "text"),
    [
        (
            traffic.PRODUCTS,
            3 * ARRAY,
            entry(P, "  %k = f32[8,4] constant({...})", "  ROOT %d = f32[8,4] dot(%p, f32[8,4] %k)"),
        ),
        # An operand that is given twice is read once.
        (traffic.LOOPS, 2 * ARRAY, entry(P, "  ROOT %d = f32[8,4]{1,0} add(%p, %p)")),
        (
            traffic.REDUCTIONS,
            2 * ARRAY + 8 * 4,
            entry(P, "  ROOT %f = (f32[8]{0}, f32[8,4]{1,0}) fusion(%p), calls=%sums", before=SUMMED),
        ),
        (
            traffic.MOVES,
            ARRAY + ARRAY // 2,
            entry(P, "  ROOT %f = bf16[4,8]{1,0} fusion(%p), calls=%moved", before=TRANSPOSED),
        ),
        (traffic.MOVES, 2 * SMALL, entry(P, "  ROOT %s = f32[2,4]{1,0} slice(%p), slice={[0:2], [0:4]}")),
        (
            traffic.MOVES,
            2 * SMALL,
            entry(P, ASYNC, "  ROOT %r = f32[2,4]{1,0} async-done(%s)", before=WRAPPED),
        ),
        # From a TPU's memory to the chip itself: read once.
        (traffic.MOVES, ARRAY, entry(P, TO_CHIP, "  ROOT %r = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%s)")),
        # On a GPU such an array is in its memory, for NCCL.
        (
            traffic.COLLECTIVES,
            SMALL + ARRAY,
            entry("  %p = f32[2,4]{1,0} parameter(0)", GATHER, "  ROOT %r = f32[8,4]{1,0:S(1)} all-gather-done(%s)"),
        ),
        (
            traffic.ATTENTION,
            2 * ARRAY,
            entry(P, f"  ROOT %a = (f32[8,4]{{1,0}}, u8[900]{{0}}) custom-call(%p, %p, %p), {FMHA}"),
        ),
        (
            traffic.PRODUCTS,
            2 * ARRAY,
            entry(P, '  ROOT %a = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%p), custom_call_target="__cudnn$convForward"'),
        ),
        (traffic.CUSTOM, 2 * ARRAY, entry(P, '  ROOT %a = f32[8,4]{1,0} custom-call(%p), custom_call_target="topk"')),
        # The branch that costs more.
        (traffic.LOOPS, 2 * ARRAY, entry(P, "  %b = pred[] constant(true)", CHOICE, before=BRANCHES)),
        (traffic.LOOPS, 2 * ARRAY, entry(P, "  %b = pred[] constant(true)", CONDITION, before=BRANCHES)),
        (traffic.LOOPS, 2 * ARRAY, entry(P, "  ROOT %c = f32[8,4]{1,0} call(%p), to_apply=%one", before=BRANCHES)),
    ],
)
def test_what_an_instruction_reads_and_writes(kind, size, text):
    assert traffic.traffic_of(text).by_kind == {kind: size}


def test_a_compiled_program_is_read():
    """By the versions of XLA at hand: a product in a loop, and what a CPU does beside it."""
    x = jnp.ones((64, 64))
    looped = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=6)[0])
    counted = traffic.traffic_of(looped.lower(x).compile().as_text())
    assert counted.by_kind[traffic.PRODUCTS] == 6 * 2 * 64 * 64 * 4
    assert counted.unknown_loops == 0 and counted.total >= 6 * 4 * 64 * 64 * 4
    assert any("test_traffic.py" in cause.source for cause in counted.causes)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="it has no entry"):
        program.parse("HloModule m\n")


def test_the_time_is_the_rooflines():
    counted = traffic.Traffic({traffic.PRODUCTS: 30.0, traffic.ATTENTION: 10.0, traffic.LOOPS: 20.0}, [], 0)
    assert counted.seconds(flops=100.0, peak=10.0, bandwidth=5.0) == 10.0 + 4.0  # Limited by operations
    assert counted.seconds(flops=10.0, peak=10.0, bandwidth=5.0) == 8.0 + 4.0  # and by what they read.
