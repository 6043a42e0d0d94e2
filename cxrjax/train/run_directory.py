"""A run directory: its lock, its config, its best network, and the check that a resumed run is the same one."""

import fcntl
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp

from cxrjax import __version__
from cxrjax.config import Config, flatten, from_dict, read_config
from cxrjax.errors import CxrError
from cxrjax.files import write_json
from cxrjax.models import create
from cxrjax.models.input_spec import INPUT_SPECS
from cxrjax.models.network import Network
from cxrjax.train.checkpoint import Checkpoints

# Config keys that may change when a run is resumed, since they do not change its result.
_FREE = ("title", "data.data_dir", "data.num_threads", "model.init_from", "train.log_every_steps",
         "train.checkpoint_every_steps", "train.per_device_batch_size")  # fmt: skip
_FREE_GROUPS = ("mesh.", "evaluate.", "study.", "model.init_members.")


class RunDirectory:
    """A run's directory, locked while training.

    Args:
      directory: created if missing.
      config: of the run.
      identity: what else must stay the same when the run is resumed, see `Experiment.identity`.

    Raises:
      CxrError: another process is training there, or the directory has a run of another config or data.
    """

    def __init__(self, directory: Path, config: Config, identity: dict[str, Any]):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(directory / ".lock")
        try:
            self._claim(config, identity)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _claim(self, config: Config, identity: dict[str, Any]) -> None:
        file = self.directory / "config.json"
        stored = config.to_dict()
        stored["data"]["data_dir"] = str(Path(config.data.data_dir).resolve())  # valid in any working directory
        for split in [stored["split"], *(entry.get("split", {}) for entry in stored["data"]["mixture"].values())]:
            if "files" in split:
                split["files"] = [str(Path(name).resolve()) for name in split["files"]]
        if file.exists() and has_checkpoint(self.directory):
            check_same_config(flatten(read_config(file)), flatten(from_dict(stored)), self.directory)
            check_same_identity(self.directory, identity, whole=True)
        write_json(file, stored)


def has_checkpoint(directory: Path) -> bool:
    """Return whether a run in this directory has a checkpoint to resume from."""
    return any((directory / "checkpoints").glob("last/[0-9]*"))


def check_same_config(stored: dict[str, Any], config: dict[str, Any], directory: Path) -> None:
    """Check that a run can be resumed with a config (both flattened).

    The number of epochs may change, unless the learning rate schedule depends on it.

    Raises:
      CxrError: the configs differ in a key that must stay the same.
    """
    free: list[str] = list(_FREE)
    if config["optimizer.schedule"] != "cosine" and not config["optimizer.warmup_fraction"]:
        free.append("train.epochs")
    differing = [
        key
        for key in sorted({**stored, **config})
        if stored.get(key) != config.get(key) and key not in free and not key.startswith(_FREE_GROUPS)
    ]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more: {', '.join(differing[1:6])})" if differing[1:] else ""
        raise CxrError(
            f"{directory} has a run of another config: {key} is {stored.get(key)!r} there and "
            f"{config.get(key)!r} here{more}; use another --workdir, or the same config to resume"
        )


def check_same_identity(directory: Path, identity: dict[str, Any], *, whole: bool = False) -> None:
    """Check that data, split and microbatch size are those the run started with.

    Other data would give another split, and training patients could end up in the test set.

    Args:
      directory: of the run.
      identity: see `Experiment.identity`.
      whole: whether `identity` is complete; otherwise keys that it lacks are not compared.

    Raises:
      CxrError: they differ.
    """
    file = directory / "run.json"
    stored = json.loads(file.read_text()).get("identity", identity) if file.exists() else identity
    names = dict.fromkeys([*identity, *stored]) if whole else identity
    differing = [name for name in names if stored.get(name) != identity.get(name)]
    if differing:
        name = differing[0]
        fix = "use the prepared data it started with (--data-dir, data.data_dir)"
        if name == "microbatch size":
            fix = f"set train.per_device_batch_size so that, times mesh.data, it is {stored.get(name)} again"
        raise CxrError(
            f"{directory} was trained with another {name}: {stored.get(name)} then, {identity.get(name)} now; "
            f"{fix}, or train in another directory"
        )


def create_network(config: Config, classes: int) -> Network:
    """Return the network that a config describes, with random initial weights."""
    model = config.model
    return Network.from_model(
        create(
            model.name,
            classes=classes,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
            seed=config.seed,
            input_spec=INPUT_SPECS[model.input_spec] if model.input_spec else None,
            **model.options.to_dict(),
        )
    )


def load_best_network(
    directory: Path, sharding: jax.sharding.Sharding | None = None
) -> tuple[Config, tuple[str, ...], Network, dict[str, Any]]:
    """Load the best network of a run; its data are not needed.

    Args:
      directory: run directory.
      sharding: where the arrays are placed; default: one device.

    Returns:
      The run's config, the names of the network's outputs, the network, and the notes of its checkpoint (step,
      val_loss, val_auroc).

    Raises:
      CxrError: not a run, no checkpoint, a checkpoint of another model, or converted weights in the same directory.
    """
    if (directory / "card.json").exists():
        raise CxrError(f"{directory} holds a run and converted weights: move one of them away")
    config = read_config(directory / "config.json")
    try:
        findings = tuple(json.loads((directory / "run.json").read_text())["findings"])
    except (OSError, ValueError, KeyError) as error:
        raise CxrError(f"{directory / 'run.json'} cannot be read ({error}): train the run again") from None
    network = create_network(config, len(findings))
    like = {"params": network.params, "stats": network.stats}
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        arrays, notes = checkpoints.restore_best(like if sharding is None else jax.device_put(like, sharding))
    return config, findings, Network(arrays["params"], arrays["stats"], network.definition), notes


def describe_environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return versions, device and mesh, for `run.json`."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "versions": {"python": platform.python_version(), "cxrjax": __version__}
        | {name: version(name) for name in packages},
        "device": mesh.devices.flat[0].device_kind,
        "devices": int(mesh.devices.size),
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def training_process(directory: Path) -> str:
    """Return the id of the process that is training in a directory; empty if none is."""
    for folder in (directory, *sorted(directory.glob("stages/*"))):
        try:
            with (folder / ".lock").open() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once; `_lock` retries
                except OSError:
                    return handle.read().strip() or "unknown"
        except FileNotFoundError:
            continue
    return ""


def _lock(file: Path) -> IO[str]:
    handle = file.open("a+")
    try:
        _flock(handle)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise CxrError(
            f"another process (id {owner}) is training in {file.parent}: wait for it, or use another --workdir"
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def _flock(handle: IO[str], attempts: int = 5) -> None:
    """Lock the file; the kernel releases it when the process ends, even if killed."""
    for remaining in reversed(range(attempts)):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not remaining:
                raise
            time.sleep(0.05)
