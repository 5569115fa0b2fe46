import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from kogia import log
from kogia.log import MetricLog, cut_back, read_metrics


def test_each_step_is_one_json_line_in_order(tmp_path: Path):
    with MetricLog(tmp_path, total_steps=3, description="train") as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1 / step})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [1.0, 0.5, 1 / 3]
    assert 0 <= lines[0]["seconds"] <= lines[2]["seconds"]


def test_a_new_run_starts_its_file_over(tmp_path: Path):
    for _ in range(2):
        with MetricLog(tmp_path, total_steps=1, description="train", quiet=True) as metrics:
            metrics.log(1, {})
    assert len(read_metrics(tmp_path)) == 1


def test_resuming_drops_later_lines_and_a_torn_last_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(f'{{"step": {s}, "seconds": {s}0.5, "loss": {s}}}\n' for s in (1, 2, 3)) + '{"step": 4, "lo'
    )
    with MetricLog(tmp_path, total_steps=5, description="train", quiet=True, resume_step=2) as metrics:
        metrics.log(3, {"loss": 33})
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 33)]
    assert 20.5 <= lines[-1]["seconds"] < 25, "time goes on from the last line kept"


TAILS = {
    "a half line": b'{"step": 3, "seco',
    "a half line that ends in a brace": b'{"step": 3, "parts": {}',
    "a stray byte": b"\xff",
    "zeros after a power cut": b"\0" * 40,
    "a number": b"5",
    "null": b"null\n",
    "brackets": b"[" * 100_000,
    "an object without a step": b'{"loss": 3}\n',
    "a step that is a word": b'{"step": "3"}\n',
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_a_torn_or_damaged_line_is_dropped_on_resume_and_said_once(tmp_path: Path, capsys: Any, tail: bytes):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "seconds": 1.5}\n', b'{"step": 2, "seconds": 2.5}\n']
    path.write_bytes(good[0] + tail.rstrip(b"\n") + b"\n" + good[1] + tail)
    with MetricLog(tmp_path, total_steps=5, description="train", quiet=True, resume_step=2) as metrics:
        metrics.log(3, {})
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2, 3]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1
    assert "torn or damaged lines dropped: 2" in said


def test_whole_lines_are_kept_as_they_are_without_a_word(tmp_path: Path, capsys: Any):
    path = tmp_path / "samples.jsonl"
    text = '{"step": 1, "text": "a\\u2028b\u2028"}\n{"text": "\\ud800", "step":2}\n'
    path.write_text(text + '{"step": 3}', encoding="utf-8")
    assert [row["step"] for row in cut_back(path, 3)] == [1, 2, 3]
    assert [row["step"] for row in cut_back(path, 2)] == [1, 2]
    assert path.read_text(encoding="utf-8") == text
    assert cut_back(path, 0) == []
    assert path.read_text(encoding="utf-8") == ""
    assert cut_back(tmp_path / "absent.jsonl", 3) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.jsonl"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["directory deleted", "directory moved", "file deleted", "replaced by another run's"])
def test_a_log_whose_file_is_no_longer_in_its_place_is_an_error(tmp_path: Path, what: str):
    run = tmp_path / "run"
    run.mkdir()
    with MetricLog(run, total_steps=3, description="train", quiet=True) as metrics:
        metrics.log(1, {})
        if what == "directory deleted":
            shutil.rmtree(run)
        elif what == "file deleted":
            (run / "metrics.jsonl").unlink()
        else:
            run.rename(tmp_path / "elsewhere")
        if what.startswith("replaced"):
            run.mkdir()
            (run / "metrics.jsonl").touch()
        with pytest.raises(FileNotFoundError, match=r"run/metrics.jsonl is gone.*leave the place as it is"):
            metrics.log(2, {})
    assert read_metrics(run) == []


def test_a_log_makes_no_directory_that_was_deleted_before_it_opens(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is gone"):
        MetricLog(tmp_path / "run", total_steps=3, description="train")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_null_on_disk_and_nan_in_memory(tmp_path: Path):
    with MetricLog(tmp_path, total_steps=1, description="train", quiet=True) as metrics:
        metrics.log(1, {"loss": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_without_a_terminal_the_first_and_the_last_step_are_printed(tmp_path: Path, capsys: Any):
    with MetricLog(tmp_path, total_steps=500, description="train") as metrics:
        for step in range(1, 501):
            metrics.log(step, {"loss": 2.5, "obscure": 1.0})
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert "train  1/500  loss 2.5" in printed[0]
    assert "500/500" in printed[1]
    assert "eta 0m00s" in printed[1]


def test_quiet_prints_nothing(tmp_path: Path, capsys: Any):
    with MetricLog(tmp_path, total_steps=1, description="train", quiet=True) as metrics:
        metrics.log(1, {"loss": 1.0})
    assert capsys.readouterr().err == ""


def test_a_run_without_metrics_reads_as_empty(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_messages_go_to_stderr_and_are_not_taken_for_markup(capsys: Any):
    log.info("[bold]kept[/bold] as it is")
    log.warn("beware")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "[bold]kept[/bold] as it is" in printed.err
    assert "warning: beware" in printed.err


def test_signs_that_steer_a_terminal_are_shown_escaped(capsys):
    steering = "\x1b[2J \x07 \x9b31m \r \u202e \x7f \ud800"
    log.info(f"a\nb\t{steering}")
    log.warn(steering)
    err = capsys.readouterr().err
    assert "a\nb" in err and r"\x1b[2J \x07 \x9b31m \r \u202e \x7f \ud800" in err
    assert err.replace("\n", "").replace("\t", "").isprintable()
    assert log.printable("naïve 数学 −5 🙂") == "naïve 数学 −5 🙂"


@pytest.mark.parametrize("seconds", [10**400, -1, "9", None, 1e300])
def test_times_that_no_run_took_are_passed_over_on_resume(tmp_path: Path, seconds: Any):
    lines = [{"step": 1, "seconds": 2.5}, {"step": 2, "seconds": seconds}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with MetricLog(tmp_path, total_steps=3, description="x", quiet=True, resume_step=2) as metrics:
        metrics.log(3, {"loss": 1.0})
    assert 2.5 <= read_metrics(tmp_path)[-1]["seconds"] < 10
