"""Activation-aware rounding: folding changes no logit, the search lowers the error it says it lowers."""

import re
from dataclasses import replace

import pytest
import torch
from checkpoint.tiny import DENSE, GROUPS, assert_same, stored, tiny

from kogia.checkpoint.convert import convert
from kogia.checkpoint.folds import Fold, channels_of, scales, search_folds
from kogia.checkpoint.hf import load_model, save_model
from kogia.checkpoint.layout import disk_weights
from kogia.inference.calibrate import measure_moments
from kogia.model.config import GQAConfig, IndexerConfig, ModelConfig
from kogia.model.packed import pack
from kogia.model.transformer import Transformer
from kogia.ops.packed import FORMATS

BIASED = replace(
    DENSE, vocab_size=50, dim=64, ffn_dim=96,
    attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True),
)  # fmt: skip
SPARSE = replace(
    GROUPS, attention=replace(GROUPS.attention, indexer=IndexerConfig(num_heads=2, head_dim=16, topk=4)), moe=None
)
CONFIGS = {
    "latent, experts": GROUPS,
    "plain queries": replace(GROUPS, attention=replace(GROUPS.attention, q_lora_rank=None)),
    "grouped, biased": BIASED,
    "indexer": SPARSE,
    "tied": replace(GROUPS, tie_embeddings=True, num_mtp_layers=0),
}
BATCHES = [pack([[i, *range(1, 40, i)] for i in range(1, 5)]), pack([list(range(2, 47, 3))])]


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


