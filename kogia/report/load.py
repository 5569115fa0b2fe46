"""Read what a run directory holds, forgivingly: a part that is absent or damaged becomes a note, never an error."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kogia.log import METRICS_FILE, ROUTING_FILE, json_lines, read_metrics, writable

STAGE_ORDER = ("base", "cold_start", "grpo", "curated", "rejection_sft", "student")
"""The stages of the R1 recipe; others follow by name."""
MOST = 1e30
"""A figure of this size or more is none."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, as shares of 1."""

    mean: float
    low: float | None = None
    high: float | None = None

    def above(self, other: "Interval") -> bool:
        """Whether the whole interval lies above the other's; False where a bound is not known."""
        return self.low is not None and other.high is not None and self.low > other.high


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one checkpoint."""

    stage: str
    name: str
    checkpoint: str
    """Of what model; empty where the file does not say."""
    task: str
    split: str
    pass_1: Interval | None
    pass_k: Interval | None
    maj_k: Interval | None
    greedy: Interval | None
    k: int
    """The k of pass_k and maj_k."""
    values: Mapping[str, float]
    """The plain numbers: think_tokens, truncated, parse_fail, give_up, claims_verified, mtp_acceptance, ..."""
    status_counts: Mapping[str, int]
    sampling: Mapping[str, Any]
    samples: Path | None
    """The JSON lines of every sample, where they were kept."""

    @property
    def identity(self) -> str:
        """The same for two measurements of one checkpoint, and for those of one stage that do not say of which."""
        return str(Path(self.checkpoint).resolve()) if self.checkpoint not in ("", "None") else self.stage

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What must be equal before figures are compared: questions, samples, k and every sampling setting."""
        counts = (self.values.get("num_questions"), self.values.get("num_samples"), self.k)
        return (self.task, self.split, *counts, json.dumps(self.sampling, sort_keys=True))


@dataclass(frozen=True)
class Sample:
    """One completion of one problem."""

    problem_id: str
    prompt: str
    text: str
    num_tokens: int | None
    reward: float | None
    correct: bool
    status: str
    extracted: str | None


@dataclass(frozen=True)
class Load:
    """Token copies that every expert got over the steps up to one."""

    step: int
    counts: list[list[float]]
    """By mixture and expert, as many for all."""


@dataclass(frozen=True)
class Stage:
    """One run directory."""

    name: str
    metrics: list[dict[str, Any]]
    measurements: list[Measurement]
    recipe: str | None
    """The text of run.toml."""
    loads: list[Load] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What the page is about: the stages in order, the summary, and what could not be read."""

    name: str
    stages: list[Stage]
    summary: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)


def load_run(directory: Path) -> Run:
    """Read a single run or a directory of runs. Raises ValueError where there is no run to tell about."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such run directory")
    notes: list[str] = []
    summary = _read_json(directory / "summary.json", notes) if (directory / "summary.json").exists() else {}
    folders = [directory] if _is_run(directory) else []
    folders += sorted((d for d in directory.iterdir() if d.is_dir() and _is_run(d)), key=_stage_key)
    stages = [_load_stage(d, notes) for d in folders]
    stages = _fill_from_summary(stages, summary)
    said = summary.get("notes")
    notes += map(str, said) if isinstance(said, list) else []
    if not stages:
        raise ValueError(
            f"{directory}: neither it nor a folder in it holds run.toml, {METRICS_FILE} or evals/; "
            "give the directory that a command wrote with --out"
        )
    return Run(writable(directory.resolve().name), stages, summary, notes)


