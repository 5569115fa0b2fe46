"""Write the figures of benchmarks/results/demo.json into README.md, between its two figure marks.

python benchmarks/readme.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: benchmarks/results/demo.json -->", "<!-- end of figures -->"
STAGES = {
    "base": "base: arithmetic only",
    "cold_start": "cold start: SFT on noisy search traces",
    "grpo": "GRPO, rule rewards",
    "rejection_sft": "rejection sampling + SFT",
    "student": "dense student, distilled",
}


def main() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    rows = {row["id"]: row for row in result["rows"]}
    readme = (ROOT / "README.md").read_text()
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    (ROOT / "README.md").write_text(head + BEGIN + "\n" + figures(rows, result) + "\n" + END + tail)


def figures(rows: dict[str, Any], result: dict[str, Any]) -> str:
    """The table of stages, mean over seeds, and the sentences below it."""
    seeds = sorted({id.rpartition("-seed")[2] for id in rows if "-seed" in id})

    def mean(id: str) -> float:
        values = [rows[f"demo-{id}-seed{s}"]["value"] for s in seeds if f"demo-{id}-seed{s}" in rows]
        return sum(values) / len(values)

    def each(id: str) -> str:
        found = [rows[f"demo-{id}-seed{s}"] for s in seeds if f"demo-{id}-seed{s}" in rows]
        return ", ".join(f"{r['value']:+.1f} ({r['low']:+.1f} to {r['high']:+.1f})" for r in found)

    machine = f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores"
    lines = [
        f"Held-out problems, mean of {len(seeds)} seeds ({machine}; measured at commit {result['commit'][:7]}):",
        "",
        "| stage | pass@1 | pass@8 | greedy | thinks (tokens) | never stops | right among claims |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, words in STAGES.items():
        claims = f"{stage}-claims_verified"
        right = f"{mean(claims):.0f}%" if any(f"demo-{claims}-seed{s}" in rows for s in seeds) else "–"
        scores = " | ".join(f"{mean(f'{stage}-{score}'):.1f}%" for score in ("pass@1", "pass@8", "greedy"))
        thinks, unstopped = mean(f"{stage}-think-tokens"), mean(f"{stage}-truncated")
        measured = sum(f"demo-{stage}-pass@1-seed{s}" in rows for s in seeds)
        fewer = "" if measured == len(seeds) else f" ({measured} of the seeds)"
        lines.append(f"| {words}{fewer} | {scores} | {thinks:.0f} | {unstopped:.0f}% | {right} |")
    overlap = sum(bool(rows[f"demo-lift-points-seed{s}"]["overlap"]) for s in seeds)
    timed = [rows[f"demo-seconds-seed{s}"]["value"] / 60 for s in seeds if f"demo-seconds-seed{s}" in rows]
    lines += [
        "",
        f"* GRPO's lift in points of pass@1, per seed with the 95% interval of the paired difference: "
        f"{each('lift-points')}; the two stages' own intervals overlap on {overlap} of {len(seeds)} seeds. "
        f"Greedy: {each('greedy-lift-points')}.",
        f"* Controls from the same cold start: rewards shuffled within each group {each('random-reward-points')}; "
        f"fine-tuning continued for as many tokens {each('sft-continued-points')}.",
        f"* Multi-token prediction on the final model, one prompt at a time: {100 * mean('mtp-acceptance'):.0f}% of "
        f"drafts accepted, {mean('mtp-speedup'):.2f}x the speed, greedy output identical for "
        f"{100 * mean('mtp-identical-greedy'):.0f}% of prompts.",
        f"* The whole demonstration took {min(timed):.1f} to {max(timed):.1f} minutes. "
        f"Peak memory {rows['demo-peak-gib']['high']:.1f} GiB.",
    ]
    recipes = {row["recipe"]: [] for row in rows.values() if "recipe" in row}
    for id, row in rows.items():
        if "recipe" in row:
            recipes[row["recipe"]].append(id)
    if len(recipes) > 1:
        lines.append(
            "* Not all with one recipe: " + "; ".join(f"{r} ({len(ids)} figures)" for r, ids in recipes.items())
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
