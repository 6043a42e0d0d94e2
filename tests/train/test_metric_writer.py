import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxrjax.errors import CxrError
from cxrjax.train.monitoring import MetricWriter, read_metrics


def test_a_resumed_run_drops_later_rows(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write_scalars(step, {"val_loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "val_lo')  # a kill in the middle of a line
    with MetricWriter(tmp_path, start=2) as writer:
        writer.write_scalars(3, {"val_loss": 9.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "val_loss": 0.5}, {"step": 2, "val_loss": 1.0}, {"step": 3, "val_loss": 9.0},
    ]  # fmt: skip


def test_nan_is_written_as_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"val_auroc": math.nan})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "val_auroc": None}


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n')
    with pytest.raises(CxrError, match="line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stock_tensorboard_reads_the_events(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(5, {"val_loss": 0.25})
        writer.write_scalars(6, {"val_loss": 0.125})
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(5, 0.25), (6, 0.125)]
