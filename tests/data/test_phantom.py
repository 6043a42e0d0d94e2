import dataclasses
import hashlib
import itertools
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from cxrjax.data.phantom import Radiograph, make_anatomy, render, render_masks, sample_population, with_findings
from cxrjax.data.phantom.anatomy import LEFT, RIGHT
from cxrjax.data.phantom.drawing import Canvas, mesh_texture, spline
from cxrjax.data.phantom.lesions import make_findings
from cxrjax.data.phantom.population import PREVALENCE
from cxrjax.data.phantom.rendering import make_exposure
from cxrjax.errors import CxrError
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, PHANTOM, POSITIVE, UNCERTAIN

UPRIGHT = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def radiographs() -> list[Radiograph]:
    return sample_population(11, 3200)


def _difference(radiograph: Radiograph, finding: str, size: int) -> np.ndarray:
    """Return the change in grey levels by a finding alone."""
    shown, healthy = render(with_findings(radiograph, finding), size), render(with_findings(radiograph), size)
    return shown.astype(np.float32) - healthy


def test_rendering_is_deterministic(radiographs):
    first, again = sample_population(11, 3)[1], sample_population(11, 3)[1]
    assert first == again == radiographs[1]
    np.testing.assert_array_equal(render(first, 96), render(again, 96))
    assert not np.array_equal(render(first, 96), render(radiographs[0], 96))
    assert sample_population(12, 3)[1] != first


def test_same_bytes_in_another_process(radiographs):
    program = (
        "import hashlib; from cxrjax.data.phantom import render, sample_population\n"
        "print(hashlib.sha256(b''.join(render(r, 80).tobytes() for r in sample_population(11, 3)[:3])).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(b"".join(render(r, 80).tobytes() for r in radiographs[:3])).hexdigest()


def test_ids_are_unique_and_populations_nested(radiographs):
    assert len({r.id for r in radiographs}) == len(radiographs)
    assert radiographs[0].id == "p00000_s1_0"
    assert all(r.id.startswith(r.study + "_") and r.study.startswith(r.patient + "_") for r in radiographs)
    assert [r.id for r in sample_population(11, 50)] == [r.id for r in radiographs[: len(sample_population(11, 50))]]


def test_some_patients_return(radiographs):
    studies, images = {}, {}
    for r in radiographs:
        studies.setdefault(r.patient, set()).add(r.study)
        images.setdefault(r.study, []).append(r)
    returning = np.mean([len(s) > 1 for s in studies.values()])
    double = np.mean([len(i) > 1 for i in images.values()])
    assert 0.26 < returning < 0.34
    assert 0.11 < double < 0.18
    for group in images.values():
        assert len({(r.present, r.labels, r.disease, r.body, r.age, r.sex) for r in group}) == 1
        assert len({r.exposure for r in group}) == len(group)
    patient = next(p for p in studies if len(studies[p]) > 1)
    bodies = {(r.body, r.age, r.sex) for r in radiographs if r.patient == patient}
    assert len(bodies) == 1
    assert {r.view for r in radiographs} == {"PA", "AP"}


def test_labels_follow_the_true_findings(radiographs):
    present, labels = np.array([r.present for r in radiographs]), np.array([r.labels for r in radiographs])
    assert labels.shape == (len(radiographs), len(PHANTOM))
    assert present[labels == POSITIVE].all()
    assert not present[labels == NEGATIVE].any()
    assert not present[labels == NOT_MENTIONED].any()
    assert np.mean(labels[present] == UNCERTAIN) == pytest.approx(0.05, abs=0.01)
    assert np.mean(labels[~present] == UNCERTAIN) == pytest.approx(0.02, abs=0.006)
    assert np.mean(labels[~present] == NOT_MENTIONED) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(present.mean(axis=0), list(PREVALENCE.values()), atol=0.03)


def test_findings_are_independent_of_each_other_and_of_the_view(radiographs):
    # one image per study: images of a study share their findings
    studies = list({r.study: r for r in radiographs}.values())
    assert len(studies) > 4000
    columns = {finding: [r.shows(finding) for r in studies] for finding in PHANTOM}
    columns |= {"view": [r.view == "AP" for r in studies], "sex": [r.sex == "F" for r in studies]}
    chances = []
    for one, other in itertools.combinations(columns, 2):
        table = np.array(
            [[np.sum(np.equal(columns[one], a) & np.equal(columns[other], b)) for a in (0, 1)] for b in (0, 1)]
        )
        chances.append(stats.chi2_contingency(table).pvalue)
    assert min(chances) * len(chances) > 0.001


def test_findings_are_independent_of_pose_and_exposure(radiographs):
    studies = list({r.study: r for r in radiographs}.values())[:2500]
    exposures = [make_exposure(r) for r in studies]
    nuisance = np.array([[*t.pose.ravel(), t.gain, t.gamma, t.noise, len(t.electrodes)] for t in exposures])
    present = np.array([r.present for r in studies], float)
    correlation = np.corrcoef(nuisance.T, present.T)[: nuisance.shape[1], nuisance.shape[1] :]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(studies))


