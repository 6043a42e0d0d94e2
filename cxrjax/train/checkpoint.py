"""Checkpoints through Orbax, asynchronous and atomic: the last states of a run, and its best network.

`last/STEP` holds the whole state and the loop's progress; `best/STEP` only what inference needs.
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
    """The `checkpoints/` folder of a run. Use as a context manager: leaving it waits for writes under way."""

    def __init__(self, directory: Path, *, reading: bool = False):
        """Open the folder; `reading` leaves it as it is, also while another process trains in it."""
        self.directory = directory.resolve()
        if reading and not (self.directory / "best").is_dir():
            raise CxrError(f"{self.directory / 'best'} is missing: train the run first")
        self._last = _manager(self.directory / "last", keep=2, reading=reading)
        self._best = _manager(self.directory / "best", keep=1, reading=reading)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._last.close()
        self._best.close()

    @property
    def last_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._last.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Start writing the state; returns when the arrays are safe to donate, before they are on disk.

        The best network that the progress speaks of is on disk before the state is: no kill can part them.
        """
        self._best.wait_until_finished()
        if step in self._last.all_steps():  # a stop came between an epoch's last step and its validation
            self._last.delete(step)
        _save(self._last, step, state, progress)

    def save_best(self, step: int, network: Any, about: dict[str, Any]) -> None:
        """Start writing the best network so far (parameters and statistics)."""
        if step in self._best.all_steps():  # written before a kill, by the same steps: the same bits
            return
        _save(self._best, step, network, about)

    def restore_last(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state and its progress, laid out as `like`; None for a fresh run."""
        return None if self.last_step is None else _restore(self._last, self.last_step, like)

    def restore_best(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The best network and what was written with it.

        Raises:
          CxrError: there is none yet, or it belongs to another model.
        """
        step = self._best.latest_step()
        if step is None:
            raise CxrError(f"{self.directory / 'best'} has no checkpoint yet: train the run first")
        return _restore(self._best, step, like)

    def wait(self) -> None:
        """Wait until what was started is on disk; an error of the writing threads appears here."""
        self._last.wait_until_finished()
        self._best.wait_until_finished()


def _manager(directory: Path, keep: int, reading: bool) -> ocp.CheckpointManager:
    only = {"active_processes": {jax.process_index()}, "barrier_sync_key_prefix": "alone"} if main_process_only() else {}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=not reading, create=not reading, read_only=reading,
        multiprocessing_options=ocp.options.MultiprocessingOptions(**only),  # Orbax waits for all others
    )  # fmt: skip
    return ocp.CheckpointManager(directory, options=options, item_names=("state", "about"))


def _save(manager: ocp.CheckpointManager, step: int, tree: Any, about: dict[str, Any]) -> None:
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave({"about": about, "shapes": _shapes(tree)})
    )
    manager.save(step, args=items, force=True)


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    folder = Path(manager.directory) / str(step)
    try:
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        _same_model(about["shapes"], _shapes(like), folder)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        tree = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CxrError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {reason}); delete that folder to go on "
            "from the one before it, or train again in another directory"
        ) from error
    return tree, about["about"]


def _shapes(tree: Any) -> Shapes:
    return {
        jax.tree_util.keystr(path): [list(np.shape(leaf)), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _same_model(stored: Shapes, wanted: Shapes, folder: Path) -> None:
    differing = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise CxrError(
            f"checkpoint {folder} is of another model: {len(differing)} of {len(wanted)} arrays differ, first {key}: "
            f"stored {stored.get(key, 'nothing')}, this config's model has {wanted.get(key, 'nothing')}; "
            "use the config it was trained with, or another directory"
        )
