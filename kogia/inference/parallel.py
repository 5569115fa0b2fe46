"""One engine over several processes, each with a share of the model: tensor and expert parallelism.

Every rank has a whole engine of its own, which is given the same requests and told when to step. Given those, an engine
does the same everywhere: plans are made from what was sampled, and sampled is from logits that all ranks have in the
same bits. So nothing but the sums inside the layers is exchanged in a step, and what engines learn to do works in
parallel. Where a rank all the same did something else, the ranks would no longer belong together; each step says what
the first one has come to, and a rank that has not ends the team.
"""

import io
import socket
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kogia.checkpoint.open import find_model, pick_device
from kogia.distributed.group import Group, join
from kogia.distributed.parallel import connect
from kogia.distributed.team import HERE, READY, Team, Told, uninterrupted
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine, affordable_blocks, check_weights
from kogia.engine.memory import cache_budget
from kogia.engine.request import Completion, Request, SamplingParams, TokenEvent
from kogia.engine.scheduler import Outcome
from kogia.engine.step import StepPlan, StepResult
from kogia.engine.threads import generation_threads
from kogia.model.config import ModelConfig
from kogia.model.costs import num_params
from kogia.model.sharding import Share, build_share, whole_shapes
from kogia.model.transformer import Transformer
from kogia.text.chat import Prompt
from kogia.text.tokenizer import Tokenizer

Opened = tuple[Transformer, Tokenizer | None, ModelConfig]
"""A rank's share, the tokenizer, and the configuration of the whole model."""


@runtime_checkable
class Source(Protocol):
    """Where every rank has its share from. Pickled."""

    def open(self, share: Share, device: torch.device) -> Opened: ...


@dataclass(frozen=True)
class StoredModel:
    """A model directory, as `find_model` takes it."""

    path: str | Path
    dtype: torch.dtype | str = "auto"
    quantize: str = "auto"

    def open(self, share: Share, device: torch.device) -> Opened:
        found = find_model(self.path, device=device, dtype=self.dtype, quantize=self.quantize)
        model, tokenizer, _ = found.open(share)
        return model, tokenizer, found.config


@dataclass(frozen=True)
class DrawnModel:
    """Random weights, as `build_model` draws them; no tokenizer."""

    config: ModelConfig
    dtype: torch.dtype
    seed: int = 0

    def open(self, share: Share, device: torch.device) -> Opened:
        model = build_share(self.config, share, device=device, dtype=self.dtype, seed=self.seed)
        return model, None, self.config


@dataclass(frozen=True)
class Setup:
    """What all ranks are told first."""

    source: Source
    config: EngineConfig
    device: str
    """The kind of it."""
    whole_experts: bool


@dataclass(frozen=True)
class Asked:
    """What a request is made of, for those who make it again."""

    id: int
    prompt: Prompt
    params: SamplingParams
    seed: int

    @classmethod
    def of(cls, request: Request) -> "Asked":
        return cls(request.id, request.given, request.params, request.seed)


class ShareEngine(Engine):
    """One rank's engine. On ranks other than the first, somebody tells it what the first one does."""

    def __init__(self, setup: Setup, group: Group) -> None:
        """Raises ValueError as `Engine` does, and for a model that cannot be divided so."""
        self.group, self.share = group, Share(group.rank, group.size, setup.whole_experts)
        model, tokenizer, self.whole = setup.source.open(self.share, group.device)
        connect(model, group)
        super().__init__(model, tokenizer, _with_blocks(setup.config, model, group))
        if group.rank:
            self.draft_switch = None  # the first rank's clock decides
        self.digest = 0
        """Of all that has been sampled in all steps so far."""

    def _settle(self, plan: StepPlan, result: StepResult) -> tuple[list[Outcome], NDArray[np.int64]]:
        for numbers in (plan.rows, result.tokens):
            self.digest = zlib.crc32(numbers.tobytes(), self.digest)
        return super()._settle(plan, result)

    def _retreat(self, plan: StepPlan) -> None:
        """What one rank has no memory for, the others have run: the team ends."""
        raise  # the torch.OutOfMemoryError that is being handled

    def take(self, asked: Sequence["Asked"]) -> None:
        """Queue what the first rank has queued."""
        for each in asked:
            (request,) = self.requests(each.prompt, replace(each.params, n=1))
            request.id, request.seed, request.params = each.id, each.seed, each.params
            self.queue([request])

    def follow_step(self, num_drafts: int, digest: int) -> None:
        """Step as the first rank, whose `digest` and number of drafts these are.

        Raises RuntimeError where what has come of the steps so far is not the same here.
        """
        if digest != self.digest:
            raise RuntimeError("it has sampled other tokens than rank 0: a kernel is not deterministic")
        self.num_draft_tokens = num_drafts
        self.step()

    def _take_weights(self, source: Transformer | Mapping[str, Tensor]) -> None:
        """Every rank's part of the first one's `source`, which holds the whole model."""
        shapes = self.whole_shapes
        for name, tensor in self.model.state_dict().items():
            new = torch.empty(shapes[name], dtype=tensor.dtype, device=tensor.device)
            if self.group.rank == 0:
                assert isinstance(source, Mapping), "see ParallelEngine"
                new.copy_(source[name])
            self.group.copy_from_first_(new.view(-1).view(torch.uint8))
            tensor.copy_(self.share.of(new, tensor.shape))

    @property
    def whole_shapes(self) -> dict[str, torch.Size]:
        """Of the tensors of the whole model, by name."""
        return whole_shapes(self.model, self.whole)


