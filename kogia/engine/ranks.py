"""Reading only a prefix of the latents where contexts are long, for models trained with nested ranks.

An option that is off by default and no part of DeepSeek's releases (docs/enhanced-mla.md). Numbers past the rank of a
query neither score nor mix. Rows are stored at the first, largest rank.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.inputs import Upload
from kogia.engine.sequences import SequenceTable
from kogia.engine.views import CacheView, TokenRuns
from kogia.model.cache import StepCache
from kogia.model.mla import up_to_rank
from kogia.ops.attention import paged_attention
from kogia.ops.cache import LatentRow, LayerCache


class RankByContext:
    """A view over another one, in which each query reads the latents up to a rank of its own."""

    def __init__(self, view: CacheView, table: tuple[tuple[int, int], ...], device: torch.device) -> None:
        """`table` is `EngineConfig.rank_by_context`."""
        self.view = view
        self._tokens, self._ranks = torch.tensor(table, device=device).T.contiguous()

    def put(self, upload: Upload, table: SequenceTable, runs: TokenRuns) -> None:
        self.view.put(upload, table, runs)

    def step_cache(self, upload: Upload, runs: TokenRuns) -> StepCache:
        return self._limited(self.view.step_cache(upload, runs), upload["positions"])

    def drafting(self, block_tables: Tensor, positions: Tensor, num_slots: Tensor, contexts: NDArray) -> StepCache:
        return self._limited(self.view.drafting(block_tables, positions, num_slots, contexts), positions)

    def _limited(self, cache: StepCache, positions: Int[Tensor, " tokens"]) -> StepCache:
        # a token at position p has a context of p + 1
        ranks = self._ranks[torch.searchsorted(self._tokens, positions + 1, right=True) - 1]
        layers = (replace(layer, attend=partial(_attend, inner=layer, ranks=ranks)) for layer in cache.layers)
        return StepCache(tuple(layers))


def _attend(q: Tensor, _: LayerCache, *args: Any, inner: LayerCache, ranks: Tensor, **options: Any) -> Tensor:
    """`paged_attention` of the inner view; numbers past a query's rank neither score nor, behind it, mix."""
    assert isinstance(inner.row, LatentRow), "ranks are those of latent rows"
    latent, rope = q.split([inner.row.latent, inner.row.rope], -1)
    q = torch.cat((up_to_rank(latent, ranks), rope), -1)
    return up_to_rank(paged_attention(q, inner, *args, **options), ranks)
