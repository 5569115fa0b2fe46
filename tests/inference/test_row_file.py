"""Rows on their way into a file: in order whatever ends first, and the same after a kill at any byte."""

import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.inference.row_file import open_rows, unfinished_of

SETTINGS = {"seed": 3, "model": "m", "stop": ("a", "\ud800")}


def rows_of(place: int, per_prompt: int) -> list[dict]:
    return [{"place": place, "index": index, "text": "é\u2028\n" * place} for index in range(per_prompt)]


def opened(path, num=4, each=1, *, resume=False, **settings):
    return open_rows(str(path), SETTINGS | settings, num_prompts=num, per_prompt=each, resume=resume)


def written(path) -> list[int]:
    return [json.loads(line)["place"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_file_grows_in_order_and_what_is_ahead_waits_beside_it(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with opened(path) as rows:
        assert rows.left == [0, 1, 2, 3]
        rows.add(2, rows_of(2, 1))
        assert (written(path), rows.left) == ([], [0, 1, 3])
        rows.add(0, rows_of(0, 1))
        assert written(path) == [0]
        rows.add(1, rows_of(1, 1))
        assert (written(path), rows.left) == ([0, 1, 2], [3])
        rows.add(3, rows_of(3, 1))
        rows.finish()
    assert os.listdir(path.parent) == ["out.jsonl"]


@given(data=st.data(), each=st.integers(1, 3))
def test_a_run_killed_at_any_byte_goes_on_to_the_same_file(tmp_path_factory, data, each):
    path, num = tmp_path_factory.mktemp("rows") / "out.jsonl", 5
    order = data.draw(st.permutations(range(num)))
    with opened(path, num, each) as rows:
        for place in order:
            rows.add(place, rows_of(place, each))
        whole, notes = path.read_bytes(), unfinished_of(path).read_bytes()
    settings_end = notes.index(b"\n") + 1
    for _ in range(3):  # a kill, and kills of the runs that go on
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        unfinished_of(path).write_bytes(notes[: data.draw(st.integers(settings_end, len(notes)))])
        with opened(path, num, each, resume=True) as rows:
            assert all(place not in written(path) for place in rows.left)
            for place in data.draw(st.permutations(rows.left)):
                rows.add(place, rows_of(place, each))
            assert path.read_bytes() == whole
            notes = unfinished_of(path).read_bytes()
    with opened(path, num, each, resume=True) as rows:
        rows.finish()
    assert path.read_bytes() == whole
    assert not unfinished_of(path).exists()


@pytest.mark.parametrize("torn", [b"", b'{"sett'])
def test_a_run_killed_before_its_settings_were_there_had_begun_nothing(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    path.write_text('{"place": 9}\n')  # of an earlier run, which was finished
    unfinished_of(path).write_bytes(torn)
    with opened(path) as rows:
        assert (rows.left, written(path)) == ([0, 1, 2, 3], [])


def test_what_would_be_lost_or_mixed_is_refused_and_stays(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        pytest.raises(ValueError, match=r"resume: nothing was begun in .*out\.jsonl; leave --resume out"),
        opened(path, resume=True),
    ):
        pass
    assert os.listdir(tmp_path) == []
    with opened(path) as rows:
        rows.add(0, rows_of(0, 1))
        with pytest.raises(ValueError, match="another run is writing there"), opened(path, resume=True):
            pass
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with (
        pytest.raises(ValueError, match="an interrupted run left rows there; --resume goes on with them"),
        opened(path),
    ):
        pass
    with pytest.raises(ValueError, match="was begun with seed = 3, and now it is 4"), opened(path, resume=True, seed=4):
        pass
    with (
        pytest.raises(ValueError, match="was begun with raw = None, and now it is True"),
        opened(path, resume=True, raw=True),
    ):
        pass
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_that_came_to_nothing_leaves_nothing_to_lose(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path):
        pass
    with opened(path, seed=4) as rows:
        assert rows.left == [0, 1, 2, 3]


def test_a_file_deleted_while_it_is_written_is_an_error(tmp_path):
    path = tmp_path / "out.jsonl"
    with opened(path) as rows:
        path.unlink()
        with pytest.raises(FileNotFoundError, match="is gone"):
            rows.add(0, rows_of(0, 1))


def test_a_pipe_gets_all_rows_in_order_and_nothing_beside_it(tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_text(encoding="utf-8")))
    reader.start()
    with opened(path, 2) as rows:
        rows.add(1, rows_of(1, 1))
        rows.add(0, rows_of(0, 1))
        rows.finish()
    reader.join()
    assert [json.loads(line)["place"] for line in got[0].split("\n") if line] == [0, 1]
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(ValueError, match="is no file that keeps anything"), opened(path, resume=True):
        pass


@pytest.mark.parametrize("line", ["[]", "{}", '{"settings": 5}', '{"place": 0, "rows": [{}]}'])
def test_a_file_that_no_settings_begin_is_no_record_and_stays(tmp_path, line):
    path = tmp_path / "out.jsonl"
    unfinished_of(path).write_text(f"{line}\n")
    for resume in (False, True):
        refusal = r"no record of an interrupted run; remove it|nothing was begun"
        if line == "[]" and not resume:
            continue  # torn: nothing was begun
        with pytest.raises(ValueError, match=refusal):
            opened(path, resume=resume).__enter__()
    assert not path.exists()


@pytest.mark.parametrize("note", ['{"place": 1}', '{"place": -1, "rows": [{}]}', '{"place": 1, "rows": [{}, {}]}', "5"])
def test_a_note_that_is_none_costs_what_follows_it_alone(tmp_path, note):
    path = tmp_path / "out.jsonl"
    with opened(path) as rows:
        rows.add(0, rows_of(0, 1))
        rows.add(3, rows_of(3, 1))
    with unfinished_of(path).open("a") as file:
        file.write(f"{note}\n")
    with opened(path, resume=True) as rows:
        assert rows.left == [1, 2]
