"""The papers' numbers are those that were transcribed, and what is computed of them is what the papers say."""

import json

import jax
import numpy as np
import pytest
from scipy.special import expit

from cxrjax.models import abstract
from cxrjax.models.network import parameter_count
from cxrjax.studies.study import Paper
from cxrjax.studies.systems import attention_fusion
from cxrjax.studies.systems.fhrnet import geometric_mean_logits, relative_gain

SYSTEMS = ("fhrnet", "transfer", "resolution", "attention_fusion", "sequential_cnn")


def leaves(value):
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_number_is_in_the_transcription(shared, system):
    transcribed = set(map(str, leaves(json.loads((shared / "papers" / "tables.json").read_text())[system])))
    page = (shared / "papers" / f"{system}.md").read_text().replace(",", "")
    for number in leaves(dict(Paper.load(system).numbers)):
        assert str(number) in transcribed or (isinstance(number, int) and str(number) in page), number


def test_each_auc_stands_where_the_transcription_has_it(shared):
    tables = json.loads((shared / "papers" / "tables.json").read_text())
    names = {"global": "global", "local": "local", "fusion": "FHRNet"}
    for arm, name in names.items():
        assert Paper.load("fhrnet").auc[arm] == tables["fhrnet"]["table2_auc"][name]
    for arm, of_arm in Paper.load("attention_fusion").auc.items():
        name = "attention_fusion" if arm == "fusion" else arm
        assert of_arm == tables["attention_fusion"]["table2_auc"][name]
    for name, of_class in Paper.load("sequential_cnn").numbers["report"].items():
        for rate, value in of_class.items():
            assert value == tables["sequential_cnn"]["report"][rate][name.replace("-", "_").replace("d_", "d")]


def test_means_and_gains_are_those_that_the_papers_print():
    fhrnet, fusion = Paper.load("fhrnet"), Paper.load("attention_fusion")
    assert fhrnet.mean_auc("fusion") == pytest.approx(0.812, abs=5e-4)
    assert fhrnet.mean_auc("global") == pytest.approx(0.796, abs=5e-4), "and not the .803 that is printed"
    wang = fhrnet.numbers["others"]["Wang"]
    assert relative_gain(fhrnet.finding_auc("fusion", "Mass"), wang["Mass"]) == "+19.3"
    assert float(relative_gain(fhrnet.mean_auc("fusion"), float(np.mean(list(wang.values()))))) == pytest.approx(
        8.98, abs=0.1
    )
    assert fusion.mean_auc("fusion") == pytest.approx(0.8156, abs=0.005)
    assert Paper.load("transfer").mean_auc("densenet") is None, "one printed AUC is no mean"
    assert fhrnet.finding_auc("fusion", "Pleural Thickening") == 0.752
    assert relative_gain(0.5, None) is None
    assert relative_gain(float("nan"), 0.5) is None


@pytest.mark.parametrize(
    ("arm", "name", "options", "keras"),
    [
        ("simple_cnn", "simple_cnn", {}, 0),
        ("densenet121", "densenet121", {"hidden": 512}, 0),
        ("efficientnet_b0", "efficientnet_b0", {"hidden": 512}, 7),
        ("fusion", "attention_fusion", {}, 7),
    ],
)
def test_the_networks_have_the_counts_that_the_claim_is_about(arm, name, options, keras):
    network, paper = abstract(name, classes=14, **options), Paper.load("attention_fusion")
    total = parameter_count(network) + sum(leaf.size for leaf in jax.tree.leaves(network.stats))
    assert total == paper.for_arm("parameters", arm) - keras
    assert attention_fusion._KERAS_EXTRA.get(arm, 0) == keras
    assert parameter_count(network) == (paper.for_arm("trainable", arm) or parameter_count(network))


def test_agreement_ranks_as_the_sum_of_logs_and_stays_finite():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 3, (2, 50, 2))
    both = geometric_mean_logits(first, second)
    np.testing.assert_allclose(expit(both), np.sqrt(expit(first) * expit(second)), rtol=1e-12)
    extreme = geometric_mean_logits(np.array([[1e4, -1e4]]), np.array([[1e4, -1e4]]))
    assert np.isfinite(extreme).all()
    assert extreme[0, 0] > 600
    assert extreme[0, 1] == pytest.approx(-1e4)
