import jax
import pytest

from cxrjax.errors import CxrError
from cxrjax.parallel.mesh import batch_shardings, make_mesh


def test_the_mesh_takes_all_devices_that_space_leaves():
    assert dict(make_mesh(0, 1).shape) == {"data": 8, "space": 1}
    assert dict(make_mesh(0, 4).shape) == {"data": 2, "space": 4}
    assert dict(make_mesh(1, 1).shape) == {"data": 1, "space": 1}


@pytest.mark.parametrize("shape", [(9, 1), (4, 3), (0, 9), (1, 0), (-1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(CxrError, match=r"mesh\.(data|space)"):
        make_mesh(*shape)


def test_rows_of_images_lie_on_the_space_axis():
    shardings = batch_shardings(make_mesh(2, 4))
    assert shardings.image.shard_shape((4, 16, 16, 1)) == (2, 4, 16, 1)
    assert shardings.label.shard_shape((4, 3)) == (2, 3)
    assert len(jax.devices()) == 8
