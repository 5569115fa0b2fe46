"""A trained model made to hold longer documents."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kogia.checkpoint.hf import load_config, load_model
from kogia.config import from_dict
from kogia.data.config import DataConfig, SourceConfig
from kogia.log import read_metrics
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from kogia.train.checks import plan_run
from kogia.train.config import OptimConfig, SupervisedConfig
from kogia.train.context import extended_config
from kogia.train.supervised import main

MLA = MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
MODEL = ModelConfig(
    vocab_size=280, dim=32, num_layers=2, ffn_dim=48, attention=MLA, max_position=32,
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=16),
)  # fmt: skip
YARN = YarnConfig(factor=4.0, original_max_position=32)


@pytest.fixture
def short(tmp_path) -> SupervisedConfig:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": f"{i % 17} and {i % 7}, " * 20} for i in range(120)]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig((SourceConfig(str(corpus)),), batch_tokens=256, max_seqlen=32)
    optim = OptimConfig(lr=4e-3, warmup_steps=2)
    return SupervisedConfig(
        str(tmp_path / "short"), model=MODEL, data=data, optim=optim, steps=20, threads=1, quiet=True
    )


def test_two_phases_make_the_context_longer_and_the_second_goes_on_with_the_first(short, tmp_path):
    main(short)
    first = replace(
        short, out=str(tmp_path / "first"), model=None, init=short.out, extend_context=YARN, steps=4,
        data=replace(short.data, max_seqlen=64),
    )  # fmt: skip
    main(first)
    config = load_config(first.out)
    assert (config.max_position, config.attention.rope_scaling) == (128, YARN)
    second = replace(first, out=str(tmp_path / "second"), init=first.out, extend_context=None,
                     data=replace(short.data, max_seqlen=128))  # fmt: skip
    main(second)
    assert load_config(second.out) == config
    assert len([m for m in read_metrics(tmp_path / "second") if "loss" in m]) == 4


def test_a_stopped_extension_is_resumed_to_the_same_weights(short, tmp_path):
    main(short)
    whole = replace(short, out=str(tmp_path / "whole"), model=None, init=short.out, extend_context=YARN, steps=6,
                    save_every=3, keep_checkpoints=5, data=replace(short.data, max_seqlen=64))  # fmt: skip
    main(whole)
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    main(stopped)
    newest = max((tmp_path / "stopped" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    main(replace(stopped, resume=True))
    ours, theirs = load_model(stopped.out).state_dict(), load_model(whole.out).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("attention", [MLA, GQAConfig(num_heads=2, num_kv_heads=1, head_dim=16)])
def test_only_positions_change(attention):
    model = replace(MODEL, attention=attention)
    extended = extended_config(model, YARN)
    assert extended == replace(model, max_position=128, attention=replace(attention, rope_scaling=YARN))


@pytest.mark.parametrize(
    ("model", "yarn", "words"),
    [
        (replace(MODEL, attention=replace(MLA, rope_scaling=YARN)), YARN, "stretched already, by yarn to 32"),
        (MODEL, replace(YARN, original_max_position=64), "original_max_position = 64"),
        (MODEL, replace(YARN, factor=1.0), "factor = 1: 32 positions"),
        (replace(MODEL, max_position=256), YARN, "factor = 4: 128 positions, and the model of init has 256"),
    ],
)
def test_what_would_not_lengthen_a_context_is_refused(model, yarn, words):
    with pytest.raises(ValueError, match=words):
        extended_config(model, yarn)


def test_it_is_for_a_model_that_is_there_and_says_so_before_any_work(short):
    with pytest.raises(ValueError, match="extend_context is for the model of `init`"):
        plan_run(replace(short, extend_context=YARN))


def test_the_recipes_of_the_page_are_recipes():
    page = (Path(__file__).parents[2] / "docs" / "long-context.md").read_text()
    recipes = [tomllib.loads(block.split("```")[0]) for block in page.split("```toml\n")[1:]]
    first, second = (from_dict(SupervisedConfig, recipe) for recipe in recipes)
    assert first.out == second.init and second.extend_context is None
    assert extended_config(replace(MODEL, max_position=2048), first.extend_context).max_position == second.data.longest
