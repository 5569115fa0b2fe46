"""The block pool: who owns which cache blocks, and which full blocks hold a known prefix.

A full block is named by a 128-bit hash of its tokens chained with the name of the block before it, so equal names mean
equal prefixes (a collision needs about 2^64 blocks). A named block whose last owner leaves stays findable until its
space is needed: free blocks without a name are used first, then named ones, least recently used first.

A tainted block may hold rows that are not finite. Whoever shares its prefix computes the same; before it gets another
content it must be cleared, since attention multiplies what it masks by 0, and 0 * NaN is not 0.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from numpy.typing import NDArray


def hash_block(parent: bytes, token_ids: NDArray) -> bytes:
    """Name of a full block: 16 bytes over the parent's name (the first block's is the salt) and the tokens."""
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference-counted blocks 0 to num_blocks - 1 with a prefix index."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._tainted: set[int] = set()
        self._to_clear: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out, cached prefixes included."""
        return len(self._blank) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of undefined content. The caller checks `num_free` first."""
        assert count <= self.num_free, f"{count} blocks asked of {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self.ref_counts[block] = 1
            blocks.append(block)
            if block in self._tainted:
                self._tainted.remove(block)
                self._to_clear.append(block)
        return blocks

    def acquire(self, name: bytes) -> int | None:
        """Take a share of the block called `name`, if it is in the cache."""
        block = self._index.get(name)
        if block is None:
            return None
        if self.ref_counts[block] == 0:
            del self._cached[block]
        self.ref_counts[block] += 1
        return block

    def register(self, block: int, name: bytes) -> None:
        """Make an owned, full block findable. Of two blocks with equal content the first keeps the name."""
        assert self.ref_counts[block] > 0, f"block {block} is free"
        if name not in self._index and self._names[block] is None:
            self._index[name] = block
            self._names[block] = name

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one share of each block of a sequence, listed in sequence order."""
        for block in reversed(blocks):  # the end of a prefix is worth less than its start: it is evicted first
            assert self.ref_counts[block] > 0, f"block {block} released twice"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if self._names[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def forget(self, blocks: Sequence[int]) -> None:
        """Let nobody find these blocks any more. Their owners keep them."""
        for block in blocks:
            if self._names[block] is not None:
                self._forget(block)

    def forget_all(self) -> int:
        """Let nobody find any block any more. Returns how many could be found."""
        count = len(self._index)
        self._index.clear()
        self._names = [None] * self.num_blocks
        self._blank += self._cached
        self._cached.clear()
        return count

    def taint(self, blocks: Sequence[int]) -> None:
        """Note that rows of these blocks may not be finite."""
        self._tainted.update(blocks)

    def take_to_clear(self) -> list[int]:
        """Tainted blocks allocated since the last call: to be cleared before anything is written to them."""
        blocks, self._to_clear = self._to_clear, []
        return blocks

    def renewed(self) -> "BlockPool":
        """A pool of as many blocks, free and without names. What is tainted in this one is so in that."""
        pool = BlockPool(self.num_blocks)
        pool.taint([*self._tainted, *self._to_clear])
        return pool

    def _forget(self, block: int) -> None:
        name = self._names[block]
        assert name is not None, f"block {block} has no name"
        del self._index[name]
        self._names[block] = None
