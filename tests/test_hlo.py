"""The counts of kernels and bytes that `benchmarks/ahead_of_time.py` reports."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

DEVICE = hlo.Device(bytes_per_second=1e9, flops_per_second=1e9, launch_seconds=1e-6)

# As a GPU's compiler writes it: a loop of five steps, of which each stores one row of an array.
TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[5,4]{1,0}}

%fused_store (p0: f32[5,4], p1: f32[4], p2: s32[]) -> f32[5,4] {
  %p0 = f32[5,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %tanh.1 = f32[4]{0} tanh(%p1)
  %row = f32[1,4]{1,0} bitcast(%tanh.1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = f32[5,4]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%body (arg: (s32[], f32[5,4], f32[4])) -> (s32[], f32[5,4], f32[4]) {
  %arg = (s32[], f32[5,4]{1,0}, /*index=2*/f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %rows = f32[5,4]{1,0} get-tuple-element(%arg), index=1
  %x = f32[4]{0} get-tuple-element(%arg), index=2
  %store = f32[5,4]{1,0} fusion(%rows, %x, %i), kind=kLoop, calls=%fused_store, \
metadata={op_name="jit(f)/while/body/rollout/dynamic_update_slice"}
  %copy.1 = f32[4]{0} copy(%x)
  ROOT %tuple = (s32[], f32[5,4]{1,0}, f32[4]{0}) tuple(%i, %store, %copy.1)
}

%condition (arg.1: (s32[], f32[5,4], f32[4])) -> pred[] {
  %arg.1 = (s32[], f32[5,4]{1,0}, f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[5,4] {
  %x = f32[4]{0} parameter(0)
  %start = s32[] constant(0)
  %zeros = f32[5,4]{1,0} broadcast(%start), dimensions={}
  %gemm = f32[4,8]{1,0} custom-call(%zeros, %x), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}
  %init = (s32[], f32[5,4]{1,0}, f32[4]{0}) tuple(%start, %zeros, %x)
  %loop = (s32[], f32[5,4]{1,0}, f32[4]{0}) while(%init), condition=%condition, body=%body, \
metadata={op_name="jit(f)/values/while"}, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[5,4]{1,0} get-tuple-element(%loop), index=1
}
""".replace("\\\n", "")


def test_kernels_of_a_loop_count_as_often_as_it_runs():
    program = hlo.parse(TEXT)
    (loop,) = hlo.loops(program, program.entry)
    assert (loop.trip_count, loop.called) == (5, ("body",))
    found = hlo.work(program, program.entry, DEVICE, ("rollout", "values"))
    # A store reads a row of 16 bytes, an index of 4, and writes a row: the array stays in place.
    assert found["rollout"].kernels == 5
    assert found["rollout"].bytes == 5 * (16 + 4 + 16)
    # The copy has no scope of its own, and that of the loop around it.
    assert found["values"] == pytest.approx(hlo.Work(5, 5 * 32, 5 * 4, 5e-6))
    # 2 · 4 · 8 · 5 operations of the product, and one of each zero.
    assert found["other"].kernels == 2
    assert found["other"].flops == 2 * 4 * 8 * 5 + 20
    assert hlo.unknown_loops(program, program.entry) == []


@pytest.mark.parametrize(
    ("result", "lines", "num_bytes"),
    [
        ("f32[2]", "ROOT %y = f32[2] slice(%tanh), slice={[0:2]}", 8 + 8),
        ("f32[8]", "ROOT %y = f32[8] negate(%tanh)", 32 + 32),
        ("f32[8]", "ROOT %y = f32[8] dot(%tanh, %tanh), lhs_batch_dims={0}", 32 + 32),
        # One slice is of what the fusion also returns.
        (
            "(f32[2], f32[8])",
            """%part = f32[2] slice(%tanh), slice={[0:2]}
  ROOT %y = (f32[2], f32[8]) tuple(%part, %tanh)""",
            32 + 8 + 32,
        ),
        (
            "f32[4]",
            """%part = f32[2] slice(%tanh), slice={[0:2]}
  ROOT %y = f32[4] concatenate(%part, %part), dimensions={0}""",
            8 + 16,
        ),
    ],
)
def test_only_slices_of_an_array_are_read_even_after_elementwise_operations(
    result, lines, num_bytes
):
    program = hlo.parse(f"""HloModule jit_f, is_scheduled=true

%fused (p: f32[8]) -> {result} {{
  %p = f32[8] parameter(0)
  %tanh = f32[8] tanh(%p)
  {lines}
}}

ENTRY %main (x: f32[8]) -> {result} {{
  %x = f32[8] parameter(0)
  ROOT %fusion = {result} fusion(%x), kind=kLoop, calls=%fused
}}
""")
    assert hlo.work(program, program.entry, DEVICE, ())["other"].bytes == num_bytes


