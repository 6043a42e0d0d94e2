"""The directory of a run: who may write in it, which config it belongs to, and where things lie."""

import fcntl
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax

from cxrjax.config import Config, flatten
from cxrjax.config import read as read_config
from cxrjax.errors import CxrError
from cxrjax.files import write_json

# What may change between a run's start and its continuation without changing its result.
_FREE = ("title", "data.dir", "data.threads", "train.log_every", "train.save_every", "train.per_device")
_FREE_GROUPS = ("mesh.", "evaluate.", "study.")


class Run:
    """A run's directory, locked while it is open for training.

    Raises:
      CxrError: another process trains there, or the directory belongs to another config.
    """

    def __init__(self, directory: Path, config: Config):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(directory / ".lock")
        try:
            self._claim(config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others train here."""
        self._lock.close()

    def _claim(self, config: Config) -> None:
        file = self.directory / "config.json"
        if file.exists():
            refuse_other(flatten(read_config(file)), flatten(config), self.directory)
        stored = config.to_dict()
        stored["data"]["dir"] = str(Path(config.data.dir).resolve())  # found again from any working directory
        write_json(file, stored)


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


def describe_run(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Versions, device and mesh: what `run.json` says beside seeds and fingerprints."""
    packages = ("cxrjax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": mesh.devices.flat[0].device_kind,
        "devices": int(mesh.devices.size),
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _lock(file: Path) -> IO[str]:
    handle = file.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process ends, however it ends
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
