"""The recipe by hand: every command once, each on what the one before it left."""

import json
import re

from e2e.kogia_cli import kogia, kogia_here

from kogia.log import read_metrics

TASK = ("--tasks", "toy_task:Checksum")
SMALL_ENGINE = ("--engine.num-blocks", "512", "--engine.max-sequences", "32")


def last(messages):
    """The last line that a command ends with: its score, its place, what to type next."""
    return messages.splitlines()[-1]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_recipe_runs_from_pretraining_to_the_report(pretrained, checkpoint):
    folder = pretrained
    assert [line["step"] for line in read_metrics(folder / "base") if "loss" in line] == list(range(1, 13))

    plan, _ = kogia_here(folder, "pretrain", "pretrain.toml", "--out", "plan", "--dry-run")
    assert "# parameters" in plan
    assert not (folder / "plan").exists()

    # the tiny checkpoint stops by itself, so that some answers are right
    rl = ("rl", "--init", str(checkpoint), "--out", "grpo", *TASK, "--no-signal-check", *SMALL_ENGINE)
    sizes = ("--steps", "3", "--prompts-per-step", "4", "--group-size", "4", "--max-tokens", "12")
    _, messages = kogia(folder, *rl, *sizes, "--eval-questions", "0", "--optim.lr", "1e-4")
    assert [line["step"] for line in read_metrics(folder / "grpo")] == [1, 2, 3]
    assert "signal check" not in messages
    assert re.fullmatch(r"reward [-\d.]+, accuracy [\d.]+; in grpo; next: kogia report grpo", last(messages))

    curate = ("curate", "grpo", "--out", "curated/data.jsonl", *TASK, *SMALL_ENGINE)
    kogia_here(folder, *curate, "--num-problems", "12", "--max-tokens", "16", "--min-language-share", "0")
    kept = rows(folder / "curated" / "data.jsonl")
    assert len(kept) > 5

    data = '[data]\nbatch_tokens = 256\nmax_seqlen = 64\n[[data.sources]]\nspec = "curated/data.jsonl"\n'
    (folder / "sft.toml").write_text(f'init = "grpo"\nout = "tuned"\nsteps = 3\nthreads = 1\n{data}')
    _, messages = kogia(folder, "sft", "sft.toml")
    assert re.fullmatch(r"loss [\d.]+.*; in tuned; next: kogia chat tuned", last(messages))
    losses = [line["loss"] for line in read_metrics(folder / "tuned") if "loss" in line]
    assert len(losses) == 3

    sampling = ("--num-questions", "6", "--num-samples", "4", "--max-tokens", "12", "--greedy")
    table, messages = kogia(folder, "eval", "tuned", *TASK, *sampling, *SMALL_ENGINE)
    summary = json.loads((folder / "tuned" / "evals" / "Checksum.json").read_text())
    assert re.fullmatch(
        r"Checksum: pass@1 [\d.]+% \([\d.]+ to [\d.]+\); in tuned/evals; next: kogia report tuned", last(messages)
    )
    samples = rows(folder / "tuned" / "evals" / "Checksum.jsonl")
    assert len(samples) == 6 * 5
    right = [row["correct"] for row in samples if row["sample"] >= 0]
    assert abs(summary["pass@1"][0] - sum(right) / 24) < 1e-9
    assert "95% interval" in table
    assert f"{summary['pass@1'][0]:.1%}" in table

    generate = ("generate", "tuned", "--prompt", "say 4", "--n", "2", "--max-tokens", "6", "--seed", "0")
    kogia(folder, *generate, "--out", "out.jsonl")
    completions = rows(folder / "out.jsonl")
    assert [(row["prompt"], row["index"]) for row in completions] == [("say 4", 0), ("say 4", 1)]
    assert all(1 <= row["num_tokens"] <= 6 for row in completions)

    chat, _ = kogia(folder, "chat", "tuned", "--max-tokens", "8", "--seed", "0", stdin="say 1\n/reset\nsay 2\n")
    assert len(re.findall(r"\[\d+ tokens, [\d.]+ tokens/s", chat)) == 2

    kogia_here(folder, "report", ".")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in ("base", "grpo", "tuned"):
        assert name in page
    assert "http://" not in re.sub(r"http://www.w3.org[^\"' )]*", "", page)
