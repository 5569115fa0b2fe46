"""Rejection sampling: the choice of samples by hand-made cases, and the command with a real tiny model."""

import json
import shutil
import tomllib
from collections import Counter
from contextlib import closing
from dataclasses import replace
from zlib import crc32

import pytest

from kogia.checkpoint.open import open_model
from kogia.config import from_dict, to_dict
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import Completion
from kogia.eval.sample import Answered, Sample
from kogia.rl.config import CurateConfig
from kogia.rl.curate import Record, Tally, curate, main, select
from kogia.tasks.task import Problem, Verdict
from kogia.text.chat import Message, Prompt

SPEC = "toy_task:Checksum"
PROBLEM = Problem("p", (Message("user", "q"),))


def sample(text="fine", *, tokens=5, correct=True, reward=1.0, finish="stop"):
    completion = Completion(list(range(tokens)), text, None, finish, 0, 0, 0, 0)
    return Sample(completion, Verdict(reward, correct, "ok" if correct else "wrong", {}, None))


def chosen(samples, **changes):
    answered = Answered(PROBLEM, Prompt([5], opens_thought=True), samples)
    kept, dropped = select(answered, replace(CurateConfig("m", keep_per_problem=99), **changes))
    return kept, {reason: count for reason, count in dropped.items() if count}


def test_only_correct_complete_distinct_samples_are_kept():
    samples = [
        sample("a"),
        sample("b", correct=False),
        sample("c", finish="length"),
        sample(" a "),
        sample("мы думаем так"),
        sample("d"),
    ]
    assert chosen(samples) == ([0, 5], {"not_correct": 1, "truncated": 1, "duplicate": 1, "mixed_language": 1})
    assert chosen(samples, script="CYRILLIC")[0] == [4]
    assert chosen(samples, min_language_share=0.0)[0] == [0, 4, 5]
    assert chosen(samples, correct_only=False)[0] == [0, 1, 5]


def test_length_and_reward_limits():
    samples = [sample("a", tokens=3), sample("b", tokens=10, reward=0.5), sample("c", tokens=20)]
    assert chosen(samples, max_completion_tokens=10) == ([0, 1], {"too_long": 1})
    assert chosen(samples, min_completion_tokens=10) == ([1, 2], {"too_short": 1})
    assert chosen(samples, min_reward=0.9) == ([0, 2], {"low_reward": 1})


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_a_sample_whose_check_failed_is_never_kept(status):
    broken = Sample(sample("broken").completion, Verdict(0.0, False, status, {}, None))
    samples = [sample("wrong", correct=False, reward=-0.3), broken, sample()]
    assert chosen(samples, correct_only=False, min_reward=-0.3) == ([0, 2], {"not_judged": 1})


def test_the_shortest_or_a_seeded_choice_stays_when_there_are_more():
    samples = [sample(str(i), tokens=30 - i) for i in range(20)]
    kept, dropped = chosen(samples, pick="shortest", keep_per_problem=2)
    assert (kept, dropped) == ([18, 19], {"surplus": 18})
    draws = [chosen(samples, keep_per_problem=2, seed=seed)[0] for seed in range(20)]
    assert draws == [chosen(samples, keep_per_problem=2, seed=seed)[0] for seed in range(20)]
    assert len({tuple(kept) for kept in draws}) > 5


def test_problems_that_are_too_easy_are_left_out():
    samples = [sample("a"), sample("b"), sample("c"), sample("d", correct=False)]
    assert chosen(samples, max_solve_rate=0.5) == ([], {"not_correct": 1, "too_easy": 3})
    assert chosen(samples, max_solve_rate=0.75)[0] == [0, 1, 2]


