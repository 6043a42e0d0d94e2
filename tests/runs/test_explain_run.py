"""Positive images with their true boxes, saliency options, and untrained networks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from cxrjax.data.records import Box, Record, Records, open_records
from cxrjax.errors import CxrError
from cxrjax.runs.erf_run import measure_run_erf, untrained_network
from cxrjax.runs.explain_run import SaliencyOptions, explain_run, find_positives
from cxrjax.train.run_directory import create_network

FINDINGS = ("Mass", "Nodule")


def experiment(*boxes_of_images):
    """Images that all show a mass, with boxes drawn in some."""
    records_list = [
        Record(f"{k}.png", f"p{k}", "s", "PA", math.nan, "", "", (1, 0), boxes=tuple(boxes))
        for k, boxes in enumerate(boxes_of_images)
    ]
    records = Records.from_records(records_list, FINDINGS, dataset="drawn")
    count = len(records_list)
    split_examples = SimpleNamespace(
        row=np.arange(count, dtype=np.int32),
        label=np.tile([1.0, 0.0], (count, 1)),
        label_mask=np.ones((count, 2), bool),
    )
    return SimpleNamespace(records=records, findings=FINDINGS, examples=lambda name: split_examples)


def test_true_boxes_stay_separate_even_if_they_touch():
    first, second = Box("Mass", 0.1, 0.2, 0.3, 0.1), Box("Mass", 0.4, 0.2, 0.1, 0.1)
    other = Box("Nodule", 0.7, 0.7, 0.1, 0.1)
    positives = find_positives(experiment((), (first, second, other), (other,)), "test", "Mass", 8)
    assert list(positives.row) == [1]
    np.testing.assert_allclose(positives.boxes[0], [[0.1, 0.2, 0.3, 0.1], [0.4, 0.2, 0.1, 0.1]], rtol=1e-6)
    assert positives.masks[0].mean() == pytest.approx(0.04, abs=0.002)


def test_without_boxes_the_first_positives_are_taken():
    positives = find_positives(experiment((), (), ()), "test", "Mass", 2)
    assert list(positives.row) == [0, 1]
    assert positives.masks == positives.boxes == []


def test_masks_get_boxes_around_their_regions(phantom_data):
    records = open_records(phantom_data, "cxr_phantom", "32")
    k = records.findings.index("Nodule")
    rows = np.flatnonzero(records.labels[:, k] == 1).astype(np.int32)
    split_examples = SimpleNamespace(
        row=rows, label=(records.labels[rows] == 1).astype(float), label_mask=records.labels[rows] >= 0
    )
    phantom = SimpleNamespace(records=records, findings=records.findings, examples=lambda name: split_examples)
    positives = find_positives(phantom, "test", "Nodule", 8)
    assert len(positives.row) > 3
    for mask, boxes in zip(positives.masks, positives.boxes, strict=True):
        covered = np.zeros_like(mask)
        for x, y, w, h in (boxes * 256).round().astype(int):
            covered[y : y + h, x : x + w] = True
        assert (covered >= mask).all()
    assert max(map(len, positives.boxes)) > 1


def test_only_integrated_gradients_are_blurred():
    assert SaliencyOptions("integrated").smoothing(256) == pytest.approx(5.12)
    assert SaliencyOptions("layercam").smoothing(256) == 0


def test_an_untrained_network_has_another_seed_and_the_same_config(tiny):
    config = tiny()
    seed = config.seed
    first, other = create_network(config, 3), untrained_network(config, 3)
    assert config.seed == seed
    assert other.definition is first.definition
    kernels = [np.asarray(network.params["classifier"]["output"]["kernel"]) for network in (first, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_bad_options_fail_before_data_are_opened(tmp_path):
    with pytest.raises(CxrError, match="threshold"):
        explain_run(tmp_path, SaliencyOptions(threshold=2))
    with pytest.raises(CxrError, match="width must be above 0"):
        measure_run_erf(tmp_path, width_cm=0.0)
