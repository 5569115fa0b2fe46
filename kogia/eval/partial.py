"""Samples of an evaluation on their way to disk, and what a resumed one keeps of them. Torch-free.

They go to NAME.partial.jsonl as they are verified, with their settings in NAME.partial.settings, and become NAME.jsonl
at the end, together with NAME.json.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kogia.eval.summary import GREEDY, read_samples
from kogia.files import put_in_place, write_json, write_text

Rows = list[dict[str, Any]]


class SampleFiles:
    """The files of one evaluation. `settings` is all that its samples depend on, as JSON has it."""

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.settings = json.loads(json.dumps(settings))
        self._summary, self._samples = out / f"{name}.json", out / f"{name}.jsonl"
        # no .json: whoever reads the evaluations of a run takes every NAME.json for one
        self._partial, self._partial_settings = out / f"{name}.partial.jsonl", out / f"{name}.partial.settings"

    def finished(self) -> tuple[dict[str, Any], Rows] | None:
        """(summary, samples) where the evaluation under these settings has been finished and no other was begun."""
        if self._partial.exists() or not (self._summary.is_file() and self._samples.is_file()):
            return None
        summary = json.loads(self._summary.read_text(encoding="utf-8"))
        return (summary, read_samples(self._samples)) if summary.get("settings") == self.settings else None

    def begin(self, *, resume: bool) -> Rows:
        """Start the partial files, with `resume` with the rows that an interrupted evaluation left, and return those.

        A question is kept where all of its samples are there. ValueError where the settings were others.
        """
        kept = self._kept() if resume and self._partial.exists() else []
        write_json(self._partial_settings, self.settings)
        write_text(self._partial, "".join(map(_line, kept)))
        return kept

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._partial.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put summary and samples in place. A kill in between leaves what `begin` resumes, or `finished` knows."""
        write_json(self._summary, {**summary, "settings": self.settings})
        put_in_place(self._partial, self._samples)
        self._partial_settings.unlink()

    def check(self) -> None:
        """Raise ValueError where an interrupted evaluation left samples that were made under other settings."""
        if not self._partial.exists():
            return
        for name, was, now in self._differing():
            raise ValueError(
                f"resume: {self._partial} was begun with {name} = {was!r}, and now it is {now!r}; go on with the same "
                "settings, or remove that file to begin anew"
            )

    def _kept(self) -> Rows:
        self.check()
        rows = _whole_rows(self._partial)
        counts = Counter((row["problem_id"], row["sample"] == GREEDY) for row in rows)
        sizes = {False: self.settings["num_samples"], True: 1}
        return [row for row in rows if counts[row["problem_id"], greedy := row["sample"] == GREEDY] == sizes[greedy]]

    def _differing(self) -> Iterator[tuple[str, Any, Any]]:
        try:
            before = json.loads(self._partial_settings.read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(
                f"resume: {self._partial} lacks {self._partial_settings.name} beside it, so nobody knows what it was "
                "made with; remove it to begin anew"
            ) from None
        for name in sorted(before.keys() | self.settings.keys()):
            if before.get(name) != self.settings.get(name):
                yield name, before.get(name), self.settings.get(name)


def find_partial(out: Path, name: str) -> Path | None:
    """The file of the samples that an interrupted evaluation left; None where there are none to lose."""
    path = out / f"{name}.partial.jsonl"
    return path if path.exists() and path.stat().st_size else None


def _whole_rows(path: Path) -> Rows:
    """Rows up to the last line end: what a kill left behind it is none."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    try:
        return [json.loads(line) for line in whole.split(b"\n")] if whole else []
    except ValueError as error:
        raise ValueError(f"resume: {path} holds a line that is not JSON ({error}); remove it to begin anew") from error


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
