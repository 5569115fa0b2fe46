"""Mutated configurations of every format: what a stranger's `config.json` may hold.

    python tests/checkpoint/fuzz.py [COUNT] [SEED]

runs the mutations for longer than the tests do and prints what was neither loaded nor refused in words.
"""

import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint.tiny import CONFIG, DENSE, MLA, tiny

from kogia.checkpoint.hf import load_model, save_model
from kogia.checkpoint.inspect import inspect_model
from kogia.model.config import GQAConfig, IndexerConfig, Llama3RopeConfig, MoEConfig, YarnConfig
from kogia.model.packed import pack

HEADS = GQAConfig(num_heads=4, num_kv_heads=4, head_dim=4)
SOFTMAX = MoEConfig(num_experts=4, topk=2, expert_dim=6, score="softmax", normalize_topk=False)
PLAIN = replace(CONFIG, num_mtp_layers=0, dim=16)
KINDS = {
    "llama": replace(DENSE, attention=replace(DENSE.attention, rope_scaling=Llama3RopeConfig())),
    "qwen2": replace(DENSE, attention=replace(DENSE.attention, qkv_bias=True, rope_scaling=YarnConfig())),
    "qwen3": replace(DENSE, attention=replace(DENSE.attention, qk_norm=True), tie_embeddings=True),
    "qwen3_moe": replace(
        PLAIN, attention=replace(HEADS, qk_norm=True), moe=replace(SOFTMAX, num_shared_experts=0, num_dense_layers=0)
    ),
    "deepseek": replace(PLAIN, attention=HEADS, moe=SOFTMAX),
    "deepseek_v2": replace(PLAIN, moe=SOFTMAX),
    "deepseek_v3": replace(CONFIG, attention=replace(MLA, rope_scaling=YarnConfig())),
    "deepseek_v32": replace(CONFIG, attention=replace(MLA, indexer=IndexerConfig(2, 6, 4))),
    "kogia": replace(CONFIG, attention=replace(MLA, q_lora_ranks=(3, 4))),
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 100_000, 10**7, 2**31, 2**40, 2**63, 2**70, 10**400, 0.0, 0.5, -1.5, 1e-320,
    1e300, float("nan"), float("inf"), -float("inf"), "", "none", "false", "1", "\x1b[31m", "\ud800", "x" * 10_000, [],
    [[]], [1], [None], ["full_attention"], ["sparse"] * 5, {}, {"type": "yarn"}, {"rope_type": []}, {"kind": ["mla"]},
    {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}, {"quant_method": "fp8"}, [[[[[1]]]]],
]  # fmt: skip
SECONDS = 5.0
"""Over this, a configuration counts as one that hangs; a load takes some milliseconds."""


def written(directory: Path, kind: str) -> Path:
    """A tiny checkpoint of the format."""
    saved = save_model(tiny(KINDS[kind]), directory / kind)
    assert json.loads((saved / "config.json").read_text())["model_type"] == kind
    return saved


def mutated(data: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to three changes: an odd value, a field away, or a field of another format."""
    for _ in range(draw.randint(1, 3)):
        place = draw.choice(_tables(data))
        if place and draw.random() < 0.85:
            key = draw.choice(sorted(place))
        else:
            key = draw.choice(("rope_scaling", "rope_parameters", "layer_types", "n_routed_experts", "extra", "\x9b"))
        if draw.random() < 0.1:
            place.pop(key, None)
        else:
            place[key] = deepcopy(draw.choice(ODD))
    return data


def _tables(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of a table, itself first and as often as all others."""
    inner = [table for value in data.values() if isinstance(value, dict) for table in _tables(value)]
    return [data] * max(1, len(inner)) + inner


def outcome(directory: Path, data: dict[str, Any]) -> str:
    """`loaded`, `refused` (in words that can be shown), or what else happened when it was loaded and inspected."""
    (directory / "config.json").write_text(json.dumps(data))
    begin, results = time.process_time(), [_try(_run, directory), _try(inspect_model, str(directory))]
    if time.process_time() - begin > SECONDS:
        return f"hung: {data!r}"[:2000]
    odd = next((result for result in results if result not in ("loaded", "refused")), None)
    return f"{odd}: {data!r}"[:4000] if odd else results[0]


def _run(directory: Path) -> None:
    load_model(directory).logprobs(pack([[1, 2, 3], [4, 5]]))


def _try(read: Callable[[Any], object], place: Any) -> str:
    try:
        read(place)
    except (ValueError, OSError) as error:
        return "refused" if "\x1b" not in str(error) and "\x9b" not in str(error) else "raw signs shown"
    except Exception:  # noqa: BLE001 - that is what is looked for
        return traceback.format_exc()
    return "loaded"


def main(count: int, seed: int) -> None:
    draw, seen = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            directory = written(Path(place), kind)
            text = (directory / "config.json").read_text()
            for _ in range(count // len(KINDS)):
                seen[outcome(directory, mutated(json.loads(text), draw))] += 1
    print({what: seen.pop(what) for what in ("loaded", "refused")}, *seen, sep="\n")


if __name__ == "__main__":
    main(*(int(word) for word in [*sys.argv[1:3], "2000", "0"][:2]))
