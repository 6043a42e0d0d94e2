"""Asynchronous, atomic checkpoints with Orbax: the last states of a run and its best network.

`last/STEP` contains the whole state and the loop's progress; `best/STEP` only what inference needs.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cxrjax.distributed.runtime import main_process_only
from cxrjax.errors import CxrError

Shapes = dict[str, list]


class Checkpoints:
    """The `checkpoints/` folder of a run. As a context manager it waits for pending writes on exit."""

    def __init__(self, directory: Path, *, read_only: bool = False):
        """Open the folder; `read_only` changes nothing in it, even while another process trains."""
        self.directory = directory.resolve()
        if read_only and not (self.directory / "best").is_dir():
            raise CxrError(f"{self.directory / 'best'} is missing: train the run first")
        self._last = _manager(self.directory / "last", keep=2, read_only=read_only)
        self._best = _manager(self.directory / "best", keep=1, read_only=read_only)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._last.close()
        self._best.close()

    @property
    def last_step(self) -> int | None:
        """The step of the newest full checkpoint, or None."""
        return self._last.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Start writing the state; returns when its arrays may be donated, before they are on disk.

        The best network is on disk before the state that refers to it, so no kill can separate them.
        """
        self._best.wait_until_finished()
        if step in self._last.all_steps():  # saved by a stop between an epoch's last step and its validation
            self._last.delete(step)
        _save(self._last, step, state, progress)

    def save_best(self, step: int, network: Any, metadata: dict[str, Any]) -> None:
        """Start writing the best network so far (parameters and statistics)."""
        if step in self._best.all_steps():  # written before a kill by the same steps: bitwise equal
            return
        _save(self._best, step, network, metadata)

    def restore_last(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the newest state, with the shardings of `like`, and its progress; None for a new run."""
        return None if self.last_step is None else _restore(self._last, self.last_step, like)

    def restore_best(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the best network and its metadata.

        Raises:
          CxrError: there is none yet, or it is of another model.
        """
        step = self._best.latest_step()
        if step is None:
            raise CxrError(f"{self.directory / 'best'} has no checkpoint yet: train the run first")
        return _restore(self._best, step, like)

    def wait(self) -> None:
        """Wait for pending writes; errors of the writing threads are raised here."""
        self._last.wait_until_finished()
        self._best.wait_until_finished()


def _manager(directory: Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    only = {}
    if main_process_only():  # else Orbax waits for all processes
        only = {"active_processes": {jax.process_index()}, "barrier_sync_key_prefix": "alone"}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=not read_only, create=not read_only, read_only=read_only,
        multiprocessing_options=ocp.options.MultiprocessingOptions(**only),
    )  # fmt: skip
    return ocp.CheckpointManager(directory, options=options, item_names=("state", "about"))


def _save(manager: ocp.CheckpointManager, step: int, tree: Any, metadata: dict[str, Any]) -> None:
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave({"about": metadata, "shapes": _shapes(tree)})
    )
    manager.save(step, args=items, force=True)


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    folder = Path(manager.directory) / str(step)
    try:
        metadata = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        _check_same_model(metadata["shapes"], _shapes(like), folder)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        tree = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CxrError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {reason}); delete that folder to resume "
            "from the previous one, or train again in another directory"
        ) from error
    return tree, metadata["about"]


def _shapes(tree: Any) -> Shapes:
    return {
        jax.tree_util.keystr(path): [list(np.shape(leaf)), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_same_model(stored: Shapes, expected: Shapes, folder: Path) -> None:
    differing = [key for key in {**stored, **expected} if stored.get(key) != expected.get(key)]
    if differing:
        key = differing[0]
        raise CxrError(
            f"checkpoint {folder} is of another model: {len(differing)} of {len(expected)} arrays differ, first {key}: "
            f"stored {stored.get(key, 'nothing')}, this config's model has {expected.get(key, 'nothing')}; "
            "use the config it was trained with, or another directory"
        )