def test_pose_does_not_change_with_the_findings(radiographs):
    one, other = make_exposure(radiographs[0]), make_exposure(with_findings(radiographs[0], *PHANTOM))
    np.testing.assert_array_equal(one.pose, other.pose)
    assert (one.gain, one.gamma, one.noise) == (other.gain, other.gamma, other.noise)
    alone, together = (
        make_findings(r, make_anatomy(radiographs[0]))
        for r in (with_findings(radiographs[0], "Mass"), with_findings(radiographs[0], *PHANTOM))
    )
    np.testing.assert_array_equal(alone.mass[0].points, together.mass[0].points)


def cardiothoracic_ratio(anatomy):
    return np.ptp(anatomy.heart[:, 0]) / (2 * anatomy.half_width)


def test_cardiothoracic_ratio_determines_cardiomegaly(radiographs):
    ratio = np.array([cardiothoracic_ratio(make_anatomy(r)) for r in radiographs[:400]])
    enlarged = np.array([r.shows("Cardiomegaly") for r in radiographs[:400]])
    assert ratio[enlarged].min() > 0.55 > ratio[~enlarged].max()
    assert ratio[~enlarged].min() > 0.4
    assert ratio[enlarged].max() < 0.67


def test_no_border_of_the_heart_alone_determines_cardiomegaly(radiographs):
    enlarged = [r.shows("Cardiomegaly") for r in radiographs[:1000]]
    cues = []
    for radiograph in radiographs[:1000]:
        anatomy, zoom = make_anatomy(radiograph), np.linalg.norm(make_exposure(radiograph).pose[:, 0])
        left, right = anatomy.heart[:, 0].max(), anatomy.heart[:, 0].min()
        cues.append(
            zoom * np.array([left, -right, left - anatomy.half_width, -right - anatomy.half_width, left - right])
        )
    assert max(roc_auc_score(enlarged, cue) for cue in np.transpose(cues)) < 0.94


def test_cardiothoracic_ratio_matches_the_image(radiographs):
    for radiograph in radiographs[:8]:
        anatomy = make_anatomy(with_findings(radiograph, "Cardiomegaly"))
        lateral = anatomy.lungs[LEFT][:, 0].max() - anatomy.lungs[RIGHT][:, 0].min()
        assert cardiothoracic_ratio(anatomy) == pytest.approx(np.ptp(anatomy.heart[:, 0]) / lateral)
        mask = render_masks(with_findings(radiograph, "Cardiomegaly"), 512)["Cardiomegaly"]
        zoom = np.linalg.norm(make_exposure(radiograph).pose[:, 0])
        area = cv2.contourArea(anatomy.heart.astype(np.float32)) * zoom**2
        assert mask.mean() == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize("size", [16, 64, 200])
def test_masks_are_those_of_the_present_findings(radiographs, size):
    for radiograph in radiographs[:40]:
        masks = render_masks(radiograph, size)
        assert tuple(masks) == tuple(f for f in PHANTOM if radiograph.shows(f))
        for finding, mask in masks.items():
            assert mask.shape == (size, size)
            assert mask.dtype == bool
            assert mask.any(), (radiograph.id, finding)


