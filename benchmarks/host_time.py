"""Host time of a decode step: planning, packing, launching and settling, with a device that costs nothing.

    python benchmarks/host_time.py [--batches 1 64 256] [--profile]

The model's part is replaced by logits that stand ready, so that what is left is the host's. On a CPU each small tensor
op costs about what its launch costs beside a GPU. Microseconds per step, medians; with --profile, what takes them.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for batch in args.batches:
        engine = idle_engine(batch)
        for _ in range(20):
            engine.step()
        seconds = [timed(engine.step) for _ in range(args.steps)]
        print(json.dumps({"batch": batch, "host_us": round(1e6 * median(seconds), 1)}), flush=True)
        if args.profile:
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(args.steps):
                engine.step()
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def idle_engine(batch: int) -> Any:
    """An engine with `batch` sequences under way, whose steps take the path of recorded ones without a model."""
    from kogia.engine import engine as engine_module
    from kogia.engine import graphs
    from kogia.engine.config import EngineConfig
    from kogia.engine.request import SamplingParams
    from kogia.model.config import MLAConfig, ModelConfig
    from kogia.model.transformer import build_model

    class Nothing:
        def __init__(self, *_: Any) -> None: ...

        def replay(self) -> None: ...

        def pool(self) -> None: ...

    mla = MLAConfig(num_heads=1, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    config = ModelConfig(
        vocab_size=64, dim=16, num_layers=1, ffn_dim=16, attention=mla, moe=None, max_position=4096, init_std=0.2
    )

    def recorded(self: Any, size: int, num_blocks: int) -> Any:
        numbers = torch.zeros(size, 4 + num_blocks, dtype=torch.int64)
        return graphs._Recorded(Nothing(), numbers, None, None, torch.zeros(size, config.vocab_size))

    graphs.DecodeGraphs._record = recorded
    graphs.recorded_sizes = lambda most, *_: list(range(1, most + 1))
    engine_module.why_not = lambda *_: None
    settings = EngineConfig(block_size=64, num_blocks=5000, max_sequences=256, max_batch_tokens=16384, overlap=True)
    engine = engine_module.Engine(build_model(config), None, settings)
    params = SamplingParams(temperature=1.0, max_tokens=3000, ignore_eos=True, seed=1)
    for index in range(batch):
        engine.add([5 + index % 40] * 100, params)
    return engine


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