@pytest.mark.parametrize(
    ("dtype", "shape", "layout", "num_bytes"),
    [
        ("f32", (3, 5), "", 60),
        ("f32", (3, 5), "{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32", (3, 200), "{0,1:T(8,128)S(1)}", 128 * 200 * 4),  # the first axis is the minor one
        ("u8", (7, 3, 200), "{2,1,0:T(4,128)(4,1)}", 7 * 4 * 256),
        ("s32", (), "{:T(128)}", 128 * 4),
    ],
)
def test_tiles_are_whole(dtype, shape, layout, num_bytes):
    assert hlo.Array(dtype, shape, layout).num_bytes == num_bytes


def test_a_tpu_has_two_memories_and_estimates_cycles():
    near, far = "f32[16,128]{1,0:T(8,128)S(1)}", "f32[16,128]{1,0:T(8,128)}"
    half = "f32[8,128]{1,0:T(8,128)S(1)}"
    program = hlo.parse(f"""HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[16,128]) -> f32[16,128] {{
  %x = {far} parameter(0)
  %copy-start = ({near}, {far}, u32[]{{:S(2)}}) copy-start(%x)
  %copy-done = {near} copy-done(%copy-start)
  %slice-start = (({far}), {half}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:8], [0:128]}}
  %slice-done = {half} slice-done(%slice-start)
  %whole = {near} custom-call(%slice-done, %slice-done), custom_call_target="ConcatBitcast"
  ROOT %y = {far} add(%copy-done, %whole), backend_config={{"estimated_cycles":"3000"}}
}}
""")
    device = DEVICE._replace(bytes_per_second=1e12, hertz=1.5e9)
    found = hlo.work(program, "main", device, ())["other"]
    size = 16 * 128 * 4
    assert (found.kernels, found.bytes) == (3, size + size / 2 + size)
    assert found.seconds == pytest.approx(2e-6)  # copies run beside the addition
    # They cannot be faster than the memory.
    found = hlo.work(program, "main", device._replace(bytes_per_second=1e9), ())["other"]
    assert found.seconds == pytest.approx(found.bytes / 1e9)


def test_collectives_are_counted_once_each():
    program = hlo.parse("""HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %start = f32[8] all-reduce-start(%x), to_apply=%add
  %done = f32[8] all-reduce-done(%start)
  ROOT %y = f32[8] all-gather(%done), dimensions={0}
}
""")
    found = hlo.work(program, program.entry, DEVICE, ())["other"]
    assert (found.kernels, found.collectives) == (2, 2)


def test_the_trip_count_of_a_loop_follows_from_its_condition_where_it_is_not_written():
    unwritten = TEXT.replace('"known_trip_count"', '"of_no_interest"')
    (loop,) = hlo.loops(program := hlo.parse(unwritten), "main")
    assert (loop.trip_count, hlo.unknown_loops(program, "main")) == (5, [])
    (loop,) = hlo.loops(program := hlo.parse(unwritten.replace("LT", "NE")), "main")
    assert (loop.trip_count, hlo.unknown_loops(program, "main")) == (None, ["loop"])


@pytest.mark.parametrize(
    ("num_bytes", "flops", "seconds"), [(10, 10, 1e-6), (1e6, 10, 1e-3), (10, 1e7, 1e-2)]
)
def test_a_kernel_takes_the_largest_of_launch_transfer_and_arithmetic(num_bytes, flops, seconds):
    assert DEVICE.kernel_seconds(num_bytes, flops) == seconds


def test_a_compiled_program_is_parsed():
    def body(x, y):
        with jax.named_scope("inner"):
            x = jnp.sin(x @ x) + y
        return x, x.sum()

    def run(x):
        return jax.lax.scan(body, x, jnp.arange(7.0))

    compiled = jax.jit(run).lower(jnp.ones((8, 8))).compile()
    program = hlo.parse(compiled.as_text())
    (loop,) = hlo.loops(program, program.entry)
    assert loop.trip_count == 7
    found = hlo.work(program, program.entry, DEVICE, ("inner",))
    assert found["inner"].flops >= 7 * 2 * 8**3
    assert found["inner"].kernels % 7 == 0


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("f32[5,4]", 80), ("bf16[3]", 6), ("pred[]", 1), ("u8[2,2]", 4), ("s64[2]", 16), ("s4[4]", 2)],
)
def test_arrays_have_the_size_of_their_type(text, num_bytes):
    line = f"ENTRY %main () -> {text} {{\n  %x = {text}{{0}} constant(0)\n}}\n"
    program = hlo.parse(line)
    (instruction,) = program.computations["main"]
    assert instruction.arrays[0].num_bytes == num_bytes
