import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kogia.files import put_in_place, remove_stale_drafts, replacing_directory, replacing_file, write_json, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from kogia import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "file":
    files.sync = die  # written, not yet in place
    files.write_text(path, "half")
replace, calls = os.replace, []
def dying(source, target):
    calls.append(source)
    die() if len(calls) == 2 else replace(source, target)
if moment == "swap":
    files.exchange = lambda a, b: False  # a system that cannot swap two names at once
    os.replace = dying  # the old directory stands aside, the new one is not in place
with files.replacing_directory(path) as draft:
    (draft / "part").write_text("half")
    if moment == "directory":
        die()
"""


def kill_writer(path: Path, moment: str) -> None:
    """Have a process start to write `path` and die."""
    result = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], timeout=60)
    assert result.returncode == -signal.SIGKILL


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("links", [1, 2])
def test_a_link_stays_and_the_file_that_it_leads_to_is_written(tmp_path: Path, links: int):
    target, path = tmp_path / "elsewhere" / "real.jsonl", tmp_path / "out.jsonl"
    target.parent.mkdir()
    target.write_text("old")
    for number in range(links - 1):
        (tmp_path / f"link{number}").symlink_to(target)
    path.symlink_to(target if links == 1 else "link0")
    write_text(path, "new")
    assert path.is_symlink() and target.read_text() == "new"
    assert names(target.parent) == ["real.jsonl"]
    target.unlink()
    write_text(path, "again")  # a link that led nowhere
    assert path.is_symlink() and target.read_text() == "again"


def test_json_with_half_a_character_is_written_as_it_was_read_and_others_as_they_are_seen(tmp_path: Path):
    for text in ('{"a": "\\ud800"}', '{"\\udfff": ["ä", "\\ud83d"]}', '{"ä": "🐋"}'):
        write_json(tmp_path / "a.json", json.loads(text))
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == json.loads(text)
    assert "🐋" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_device_or_a_pipe_is_written_to_and_stays_what_it_is(tmp_path: Path):
    pipe, null = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    null.symlink_to("/dev/null")
    for path in (null, Path("/dev/null")):
        write_text(path, "text")
        assert path.is_char_device()
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    write_text(pipe, "through")
    assert reader.communicate(timeout=60)[0] == b"through"
    assert pipe.is_fifo()


def test_standard_output_by_its_name_is_written_to():
    code = "from kogia.files import write_text; print('a', flush=True); write_text('/dev/stdout', 'b')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, b"a\nb")


OPEN = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1", "link", "link to a link")


@pytest.mark.parametrize("mode", ["w", "a"])
@pytest.mark.parametrize("name", OPEN)
def test_an_open_file_that_the_shell_sends_output_to_is_written_to_and_stays_what_it_is(tmp_path, name, mode):
    out = tmp_path / "out.txt"
    out.write_text("from before\n")
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "link to a link").symlink_to("link")
    before = out.stat()
    code = f"from kogia.files import write_text; print('a'); write_text({name!r}, 'b\\n'); print('c')"
    with out.open(mode) as file:
        assert subprocess.run([sys.executable, "-c", code], stdout=file, cwd=tmp_path, timeout=60).returncode == 0
        os.write(file.fileno(), b"d\n")  # the shell's next command
    assert out.read_text() == ("from before\n" if mode == "a" else "") + "a\nb\nc\nd\n"
    assert os.path.samestat(before, out.stat())
    assert names(tmp_path) == ["link", "link to a link", "out.txt"]


def test_any_open_descriptor_may_be_named_and_one_that_is_not_open_is_an_error(tmp_path: Path):
    with (tmp_path / "out.txt").open("w+") as file, (tmp_path / "in.txt").open("w") as closed:
        number = closed.fileno()
        closed.close()
        write_text(f"/dev/fd/{file.fileno()}", "one\n")
        write_text(f"/proc/self/fd/{file.fileno()}", "two\n")
        with pytest.raises(OSError, match=rf"/dev/fd/{number}: could not be written \(Bad file descriptor\)"):
            write_text(f"/dev/fd/{number}", "three")
    assert (tmp_path / "out.txt").read_text() == "one\ntwo\n"
    assert names(tmp_path) == ["in.txt", "out.txt"]


def test_a_file_called_by_a_number_is_a_file(tmp_path: Path):
    (tmp_path / "fd").mkdir()
    write_text(tmp_path / "fd" / "1", "old")
    write_text(tmp_path / "fd" / "1", "new")
    assert (tmp_path / "fd" / "1").read_text() == "new"


def test_a_link_that_leads_to_itself_is_refused_and_stays(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="a: is a link that leads back to itself"):
        write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").is_symlink()


def test_a_directory_is_no_place_for_a_file(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="is a directory; name a file"):
            write_text(path, "text")


def test_a_disk_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "disk"
    path.write_text("all that was there")
    monkeypatch.setattr(Path, "is_block_device", lambda self: True)  # to have one takes a privilege
    with pytest.raises(ValueError, match="is a disk, whose content would be lost"):
        write_text(path, "text")
    assert path.read_text() == "all that was there"


def test_a_failed_write_keeps_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": "ä"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match=r"summary\.json: could not be written \(No space left on device\); free some"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": "ä"}
    assert names(tmp_path) == ["summary.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match=r"a file/summary\.json: could not be written .*check the place"):
        write_text(tmp_path / "a file" / "summary.json", "text")
    with pytest.raises(ValueError, match="a file: is a file where a directory is to be written"):
        with replacing_directory(tmp_path / "a file"):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: is a directory; name a file"):
        write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["a file", "folder"]


def test_new_files_and_directories_have_the_modes_that_others_have(tmp_path: Path):
    (tmp_path / "plain").touch()
    (tmp_path / "plain folder").mkdir()
    write_text(tmp_path / "deep" / "file", "text")
    with replacing_directory(tmp_path / "deep" / "folder") as draft:
        (draft / "part").touch()
    mode = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert mode[tmp_path / "deep" / "file"] == mode[tmp_path / "plain"]
    assert mode[tmp_path / "deep" / "folder"] == mode[tmp_path / "plain folder"]


def test_a_directory_is_the_old_or_the_new_one(tmp_path: Path):
    path = tmp_path / "data"
    with replacing_directory(path) as draft:
        assert names(tmp_path) == [draft.name]
        (draft / "old").touch()
    with contextlib.suppress(KeyboardInterrupt), replacing_directory(path) as draft:
        (draft / "new").touch()
        assert names(path) == ["old"]
        raise KeyboardInterrupt
    assert (names(path), names(tmp_path)) == (["old"], ["data"])
    with replacing_directory(path) as draft:
        (draft / "new").touch()
    assert (names(path), names(tmp_path)) == (["new"], ["data"])


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    with replacing_directory(tmp_path / "link") as draft:
        (draft / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "elsewhere") == ["new"]


@pytest.mark.parametrize("moment", ["file", "directory", "swap"])
def test_what_a_killed_writer_left_is_removed_by_the_next_one_whatever_their_process_ids(tmp_path: Path, moment: str):
    path = tmp_path / "target"
    if moment == "swap":
        path.mkdir()
    kill_writer(path, moment)
    assert all(name.startswith(".target.") for name in names(tmp_path))
    assert names(tmp_path) != []
    if moment == "file":
        write_text(path, "whole")
    else:
        with replacing_directory(path) as draft:
            (draft / "part").write_text("whole")
    assert names(tmp_path) == ["target"]
    assert (path if moment == "file" else path / "part").read_text() == "whole"


def test_processes_of_one_id_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for name in (".a.1.tmp", ".a.tmp"):
        (tmp_path / name).mkdir()
    write_text(tmp_path / "a", "text")
    with replacing_directory(tmp_path / "b") as first, replacing_directory(tmp_path / "b") as second:
        assert first != second
        (second / "part").write_text("second")
        (first / "part").write_text("first")
    assert (tmp_path / "b" / "part").read_text() == "first"  # its block ended last
    assert names(tmp_path) == [".a.1.tmp", ".a.tmp", "a", "b"]


def test_a_draft_that_is_being_written_and_what_is_foreign_are_left_alone(tmp_path: Path):
    foreign = [".a.tmp", ".a.7.tmp", "a.partial", "a.old", ".b.0123456789abcdef.tmp", ".a.0123456789ABCDEF.tmp"]
    for name in foreign:
        (tmp_path / name).mkdir()
    with replacing_directory(tmp_path / "a") as draft:
        (draft / "part").write_text("mine")
        write_text(tmp_path / "a", "another writer of the same name")
        remove_stale_drafts(tmp_path, "a")
        assert draft.is_dir()
        (tmp_path / "a").unlink()
    assert names(tmp_path) == sorted([*foreign, "a"])
    remove_stale_drafts(tmp_path)
    assert names(tmp_path) == sorted({*foreign, "a"} - {".b.0123456789abcdef.tmp"})


@pytest.mark.parametrize("name", ["[a-z]*", "a.b", "ä\nb", "a+"])
def test_a_name_may_hold_any_character(tmp_path: Path, name: str):
    (tmp_path / ".axb.0123456789abcdef.tmp").touch()
    (tmp_path / f".{name}.0123456789abcdef.tmp").touch()
    write_text(tmp_path / name, "text")
    assert names(tmp_path) == sorted([".axb.0123456789abcdef.tmp", name])


def test_a_file_that_others_write_takes_its_place_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "deep" / "a.bin"
    for content in (b"old", b"new"):
        with replacing_file(path) as draft:
            draft.write_bytes(content)
        assert path.read_bytes() == content
    with contextlib.suppress(KeyError), replacing_file(path) as draft:
        draft.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"new"
    assert [each.name for each in path.parent.iterdir()] == ["a.bin"]
    with pytest.raises(ValueError, match="is a directory; name a file"), replacing_file(tmp_path):
        pass


def test_a_finished_draft_of_one_s_own_is_put_in_place(tmp_path: Path):
    (tmp_path / "draft").write_text("new")
    write_text(tmp_path / "final", "old")
    put_in_place(tmp_path / "draft", tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final").read_text() == "new"


def test_a_file_system_without_locks_is_written_too_and_keeps_its_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".a.0123456789abcdef.tmp").touch()
    write_text(tmp_path / "a", "text")
    assert names(tmp_path) == [".a.0123456789abcdef.tmp", "a"]
