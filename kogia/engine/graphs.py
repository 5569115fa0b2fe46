"""Decode steps as recorded graphs: one launch instead of hundreds, which is what small batches wait for.

A step is recorded once for each size of batch and class of context, and reads what it needs from one buffer of fixed
layout. Batches between two sizes are filled up with tokens of nobody: they write to the cache's spare block and what
comes out is not looked at.
The model is one graph and drawing tokens from its logits another, for requests with filters or rules need something
else behind the first; steps in which a request has a number of active experts of its own are not recorded. Weights are
updated in place, so that a graph outlives them.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.activation import ActiveExperts
from kogia.engine.inputs import Arrived, Bundle, Download, Staging
from kogia.engine.steering import Edits
from kogia.model.cache import PagedCache
from kogia.model.moe import Experts, MoE
from kogia.model.packed import PackedTokens
from kogia.model.transformer import Transformer
from kogia.ops.adjust import sample_adjusted
from kogia.ops.attention import cached_attention
from kogia.ops.cache import LatentRow
from kogia.ops.cpu.record import Recording, recording
from kogia.ops.dispatch import Op
from kogia.ops.moe import Activation, mix_experts
from kogia.ops.sample import counter_uniforms, sample
from kogia.ops.segments import Segments, segments_of

SIZES = (
    1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512
)  # fmt: skip
"""Sequences of the steps that are recorded; a step of fewer is filled up by nobody's."""
T = TypeVar("T")
Graph = torch.cuda.CUDAGraph | Recording
CONTEXTS = (2048, 16384, 131072)
"""Longest contexts of the classes: each has its own width of block tables and its own split of the attention."""
NUM_FIELDS = 10
"""Numbers of a sequence beside its blocks: token id, position, slot, context length; the rest is `Settings.drawing`."""


class Drawing(NamedTuple):
    """How each sample of a step is drawn."""

    seeds: Int[Tensor, " samples"]
    temperature: Float[Tensor, " samples"]
    top_k: Int[Tensor, " samples"]
    top_p: Float[Tensor, " samples"]
    min_p: Float[Tensor, " samples"]

    @classmethod
    def of(cls, fields: Tensor) -> "Drawing":
        """Views of a step's numbers."""
        seeds, top_k = fields[5:7].unbind()
        temperature, top_p, min_p = (field.view(torch.float32)[: len(seeds)] for field in fields[7:])
        return cls(seeds, temperature, top_k, top_p, min_p)

    @classmethod
    def greedy(cls, samples: int, device: torch.device) -> "Drawing":
        zeros, none = torch.zeros(samples, device=device), torch.zeros(samples, dtype=torch.int64, device=device)
        return cls(none, zeros, none.clone(), torch.ones_like(zeros), zeros.clone())

    @property
    def filters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.top_k, self.top_p, self.min_p


@dataclass(slots=True, eq=False)
class RecordedDraw:
    """Drawing from the logits of a recorded step, which also leaves the newest tokens where the next one reads them."""

    graph: Graph
    found: Bundle | dict[str, NDArray]
    """Tokens and log-probabilities; beside a CPU its memory itself."""


@dataclass(slots=True, eq=False)
class RecordedStep:
    graph: Graph
    draws: dict[bool, RecordedDraw]
    """Whether filters are on -> drawing so; with filters where there is a kernel for them."""
    numbers: Tensor
    """What the step reads: fields and block tables; see `_parts`."""
    host: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    """The same as arrays, where a CPU runs it."""
    segments: Segments
    """Kept because the graph reads its tensor."""
    activation: Activation | None
    """The same."""
    logits: Float[Tensor, "size vocab"]
    """Overwritten by the next run of this size."""
    drawing: Drawing
    uniforms: tuple[Graph, Float[Tensor, " size"]] | None
    """What tokens are drawn with, by itself, beside a CPU."""


def _parts(numbers: Any) -> tuple[Any, Any]:
    """[size, NUM_FIELDS + blocks] numbers, an array or a tensor -> views of its memory: the fields, [NUM_FIELDS, size],
    of which the kernels read each by itself, and the block tables, [size, blocks]."""
    size, width = numbers.shape
    flat, fields = numbers.reshape(-1), NUM_FIELDS * size
    return flat[:fields].reshape(NUM_FIELDS, size), flat[fields:].reshape(size, width - NUM_FIELDS)


