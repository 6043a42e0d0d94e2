"""Every config key with its default, meaning and accepted values; checks, help and docs are made from this table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from cxrjax.errors import CxrError


@dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
      default: the value without a recipe; its type is the type of the key.
      meaning: shown by `cxrjax config` and in docs/configuration.md.
      choices: the values it accepts; empty for any value of its type.
      minimum, maximum: bounds of a number, inclusive.
      element: the type of a tuple's elements.
    """

    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    minimum: float = -math.inf
    maximum: float = math.inf
    element: type = str

    @property
    def type_name(self) -> str:
        """The type as errors and docs call it."""
        name = type(self.default).__name__
        return f"tuple of {self.element.__name__}" if name == "tuple" else name

    def check(self, name: str, value: Any) -> Any:
        """Return the value in the key's type.

        Raises:
          CxrError: a value of another type, NaN, or one out of range; the message names the key and the expected type.
        """
        if isinstance(self.default, tuple):
            if not isinstance(value, tuple | list):
                raise self._wrong(name, value)
            return tuple(_in_type(item, self.element, lambda: self._wrong(name, value)) for item in value)
        value = _in_type(value, type(self.default), lambda: self._wrong(name, value))
        if self.choices and value not in self.choices:
            near = get_close_matches(str(value), self.choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CxrError(f"config key {name} is {value!r}, and must be one of {', '.join(self.choices)}{hint}")
        if isinstance(value, int | float) and not self.minimum <= value <= self.maximum:
            limit = "" if self.maximum == math.inf else f" and at most {self.maximum:g}"
            raise CxrError(f"config key {name} is {value}, and must be at least {self.minimum:g}{limit}")
        return value

    def _wrong(self, name: str, value: Any) -> CxrError:
        return CxrError(f"config key {name} takes a value of type {self.type_name}, not {value!r}")


@dataclass(frozen=True)
class Group:
    """A config key whose entries are chosen by the user: a nested config, empty by default."""

    meaning: str


def _in_type(value: Any, type_: type, error: Callable[[], CxrError]) -> Any:
    """The value as `type_`: an int is a float too, a bool is no number, and NaN is refused."""
    if type_ is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type_ or (type_ is float and math.isnan(value)):
        raise error()
    return value


KEYS: dict[str, Key | Group] = {
    "title": Key("", "title of reports"),
    "seed": Key(0, "seed of initial weights, record order and augmentation", minimum=0),
    # Data
    "data.dataset": Key("cxr_phantom", "data set, as `cxrjax prepare DATASET` wrote it"),
    "data.data_dir": Key("data", "the --data-dir of prepare"),
    "data.stored_size": Key("256", "prepared size to read: native, 1024, ..."),
    "data.image_size": Key(256, "side of the network's input in px", minimum=1),
    "data.findings": Key((), "findings to learn, by name; empty: all of data.dataset"),
    "data.views": Key((), "views to keep, such as PA,AP; empty: all"),
    "data.sampling": Key(
        "shuffle", "shuffle: each record once an epoch; balanced: every finding, and none, equally often",
        choices=("shuffle", "balanced"),
    ),
    "data.mixture": Group(
        "further data sets by name, each with its own `weight`, `data.stored_size`, `data.views`, `labels` and `split`"
    ),
    "data.weight": Key(
        0.0, "share of training draws from data.dataset in a mixture; 0: all data sets as one", minimum=0, maximum=1e9
    ),
    "data.num_threads": Key(2, "decoding threads", minimum=1),
    # Labels
    "labels.uncertain": Key(
        "zeros", "uncertain labels (-1): zeros, ones, ignore (masked) or smooth (drawn from labels.smooth_range)",
        choices=("zeros", "ones", "ignore", "smooth"),
    ),
    "labels.smooth_range": Key(
        (0.55, 0.85), "interval of `smooth`; 0.0,0.3 smooths towards zero", element=float
    ),
    "labels.not_mentioned": Key(
        "negative", "labels that are not mentioned (-2) count as negative or unknown (masked)",
        choices=("negative", "unknown"),
    ),
    "labels.per_finding": Group(
        "findings with rules of their own, each with `uncertain`, `smooth_range` and `not_mentioned`"
    ),
    # Split
    "split.name": Key(
        "random", "how records are split, always by patient",
        choices=("official", "random", "stratified", "folds", "small", "files"),
    ),
    "split.seed": Key(0, "seed of the split", minimum=0),
    "split.fractions": Key((0.7, 0.1, 0.2), "fractions of patients: train, validation, test", element=float),
    "split.files": Key((), "for `files`: one CSV with columns id and split, or lists of train, validation and test"),
    "split.sizes": Key((), "for `small`: images per split", element=int),
    "split.folds": Key(5, "for `folds`: number of folds", minimum=2),
    "split.fold": Key(0, "for `folds`: the test fold, from 0", minimum=0),
    "split.by": Key(
        "patient", "unit of `stratified`; with image a patient may be in two splits (leakage)",
        choices=("patient", "image"),
    ),
    "split.subset_fraction": Key(1.0, "fraction of the patients to use", minimum=1e-9, maximum=1),
    # Augmentation
    "augment.flip": Key(0.0, "probability of a horizontal flip", minimum=0, maximum=1),
    "augment.rotation": Key(0.0, "degrees, uniform in +-", minimum=0),
    "augment.shift": Key(0.0, "fraction of the side, uniform in +-", minimum=0),
    "augment.zoom": Key(0.0, "fraction, uniform in 1 +-", minimum=0),
    "augment.shear": Key(0.0, "radians, uniform in +-", minimum=0),
    "augment.brightness": Key(0.0, "fraction, uniform in 1 +-", minimum=0),
    # Network
    "model.name": Key("densenet_small", "network, see `cxrjax models`"),
    "model.dtype": Key("float32", "compute type; parameters stay float32", choices=("float32", "bfloat16")),
    "model.remat": Key(
        "none", "what the backward pass recomputes instead of storing", choices=("none", "layer", "block", "full")
    ),
    "model.input_spec": Key(
        "", "how grey values are scaled and normalised; empty: the network's own",
        choices=("", "imagenet", "imagenet-grey", "unit", "unit-grey", "grey", "xrv"),
    ),
    "model.init_from": Key("", "directory of converted weights or of a run to start from; empty: random weights"),
    "model.init_members": Group("for networks made of several: such a directory for each member"),
    "model.options": Group("options of the network, checked by it"),
    # Loss
    "loss.name": Key(
        "bce", "bce, weighted_bce, focal: per finding; cross_entropy: exclusive classes; softmax: over other findings",
        choices=("bce", "weighted_bce", "focal", "cross_entropy", "softmax"),
    ),
    "loss.options": Group("options of the loss: weighting, alpha, gamma"),
    # Optimizer
    "optimizer.name": Key("adam", "sgd uses beta1 as momentum", choices=("adam", "adamw", "sgd")),
    "optimizer.learning_rate": Key(1e-3, "peak learning rate", minimum=1e-300),
    "optimizer.lr_multipliers": Group("factors on the learning rate by module, such as backbone: 0.1"),
    "optimizer.schedule": Key(
        "constant", "course of the learning rate", choices=("constant", "cosine", "plateau")
    ),
    "optimizer.warmup_fraction": Key(0.0, "fraction of all steps with a linear warm-up", minimum=0, maximum=1),
    "optimizer.plateau_factor": Key(0.5, "for `plateau`: factor on the learning rate", minimum=0, maximum=1),
    "optimizer.plateau_patience": Key(
        3, "for `plateau`: epochs without a lower validation loss before the factor applies", minimum=1
    ),
    "optimizer.weight_decay": Key(0.0, "for adamw", minimum=0),
    "optimizer.grad_clip_norm": Key(0.0, "largest global norm of the gradient; 0: no clipping", minimum=0),
    "optimizer.beta1": Key(0.9, "decay of the first moment", minimum=0, maximum=1),
    "optimizer.beta2": Key(0.999, "decay of the second moment", minimum=0, maximum=1),
    "optimizer.epsilon": Key(1e-8, "term added to the denominator", minimum=1e-300),
    # Training
    "train.batch_size": Key(
        32, "effective batch: devices x per_device_batch_size x accumulation steps", minimum=1
    ),
    "train.per_device_batch_size": Key(0, "images on a device at once; 0: no gradient accumulation", minimum=0),
    "train.epochs": Key(10, "number of epochs", minimum=1),
    "train.steps_per_epoch": Key(0, "optimizer steps per epoch; 0: every training record once", minimum=0),
    "train.stages": Group(
        "training stages by name, run in alphabetical order; each is a nested config of the keys it changes"
    ),
    "train.freeze": Key((), "modules that are not trained; backbone: all but the head"),
    "train.batch_norm": Key(
        "auto", "batch norm uses batch or frozen running statistics; auto: frozen if the backbone is",
        choices=("auto", "batch", "frozen"),
    ),
    "train.heads": Key(
        "joint", "networks with several heads train on the sum of losses, or alternate by step",
        choices=("joint", "alternating"),
    ),
    "train.monitor": Key(
        "val_auroc", "metric that chooses the best checkpoint", choices=("val_loss", "val_auroc", "val_accuracy")
    ),
    "train.early_stopping_patience": Key(0, "epochs without a better metric before stopping; 0: never", minimum=0),
    "train.checkpoint_every_steps": Key(0, "steps between checkpoints; 0: at the end of each epoch only", minimum=0),
    "train.log_every_steps": Key(20, "steps between lines of metrics.jsonl", minimum=1),
    # Devices
    "mesh.data": Key(0, "devices that share a batch; 0: all that are left", minimum=0),
    "mesh.space": Key(1, "devices that share the rows of an image", minimum=1),
    # Evaluation
    "evaluate.batch_size": Key(32, "images at once, over all devices", minimum=1),
    "evaluate.bootstrap_resamples": Key(1000, "bootstrap draws of patients for intervals; 0: no intervals", minimum=0),
    "evaluate.confidence_level": Key(0.95, "confidence level of intervals", minimum=0.01, maximum=0.9999),
    # Studies
    "study.arms": Key((), "arms of the study: arguments of the recipe, one run each"),
    "study.sizes": Key((), "image sizes of the study, one run each", element=int),
    "study.seeds": Key((0,), "training seeds of the study", element=int),
    "study.folds": Key((), "test folds of the study; empty: the config's own split", element=int),
    "study.paper": Key("", "paper to compare with; empty: none", choices=("", "resolution")),
    "study.fine": Key((), "findings expected to gain from resolution"),
    "study.coarse": Key((), "findings not expected to gain"),
    "study.control": Key((), "findings of the control run; empty: no control"),
    "study.control_size": Key(0, "image size of the control run; 0: the largest", minimum=0),
    "study.erf_images": Key(32, "images for the effective receptive field", minimum=1),
    "study.erf_estimator": Key(
        "probe", "estimator of the effective receptive field", choices=("exact", "probe", "sum")
    ),
    "study.passes": Key(100, "Monte Carlo dropout passes", minimum=0),
    "study.uncertain": Key(
        0.1, "standard deviation over the passes above which an image is flagged", minimum=0
    ),
}  # fmt: skip
"""In the order in which they are shown."""

_MIXTURE_KEYS = ("data.stored_size", "data.views", "labels.", "split.")
"""Keys that each data set of a mixture may set for itself."""


def find_key(name: str) -> Key | None:
    """Return the key of a dotted name, which may lie inside a group; None where a group takes any value.

    Raises:
      KeyError: there is no such key.
    """
    if isinstance(key := KEYS.get(name), Key):
        return key
    group = find_group(name)
    inside = name.removeprefix(f"{group}.").partition(".")[2]
    if group in ("model.options", "loss.options"):
        return None
    if group == "model.init_members" and not inside:
        return Key("", "")
    if group == "optimizer.lr_multipliers":
        return Key(1.0, "", minimum=1e-300, maximum=1e300)
    if group == "labels.per_finding" and inside in ("uncertain", "smooth_range", "not_mentioned"):
        return find_key(f"labels.{inside}")
    if group == "data.mixture" and inside == "weight":
        return find_key("data.weight")
    if group == "data.mixture" and inside.startswith(_MIXTURE_KEYS):
        return find_key(inside)
    if group == "train.stages" and inside and not inside.startswith(("train.stages", "model.init_")):
        return find_key(inside)  # a stage starts from the one before it, so it cannot set model.init_from
    raise KeyError(name)


def find_group(name: str) -> str:
    """Return the group that a dotted name lies in; empty if it lies in none."""
    groups = (group for group, value in KEYS.items() if isinstance(value, Group))
    return next((group for group in groups if name.startswith(f"{group}.")), "")
