import json
import os
import re
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from report.pages import full_demo

from kogia.report.build import write_report
from kogia.report.figures import _tick
from kogia.report.load import load_run
from kogia.report.words import before_and_after, explain_change, explain_student, grouped, headline_group

EVAL = {
    "task": "countdown", "split": "test", "num_questions": 4, "num_samples": 8, "maj@8": None, "think_tokens": 41.5,
    "completion_tokens": 50.0, "truncated": 0.015, "parse_fail": 0.0, "give_up": 0.25, "false_claim": 0.1,
    "claims_verified": 0.72, "status_counts": {"ok": 24, "wrong": 8}, "sampling": {"temperature": 1.0}, "seconds": 1.0,
    "mtp_acceptance": None,
}  # fmt: skip
SAMPLE = {"problem_id": "p1", "prompt": "numbers 1 2 target 3", "sample": 0, "num_tokens": 9, "truncated": False}


def stage(root, name, score, greedy, reach, *, text, status="ok", metrics=None, **fields):
    """A run directory as the commands leave it."""
    run = root / name
    (run / "evals").mkdir(parents=True)
    (run / "run.toml").write_text(f'out = "{name}"\n')
    lines = metrics or [{"step": i, "seconds": i, "loss": 3.0 / i, "max_vio": 0.5 / i} for i in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = EVAL | {"name": "heldout", "checkpoint": name, "pass@1": score, "greedy": greedy, "pass@8": reach}
    result |= fields
    (run / "evals" / "heldout.json").write_text(json.dumps(result))
    sample = SAMPLE | {"text": text, "status": status, "correct": status == "ok", "reward": 1.0, "parts": {}}
    (run / "evals" / "heldout.jsonl").write_text(json.dumps(sample | {"extracted": None}) + "\n")


@pytest.fixture
def demo(tmp_path):
    root = tmp_path / "demo"
    stage(root, "cold_start", [0.243, 0.219, 0.267], [0.25, 0.2, 0.3], [0.75, 0.7, 0.8], text="x no", status="wrong")
    rewards = [{"step": i, "seconds": i, "reward": i / 10, "completion_tokens": 50.0} for i in range(1, 5)]
    text = "<script>alert(1)</script></think>\n1+2"
    stage(root, "grpo", [0.52, 0.486, 0.555], [0.35, 0.3, 0.4], [0.907, 0.87, 0.94], text=text, metrics=rewards)
    (root / "summary.json").write_text(
        json.dumps({"seconds": 660, "peak_memory_bytes": 2**30, "seed": 7, "stages": []})
    )
    return root


def test_the_page_shows_the_figures_of_the_files(demo):
    page = write_report(demo).read_text(encoding="utf-8")
    for figure in ("24.3%", "52.0%", "75.0%", "90.7%", "41.5", "11.0 minutes", "numbers 1 2 target 3"):
        assert figure in page, figure


def test_what_a_model_wrote_is_escaped(demo):
    page = write_report(demo).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_page_asks_nothing_of_any_other_place(demo):
    page = write_report(demo).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:)?//", page)
    assert not re.search(r"url\(\s*[\"']?https?:|@import", page)


def comparison(root):
    """What the page says of the change, or None."""
    stages = load_run(root).stages
    group = headline_group(stages)
    pair = before_and_after(stages, group)
    return None if pair is None else " ".join(explain_change(*pair, group))


def test_each_score_is_said_to_have_changed_and_nothing_is_made_of_it(demo):
    for name, score in (("cold_start", [0.574, 0.53, 0.62]), ("grpo", [0.756, 0.71, 0.8])):
        path = demo / name / "evals" / "heldout.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"maj@8": score}))
    words = comparison(demo)
    for said in (
        "temperature 1.0, went from 24.3% (cold start) to 52.0% (GRPO), +27.7 points; the 95% intervals do not overlap",
        "each time, went from 25.0% (cold start) to 35.0% (GRPO), +10.0 points; the 95% intervals overlap",
        "maj@8, of the most frequent among 8 answers, went from 57.4% (cold start) to 75.6% (GRPO), +18.2 points",
        "pass@8, of any among 8 answers, went from 75.0% (cold start) to 90.7% (GRPO), +15.7 points",
    ):
        assert said in words
    assert not re.search("sharpen|favourite|ability|of the lift", write_report(demo).read_text(encoding="utf-8"))