def read_samples(path: Path | None, problem_ids: set[str] | None = None) -> Iterator[Sample]:
    """The first sample of each problem (of these problems), in file order. Damaged lines are passed over."""
    seen: set[str] = set()
    if path is None or not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                sample = _sample(_clean(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if sample.problem_id in seen or (problem_ids is not None and sample.problem_id not in problem_ids):
                continue
            seen.add(sample.problem_id)
            yield sample


def _is_run(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("run.toml", METRICS_FILE, "evals"))


def _stage_key(directory: Path) -> tuple[int, str]:
    name = directory.name
    return (STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER), name)


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        data = _clean(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{_place(path)} is left out: {error}")
        return {}
    if not isinstance(data, dict):
        notes.append(f"{_place(path)} is left out: it holds no JSON object")
        return {}
    return data


def _clean(value: Any) -> Any:
    """The JSON value with every string fit for a page: an escape in JSON may stand for half a character."""
    match value:
        case str():
            return writable(value)
        case list():
            return [_clean(item) for item in value]
        case dict():
            return {writable(key): _clean(item) for key, item in value.items()}
    return value


def _place(path: Path) -> str:
    """The file as a reader looks for it: below its stage's directory."""
    return writable("/".join(path.parts[-3:] if path.parent.name == "evals" else path.parts[-2:]))


def _load_stage(directory: Path, notes: list[str]) -> Stage:
    name = writable(directory.resolve().name)
    try:
        metrics = [m for m in read_metrics(directory) if number(m.get("step")) is not None]
    except (OSError, ValueError, AttributeError) as error:
        notes.append(f"{name}/{METRICS_FILE} is left out: {error}")
        metrics = []
    measurements = []
    for path in sorted((directory / "evals").glob("*.json")):
        data = _read_json(path, notes)
        if data:
            measurements.append(_measurement(name, writable(path.stem), data, path.with_suffix(".jsonl")))
    recipe = directory / "run.toml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    for part, there in (("metrics", metrics), ("evaluation", measurements), ("run.toml", text)):
        if not there:
            notes.append(f"{name} has no {part}")
    return Stage(name, metrics, measurements, text, _loads(directory, name, notes))


def _loads(directory: Path, name: str, notes: list[str]) -> list[Load]:
    """The lines of one size that can be read; those of another one are a mistake or damage."""
    try:
        rows = [_load(row) for _, row in json_lines(directory / ROUTING_FILE) if row is not None]
    except OSError as error:
        notes.append(f"{name}/{ROUTING_FILE} is left out: {error}")
        return []
    loads = [load for load in rows if load is not None]
    return [load for load in loads if _size(load) == _size(loads[0])]


def _load(row: Mapping[str, Any]) -> Load | None:
    step, counts = number(row.get("step")), row.get("loads")
    if step is None or not isinstance(counts, list) or not all(isinstance(layer, list) for layer in counts):
        return None
    read = [[number(count) for count in layer] for layer in counts]
    if len({len(layer) for layer in read}) != 1 or not read[0]:
        return None
    known = [[count for count in layer if count is not None and count >= 0] for layer in read]
    return Load(int(step), known) if _size(Load(0, known)) == (len(read), len(read[0])) else None


def _size(load: Load) -> tuple[int, int]:
    """(mixtures, the fewest experts of one)."""
    return len(load.counts), min(map(len, load.counts))


def _fill_from_summary(stages: list[Stage], summary: Mapping[str, Any]) -> list[Stage]:
    """Figures of the summary stand in where a stage's own evaluation files are gone."""
    listed = summary.get("stages")
    entries = (
        {str(e["name"]): e for e in listed if isinstance(e, dict) and "name" in e} if isinstance(listed, list) else {}
    )
    filled = []
    for stage in stages:
        entry = entries.pop(stage.name, None)
        if entry and not stage.measurements:
            stage = replace(stage, measurements=[_measurement(stage.name, "summary", entry, None)])
        filled.append(stage)
    filled += [Stage(name, [], [_measurement(name, "summary", e, None)], None) for name, e in entries.items()]
    return sorted(filled, key=lambda s: _stage_key(Path(s.name))) if entries else filled


def _measurement(stage: str, stem: str, data: Mapping[str, Any], samples: Path | None) -> Measurement:
    k = max((int(m[1]) for key in data if (m := re.fullmatch(r"pass@(\d{1,9})", key))), default=1)
    counts = data.get("status_counts")
    sampling = data.get("sampling")
    return Measurement(
        stage=stage,
        name=str(data.get("name") or stem),
        checkpoint=str(data.get("checkpoint") or ""),
        task=str(data.get("task") or ""),
        split=str(data.get("split") or ""),
        pass_1=_interval(data.get("pass@1")),
        pass_k=_interval(data.get(f"pass@{k}")) if k > 1 else None,
        maj_k=_interval(data.get(f"maj@{k}")),
        greedy=_interval(data.get("greedy")),
        k=k,
        values={key: x for key, value in data.items() if (x := number(value)) is not None},
        status_counts={str(s): int(n) for s, n in counts.items() if number(n)} if isinstance(counts, dict) else {},
        sampling=sampling if isinstance(sampling, dict) else {},
        samples=samples if samples is not None and samples.exists() else None,
    )


def number(value: Any) -> float | None:
    """The value as a float where it is a finite number of a size that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST:
        return None
    return float(value)


def _share(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def _interval(value: Any) -> Interval | None:
    """[mean, low, high], or a bare mean."""
    if isinstance(value, list | tuple) and value:
        mean, low, high = [_share(v) for v in [*value, None, None][:3]]
    else:
        mean, low, high = _share(value), None, None
    return None if mean is None else Interval(mean, low, high)


def _sample(data: Mapping[str, Any]) -> Sample:
    prompt, extracted, tokens = data.get("prompt", ""), data.get("extracted"), number(data.get("num_tokens"))
    return Sample(
        problem_id=str(data["problem_id"]),
        prompt=prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
        text=str(data["text"]),
        num_tokens=None if tokens is None else int(tokens),
        reward=number(data.get("reward")),
        correct=bool(data.get("correct")),
        status=str(data.get("status", "")),
        extracted=None if extracted is None else str(extracted),
    )
