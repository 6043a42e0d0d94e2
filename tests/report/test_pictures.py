import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_samples import gaussian_field

from cxrjax.report.content import Cam
from cxrjax.report.pictures import draw_erf, erf_maps, jpeg_uri, mass_level, overlay


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.9545])
def test_mass_level_of_a_gaussian_is_its_closed_form(mass):
    # Outside radius r lies exp(-r^2 / 2 s^2) of a Gaussian, which is also its height there relative to the peak.
    field = gaussian_field(301, 0.1).map
    assert mass_level(field, mass) == pytest.approx(1 - mass, abs=0.002)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any), st.floats(0.05, 1))
def test_mass_level_holds_the_mass_and_no_cell_more(values, mass):
    field = np.array([values], np.float64)
    level = mass_level(field, mass)
    assert field[field >= level].sum() >= mass * field.sum() * (1 - 1e-9)
    assert field[field > level].sum() < mass * field.sum() * (1 + 1e-9)


def test_erf_contour_encloses_the_stated_diameter():
    field = gaussian_field(128, 0.1)
    figure = erf_maps({"128 px": field})
    (contour,) = [c for c in figure.axes[0].collections if hasattr(c, "levels")]
    ring = np.concatenate([path.vertices for path in contour.get_paths()])
    radius = np.hypot(*(ring - 0.5).T)
    assert 2 * radius.mean() == pytest.approx(field.diameter_fraction, rel=0.02)


def test_erf_label_states_the_size():
    figure = erf_maps({"a": gaussian_field(32, 0.1), "b": gaussian_field(64, 0.1)})
    assert [panel.get_xlabel() for panel in figure.axes[:2]] == ["⌀ 16 px, 50% of width", "⌀ 32 px, 50% of width"]
    assert draw_erf(figure.axes[0], "a", gaussian_field(32, 0.1)).get_extent() == [0, 1, 1, 0]


def test_overlay_of_a_cold_map_is_the_image_with_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    picture = overlay(Cam(image, np.zeros((4, 4), np.float32), 0.1), side=64)
    assert picture.shape == (64, 64, 3)
    assert (picture == np.kron(image, np.ones((4, 4), np.uint8))[..., None]).all()


def test_overlay_averages_a_large_image_and_keeps_its_shape():
    image = np.tile(np.array([[0, 200], [200, 0]], np.uint8), (100, 50))
    picture = overlay(Cam(image, np.zeros((4, 4), np.float32), 0.1), side=50)
    assert picture.shape == (50, 25, 3)
    assert (picture == 100).all()


def test_overlay_is_hot_where_the_map_is_and_outlines_the_truth():
    cam = np.zeros((8, 8), np.float32)
    cam[2, 5] = 1
    mask = np.zeros((64, 64), bool)
    mask[16:24, 40:48] = True
    plain = overlay(Cam(np.full((64, 64), 90, np.uint8), cam, 0.9), side=64).astype(int)
    hottest = np.unravel_index((plain[..., 0] - plain[..., 2]).argmax(), (64, 64))
    assert np.abs(np.array(hottest) - (20, 44)).max() <= 4
    cyan = (overlay(Cam(np.full((64, 64), 90, np.uint8), cam, 0.9, mask), side=64) == (0, 229, 255)).all(-1)
    inner = np.zeros_like(mask)
    inner[17:23, 41:47] = True
    assert (cyan == (mask & ~inner)).all()


def test_overlay_dashes_detected_boxes():
    box = np.array([[0.25, 0.5, 0.5, 0.25], [0, 0, 1, 1]])
    picture = overlay(Cam(np.full((64, 64), 90, np.uint8), np.zeros((4, 4), np.float32), 0.9, boxes=box), side=64)
    drawn = (picture != 90).any(-1)
    expected = np.zeros((64, 64), bool)
    for left, top, right, bottom in ((16, 32, 48, 48), (0, 0, 64, 64)):
        expected[top:bottom, left:right] ^= True
        expected[top + 1 : bottom - 1, left + 1 : right - 1] ^= True
    assert (drawn == expected).all()
    for colour in ((255, 255, 255), (16, 20, 24)):
        assert 0.3 < (picture[drawn] == colour).all(-1).mean() < 0.7


def test_jpeg_uri_decodes_to_nearly_the_picture():
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([x * 2, y * 2, x + y], -1).astype(np.uint8)
    head, data = jpeg_uri(picture, quality=95).split(",")
    assert head == "data:image/jpeg;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.abs(decoded.astype(int) - picture).mean() < 3
