"""What the routers of one forward pass chose: a value beside the batch, not state of the model.

Mixtures are counted from the first one up, those of the multi-token-prediction modules last.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.moe import Balance, expert_counts
from kogia.ops.segments import Segments


class Routing:
    """Filled by a forward pass over one batch, the passes of its MTP modules included.

    A pass that is run again, as activation checkpointing does in the backward pass, finds its choices here and repeats
    them; it counts nothing twice. That needs `use_reentrant=False`: the other kind runs first without gradients.
    """

    def __init__(
        self,
        given: Mapping[int, Int[Tensor, "tokens topk"]] | None = None,
        *,
        losses: bool = False,
        balance: Balance = Balance(),
    ) -> None:
        """`given` are ids to replay, by mixture; those left out choose for themselves, and -1 is nobody.

        With `losses` the balance losses of every router and the loss of every indexer are computed as well.
        """
        self.given = dict(given or {})
        self.losses, self.balance = losses, balance
        self.chosen: dict[int, Tensor] = {}
        """Mixture -> [tokens, topk] expert ids."""
        self._counts: dict[int, Tensor] = {}
        self._balance: dict[int, Tensor] = {}
        self._indexer: dict[int, Tensor] = {}
        self._segments: Segments | None = None

    def bind(self, segments: Segments) -> None:
        """Say which batch it is of. Raises ValueError if it is another one's already."""
        if self._segments is not None and self._segments is not segments:
            raise ValueError("a Routing records one batch, and this one has recorded another; make a new one for each")
        self._segments = segments

    def ids(self, mixture: int) -> Int[Tensor, "tokens topk"] | None:
        """What this mixture must take: its own choice when it runs again, else the given one, if there is any."""
        return self.chosen.get(mixture, self.given.get(mixture))

    def record(self, mixture: int, expert_ids: Int[Tensor, "tokens topk"], num_experts: int) -> None:
        """Note a choice and the load it makes; nothing where that was noted before."""
        if mixture not in self.chosen:
            self.chosen[mixture] = expert_ids
            self._counts[mixture] = expert_counts(expert_ids, num_experts)

    def add_balance_losses(self, mixture: int, losses: Float[Tensor, " losses"]) -> None:
        self._balance.setdefault(mixture, losses)

    def add_indexer_loss(self, layer: int, loss: Float[Tensor, ""]) -> None:
        self._indexer.setdefault(layer, loss)

    def loads(self, num_mixtures: int) -> Int[Tensor, "mixtures experts"] | None:
        """Token copies that each expert of each mixture got; zeros for a mixture that did not run, None if none did."""
        if not self._counts:
            return None
        idle = torch.zeros_like(next(iter(self._counts.values())))
        return torch.stack([self._counts.get(mixture, idle) for mixture in range(num_mixtures)])

    @property
    def num_copies(self) -> int:
        """Copies of tokens that the choices ask for, nobody's among them."""
        return sum(ids.numel() for ids in self.chosen.values())

    @property
    def num_mixtures(self) -> int:
        """Mixtures that ran: those of prediction modules do not in every pass."""
        return len(self.chosen)

    @property
    def num_indexers(self) -> int:
        """Indexers that ran."""
        return len(self._indexer)

    def balance_loss(self) -> Float[Tensor, ""] | None:
        """The balance loss of experts summed over tokens and mixtures (DeepSeek-V3 eq 17-20); None without mixtures."""
        return None if (losses := self.balance_losses()) is None else losses[0]

    def balance_losses(self) -> Float[Tensor, " losses"] | None:
        """All of `kogia.ops.moe.balance_losses` summed over tokens and mixtures; None without mixtures."""
        return torch.stack(list(self._balance.values())).sum(0) if self._balance else None

    def indexer_loss(self) -> Float[Tensor, ""] | None:
        """The indexers' own loss summed over tokens and layers (DeepSeek-V3.2 section 2.1); None without indexers."""
        return _total(self._indexer)


def _total(losses: Mapping[int, Tensor]) -> Tensor | None:
    return torch.stack(list(losses.values())).sum() if losses else None
