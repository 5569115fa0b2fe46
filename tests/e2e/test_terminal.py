"""A command in a real terminal of 80 and of 110 columns."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from e2e.kogia_cli import SEARCHED

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown_in_terminal(folder: Path, width: int, *words: str) -> list[str]:
    """The lines that a terminal shows of a command, each time that one is drawn."""
    keyboard, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONPATH": SEARCHED, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from kogia.cli import main; sys.exit(main())", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=screen, stdout=screen, stderr=screen)
    os.close(screen)
    seen = b""
    while True:
        try:
            seen += os.read(keyboard, 4096)
        except OSError:  # the last writer has gone
            break
    os.close(keyboard)
    assert process.wait(timeout=100) == 0, seen.decode()
    return [line.rstrip() for line in re.split(r"[\r\n]+", ANSI.sub("", seen.decode())) if line.strip()]


@pytest.mark.parametrize("width", [80, 110])
def test_training_keeps_its_line_whole_and_ends_with_score_path_and_next_command(pretrained, tmp_path, width):
    recipe = (pretrained / "pretrain.toml").read_text()
    (tmp_path / "pretrain.toml").write_text(recipe)
    lines = shown_in_terminal(tmp_path, width, "pretrain", "pretrain.toml")
    live = [line for line in lines if "━" in line]
    assert live and all(len(line) <= width for line in live)
    assert re.match(r"base  ━+ *  12/12  loss [\d.]+  .*[\d,]+ tokens/s  took 0m\d\ds$", live[-1])
    assert re.match(r"val loss [\d.]+; in base; next: kogia generate base --raw", lines[-1])
