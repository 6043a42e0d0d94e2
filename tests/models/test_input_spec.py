import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.input_spec import GREY, IMAGENET, UNIT, InputSpec, prepare


@settings(deadline=None)
@given(
    st.sampled_from([IMAGENET, UNIT, GREY, InputSpec(1, (0.0,), (1.0,), -1024.0, 1024.0)]),
    st.integers(0, 255),
)
def test_prepare_agrees_with_its_formula_in_double_precision(spec, grey):
    ours = prepare(jnp.full((1, 1, 1, 1), grey, jnp.uint8), spec, jnp.float32)
    scaled = spec.low + (spec.high - spec.low) * grey / 255
    expected = [(scaled - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True)]
    assert ours.shape == (1, 1, 1, spec.channels)
    # Relative to the range: values near 0 are differences of large ones.
    np.testing.assert_allclose(ours[0, 0, 0], expected, atol=3e-7 * (spec.high - spec.low) / min(spec.std))


def test_prepare_returns_the_compute_type():
    assert prepare(jnp.zeros((2, 3, 4, 1), jnp.uint8), IMAGENET, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 1), np.float32), "uint8 0..255, not float32"),
        (np.zeros((1, 8, 8, 3), np.uint8), "not 1 x 8 x 8 x 3"),
        (np.zeros((8, 8, 1), np.uint8), "not 8 x 8 x 1"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(CxrError, match=message):
        prepare(images, IMAGENET, jnp.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 1}, "1 channels needs as many means"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"low": 1.0}, "low < high"),
        ({"mean": (0.0, float("nan"), 0.0)}, "finite"),
    ],
)
def test_an_invalid_spec_is_refused(fields, message):
    with pytest.raises(CxrError, match=message):
        InputSpec(**fields)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "B x H x W x 1, not 1 x 32 x 32 x 3"),
        (np.zeros((32, 32, 1), np.float32), "B x H x W x 1"),
        (np.zeros((1, 32, 32, 1), np.uint8), "prepared float32 images, not uint8"),
        (np.zeros((1, 32, 32, 1), jnp.bfloat16), "prepared float32 images, not bfloat16"),
    ],
)
def test_a_network_refuses_unprepared_images(images, message):
    with pytest.raises(CxrError, match=message):
        create("densenet_small", classes=2).features(jnp.asarray(images))
