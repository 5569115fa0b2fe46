"""Settings of a reinforcement-learning run that takes a fraction of a second."""

from dataclasses import replace
from pathlib import Path

from kogia.engine.config import EngineConfig
from kogia.rl.config import RLConfig
from kogia.train.config import OptimConfig


def rl_settings(checkpoint: Path, out: Path, **changes) -> RLConfig:
    base = RLConfig(
        init=str(checkpoint),
        out=str(out),
        tasks=("toy_task:Checksum",),
        steps=4,
        prompts_per_step=4,
        group_size=4,
        max_tokens=8,
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0),
        signal_check=False,
        signal_prompts=6,
        signal_samples=6,
        eval_questions=0,
        save_every=0,
        engine=EngineConfig(num_blocks=256, block_size=4, max_sequences=32),
        verify_workers=1,
        device="cpu",
        threads=1,
        quiet=True,
    )
    return replace(base, **changes)
