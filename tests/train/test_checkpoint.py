import os
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from cxrjax.errors import CxrError
from cxrjax.train.checkpoint import Checkpoints

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "step": jnp.zeros((), jnp.int32)}


def save(directory, *steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            state = {name: value + jnp.asarray(step, value.dtype) for name, value in STATE.items()}
            checkpoints.save(step, state, {"step": step, "seconds": 0.1})


def test_the_newest_state_is_restored_and_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in (tmp_path / "last").iterdir() if p.is_dir()) == ["2", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        state, progress = checkpoints.restore_last(STATE)
    np.testing.assert_array_equal(state["w"], STATE["w"] + 3)
    assert progress == {"step": 3, "seconds": 0.1}


def test_a_new_run_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_last(STATE) is None
        with pytest.raises(CxrError, match="train the run first"):
            checkpoints.restore_best(STATE)


@pytest.mark.parametrize(
    "other", [{"w": jnp.zeros((3, 3)), "step": jnp.zeros((), jnp.int32)}, {"v": STATE["w"], "step": STATE["step"]}]
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, other):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CxrError, match="another model"):
        checkpoints.restore_last(other)


def test_a_damaged_checkpoint_is_named(tmp_path):
    save(tmp_path, 1, 2)
    for file in (tmp_path / "last" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CxrError, match=r"last/2 cannot be read"):
        checkpoints.restore_last(STATE)


def test_an_incomplete_checkpoint_is_removed(tmp_path):
    save(tmp_path, 1)
    partial = tmp_path / "last" / "2.orbax-checkpoint-tmp-7"
    partial.mkdir()
    (partial / "x").write_text("half")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step == 1
        checkpoints.save(2, STATE, {})
    assert not partial.exists()


def test_a_resumed_run_may_save_the_same_best_step_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(4, STATE, {"val_auroc": 0.5})
        checkpoints.wait()
        checkpoints.save_best(4, STATE, {"val_auroc": 0.5})
        assert checkpoints.restore_best(STATE)[1] == {"val_auroc": 0.5}


def test_saving_returns_before_the_state_is_on_disk(tmp_path, monkeypatch):
    """The writing thread is held before its last action until `save` has returned."""
    returned, waited, rename = threading.Event(), [], os.rename

    def late(*args, **kwargs):
        waited.append(returned.wait(60))
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "rename", late)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, STATE, {"step": 1})
        assert not (tmp_path / "last" / "1").exists()
        returned.set()
        checkpoints.wait()
        assert (tmp_path / "last" / "1").is_dir()
    assert waited
    assert all(waited)
