"""Meshes of 8 simulated devices, and of devices of several processes."""

import re
from types import SimpleNamespace

import jax
import pytest

from cxrjax.distributed import runtime
from cxrjax.distributed.mesh import batch_shardings, check_divides, make_mesh, parse_mesh
from cxrjax.errors import CxrError


def test_data_0_uses_all_devices_that_space_leaves():
    assert dict(make_mesh(0, 1).shape) == {"data": 8, "space": 1}
    assert dict(make_mesh(0, 4).shape) == {"data": 2, "space": 4}
    assert dict(make_mesh(1, 1).shape) == {"data": 1, "space": 1}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 1), "mesh.data, mesh.space) needs 9 devices, but there are 8: the nearest that works is mesh.data = 8"),
        ((4, 3), "needs 12 devices, but there are 8: the nearest that works is mesh.data = 2"),
        ((2, 9), "needs 18 devices, but there are 8: the nearest that works is mesh.data = 1, mesh.space = 8"),
        ((0, 9), "mesh.space = 9 does not divide the 8 devices: choose 1, 2, 4 or 8"),
        ((0, 3), "mesh.space = 3 does not divide the 8 devices: choose 1, 2, 4 or 8, or set mesh.data as well"),
        ((1, 0), "must be positive"),
        ((-1, 1), "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(CxrError, match=re.escape(message)):
        make_mesh(*shape)


@pytest.mark.parametrize(
    ("processes", "shape", "choices"),
    [
        ((0, 0, 1, 1), (1, 1), "4 x 1, 2 x 2 or 1 x 4"),
        ((0, 0, 1, 1), (2, 1), "4 x 1, 2 x 2 or 1 x 4"),
        ((0, 0, 1, 1), (3, 1), "4 x 1, 2 x 2 or 1 x 4"),
        ((0, 0, 1, 1, 2, 2), (2, 3), "6 x 1, 3 x 2 or 1 x 6"),
    ],
)
def test_a_mesh_with_unequal_shares_of_a_batch_is_refused(monkeypatch, processes, shape, choices):
    devices = [SimpleNamespace(process_index=process) for process in processes]
    monkeypatch.setattr(runtime, "devices", lambda: devices)
    with pytest.raises(CxrError, match=f"a mesh of {shape[0]} x {shape[1]} devices.* same share.* works is {choices}$"):
        make_mesh(*shape)


def test_a_mesh_may_leave_devices_idle():
    assert dict(make_mesh(2, 3).shape) == {"data": 2, "space": 3}


def test_the_error_for_a_number_that_does_not_divide_names_the_nearest_multiples():
    check_divides("64 rows", 64, "space", 8)
    for number, nearest in ((20, "16 or 24"), (7, "8"), (0, "8")):
        with pytest.raises(CxrError, match=f"^{number} rows cannot be divided over mesh space=8: choose {nearest}$"):
            check_divides(f"{number} rows", number, "space", 8)


def test_image_rows_are_split_over_the_space_axis():
    shardings = batch_shardings(make_mesh(2, 4))
    assert shardings.image.shard_shape((4, 16, 16, 1)) == (2, 4, 16, 1)
    assert shardings.label.shard_shape((4, 3)) == (2, 3)
    assert len(jax.devices()) == 8


def test_parse_mesh():
    assert parse_mesh("data=4,space=2") == (4, 2)
    assert parse_mesh("space=8") == (1, 8)
    for wrong in ("4x2", "data=0", "rows=2"):
        with pytest.raises(CxrError, match="is not data=D or space=S"):
            parse_mesh(wrong)
    with pytest.raises(CxrError, match="has data twice"):
        parse_mesh("data=2,data=4")