def uneven(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose channels differ in size by far, as those of trained models do."""
    model = tiny(config, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.randn(parameter.shape, generator=generator).mul(1.5).exp())
            elif name.endswith(".bias"):
                parameter.normal_(generator=generator)
            elif ".mlp." in name and "up_proj" in name:
                parameter.mul_(torch.randn(parameter.shape[-2], 1, generator=generator).exp())
    return model.eval()


def random_folds(config: ModelConfig) -> dict[str, Fold]:
    """As the search folds, but with random powers of two everywhere."""
    from kogia.checkpoint import folds as module

    found: dict[str, Fold] = {}
    widths = {name: value.shape[-1] for name, value in disk_weights(tiny(config))}
    generator = torch.Generator().manual_seed(2)
    for channels in channels_of(config):
        count = widths[channels.readers[0]] if channels.shared is None else int(channels.shared.max()) + 1
        module._fold(found, channels, torch.exp2(torch.randint(-3, 4, (count,), generator=generator).float()))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folding_changes_the_weights_and_no_logit(config, dtype, tmp_path):
    source = save_model(uneven(config, getattr(torch, dtype)), tmp_path / "source")
    folds = random_folds(config)
    target = convert(source, tmp_path / "target", folds=folds)
    before, after = load_model(source), load_model(target)
    changed = {name for name, tensor in stored(target).items() if not torch.equal(tensor, stored(source)[name])}
    assert changed == set(folds)
    with torch.no_grad():
        for batch in BATCHES:
            hidden = before(batch), after(batch)
            torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=0)
            torch.testing.assert_close(after.logits(hidden[1]), before.logits(hidden[0]), rtol=0, atol=0)
            if config.num_mtp_layers:
                args = hidden[0], batch.token_ids.roll(-1), before.step(batch)
                deeper = before.mtp_hidden(0, *args)
                torch.testing.assert_close(after.mtp_logits(0, deeper), before.mtp_logits(0, deeper), rtol=0, atol=0)


def test_moments_are_the_mean_squares_of_what_each_weight_is_given(config):
    model = uneven(config)
    moments = measure_moments(model, iter(BATCHES))
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0]))
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "kv_b_proj", "v_proj", "lm_head", "shared_experts.down_proj", "mlp.experts"))
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model.logits(model(batch))
    for handle in handles:
        handle.remove()
    assert seen
    if config.tie_embeddings:
        assert "lm_head.weight" not in moments  # nothing is stored, or rounded
        del seen["lm_head"]
    for name, inputs in seen.items():
        want = torch.cat(inputs).double().square().mean(0).float()
        names = (
            [f"{name}.1.{part}_proj.weight" for part in ("gate", "up")]
            if "experts" in name[-8:]
            else [f"{name}.weight"]
        )
        for each in names:
            torch.testing.assert_close(moments[each].squares, want, rtol=1e-4, atol=1e-6)


def test_the_inputs_of_an_experts_last_matrix_are_those_of_its_tokens_alone():
    model = uneven(GROUPS)
    layer = next(m for m in model.modules() if type(m).__name__ == "MoE")
    found = []
    handle = layer.experts.register_forward_pre_hook(lambda m, inputs: found.append(inputs[:2]))
    moments = measure_moments(model, iter(BATCHES))
    handle.remove()
    x = torch.cat([x for x, _ in found])
    ids = torch.cat([ids for _, ids in found])
    for i in range(4):
        rows = x[(ids == i).any(-1)]
        gate, up = layer.experts.gate_up_proj.weight[i].detach()
        inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        name = f"model.layers.1.mlp.experts.{i}.down_proj.weight"
        if len(rows):
            torch.testing.assert_close(moments[name].squares, inner.square().mean(0), rtol=1e-4, atol=1e-6)
        else:
            assert name not in moments


def test_products_are_the_means_of_what_goes_together_and_experts_share_what_they_read():
    model, seen = uneven(GROUPS), {}
    handles = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0]))
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "mlp.experts"))
    ]
    moments = measure_moments(model, iter(BATCHES), products=True)
    for handle in handles:
        handle.remove()
    for name, inputs in seen.items():
        x, first = torch.cat(inputs).double(), f"{name}.0.gate_proj" if name.endswith("experts") else name
        moment = moments[f"{first}.weight"]
        torch.testing.assert_close(moment.products, (x.T @ x / len(x)).float(), rtol=1e-4, atol=1e-5)
        assert moment.num_rows == len(x)
    experts = [moments[f"model.layers.1.mlp.experts.{i}.{part}_proj.weight"] for i in (0, 3) for part in ("gate", "up")]
    assert len({id(each.products) for each in experts}) == 1
    assert all(moment.products is None for moment in measure_moments(model, iter(BATCHES)).values())


def test_products_that_memory_does_not_hold_are_done_without_and_it_is_said(monkeypatch, capsys):
    from kogia.inference import calibrate

    model = uneven(GROUPS)
    everything = measure_moments(model, iter(BATCHES), products=True)
    monkeypatch.setattr(calibrate, "MOST_PRODUCTS", 3 * GROUPS.dim**2)
    some = measure_moments(model, iter(BATCHES), products=True)
    said = capsys.readouterr().err
    read = {name for channels in channels_of(GROUPS) for name in channels.readers}
    missing = len([name for name in read if name not in some or some[name].products is None])
    assert missing == int(re.search(r"errors of (\d+) weights are not made up for", said)[1])
    held = {id(moment.products): moment.products for moment in some.values() if moment.products is not None}
    assert 0 < sum(each.numel() for each in held.values()) <= 3 * GROUPS.dim**2
    assert everything.keys() == some.keys()
    folds = search_folds(model, some, "int4")
    assert any(fold.spread is None for fold in folds.values()) and any(
        fold.spread is not None for fold in folds.values()
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_and_dead_channels_still_tell_how_to_make_up_for_errors(rows):
    from kogia.checkpoint import folds

    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)) * 1e6
    x[:, 5] = 0
    moment = folds.Moment(x.square().mean(0), x.T @ x / rows, rows)
    spread = folds._spread(moment, torch.exp2(torch.arange(64.0) % 5 - 2))
    assert spread is not None and bool(spread.isfinite().all())
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    packed = FORMATS["int4"].pack(weight, spread=spread)
    moved = packed.dense(torch.float32) - weight
    assert moved.norm() < 0.25 * weight.norm(), "what is hardly known moves nothing far"
    nothing = folds.Moment(torch.zeros(64), torch.zeros(64, 64), rows)
    spread = folds._spread(nothing, None)
    assert spread is not None
    torch.testing.assert_close(spread / spread[0, 0], torch.eye(64))


def error_of_int4(weight: torch.Tensor, moment, test: torch.Tensor, *, with_spread: bool) -> float:
    """Of what the rounded weight makes of other rows than those of the moment."""
    from kogia.checkpoint import folds

    spread = folds._spread(moment, None) if with_spread else None
    packed = FORMATS["int4"].pack(weight, importance=folds._known_importance(moment, None), spread=spread)
    return float(((packed.dense(torch.float32) - weight) @ test.T).square().mean())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0, 3.0])
def test_making_up_for_errors_helps_however_much_channels_differ(spread, seed):
    """Channels that carry little would be asked for more than codes of four bits hold."""
    from kogia.checkpoint.folds import Moment

    own = torch.Generator().manual_seed(seed)
    mixed, sizes = torch.randn(256, 256, generator=own), torch.exp(spread * torch.randn(256, generator=own))
    x, test = (torch.randn(4096, 256, generator=own) @ mixed * sizes for _ in range(2))
    moment = Moment(x.square().mean(0), x.T @ x / len(x), len(x))
    weight = torch.randn(64, 256, generator=own)
    errors = [error_of_int4(weight, moment, test, with_spread=each) for each in (False, True)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_an_expert_that_met_few_rows_is_rounded_about_as_well_as_without_a_text(rows):
    from kogia.checkpoint.folds import Moment

    own = torch.Generator().manual_seed(rows)
    gate, up = torch.randn(2, 64, 128, generator=own) / 8
    hidden, others = torch.randn(rows, 64, generator=own), torch.randn(4000, 64, generator=own)
    x, test = (torch.nn.functional.silu(each @ gate) * (each @ up) for each in (hidden, others))
    weight = torch.randn(256, 128, generator=own)
    plain = FORMATS["int4"].pack(weight).dense(torch.float32) - weight
    found = error_of_int4(weight, Moment(x.square().mean(0), x.T @ x / rows, rows), test, with_spread=True)
    assert found < 1.1 * float((plain @ test.T).square().mean())


def test_weights_that_read_the_same_share_its_products_and_modules_that_no_text_runs_through_take_none(config, capsys):
    model = uneven(config)
    moments = measure_moments(model, iter(BATCHES), products=True)
    for channels in channels_of(config):
        read = [moments[name] for name in channels.readers if name in moments]
        assert len(read) in (0, len(channels.readers)), "an expert's last matrix may have met nothing"
        assert len({id(each.products) for each in read}) <= 1 and len({each.num_rows for each in read}) <= 1
    assert not [name for name in moments if name.startswith(f"model.layers.{config.num_layers}.")]
    assert "not made up for" not in capsys.readouterr().err


def weighted_error(model: Transformer, moments, folds, format: str) -> float:
    """sum E[x_j^2] error_ij^2 over all weights that were met, in float64."""
    total = 0.0
    for name, weight in disk_weights(model):
        if name in moments and FORMATS[format].takes(tuple(weight.shape)):
            fold = folds.get(name, Fold())
            scaled = fold.of(weight.detach(), 0)
            options = {} if fold.importance is None else {"importance": fold.importance, "spread": fold.spread}
            back = FORMATS[format].pack(scaled, **options).dense(torch.float32)
            undone = Fold(*(None if each is None else 1 / each for each in (fold.rows, fold.columns)))
            error = (undone.of(back, 0) - weight).double()
            total += float(error.square().sum(0) @ moments[name].squares.double())
    return total


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_search_lowers_the_error_on_the_calibration_text(config, format):
    model = uneven(config)
    moments = measure_moments(model, iter(BATCHES))
    folds = search_folds(model, moments, format)
    assert folds
    plain, folded = (weighted_error(model, moments, each, format) for each in ({}, folds))
    assert folded < 0.95 * plain
    for fold in folds.values():
        for factor in (fold.rows, fold.columns):
            assert factor is None or bool((torch.frexp(factor).mantissa == 0.5).all())  # powers of two


def test_channels_that_an_indexer_reads_stay_as_they_are():
    readers = {name for channels in channels_of(SPARSE) for name in channels.readers}
    assert not any(part in name for name in readers for part in ("q_a_proj", "q_b_proj", "kv_a_proj"))
    assert any("kv_b_proj" in name for name in readers)


def test_scales_are_powers_of_two_about_1_and_leave_dead_channels_alone():
    moment = torch.tensor([4.0, 1.0, 0.25, 0.0, 1e30])
    assert scales(moment, 0.0).tolist() == [1.0] * 5
    assert scales(torch.tensor([4.0, 1.0, 0.25]), 1.0).tolist() == [2.0, 1.0, 0.5]
    assert scales(moment, 1.0)[3] == 1.0
    assert scales(moment, 1.0).max() == 256.0
    assert scales(torch.zeros(3), 1.0).tolist() == [1.0] * 3


def test_a_folded_and_rounded_checkpoint_is_what_rounding_the_folded_one_gives(tmp_path):
    model = uneven(GROUPS, torch.bfloat16)
    source = save_model(model, tmp_path / "source")
    moments = measure_moments(model, iter(BATCHES), products=True)
    folds = search_folds(load_model(source, dtype=torch.float32), moments, "int4")
    at_once = convert(source, tmp_path / "at-once", quantize="int4", folds=folds)
    folded = convert(source, tmp_path / "folded", folds=folds)
    importance = {name: replace(fold, rows=None, columns=None) for name, fold in folds.items()}
    again = convert(folded, tmp_path / "again", quantize="int4", folds=importance)
    assert_same(load_model(at_once, quantize="stored"), load_model(again, quantize="stored"))
