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

from cxrjax.data.phantom import Radiograph, anatomy, masks, population, render, with_findings
from cxrjax.data.phantom.anatomy import LEFT, RIGHT
from cxrjax.data.phantom.drawing import Film, mesh, spline
from cxrjax.data.phantom.lesions import findings
from cxrjax.data.phantom.population import PREVALENCE
from cxrjax.data.phantom.rendering import exposure
from cxrjax.errors import CxrError
from cxrjax.findings import NEGATIVE, NOT_MENTIONED, PHANTOM, POSITIVE, UNCERTAIN

UPRIGHT = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def people() -> list[Radiograph]:
    return population(11, 3200)


def _difference(radiograph: Radiograph, finding: str, size: int) -> np.ndarray:
    """What a finding changes in grey levels, on the patient without any other."""
    shown, healthy = render(with_findings(radiograph, finding), size), render(with_findings(radiograph), size)
    return shown.astype(np.float32) - healthy


def test_same_description_same_bytes(people):
    first, again = population(11, 3)[1], population(11, 3)[1]
    assert first == again == people[1]
    np.testing.assert_array_equal(render(first, 96), render(again, 96))
    assert not np.array_equal(render(first, 96), render(people[0], 96))
    assert population(12, 3)[1] != first


def test_same_bytes_in_another_process(people):
    program = (
        "import hashlib; from cxrjax.data.phantom import population, render\n"
        "print(hashlib.sha256(b''.join(render(r, 80).tobytes() for r in population(11, 3)[:3])).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(b"".join(render(r, 80).tobytes() for r in people[:3])).hexdigest()


def test_keys_are_unique_and_nested(people):
    assert len({r.id for r in people}) == len(people)
    assert people[0].id == "p00000_s1_0"
    assert all(r.id.startswith(r.study + "_") and r.study.startswith(r.patient + "_") for r in people)
    assert [r.id for r in population(11, 50)] == [r.id for r in people[: len(population(11, 50))]]


def test_some_patients_come_back(people):
    studies, images = {}, {}
    for r in people:
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
    bodies = {(r.body, r.age, r.sex) for r in people if r.patient == patient}
    assert len(bodies) == 1
    assert {r.view for r in people} == {"PA", "AP"}


def test_labels_follow_the_truth(people):
    present, labels = np.array([r.present for r in people]), np.array([r.labels for r in people])
    assert labels.shape == (len(people), len(PHANTOM))
    assert present[labels == POSITIVE].all()
    assert not present[labels == NEGATIVE].any()
    assert not present[labels == NOT_MENTIONED].any()
    assert np.mean(labels[present] == UNCERTAIN) == pytest.approx(0.05, abs=0.01)
    assert np.mean(labels[~present] == UNCERTAIN) == pytest.approx(0.02, abs=0.006)
    assert np.mean(labels[~present] == NOT_MENTIONED) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(present.mean(axis=0), list(PREVALENCE.values()), atol=0.03)


def test_findings_are_independent_of_each_other_and_of_the_view(people):
    # one image per study: images of a study share their findings
    studies = list({r.study: r for r in people}.values())
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


def test_findings_are_independent_of_pose_and_exposure(people):
    studies = list({r.study: r for r in people}.values())[:2500]
    taken = [exposure(r) for r in studies]
    nuisance = np.array([[*t.pose.ravel(), t.gain, t.gamma, t.noise, len(t.electrodes)] for t in taken])
    present = np.array([r.present for r in studies], float)
    correlation = np.corrcoef(nuisance.T, present.T)[: nuisance.shape[1], nuisance.shape[1] :]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(studies))


def test_pose_does_not_change_with_the_findings(people):
    one, other = exposure(people[0]), exposure(with_findings(people[0], *PHANTOM))
    np.testing.assert_array_equal(one.pose, other.pose)
    assert (one.gain, one.gamma, one.noise) == (other.gain, other.gamma, other.noise)
    alone, together = (
        findings(r, anatomy(people[0])) for r in (with_findings(people[0], "Mass"), with_findings(people[0], *PHANTOM))
    )
    np.testing.assert_array_equal(alone.mass[0].outline, together.mass[0].outline)


def test_heart_to_thorax_ratio_decides_cardiomegaly(people):
    ratio = np.array([anatomy(r).cardiothoracic_ratio for r in people[:400]])
    enlarged = np.array([r.shows("Cardiomegaly") for r in people[:400]])
    assert ratio[enlarged].min() > 0.55 > ratio[~enlarged].max()
    assert ratio[~enlarged].min() > 0.4
    assert ratio[enlarged].max() < 0.67


