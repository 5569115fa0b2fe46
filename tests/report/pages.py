"""Run directories as the commands leave them, of figures that were made up, for a page that shows everything it can."""

import json
import math
from pathlib import Path

STATUSES = {
    "ok": 0.4,
    "wrong": 0.35,
    "give_up": 0.1,
    "parse_fail": 0.05,
    "truncated": 0.08,
    "timeout": 0.01,
    "error": 0.01,
}
UNBROKEN = "DistilledFromTheLargestModelWithEveryTraceThatWasRightAndTwiceAsLong"
STAGES = ("base", "cold_start", "grpo", "rejection_sft", "student", "grpo_with_a_rather_long_name_of_its_own", UNBROKEN)
THOUGHT = "15*4=60,60+6=66?17 no\n15-4=11,11+6=17?17 yes\n" + "x" * 200 + "\n</think>\n(15-4)+6"


def metrics(rl: bool) -> list[dict[str, float]]:
    rows = []
    for step in range(1, 121):
        share = step / 120
        row = {"step": step, "seconds": 3.0 * step, "loss": 3e-7 * math.sin(step) if rl else 0.9 + 4 / step}
        row |= {"grad_norm": 0.3 + 0.1 * math.cos(step), "max_vio": 0.8 / step, "balance": 1.0 + 1e-5 * step}
        row |= {"max_vio_worst": 1.3 / step, "dead_experts": 40 // step, "routing_entropy": 1 - 0.2 / step}
        if rl:
            row |= {"reward": share - 0.3, "accuracy": 0.6 * share, "entropy": 0.9 - share / 2, "kl": 1e-4 * step}
            row |= {"completion_tokens": 40 + 1000 * share, "truncated": share / 4, "clip_fraction": 1e-3 * share}
            row |= {"zero_variance_groups": 0.5 - share / 3, "mismatch": 2e-5, "mtp_acceptance": 0.5 + share / 3}
        else:
            row |= {"tokens_per_second": 1000.0 + step, "mfu_causal": 0.3, "mfu_full": 0.375, "peak_tflops": 750.0}
            row |= {"memory_gib": 40 + share, "mtp_loss_1": 2.0 + 4 / step}
        if not rl and step % 20 == 0:
            row |= {"val_loss": 1.0 + 4 / step}
        rows.append(row)
    return rows


def loads(step: int) -> dict[str, object]:
    """Six layers of 24 experts that even out."""
    wave = [[math.sin(7 * layer + 3 * expert * expert) for expert in range(24)] for layer in range(6)]
    counts = [[round(400 * (1 + w * (0.1 + 4 / step))) for w in layer] for layer in wave]
    return {"step": step, "steps": 2, "loads": [[max(0, count) for count in layer] for layer in counts]}


def interval(mean: float) -> list[float]:
    return [mean, max(mean - 0.031, 0), min(mean + 0.031, 1)]


def full_demo(root: Path) -> Path:
    """A directory of runs with two settings of sampling, all verdicts, long names, long thoughts and every metric."""
    for number, name in enumerate(STAGES):
        run = root / name
        (run / "evals").mkdir(parents=True)
        (run / "run.toml").write_text(f'out = "{name}"\nnote = "{"long " * 60}"\n')
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(name.startswith("grpo"))))
        (run / "routing.jsonl").write_text("".join(json.dumps(loads(step)) + "\n" for step in range(2, 121, 2)))
        for label, sampling in (("heldout", {"temperature": 1.0, "top_p": 1.0}), ("cool", {"temperature": 0.6})):
            score = 0.1 + 0.15 * number
            summary = {"name": label, "task": "countdown", "split": "test", "checkpoint": name, "seconds": 1.0}
            summary |= {"num_questions": 1000, "num_samples": 8, "sampling": sampling | {"max_tokens": 192, "seed": 0}}
            summary |= {"pass@1": interval(score), "greedy": interval(score / 2), "pass@8": interval(min(2 * score, 1))}
            summary |= {"maj@8": interval(score), "think_tokens": 1041.5, "truncated": 0.3, "parse_fail": 0.12}
            summary |= {"give_up": 0.25, "false_claim": 0.1, "claims_verified": 0.72, "mtp_acceptance": 0.826}
            summary |= {"status_counts": {status: int(8000 * share) for status, share in STATUSES.items()}}
            (run / "evals" / f"{label}.json").write_text(json.dumps(summary))
            (run / "evals" / f"{label}.jsonl").write_text("".join(map(sample, range(4), [number] * 4)))
    (root / UNBROKEN / "run.toml").unlink()
    summary = {"seconds": 660, "peak_memory_bytes": 2**30, "seed": 7, "stages": []}
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def sample(problem: int, stage: int) -> str:
    right = problem < stage
    row = {"problem_id": f"p{problem}", "prompt": "numbers 4 6 15 target 17", "sample": 0, "num_tokens": 106}
    row |= {"truncated": False, "text": THOUGHT, "status": "ok" if right else "wrong", "correct": right, "parts": {}}
    return json.dumps(row | {"reward": float(right), "extracted": "(15-4)+6" * (problem + 1)}) + "\n"
