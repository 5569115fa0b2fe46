"""What other tools write into `config.json` means here what it means to them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kogia.checkpoint.hf import load_model, save_model

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

import parity  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("fields", ["V2", "V3", "V32"])
def test_the_norms_of_the_latents_do_not_follow_rms_norm_eps(tmp_path: Path, monkeypatch, fields: str, eps: float):
    case = getattr(parity, fields) | {"rms_norm_eps": eps}
    monkeypatch.setitem(parity.CASES[f"Deepseek{fields}"], "eps", case)
    theirs = parity.build_theirs(f"Deepseek{fields}", "eps", tmp_path)
    ours, want = load_model(tmp_path), parity.theirs_logits(theirs)
    assert ours.config.norm_eps == eps
    assert parity.relative_difference(parity.packed_logits(ours), want) <= parity.LIMIT
    assert parity.relative_difference(parity.cached_logits(ours), want) <= parity.LIMIT


@torch.no_grad()
def test_another_epsilon_of_the_latents_is_saved_under_our_own_name(tmp_path: Path):
    from checkpoint.tiny import CONFIG, tiny

    config = replace(CONFIG, attention=replace(CONFIG.attention, norm_eps=1e-3))
    save_model(tiny(config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kogia"
    assert load_model(tmp_path).config == config
    layer = load_model(tmp_path).model.layers[0].self_attn
    assert layer.q_a_layernorm.eps == layer.kv_a_layernorm.eps == 1e-3
