"""Towards sparse attention: the indexer learns to imitate dense attention, then the model runs on what it picks."""

import json
from dataclasses import replace

import pytest
import torch

from kogia.checkpoint.hf import load_config, load_model
from kogia.data.config import DataConfig, SourceConfig
from kogia.log import read_metrics
from kogia.model.config import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.costs import num_params
from kogia.train.config import OptimConfig, SupervisedConfig
from kogia.train.supervised import build_run, main

MLA = MLAConfig(num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
MOE = MoEConfig(num_experts=4, topk=2, expert_dim=16)
MODEL = ModelConfig(
    vocab_size=280, dim=32, num_layers=2, ffn_dim=48, attention=MLA, moe=MOE, num_mtp_layers=1, max_position=64
)
INDEXER = IndexerConfig(num_heads=2, head_dim=16, topk=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SupervisedConfig:
    """A run of dense attention that has ended."""
    folder = tmp_path_factory.mktemp("dense")
    corpus = folder / "corpus.jsonl"
    rows = [{"text": f"remember {i % 17}: " + f"{i % 17} and {i % 7}, " * 4 + f"so {i % 17}"} for i in range(400)]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig((SourceConfig(str(corpus)),), batch_tokens=512, max_seqlen=64, val_share=0.1)
    optim = OptimConfig(lr=4e-3, warmup_steps=2)
    config = SupervisedConfig(
        str(folder / "dense"), model=MODEL, data=data, optim=optim, steps=60, threads=1, quiet=True
    )
    main(config)
    return config


@pytest.fixture
def dense(trained, tmp_path) -> SupervisedConfig:
    """Its configuration, for another run."""
    return replace(trained, out=str(tmp_path / "dense"))


def test_warm_up_trains_the_indexer_alone_and_sparse_training_then_costs_little(trained, tmp_path):
    warm = replace(
        trained, out=str(tmp_path / "warm"), model=None, init=trained.out, add_indexer=INDEXER, index_topk=1000,
        train_only="indexer", steps=30, optim=OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.0),
    )  # fmt: skip
    main(warm)
    before, after = load_model(trained.out), load_model(warm.out)
    assert after.config.attention.indexer == INDEXER  # index_topk is of the run, not of the model
    old, new = before.state_dict(), after.state_dict()
    assert all(new[name].equal(tensor) for name, tensor in old.items())
    metrics = read_metrics(tmp_path / "warm")
    imitation = [m["indexer"] for m in metrics if "indexer" in m]
    assert imitation[-1] < 0.5 * imitation[0]
    # dense attention: the language-model loss is what it was
    dense_loss = [m["val_loss"] for m in read_metrics(trained.out) if "val_loss" in m][-1]
    sparse = replace(warm, out=str(tmp_path / "sparse"), init=warm.out, add_indexer=None, index_topk=None,
                     train_only="all", steps=20, optim=OptimConfig(lr=1e-3, warmup_steps=2))  # fmt: skip
    main(sparse)
    sparse_loss = [m["val_loss"] for m in read_metrics(tmp_path / "sparse") if "val_loss" in m][-1]
    assert sparse_loss < dense_loss + 0.05
    changed = load_model(sparse.out).state_dict()
    assert [n for n, t in new.items() if t.dtype.is_floating_point and t.ndim > 1 and changed[n].equal(t)] == []


def test_an_indexer_that_learnt_catches_more_attention_than_a_fresh_one(trained, tmp_path):
    """With few keys allowed, the trained indexer's choice hurts the loss less than a random indexer's."""
    fewer = replace(INDEXER, topk=6)
    losses = {}
    for steps in (1, 60):
        run = replace(
            trained, out=str(tmp_path / f"warm{steps}"), model=None, init=trained.out, add_indexer=fewer,
            index_topk=1000, train_only="indexer", steps=steps,
            optim=OptimConfig(lr=1e-2, warmup_steps=0, weight_decay=0.0),
        )  # fmt: skip
        main(run)
        built = build_run(replace(run, out=str(tmp_path / f"look{steps}"), init=run.out, add_indexer=None,
                                  index_topk=None))  # fmt: skip
        model = built.state.model
        with torch.no_grad():
            losses[steps] = sum(
                -model.logprobs_from_hidden(model(b.tokens), b.tokens, rows=b.loss_rows)[0].sum().item()
                for b in built.validation
            )
    assert losses[60] < losses[1]


def test_settings_of_the_indexer_need_a_model_that_has_one(dense, tmp_path):
    with pytest.raises(ValueError, match="add_indexer gives it one"):
        build_run(replace(dense, index_topk=4))
    with pytest.raises(ValueError, match="index_topk = 0: must be at least 1"):
        replace(dense, index_topk=0)
    with pytest.raises(ValueError, match="add_indexer is for the model of `init`"):
        main(replace(dense, add_indexer=INDEXER))
    students = replace(MODEL, attention=GQAConfig(), moe=None, num_mtp_layers=0)
    main(replace(dense, model=students, steps=1))
    with pytest.raises(ValueError, match="no latent attention"):
        build_run(replace(dense, out=str(tmp_path / "b"), model=None, init=dense.out, add_indexer=INDEXER))


def test_a_dry_run_counts_the_indexers_to_be_added(dense, tmp_path, capsys):
    main(replace(dense, steps=1))
    capsys.readouterr()
    main(replace(dense, out=str(tmp_path / "b"), model=None, init=dense.out, add_indexer=INDEXER, dry_run=True))
    want = replace(MODEL, vocab_size=load_config(dense.out).vocab_size, attention=replace(MLA, indexer=INDEXER))
    assert f"# parameters  {num_params(want):,} " in capsys.readouterr().out