def settings(checkpoint, tmp_path, **changes):
    base = CurateConfig(
        path=str(checkpoint),
        out=str(tmp_path / "data" / "good.jsonl"),
        tasks=(SPEC,),
        num_problems=10,
        max_tokens=24,
        min_language_share=0.0,
        engine=EngineConfig(num_blocks=256, max_sequences=16),
        verify_workers=1,
        device="cpu",
        quiet=True,
        batch_problems=3,
    )
    return replace(base, **changes)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read(tmp_path):
    folder = tmp_path / "data"
    return lines(folder / "good.jsonl"), json.loads((folder / "good.summary.json").read_text())


def test_curated_rows_are_correct_and_ready_for_fine_tuning(checkpoint, tmp_path):
    main(settings(checkpoint, tmp_path))
    rows, summary = read(tmp_path)
    assert len(rows) == summary["kept"] > 5
    for row in rows:
        number = int(row["messages"][0]["content"].removeprefix("say "))
        assert crc32(row["completion"].encode()) % 2 == number % 2  # the task's own rule
        assert row["reward"] == 1.0
        assert row["num_tokens"] < 24
        assert row["source_checkpoint"] == str(checkpoint)
        assert row["weights_version"] == 0
    assert max(Counter(row["problem_id"] for row in rows).values()) == 2
    assert len({row["id"] for row in rows}) == len(rows)
    assert summary["problems"] == 10
    assert summary["samples"] == sum(summary["status_counts"].values()) == 80
    assert summary["kept"] + sum(summary["dropped"].values()) == 80
    assert summary["problems_with_none"] == 10 - len({row["problem_id"] for row in rows})