def test_no_border_of_the_heart_alone_decides_cardiomegaly(people):
    enlarged = [r.shows("Cardiomegaly") for r in people[:1000]]
    cues = []
    for radiograph in people[:1000]:
        shape, zoom = anatomy(radiograph), np.linalg.norm(exposure(radiograph).pose[:, 0])
        left, right = shape.heart[:, 0].max(), shape.heart[:, 0].min()
        cues.append(zoom * np.array([left, -right, left - shape.half_width, -right - shape.half_width, left - right]))
    assert max(roc_auc_score(enlarged, cue) for cue in np.transpose(cues)) < 0.94


def test_ratio_is_what_the_image_shows(people):
    for radiograph in people[:8]:
        shape = anatomy(with_findings(radiograph, "Cardiomegaly"))
        assert np.ptp(shape.heart[:, 0]) == pytest.approx(shape.heart_width)
        lateral = shape.lungs[LEFT][:, 0].max() - shape.lungs[RIGHT][:, 0].min()
        assert shape.cardiothoracic_ratio == pytest.approx(np.ptp(shape.heart[:, 0]) / lateral)
        mask = masks(with_findings(radiograph, "Cardiomegaly"), 512)["Cardiomegaly"]
        zoom = np.linalg.norm(exposure(radiograph).pose[:, 0])
        area = cv2.contourArea(shape.heart.astype(np.float32)) * zoom**2
        assert mask.mean() == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize("size", [16, 64, 200])
def test_masks_are_of_the_findings_present(people, size):
    for radiograph in people[:40]:
        found = masks(radiograph, size)
        assert tuple(found) == tuple(f for f in PHANTOM if radiograph.shows(f))
        for finding, mask in found.items():
            assert mask.shape == (size, size)
            assert mask.dtype == bool
            assert mask.any(), (radiograph.id, finding)


def test_findings_have_their_scale(people):
    area = {f: np.mean([masks(with_findings(r, f), 256)[f].mean() for r in people[:12]]) for f in PHANTOM}
    assert area["Cardiomegaly"] > 0.05 > area["Mass"] > area["Nodule"] > 0.0005
    assert 0.01 < area["Reticulation"] < 0.2
    for radiograph in people[:12]:
        mask = masks(with_findings(radiograph, "Mass"), 512)["Mass"]
        diameter = np.sqrt(4 / np.pi * mask.mean()) / np.linalg.norm(exposure(radiograph).pose[:, 0])
        assert 0.055 < diameter < 0.115


@pytest.mark.parametrize("finding", [f for f in PHANTOM if f != "Cardiomegaly"])
def test_a_finding_changes_its_place_and_nothing_else(people, finding):
    for radiograph in people[:6]:
        change = np.abs(_difference(radiograph, finding, 256))
        mask = masks(with_findings(radiograph, finding), 256)[finding]
        reach, trace = (
            (41, 4) if finding == "Reticulation" else (15, 2)
        )  # its edge is soft; some lung is behind the heart
        around = cv2.dilate(mask.astype(np.uint8), np.ones((reach, reach))) > 0
        assert change[mask].mean() > 2
        assert change[~around].max() <= trace


def test_dense_findings_brighten(people):
    for finding in ("Pleural Effusion", "Mass", "Nodule", "Support Devices"):
        for radiograph in people[:6]:
            mask = masks(with_findings(radiograph, finding), 256)[finding]
            assert _difference(radiograph, finding, 256)[mask].mean() > 3


def test_reticulation_vanishes_when_averaged_by_four(people):
    for radiograph in people[:6]:
        change = _difference(radiograph, "Reticulation", 256)
        mask = masks(with_findings(radiograph, "Reticulation"), 256)["Reticulation"]
        quarter = cv2.resize(change, (64, 64), interpolation=cv2.INTER_AREA)
        whole = cv2.resize(mask.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA) == 1
        assert change[mask].std() > 10
        assert quarter[whole].std() < 0.35 * change[mask].std()
        assert abs(change[mask].mean()) < 0.2 * change[mask].std()


def test_mesh_has_mean_zero_and_its_period():
    texture = mesh()
    assert abs(texture.mean()) < 1e-3
    assert texture.std() == pytest.approx(1, abs=1e-3)
    power = np.abs(np.fft.rfft2(texture)) ** 2
    cycles = np.hypot(np.fft.fftfreq(1024)[:, None], np.fft.rfftfreq(1024)[None]) * 512
    assert power[cycles < 24].sum() < 0.02 * power.sum()  # nothing left below what 64 pixels can show


def test_pneumothorax_removes_vessels_beyond_its_line(people):
    fewer = []
    for radiograph in people[:12]:
        shown = with_findings(radiograph, "Pneumothorax")
        mask = masks(shown, 512)["Pneumothorax"]
        beyond = cv2.erode(mask.astype(np.uint8), np.ones((9, 9))) > 0  # away from the pleural line itself
        change = _difference(radiograph, "Pneumothorax", 512)[beyond]
        assert change.max(initial=0) <= 2  # nothing is added there
        fewer.append(np.mean(change < -4))
    assert np.mean(fewer) > 0.03


