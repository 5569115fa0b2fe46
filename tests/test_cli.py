import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from rich.cells import cell_len

from kogia import cli
from kogia.cli import COMMANDS, Command, main
from kogia.config import parse_args, resolve


@dataclass(frozen=True)
class Settings:
    """The configuration of the commands below."""

    size: int = 1


def say(config: Settings) -> int | None:
    print("size", config.size)
    return None if config.size else 7


def misuse(config: Settings) -> None:
    resolve("countdown")


def miss(config: Settings) -> None:
    Path("no/such/file").read_text()


def stop(config: Settings) -> None:
    raise KeyboardInterrupt


def stumble(config: Settings) -> None:
    json.loads("{")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    here = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "cli_commands", here)
    for name in ("say", "misuse", "miss", "stop", "stumble"):
        monkeypatch.setitem(cli.COMMANDS, name, Command("cli_commands:Settings", f"cli_commands:{name}", "A test."))


def test_a_command_gets_its_configuration_and_gives_the_exit_status(commands: None, capsys: Any):
    assert main(["say", "--size", "4"]) == 0
    assert capsys.readouterr().out == "size 4\n"
    assert main(["say", "--size", "0"]) == 7


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (
            ["misuse"],
            2,
            "kogia: error: 'countdown': write it as 'module:Name', for example 'my_package.sudoku:Sudoku'\n",
        ),
        (["miss"], 2, "kogia: error: [Errno 2] No such file or directory: 'no/such/file'\n"),
        (["stop"], 130, "kogia: interrupted\n"),
        (["pretrian"], 2, "kogia: error: unknown command 'pretrian'; did you mean 'pretrain'?\n"),
        (["say", "absent.toml"], 2, "kogia: error: [Errno 2] No such file or directory: 'absent.toml'\n"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_status(
    commands: None, argv: list[str], status: int, message: str, capsys: Any
):
    assert main(argv) == status
    assert capsys.readouterr().err == message


def test_an_error_that_is_not_ours_says_how_to_see_where(commands: None, capsys: Any):
    assert main(["stumble"]) == 2
    assert "--traceback shows where" in capsys.readouterr().err
    assert main(["stumble", "--traceback"]) == 2
    assert 'json.loads("{")' in capsys.readouterr().err


def run(code: str) -> tuple[set[str], float]:
    """Modules loaded by `code` in a new process, and the seconds of CPU that it took."""
    script = f"import sys, time\ntry:\n    {code}\nexcept SystemExit: pass\n"
    script += "print('FOUND', time.process_time(), *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split("FOUND")[1].split()
    return set(modules), float(seconds)


def test_help_is_instant_and_loads_nothing_heavy():
    runs = [run("from kogia.cli import main; main(['--help'])") for _ in range(3)]
    assert not runs[0][0] & {"torch", "tyro", "rich", "numpy", "jinja2"}
    assert min(seconds for _, seconds in runs) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_does_not_load_torch(name: str):
    modules, _ = run(f"from kogia.cli import main; main(['{name}', '--help'])")
    assert "kogia.config" in modules
    assert "torch" not in modules


def test_help_fits_a_terminal_of_80_columns(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with contextlib.suppress(SystemExit):
            main(words)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 5
        assert [line for line in lines if cell_len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_main_that_takes_its_configuration(name: str):
    command = COMMANDS[name]
    config_type, run_command = cli._load(command.config), cli._load(command.main)
    assert isinstance(config_type, type)
    assert callable(run_command)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("generate M --thinking false --dtype bf16", {"path": "M", "thinking": False, "dtype": "bf16"}),
        ("chat --no-thinking M --dtype FP16 --single true", {"path": "M", "thinking": False, "dtype": "fp16"}),
        ("convert A B --dtype Float32 --overwrite=no", {"src": "A", "dtype": "float32", "overwrite": False}),
        (
            "eval M --greedy on --task-options.countdown.max-target 50",
            {"task_options": {"countdown": {"max_target": 50}}},
        ),
        ("rl --init M --resume false --normalize-std False", {"resume": False, "normalize_std": False}),
        ("inspect", {"model": "", "json": False}),
    ],
)
def test_commands_take_what_people_type(line: str, fields: dict[str, Any]):
    name, *words = line.split()
    config = parse_args(cli._load(COMMANDS[name].config), words, prog="p", description="d")
    assert {field: getattr(config, field) for field in fields} == fields


def numbers(cls: type) -> Iterator[tuple[type, str]]:
    """(class, field) of every floating-point setting of a configuration and of those in it, but for a model's own."""
    hints = get_type_hints(cls)
    for each in fields(cls):
        kinds = (hints[each.name], *get_args(hints[each.name]))
        if float in kinds and get_origin(hints[each.name]) is not tuple:
            yield cls, each.name
        for inner in kinds:
            if is_dataclass(inner) and not inner.__module__.startswith("kogia.model"):
                assert isinstance(inner, type)
                yield from numbers(inner)


NUMBERS = sorted({found for command in COMMANDS.values() for found in numbers(resolve(command.config))}, key=str)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=lambda part: getattr(part, "__name__", part))
def test_no_setting_of_any_command_may_be_nan_or_infinite(cls: Any, name: str, value: float):
    needed = [each.name for each in fields(cls) if each.default is each.default_factory is MISSING and each.init]
    given = dict.fromkeys(needed, "x")
    with pytest.raises(ValueError, match=f"{name}.* = -?(nan|inf)"):
        cls(**given, **{name: value})
