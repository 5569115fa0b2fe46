"""What the weights of a model are multiplied with on a text: the measurements of activation-aware rounding."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kogia import log
from kogia.checkpoint.folds import Moment, Moments, channels_of
from kogia.checkpoint.layout import disk_weights
from kogia.data.config import SourceConfig
from kogia.data.sources import read_source
from kogia.model.linear import Linear
from kogia.model.moe import Experts
from kogia.model.packed import PackedTokens, pack
from kogia.model.transformer import Transformer
from kogia.ops.linear import linear
from kogia.ops.moe import silu_mul
from kogia.text.tokenizer import Tokenizer

NUM_TOKENS = 1 << 16
"""Of the text that are read at most."""
Hook = Callable[[torch.nn.Module, tuple[Any, ...]], None]
MOST_PRODUCTS = 1 << 30
"""Numbers of float32: 4 GiB, and as many again while a checkpoint is rounded."""
_LENGTH = 512
_BATCH_TOKENS = 4096


def calibration_batches(file: str, tokenizer: Tokenizer, max_length: int) -> Iterator[PackedTokens]:
    """The first tokens of a file's documents, chats as their text, in sequences of at most 512.

    Raises ValueError for a file that is none, or that holds fewer than two tokens.
    """
    length, left, waiting, found = min(_LENGTH, max_length), NUM_TOKENS, [], False
    for document in read_source(SourceConfig(file)):
        text = "\n".join((*(message.content for message in document.prompt), document.text))
        # a token has a character at least, so that no more of a long text is cut up than is taken
        ids = tokenizer.encode_raw(text[: 16 * left])[:left]
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            if len(part) > 1:
                waiting.append(part)
                left -= len(part)
        if waiting and (sum(map(len, waiting)) >= _BATCH_TOKENS or left < 2):
            yield from _packed(waiting)
            waiting, found = [], True
        if left < 2:
            break
    if waiting:
        yield from _packed(waiting)
    elif not found:
        raise ValueError(f"{file}: holds no text to calibrate on; give one of some thousand words")


def _packed(sequences: Sequence[Sequence[int]]) -> Iterator[PackedTokens]:
    per_batch = max(1, _BATCH_TOKENS // max(map(len, sequences)))
    for start in range(0, len(sequences), per_batch):
        yield pack(sequences[start : start + per_batch])


class _Sums:
    """By the name of the weight on disk. What several weights read is summed once."""

    def __init__(self, with_products: Set[str]) -> None:
        self.with_products = with_products
        self.readers: dict[str, tuple[str, ...]] = {}
        self.squares: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, x: Float[Tensor, "rows in"], *names: str) -> None:
        """Rows that all of `names` are multiplied with; the first one stands for them."""
        x, first = x.detach().float(), names[0]
        self.readers[first] = names
        self.counts[first] = self.counts.get(first, 0) + len(x)
        _add(self.squares, first, x.square().sum(0))
        if first in self.with_products:
            _add(self.products, first, x.T @ x)

    def moments(self) -> Iterator[tuple[str, Moment]]:
        for first, names in self.readers.items():
            if count := self.counts[first]:
                products = self.products.pop(first).div_(count) if first in self.products else None
                moment = Moment(self.squares[first] / count, products, count)
                yield from ((name, moment) for name in names)


def _add(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    sums[name] = sums[name].add_(more.cpu()) if name in sums else more.cpu()


@torch.no_grad()
def measure_moments(model: Transformer, batches: Iterator[PackedTokens], *, products: bool = False) -> Moments:
    """Run a dense model over the batches. What no token met, as experts that none was sent to, has no entry.

    With `products` E[x x^T] are measured as well, as far as `MOST_PRODUCTS` goes.
    """
    readers = _readers(model)
    sums = _Sums(_with_products(model, readers) if products else frozenset())
    with _watched(model, readers, sums):
        for batch in batches:
            batch = batch.to(model.device)
            model.logits(model(batch))
    return dict(sums.moments())


Readers = Mapping[str, tuple[str, ...]]
"""Of each input the weights that read it, by the first of them."""


def _readers(model: Transformer) -> Readers:
    """Those of all inputs that a text is run through, those of each expert's last matrix at the end. Prediction modules
    are not run."""
    config, stored = model.config, dict(disk_weights(model))
    together = {name: channels.readers for channels in channels_of(config) for name in channels.readers}
    unused = tuple(f"model.layers.{config.num_layers + k}." for k in range(config.num_mtp_layers))
    firsts: dict[str, tuple[str, ...]] = {}
    last: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if name.startswith(unused):
            continue
        if isinstance(module, Experts):
            parts = [f"{name}.{i}" for i in range(len(module.down_proj.weight))]
            weights = tuple(f"{part}.{each}_proj.weight" for part in parts for each in ("gate", "up"))
            firsts[weights[0]] = together.get(weights[0], weights)
            last |= {f"{part}.down_proj.weight": (f"{part}.down_proj.weight",) for part in parts}
        elif isinstance(module, Linear) and f"{name}.weight" in stored:
            readers = together.get(f"{name}.weight", (f"{name}.weight",))
            firsts[readers[0]] = readers
    return firsts | last


def _with_products(model: Transformer, readers: Readers) -> Set[str]:
    """The first readers of inputs whose products are summed."""
    widths = {name: weight.shape[-1] for name, weight in disk_weights(model) if isinstance(weight, Tensor)}
    chosen, left = [], MOST_PRODUCTS
    for first in readers:
        if (size := widths[first] ** 2) <= left:
            chosen.append(first)
            left -= size
    if missing := sum(len(names) for first, names in readers.items() if first not in chosen):
        log.info(f"errors of {missing} weights are not made up for: their inputs' products would take too much memory")
    return frozenset(chosen)


@contextmanager
def _watched(model: Transformer, readers: Readers, sums: _Sums) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            handles.append(module.register_forward_pre_hook(_watch_experts(name, readers, sums)))
        elif f"{name}.weight" in readers and isinstance(module, Linear):
            handles.append(module.register_forward_pre_hook(_watch_linear(readers[f"{name}.weight"], sums)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_linear(names: tuple[str, ...], sums: _Sums) -> Hook:
    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        sums.add(inputs[0].flatten(0, -2), *names)

    return hook


def _watch_experts(name: str, readers: Readers, sums: _Sums) -> Hook:
    """Gate and up matrices of all experts have the moments of all tokens, since one norm is behind them all."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Experts)
        x, expert_ids = inputs[0], inputs[1]
        sums.add(x, *readers[f"{name}.0.gate_proj.weight"])
        for i in range(len(module.down_proj.weight)):
            gate, up = module.gate_up_proj.weight[i]
            rows = x[(expert_ids == i).any(-1)]
            sums.add(silu_mul(linear(rows, gate), linear(rows, up)), f"{name}.{i}.down_proj.weight")

    return hook