def test_findings_have_their_size(radiographs):
    area = {f: np.mean([render_masks(with_findings(r, f), 256)[f].mean() for r in radiographs[:12]]) for f in PHANTOM}
    assert area["Cardiomegaly"] > 0.05 > area["Mass"] > area["Nodule"] > 0.0005
    assert 0.01 < area["Reticulation"] < 0.2
    for radiograph in radiographs[:12]:
        mask = render_masks(with_findings(radiograph, "Mass"), 512)["Mass"]
        diameter = np.sqrt(4 / np.pi * mask.mean()) / np.linalg.norm(make_exposure(radiograph).pose[:, 0])
        assert 0.055 < diameter < 0.115


@pytest.mark.parametrize("finding", [f for f in PHANTOM if f != "Cardiomegaly"])
def test_finding_changes_only_its_region(radiographs, finding):
    for radiograph in radiographs[:6]:
        change = np.abs(_difference(radiograph, finding, 256))
        mask = render_masks(with_findings(radiograph, finding), 256)[finding]
        reach, trace = (
            (41, 4) if finding == "Reticulation" else (15, 2)
        )  # its edge is soft; some lung is behind the heart
        around = cv2.dilate(mask.astype(np.uint8), np.ones((reach, reach))) > 0
        assert change[mask].mean() > 2
        assert change[~around].max() <= trace


def test_dense_findings_are_brighter(radiographs):
    for finding in ("Pleural Effusion", "Mass", "Nodule", "Support Devices"):
        for radiograph in radiographs[:6]:
            mask = render_masks(with_findings(radiograph, finding), 256)[finding]
            assert _difference(radiograph, finding, 256)[mask].mean() > 3


def test_reticulation_vanishes_when_averaged_by_four(radiographs):
    for radiograph in radiographs[:6]:
        change = _difference(radiograph, "Reticulation", 256)
        mask = render_masks(with_findings(radiograph, "Reticulation"), 256)["Reticulation"]
        quarter = cv2.resize(change, (64, 64), interpolation=cv2.INTER_AREA)
        whole = cv2.resize(mask.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA) == 1
        assert change[mask].std() > 10
        assert quarter[whole].std() < 0.35 * change[mask].std()
        assert abs(change[mask].mean()) < 0.2 * change[mask].std()


def test_mesh_has_mean_zero_and_its_period():
    texture = mesh_texture()
    assert abs(texture.mean()) < 1e-3
    assert texture.std() == pytest.approx(1, abs=1e-3)
    power = np.abs(np.fft.rfft2(texture)) ** 2
    cycles = np.hypot(np.fft.fftfreq(1024)[:, None], np.fft.rfftfreq(1024)[None]) * 512
    assert power[cycles < 24].sum() < 0.02 * power.sum()  # nothing left below what 64 pixels can show


def test_pneumothorax_removes_vessels_beyond_its_line(radiographs):
    fewer = []
    for radiograph in radiographs[:12]:
        shown = with_findings(radiograph, "Pneumothorax")
        mask = render_masks(shown, 512)["Pneumothorax"]
        beyond = cv2.erode(mask.astype(np.uint8), np.ones((9, 9))) > 0  # away from the pleural line itself
        change = _difference(radiograph, "Pneumothorax", 512)[beyond]
        assert change.max(initial=0) <= 2  # nothing is added there
        fewer.append(np.mean(change < -4))
    assert np.mean(fewer) > 0.03


def test_pleural_line_fades_with_the_size(radiographs):
    def height(size):
        return np.mean([np.percentile(_difference(r, "Pneumothorax", size), 99.95) for r in radiographs[:6]])

    assert height(64) < 0.5 * height(256)


@pytest.mark.parametrize("size", [64, 256, 400])
def test_sizes_show_the_same_image(radiographs, size):
    for radiograph in radiographs[:4]:
        large = cv2.resize(render(radiograph, 1024), (size, size), interpolation=cv2.INTER_AREA).astype(np.float64)
        image = render(radiograph, size).astype(np.float64)
        assert np.corrcoef(large.ravel(), image.ravel())[0, 1] > 0.99
        smooth = [cv2.GaussianBlur(picture, (0, 0), 1.5) for picture in (large, image)]  # sizes differ in noise
        assert np.abs(smooth[0] - smooth[1]).mean() < 1.5


