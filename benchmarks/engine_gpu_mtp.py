"""What multi-token prediction gains at batch 1 on a GPU, at an acceptance that is replayed.

    python benchmarks/engine_gpu_mtp.py [--drafts 1] [--acceptance 0.85] [--out benchmarks/results/engine_gpu_mtp.json]

The model of engine_gpu.py with one MTP layer, random weights. Such a module knows nothing, so its guesses are replaced
behind it, on the device and at its full cost: the token that a run before has shown to come with the asked probability,
else another. Verification is the engine's own; the acceptance printed is the one that it counted. Without drafts and
with them in turns, medians; decoding is timed as in engine_gpu.py.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
TOKENS = 129


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--acceptance", type=float, default=0.85)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from engine_gpu import build_engine, copy_rate, prompts_of, v2_lite
    from result import row, write_result

    from kogia.inference.bench import step_bytes

    rows: list[dict[str, Any]] = []

    def say(id: str, value: float, unit: str, **extra: Any) -> None:
        rows.append(row(id, value, unit, **extra))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            write_result(args.out, "multi-token prediction on a GPU", rows)

    say("copy-tbps", copy_rate(), "TB/s")
    model, prompt = v2_lite(args.layers, mtp_layers=1), prompts_of(1, 512)[0]
    small = {"num_blocks": 64, "max_sequences": 4}
    plain = build_engine(model, **small)
    for drafts in args.drafts:
        drafting = build_engine(model, **small, num_draft_tokens=drafts, adaptive_drafts=False)
        truth = tokens_of(plain, prompt)
        for _ in range(5):  # in bf16 the tokens of a pass of several may differ from those of one: until they agree
            replay(drafting, prompt, truth, args.acceptance, drafts)
            before, truth = truth, tokens_of(drafting, prompt)
            if before == truth:
                break
        timings = [(speed(plain, prompt), speed(drafting, prompt)) for _ in range(args.rounds)]
        speeds = [each[1]["tokens_per_second"] for each in timings]
        ratios = [with_drafts["tokens_per_second"] / without["tokens_per_second"] for without, with_drafts in timings]
        for name, index, engine in (("decode", 0, plain), ("mtp", 1, drafting)):
            found = {key: median(each[index][key] for each in timings) for key in timings[0][0]}
            speeds = [each[index]["tokens_per_second"] for each in timings]
            found["gigabytes_per_step"] = step_bytes(engine, 1, 512 + TOKENS / 2) / 1e9
            del found["tokens_per_second"]
            say(f"{name}-bf16-b1-k{drafts}", median(speeds), "tokens/s", low=min(speeds), high=max(speeds), **found)
        same = sum(a == b for a, b in zip(tokens_of(plain, prompt), tokens_of(drafting, prompt), strict=True))
        say(f"mtp-speedup-b1-k{drafts}", median(ratios), "ratio", low=min(ratios), high=max(ratios), limit=1.1,
            same_tokens=same)  # fmt: skip


def tokens_of(engine: Any, prompt: list[int]) -> list[int]:
    from engine_gpu import params_of

    return engine.generate([prompt], params_of(TOKENS))[0][0].token_ids


def speed(engine: Any, prompt: list[int]) -> dict[str, float]:
    """Tokens per second behind the first one, and what the steps did."""
    from engine_gpu import timed

    from kogia.engine.engine import EngineStats

    one = timed(engine, [prompt], 1)
    engine.stats = EngineStats()
    seconds = timed(engine, [prompt], TOKENS) - one
    steps = engine.stats.num_steps - 1  # one read the prompt
    return {
        "tokens_per_second": (TOKENS - 1) / seconds,
        "acceptance": engine.stats.acceptance,
        "tokens_per_step": (TOKENS - 1) / steps,
        "step_ms": 1e3 * seconds / steps,
    }


def replay(engine: Any, prompt: list[int], truth: list[int], acceptance: float, num_drafts: int) -> None:
    """Let guesses be right with probability `acceptance`, place by place, where the engine continues as `truth`."""
    from kogia.engine import drafting

    lucky = lucky_places(len(truth), acceptance, num_drafts)
    vocab, device = engine.model.config.vocab_size, engine.model.device
    said = np.where(lucky, truth, (np.array(truth) + 1) % vocab)
    future = torch.from_numpy(np.concatenate([prompt, said, np.zeros(8, dtype=np.int64)])).to(device)

    class Replayed(drafting.DraftStep):
        def guess(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            known = future[positions.clamp_max(len(future) - 1)]
            return torch.where(known < 0, super().guess(hidden, positions), known)

    graphs = engine.runner.draft_graphs
    graphs.make = Replayed
    graphs._recorded, graphs._pool = {}, None


def lucky_places(count: int, acceptance: float, num_drafts: int) -> np.ndarray:
    """[count] whether the guess at a place is right, drawn until a walk over them accepts as many drafts as asked."""
    for seed in range(1000):
        lucky = np.random.default_rng(seed).random(count) < acceptance
        place, drafted, accepted = 1, 0, 0
        while place < count - num_drafts:
            run = int(np.cumprod(lucky[place : place + num_drafts]).sum())
            drafted, accepted, place = drafted + num_drafts, accepted + run, place + run + 1
        if abs(accepted / drafted - (acceptance if num_drafts == 1 else expected(acceptance, num_drafts))) < 0.01:
            return lucky
    raise ValueError(f"acceptance = {acceptance}: no draw of {count} places comes near it")


def expected(acceptance: float, num_drafts: int) -> float:
    """Share of a chain's drafts that stand, each right with the same probability and useless behind a wrong one."""
    return sum(acceptance ** (i + 1) for i in range(num_drafts)) / num_drafts


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