def test_scores_that_one_side_lacks_are_left_out(demo):
    path = demo / "grpo" / "evals" / "heldout.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"greedy": None, "pass@1": None}))
    words = comparison(demo)
    assert "pass@8" in words
    assert "Greedy" not in words and "pass@1" not in words


@pytest.mark.parametrize(
    "changed",
    [
        {"sampling": {"temperature": 0.6}},
        {"sampling": {"temperature": 1.0, "top_p": 0.95}},
        {"sampling": {}},
        {"num_questions": 300},
        {"num_samples": 16},
        {"pass@16": [0.9, 0.8, 0.95]},
        {"split": "train"},
        {"task": "arithmetic"},
    ],
)
def test_measurements_under_other_conditions_stand_in_a_table_of_their_own(demo, changed):
    path = demo / "grpo" / "evals" / "heldout.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert comparison(demo) is None
    assert [len(group) for group in grouped(load_run(demo).stages)] == [1, 1]
    page = write_report(demo).read_text(encoding="utf-8")
    assert "went from" not in page
    captions = re.findall(r"<figcaption>(countdown.*?|arithmetic.*?)</figcaption>", page)
    assert len(captions) == 4  # of scores and of verdicts
    assert len(set(captions)) == 4 or "pass@16</th>" in page


@pytest.mark.parametrize(
    "checkpoint", ["runs/grpo/checkpoints/step-000048", "./runs/grpo/checkpoints/step-000048", "None", ""]
)
def test_a_checkpoint_is_never_compared_with_itself(tmp_path, checkpoint):
    """A run that was copied, and one that was evaluated twice."""
    root = tmp_path / "copied"
    rewards = [{"step": i, "seconds": i, "reward": i / 10} for i in range(1, 5)]
    here = "runs/grpo/checkpoints/step-000048" if "step" in checkpoint else checkpoint
    stage(root, "grpo copy", [0.447, 0.4, 0.5], None, None, text="x", metrics=rewards, checkpoint=here)
    again = json.loads((root / "grpo copy" / "evals" / "heldout.json").read_text())
    again |= {"name": "again", "pass@1": [0.467, 0.42, 0.52], "checkpoint": checkpoint}
    (root / "grpo copy" / "evals" / "again.json").write_text(json.dumps(again))
    assert comparison(root) is None
    page = write_report(root).read_text(encoding="utf-8")
    assert "44.7%" in page and "46.7%" in page and "went from" not in page
    if "step" in checkpoint:
        stage(root, "grpo", [0.5, 0.4, 0.6], None, None, text="x", metrics=rewards, checkpoint=checkpoint)
        assert comparison(root) is None
    stage(root, "base", [0.1, 0.0, 0.2], None, None, text="x", checkpoint="runs/base")
    assert "went from 10.0% (base) to" in comparison(root)


def test_two_checkpoints_of_one_run_are_told_apart_by_their_evaluations(tmp_path):
    stage(tmp_path, "grpo", [0.2, 0.1, 0.3], None, None, text="x", checkpoint="grpo/checkpoints/step-000010")
    later = json.loads((tmp_path / "grpo" / "evals" / "heldout.json").read_text())
    later |= {"name": "later", "pass@1": [0.4, 0.3, 0.5], "checkpoint": "grpo/checkpoints/step-000020"}
    (tmp_path / "grpo" / "evals" / "later.json").write_text(json.dumps(later))
    assert "went from 20.0% (GRPO, heldout) to 40.0% (GRPO, later)" in comparison(tmp_path)


