"""Other places that metrics go to, beside metrics.jsonl: TensorBoard, and Weights & Biases. Torch-free.

Each needs its package, an extra of this one: pip install 'kogia[tensorboard]'. TensorBoard's files are in
RUN/tensorboard. Weights & Biases sends a run's settings and metrics, and what its client gathers of the machine, to its
server, unless WANDB_MODE says offline; its own environment variables say the rest (WANDB_PROJECT, WANDB_ENTITY, ...).
"""

import importlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kogia.files import write_text

SinkName = Literal["tensorboard", "wandb"]


def check_sinks(names: Sequence[SinkName]) -> None:
    """Raise ValueError for a sink whose package is missing or does not load, before anything slow begins."""
    for name in names:
        try:
            _PARTS[name]()
        except ImportError as error:
            raise ValueError(
                f"sinks = {list(names)}: {name} is not there ({error}); pip install 'kogia[{name}]', or leave it out"
            ) from error


def open_sinks(
    names: Sequence[SinkName], run_dir: Path, settings: Mapping[str, Any], first_step: int
) -> list["TensorBoard | WandB"]:
    """The sinks of a run that has done `first_step` steps: whatever they have of later ones is replaced.

    Raises ValueError as `check_sinks`, and where Weights & Biases cannot begin.
    """
    check_sinks(names)
    chosen = set(names)
    sinks: list[TensorBoard | WandB] = []
    if "tensorboard" in chosen:
        sinks.append(TensorBoard(run_dir, first_step))
    if "wandb" in chosen:
        sinks.append(WandB(run_dir, settings))
    return sinks


class TensorBoard:
    """Scalars in RUN/tensorboard."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._event, self._summary, session, writer = _tensorboard()
        self._writer = writer(str(run_dir / "tensorboard"))
        restart = session(status=session.START)  # TensorBoard drops what it has from this step on
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step + 1, session_log=restart))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one again when the run is resumed: RUN/wandb_id says which."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        wandb = _wandb()
        place = run_dir / "wandb_id"
        if not place.exists():
            write_text(place, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "kogia",
                name=run_dir.resolve().name,
                id=place.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=run_dir,
                config=dict(settings),
                settings=wandb.Settings(console="off", save_code=False),  # the terminal has a live line of ours
            )
        except wandb.Error as error:
            raise ValueError(
                f"sinks: wandb cannot begin ({error}); `wandb login`, or set WANDB_MODE=offline, or leave it out"
            ) from error
        # a resumed run repeats steps, which would be refused as steps of theirs
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


def _tensorboard() -> tuple[Any, ...]:
    """TensorBoard's Event, Summary, SessionLog and EventFileWriter, which need neither torch nor TensorFlow."""
    events = importlib.import_module("tensorboard.compat.proto.event_pb2")
    summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    return events.Event, summaries.Summary, events.SessionLog, writers.EventFileWriter


def _wandb() -> Any:
    wandb = importlib.import_module("wandb")
    if not hasattr(wandb, "init"):  # a folder of that name, as the client makes where it runs
        raise ImportError(f"{next(iter(wandb.__path__))} is a folder, not the package")
    return wandb


_PARTS = {"tensorboard": _tensorboard, "wandb": _wandb}
