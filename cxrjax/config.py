"""One config for every run: all keys with their defaults, recipes that change some, overrides that are checked.

A recipe is a Python file with `get_config(arg="")` that starts from `default()`, changes values and returns the result.
"""

import ast
import difflib
import json
import math
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from cxrjax.errors import CxrError

Config: TypeAlias = Any  # a ConfigDict: its attributes are whatever was put into it, so to a type checker it is Any

RECIPES = Path(__file__).resolve().parents[1] / "configs"

CHOICES = {
    "data.uncertain": ("zeros", "ones", "ignore", "smooth"),
    "data.not_mentioned": ("negative", "unknown"),
    "data.sampling": ("shuffle", "balanced"),
    "split.name": ("official", "random", "stratified", "folds", "small", "files"),
    "split.by": ("patient", "image"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "layer", "block", "full"),
    "model.inputs": ("", "imagenet", "imagenet-grey", "unit", "unit-grey", "grey", "xrv"),
    "optimizer.name": ("adam", "adamw", "sgd"),
    "optimizer.schedule": ("constant", "cosine", "plateau"),
    "loss.name": ("bce", "weighted_bce", "focal", "cross_entropy", "softmax"),
    "train.watch": ("val_loss", "val_auroc", "val_accuracy"),
    "train.heads": ("joint", "alternating"),
    "train.statistics": ("auto", "batch", "frozen"),
    "study.erf_estimator": ("exact", "probe", "sum"),
    "study.paper": ("", "resolution"),
}

# Groups whose keys belong to what was chosen, which checks them.
OPEN_GROUPS = ("model.options.", "loss.options.")

# key: lowest, highest
RANGES = {
    "data.size": (1, math.inf), "data.threads": (1, math.inf), "train.batch": (1, math.inf),
    "train.per_device": (0, math.inf), "train.epochs": (1, math.inf), "train.steps_per_epoch": (0, math.inf),
    "train.patience": (0, math.inf), "train.save_every": (0, math.inf), "train.log_every": (1, math.inf),
    "optimizer.rate": (1e-300, math.inf), "optimizer.epsilon": (1e-300, math.inf), "optimizer.warmup": (0, 1),
    "optimizer.factor": (0, 1), "optimizer.plateau": (1, math.inf), "optimizer.decay": (0, math.inf),
    "optimizer.clip": (0, math.inf), "evaluate.batch": (1, math.inf), "evaluate.resamples": (0, math.inf),
    "evaluate.confidence": (0.01, 0.9999), "split.folds": (2, math.inf), "split.fold": (0, math.inf),
    "split.share": (1e-9, 1), "study.erf_images": (1, math.inf), "seed": (0, math.inf),
}  # fmt: skip


