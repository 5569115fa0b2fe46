"""Evaluation from end to end with a real tiny model, its files recomputed by hand."""

import json
import shutil
import tomllib
from collections import Counter, defaultdict
from dataclasses import replace
from operator import itemgetter
from statistics import fmean

import pytest
from toy_task import Checksum

from kogia.checkpoint.open import open_model
from kogia.config import from_dict, to_dict
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.eval.config import EvalConfig
from kogia.eval.metrics import pass_at_k
from kogia.eval.run import evaluate, main, output_directory
from kogia.eval.sample import answer_problems, choose_problems
from kogia.eval.summary import read_samples, summarise
from kogia.eval.table import print_results
from kogia.inference.llm import LLM
from kogia.tasks.pool import VerifyPool
from kogia.terminal import SamplingProgress

SPEC = "toy_task:Checksum"
KEYS = (
    "name task split checkpoint num_questions num_samples pass@1 pass@8 maj@8 greedy think_tokens completion_tokens "
    "truncated parse_fail give_up false_claim claims_verified status_counts sampling mtp_acceptance seconds"
).split()


def settings(checkpoint, tmp_path, **changes):
    base = EvalConfig(
        path=str(checkpoint),
        tasks=(SPEC,),
        num_samples=8,
        max_tokens=24,
        greedy=True,
        k=(1, 4, 8),
        out=str(tmp_path / "evals"),
        engine=EngineConfig(num_blocks=256, max_sequences=16),
        verify_workers=1,
        device="cpu",
        quiet=True,
        batch_questions=5,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    """(directory, EVAL.json, rows of EVAL.jsonl) of one evaluation through the command's entry point."""
    config = settings(checkpoint, tmp_path_factory.mktemp("run"))
    main(config)
    out = output_directory(config)
    return out, json.loads((out / "Checksum.json").read_text()), read_samples(out / "Checksum.jsonl")


def test_every_sample_is_on_disk_once(written):
    out, summary, rows = written
    assert {path.name for path in out.iterdir()} == {"Checksum.json", "Checksum.jsonl"}
    places = Counter((row["problem_id"], row["sample"]) for row in rows)
    assert places == Counter({(f"test/{i}", s): 1 for i in range(12) for s in (-1, *range(8))})
    assert set(KEYS) <= summary.keys()
    assert summary["deterministic"] is True
    assert (summary["num_questions"], summary["num_samples"], summary["split"]) == (12, 8, "test")


def test_the_summary_is_what_the_samples_say(written):
    _, summary, rows = written
    groups = defaultdict(list)
    for row in rows:
        if row["sample"] >= 0:
            groups[row["problem_id"]].append(row)
    sampled = [row for group in groups.values() for row in group]
    assert 0 < sum(row["correct"] for row in sampled) < len(sampled)
    assert summary["pass@1"][0] == pytest.approx(fmean(row["correct"] for row in sampled))
    for k in (4, 8):
        expected = fmean(pass_at_k(8, sum(row["correct"] for row in group), k) for group in groups.values())
        assert summary[f"pass@{k}"][0] == pytest.approx(expected)
    assert summary["pass@1"][1] < summary["pass@1"][0] < summary["pass@1"][2]
    assert summary["greedy"][0] == pytest.approx(fmean(row["correct"] for row in rows if row["sample"] == -1))
    statuses = Counter(row["status"] for row in sampled)
    assert summary["status_counts"] == dict(statuses)
    assert summary["truncated"] == pytest.approx(fmean(row["truncated"] for row in sampled))
    assert summary["false_claim"] == pytest.approx(statuses["wrong"] / 96)
    assert summary["claims_verified"] == pytest.approx(statuses["ok"] / (statuses["ok"] + statuses["wrong"]))
    assert summary["completion_tokens"] == pytest.approx(fmean(row["num_tokens"] for row in sampled))


def test_the_files_can_be_summarised_again(written):
    _, summary, rows = written
    again = summarise(rows, (1, 4, 8))
    assert {key: summary[key] for key in again} == again


def test_the_same_seed_gives_the_same_samples_whatever_the_batching(checkpoint, tmp_path, written):
    _, _, rows = written
    config = settings(checkpoint, tmp_path, batch_questions=3, engine=EngineConfig(num_blocks=128, max_sequences=7))
    main(config)
    again = read_samples(tmp_path / "evals" / "Checksum.jsonl")
    texts = {(row["problem_id"], row["sample"]): row["text"] for row in rows}
    assert {(row["problem_id"], row["sample"]): row["text"] for row in again} == texts


def test_speculative_decoding_reports_acceptance(checkpoint, tmp_path):
    engine = EngineConfig(num_blocks=256, max_sequences=16, num_draft_tokens=1)
    main(settings(checkpoint, tmp_path, engine=engine, num_questions=3))
    summary = json.loads((tmp_path / "evals" / "Checksum.json").read_text())
    assert 0.0 <= summary["mtp_acceptance"] <= 1.0
    assert summary["sampling"]["num_draft_tokens"] == 1


def test_a_comparison_is_paired_on_the_questions(checkpoint, tmp_path, written):
    out, before, rows = written
    main(settings(checkpoint, tmp_path, seed=1, compare=str(out / "Checksum.json"), num_questions=8))
    summary = json.loads((tmp_path / "evals" / "Checksum.json").read_text())
    after = read_samples(tmp_path / "evals" / "Checksum.jsonl")
    shared = {row["problem_id"] for row in after}
    assert len(shared) == 8
    means = [
        fmean(row["correct"] for row in some if row["sample"] >= 0 and row["problem_id"] in shared)
        for some in (rows, after)
    ]
    compared = summary["compare"]["pass@1"]
    assert compared["num_questions"] == 8
    assert compared["difference"][0] == pytest.approx(means[1] - means[0])
    assert summary["compare"]["checkpoint"] == before["checkpoint"]


def test_questions_posed_differently_are_not_compared(checkpoint, tmp_path, written):
    out, _, _ = written
    options = {SPEC: {"prefix": "tell"}}
    with pytest.raises(ValueError, match="reads differently"):
        main(settings(checkpoint, tmp_path, task_options=options, compare=str(out), num_questions=2))


def test_a_missing_comparison_is_reported_before_anything_is_sampled(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*is missing; name the NAME.json"):
        main(settings(checkpoint, tmp_path, compare=str(tmp_path / "nowhere.json")))
    assert not (tmp_path / "evals").exists()


def test_an_interrupted_evaluation_keeps_what_was_verified(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, greedy=False)
    model, tokenizer, _ = open_model(checkpoint, device="cpu")
    engine = Engine(model, tokenizer, config.engine)

    def interrupt(done: int, total: int, _: int) -> None:
        if done >= 7:
            raise KeyboardInterrupt

    with VerifyPool(SPEC, workers=1) as pool:
        with pytest.raises(KeyboardInterrupt):
            evaluate(engine, tokenizer, Checksum(), pool, config, out=tmp_path, on_progress=interrupt)
        assert engine.num_unfinished == 0
        kept = read_samples(tmp_path / "checksum.partial.jsonl")
        assert len(kept) == 5 * 8
        result = evaluate(engine, tokenizer, Checksum(), pool, config, out=tmp_path)
    assert not (tmp_path / "checksum.partial.jsonl").exists()
    assert len(result.samples) == 12 * 8
    assert result.score() is not None and result.score("greedy") is None


def interrupted(config, after):
    """Run `config` to Ctrl-C after so many questions, as `main` meets it."""

    def interrupt(self, done: int, total: int, _: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingProgress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(config)


@pytest.mark.parametrize("after", [7, 19])
def test_a_resumed_evaluation_equals_one_that_was_never_interrupted(checkpoint, tmp_path, written, after, capsys):
    _, whole, rows = written
    config = settings(checkpoint, tmp_path)
    interrupted(config, after)
    assert "--resume" in capsys.readouterr().err
    out = tmp_path / "evals"
    partial = out / "Checksum.partial.jsonl"
    assert not list(out.glob("*.json"))  # nothing that a report would take for an evaluation
    kept = partial.read_bytes()
    torn = kept.rstrip(b"\n").rpartition(b"\n")[0] + b"\n" + kept[:40]  # a kill while the last question was written
    partial.write_bytes(torn)
    before = {(row["problem_id"], row["sample"] < 0) for row in map(json.loads, kept.decode().splitlines())}
    asked = []

    def recorded(engine, tokenizer, pool, problems, *rest, **options):
        asked.extend(problems)
        return answer_problems(engine, tokenizer, pool, problems, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kogia.eval.run.answer_problems", recorded)
        main(replace(config, resume=True))
    assert len(asked) == 24 - (len(before) - 1)  # what is missing, and the torn one
    place = itemgetter("problem_id", "sample")
    assert sorted(read_samples(out / "Checksum.jsonl"), key=place) == sorted(rows, key=place)
    summary = json.loads((out / "Checksum.json").read_text())
    assert {key: summary[key] for key in KEYS if key != "seconds"} == {
        key: whole[key] for key in KEYS if key != "seconds"
    }
    assert {path.name for path in out.iterdir()} == {"Checksum.json", "Checksum.jsonl"}


def test_several_tasks_are_resumed_where_they_were_interrupted(checkpoint, tmp_path, capsys):
    config = settings(checkpoint, tmp_path, tasks=(SPEC, "toy_task:Hopeless"), greedy=False)
    main(config)
    out = tmp_path / "evals"
    first = (out / "Checksum.jsonl").stat().st_mtime_ns
    second = read_samples(out / "Hopeless.jsonl")
    (out / "Hopeless.json").unlink()
    (out / "Hopeless.jsonl").unlink()
    main(replace(config, resume=True))
    assert (out / "Checksum.jsonl").stat().st_mtime_ns == first  # complete: not sampled again
    place = itemgetter("problem_id", "sample")
    assert sorted(read_samples(out / "Hopeless.jsonl"), key=place) == sorted(second, key=place)
    assert "Checksum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 0.5}, r"temperature = 1.0, and now it is 0.5"),
        ({"num_samples": 4, "k": (1,)}, "k = "),
        ({"task_options": {SPEC: {"prefix": "tell"}}}, "task_options = {}"),
        ({"question_seed": 1}, "question_seed = 0, and now it is 1"),
    ],
)
def test_an_evaluation_is_not_resumed_under_other_settings(checkpoint, tmp_path, changes, named):
    config = settings(checkpoint, tmp_path)
    interrupted(config, 7)
    with pytest.raises(ValueError, match=f"resume: .*Checksum.partial.jsonl was begun with {named}"):
        main(replace(config, resume=True, **changes))
    assert (tmp_path / "evals" / "Checksum.partial.jsonl").stat().st_size > 0


def test_interrupted_samples_are_not_lost_by_accident_and_nothing_is_resumed_from_nothing(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="resume: nothing was begun in"):
        main(replace(config, resume=True))
    interrupted(config, 7)
    with pytest.raises(ValueError, match=r"Checksum.partial.jsonl: .*--resume goes on with them"):
        main(config)


def test_an_evaluation_that_another_process_is_at_is_refused_and_one_of_another_name_is_not(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, greedy=False)
    model, tokenizer, _ = open_model(checkpoint, device="cpu")
    refused = []

    def meanwhile(done: int, total: int, _: int) -> None:
        partial = tmp_path / "evals" / "Checksum.partial.jsonl"
        if refused or not partial.stat().st_size:
            return
        for flags in ({}, {"resume": True}):
            with pytest.raises(ValueError, match=r"Checksum.partial.jsonl': another run is writing there") as error:
                main(replace(config, **flags))
            refused.append(str(error.value))
        main(replace(config, name="other", num_questions=1))

    with VerifyPool(SPEC, workers=1) as pool:
        engine = Engine(model, tokenizer, config.engine)
        options = {"name": "Checksum", "out": tmp_path / "evals", "on_progress": meanwhile}
        result = evaluate(engine, tokenizer, Checksum(), pool, config, **options)
    assert len(refused) == 2
    assert len(read_samples(tmp_path / "evals" / "Checksum.jsonl")) == len(result.samples) == 12 * 8
    names = {f"{name}.json{end}" for name in ("Checksum", "other") for end in ("", "l")}
    assert {path.name for path in (tmp_path / "evals").iterdir()} == names


@pytest.mark.parametrize("resume", [True, False])
def test_settings_that_a_kill_at_the_very_end_left_go_with_the_next_evaluation(checkpoint, tmp_path, resume):
    config = settings(checkpoint, tmp_path, greedy=False, num_questions=2)
    main(config)
    summary = json.loads((tmp_path / "evals" / "Checksum.json").read_text())
    (tmp_path / "evals" / "Checksum.partial.settings").write_text(json.dumps(summary["settings"]))
    before = (tmp_path / "evals" / "Checksum.jsonl").read_bytes()
    main(replace(config, resume=resume))
    assert (tmp_path / "evals" / "Checksum.jsonl").read_bytes() == before
    assert {path.name for path in (tmp_path / "evals").iterdir()} == {"Checksum.json", "Checksum.jsonl"}


@pytest.mark.parametrize("after", [0, 7])
def test_an_output_that_is_deleted_meanwhile_is_an_error_and_not_made_again(checkpoint, tmp_path, after):
    config = settings(checkpoint, tmp_path, greedy=False)
    model, tokenizer, _ = open_model(checkpoint, device="cpu")

    def delete(done: int, total: int, _: int) -> None:
        if done >= after:
            shutil.rmtree(tmp_path / "evals", ignore_errors=True)

    engine = Engine(model, tokenizer, config.engine)
    with VerifyPool(SPEC, workers=1) as pool, pytest.raises(FileNotFoundError, match=r"partial.jsonl is gone"):
        evaluate(engine, tokenizer, Checksum(), pool, config, out=tmp_path / "evals", on_progress=delete)
    assert not (tmp_path / "evals").exists()


@pytest.mark.parametrize(
    ("end", "content", "reason"),
    [
        ("jsonl", b"[]\n", "line 1: lacks correct"),
        ("jsonl", b'{"problem_id": 5}\n', "line 1: lacks correct"),
        ("jsonl", b"{" * 5000 + b"\n", "line 1: is not JSON"),
        ("jsonl", b"\xff\n", "is not"),
        ("settings", b"[]", "lacks a whole Checksum.partial.settings"),
        ("settings", b"\xff", "lacks a whole Checksum.partial.settings"),
    ],
)
def test_damaged_files_of_an_interrupted_evaluation_are_named_with_the_way_out(
    checkpoint, tmp_path, end, content, reason
):
    config = settings(checkpoint, tmp_path)
    interrupted(config, 7)
    (tmp_path / "evals" / f"Checksum.partial.{end}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"resume: .*Checksum.partial.jsonl.* {reason}.*to begin anew"):
        main(replace(config, resume=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Checksum.json", b"[]"),
        ("Checksum.json", b'{"split": "test", "sampling": 5}'),
        ("Checksum.json", b"[" * 5000),
        ("Checksum.jsonl", b"\xff"),
        ("Checksum.jsonl", b'{"problem_id": ["p"], "prompt": "q", "sample": 0, "correct": true}'),
    ],
)
def test_a_damaged_evaluation_to_compare_with_is_named(written, tmp_path, name, content):
    shutil.copytree(written[0], tmp_path / "earlier")
    (tmp_path / "earlier" / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"earlier/Checksum.json"):
        main(settings(tmp_path / "no-model-is-here", tmp_path, compare=str(tmp_path / "earlier")))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": 0.5}, "made with temperature = 1.0, this one would be with temperature = 0.5"),
        ({"top_k": 3, "min_p": 0.5}, "made with top_k = 0, min_p = 0.0, this one would be with top_k = 3, min_p = 0.5"),
        ({"max_tokens": 20, "num_samples": 0, "k": ()}, "made with max_tokens = 24, this one"),
        ({"split": "train"}, "made with split = 'test', this one would be with split = 'train'"),
        ({"task_options": {SPEC: {"prefix": "tell"}}}, "question 'test/.*' reads differently"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused_before_the_model_is_opened(written, tmp_path, changes, reason):
    config = settings(tmp_path / "no-model-is-here", tmp_path, compare=str(written[0]), **changes)
    with pytest.raises(ValueError, match=reason):
        main(config)
    assert not (tmp_path / "evals").exists()


def test_sampled_answers_are_not_compared_with_greedy_ones(checkpoint, tmp_path):
    main(settings(checkpoint, tmp_path, num_questions=3, num_samples=2, k=(), greedy=False))
    before = tmp_path / "evals" / "Checksum.json"
    other = {"out": str(tmp_path / "other"), "compare": str(before), "num_questions": 3}
    with pytest.raises(ValueError, match="nothing to compare; set num_samples"):
        main(settings("no-model", tmp_path, num_samples=0, k=(), **other))
    # greedy answers depend on none of the filters
    main(settings(checkpoint, tmp_path, num_questions=3, num_samples=0, k=(), out=str(tmp_path / "greedy")))
    other["compare"] = str(tmp_path / "greedy" / "Checksum.json")
    main(settings(checkpoint, tmp_path, num_samples=1, k=(), temperature=0.5, top_k=7, **other))
    compared = json.loads((tmp_path / "other" / "Checksum.json").read_text())["compare"]
    assert compared["pass@1"] is None and compared["greedy"]["difference"][0] == 0.0


def test_truncation_and_the_table_are_shown(checkpoint, tmp_path, capsys):
    main(settings(checkpoint, tmp_path, max_tokens=2, num_questions=4))
    output = capsys.readouterr()
    assert "pass@1" in output.out and "greedy" in output.out and "truncated" in output.out
    assert "were cut off at max_tokens = 2" in output.err


def test_greedy_alone_needs_no_samples(checkpoint, tmp_path):
    main(settings(checkpoint, tmp_path, num_samples=0, k=(), num_questions=3))
    summary = json.loads((tmp_path / "evals" / "Checksum.json").read_text())
    assert summary["pass@1"] is None and summary["pass@8"] is None
    assert len(summary["greedy"]) == 3


def test_a_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    config = settings(checkpoint, tmp_path, dry_run=True)
    main(config)
    text = capsys.readouterr().out
    assert from_dict(EvalConfig, tomllib.loads(text)) == config
    samples = config.num_questions * (config.num_samples + int(config.greedy))
    assert f"# samples     at most {samples:,} of at most {config.max_tokens} tokens" in text
    main(replace(config, greedy=not config.greedy))
    other = config.num_questions * (config.num_samples + int(not config.greedy))
    assert f"# samples     at most {other:,} of" in capsys.readouterr().out
    assert not (tmp_path / "evals").exists()


def test_fewer_questions_are_a_part_of_the_same_questions():
    task = Checksum(count=50)
    few, many = (choose_problems(task, "test", n, seed=0) for n in (10, 30))
    assert [p.id for p in many[:10]] == [p.id for p in few]
    assert [p.id for p in choose_problems(task, "test", 10, seed=1)] != [p.id for p in few]
    assert len(choose_problems(task, "test", 99, seed=0)) == 50


def test_tasks_without_usable_problems_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="several problems have the id 'same'"):
        main(settings(checkpoint, tmp_path, tasks=("toy_task:Repeats",)))
    with pytest.raises(ValueError, match="no problem in its 'test' split"):
        main(settings(checkpoint, tmp_path, tasks=("toy_task:Empty",)))


def test_a_prompt_beyond_the_context_names_its_problem(checkpoint, tmp_path):
    options = {SPEC: {"prefix": "say " * 200}}
    with pytest.raises(ValueError, match=r"problem 'test/\d+': .*the model's context is 128 .*the first of 12 in 12"):
        main(settings(checkpoint, tmp_path, task_options=options))
    with pytest.raises(ValueError, match="none is left: take a model with a longer context"):
        main(settings(checkpoint, tmp_path, task_options=options, long_prompts="skip"))


def test_prompts_beyond_the_context_are_named_before_the_first_answer_and_left_out_if_asked(
    checkpoint, tmp_path, capsys
):
    spec = "toy_task:Wordy"
    with pytest.raises(ValueError, match=r"problem 'test/(3|7|11)': .*the first of 3 in 12 problems; shorten them, or"):
        main(settings(checkpoint, tmp_path, tasks=(SPEC, spec)))
    assert not (tmp_path / "evals").exists()  # not even of the first task
    main(settings(checkpoint, tmp_path, tasks=(spec,), long_prompts="skip", greedy=False))
    rows = read_samples(tmp_path / "evals" / "Wordy.jsonl")
    assert {row["problem_id"] for row in rows} == {f"test/{i}" for i in range(12) if i % 4 != 3}
    assert json.loads((tmp_path / "evals" / "Wordy.json").read_text())["num_questions"] == 9
    assert capsys.readouterr().err.count("the first of 3 in 12 problems; left out") == 1


def test_the_output_directory_follows_the_run():
    assert str(output_directory(EvalConfig("m", out="x"))) == "x"
    assert str(output_directory(EvalConfig("runs/a/checkpoints/step-000010"))) == "runs/a/evals"
    assert str(output_directory(EvalConfig("elsewhere"))) == "evals"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tasks", [], "tasks is empty"),
        ("tasks", ["countdown", "countdown"], "named once"),
        ("task_options", {"other": {"numbers": 4}}, "no such task"),
        ("num_samples", 0, "or 0 together with greedy"),
        ("temperature", 0.0, "8 equal samples"),
        ("num_questions", 0, "num_questions = 0"),
        ("k", [0], r"k = \[0\]: each must lie in 1..num_samples = 8"),
        ("k", [1, 16], "num_samples = 8; raise num_samples"),
        ("k", [9], "num_samples = 8; raise num_samples"),
        ("verify_timeout", 0.0, "above 0 seconds"),
    ],
)
def test_bad_settings_name_the_value_and_the_rule(field, value, message):
    with pytest.raises(ValueError, match=message):
        from_dict(EvalConfig, {"path": "m", field: value})


def test_settings_survive_a_recipe():
    config = EvalConfig("m", tasks=("countdown", "a.b:C"), task_options={"countdown": {"numbers": 4}}, k=(1, 2))
    assert from_dict(EvalConfig, to_dict(config)) == config


def test_a_verifier_that_always_raises_stops_the_evaluation_with_its_first_error(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"'toy_task:Broken': 40 of 40 checks failed, the first with .*no_such_key"):
        main(settings(checkpoint, tmp_path, tasks=("toy_task:Broken",)))


def test_checks_that_fail_now_and_then_are_shown_and_have_no_reward(checkpoint, tmp_path, capsys):
    main(settings(checkpoint, tmp_path, tasks=("toy_task:Fragile",)))
    rows = read_samples(tmp_path / "evals" / "Fragile.jsonl")
    summary = json.loads((tmp_path / "evals" / "Fragile.json").read_text())
    sampled = [row for row in rows if row["sample"] >= 0]
    judged = [row["reward"] for row in sampled if row["status"] != "error"]
    assert 0 < len(judged) < len(sampled)
    assert summary["reward"] == pytest.approx(fmean(judged))
    assert f"failed or timed out on {len(sampled) - len(judged)} samples" in capsys.readouterr().err
    assert summary["first_failure"] == "RecursionError: the check broke"


def test_half_a_surrogate_pair_in_an_answer_reaches_the_file_as_an_escape(checkpoint, tmp_path):
    main(settings(checkpoint, tmp_path, tasks=("toy_task:Surrogate",), num_questions=3))
    rows = read_samples(tmp_path / "evals" / "Surrogate.jsonl")
    assert {row["extracted"] for row in rows} == {"\\ud800"}
    assert {row["detail"] for row in rows} == {"x\\udfff"}


@pytest.mark.parametrize("name", ["Checksum", "a-name-that-is-longer-than-any-terminal-" * 3, "[bold]x[/]"])
def test_the_table_fits_eighty_columns(written, name, capsys):
    _, summary, _ = written
    wide = {f"{kind}@{k}": [1.0, 0.9994, 1.0] for k in (64, 1024) for kind in ("pass", "maj")}
    print_results([summary | wide | {"name": name, "truncated": 1.0, "num_questions": 100_000}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert name in "".join(line.strip() for line in lines)


@pytest.mark.parametrize("thinking", [True, False, None])
def test_a_model_that_thinks_or_not_is_evaluated_with_and_without(hybrid, tmp_path, thinking):
    main(settings(hybrid, tmp_path, thinking=thinking, num_questions=3, num_samples=4, k=(), greedy=False))
    summary = json.loads((tmp_path / "evals" / "Checksum.json").read_text())
    rows = read_samples(tmp_path / "evals" / "Checksum.jsonl")
    llm, params = LLM(hybrid, device="cpu"), SamplingParams(n=4, max_tokens=24, seed=0)
    for question in {row["prompt"] for row in rows}:
        expected = llm.chat([{"role": "user", "content": question}], params, thinking=thinking)
        assert [row["text"] for row in rows if row["prompt"] == question] == [each.text for each in expected]
        assert {each.opens_thought for each in expected} == {thinking is True}
    silent = [row for row in rows if "think>" not in row["text"]]
    assert silent
    assert all(row["think_tokens"] == (row["num_tokens"] if thinking else 0) for row in silent)
    assert summary["sampling"].get("thinking") is thinking
    with pytest.raises(ValueError, match=rf"compare = .* made with thinking = {thinking}"):
        main(settings(hybrid, tmp_path, thinking=not thinking, compare=str(tmp_path / "evals"), greedy=False))


def test_a_thinking_switch_that_is_not_there_is_said_before_anything_is_loaded(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    for dry_run in (False, True):
        with pytest.raises(ValueError, match="thinking = True: this model's chat template has no such switch"):
            main(settings(copy, tmp_path, thinking=True, dry_run=dry_run))


def test_each_number_of_active_experts_is_an_evaluation_of_its_own_and_they_are_shown_side_by_side(
    checkpoint, tmp_path, written, capsys
):
    config, asked = settings(checkpoint, tmp_path, active_experts=(1, 2, 4)), []

    def recorded(engine, tokenizer, pool, problems, params, **options):
        asked.append(params.active_experts)
        return answer_problems(engine, tokenizer, pool, problems, params, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kogia.eval.run.answer_problems", recorded)
        main(config)
    assert asked == [1, 1, 2, 2, 4, 4]  # sampled answers, then greedy ones
    shown = capsys.readouterr()
    out = tmp_path / "evals"
    names = [f"Checksum-{number}experts" for number in (1, 2, 4)]
    assert {path.name for path in out.iterdir()} == {f"{name}.json{end}" for name in names for end in ("", "l")}
    summaries = [json.loads((out / f"{name}.json").read_text()) for name in names]
    assert [summary["sampling"]["active_experts"] for summary in summaries] == [1, 2, 4]
    read = [summary["bytes_per_token"] for summary in summaries]
    assert read[2] - read[1] == pytest.approx(2 * (read[1] - read[0])) and read[1] > read[0]
    assert all(summary["tokens_per_second"] > 0 for summary in summaries)
    texts = sorted((row["problem_id"], row["sample"], row["text"]) for row in read_samples(out / f"{names[1]}.jsonl"))
    assert texts == sorted((row["problem_id"], row["sample"], row["text"]) for row in written[2])
    lines = shown.out[shown.out.index("active experts") :].splitlines()
    for number, summary in zip((1, 2, 4), summaries, strict=True):
        (line,) = [line for line in lines if line.lstrip("│ ").startswith(f"{number} ")]
        assert f"{100 * summary['pass@1'][0]:.1f}%" in line and f"{summary['bytes_per_token'] / 1e6:.2f}" in line
    assert max(map(len, shown.out.splitlines())) <= 80


def test_an_evaluation_at_several_numbers_is_resumed_where_it_was_interrupted(checkpoint, tmp_path):
    config = settings(checkpoint, tmp_path, active_experts=(1, 4), greedy=False)
    main(config)
    out = tmp_path / "evals"
    first, second = out / "Checksum-1experts.jsonl", read_samples(out / "Checksum-4experts.jsonl")
    done = first.stat().st_mtime_ns
    (out / "Checksum-4experts.json").unlink()
    (out / "Checksum-4experts.jsonl").unlink()
    main(replace(config, resume=True))
    assert first.stat().st_mtime_ns == done
    place = itemgetter("problem_id", "sample")
    assert sorted(read_samples(out / "Checksum-4experts.jsonl"), key=place) == sorted(second, key=place)


def test_the_engines_own_number_is_a_setting_that_samples_depend_on(checkpoint, tmp_path):
    engine = EngineConfig(num_blocks=256, max_sequences=16, active_experts=1)
    config = settings(checkpoint, tmp_path, engine=engine)
    interrupted(config, 7)
    trained = replace(engine, active_experts=None)
    with pytest.raises(ValueError, match="begun with active_experts = 1, and now it is None"):
        main(replace(config, resume=True, engine=trained))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active_experts": (2, 5)}, "^active_experts = 5: this model has 4 routed experts; give 1 to 4"),
        ({"engine": EngineConfig(active_experts=5)}, r"^engine\.active_experts = 5: this model has 4"),
    ],
)
def test_numbers_of_experts_that_there_are_not_are_refused_before_anything_is_loaded(
    checkpoint, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        main(settings(checkpoint, tmp_path, **changes))
    assert not (tmp_path / "evals").exists()


def test_numbers_of_experts_are_named_once_and_in_one_place(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"active_experts = \(2, 0\): must be a whole number from 1 to the routed"):
        settings(checkpoint, tmp_path, active_experts=(2, 0))
    with pytest.raises(ValueError, match=r"active_experts = \[2, 2\]: each may be named once"):
        settings(checkpoint, tmp_path, active_experts=(2, 2))
    with pytest.raises(ValueError, match=r"active_experts = \[1\] and engine.active_experts = 2"):
        settings(checkpoint, tmp_path, active_experts=(1,), engine=EngineConfig(active_experts=2))
