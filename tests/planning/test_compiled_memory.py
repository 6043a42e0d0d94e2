"""What is read from compiled programs, beside XLA's own count, and what is remembered of them."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cxrjax.planning import compiled_memory as module
from cxrjax.planning.accelerators import Target
from cxrjax.planning.compiled_memory import moved_by, needs


@dataclass(frozen=True)
class Here(Target):
    """This machine, in the place of an accelerator."""


HERE = Here("here", "CPU", 1 << 40, 1e12, 1e11, 1e10)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def traced(scale=2.0):
    """A program that puts one of its results where an argument was."""
    return jax.jit(lambda x, y: (x + 1, (jnp.sin(x) * scale @ y).sum(0)), donate_argnums=0).trace(
        jnp.ones((64, 32)), jnp.ones((32, 16))
    )


def test_needs_are_what_the_compiler_says():
    found, memory = needs(traced(), HERE, {}), traced().lower().compile().memory_analysis()
    assert found.temporary == memory.temp_size_in_bytes > 0
    assert 0 <= found.held - 4 * (64 * 32 + 32 * 16 + 16) < 100  # the donated argument and its result once
    assert found.calls == ()


@pytest.mark.parametrize(
    ("tpu", "in_use", "temporary", "program"),
    [("", 70, 100, 0), ("v5e", 70, 85, 1000), ("v5e", 120, 100, 1000)],  # in use: on the chip, in the last case
)
def test_on_a_tpu_gaps_count_once_and_the_program_as_well(tpu, in_use, temporary, program):
    compiled = traced().lower().compile()
    memory = SimpleNamespace(
        argument_size_in_bytes=10, output_size_in_bytes=8, alias_size_in_bytes=8, temp_size_in_bytes=100,
        peak_memory_in_bytes=10 + in_use, generated_code_size_in_bytes=1000,
    )  # fmt: skip
    told = SimpleNamespace(memory_analysis=lambda: memory, as_text=compiled.as_text, cost_analysis=dict)
    found = module._of(told, replace(HERE, tpu=tpu), 1)
    assert (found.held, found.temporary, found.program) == (10, temporary, program)


def test_a_program_is_compiled_once(monkeypatch):
    first = needs(traced(), HERE, {})
    monkeypatch.setattr(module, "_of", lambda *_: pytest.fail("compiled again"))
    assert needs(traced(), HERE, {}) == first
    for different in ((traced(3.0), HERE, {}), (traced(), Here("other", "CPU", 1, 1.0, 1.0, 1.0), {}),
                      (traced(), HERE, {"xla_backend_optimization_level": 0})):  # fmt: skip
        with pytest.raises(pytest.fail.Exception):
            needs(*different)


@pytest.mark.parametrize("setting", ["flags", "effort"])
def test_a_compiler_with_other_settings_is_another(setting, monkeypatch):
    needs(traced(), HERE, {})
    effort = jax.config.jax_optimization_level
    try:
        if setting == "flags":
            monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=1")
        else:
            jax.config.update("jax_optimization_level", "O1")
        needs(traced(), HERE, {})
    finally:
        jax.config.update("jax_optimization_level", effort)
    assert len(list(module.cache().iterdir())) == 2


def test_what_was_half_written_is_made_again():
    first = needs(traced(), HERE, {})
    [file] = module.cache().iterdir()
    for damaged in ("", "{", "{}", '{"calls": [], "bytes": 3}', "[]"):
        file.write_text(damaged)
        assert needs(traced(), HERE, {}) == first
        assert file.read_text() != damaged


@pytest.mark.parametrize(
    "function", [lambda x: jnp.sin(x) + 1, lambda x: (x @ x.T).sum(0), lambda x: x[::2].T @ x[::2]]
)
def test_bytes_moved_are_about_what_xla_counts(function):
    program = jax.jit(function).lower(jnp.ones((128, 64))).compile()
    counted = program.cost_analysis()["bytes accessed"]
    assert 0.5 < moved_by(program.as_text()) / counted < 2


def test_bytes_moved_by_a_gpu_program():
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
    assert moved_by(text) == fusion + copy


def test_what_the_programs_own_loop_repeats_is_counted_as_often():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    matrix = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)

    def step(total, matrix, unroll=1):
        def add(total, _):
            return total + jnp.sin(matrix @ total).sum(0), None

        return jax.lax.scan(add, total, None, length=5, unroll=unroll)[0] + matrix.sum(0)

    start = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    looped, flat = (jax.jit(step, static_argnums=2).trace(start, matrix, unroll) for unroll in (1, 5))
    found, expected = needs(looped, HERE, {}, 5), needs(flat, HERE, {})
    sums = [[call.bytes for call in each.calls if call.kind == "all-reduce"] for each in (found, expected)]
    assert sum(sums[0]) == sum(sums[1])  # of which XLA combines two
    assert sorted(sums[0]) == [4] * 5 + [128]
    assert found.moved == pytest.approx(expected.moved, rel=0.5)
    assert found.moved > 2 * needs(looped, HERE, {"xla_backend_optimization_level": 0}).moved
