"""Memory, traffic and collectives of compiled programs, and the cache of results."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cxrjax.planning import compiled_memory
from cxrjax.planning.accelerators import Accelerator
from cxrjax.planning.compiled_memory import Collective, compile_memory, hlo_bytes_accessed, parse_collectives

CPU = Accelerator("cpu", "CPU", 1 << 40, 1e12, 1e11, 1e10)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def traced(scale=2.0):
    """A program with a donated argument."""
    return jax.jit(lambda x, y: (x + 1, (jnp.sin(x) * scale @ y).sum(0)), donate_argnums=0).trace(
        jnp.ones((64, 32)), jnp.ones((32, 16))
    )


def test_memory_is_that_of_the_compiler():
    compiled, memory = compile_memory(traced(), CPU, {}), traced().lower().compile().memory_analysis()
    assert compiled.temporary == memory.temp_size_in_bytes > 0
    assert 0 <= compiled.arguments - 4 * (64 * 32 + 32 * 16 + 16) < 100  # the donated argument and its result once
    assert compiled.collectives == ()


@pytest.mark.parametrize(
    ("tpu", "in_use", "temporary", "program"),
    [("", 70, 100, 0), ("v5e", 70, 85, 1000), ("v5e", 120, 100, 1000)],  # in use: on the chip, in the last case
)
def test_on_a_tpu_gaps_count_once_and_the_program_counts(tpu, in_use, temporary, program):
    compiled = traced().lower().compile()
    memory = SimpleNamespace(
        argument_size_in_bytes=10, output_size_in_bytes=8, alias_size_in_bytes=8, temp_size_in_bytes=100,
        peak_memory_in_bytes=10 + in_use, generated_code_size_in_bytes=1000,
    )  # fmt: skip
    compiled_program = SimpleNamespace(memory_analysis=lambda: memory, as_text=compiled.as_text, cost_analysis=dict)
    compiled = compiled_memory._analyze(compiled_program, replace(CPU, tpu=tpu), 1)
    assert (compiled.arguments, compiled.temporary, compiled.program) == (10, temporary, program)


def test_a_program_is_compiled_once(monkeypatch):
    first = compile_memory(traced(), CPU, {})
    monkeypatch.setattr(compiled_memory, "_analyze", lambda *_: pytest.fail("compiled again"))
    assert compile_memory(traced(), CPU, {}) == first
    for different in ((traced(3.0), CPU, {}), (traced(), Accelerator("other", "CPU", 1, 1.0, 1.0, 1.0), {}),
                      (traced(), CPU, {"xla_backend_optimization_level": 0})):  # fmt: skip
        with pytest.raises(pytest.fail.Exception):
            compile_memory(*different)


@pytest.mark.parametrize("setting", ["flags", "effort"])
def test_compiler_settings_are_part_of_the_cache_key(setting, monkeypatch):
    compile_memory(traced(), CPU, {})
    effort = jax.config.jax_optimization_level
    try:
        if setting == "flags":
            monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=1")
        else:
            jax.config.update("jax_optimization_level", "O1")
        compile_memory(traced(), CPU, {})
    finally:
        jax.config.update("jax_optimization_level", effort)
    assert len(list(compiled_memory.cache_dir().iterdir())) == 2


def test_a_damaged_cache_file_is_replaced():
    first = compile_memory(traced(), CPU, {})
    [file] = compiled_memory.cache_dir().iterdir()
    for damaged in ("", "{", "{}", '{"collectives": [], "bytes": 3}', "[]"):
        file.write_text(damaged)
        assert compile_memory(traced(), CPU, {}) == first
        assert file.read_text() != damaged


@pytest.mark.parametrize(
    "function", [lambda x: jnp.sin(x) + 1, lambda x: (x @ x.T).sum(0), lambda x: x[::2].T @ x[::2]]
)
def test_bytes_accessed_are_close_to_xlas_count(function):
    program = jax.jit(function).lower(jnp.ones((128, 64))).compile()
    counted = program.cost_analysis()["bytes accessed"]
    assert 0.5 < hlo_bytes_accessed(program.as_text()) / counted < 2


def test_bytes_accessed_by_a_gpu_program():
    text = """HloModule jit_step

%fused (a: f32[8], b: bf16[4,4], v: f32[100], w: f32[100]) -> (f32[8], bf16[2]) {
  %a = f32[8]{0} parameter(0)
  %v = f32[100]{0} parameter(2), metadata={op_name="v"}
  %w = f32[100]{0} parameter(3)
  %c = f32[1000]{0} broadcast(%a)
  %piece = f32[8]{0} slice(%v), slice={[3:11]}
  ROOT %other = f32[4]{0} slice(%v), slice={[9:13]}, metadata={op_name="%w"}
  %d = f32[4]{0} slice(%w), slice={[9:13]}
  %e = f32[100]{0} negate(%w)
}