def test_a_student_is_not_compared_with_its_own_checkpoint(tmp_path):
    stage(tmp_path, "grpo", [0.5, 0.4, 0.6], None, None, text="x", checkpoint="same")
    stage(tmp_path, "student", [0.4, 0.3, 0.5], None, None, text="x", checkpoint="same")
    assert explain_student(headline_group(load_run(tmp_path).stages)) == []


@pytest.mark.parametrize(
    ("of_student", "said", "change"),
    [
        (0.5002, "student is on a par with its teacher", "0.0 points"),
        (0.4998, "student is on a par with its teacher", "0.0 points"),
        (0.55, "student is 5.0 points above its teacher", "+5.0 points"),
        (0.444, "student is 5.6 points below its teacher", "−5.6 points"),
    ],
)
def test_a_difference_too_small_to_show_has_no_side(tmp_path, of_student, said, change):
    stage(tmp_path, "grpo", [0.5, 0.4, 0.6], None, None, text="x", checkpoint="teacher")
    stage(tmp_path, "student", [of_student, 0.4, 0.6], None, None, text="x", checkpoint="student")
    group = headline_group(load_run(tmp_path).stages)
    assert said in explain_student(group)[0]
    assert f", {change};" in explain_change(*group, group)[0]


def test_half_a_surrogate_pair_in_a_file_or_a_name_does_not_stop_the_page(demo):
    for path in demo.glob("*/evals/heldout.json*"):
        data = json.loads(path.read_text())
        data |= {"extracted": "\ud800", "name": "\udfff", "prompt": "a\udc80b", "sampling": {"\ud801": ["\ud802"]}}
        path.write_text(json.dumps(data))
    (demo / "base_\udcff").mkdir()
    (demo / "base_\udcff" / "metrics.jsonl").write_text("")
    page = write_report(demo).read_text(encoding="utf-8")
    for escaped in ("answer: \\ud800", "a\\udc80b", "\\ud801", "base_\\udcff has no metrics"):
        assert escaped in page, escaped


def test_an_evaluation_of_drafts_beside_the_main_one_is_shown_and_does_not_replace_it(demo):
    drafting = EVAL | {"name": "drafting", "checkpoint": "grpo", "pass@1": None, "pass@8": None}
    drafting |= {"greedy": [0.35, 0.3, 0.4], "mtp_acceptance": 0.826, "num_samples": 0}
    (demo / "grpo" / "evals" / "drafting.json").write_text(json.dumps(drafting))
    page = write_report(demo).read_text(encoding="utf-8")
    assert "82.6%" in page
    assert "+27.7 points" in page
    assert len(grouped(load_run(demo).stages)) == 2


def test_missing_and_damaged_parts_become_notes(demo):
    (demo / "grpo" / "metrics.jsonl").unlink()
    (demo / "cold_start" / "evals" / "heldout.json").write_text("{")
    (demo / "cold_start" / "run.toml").unlink()
    page = write_report(demo).read_text(encoding="utf-8")
    for note in ("grpo has no metrics", "cold_start/evals/heldout.json is left out", "cold_start has no run.toml"):
        assert note in page, note
    assert "52.0%" in page


@pytest.mark.parametrize("odd", [10**400, -(10**400), 1e308, [10**400, 0, 1], [7.0, -3.0, 9e99], True, {"a": 1}])
def test_figures_that_cannot_be_drawn_are_left_out(demo, odd):
    metrics = [{"step": i, "seconds": i, "loss": odd if i == 2 else 1.0, "reward": odd} for i in range(4)]
    (demo / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in [*metrics, {"step": odd}]))
    summary = {"seconds": odd, "peak_memory_bytes": odd, "seed": 7, "stages": [], f"pass@{'9' * 5000}": 1}
    (demo / "summary.json").write_text(json.dumps(summary))
    path = demo / "cold_start" / "evals" / "heldout.json"
    data = json.loads(path.read_text()) | {"pass@1": odd, "think_tokens": odd, f"pass@{'9' * 5000}": odd}
    path.write_text(json.dumps(data | {"status_counts": {"ok": odd}}))
    (demo / "cold_start" / "evals" / "deep.json").write_text("[" * 5000)
    page = write_report(demo).read_text(encoding="utf-8")
    assert "52.0%" in page
    assert "deep.json is left out" in page


