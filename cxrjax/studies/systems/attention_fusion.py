"""Attention fusion: parameter counts beside the paper's, and uncertainty by Monte Carlo dropout."""

import jax
import numpy as np

from cxrjax.console import progress_bar
from cxrjax.inference.mc_dropout import Uncertainty, stochastic_logits, summarize_passes
from cxrjax.metrics.auc import auroc
from cxrjax.metrics.predictions import probabilities
from cxrjax.models.network import parameter_count
from cxrjax.report.content import Claim, Histogram, Section, Table
from cxrjax.studies.members import Member
from cxrjax.studies.sections import nan_to_none
from cxrjax.studies.study import Study, System, SystemResults

_NETWORKS = {
    "simple_cnn": "simple_cnn", "densenet121": "densenet121", "efficientnet_b0": "efficientnet_b0",
    "fusion": "attention_fusion",
}  # fmt: skip
# Keras counts the weights of its EfficientNets' input normalisation (mean, variance, count), which is not a layer here.
_KERAS_EXTRA = {"efficientnet_b0": 7, "fusion": 7}


class AttentionFusion(System):
    """Three single networks and their fusion by attention."""

    required_arms = tuple(_NETWORKS)

    def summarize(self, study: Study) -> SystemResults:
        """Return parameter counts and uncertainty, and test whether the fusion beats each single network."""
        counts, count_claims = _parameter_counts(study)
        uncertainty, numbers = _uncertainty(study)
        claims = [
            study.better_claim("fusion", name, f"The fusion is better than {name}")
            for name in _NETWORKS
            if name != "fusion"
        ]
        return SystemResults([counts, uncertainty], [*claims, *count_claims], numbers={"uncertainty": numbers})


def _parameter_counts(study: Study) -> tuple[Section, list[Claim]]:
    rows, different, compared = [], [], 0
    for name, architecture in _NETWORKS.items():
        member = study.arm(name)
        model, trainable = member.experiment.config.model.name, parameter_count(member.network)
        total = trainable + sum(leaf.size for leaf in jax.tree.leaves(member.network.stats))
        printed = study.paper.for_arm("parameters", name)
        expected = printed - _KERAS_EXTRA.get(name, 0)
        same_network = model == architecture and len(study.findings) == 14
        if same_network:
            compared += 1
            different += [name] if total != expected else []
        comparison = f"{total - expected:+,}" if same_network else "another network"
        rows.append([name, model, f"{trainable:,}", f"{total:,}", f"{printed:,}", comparison])
    columns = ("Arm", "Network", "Parameters", "With batch statistics", "Paper", "Difference")
    text = (
        "The paper counts batch statistics, and for each EfficientNet seven weights of Keras' input normalisation, "
        "which is not a layer here. The difference accounts for them.",
    )
    claims = []
    if compared == len(rows):
        evidence = f"they differ for {', '.join(different)}: see the options" if different else "all four agree"
        claims = [Claim("The networks have the paper's numbers of parameters", "no" if different else "yes", evidence)]
    return Section("Parameters", text, tables=[Table("Numbers of parameters.", columns, rows)]), claims


def _uncertainty(study: Study) -> tuple[Section, dict]:
    """Summarize the fusion's stochastic passes over the test split."""
    member, keys = study.arm("fusion"), study.config.study
    loss, test = member.experiment.config.loss.name, member.test
    probability = np.stack([probabilities(logits, loss) for logits in _stochastic_passes(member, keys.passes)])
    result = summarize_passes(probability, exclusive=loss == "cross_entropy")
    flagged = result.per_image > keys.uncertain
    image, example_k = _most_uncertain(result, member)
    values = probability[:, image, example_k]
    figure = Histogram(
        f"The {result.passes} passes of the test image {test.id[image]} for {test.findings[example_k]}: mean "
        f"{values.mean():.4f}, standard deviation {values.std():.4f}, uncertainty of the image "
        f"{result.per_image[image]:.4f}.",
        values, f"probability of {test.findings[example_k]}", {"mean": float(values.mean())},
    )  # fmt: skip
    per_finding = result.entropy.shape[1] > 1
    rows = []
    for k, name in enumerate(test.findings):
        labels = (test.label[:, k], test.label_mask[:, k])
        rows.append(
            [name, float(result.mean[:, k].mean()), float(result.std[:, k].mean()),
             float(result.entropy[:, k].mean()) if per_finding else None,
             float(result.mutual_information[:, k].mean()) if per_finding else None,
             nan_to_none(auroc(test.logit[:, k], *labels)), nan_to_none(auroc(result.mean[:, k], *labels))]
        )  # fmt: skip
    means = (result.mean, result.std, result.entropy, result.mutual_information)
    rows.append(["Mean", *(float(values.mean()) for values in means), None, None])
    example = study.paper.numbers["uncertainty"]
    text = (
        f"{result.passes} passes over {len(test):,} test images, in which only the dropout of the head is random. The "
        "uncertainty of an image is the standard deviation over its passes, averaged over findings: "
        f"{result.per_image.mean():.4f} on average, {result.per_image.max():.4f} at most. {int(flagged.sum()):,} "
        f"images ({flagged.mean():.1%}) exceed {keys.uncertain:g} and are flagged.",
        "The entropy (in nats) of the mean probability measures the total uncertainty; mutual information is the share "
        f"that comes from disagreement between passes. The paper's example: {example['finding']}, probability "
        f"{example['probability']}, uncertainty {example['uncertainty']}, {example['passes']} passes.",
    )
    columns = ("Finding", "Probability", "Standard deviation", "Entropy", "Mutual information", "AUC, one pass without "
               "dropout", "AUC, mean of passes")  # fmt: skip
    numbers = {
        "passes": result.passes, "threshold": keys.uncertain, "flagged": int(flagged.sum()), "images": len(test),
        "mean image uncertainty": float(result.per_image.mean()), "example": str(test.id[image]),
    }  # fmt: skip
    table = Table("Stochastic passes, means over test images.", columns, rows)
    return Section("Uncertainty", text, {"passes": figure}, [table]), numbers


def _stochastic_passes(member: Member, passes: int) -> np.ndarray:
    """Return test logits f[T, N, K] of T stochastic passes."""
    experiment, config = member.experiment, member.experiment.config
    examples = experiment.examples("test")
    with progress_bar(f"{passes} stochastic passes", len(examples)) as advance:
        return stochastic_logits(
            member.network, examples, experiment.mesh, size=config.data.image_size, batch=config.evaluate.batch_size,
            passes=passes, seed=config.seed, threads=config.data.num_threads, advance=advance,
        )  # fmt: skip


def _most_uncertain(result: Uncertainty, member: Member) -> tuple[int, int]:
    """Return the test image and finding on which the passes differ most; positive labels only, if there are any."""
    positive = (member.test.label > 0) & member.test.label_mask
    spread = np.where(positive, result.std, -1) if positive.any() else result.std
    image, k = np.unravel_index(spread.argmax(), spread.shape)
    return int(image), int(k)
