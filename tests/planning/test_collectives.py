import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cxrjax.planning.collectives import Collective, collectives


def compiled(function, spec, *shape):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    whole = NamedSharding(mesh, P())
    return collectives(jax.jit(function, out_shardings=whole).lower(argument).compile().as_text() or "")


def test_a_sum_over_devices():
    [call] = compiled(lambda x: x.sum(0), P("data"), 8, 50)
    assert (call.kind, call.bytes, call.group) == ("all-reduce", 200, 4)
    assert call.sent == 2 * 200 * 3 / 4


def test_a_gather():
    [call] = compiled(lambda x: x, P("data"), 8, 50)
    assert (call.kind, call.bytes, call.group) == ("all-gather", 1600, 4)
    assert call.sent == 1600 * 3 / 4


def test_neighbours_rows():
    mesh = Mesh(np.array(jax.devices()[:4]), ("space",))
    rows = NamedSharding(mesh, P(None, "space"))
    image = jax.ShapeDtypeStruct((1, 16, 8, 2), jnp.float32, sharding=rows)

    def convolve(x):
        kernel = jnp.ones((3, 3, 2, 2))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    calls = collectives(jax.jit(convolve, out_shardings=rows).lower(image).compile().as_text() or "")
    assert {call.kind for call in calls} == {"collective-permute"}
    assert all(call.bytes == 8 * 2 * 4 == call.sent for call in calls)  # one row each way
    assert len(calls) == 2


def test_a_program_of_one_device_sends_nothing():
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text() or "") == []


def test_lines_of_a_gpu_program():
    text = """
  %all-reduce-start = (f32[64]{0}, f32[2,3]{1,0}) all-reduce-start(%a, %b), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %all-reduce-done = (f32[64]{0}, f32[2,3]{1,0}) all-reduce-done(%all-reduce-start)
  %p = (bf16[1,2,8]{2,1,0}, bf16[1,2,8]{2,1,0}) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,2}}
  ROOT %g = f32[8,2]{1,0} all-gather(%c), replica_groups={{0,1},{2,3}}, dimensions={0}
"""  # noqa: E501 - as XLA prints them
    assert collectives(text) == [
        Collective("all-reduce", ("f32[64]", "f32[2,3]"), 4 * (64 + 6), 4),
        Collective("collective-permute", ("bf16[1,2,8]",), 32, 0),
        Collective("all-gather", ("f32[8,2]",), 64, 2),
    ]