ENTRY %main (p: f32[8], q: bf16[4,4]) -> (f32[8], bf16[4,4]) {
  %p.1 = f32[8]{0} parameter(0), metadata={op_name="p"}
  %q.1 = bf16[4,4]{1,0:T(8,128)} parameter(1)
  %v.1 = f32[100]{0} parameter(2)
  %f.1 = (f32[8]{0}, bf16[2]{0}) fusion(%p.1, /*index=1*/%q.1, %v.1, %v.1), kind=kLoop, calls=%fused
  %g.1 = f32[8]{0} get-tuple-element(%f.1), index=0
  %start = (f32[8]{0}, f32[8]{0}) copy-start(%g.1)
  %done = f32[8]{0} copy-done(%start)
  ROOT %t = (f32[8]{0}, bf16[4,4]{1,0}) tuple(%done, %q.1)
}
"""
    fusion, copy = (32 + 4) + 32 + 32 + (32 + 16) + 400, 64 + 32
    assert hlo_bytes_accessed(text) == fusion + copy


def test_a_loop_counts_once_per_iteration():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    matrix = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)

    def step(total, matrix, unroll=1):
        def add(total, _):
            return total + jnp.sin(matrix @ total).sum(0), None

        return jax.lax.scan(add, total, None, length=5, unroll=unroll)[0] + matrix.sum(0)

    start = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    looped, flat = (jax.jit(step, static_argnums=2).trace(start, matrix, unroll) for unroll in (1, 5))
    compiled, expected = compile_memory(looped, CPU, {}, 5), compile_memory(flat, CPU, {})
    sums = [
        [call.bytes for call in program.collectives if call.kind == "all-reduce"] for program in (compiled, expected)
    ]
    assert sum(sums[0]) == sum(sums[1])  # of which XLA combines two
    assert sorted(sums[0]) == [4] * 5 + [128]
    assert compiled.bytes_accessed == pytest.approx(expected.bytes_accessed, rel=0.5)
    assert (
        compiled.bytes_accessed > 2 * compile_memory(looped, CPU, {"xla_backend_optimization_level": 0}).bytes_accessed
    )


def collectives_of(function, spec, *shape):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    whole = NamedSharding(mesh, PartitionSpec())
    return parse_collectives(jax.jit(function, out_shardings=whole).lower(argument).compile().as_text() or "")


def test_a_sum_over_devices():
    [call] = collectives_of(lambda x: x.sum(0), PartitionSpec("data"), 8, 50)
    assert (call.kind, call.bytes, call.group_size) == ("all-reduce", 200, 4)
    assert call.bytes_sent == 2 * 200 * 3 / 4


def test_a_gather():
    [call] = collectives_of(lambda x: x, PartitionSpec("data"), 8, 50)
    assert (call.kind, call.bytes, call.group_size) == ("all-gather", 1600, 4)
    assert call.bytes_sent == 1600 * 3 / 4


def test_border_rows():
    mesh = Mesh(np.array(jax.devices()[:4]), ("space",))
    rows = NamedSharding(mesh, PartitionSpec(None, "space"))
    image = jax.ShapeDtypeStruct((1, 16, 8, 2), jnp.float32, sharding=rows)

    def convolve(x):
        kernel = jnp.ones((3, 3, 2, 2))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    calls = parse_collectives(jax.jit(convolve, out_shardings=rows).lower(image).compile().as_text() or "")
    assert {call.kind for call in calls} == {"collective-permute"}
    assert all(call.bytes == 8 * 2 * 4 == call.bytes_sent for call in calls)  # one row each way
    assert len(calls) == 2


def test_a_program_of_one_device_sends_nothing():
    assert parse_collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text() or "") == []


def test_collectives_of_a_gpu_program():
    text = """
  %all-reduce-start = (f32[64]{0}, f32[2,3]{1,0}) all-reduce-start(%a, %b), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %all-reduce-done = (f32[64]{0}, f32[2,3]{1,0}) all-reduce-done(%all-reduce-start)
  %p = (bf16[1,2,8]{2,1,0}, bf16[1,2,8]{2,1,0}) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,2}}
  ROOT %g = f32[8,2]{1,0} all-gather(%c), replica_groups={{0,1},{2,3}}, dimensions={0}
"""  # noqa: E501 - as XLA prints them
    assert parse_collectives(text) == [
        Collective("all-reduce", ("f32[64]", "f32[2,3]"), 4 * (64 + 6), 4),
        Collective("collective-permute", ("bf16[1,2,8]",), 32, 0),
        Collective("all-gather", ("f32[8,2]",), 64, 2),
    ]
