"""Metrics elsewhere: read back from real TensorBoard and W&B files where those packages are there."""

import json
import math
import struct
import sys
from operator import itemgetter

import pytest

from kogia.config import from_dict
from kogia.log import MetricLog, read_metrics
from kogia.rl.config import RLConfig
from kogia.sinks import check_sinks, open_sinks
from kogia.train.config import SupervisedConfig


def record(run_dir, names, steps, resume_step=None):
    """Log `steps`, each with a loss that is half its number, as a run of some 5 steps."""
    sinks = open_sinks(names, run_dir, {"lr": 0.5}, resume_step or 0)
    log = MetricLog(run_dir, total_steps=5, description="run", quiet=True, resume_step=resume_step, sinks=sinks)
    with log:
        for step in steps:
            log.log(step, {"loss": step / 2})
            if step == 4:
                log.log(step, {"val_loss": math.nan, "tokens": 12})


def scalars(run_dir):
    """Tag -> (step, value) pairs as TensorBoard shows them."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_jsonl_holds(tmp_path):
    pytest.importorskip("tensorboard")
    record(tmp_path, ["tensorboard", "tensorboard"], range(1, 6))
    shown = scalars(tmp_path)
    assert shown.keys() == {"loss", "val_loss", "tokens"}
    assert shown["loss"] == [(line["step"], line["loss"]) for line in read_metrics(tmp_path) if "loss" in line]
    assert shown["tokens"] == [(4, 12.0)]
    ((step, value),) = shown["val_loss"]
    assert step == 4 and math.isnan(value)


def test_steps_that_a_resumed_run_repeats_are_shown_once(tmp_path):
    pytest.importorskip("tensorboard")
    record(tmp_path, ["tensorboard"], [1, 2, 3])
    record(tmp_path, ["tensorboard"], [2, 3, 4], resume_step=1)
    assert scalars(tmp_path)["loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    record(tmp_path, ["tensorboard"], [1])  # begun anew in the same place
    assert scalars(tmp_path)["loss"] == [(1, 0.5)]


def history(path):
    """The rows of an offline run of W&B: protocol buffers in a log as LevelDB writes it, small enough for one block."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position = path.read_bytes()[:32768], 7
    while position + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record = records.Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length
        assert kind == 1  # a whole record
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            yield {name: value for name, value in row.items() if not name.startswith("_")}


def test_wandb_offline_records_the_run_and_takes_it_up_again(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path, ["wandb"], [1, 2, 3])
    name = (tmp_path / "wandb_id").read_text()
    record(tmp_path, ["wandb"], [3, 4], resume_step=2)
    assert (tmp_path / "wandb_id").read_text() == name
    rows = [row for path in (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb") for row in history(path)]
    expected = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}]
    expected += [{"step": 3, "loss": 1.5}, {"step": 4, "loss": 2.0}]
    assert sorted((row for row in rows if "loss" in row), key=itemgetter("step")) == expected
    (last,) = [row for row in rows if "val_loss" in row]
    assert last["step"] == 4 and math.isnan(last["val_loss"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_whose_package_is_missing_is_named_with_the_way_to_get_it(name, monkeypatch):
    for module in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = rf"sinks = \['{name}'\]: {name} is not there \(.*\); pip install 'kogia\[{name}\]', or leave it out"
    with pytest.raises(ValueError, match=message):
        check_sinks([name])


def test_a_folder_that_the_client_left_is_not_taken_for_its_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb is a folder, not the package"):
        check_sinks(["wandb"])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.parametrize("cls", [SupervisedConfig, RLConfig])
def test_an_unknown_sink_is_a_mistake_that_is_named(cls):
    required = {"out": "x"} if cls is SupervisedConfig else {"init": "m"}
    assert from_dict(cls, required | {"sinks": ["wandb", "tensorboard"]}).sinks == ("wandb", "tensorboard")
    with pytest.raises(ValueError, match=r"sinks\[0\] = 'tensorbord'.*did you mean 'tensorboard'"):
        from_dict(cls, required | {"sinks": ["tensorbord"]})
