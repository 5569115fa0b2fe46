"""Samples of an evaluation on their way to disk, and what a resumed one keeps of them. Torch-free.

They go to NAME.partial.jsonl as they are verified, with their settings in NAME.partial.settings, and become NAME.jsonl
at the end, together with NAME.json.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kogia.eval.summary import GREEDY, read_row, read_samples, read_summary
from kogia.files import json_line, put_in_place, write_json
from kogia.log import check_in_place
from kogia.train.lock import sole_writer

Rows = list[dict[str, Any]]


class SampleFiles:
    """The files of one evaluation. `settings` is all that its samples depend on, as JSON has it."""

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.settings = json.loads(json.dumps(settings))
        self._summary, self._samples = out / f"{name}.json", out / f"{name}.jsonl"
        # no .json: whoever reads the evaluations of a run takes every NAME.json for one
        self._partial, self._partial_settings = out / f"{name}.partial.jsonl", out / f"{name}.partial.settings"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other evaluations of this name out, while the block lasts. ValueError if one is at work.

        The lock is on the partial file, which is never replaced and at the end becomes the file of the samples.
        """
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(self._partial, make=True):
            self._opened = self._partial.stat()
            yield

    def finished(self) -> tuple[dict[str, Any], Rows] | None:
        """(summary, samples) where the evaluation under these settings has been finished and no other was begun."""
        if self._partial.stat().st_size or not (self._summary.is_file() and self._samples.is_file()):
            return None
        summary = read_summary(self._summary)
        if summary.get("settings") != self.settings:
            return None
        found = summary, read_samples(self._samples)
        self._partial_settings.unlink(missing_ok=True)
        self._partial.unlink()
        return found

    def begin(self, *, resume: bool) -> Rows:
        """Start the partial files, with `resume` with the rows that an interrupted evaluation left, and return those.

        A question is kept where all of its samples are there. ValueError where the settings were others.
        """
        kept = self._kept() if resume and self._partial.stat().st_size else []
        write_json(self._partial_settings, self.settings)
        self._leave_only("".join(map(json_line, kept)).encode())
        return kept

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        check_in_place(self._partial, self._opened)
        with self._partial.open("a", encoding="utf-8") as file:
            file.writelines(map(json_line, rows))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put summary and samples in place. A kill in between leaves what `begin` resumes, or `finished` knows."""
        check_in_place(self._partial, self._opened)
        write_json(self._summary, {**summary, "settings": self.settings})
        put_in_place(self._partial, self._samples)
        self._partial_settings.unlink()

    def _leave_only(self, kept: bytes) -> None:
        """Cut the partial file back, in place: it stays the file that is locked."""
        with self._partial.open("r+b") as file:
            if file.read(len(kept)) != kept:  # a question in the middle lost samples: only damage does that
                file.seek(0)
                file.truncate()
                file.write(kept)
            file.truncate()

    def check(self) -> None:
        """Raise ValueError where an interrupted evaluation left samples that were made under other settings."""
        if not self._partial.exists() or not self._partial.stat().st_size:
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
            before = read_summary(self._partial_settings)
        except (OSError, ValueError):
            raise ValueError(
                f"resume: {self._partial} lacks a whole {self._partial_settings.name} beside it, so nobody knows what "
                "it was made with; remove it to begin anew"
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
        return [read_row(line, f"line {n}") for n, line in enumerate(whole.split(b"\n"), start=1)] if whole else []
    except ValueError as error:
        raise ValueError(f"resume: {path}, {error}, or remove the file to begin anew") from None