def recorded_sizes(most: int, device: torch.device, vocab_size: int, width: int = 1) -> list[int]:
    """Numbers of sequences of recorded steps, up to `most` of `width` tokens each. On a CPU nobody's sequences take
    time, so that all numbers of up to 16 tokens are recorded. More are where the vocabulary, and with it the model, is
    small: many tokens of a larger one hide what stands between the kernels, and what a recording keeps grows."""
    if device.type != "cpu":
        most = min(most, SIZES[-1] // width)
        return sorted({size for size in SIZES if size < most} | {most})
    most = max(1, min(most, tokens_on_cpu(vocab_size) // width))
    exact = range(1, min(most, _EXACT_ON_CPU // width) + 1)
    return sorted({size for size in SIZES if size < most} | {most, *exact})


def tokens_on_cpu(vocab_size: int) -> int:
    """Tokens of the largest step that is worth a recording on a CPU; see `recorded_sizes`."""
    return min(_TOKENS_ON_CPU, max(_EXACT_ON_CPU, _LOGITS_ON_CPU // vocab_size))


_EXACT_ON_CPU, _TOKENS_ON_CPU, _LOGITS_ON_CPU = 16, 256, 1 << 19


class DecodeGraphs:
    """Records and replays steps in which every sequence runs one token and samples the next."""

    def __init__(
        self, model: Transformer, cache: PagedCache, newest: Tensor, experts: ActiveExperts, most: int, longest: int
    ) -> None:
        """Of up to `most` sequences, 512 at most, with contexts of up to `longest` tokens; `newest` is the runner's."""
        self.model, self.cache, self.newest, self.experts = model, cache, newest, experts
        self.is_gpu = model.device.type == "cuda"
        self.sizes = recorded_sizes(most, model.device, model.config.vocab_size)
        self.contexts = [length for length in CONTEXTS if length < longest] + [longest]
        self._widths = [-(-context // cache.block_size) for context in self.contexts]
        self._nobody = np.array([0, 0, cache.spare_slot, 1, len(newest) - 1, 0, 0, 0, 0, 0])
        """The fields of nobody's sequence."""
        self._staging = Staging(model.device)
        self._recorded: dict[tuple[int, int], RecordedStep] = {}
        self.recorder = Recorder(model.device)

    @property
    def most(self) -> int:
        """Sequences of the largest recorded step; the experts' kernel takes no more tokens."""
        return self.sizes[-1]

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """Sequences and longest context of every step, the largest first, whose memory the smaller ones share. None on
        a CPU, where recording takes no longer than the step itself."""
        if not self.is_gpu:
            return []
        return [(size, context) for context in reversed(self.contexts) for size in reversed(self.sizes)]

    def record(self, size: int, context: int) -> None:
        """Record one kind, unless that has been done."""
        self._at(size, self._num_blocks(context))

    def rehearse(self, size: int, context: int, recorder: "Recorder") -> None:
        """Go through the recording of one kind."""
        self._record(size, self._num_blocks(context), recorder)

    def rehearse_prompt(self, length: int, context: int, others: int, recorder: "Recorder") -> None:
        """Go through a step that is not recorded: the last `length` tokens of a sequence of `context`, and one token of
        each of `others` such sequences."""
        device, count = self.model.device, 1 + others
        lengths = np.array([1] * others + [length])
        tokens = torch.zeros(others + length, dtype=torch.int64, device=device)
        segments = segments_of(lengths.tolist(), device)
        tables = tokens.new_zeros(count, self._num_blocks(context))
        batch, lens = PackedTokens(tokens, tokens, segments), tokens.new_full((count,), context)
        seeds, temperature = tokens[:1], torch.zeros(1, device=device)
        activation = self.experts.own(len(tokens), device)

        @torch.no_grad()
        def step() -> None:
            view = self.cache.step(tokens, tables, lens, np.full(count, context))
            hidden = self.model(batch, step=self.model.step(batch, view, activation=activation))
            logits = self.model.logits(hidden[-1:])
            sample(logits, temperature, None)
            sample(logits, temperature, counter_uniforms(seeds, seeds))

        recorder.capture(step)

    def run(self, fields: Sequence[NDArray[np.int64]], tables: NDArray[np.int64]) -> RecordedStep:
        """Start a step: the first four fields of `NUM_FIELDS`, and the others as one; [sequences, blocks] tables. Token
        -1 - row stands for the one that this row of the sequence table sampled last."""
        tables = tables[:, : self._widths[-1]]  # they may look further ahead, where the context ends
        size = self.sizes[bisect_left(self.sizes, len(tables))]
        step = self._at(size, self._widths[bisect_left(self._widths, tables.shape[1])])
        if step.host is None:
            size, shape = step.numbers.numel(), step.numbers.shape
            buffer, host = self._staging.next_buffer(size)
            self._fill(*_parts(host[:size].reshape(shape)), fields, tables)
            step.numbers.copy_(buffer[:size].view(shape), non_blocking=True)
        else:
            self._fill(*step.host, fields, tables)
        step.graph.replay()
        return step

    def _fill(
        self,
        to: NDArray[np.int64],
        own: NDArray[np.int64],
        fields: Sequence[NDArray[np.int64]],
        tables: NDArray[np.int64],
    ) -> None:
        """Lay out the numbers of a step in the fields `to` and the block tables `own`."""
        count, width = tables.shape
        to[0, :count], to[1, :count], to[2, :count], to[3, :count], to[4:, :count] = fields
        own[:count, :width], own[:count, width:] = tables, 0
        if count < len(own):
            to[:, count:], own[count:] = self._nobody[:, None], 0
            own[count:, 0] = self.cache.spare_slot // self.cache.block_size
        if not self.is_gpu:  # the step before is done: what it sampled is known
            waits = (to[0] < 0).nonzero()[0]
            if len(waits):
                to[0, waits] = self.newest.numpy()[-1 - to[0, waits]]

    def draw(self, step: RecordedStep, *, filtered: bool) -> Download | Arrived:
        """Tokens and log-probabilities of a step that runs, of nobody's sequences too, by one of its `draws`."""
        draw = step.draws[filtered]
        draw.graph.replay()
        if isinstance(draw.found, Bundle):
            return Download(draw.found)
        return self._arrived(step, {name: array.copy() for name, array in draw.found.items()})

    def draw_adjusted(self, step: RecordedStep, edits: Edits) -> Arrived:
        """The same beside a CPU, as rules want the tokens."""
        assert step.uniforms is not None, "beside a CPU they are recorded"
        graph, uniforms = step.uniforms
        graph.replay()
        drawing = step.drawing
        tokens, logprobs = sample_adjusted(step.logits, drawing.temperature, uniforms, *edits, *drawing.filters)
        return self._arrived(step, {"tokens": tokens.numpy(), "logprobs": logprobs.numpy()})

    def _arrived(self, step: RecordedStep, found: dict[str, NDArray]) -> Arrived:
        assert step.host is not None, "where there is no bundle a CPU has run the step"
        self.newest.numpy()[step.host[0][4]] = found["tokens"]
        return Arrived(found)

    def _num_blocks(self, context: int) -> int:
        return -(-context // self.cache.block_size)

    def _at(self, size: int, num_blocks: int) -> RecordedStep:
        kind = size, num_blocks
        if kind not in self._recorded:
            self._recorded[kind] = self._record(size, num_blocks, self.recorder)
        return self._recorded[kind]

    @torch.no_grad()
    def _record(self, size: int, num_blocks: int, recorder: "Recorder") -> RecordedStep:
        device = self.model.device
        numbers = torch.zeros(size, NUM_FIELDS + num_blocks, dtype=torch.int64, device=device)
        fields, tables = _parts(numbers)
        fields[:] = torch.from_numpy(self._nobody).to(device)[:, None]
        tables[:, 0] = self.cache.spare_slot // self.cache.block_size
        lengths = np.ones(size, dtype=np.int64)
        segments = Segments(torch.arange(size + 1, device=device), lengths)
        contexts = np.full(size, num_blocks * self.cache.block_size)
        activation = self.experts.own(size, device)
        known, positions, slots, lens = fields[:4].unbind()

        def step() -> Tensor:
            newest = known
            if self.is_gpu:
                newest = torch.where(known < 0, self.newest[(-1 - known).clamp_min(0)], known)
            batch = PackedTokens(newest, positions, segments)
            view = self.cache.step(slots, tables, lens, contexts)
            return self.model.logits(self.model(batch, step=self.model.step(batch, view, activation=activation)))

        graph, logits = _captured(recorder, step)
        host = None if self.is_gpu else _parts(numbers.numpy())
        drawing = Drawing.of(fields)
        draws = self._record_draws(recorder, logits, fields, drawing)
        uniforms = None
        if not self.is_gpu:
            uniforms = _captured(recorder, lambda: counter_uniforms(drawing.seeds, lens))
        return RecordedStep(graph, draws, numbers, host, segments, activation, logits, drawing, uniforms)

    def _record_draws(
        self, recorder: "Recorder", logits: Float[Tensor, "size vocab"], fields: Tensor, drawing: Drawing
    ) -> dict[bool, RecordedDraw]:
        lens, rows = fields[3], fields[4]
        temperature, filters = drawing.temperature, drawing.filters

        def draw(*filters: Tensor) -> Bundle | dict[str, NDArray]:
            uniforms = counter_uniforms(drawing.seeds, lens)  # a sample stands behind all that are seen
            tokens, logprobs = sample(logits, temperature, uniforms, *filters)
            if not self.is_gpu:  # then the host notes the newest: an operation between kernels takes more
                return {"tokens": tokens.numpy(), "logprobs": logprobs.numpy()}
            self.newest.index_copy_(0, rows, tokens)
            return Bundle({"tokens": tokens, "logprobs": logprobs})

        draws = {False: RecordedDraw(*_captured(recorder, draw))}
        if _refusal(sample, (logits, temperature, temperature.double(), *filters), {}) is None:
            draws[True] = RecordedDraw(*_captured(recorder, lambda: draw(*filters)))
        return draws


def _captured(recorder: "Recorder", work: Callable[[], T]) -> tuple[Graph, T]:
    """Record, and what the recorded run returned."""
    found: list[T] = []
    return recorder.capture(lambda: found.append(work())), found[-1]


class Recorder:
    """Records graphs that share their memory, as one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_warm = False
        """Everything has been compiled: nothing needs to run before it is recorded."""
        self._pool = torch.cuda.MemPool() if device.type == "cuda" else None

    def capture(self, work: Callable[[], object]) -> Graph:
        """Run `work` once, which compiles its kernels, and record it.

        It is called twice: what it leaves is valid, and made anew in the same place, when the graph has been replayed.
        """
        if self.device.type == "cpu":
            work()
            with recording() as made:
                work()
            return made
        if not self.is_warm:
            side = _side_stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream(self.device).wait_stream(side)
        assert self._pool is not None, "only a GPU has graphs"
        graph = torch.cuda.CUDAGraph()
        options: Any = {
            "pool": self._pool.id,
            "stream": _side_stream(self.device),
            "capture_error_mode": "thread_local",
        }
        with _without_collection(), torch.cuda.graph(graph, **options):  # another thread may serve another model
            work()
        return graph


class Rehearsal(Recorder):
    """Goes through what is to be recorded on a GPU and keeps nothing of it. Nothing runs."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.is_warm = True

    def capture(self, work: Callable[[], object]) -> Graph:
        super().capture(work)
        return Recording()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded. One for all: what PyTorch's libraries work in is kept for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection within the block: freeing another engine's graph while one is recorded spoils it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def why_not(model: Transformer, cache: PagedCache) -> str | None:
    """Why steps of this model cannot be recorded, or None: what has no kernel waits for the device, or reads as much of
    the cache as there could be."""
    if model.device.type not in ("cuda", "cpu"):
        return f"graphs are for a GPU and a CPU, not {model.device}"
    return attention_refusal(model, cache) or experts_refusal(model)


def attention_refusal(model: Transformer, cache: PagedCache) -> str | None:
    """Why the device has no kernel for this model's attention, or None."""
    row, heads = cache.row, model.config.attention.num_heads
    if isinstance(row, LatentRow) and row.index:
        return "the lightning indexer has no kernel"
    width = row.latent + row.rope if isinstance(row, LatentRow) else row.head_dim
    q = torch.empty(1, heads, width, dtype=model.dtype, device=model.device)
    one = torch.ones(1, dtype=torch.int64, device=model.device)
    view = cache.step(one, one[:, None], one, np.ones(1, dtype=np.int64)).layers[0]
    segments = Segments(torch.arange(2, device=model.device), np.ones(1, dtype=np.int64))
    return _refusal(cached_attention, (q, view, segments), {"scale": 1.0})


@torch.no_grad()
def experts_refusal(model: Transformer) -> str | None:
    """Why the device has no kernel for this model's experts, or None: the reference asks the host how many each has."""
    mixture = next((module for module in model.modules() if isinstance(module, MoE)), None)
    if mixture is None:
        return None
    experts, topk = mixture.experts, mixture.gate.config.topk
    if not isinstance(experts, Experts):
        return "experts that are not all on this device have no graph yet"
    x = torch.empty(1, model.config.dim, dtype=model.dtype, device=model.device)
    ids = torch.zeros(1, topk, dtype=torch.int64, device=model.device)
    operands = experts.gate_up_proj.operand(), experts.down_proj.operand()
    shared = None if mixture.shared_experts is None else mixture.shared_experts.operands()
    return _refusal(mix_experts, (x, ids, ids.float(), *operands), {"shared": shared, "residual": x})


def _refusal(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why no backend of an op takes a call, or None where one does."""
    reasons = [backend.refusal(args, kwargs) for backend in op.backends(args[0].device.type)]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason is not None)