def _with_blocks(config: EngineConfig, model: Transformer, group: Group) -> EngineConfig:
    """As many cache blocks as the rank with the least memory can have."""
    if config.num_blocks is None:
        if config.cache_memory_bytes is None and model.device.type == "cpu":  # which the ranks share
            config = replace(config, cache_memory_bytes=cache_budget(model.device) // group.size)
        blocks = affordable_blocks(model.config, config, model.dtype, model.device)
        config = replace(config, num_blocks=group.least(blocks))
    return config


class ParallelEngine(ShareEngine):
    """The first rank's: an engine like any other, but for its `model`, which is a share.

    Raises ChildProcessError once a rank has ended.
    """

    def __init__(self, setup: Setup, group: Group, team: Team) -> None:
        self.team = team
        super().__init__(setup, group)
        self._finalizer = weakref.finalize(self, team.close)

    def close(self) -> None:
        """End the other ranks."""
        self._finalizer()

    def warm_up(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        with self._together():
            self.team.tell("warm_up")
            super().warm_up(on_progress)

    def queue(self, requests: Sequence[Request]) -> None:
        if requests:
            with self._together():
                self.team.tell("queue", [Asked.of(request) for request in requests])
                super().queue(requests)

    def step(self) -> list[TokenEvent]:
        with self._together():
            self.team.tell("step", self.num_draft_tokens, self.digest)
            return super().step()

    def abort(self, request_id: int) -> Completion | None:
        with self._together():
            self.team.tell("abort", request_id)
            return super().abort(request_id)

    def _forget_prefixes(self) -> int:
        with self._together():
            self.team.tell("forget_prefixes")
            return super()._forget_prefixes()

    def stop_thinking(self, request_id: int) -> bool:
        with self._together():
            self.team.tell("stop_thinking", request_id)
            return super().stop_thinking(request_id)

    def _take_weights(self, source: Transformer | Mapping[str, Tensor]) -> None:
        """`source` is the whole model: none that this one is a share of."""
        new = source.state_dict() if isinstance(source, Transformer) else source
        check_weights(new, self.whole_shapes)
        with self._together():
            self.team.tell("update_weights")
            super()._take_weights(new)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all ranks do; a failure within ends the team, since nobody can tell how far the others have come."""
        with uninterrupted():
            self.team.check()
            try:
                yield
            except BaseException as error:
                self.team.blame(error)
                raise
            self.team.check()


def open_parallel(
    source: Source, config: EngineConfig, size: int, *, device: torch.device | str = "auto", whole_experts: bool = False
) -> ParallelEngine:
    """An engine over `size` processes, this one among them, with a GPU each or on the CPU.

    Raises ValueError as `Engine` does, and for a model or a machine that cannot be divided so; ChildProcessError where
    a process ends before it is ready.
    """
    place = pick_device(device)
    _check(place, config, size)
    if place.type == "cpu":  # `Engine.deterministic` would ask only the first rank
        config = replace(config, graphs=False, deterministic=bool(config.deterministic))
    setup = Setup(source, config, place.type, whole_experts)
    team = Team(__name__, size)
    try:
        team.wait_until(HERE)
        team.tell(setup)
        group = join(0, size, team.meeting_place, place.type)
        team.on_failure = group.abort
        engine = ParallelEngine(setup, group, team)
        team.wait_until(READY)
    except BaseException as error:
        team.blame(error)
        raise
    return engine


def _check(device: torch.device, config: EngineConfig, size: int) -> None:
    if size < 2:
        raise ValueError(f"tensor_parallel = {size}: must be at least 2; leave it out for one process")
    if device.type == "cuda" and (device.index or torch.cuda.device_count() < size):
        raise ValueError(
            f"tensor_parallel = {size} on device {str(device)!r}: takes the first {size} GPUs, of which there are "
            f"{torch.cuda.device_count()}; choose fewer, and say which with CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cpu" and config.graphs:
        raise ValueError("engine.graphs = true: sums over processes are not recorded on a CPU; leave it out")
    if config.prune is not None:
        raise ValueError(
            "engine.prune: what to drop is decided by the attention of all heads, of which a rank has some; leave it "
            "out, or tensor_parallel"
        )


def main(channel: socket.socket) -> None:
    """A rank other than the first, until the team is closed. What the first one warns of is not said again."""
    told = Told(channel.detach())
    try:
        with redirect_stderr(io.StringIO()):
            _follow(told)
    except EOFError:
        return
    except Exception as error:
        told.say(f"{type(error).__name__}: {error}")
        raise


def _follow(told: Told) -> None:
    told.say(HERE)
    (setup,) = told.next()
    engine = ShareEngine(setup, join(told.rank, told.size, told.meeting_place, setup.device))
    told.say(READY)
    with generation_threads(None, num_params(engine.model.config)):
        while True:
            _obey(engine, *told.next())


def _obey(engine: ShareEngine, command: str, *values: Any) -> None:
    match command, *values:
        case ("warm_up",):
            engine.warm_up()
        case "queue", requests:
            engine.take(requests)
        case "step", num_drafts, digest:
            engine.follow_step(num_drafts, digest)
        case "abort", request_id:
            engine.abort(request_id)
        case "stop_thinking", request_id:
            engine.stop_thinking(request_id)
        case ("forget_prefixes",):
            engine.forget_prefixes()
        case ("update_weights",):
            engine.update_weights({})
        case _:
            raise AssertionError(f"unknown command {command!r}")