def test_masks_of_sizes_agree(radiographs):
    for radiograph in radiographs[:6]:
        shown = with_findings(radiograph, *PHANTOM)
        large, small = render_masks(shown, 1024), render_masks(shown, 128)
        for finding in ("Cardiomegaly", "Pleural Effusion", "Reticulation"):
            averaged = cv2.resize(large[finding].astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) > 0.5
            assert np.mean(averaged != small[finding]) < 0.02


def test_image_is_a_radiograph(radiographs):
    for radiograph in radiographs[:10]:
        healthy = with_findings(radiograph)
        image = render(healthy, 256).astype(np.float64)
        canvas, anatomy = Canvas(256, make_exposure(healthy).pose), make_anatomy(healthy)
        heart = canvas.inside([anatomy.heart]) > 0
        lungs = (canvas.inside(anatomy.lungs.values()) > 0) & ~heart & ~(canvas.inside([anatomy.mediastinum]) > 0)
        assert image[lungs].mean() + 40 < image[heart].mean()
        across = np.flatnonzero(heart.any(axis=0))
        assert across.mean() > np.flatnonzero(lungs.any(axis=0)).mean()  # the apex points to the patient's left
        assert 60 < image.mean() < 210


def test_portable_hearts_look_larger_without_cardiomegaly(radiographs):
    healthy = [with_findings(r) for r in radiographs[:300]]
    ratio = {v: np.array([cardiothoracic_ratio(make_anatomy(r)) for r in healthy if r.view == v]) for v in ("PA", "AP")}
    assert ratio["AP"].mean() > ratio["PA"].mean() + 0.01
    assert max(ratio["AP"].max(), ratio["PA"].max()) < 0.55


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40), size=st.integers(16, 150), chosen=st.sets(st.sampled_from(PHANTOM)))
def test_any_description_can_be_rendered(seed, size, chosen):
    radiograph = with_findings(sample_population(seed, 1)[0], *chosen)
    image = render(radiograph, size)
    assert image.shape == (size, size)
    assert image.dtype == np.uint8
    assert image.std() > 10
    assert set(render_masks(radiograph, size)) == chosen


def test_large_images_can_be_rendered(radiographs):
    assert render(radiographs[0], 1600).shape == (1600, 1600)  # larger than the noise bank


def test_with_findings_sets_truth_and_labels(radiographs):
    changed = with_findings(radiographs[0], "Mass")
    assert changed.labels == tuple(POSITIVE if f == "Mass" else NEGATIVE for f in PHANTOM)
    assert dataclasses.replace(changed, labels=radiographs[0].labels, present=radiographs[0].present) == radiographs[0]


def test_invalid_input_is_an_error(radiographs):
    with pytest.raises(CxrError, match="at least 16 px"):
        render(radiographs[0], 8)
    with pytest.raises(CxrError, match="at least 16 px"):
        render_masks(radiographs[0], 8)
    with pytest.raises(CxrError, match="negative"):
        sample_population(-1, 3)
    with pytest.raises(CxrError, match="Pneumothorax"):
        with_findings(radiographs[0], "Pneumotorax")


@pytest.mark.parametrize("width", [0.004, 0.02, 0.05, 0.11])
def test_stroke_has_light_proportional_to_its_width(width):
    canvas = Canvas(100, UPRIGHT)
    layer = canvas.stroke(canvas.blank(), [np.array([(-0.9, -0.02), (0.9, 0.03)])], width, 100)
    assert layer[:, 30:70].sum() / 40 == pytest.approx(100 * width * 100, rel=0.12)


def test_spline_passes_through_its_control_points():
    points = np.random.default_rng(0).normal(size=(7, 2))
    np.testing.assert_allclose(spline(points, closed=True, samples=5)[::5], points, atol=1e-12)
    np.testing.assert_allclose(spline(points, samples=5)[::5], points, atol=1e-12)
    line = np.stack([np.linspace(0, 1, 5), np.linspace(2, 4, 5)], axis=1)
    curve = spline(line, samples=4)[4:-4]
    np.testing.assert_allclose(curve[:, 1], 2 + 2 * curve[:, 0], atol=1e-12)