def default() -> Config:
    """Every key a run knows, with its default and meaning."""
    config: Config = ConfigDict()
    config.title = ""  # shown in reports
    config.seed = 0  # initial weights, order of the records, augmentation

    config.data = ConfigDict()
    config.data.dataset = "cxr_phantom"  # as `cxrjax prepare DATASET` wrote it
    config.data.dir = "data"  # the --data-dir of prepare
    config.data.stored = "256"  # which prepared size is read: native, 1024, ...
    config.data.size = 256  # what the network sees: size x size px
    config.data.findings = ()  # a subset, by name; empty: all of data.dataset
    config.data.views = ()  # for example ("PA", "AP"); empty: all
    config.data.uncertain = "zeros"  # -1 counts as: zeros | ones | ignore (masked) | smooth (drawn from interval)
    config.data.interval = (0.55, 0.85)  # of smooth; (0.0, 0.3) smooths towards zero
    config.data.not_mentioned = "negative"  # -2 counts as: negative | unknown (masked)
    config.data.exceptions = ()  # findings with rules of their own: "Edema; uncertain=ones; not_mentioned=unknown"
    config.data.mix = ()  # further data sets, with changes of their own: "mimic_cxr_jpg; split.name=official"
    config.data.weights = ()  # parts of the training draws that data.dataset and those of mix have; empty: as they are
    config.data.sampling = "shuffle"  # shuffle (each once an epoch) | balanced (findings, and none, equally often)
    config.data.threads = 2  # decoding threads

    config.split = ConfigDict()
    config.split.name = "random"  # official | random | stratified | folds | small | files, always by patient
    config.split.seed = 0
    config.split.fractions = (0.7, 0.1, 0.2)  # of patients: train, validation, test
    config.split.files = ()  # one CSV `id,split`, or the three lists of train, validation, test
    config.split.sizes = ()  # images per part, for `small`
    config.split.folds = 5  # for `folds`: how many, ...
    config.split.fold = 0  # ... and which of them, from 0, is for testing
    config.split.by = "patient"  # stratified also: image (a patient may then be in two parts: leakage)
    config.split.share = 1.0  # of the patients; the others are in no part

    config.augment = ConfigDict()
    config.augment.flip = 0.0  # probability of mirroring left and right
    config.augment.rotation = 0.0  # degrees, uniform in +-
    config.augment.shift = 0.0  # fraction of the side, uniform in +-
    config.augment.zoom = 0.0  # fraction, uniform in 1 +-
    config.augment.shear = 0.0  # radians, uniform in +-
    config.augment.brightness = 0.0  # fraction, uniform in 1 +-

    config.model = ConfigDict()
    config.model.name = "densenet_small"
    config.model.dtype = "float32"  # what the network computes in; parameters stay float32
    config.model.remat = "none"  # none | layer | block | full: what is recomputed instead of kept, for memory
    config.model.inputs = (
        ""  # how grey is scaled and normalised: imagenet | unit | grey | xrv; empty: the network's own
    )
    config.model.init_from = ""  # directory of `cxrjax weights convert`; empty: random initial values
    config.model.options = ConfigDict()  # of the model's family, checked by it

    config.loss = ConfigDict()
    # bce | weighted_bce | focal: a finding at a time; cross_entropy: over exclusive classes; softmax: over others
    config.loss.name = "bce"
    config.loss.options = ConfigDict()  # weighting, alpha, gamma: see cxrjax.train.losses.make_loss

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # adam | adamw | sgd (momentum beta1)
    config.optimizer.rate = 1e-3
    config.optimizer.rates = ""  # factors on the rate by module, such as "backbone=0.1, denseblock4=0.5"
    config.optimizer.schedule = "constant"  # constant | cosine | plateau
    config.optimizer.warmup = 0.0  # fraction of all steps with a rising rate
    config.optimizer.factor = 0.5  # plateau: rate times this ...
    config.optimizer.plateau = 3  # ... when the validation loss has not fallen for so many epochs
    config.optimizer.decay = 0.0  # adamw: weight decay
    config.optimizer.clip = 0.0  # global norm of the gradient; 0: not clipped
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8

    config.train = ConfigDict()
    config.train.batch = 32  # effective: devices x per_device x accumulated steps
    config.train.per_device = 0  # images on a device at once; 0: as many as the batch gives
    config.train.epochs = 10
    config.train.steps_per_epoch = 0  # 0: every training record once
    config.train.stages = ()  # runs in a row, each with its changes: "train.freeze=backbone; optimizer.rate=1e-3"
    config.train.freeze = ""  # modules that do not learn, separated by commas; backbone: all but the head
    config.train.statistics = "auto"  # of norms: batch | frozen (running ones, untouched); auto: frozen with backbone
    config.train.heads = "joint"  # of networks with several heads: joint (the sum of losses) | alternating, by step
    config.train.watch = "val_auroc"  # val_auroc | val_loss | val_accuracy: chooses the best checkpoint
    config.train.patience = 0  # stop after so many epochs without a better one; 0: never
    config.train.save_every = 0  # steps between checkpoints inside an epoch; 0: each epoch's end only
    config.train.log_every = 20  # steps between lines of metrics.jsonl

    config.mesh = ConfigDict()
    config.mesh.data = 0  # devices that share a batch; 0: all that are left
    config.mesh.space = 1  # devices that share the rows of an image

    config.evaluate = ConfigDict()
    config.evaluate.batch = 32
    config.evaluate.resamples = 1000  # of the patients, for the intervals
    config.evaluate.confidence = 0.95

    config.study = ConfigDict()
    config.study.arms = ()  # each is a run of this recipe with that argument
    config.study.sizes = ()  # each is a run of this recipe with that argument
    config.study.seeds = (0,)
    config.study.folds = ()  # of split.name=folds, each a run a size; empty: the config's own split only
    config.study.paper = ""  # resolution: its claims and numbers stand beside the study's; empty: none
    config.study.fine = ()  # findings expected to gain with resolution
    config.study.coarse = ()  # findings expected not to
    config.study.control = ()  # findings of the control run; empty: no control
    config.study.control_size = 0
    config.study.erf_images = 32
    config.study.erf_estimator = "probe"  # exact | probe | sum
    config.study.passes = 100  # of Monte Carlo dropout
    config.study.uncertain = 0.1  # standard deviation of the passes above which an image is flagged
    config.lock()
    for group in (config.model.options, config.loss.options):
        group.unlock()
    return config


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `--config.key=value` overrides.

    Args:
      spec: `FILE` or `FILE:ARG`; a bare name means a recipe that comes with the project.
      overrides: `key=value` or `--config.key=value`; the value has the key's type.

    Raises:
      CxrError: no such file, an unknown key (with the nearest right one), a value of the wrong type.
    """
    path, _, argument = spec.partition(":")
    file = next((f for f in (Path(path), RECIPES / f"{path}.py") if f.is_file()), None)
    if file is None:
        known = ", ".join(sorted(f.stem for f in RECIPES.glob("[a-z]*.py")))
        raise CxrError(f"no config file {path}; recipes that come with the project: {known}")
    try:
        recipe = runpy.run_path(str(file)).get("get_config")
        if recipe is None:
            raise CxrError(f"{file} has no function get_config(arg='')")
        config = recipe(argument)
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise CxrError(f"{file}: {_one_line(error)}") from error
    _reject_unknown(config, str(file))
    missing = [key for key in flatten(default()) if key not in flatten(config)]
    if missing:
        raise CxrError(f"{file}: the config lacks {', '.join(missing)}: start from cxrjax.config.default()")
    return with_overrides(config, overrides)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of a config with some keys changed, checked as `load` checks them."""
    changed = config.copy_and_resolve_references()
    for override in overrides:
        _override(changed, override.removeprefix("--config."))
    return validate(changed)