def test_pleural_line_fades_with_the_size(people):
    def height(size):
        return np.mean([np.percentile(_difference(r, "Pneumothorax", size), 99.95) for r in people[:6]])

    assert height(64) < 0.5 * height(256)


@pytest.mark.parametrize("size", [64, 256, 400])
def test_sizes_show_the_same_picture(people, size):
    for radiograph in people[:4]:
        large = cv2.resize(render(radiograph, 1024), (size, size), interpolation=cv2.INTER_AREA).astype(np.float64)
        image = render(radiograph, size).astype(np.float64)
        assert np.corrcoef(large.ravel(), image.ravel())[0, 1] > 0.99
        smooth = [cv2.GaussianBlur(picture, (0, 0), 1.5) for picture in (large, image)]  # sizes differ in noise
        assert np.abs(smooth[0] - smooth[1]).mean() < 1.5


def test_masks_of_sizes_agree(people):
    for radiograph in people[:6]:
        shown = with_findings(radiograph, *PHANTOM)
        large, small = masks(shown, 1024), masks(shown, 128)
        for finding in ("Cardiomegaly", "Pleural Effusion", "Reticulation"):
            averaged = cv2.resize(large[finding].astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) > 0.5
            assert np.mean(averaged != small[finding]) < 0.02


def test_image_is_a_radiograph(people):
    for radiograph in people[:10]:
        healthy = with_findings(radiograph)
        image = render(healthy, 256).astype(np.float64)
        film, shape = Film(256, exposure(healthy).pose), anatomy(healthy)
        heart = film.inside([shape.heart]) > 0
        lungs = (film.inside(shape.lungs.values()) > 0) & ~heart & ~(film.inside([shape.mediastinum]) > 0)
        assert image[lungs].mean() + 40 < image[heart].mean()
        across = np.flatnonzero(heart.any(axis=0))
        assert across.mean() > np.flatnonzero(lungs.any(axis=0)).mean()  # the apex points to the patient's left
        assert 60 < image.mean() < 210


def test_portable_hearts_look_larger_without_deciding(people):
    healthy = [with_findings(r) for r in people[:300]]
    ratio = {v: np.array([anatomy(r).cardiothoracic_ratio for r in healthy if r.view == v]) for v in ("PA", "AP")}
    assert ratio["AP"].mean() > ratio["PA"].mean() + 0.01
    assert max(ratio["AP"].max(), ratio["PA"].max()) < 0.55


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40), size=st.integers(16, 150), chosen=st.sets(st.sampled_from(PHANTOM)))
def test_any_description_draws(seed, size, chosen):
    radiograph = with_findings(population(seed, 1)[0], *chosen)
    image = render(radiograph, size)
    assert image.shape == (size, size)
    assert image.dtype == np.uint8
    assert image.std() > 10
    assert set(masks(radiograph, size)) == chosen


def test_large_images_draw(people):
    assert render(people[0], 1600).shape == (1600, 1600)  # larger than the bank of noise


def test_with_findings_sets_truth_and_labels(people):
    changed = with_findings(people[0], "Mass")
    assert changed.labels == tuple(POSITIVE if f == "Mass" else NEGATIVE for f in PHANTOM)
    assert dataclasses.replace(changed, labels=people[0].labels, present=people[0].present) == people[0]


def test_bad_input_is_named(people):
    with pytest.raises(CxrError, match="16 pixels"):
        render(people[0], 8)
    with pytest.raises(CxrError, match="16 pixels"):
        masks(people[0], 8)
    with pytest.raises(CxrError, match="negative"):
        population(-1, 3)
    with pytest.raises(CxrError, match="Pneumothorax"):
        with_findings(people[0], "Pneumotorax")


@pytest.mark.parametrize("width", [0.004, 0.02, 0.05, 0.11])
def test_stroke_puts_down_as_much_light_as_its_width(width):
    film = Film(100, UPRIGHT)
    layer = film.stroke(film.blank(), [np.array([(-0.9, -0.02), (0.9, 0.03)])], width, 100)
    assert layer[:, 30:70].sum() / 40 == pytest.approx(100 * width * 100, rel=0.12)


def test_spline_passes_through_its_control_points():
    points = np.random.default_rng(0).normal(size=(7, 2))
    np.testing.assert_allclose(spline(points, closed=True, samples=5)[::5], points, atol=1e-12)
    np.testing.assert_allclose(spline(points, samples=5)[::5], points, atol=1e-12)
    line = np.stack([np.linspace(0, 1, 5), np.linspace(2, 4, 5)], axis=1)
    curve = spline(line, samples=4)[4:-4]
    np.testing.assert_allclose(curve[:, 1], 2 + 2 * curve[:, 0], atol=1e-12)
