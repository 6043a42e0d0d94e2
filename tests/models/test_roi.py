import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from cxrjax.models.roi import bounding_box, crop, heat_map, largest_component

component = jax.jit(largest_component)


def largest_by_scipy(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return mask
    areas = np.bincount(labels.ravel())[1:]
    return labels == areas.argmax() + 1  # scipy numbers groups in reading order


@settings(max_examples=200, deadline=None)
@given(arrays(bool, (3, 9, 7)), st.floats(0.1, 0.9), st.integers(0, 2**32 - 1))
def test_the_largest_component_is_scipys(drawn, density, seed):
    random = np.random.default_rng(seed).random(drawn.shape) < density
    for masks in (drawn, random):
        ours = np.asarray(component(masks))
        for mask, one in zip(masks, ours, strict=True):
            np.testing.assert_array_equal(one, largest_by_scipy(mask))


def test_a_long_snake_is_one_component():
    mask = np.zeros((1, 33, 33), bool)
    mask[:, ::2] = True
    mask[:, 1::4, -1] = mask[:, 3::4, 0] = True
    np.testing.assert_array_equal(component(mask), mask)


def test_boxes_are_the_outer_edges_of_the_cells():
    mask = np.zeros((2, 4, 8), bool)
    mask[0, 1:3, 2:7] = True
    np.testing.assert_allclose(bounding_box(jnp.asarray(mask)), [[0.25, 0.25, 0.75, 0.875], [0, 0, 1, 1]])


def test_heat_is_the_strongest_channel_between_0_and_1():
    maps = jnp.asarray([[[[1.0, -5.0], [0.0, 1.0]], [[2.0, -3.0], [3.0, 0.0]]]])
    np.testing.assert_allclose(heat_map(maps), [[[1.0, 0.0], [0.5, 0.5]]])
    np.testing.assert_array_equal(heat_map(jnp.ones((1, 2, 2, 3))), np.zeros((1, 2, 2)))


@pytest.mark.parametrize("size", [32, 8])
def test_the_whole_image_cropped_is_the_image_resized(size):
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32)
    ours = crop(jnp.asarray(image), jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), size)
    theirs = jax.image.resize(image, (1, size, size, 1), "linear", antialias=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_crop_is_what_opencv_cuts_and_enlarges():
    image = np.random.default_rng(1).normal(size=(32, 48)).astype(np.float32)
    ours = crop(jnp.asarray(image)[None, :, :, None], jnp.asarray([[0.25, 0.5, 0.75, 0.75]]), 64)
    theirs = cv2.resize(image[8:24, 24:36], (64, 64), interpolation=cv2.INTER_LINEAR)
    # Away from the cut's edge, where one sees the pixels beyond it and the other repeats the last.
    np.testing.assert_allclose(ours[0, 4:-4, 4:-4, 0], theirs[4:-4, 4:-4], atol=1e-4)


def test_a_crop_has_gradients_inside_its_box_only():
    box = jnp.asarray([[0.25, 0.25, 0.75, 0.75]])
    gradient = jax.grad(lambda x: crop(x, box, 16).sum())(jnp.ones((1, 32, 32, 1)))[0, :, :, 0]
    assert (np.asarray(gradient[10:22, 10:22]) > 0).all()
    assert (np.asarray(gradient[:7]) == 0).all()
