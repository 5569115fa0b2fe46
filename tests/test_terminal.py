"""What a terminal of a given width shows of work under way."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from kogia import terminal
from kogia.log import MetricLog
from kogia.terminal import LiveLine, SamplingProgress, conclude, fail, info, warn

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
RL = {
    "reward": 0.4123, "accuracy": 0.4062, "completion_tokens": 106.2, "truncated": 0.031, "zero_variance_groups": 0.2,
    "status_ok": 0.4, "loss": -1.2e-9, "entropy": 0.8312, "grad_norm": 0.51, "tokens_per_second": 12345.6,
}  # fmt: skip
SFT = {"loss": 2.34567, "grad_norm": 0.51, "lr": 1e-3, "tokens": 8192, "max_vio": 0.213, "tokens_per_second": 4321.0}
LONG = "countdown with four numbers, the third try"


@pytest.fixture
def screen(monkeypatch):
    """screen(width) -> what stderr shows, a terminal of so many columns."""

    def terminal_of(width: int) -> io.StringIO:
        file = io.StringIO()
        monkeypatch.setattr(terminal, "_console", Console(file=file, force_terminal=True, width=width, height=30))
        return file

    return terminal_of


def frames(shown: io.StringIO) -> list[str]:
    """The lines that a terminal showed, each time that the live one was drawn."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ANSI.sub("", shown.getvalue())) if line.strip()]


def has_all(line: str, name: str, count: str, end: str) -> bool:
    return line.startswith(name) and "━" in line and count in line and "tokens/s" in line and end in line


@pytest.mark.parametrize("metrics", [RL, SFT], ids=["rl", "sft"])
@pytest.mark.parametrize("name", ["grpo", "rejection_sft", LONG, "数学の推論を学ぶ長い名前の実行"])
@pytest.mark.parametrize("width", [80, 110, 200])
def test_name_bar_count_rate_and_time_left_stay_at_every_width(screen, tmp_path, width, name, metrics):
    shown = screen(width)
    with MetricLog(tmp_path, total_steps=2000, description=name) as log:
        for step in range(1, 1235):
            log.log(step, metrics)
    *_, last = frames(shown)
    assert has_all(last, name[:8] if width < 200 or len(name) < 20 else name[:20], "1234/2000", "took 0m")
    assert all(cell_len(line) <= width for line in frames(shown))
    figures = ["reward 0.412", "accuracy 0.406", "entropy 0.831", "length 106"] if metrics is RL else ["loss 2.346"]
    shown_figures = [figure for figure in figures if figure in last]
    assert shown_figures == figures[: len(shown_figures)] and (shown_figures or name != "grpo")
    assert shown_figures == figures or width < 200
    assert "loss -" not in last


@pytest.mark.parametrize(
    ("width", "figures"),
    [(80, "reward 0.412  accuracy"), (110, "reward 0.412  accuracy 0.406  entropy 0.831  length 106")],
)
def test_what_moves_is_shown_first(screen, tmp_path, width, figures):
    shown = screen(width)
    with MetricLog(tmp_path, total_steps=200, description="grpo") as log:
        log.log(37, RL | {"tokens_per_second": 850.0})
    assert figures in frames(shown)[-1]


def test_the_line_under_way_counts_down_and_messages_stand_above_it(screen):
    shown = screen(80)
    with LiveLine("work") as line:
        line.begin(0, 10)
        line._start -= 50  # as if begun 50 seconds ago
        line.update(5, 10, rate="9 tokens/s", fields=["loss 2"])
        info("a message")
        line._live.refresh()
    lines = frames(shown)
    assert lines.index("a message") < len(lines) - 1
    assert has_all(lines[-2], "work", "5/10", "eta 0m50s")
    assert has_all(lines[-1], "work", "5/10", "took 0m50s")


def test_a_score_measured_on_the_way_stays_until_the_next(screen, tmp_path):
    shown = screen(200)
    with MetricLog(tmp_path, total_steps=9, description="run") as log:
        log.log(1, RL)
        log.log(1, {"eval_countdown": 0.4651})
        log.log(2, RL | {"reward": 0.5})
    assert "reward 0.5" in frames(shown)[-1] and "eval countdown 0.465" in frames(shown)[-1]


@pytest.mark.parametrize("transient", [False, True])
@pytest.mark.parametrize("width", [80, 110])
def test_sampling_has_the_same_line(screen, width, transient):
    shown = screen(width)
    with SamplingProgress("curate countdown", transient=transient) as progress:
        progress.update(3, 1000, 0)  # three are kept of an interrupted one
        progress.note = "kept 12"
        progress._start -= 100  # as if begun before
        progress.update(503, 1000, 123456)
        progress._line._live.refresh()
    lines = frames(shown)
    assert has_all(lines[-1], "curate countdown", "503/1000", "took 0m")
    assert "kept 12" in lines[-1]
    assert shown.getvalue().endswith("\x1b[2K") == transient


@pytest.mark.parametrize("quiet", [False, True])
def test_where_there_is_no_terminal_the_line_is_printed_now_and_then(monkeypatch, capsys, quiet):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with SamplingProgress("eval", quiet=quiet) as progress:
        for second in range(31):
            now[0] = float(second)
            progress.update(second, 30, 100 * second)
    printed = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in printed] == ([] if quiet else ["1/30", "11/30", "21/30", "30/30"])
    assert quiet or printed[1] == "eval  11/30  100 tokens/s  eta 0m19s"


def test_work_that_leaves_nothing_on_a_terminal_leaves_nothing_in_a_log(capsys):
    with SamplingProgress("generating", transient=True) as progress:
        progress.update(1, 2, 10)
        progress.update(2, 2, 20)
    assert capsys.readouterr().err == ""


def test_a_name_cannot_steer_the_terminal(screen):
    shown = screen(80)
    with LiveLine("run\x1b[2J\nbelow") as line:
        line.update(1, 2)
    assert "\x1b[2J" not in shown.getvalue()
    assert frames(shown)[-1].startswith("run\\x1b[2J below")


@pytest.mark.parametrize("say", [info, warn, fail])
def test_a_message_is_broken_at_blanks_on_a_terminal_and_nowhere_else(screen, capsys, say):
    message = " ".join(["a message that is longer than the line is", "/a/path/that-stays/whole.json"] * 3)
    say(message)
    assert capsys.readouterr().err.endswith(f"{message}\n")
    shown = screen(80)
    say(message)
    lines = ANSI.sub("", shown.getvalue()).splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines).endswith(message)


def test_what_looks_like_a_sign_by_its_name_is_text(screen, capsys):
    fail("127.0.0.1:100: not [bold]known[/bold]")
    assert capsys.readouterr().err == "kogia: error: 127.0.0.1:100: not [bold]known[/bold]\n"


def test_the_last_line_stays_whole_on_a_terminal_for_its_command(screen):
    shown = screen(80)
    conclude("val loss 2.1", Path("runs/of/a/long/name"), "kogia", "chat", "a/path/of/many/parts/to/copy", "--single")
    assert ANSI.sub("", shown.getvalue()).count("\n") == 1


@pytest.mark.parametrize("path", ["runs/a b", "runs/plain"])
def test_the_last_line_can_be_typed_as_it_stands(capsys: Any, path: str):
    conclude("val loss 2.1", Path(path), "kogia", "chat", Path(path))
    quoted = "'runs/a b'" if " " in path else path
    assert capsys.readouterr().err == f"val loss 2.1; in {path}; next: kogia chat {quoted}\n"