def test_an_interrupted_curation_continues_to_the_same_data(checkpoint, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(settings(checkpoint, whole))
    config = settings(checkpoint, parts)
    main(config)
    folder = parts / "data"
    samples, progress = lines(folder / "good.jsonl"), lines(folder / "good.progress.jsonl")
    # as a crash would leave it: four problems finished, samples of a fifth there, a line cut short
    finished = {line["problem_id"] for line in progress[1:5]}
    orphan = next(row for row in samples if row["problem_id"] not in finished)
    kept = [row for row in samples if row["problem_id"] in finished] + [orphan]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"id": "cut')
    (folder / "good.progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in progress[:5]) + '{"ta')
    (folder / "good.summary.json").unlink()
    main(replace(config, batch_problems=2, verify_workers=2))
    by_id = [sorted(read(where)[0], key=lambda row: row["id"]) for where in (whole, parts)]
    assert by_id[0] == by_id[1]
    different = {"seconds", "settings"}
    summaries = [{k: v for k, v in read(where)[1].items() if k not in different} for where in (whole, parts)]
    assert summaries[0] == summaries[1]


def test_more_problems_may_not_slip_into_another_curation(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, num_problems=2)
    main(config)
    with pytest.raises(ValueError, match="another temperature; name another file, or add --overwrite"):
        main(replace(config, temperature=0.7))
    main(replace(config, temperature=0.7, overwrite=True))
    assert read(tmp_path)[1]["settings"]["temperature"] == 0.7


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
@pytest.mark.parametrize("target", ["/dev/null", "/dev/stdout", "/dev/fd/1"])
def test_what_is_no_file_cannot_hold_a_curation_and_is_left_alone(checkpoint, tmp_path, target, flags):
    (tmp_path / "out.jsonl").symlink_to(target)
    with pytest.raises(ValueError, match=r"out.jsonl': is no file, and curate reads again what it wrote"):
        main(settings(checkpoint, tmp_path, out=str(tmp_path / "out.jsonl"), **flags))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").is_symlink()


def test_a_curation_that_is_deleted_through_a_link_leaves_the_link(checkpoint, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.jsonl").symlink_to(tmp_path / "real.jsonl")
    config = settings(checkpoint, tmp_path, num_problems=2)
    for changes in ({}, {"temperature": 0.7, "overwrite": True}):
        main(replace(config, **changes))
        assert (tmp_path / "data" / "good.jsonl").is_symlink()
        assert lines(tmp_path / "real.jsonl") == read(tmp_path)[0] != []


def test_a_curation_from_before_a_setting_existed_continues_under_its_default(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, num_problems=2)
    main(config)
    progress = tmp_path / "data" / "good.progress.jsonl"
    first, *others = lines(progress)
    for name in ("top_k", "min_p"):
        del first["settings"][name]
    progress.write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))
    before = read(tmp_path)[0]
    main(config)
    assert read(tmp_path)[0] == before
    with pytest.raises(ValueError, match="another top_k;"):
        main(replace(config, top_k=5))


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
def test_a_curation_that_another_process_is_at_is_refused_as_it_is(checkpoint, tmp_path, flags):
    config = settings(checkpoint, tmp_path, num_problems=2)
    main(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    with closing(Record(config)), pytest.raises(ValueError, match="another run is writing there"):
        main(replace(config, num_problems=2, **flags))
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    main(replace(config, **flags))
    assert len(read(tmp_path)[0]) == before["good.jsonl"].count(b"\n")


def test_an_overwriting_that_was_killed_leaves_nothing_finished_without_its_samples(checkpoint, tmp_path, monkeypatch):
    config = settings(checkpoint, tmp_path, num_problems=3)
    main(config)
    before = read(tmp_path)[0]

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", die)
        with pytest.raises(KeyboardInterrupt):
            main(replace(config, overwrite=True))
    with pytest.raises(ValueError, match="add --overwrite"):
        main(config)
    main(replace(config, overwrite=True))
    assert read(tmp_path)[0] == before


@pytest.mark.parametrize(
    "line", ['{"task": "checksum", "problem_id": ["p"]}', '{"task": "checksum", "problem_id": "p"}']
)
def test_a_line_of_the_progress_that_lacks_what_is_counted_is_damage(checkpoint, tmp_path, line, capsys):
    config = settings(checkpoint, tmp_path, num_problems=3)
    main(config)
    before = read(tmp_path)[0]
    with (tmp_path / "data" / "good.progress.jsonl").open("a") as file:
        file.write(line + "\n")
    main(config)
    assert read(tmp_path)[0] == before
    assert "torn or damaged lines dropped: 1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("torn", [b"", b'{"sett', b'{"settings": {"path": "m'])
def test_a_curation_killed_while_it_began_is_begun_again(checkpoint, tmp_path, torn):
    config = settings(checkpoint, tmp_path, num_problems=1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.progress.jsonl").write_bytes(torn)
    main(config)
    assert read(tmp_path)[1]["problems"] == 1


@pytest.mark.parametrize("tail", [b"\xff", b'{"task": {}', b"null\n", b"\0\0\0"])
def test_damage_at_the_end_of_a_curation_s_files_costs_only_the_unfinished(checkpoint, tmp_path, tail, capsys):
    config = settings(checkpoint, tmp_path, num_problems=3)
    main(config)
    before = read(tmp_path)[0]
    for name in ("good.jsonl", "good.progress.jsonl"):
        with (tmp_path / "data" / name).open("ab") as file:
            file.write(tail)
    main(config)
    assert read(tmp_path)[0] == before
    assert "torn or damaged lines dropped: 1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["good.jsonl", "good.progress.jsonl", "."])
def test_files_deleted_while_a_curation_is_at_work_are_an_error(checkpoint, tmp_path, name):
    with closing(Record(settings(checkpoint, tmp_path))) as record:
        record.flush()
        if name == ".":
            shutil.rmtree(tmp_path / "data")
        else:
            (tmp_path / "data" / name).unlink()
        with pytest.raises(FileNotFoundError, match="is gone"):
            record.flush()


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.progress.jsonl"])
def test_a_foreign_progress_file_is_not_touched(checkpoint, tmp_path, name):
    (tmp_path / name).write_text("my diary")
    with pytest.raises(ValueError, match=r"was not written by curate|is no record of a curation"):
        main(settings(checkpoint, tmp_path, out=str(tmp_path / "mine.jsonl")))
    assert (tmp_path / name).read_text() == "my diary"


def test_half_a_character_in_a_sample_that_was_kept_stays_as_it_is(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, num_problems=2, correct_only=False)
    main(config)
    data = tmp_path / "data" / "good.jsonl"
    rows = [json.loads(line) | {"completion": "\ud800"} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(config)
    assert [json.loads(line) for line in data.read_text().splitlines()] == rows


def test_a_foreign_file_is_not_touched(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, out=str(tmp_path / "mine.jsonl"))
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="was not written by curate"):
        main(config)
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


def test_the_summary_comes_back_in_process_and_a_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    config = settings(checkpoint, tmp_path, num_problems=3)
    main(replace(config, dry_run=True))
    text = capsys.readouterr().out
    assert from_dict(CurateConfig, tomllib.loads(text)) == replace(config, dry_run=True)
    assert "# samples     at most 24" in text
    assert not (tmp_path / "data").exists()
    model, tokenizer, _ = open_model(checkpoint, device="cpu")
    assert curate(Engine(model, tokenizer, config.engine), tokenizer, config) == read(tmp_path)[1]


def test_nothing_kept_is_said_aloud(checkpoint, tmp_path, capsys):
    main(settings(checkpoint, tmp_path, num_problems=2, max_tokens=1, quiet=True))
    assert "nothing was kept" in capsys.readouterr().err
    assert read(tmp_path)[1]["problems_with_none"] == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("out", "rows.txt", "must be a file that ends in .jsonl"),
        ("keep_per_problem", 0, "keep_per_problem = 0"),
        ("temperature", 0.0, "8 equal samples"),
        ("max_solve_rate", 1.5, r"must lie in \[0, 1\]"),
        ("max_completion_tokens", 0, "below min_completion_tokens"),
    ],
)
def test_bad_settings_name_the_value_and_the_rule(field, value, message):
    with pytest.raises(ValueError, match=message):
        from_dict(CurateConfig, {"path": "m", field: value})


def test_settings_survive_a_recipe():
    config = CurateConfig("m", task_options={"countdown": {"numbers": 4}}, max_completion_tokens=50)
    assert from_dict(CurateConfig, to_dict(config)) == config


def test_a_curation_is_extended_and_keeps_what_is_there(checkpoint, tmp_path):
    small = settings(checkpoint, tmp_path / "grown", num_problems=4, num_samples=4, keep_per_problem=1)
    main(small)
    before, _ = read(tmp_path / "grown")
    large = replace(small, num_problems=7, num_samples=16, keep_per_problem=3)
    main(large)
    after, summary = read(tmp_path / "grown")
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert len({row["id"] for row in after}) == len(after) == summary["kept"]
    assert len({(row["problem_id"], row["completion"].strip()) for row in after}) == len(after)
    assert max(Counter(row["problem_id"] for row in after).values()) == 3
    assert (summary["problems"], summary["samples"]) == (7, 7 * 16)
    assert summary["kept"] + sum(summary["dropped"].values()) == sum(summary["status_counts"].values()) == 7 * 16
    again = replace(large, out=str(tmp_path / "again" / "data" / "good.jsonl"), num_samples=4, keep_per_problem=99)
    main(again)
    first = {(row["problem_id"], row["completion"]) for row in read(tmp_path / "again")[0]}
    later = [row for row in after if int(row["id"].partition("#")[2]) >= 4]
    assert sum((row["problem_id"], row["completion"]) in first for row in later) < len(later) / 2
    main(large)
    assert read(tmp_path / "grown")[0] == after


def test_problems_that_have_all_they_may_keep_are_not_sampled_again(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, num_problems=6, keep_per_problem=1)
    main(config)
    full = {row["problem_id"] for row in read(tmp_path)[0]}
    main(replace(config, num_samples=12))
    summary = read(tmp_path)[1]
    assert summary["samples"] == 6 * 8 + (6 - len(full)) * 4


def test_a_curation_killed_while_it_was_extended_continues_to_the_same_data(checkpoint, tmp_path):
    small = settings(checkpoint, tmp_path, num_problems=5, num_samples=3)
    main(small)
    large = replace(small, num_samples=9, keep_per_problem=4)
    main(large)
    folder = tmp_path / "data"
    samples, progress = ((folder / name).read_bytes() for name in ("good.jsonl", "good.progress.jsonl"))
    first_rows = sorted(row["id"] for row in read(tmp_path)[0])
    rounds = progress.split(b"\n")
    assert [b'"settings"' in line for line in rounds[:-1]] == [True, *[False] * 5, True, *[False] * 5]
    for num_lines in range(1, len(rounds)):
        (folder / "good.jsonl").write_bytes(samples)
        (folder / "good.progress.jsonl").write_bytes(b"\n".join(rounds[:num_lines]) + b'\n{"ta')
        main(large)
        if num_lines >= 7:  # after the settings of the extension
            assert sorted(row["id"] for row in read(tmp_path)[0]) == first_rows
        assert read(tmp_path)[1]["samples"] == 5 * 9


def test_a_curation_is_extended_by_a_task(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, num_problems=3, task_options={SPEC: {"count": 5}})
    main(config)
    before, _ = read(tmp_path)
    more = ("toy_task:Brief", SPEC)
    main(replace(config, tasks=more, task_options={SPEC: {"count": 5}, "toy_task:Brief": {"prefix": "tell"}}))
    after, summary = read(tmp_path)
    assert after[: len(before)] == before
    assert {row["task"] for row in after} == {"checksum", "brief"}
    assert summary["problems"] == 6
    with pytest.raises(ValueError, match="another task_options;"):
        main(replace(config, tasks=more, task_options={SPEC: {"count": 6}}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_problems", 2, "num_problems = 3, and now it is 2; it may grow but not shrink"),
        ("num_samples", 7, "num_samples = 8, and now it is 7"),
        ("keep_per_problem", 1, "keep_per_problem = 2, and now it is 1"),
        ("tasks", ("toy_task:Brief",), r"tasks = \['toy_task:Checksum'\], and now it is \['toy_task:Brief'\]"),
        ("max_solve_rate", 0.5, "another max_solve_rate; name another file"),
    ],
)
def test_a_curation_does_not_shrink_or_change(checkpoint, tmp_path, field, value, message):
    config = settings(checkpoint, tmp_path, num_problems=3)
    main(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    with pytest.raises(ValueError, match=message):
        main(replace(config, **{field: value}))
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_what_was_drawn_before_counts_when_more_is_chosen_from():
    config = CurateConfig("m", keep_per_problem=3, max_solve_rate=0.5)
    answered = Answered(
        PROBLEM, Prompt([5], opens_thought=True), [sample("a"), sample("b"), sample("c", correct=False)]
    )
    before = Tally(samples=5, correct=1, kept=1, texts=set())
    assert select(answered, config, before)[0] == [0, 1]
    assert select(answered, config, replace(before, kept=2))[0] in ([0], [1])
    assert select(answered, config, replace(before, correct=3))[0] == []  # 5 of 8 are right
    assert before.lacks(replace(config, num_samples=6))
    assert not before.lacks(replace(config, num_samples=5))
    assert not replace(before, kept=3).lacks(replace(config, num_samples=6))


@pytest.mark.parametrize("thinking", [True, False])
def test_data_are_curated_with_and_without_thoughts(hybrid, tmp_path, thinking):
    config = settings(hybrid, tmp_path, thinking=thinking, num_problems=4)
    main(config)
    rows, summary = read(tmp_path)
    assert rows
    assert summary["settings"]["thinking"] is thinking
    assert all(row["completion"].startswith("</think>\n\n") is not thinking for row in rows)
    with pytest.raises(ValueError, match="another thinking;"):
        main(replace(config, thinking=not thinking))