def read(file: Path) -> Config:
    """The config that a run wrote beside its results (`config.json`); keys newer than the run have their defaults."""
    try:
        stored = json.loads(file.read_text())
    except FileNotFoundError:
        raise CxrError(f"{file} is missing: {file.parent} is not the directory of a run") from None
    except json.JSONDecodeError as error:
        raise CxrError(f"{file} is not JSON ({error}): restore it, or train again in another directory") from None
    _reject_unknown(ConfigDict(stored), str(file))
    return from_dict(stored)


def from_dict(values: dict[str, Any]) -> Config:
    """The config with these values, groups nested; lists, which is what JSON has, become tuples."""
    config = default()
    for key, value in flatten(ConfigDict(values)).items():
        _set(config, key, tuple(value) if isinstance(value, list) else value)
    return validate(config)


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """The config as `{'a.b': value}`; an empty group has no entry."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return flat


def validate(config: Config) -> Config:
    """Check the values that can be checked without data; returns the config."""
    flat = flatten(config)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = difflib.get_close_matches(str(flat[key]), choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CxrError(f"config key {key} is {flat[key]!r}, and must be one of {', '.join(choices)}{hint}")
    for key, (low, high) in RANGES.items():
        if not low <= flat[key] <= high:
            most = "" if high == math.inf else f" and at most {high}"
            raise CxrError(f"config key {key} is {flat[key]}, and must be at least {low}{most}")
    return config


def _reject_unknown(config: Config, where: str) -> None:
    if not isinstance(config, ConfigDict):
        raise CxrError(f"{where}: get_config returned {type(config).__name__}, not a ConfigDict: start from default()")
    known = flatten(default())
    for key in flatten(config):
        if key not in known and not key.startswith(OPEN_GROUPS):
            raise CxrError(f"{where}: {_unknown(key)}")


def _unknown(key: str) -> str:
    known = list(flatten(default()))
    leaf = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = near or [leaf[m] for m in difflib.get_close_matches(key.rpartition(".")[2], list(leaf), 1, 0.5)]
    return f"unknown config key {key}" + (
        f"; did you mean {near[0]}?" if near else "; `cxrjax train --help` lists them"
    )


def _override(config: Config, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise CxrError(f"override --config.{override} has no value: write --config.{key}=VALUE")
    known = flatten(config)
    if key not in known and not key.startswith(OPEN_GROUPS):
        raise CxrError(_unknown(key))
    value: Any = text
    if not isinstance(known.get(key), str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            value = text
    if isinstance(known.get(key), tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    _set(config, key, value)


def _set(config: Config, key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    node: Any = config
    for number, group in enumerate(groups, start=1):
        if group not in node:  # only an open group may hold what the defaults do not
            with node.unlocked():
                node[group] = ConfigDict()
        node = node[group]
        if not isinstance(node, ConfigDict):
            above = ".".join(groups[:number])
            raise CxrError(f"config key {key} is inside {above}, which is {node!r} and holds no keys: set that, whole")
    held: Any = node.get(leaf)
    if isinstance(held, ConfigDict) and not isinstance(value, dict):
        inside = ", ".join(held) or "none"
        raise CxrError(f"config key {key} holds keys ({inside}): set one of them, or all as a dict, not {value!r}")
    try:
        with node.unlocked():
            node[leaf] = value
    except TypeError:
        wanted = type(node[leaf]).__name__
        raise CxrError(f"config key {key} takes a value of type {wanted}, not {value!r}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())
