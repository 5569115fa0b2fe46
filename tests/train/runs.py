"""A supervised run that takes a second, and what two runs have in common."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from train.tiny import ATTENTION, MOE

from kogia.checkpoint.resume import latest_checkpoint
from kogia.data.config import DataConfig, SourceConfig
from kogia.log import read_metrics
from kogia.model.config import ModelConfig
from kogia.train.config import OptimConfig, SupervisedConfig

MODEL = ModelConfig(
    vocab_size=280, dim=32, num_layers=2, ffn_dim=48, attention=ATTENTION, moe=MOE, num_mtp_layers=1, max_position=64
)


def tiny_run(folder: Path) -> SupervisedConfig:
    """40 steps on a corpus of 400 documents, which is made in `folder`."""
    corpus = folder / "corpus.jsonl"
    rows = [{"text": f"the number {i} and the number {i * i} follow {i - 1}"} for i in range(300)]
    rows += [{"prompt": f"{i} + 1?", "completion": f"count</think>{i + 1}"} for i in range(100)]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig((SourceConfig(str(corpus)),), batch_tokens=256, max_seqlen=64, val_share=0.1)
    optim = OptimConfig(lr=3e-3, warmup_steps=2)
    out = str(folder / "run")
    return SupervisedConfig(
        out, model=MODEL, data=data, optim=optim, steps=40, save_every=10, eval_every=20, threads=1, quiet=True
    )


def checkpoint_contents(path: Path) -> dict[str, object]:
    tensors = {}
    for file in path.rglob("*.safetensors"):
        tensors |= {f"{file.name}:{name}": value for name, value in load_file(file).items()}
    values = {str(f.relative_to(path)): json.loads(f.read_text()) for f in path.rglob("*.json")}
    del values["train_state/state.json"]["random"]["python"]  # the type checker of the test run draws from it
    return {**tensors, **values}


def assert_same_run(a: Path, b: Path) -> None:
    first, second = (checkpoint_contents(latest_checkpoint(run)) for run in (a, b))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name
    timing = {"seconds", "tokens_per_second", "mfu_causal", "mfu_full", "peak_tflops", "memory_gib"}
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in read_metrics(run)] for run in (a, b)]
    assert lines[0] == lines[1]
