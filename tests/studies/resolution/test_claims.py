"""Claims of a resolution study on simulated readers whose truth is known, and on the numbers that the paper prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from cxrjax import config
from cxrjax.metrics.comparison import difference_from_bootstrap
from cxrjax.metrics.predictions import Predictions
from cxrjax.report.content import ErfMap
from cxrjax.studies.members import Member
from cxrjax.studies.resolution import claims, report
from cxrjax.studies.resolution.claims import correlate_weights
from cxrjax.studies.resolution.study import Group, ResolutionStudy
from cxrjax.studies.study import Paper

FINDINGS = ("Cardiomegaly", "Mass", "Pneumothorax")
SIZES = ("32 px", "64 px", "128 px")
FOLDS = tuple(Group(0, fold) for fold in range(5))


def reader(fold, strength, seed, split="test", n=1000):
    """Predictions of a network whose classes lie `strength` apart, one number per finding."""
    rng = np.random.default_rng([fold, split == "test"])  # a fold always has the same images
    label = (rng.random((n, len(FINDINGS))) < 0.3).astype(float)
    noise = np.random.default_rng([fold, seed, split == "test"]).standard_normal(label.shape)
    ids = np.array([f"{split}{fold}-{i}" for i in range(n)])
    return Predictions(ids, ids, FINDINGS, np.asarray(strength) * (label - 0.3) + noise, label, label >= 0)


def simulated(strengths, groups=FOLDS, n=1000, **study):
    """`strengths[size][finding]`; networks are never opened."""
    settings = config.default()
    settings.study.update({"sizes": (32, 64, 128), "paper": "resolution", **study})
    settings.evaluate.bootstrap_resamples = 100
    members = {
        group: [
            Member(
                size, Path(), None, None,
                **{split: reader(group.fold or 0, strength, 10 * s + group.seed, split, n)
                   for split in ("validation", "test")},
            )
            for s, (size, strength) in enumerate(zip(SIZES, strengths, strict=True))
        ]
        for group in groups
    }  # fmt: skip
    return ResolutionStudy.from_groups(settings, members)


def auroc(table, k):
    return roc_auc_score(table.label[:, k], table.logit[:, k])


def fields(*fractions):
    """Receptive fields by size, with one diameter per group."""
    return {
        size: [ErfMap(np.ones((2, 2)), value**2, 32 * value, value) for value in values]
        for size, values in zip(SIZES, fractions, strict=True)
    }


def verdicts(made):
    return {claim.statement: claim.supported for claim in made}


MIDDLE = ((2.2, 1.6, 1.2), (2.0, 2.2, 1.9), (1.5, 1.7, 2.2))


@pytest.fixture(scope="module")
def as_printed():
    """The claims of the paper: middle sizes best, Cardiomegaly falls, Pneumothorax rises."""
    return simulated(MIDDLE)


def test_what_the_paper_claims_is_found_where_it_is_true(as_printed):
    made = claims.make_claims(as_printed, fields((0.9, 0.8) * 2, (0.5, 0.6) * 2, (0.3, 0.2) * 2))
    assert verdicts(made) == dict.fromkeys(
        (
            "Mean AUROC peaks at a middle size",
            "Cardiomegaly falls with image size",
            "Pneumothorax rises with image size",
            "The stacked ensemble beats every single size on average",
            "The stacked ensemble is the best on every finding",
            "The ensemble's weights follow the AUROC of the single sizes",
            "The effective receptive field shrinks relative to the image as resolution rises",
        ),
        "yes",
    )
    falls = next(claim for claim in made if claim.statement.startswith("Cardiomegaly"))
    values = [as_printed.scores[size].findings[0].auroc for size in SIZES]
    assert f"{values[0]:.3f}, {values[1]:.3f} and {values[2]:.3f} at 32 px, 64 px and 128 px" in falls.evidence
    assert f"{values[2] - values[0]:+.3f} (" in falls.evidence
    assert falls.evidence.endswith("; below 0 in 5 of 5 folds")


def test_and_refuted_where_the_opposite_is():
    rising = simulated(((0.8, 0.8, 2.6), (1.6, 1.6, 1.6), (2.6, 2.6, 0.8)), fine=("Pneumothorax",), coarse=("Mass",))
    verdict = verdicts(claims.make_claims(rising, fields((0.5, 0.5, 0.5), (0.5, 0.6, 0.5), (0.6, 0.7, 0.5))))
    assert verdict["Cardiomegaly falls with image size"] == "no"
    assert verdict["Pneumothorax rises with image size"] == "no"
    assert verdict["Fine findings (Pneumothorax) gain with resolution"] == "no"
    assert verdict["Coarse findings (Mass) do not"] == "no"
    assert verdict["The effective receptive field shrinks relative to the image as resolution rises"] == "no"
    ends = simulated(((2.5, 2.5, 2.5), (0.7, 0.7, 0.7), (1.5, 1.5, 1.5)))
    assert verdicts(claims.peak_claim(ends)) == {"Mean AUROC peaks at a middle size": "no"}


def test_intervals_of_differences_are_the_wider_of_patients_and_folds(as_printed):
    gain = as_printed.difference("128 px", "32 px", FINDINGS)
    gains = np.array([
        np.mean([auroc(members[2].test, k) - auroc(members[0].test, k) for k in range(len(FINDINGS))])
        for members in as_printed.groups.values()
    ])  # fmt: skip
    assert gain.per_table == pytest.approx(tuple(gains))
    patients = difference_from_bootstrap(as_printed.bootstraps["128 px"], as_printed.bootstraps["32 px"], FINDINGS)
    # In each fold a fifth of the images are for testing, and seven eighths of the rest for training.
    half = stats.t.ppf(0.975, 4) * gains.std(ddof=1) * np.sqrt(1 / 5 + 0.2 / (0.8 * 0.7 / 0.8))
    assert gain.low == pytest.approx(min(patients.low, gains.mean() - half))
    assert gain.high == pytest.approx(max(patients.high, gains.mean() + half))
    seeds = simulated(MIDDLE, groups=(Group(0), Group(1)), n=100)
    drawn = difference_from_bootstrap(seeds.bootstraps["128 px"], seeds.bootstraps["32 px"], FINDINGS)
    assert seeds.difference("128 px", "32 px", FINDINGS) == drawn, "seeds are no folds"


def test_what_cannot_be_told_is_undecided():
    alike = simulated(((1.2,) * 3,) * 3, n=60)
    verdict = verdicts(claims.make_claims(alike, fields((0.9, 0.9, 0.9), (0.5, 0.95, 0.5), (0.3, 0.3, 0.3))))
    assert verdict["Mean AUROC peaks at a middle size"] == "undecided"
    assert verdict["Cardiomegaly falls with image size"] == "undecided"
    assert verdict["The effective receptive field shrinks relative to the image as resolution rises"] == "undecided"


def test_an_ensemble_that_is_worse_on_one_finding_is_not_the_best_everywhere():
    # The first finding's smallest size is far better, but its predictions on validation are useless.
    study = simulated(((2.6, 1.6, 1.2), (0.5, 2.2, 1.9), (0.5, 1.7, 2.2)))
    for group, members in study.groups.items():
        useless = members[0].validation.logit.copy()
        useless[:, 0] = np.random.default_rng(group.fold).standard_normal(len(useless))
        object.__setattr__(members[0].validation, "logit", useless)
    claim = claims.best_everywhere_claim(study)
    assert claim.supported == "no"
    assert "significantly worse in Cardiomegaly" in claim.evidence
    assert "the highest in 2 of 3 findings" in claim.evidence


def test_claims_of_the_paper_are_made_only_where_they_are_asked_for_and_can_be():
    plain = verdicts(claims.make_claims(simulated(MIDDLE, paper=""), fields((0.9,) * 3, (0.5,) * 3, (0.3,) * 3)))
    assert list(plain) == [
        "The stacked ensemble beats every single size on average",
        "The effective receptive field shrinks relative to the image as resolution rises",
    ]
    study = simulated(MIDDLE)
    for members in study.groups.values():
        for number, member in enumerate(members):
            subset = {split: getattr(member, split).select(("Mass",)) for split in ("validation", "test")}
            members[number] = Member(member.name, Path(), None, None, **subset)
    assert claims.trend_claims(study) == []
    two = ResolutionStudy.from_groups(study.config, {group: members[:2] for group, members in study.groups.items()})
    assert claims.peak_claim(two) == []


def test_groups_are_folds_seeds_or_both(as_printed):
    assert (as_printed.group_kind, as_printed.group_count, as_printed.group_labels[0]) == ("fold", "5 folds", "fold 0")
    seeds = simulated(MIDDLE, groups=(Group(0), Group(4)), n=100)
    assert (seeds.group_kind, seeds.group_count, seeds.group_labels[1]) == (
        "training seed", "2 training seeds", "training seed 4",
    )  # fmt: skip
    assert [group.suffix for group in (*seeds.groups, Group(4, 1))] == ["", "-seed4", "-fold1-seed4"]
    assert {score.images for score in seeds.scores.values()} == {100}, "seeds share their images"
    both = simulated(MIDDLE, groups=(Group(0, 0), Group(1, 0), Group(0, 1), Group(1, 1)), n=100)
    assert (both.group_kind, both.group_count, both.group_labels[0]) == (
        "fold and seed", "4 folds and seeds", "fold 0, training seed 0",
    )  # fmt: skip
    assert {score.images for score in both.scores.values()} == {200}
    alone = simulated(MIDDLE, groups=(Group(0),), n=100)
    assert (alone.group_count, alone.describe_agreement(alone.difference("32 px", "64 px", FINDINGS))) == ("", "")


def test_weights_are_learnt_in_each_group_and_averaged(as_printed):
    assert list(as_printed.weights) == list(as_printed.groups)
    np.testing.assert_allclose(as_printed.mean_weights.sum(1), 1)
    expected = np.mean([as_printed.weights[group] for group in as_printed.groups], axis=0)
    np.testing.assert_array_equal(as_printed.mean_weights, expected)
    assert as_printed.mean_weights.argmax(1).tolist() == [0, 1, 2]


def test_findings_without_a_regression_are_named():
    study = simulated(MIDDLE, n=100)
    first = study.groups[Group(0, 1)][0]
    for member in study.groups[Group(0, 1)]:
        object.__setattr__(member.validation, "label", first.validation.label * [1, 0, 1])
    assert report._voting_reasons(study) == ["Mass (no positive example)"]


def test_the_papers_weights_follow_its_aucs_as_it_says(shared):
    tables = json.loads((shared / "papers" / "tables.json").read_text())["resolution"]
    findings, sizes = list(tables["figure5_weights"]), ("256", "512", "1024", "2048")
    score = np.array([[tables["table3_auc"][size][finding]["mean"] for size in sizes] for finding in findings])
    weight = np.array([[tables["figure5_weights"][finding][size] for size in sizes] for finding in findings])
    result = correlate_weights(score, weight)
    assert (result.hits, result.findings) == (10, 14), "as the paper counts"
    assert result.correlation > 0.7
    assert result.p < 0.001
    assert correlate_weights(score, -weight).correlation == pytest.approx(-result.correlation)


def test_rank_correlations_are_scipys_and_their_p_is_that_of_shuffling():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(5)
    score, weight = rng.random((6, 4)).round(1), rng.random((6, 4))
    expected = np.mean([spearmanr(a, b).statistic for a, b in zip(score, weight, strict=True)])
    assert correlate_weights(score, weight).correlation == pytest.approx(expected)
    p = [correlate_weights(rng.random((4, 3)), rng.random((4, 3)), seed=s).p for s in range(40)]
    assert 0.3 < np.mean(p) < 0.75, "without a relation p is spread over 0 to 1"
    score[0], weight[1], score[2, 0] = 0.5, 0.25, np.nan
    assert correlate_weights(score, weight).findings == 3
    assert correlate_weights(np.ones((2, 3)), np.ones((2, 3))).findings == 0


def test_the_papers_numbers_are_the_transcribed_ones(shared):
    tables, paper = json.loads((shared / "papers" / "tables.json").read_text())["resolution"], Paper.load("resolution")
    for model, by_finding in tables["table3_auc"].items():
        name = model if model == "ensemble" else f"{model} px"
        assert paper.auc[name] == {finding: value["mean"] for finding, value in by_finding.items()}
        assert paper.numbers["sd"][name] == {finding: value["sd"] for finding, value in by_finding.items()}
        assert paper.numbers["average"][name] == tables["table3_average_printed"][model]
        assert paper.mean_auc(name) == pytest.approx(paper.numbers["average"][name], abs=1e-3)
    for finding, weights in tables["figure5_weights"].items():
        assert {size: paper.numbers["weights"][f"{size} px"][finding] for size in weights} == weights
    for size, row in tables["table1"].items():
        assert paper.numbers["training"][f"{size} px"] == {"rate": row["learning_rate"], "batch": row["batch"]}