def test_a_single_run_is_reported_too(demo):
    page = write_report(demo / "grpo", demo / "page.html")
    assert page == demo / "page.html"
    assert "52.0%" in page.read_text(encoding="utf-8")


def test_a_page_on_standard_output_leaves_the_file_that_the_shell_sends_it_to(demo, tmp_path):
    target = tmp_path / "page.html"
    with target.open("w") as file:
        words = ["report", str(demo), "--out", "/dev/stdout"]
        subprocess.run([sys.executable, "-m", "kogia.cli", *words], stdout=file, check=True, timeout=100)
        assert os.path.samestat(os.fstat(file.fileno()), target.stat())
    assert "52.0%" in target.read_text(encoding="utf-8")
    assert not (demo / "report.html").exists()


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither it nor a folder in it holds"):
        write_report(tmp_path)


def test_the_load_of_experts_is_drawn_by_layer_over_the_run(demo):
    lines = [{"step": 10 * i, "steps": 10, "loads": [[8, 8, 8, 8], [8 + 8 * i, 8, 8, 8 - i]]} for i in range(1, 7)]
    damaged = ['{"step": 5, "loads"', '{"step": 6, "loads": [[1, 2], [3]]}', '{"step": 7, "loads": [[1, "x"]]}', "[]"]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "\n".join(damaged)
    (demo / "grpo" / "routing.jsonl").write_text(text)
    (loads,) = (stage.loads for stage in load_run(demo).stages if stage.name == "grpo")
    assert [load.step for load in loads] == [10, 20, 30, 40, 50, 60]
    page = write_report(demo).read_text(encoding="utf-8")
    assert "the busiest expert has 3.03 times its layer&#x27;s mean, the idlest 0.11" in page
    assert "MaxVio by layer over the run: on average from 0.321 at step 10 to 1.01 at step 60" in page
    for step in (10, 30, 40, 60):
        assert f"step {step}<" in page


@pytest.mark.parametrize("text", ["", "nothing\n", '{"step": 1, "loads": []}\n', '{"step": 1, "loads": [[]]}\n' * 3])
def test_a_log_of_loads_that_says_nothing_draws_nothing(demo, text):
    (demo / "grpo" / "routing.jsonl").write_text(text)
    assert "Load of experts" not in write_report(demo).read_text(encoding="utf-8")


def test_the_page_says_how_fast_each_stage_was(tmp_path):
    page = write_report(full_demo(tmp_path)).read_text(encoding="utf-8")
    said = (
        "base: 1,060 tokens/s in the median step; MFU 30.0% with causal attention, 37.5% with all of it, of 750 "
        "TFLOP/s that a large product was measured at; 41.00 GiB at the peak."
    )
    assert said in page
    for title in ("Tokens per second", "Model FLOPs utilisation", "Peak memory", "Multi-token prediction loss"):
        assert f"<b>{title}</b>" in page


def test_a_stage_that_knows_its_rate_alone_says_that_alone(demo):
    path = demo / "grpo" / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 1.0, "tokens_per_second": 12.0}\n')
    page = write_report(demo).read_text(encoding="utf-8")
    assert "<p>GRPO: 12 tokens/s in the median step.</p>" in page


@pytest.mark.parametrize(("values", "bounds"), [([0.0] * 5, (-0.1, 0.1)), ([2.0] * 5, (1.8, 2.2)), ([0.0, 1.0], None)])
def test_a_curve_that_stays_has_room_around_it_and_steps_are_whole_numbers(values, bounds):
    axes = Figure().add_subplot()
    axes.plot(range(1, len(values) + 1), values)
    _tick(axes, values)
    assert all(tick == int(tick) for tick in axes.get_xticks())
    if bounds is not None:
        assert axes.get_ylim() == pytest.approx(bounds)
