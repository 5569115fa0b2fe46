"""Making a GPU ready: every kernel compiled, every graph recorded, before the first request.

All steps are gone through first without running them, which says what kernels they take; those are compiled side by
side. One layer of each kind is enough for that. Then the steps are recorded, with nothing left to compile in between.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kogia.engine.drafting import DraftGraphs
from kogia.engine.graphs import DecodeGraphs, Rehearsal
from kogia.model.moe import SomeExperts
from kogia.model.transformer import Transformer
from kogia.ops.prefill import FEW

Graphs = DecodeGraphs | DraftGraphs


def warm_up(
    recorders: Sequence[Graphs], most_tokens: int, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Get ready for all steps that are recorded, and for all others of up to `most_tokens` tokens. `on_progress` hears
    how many graphs of how many have been recorded."""
    kinds = [(graphs, kind) for graphs in recorders for kind in graphs.kinds]
    if not kinds:
        return
    _compile(recorders, most_tokens)
    for done, (graphs, kind) in enumerate(kinds, 1):
        graphs.record(*kind)
        if on_progress is not None:
            on_progress(done, len(kinds))


def _compile(recorders: Sequence[Graphs], most_tokens: int) -> None:
    from kogia.ops.triton.ahead import compile_ahead

    model = recorders[0].model
    a = torch.zeros(16, 16, dtype=model.dtype, device=model.device)
    torch.mm(a, a)  # neither the library of products is set up within a recording
    model.rotary(torch.zeros(1, dtype=torch.int64, device=model.device))  # nor what a model keeps on its device
    for module in model.modules():
        if isinstance(module, SomeExperts):
            module.place(model.device)
    cache = next(graphs.cache for graphs in recorders if isinstance(graphs, DecodeGraphs))
    with one_of_each_kind(model, cache.rows):
        compile_ahead(lambda: _rehearse(recorders, most_tokens, Rehearsal(model.device)))
    torch.cuda.empty_cache()  # what the longest step would have taken
    for graphs in recorders:
        graphs.recorder.is_warm = True


@contextmanager
def one_of_each_kind(model: Transformer, rows: Tensor) -> Iterator[None]:
    """Within the block the model has one decoder layer of each kind: of those that are made of tensors of the same
    names, shapes, dtypes and alignment, its rows of the cache (`PagedCache.rows`) included, the first."""
    decoder = model.model
    layers, count = decoder.layers, decoder.num_layers
    kinds: dict[Any, nn.Module] = {}
    for layer, own in zip(layers[:count], rows, strict=False):
        kinds.setdefault((_form("", own), *_tensors(layer)), layer)
    decoder.layers, decoder.num_layers = nn.ModuleList([*kinds.values(), *layers[count:]]), len(kinds)
    try:
        yield
    finally:
        decoder.layers, decoder.num_layers = layers, count


def _tensors(layer: nn.Module) -> list[Any]:
    return [_form(name, each) for name, each in (*layer.named_parameters(), *layer.named_buffers())]


def _form(name: str, tensor: Tensor) -> Any:
    """What compiled kernels depend on."""
    return name, tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % _ALIGNMENT


_ALIGNMENT = 16
"""Bytes; kernels are compiled anew for pointers that are no multiple of it."""


def _rehearse(recorders: Sequence[Graphs], most_tokens: int, rehearsal: Rehearsal) -> None:
    for graphs in recorders:
        for kind in graphs.kinds:
            graphs.rehearse(*kind, rehearsal)
        if isinstance(graphs, DecodeGraphs):
            for step in prompt_steps(graphs.contexts[-1], graphs.cache.block_size, graphs.most, most_tokens):
                graphs.rehearse_prompt(*step, rehearsal)


def prompt_steps(longest: int, block: int, most: int, most_tokens: int) -> Iterator[tuple[int, int, int]]:
    """(tokens, context, sequences of one token beside them) of steps that between them take every kernel: tiles go by
    powers of two of the tokens, parts of the attention by powers of two of the blocks. Contexts are of up to `longest`
    tokens in blocks of `block`, and steps of up to `most` sequences and `most_tokens` tokens."""
    lengths = {min(2**i, most_tokens, longest) for i in range(1, most_tokens.bit_length() + 1)}
    yield from ((length, longest, 0) for length in sorted(lengths))
    contexts = {min(block * 2**i, longest) for i in range((-(-longest // block)).bit_length() + 1)}
    yield from ((FEW, context, 0) for context in sorted(contexts))
    for length in range(1, FEW + 1):  # a kernel for each, and other ones where a context is short or sequences are many
        yield from ((length, context, others) for context in (min(contexts), longest) for others in (0, most - 1))
