import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kogia.train.lock import sole_writer

HOLDER = """
import sys, time
from pathlib import Path
from kogia.train.lock import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def hold(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def make(path: Path, kind: str) -> Path:
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_another_process_holds_is_refused_until_it_is_killed(tmp_path, kind):
    path = make(tmp_path / "out", kind)
    process = hold(path)
    try:
        with pytest.raises(ValueError, match=r"out': another run is writing there; .*name another out"):
            sole_writer(path).__enter__()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with sole_writer(path):
        assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_link_does_not_get_around_the_lock_and_a_neighbour_is_free(tmp_path, kind):
    path, other = make(tmp_path / "out", kind), make(tmp_path / "other", kind)
    (tmp_path / "link").symlink_to(path)
    with sole_writer(path), sole_writer(other), pytest.raises(ValueError, match="another run"):
        sole_writer(tmp_path / "link").__enter__()
    with sole_writer(tmp_path / "link"):
        pass


def test_a_file_that_its_holder_renamed_is_made_and_held_anew(tmp_path):
    path = tmp_path / "out.partial"
    with sole_writer(path, make=True):
        path.rename(tmp_path / "out")
        with sole_writer(path, make=True):
            pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "out.partial"]


@pytest.mark.parametrize("moved", [True, False])
def test_whoever_was_about_to_lock_a_file_that_its_holder_put_elsewhere_locks_the_new_one(tmp_path, moved, monkeypatch):
    path, opened = tmp_path / "out.partial", os.open
    path.touch()

    def open_late(name, *rest):
        """The other process is done between opening and locking."""
        descriptor = opened(name, *rest)
        monkeypatch.setattr(os, "open", opened)
        path.rename(tmp_path / "out") if moved else path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with sole_writer(path, make=True), pytest.raises(ValueError, match="another run"):
        sole_writer(path, make=True).__enter__()
    assert path.exists()
