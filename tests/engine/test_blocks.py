"""Block pool: reference counts, prefix names, order of reuse."""

import hashlib

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kogia.engine.blocks import BlockPool, hash_block


def test_a_block_name_depends_on_every_token_before_it():
    tokens = np.arange(4)
    assert hash_block(b"", tokens) == hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=16).digest()
    names = {hash_block(parent, block) for parent in (b"", b"x" * 16) for block in (tokens, tokens[::-1].copy())}
    assert len(names) == 4


def test_a_named_block_is_found_again_until_its_space_is_needed():
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.register(first, b"one")
    pool.register(second, b"two")
    pool.release([first, second])
    assert pool.num_free == 3
    assert pool.acquire(b"one") == first
    pool.release([first])
    pool.allocate(2)  # the blank block, then the least recently used name: the end of the prefix
    assert pool.acquire(b"two") is None
    assert pool.acquire(b"one") == first


def test_the_end_of_a_prefix_is_evicted_before_its_start():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, name in zip(blocks, (b"1", b"2", b"3")):
        pool.register(block, name)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.allocate(1) == [blocks[1]]


def test_a_renewed_pool_has_all_blocks_no_names_and_the_same_taints():
    pool = BlockPool(3)
    (kept,), (freed,), (waiting,) = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    pool.register(kept, b"kept")
    pool.register(freed, b"freed")
    pool.taint([freed, waiting])
    pool.release([freed, waiting])
    assert pool.allocate(1) == [waiting]
    fresh = pool.renewed()
    assert fresh.acquire(b"kept") is None
    assert fresh.acquire(b"freed") is None
    assert sorted(fresh.allocate(3)) == [0, 1, 2]
    assert sorted(fresh.take_to_clear()) == sorted([freed, waiting])


def test_a_tainted_block_is_to_be_cleared_once_when_it_changes_hands():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"prefix")
    pool.taint([first])
    pool.release([first, second])
    assert pool.acquire(b"prefix") == first
    assert pool.take_to_clear() == [], "who shares a prefix wants what is there"
    pool.release([first])
    assert sorted(pool.allocate(2)) == [first, second]
    assert (pool.take_to_clear(), pool.take_to_clear()) == ([first], [])


def test_two_blocks_of_equal_content_keep_one_name():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    pool.release([second])
    assert pool.acquire(b"same") == first
    assert pool.allocate(1) == [second]


def test_releasing_twice_is_caught():
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Random owners against a plain model: a multiset of shares and a map of names."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.shares: list[int] = []
        self.names: dict[bytes, int] = {}

    @precondition(lambda self: self.pool.num_free > 0)
    @rule()
    def allocate(self) -> None:
        (block,) = self.pool.allocate(1)
        assert block not in self.shares
        self.names = {name: b for name, b in self.names.items() if b != block}
        self.shares.append(block)

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.shares))
        self.shares.remove(block)
        self.pool.release([block])

    @precondition(lambda self: self.shares)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def register(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from(self.shares))
        self.pool.register(block, name)
        if name not in self.names and block not in self.names.values():
            self.names[name] = block

    @rule(name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def acquire(self, name: bytes) -> None:
        block = self.pool.acquire(name)
        assert block == self.names.get(name)
        if block is not None:
            self.shares.append(block)

    @rule()
    def renew(self) -> None:
        self.pool = self.pool.renewed()
        self.names.clear()
        self.shares.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.ref_counts == [self.shares.count(block) for block in range(6)]
        assert self.pool.num_free == 6 - len(set(self.shares))


TestPoolMachine = PoolMachine.TestCase
