"""Attention fusion: parameter counts against the paper's, and how sure the network is by Monte Carlo dropout."""

import jax
import numpy as np

from cxrjax.console import progress_bar
from cxrjax.inference.mc_dropout import stochastic_logits
from cxrjax.metrics.auc import auroc
from cxrjax.metrics.predictions import probabilities
from cxrjax.metrics.uncertainty import Uncertainty, summarize_passes
from cxrjax.models.network import parameter_count
from cxrjax.report.content import Claim, Histogram, Section, Table
from cxrjax.studies.framework import ArmStudy, Extra
from cxrjax.studies.members import Member
from cxrjax.studies.sections import number

_NETWORKS = {
    "simple_cnn": "simple_cnn", "densenet121": "densenet121", "efficientnet_b0": "efficientnet_b0",
    "fusion": "attention_fusion",
}  # fmt: skip
# Keras counts the weights of its EfficientNets' input normalisation (mean, variance, count), which is no layer here.
_KERAS = {"efficientnet_b0": 7, "fusion": 7}


def add(study: ArmStudy) -> Extra:
    """Counts, uncertainty, and whether the fusion beats each baseline."""
    counts, count_claims = _counts(study)
    uncertain, numbers = _uncertainty(study)
    claims = [
        study.better("fusion", name, f"The fusion is better than {name}") for name in _NETWORKS if name != "fusion"
    ]
    return Extra([counts, uncertain], [*claims, *count_claims], numbers={"uncertainty": numbers})


def _counts(study: ArmStudy) -> tuple[Section, list[Claim]]:
    rows, wrong, compared = [], [], 0
    for name, architecture in _NETWORKS.items():
        member = study.arm(name)
        learnt = parameter_count(member.network)
        total = learnt + sum(leaf.size for leaf in jax.tree.leaves(member.network.stats))
        printed = study.paper.of_arm("parameters", name)
        same = member.experiment.config.model.name == architecture and len(study.findings) == 14
        expected = printed - _KERAS.get(name, 0)
        if same:
            compared += 1
            wrong += [name] if total != expected else []
        rows.append(
            [name, member.experiment.config.model.name, f"{learnt:,}", f"{total:,}", f"{printed:,}",
             f"{total - expected:+,}" if same else "another network"]
        )  # fmt: skip
    columns = ("Arm", "Network", "Learnt", "With batch statistics", "Paper", "Difference")
    text = (
        "The paper counts batch statistics, and of each EfficientNet seven weights of Keras' input normalisation, "
        "which is no layer here: the difference allows for them.",
    )
    claims = []
    if compared == len(rows):
        evidence = "all four agree" if not wrong else f"they differ for {', '.join(wrong)}: see the options"
        claims = [Claim("The networks have the paper's numbers of parameters", "no" if wrong else "yes", evidence)]
    return Section("Parameters", text, tables=[Table("Numbers of parameters.", columns, rows)]), claims


def _uncertainty(study: ArmStudy) -> tuple[Section, dict]:
    """The fusion's stochastic passes over the test part."""
    member, keys = study.arm("fusion"), study.config.study
    passes = _passes(member, keys.passes)
    loss = member.experiment.config.loss.name
    probability = np.stack([probabilities(each, loss) for each in passes])
    found, test = summarize_passes(probability, exclusive=loss == "cross_entropy"), member.test
    flagged = found.per_image > keys.uncertain
    image, k = _example(found, member)
    finding = test.findings[k]
    values = probability[:, image, k]
    figure = Histogram(
        f"The {found.passes} passes of the test image {test.id[image]} for {finding}: mean {values.mean():.4f}, "
        f"standard deviation {values.std():.4f}, uncertainty of the image {found.per_image[image]:.4f}.",
        values, f"probability of {finding}", {"mean": float(values.mean())},
    )  # fmt: skip
    wide = found.entropy.shape[1] > 1
    rows = []
    for k, name in enumerate(test.findings):
        cells = (test.label[:, k], test.label_mask[:, k])
        rows.append(
            [name, float(found.mean[:, k].mean()), float(found.std[:, k].mean()),
             float(found.entropy[:, k].mean()) if wide else None,
             float(found.mutual_information[:, k].mean()) if wide else None,
             number(auroc(test.logit[:, k], *cells)), number(auroc(found.mean[:, k], *cells))]
        )  # fmt: skip
    rows.append(
        ["Mean", *(float(values.mean()) for values in (found.mean, found.std, found.entropy,
                                                       found.mutual_information)), None, None]
    )  # fmt: skip
    example = study.paper.numbers["uncertainty"]
    text = (
        f"{found.passes} passes over {len(test):,} test images, in which only the dropout of the head is random. An "
        "image's uncertainty is the mean over findings of the standard deviations of its passes: "
        f"{found.per_image.mean():.4f} on average, {found.per_image.max():.4f} at most. {int(flagged.sum()):,} images "
        f"({flagged.mean():.1%}) are above {keys.uncertain:g} and are flagged.",
        "Entropy (nats) is of the mean probability, all that is unsure; mutual information the part about which the "
        f"passes disagree. The paper's example: {example['finding']}, probability {example['probability']}, "
        f"uncertainty {example['uncertainty']}, {example['passes']} passes.",
    )
    columns = ("Finding", "Probability", "Standard deviation", "Entropy", "Mutual information", "AUC, one pass without "
               "dropout", "AUC, mean of passes")  # fmt: skip
    numbers = {
        "passes": found.passes, "threshold": keys.uncertain, "flagged": int(flagged.sum()), "images": len(test),
        "mean image uncertainty": float(found.per_image.mean()), "example": str(test.id[image]),
    }  # fmt: skip
    table = Table("Stochastic passes, means over test images.", columns, rows)
    return Section("Uncertainty", text, {"passes": figure}, [table]), numbers


def _passes(member: Member, passes: int) -> np.ndarray:
    experiment, config = member.experiment, member.experiment.config
    examples = experiment.examples("test")
    with progress_bar(f"{passes} stochastic passes", len(examples)) as advance:
        return stochastic_logits(
            member.network, examples, experiment.mesh, size=config.data.size, batch=config.evaluate.batch,
            passes=passes, seed=config.seed, threads=config.data.threads, advance=advance,
        )  # fmt: skip


def _example(found: Uncertainty, member: Member) -> tuple[int, int]:
    """The test image and finding about which the passes differ most, among findings that are there."""
    there = (member.test.label > 0) & member.test.label_mask
    spread = np.where(there, found.std, -1) if there.any() else found.std
    image, k = np.unravel_index(spread.argmax(), spread.shape)
    return int(image), int(k)
