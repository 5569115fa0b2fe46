"""Lines that outlast a chat, on real files and the real readline."""

import os
import stat

import pytest

from kogia.inference.history import MOST_LINES, History, history_path

readline = pytest.importorskip("readline")


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    readline.clear_history()
    yield tmp_path / "state" / "kogia" / "chat_history"
    readline.clear_history()


def recalled():
    return [readline.get_history_item(i + 1) for i in range(readline.get_current_history_length())]


@pytest.mark.parametrize("state", [None, "", "relative/place", "~/state"])
def test_without_an_absolute_state_home_the_lines_are_in_the_home(tmp_path, monkeypatch, state):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if state is not None:
        monkeypatch.setenv("XDG_STATE_HOME", state)
    assert history_path() == tmp_path / ".local" / "state" / "kogia" / "chat_history"


def test_lines_come_back_in_order_without_blank_and_repeated_ones(path):
    first = History(readline)
    for line in ("one", "", "  ", "two", "two", "数学 −5", "half \ud800", "one"):
        first.add(line)
    second = History(readline)
    assert recalled() == ["one", "two", "数学 −5", "half \\ud800", "one"]
    second.add("one")  # the last line of the chat before
    assert path.read_text(encoding="utf-8").splitlines() == recalled()


def test_two_chats_at_once_lose_no_line(path):
    one, other = History(readline), History(readline)
    one.add("a")
    other.add("b")
    one.add("c")
    History(readline)
    assert recalled() == ["a", "b", "c"]


def test_a_file_that_others_could_read_is_closed_to_them_and_keeps_its_lines(path):
    path.parent.mkdir(parents=True)
    path.write_text("old\n")
    path.chmod(0o644)
    History(readline).add("new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "old\nnew\n"


def test_the_file_does_not_grow_without_end(path):
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{i}\n" for i in range(2 * MOST_LINES + 1)))
    History(readline).add("last")
    newest = [str(i) for i in range(MOST_LINES + 1, 2 * MOST_LINES + 1)]
    assert recalled() == newest
    assert path.read_text().split() == [*newest, "last"]


@pytest.mark.parametrize("damage", [b"a\0b\n", b"\xff\xfe\n", b"no end", b"\r\n\x1b[2J\n"])
def test_a_damaged_file_stops_no_chat(path, damage, capsys):
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    History(readline).add("new")
    assert path.read_bytes() == damage + (b"" if damage.endswith(b"\n") else b"\n") + b"new\n"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["a file for a folder", "gone meanwhile"])
def test_where_nothing_can_be_kept_it_is_said_once(path, what, capsys):
    if what == "a file for a folder":
        path.parent.parent.write_text("")
    history = History(readline)
    if what == "gone meanwhile":
        path.unlink()
        path.parent.rmdir()
    history.add("a")
    history.add("b")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning: nothing that is typed here is kept") == 1
    assert "--no-history" in said


def test_a_link_to_the_null_device_keeps_nothing_and_stays(path, capsys):
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/null")
    mode = os.stat("/dev/null").st_mode
    History(readline).add("a")
    assert path.is_symlink() and os.stat("/dev/null").st_mode == mode
    assert capsys.readouterr().err == ""
