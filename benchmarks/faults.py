"""Faults, looked for: commands killed at any moment, and everything that is read, mutated.

    python benchmarks/faults.py --dir SCRATCH [--kills 500] [--inputs 20000] [--seed 0] [--out RESULT.json]
    python benchmarks/faults.py --dir SCRATCH --kills 100 --inputs 0 --scenarios pretrain pretrain-all --out RESULT.json

Kills: real commands (prepare, pretrain, sft, rl, eval, curate, generate, convert, report, demo) are killed by SIGKILL
or SIGTERM at seeded changes of the file system and at seeded moments, gone on with as a user would, killed again, and
compared with an undisturbed run (tests/faults/kills.py). Lost is a trial that could not go on, whose files differ, or
that left anything behind. Inputs: files, flags, parameters and answers are mutated and read (tests/faults/inputs.py). A
traceback is anything but success or an error in the project's own words; a hang is over the limit that is given beside
it.

What is done is noted in SCRATCH/done.jsonl: a campaign that was interrupted goes on there. Equal seeds make equal
campaigns, but for the kills at moments. It takes about 25 minutes on one core.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from faults import inputs, kills  # noqa: E402 - from the tests
from result import commit, row, write_result  # noqa: E402

WEIGHTS = {
    "prepare": 6, "prepare-over": 2, "pretrain": 8, "pretrain-all": 8, "sft": 8, "overwrite": 6, "rl": 12, "eval": 12,
    "curate": 8, "curate-over": 4, "generate": 3, "generate-over": 3, "convert": 5, "convert-over": 7, "report": 2,
    "demo": 1,
}  # fmt: skip
"""Trials of each scenario in one round."""


class Notes:
    """What is done, kept on disk."""

    def __init__(self, place: Path, settings: dict[str, Any]) -> None:
        self.path = place / "done.jsonl"
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        if lines and lines[0] != settings:
            sys.exit(f"{self.path} is of another campaign, {lines[0]}: name another --dir, or remove it")
        self.done: dict[str, dict[str, Any]] = {line["unit"]: line for line in lines[1:]}
        if not lines:
            self.path.write_text(json.dumps(settings) + "\n")

    def add(self, unit: str, **result: Any) -> None:
        self.done[unit] = {"unit": unit, **result}
        with self.path.open("a") as file:
            file.write(json.dumps(self.done[unit]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="of the kills")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults.json")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    settings = {"commit": commit(), "seed": args.seed, "kills": args.kills, "inputs": args.inputs}
    notes = Notes(args.dir, settings | ({} if args.scenarios == list(WEIGHTS) else {"scenarios": args.scenarios}))
    began = time.monotonic()
    if args.inputs:
        mutate(notes, args.dir, args.inputs, args.seed, began)
    kill(notes, args.dir, args.kills, args.seed, began, set(args.scenarios))
    write_result(args.out, "faults", rows(notes, args.seed))
    print(f"written: {args.out}")


def mutate(notes: Notes, place: Path, count: int, seed: int, began: float) -> None:
    inputs.load_everything()
    for name, cases in inputs.shares(count).items():
        for start in range(0, cases, inputs.CHUNK):
            unit = f"inputs {name} {start}"
            if unit in notes.done:
                continue
            found = inputs.run(name, min(cases, start + inputs.CHUNK), seed, place, start=start)
            notes.add(unit, counts=dict(found.counts), faults=found.faults, slowest=round(found.slowest, 2))
            tell(found.faults)
        total = counted(notes)
        print(
            f"{time.monotonic() - began:6.0f} s  {sum(total.values()):6} inputs, {name} done: {dict(total)}", flush=True
        )


def counted(notes: Notes) -> Counter[str]:
    total = Counter[str]()
    for result in notes.done.values():
        total.update(result.get("counts", {}))
    return total


def kill(notes: Notes, place: Path, count: int, seed: int, began: float, names: set[str]) -> None:
    """Trials in turns of these scenarios until there are as many kills."""
    with tempfile.TemporaryDirectory(dir=place) as folder, kills.Campaign(Path(folder)) as campaign:
        for scenario, number in trials(seed, names):
            total = sum(result.get("kills", 0) for result in notes.done.values())
            if total >= count:
                return
            unit = f"trial {scenario.name} {number}"
            if unit in notes.done:
                continue
            if scenario.name not in campaign.after:
                campaign.prepare(scenario)
            trial = campaign.trial(scenario, number)
            notes.add(unit, kills=len(trial.kills), faults=trial.faults, how=trial.kills)
            tell([f"{unit} {trial.kills}: {fault}" for fault in trial.faults])
            left = (time.monotonic() - began) / max(total, 1) * (count - total)
            print(f"{time.monotonic() - began:6.0f} s  {total:4} kills, about {left:.0f} s left: {unit}", flush=True)


def trials(seed: int, names: set[str]) -> Iterator[tuple[kills.Scenario, int]]:
    number = Counter[str]()
    while True:
        for scenario in (each for each in kills.SCENARIOS if each.name in names):
            for _ in range(WEIGHTS[scenario.name]):
                yield scenario, seed * 1_000_003 + number[scenario.name]
                number[scenario.name] += 1


def tell(faults: list[str]) -> None:
    for fault in faults:
        print(f"FAULT {fault}", flush=True)


def rows(notes: Notes, seed: int) -> list[dict[str, Any]]:
    by_scenario, signals, by_target = Counter[str](), Counter[str](), dict[str, Any]()
    lost = 0
    for unit, result in notes.done.items():
        kind, name, _ = unit.split()
        if kind == "trial":
            by_scenario[name] += result["kills"]
            signals.update(words.partition(" ")[0] for words in result["how"])
            lost += bool(result["faults"])
        else:
            by_target.setdefault(name, Counter[str]()).update(result["counts"])
    total = counted(notes)
    limits = {name: inputs.TARGETS[name].seconds for name in by_target}
    limits["one scanner of a long text, computing"] = inputs.SCAN_SECONDS
    killed = [
        row("faults-kills", sum(by_scenario.values()), "kills", seed=seed, by_scenario=by_scenario, signals=signals),
        row("faults-kills-lost", lost, "trials", limit=0, trials=sum("how" in each for each in notes.done.values())),
    ]
    if not total:
        return killed
    slowest = max((result["slowest"], unit) for unit, result in notes.done.items() if "slowest" in result)
    return [
        *killed,
        row("faults-inputs", sum(total.values()), "inputs", seed=seed, by_target=by_target),
        row("faults-tracebacks", total["traceback"], "inputs", limit=0),
        row("faults-hangs", total["hang"], "inputs", limit=0, limit_seconds=limits, slowest_seconds=slowest[0]),
    ]


if __name__ == "__main__":
    main()
