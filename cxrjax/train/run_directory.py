"""The directory of a run: who may write in it, which config it belongs to, and where things lie."""

import fcntl
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax

from cxrjax import __version__
from cxrjax.config import Config, flatten, from_dict
from cxrjax.config import read as read_config
from cxrjax.data.mixture import with_absolute_files
from cxrjax.errors import CxrError
from cxrjax.files import write_json

# What may change between a run's start and its continuation without changing its result.
_FREE = ("title", "data.dir", "data.threads", "model.init_from", "train.log_every", "train.save_every",
         "train.per_device")  # fmt: skip
_FREE_GROUPS = ("mesh.", "evaluate.", "study.")


class RunDirectory:
    """A run's directory, locked while it is open for training.

    Args:
      directory: made if absent.
      config: what is to be trained.
      identity: what else must not change while the run lasts: see `Experiment.identity`.

    Raises:
      CxrError: another process trains there, or what was trained there so far is of another config or other data.
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
        """Let others train here."""
        self._lock.close()

    def _claim(self, config: Config, identity: dict[str, Any]) -> None:
        file = self.directory / "config.json"
        wanted = config.to_dict()
        wanted["data"]["dir"] = str(Path(config.data.dir).resolve())  # found again from any working directory
        wanted["data"]["mix"] = with_absolute_files(config.data.mix)
        wanted["split"]["files"] = [str(Path(name).resolve()) for name in config.split.files]
        if file.exists() and has_checkpoint(self.directory):
            refuse_other(flatten(read_config(file)), flatten(from_dict(wanted)), self.directory)
            same_identity(self.directory, identity, whole=True)
        write_json(file, wanted)


def has_checkpoint(directory: Path) -> bool:
    """Whether a run in this directory has a checkpoint to go on from."""
    return any((directory / "checkpoints").glob("last/[0-9]*"))


def refuse_other(stored: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    """Raise if two configs cannot be of one run.

    More epochs are one run, unless the rate's course depends on their number.
    """
    free: list[str] = list(_FREE)
    if wanted["optimizer.schedule"] != "cosine" and not wanted["optimizer.warmup"]:
        free.append("train.epochs")
    differing = [
        key
        for key in sorted({**stored, **wanted})
        if stored.get(key) != wanted.get(key) and key not in free and not key.startswith(_FREE_GROUPS)
    ]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more: {', '.join(differing[1:6])})" if differing[1:] else ""
        raise CxrError(
            f"{directory} holds a run of another config: {key} is {stored.get(key)!r} there and "
            f"{wanted.get(key)!r} here{more}; choose another --workdir, or the same config to go on"
        )


def same_identity(directory: Path, identity: dict[str, Any], *, whole: bool = False) -> None:
    """Raise if the data, the split or the images at once are not those that the run began with.

    Other data would be split anew, and patients trained on could come to be tested on. With `whole`, the identity is
    all there is, and what it lacks must have been absent then too.
    """
    file = directory / "run.json"
    stored = json.loads(file.read_text()).get("identity", identity) if file.exists() else identity
    names = dict.fromkeys([*identity, *stored]) if whole else identity
    differing = [name for name in names if stored.get(name) != identity.get(name)]
    if differing:
        name = differing[0]
        mend = "give it the prepared data it began with (--data-dir, data.dir)"
        if name == "images at once":
            mend = f"set train.per_device so that, times mesh.data, it is {stored.get(name)} again"
        raise CxrError(
            f"{directory} was trained with another {name}: {stored.get(name)} then, {identity.get(name)} now; "
            f"{mend}, or train in another directory"
        )


def describe_run(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Versions, device and mesh: what `run.json` says beside seeds and fingerprints."""
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


def training_in(directory: Path) -> str:
    """The number of the process that trains in a directory at this moment; empty if none does."""
    for place in (directory, *sorted(directory.glob("stages/*"))):
        try:
            with (place / ".lock").open() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for an instant; `_lock` tries again
                except OSError:
                    return handle.read().strip() or "unknown"
        except FileNotFoundError:
            continue
    return ""


def _lock(file: Path) -> IO[str]:
    handle = file.open("a+")
    try:
        _hold(handle)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise CxrError(
            f"another process (number {owner}) is training in {file.parent}: wait for it, or choose another --workdir"
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def _hold(handle: IO[str], tries: int = 5) -> None:
    """Lock the file; the kernel lets go when the process ends, however it ends."""
    for left in reversed(range(tries)):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not left:
                raise
            time.sleep(0.05)
