"""The engine on one GPU with packed weights, beside itself with bf16 weights in the same run.

    python benchmarks/engine_gpu_packed.py [--formats int4 fp8] [--batches 1 64] [--profile] [--out FILE]

The model of engine_gpu.py, context 512 + 128, its weights drawn and packed on the device. With --large,
DeepSeekMoE-145B in int4 at batch 1 as well, which takes 80 GB. `--check` compares log-probabilities of greedy tokens
with those of the same numbers in dense float32; `--profile` prints the kernels of a step.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=["none", "int4", "fp8"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from engine_gpu import build_engine, copy_rate, decode, host_share, profile, v2_lite_config
    from result import row, write_result

    from kogia.model.presets import preset

    rows: list[dict[str, Any]] = []

    def say(id: str, value: float, unit: str, **extra: Any) -> None:
        rows.append(row(id, value, unit, **extra))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            write_result(args.out, "engine on a GPU, packed weights", rows)

    def speeds(name: str, engine: Any, batches: list[int]) -> None:
        for batch in batches:
            found = [decode(engine, batch)[0] for _ in range(args.rounds)]
            share = host_share(engine, batch)
            say(f"decode-{name}-b{batch}", median(found), "tokens/s", low=min(found), high=max(found), **share)
            if args.profile:
                profile(engine, batch)

    say("copy-tbps", copy_rate(), "TB/s")
    for format in args.formats:
        if args.check and format != "none":
            for id, value, extra in check(format):
                say(id, value, "nats, mean gap to float32", **extra)
        model = drawn(v2_lite_config(), format)
        speeds("bf16" if format == "none" else format, build_engine(model), args.batches)
        say(f"weights-{format}-gb", sum(t.nbytes for t in model.state_dict().values()) / 1e9, "GB")
        del model
        torch.cuda.empty_cache()
    if args.large:
        engine = build_engine(drawn(preset("deepseek-moe-145b"), "int4"), num_blocks=40, max_sequences=2)
        speeds("145b-int4", engine, [1])


def drawn(config: Any, format: str) -> Any:
    """A bf16 model on the GPU with random weights, packed where `format` is not "none"."""
    from kogia.model.quantised import build_packed
    from kogia.model.transformer import build_model

    if format == "none":
        return build_model(config, device="cuda", dtype=torch.bfloat16)
    return build_packed(config, format, device="cuda", dtype=torch.bfloat16)


def check(format: str, layers: int = 4) -> Any:
    """Log-probabilities of greedy tokens, with graphs and without, beside those of the same weights in float32."""
    from dataclasses import replace

    from engine_gpu import build_engine, params_of, prompts_of, v2_lite_config

    from kogia.model.linear import Linear
    from kogia.model.packed import pack
    from kogia.model.transformer import build_model
    from kogia.ops.dispatch import use_backend

    model = drawn(v2_lite_config(layers), format)
    prompts = [p[: 40 + 97 * i] for i, p in enumerate(prompts_of(6, 700))]
    params = replace(params_of(24), logprobs=True)
    found = {}
    for name, options in (("eager", {"graphs": False}), ("graphs", {}), ("fp8-rows", {"cache_dtype": "fp8"})):
        engine = build_engine(model, num_blocks=400, max_sequences=16, **options)
        found[name] = [c[0] for c in engine.generate(prompts, params)]
    wide = build_model(model.config, device="cuda", dtype=torch.float32)
    sources = dict(model.named_modules())
    with torch.no_grad(), use_backend("reference"):
        for name, module in wide.named_modules():
            source = sources[name]
            if isinstance(module, Linear):
                module.weight.copy_(source.dense_weight(torch.float32))
            else:
                for key, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(getattr(source, key))
        for name, outputs in found.items():
            whole = pack([p + c.token_ids for p, c in zip(prompts, outputs, strict=True)]).to("cuda")
            want = wide.logprobs(whole).cpu()
            ends = np.cumsum(whole.segments.lengths)
            gaps = [
                abs(float(want[e - 24 + i]) - c.logprobs[i])
                for e, c in zip(ends, outputs, strict=True)
                for i in range(24)
            ]
            yield f"check-{format}-{name}", float(np.mean(gaps)), {"worst": round(max(gaps), 4)}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
