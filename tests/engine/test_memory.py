"""How large a cache is that nobody gave a size."""

import pytest
import torch

from kogia.engine import memory
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.model.config import MLAConfig, ModelConfig
from kogia.model.transformer import build_model
from kogia.ops import machine

CPU = torch.device("cpu")
LONG = ModelConfig(
    vocab_size=280,
    dim=32,
    num_layers=2,
    ffn_dim=64,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    max_position=100_000,
)
ROW_BYTES = 2 * (16 + 8) * 4
"""Of one token in both layers."""


def test_free_memory_is_what_the_system_or_the_container_leaves(tmp_path, monkeypatch):
    free = machine.free_memory(CPU)
    assert 0 < free < 2**50
    limit, use = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(machine, "_GROUPS", ((limit, use),))
    whole = machine.free_memory(CPU)  # files that are not there limit nothing
    assert whole >= free * 0.9
    for text, expected in (("max\n", whole), ("5000\n", 2000), ("1000\n", 0)):
        limit.write_text(text)
        use.write_text("3000\n")
        assert machine.free_memory(CPU) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("free", "tokens"), [(2 * 160 * ROW_BYTES, 160), (2 * 175 * ROW_BYTES, 160), (2**40, 300_000)])
def test_the_cache_takes_half_of_the_free_memory_up_to_what_can_be_used(monkeypatch, free, tokens):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    engine = Engine(build_model(LONG), None, EngineConfig(max_sequences=3))
    assert engine.runner.cache.num_blocks * 16 == tokens


def test_a_size_that_is_given_is_kept_to_and_one_too_small_is_named(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    given = EngineConfig(max_sequences=3, cache_memory_bytes=64 * ROW_BYTES)
    assert Engine(build_model(LONG), None, given).runner.cache.num_blocks == 4
    with pytest.raises(ValueError, match=f"the free memory = 50: one block of 16 tokens takes {16 * ROW_BYTES} bytes"):
        Engine(build_model(LONG), None, EngineConfig())
