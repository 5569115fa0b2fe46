import json
import re

import pytest

from kogia.report.build import write_report
from kogia.report.load import load_run
from kogia.report.words import before_and_after, explain_lift, headline_group

EVAL = {
    "task": "countdown", "split": "test", "num_questions": 4, "num_samples": 8, "maj@8": None, "think_tokens": 41.5,
    "completion_tokens": 50.0, "truncated": 0.015, "parse_fail": 0.0, "give_up": 0.25, "false_claim": 0.1,
    "claims_verified": 0.72, "status_counts": {"ok": 24, "wrong": 8}, "sampling": {"temperature": 1.0}, "seconds": 1.0,
    "mtp_acceptance": None,
}  # fmt: skip
SAMPLE = {"problem_id": "p1", "prompt": "numbers 1 2 target 3", "sample": 0, "num_tokens": 9, "truncated": False}


def stage(root, name, score, greedy, reach, *, text, status="ok", metrics=None):
    """A run directory as the commands leave it."""
    run = root / name
    (run / "evals").mkdir(parents=True)
    (run / "run.toml").write_text(f'out = "{name}"\n')
    lines = metrics or [{"step": i, "seconds": i, "loss": 3.0 / i, "max_vio": 0.5 / i} for i in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = EVAL | {"name": "heldout", "checkpoint": name, "pass@1": score, "greedy": greedy, "pass@8": reach}
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


def test_the_lift_is_split_into_ability_and_sharpening(demo):
    stages = load_run(demo).stages
    pair = before_and_after(stages, headline_group(stages))
    assert pair is not None
    words = " ".join(explain_lift(*pair))
    # greedy rose by 10.0 of the 27.7 points: 36% ability, 64% sharpening
    assert "+27.7 points" in words
    assert "the 95% intervals do not overlap" in words
    assert "about 36% of the lift" in words
    assert "64% is sharpening" in words


def test_an_evaluation_of_drafts_beside_the_main_one_is_shown_and_does_not_replace_it(demo):
    drafting = EVAL | {"name": "drafting", "checkpoint": "grpo", "pass@1": None, "pass@8": None}
    drafting |= {"greedy": [0.35, 0.3, 0.4], "mtp_acceptance": 0.826, "num_samples": 0}
    (demo / "grpo" / "evals" / "drafting.json").write_text(json.dumps(drafting))
    page = write_report(demo).read_text(encoding="utf-8")
    assert "82.6%" in page
    assert "+27.7 points" in page


def test_missing_and_damaged_parts_become_notes(demo):
    (demo / "grpo" / "metrics.jsonl").unlink()
    (demo / "cold_start" / "evals" / "heldout.json").write_text("{")
    (demo / "cold_start" / "run.toml").unlink()
    page = write_report(demo).read_text(encoding="utf-8")
    for note in ("grpo has no metrics", "cold_start/evals/heldout.json is left out", "cold_start has no run.toml"):
        assert note in page, note
    assert "52.0%" in page


def test_a_single_run_is_reported_too(demo):
    page = write_report(demo / "grpo", demo / "page.html")
    assert page == demo / "page.html"
    assert "52.0%" in page.read_text(encoding="utf-8")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither it nor a folder in it holds"):
        write_report(tmp_path)
