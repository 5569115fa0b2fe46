"""The signal check on a real tiny model: what it measures, and when it refuses to go on."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from rl.tiny import rl_settings

from kogia.engine.request import SamplingParams
from kogia.model.transformer import build_model
from kogia.rl.grpo import Run, build_run, main, measure
from kogia.rl.rollout import collect, draw_problems
from kogia.rl.signal import max_logprob_difference, measure_signal
from kogia.text.chat import render_prompt


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def check(run: Run, **changes):
    config = replace(run.config, **changes)
    return measure_signal(run.state.model, run.engine, run.tokenizer, run.sources, config, run.out)


def test_its_samples_are_deterministic_unless_settings_say_no(checkpoint, tmp_path, stack, monkeypatch):
    seen = []

    def recorded(engine, *rest, **options):
        seen.append(engine.is_deterministic)
        return collect(engine, *rest, **options)

    monkeypatch.setattr("kogia.rl.signal.collect", recorded)
    run = build_run(rl_settings(checkpoint, tmp_path / "open", signal_prompts=8, signal_samples=5), stack)
    check(run)
    assert not run.engine.is_deterministic
    settings = rl_settings(checkpoint, tmp_path / "no", signal_prompts=8, signal_samples=5)
    check(build_run(replace(settings, engine=replace(settings.engine, deterministic=False)), stack))
    assert seen == [True, False]


def test_the_signal_is_what_the_samples_of_training_prompts_say(checkpoint, tmp_path, stack, capsys):
    run = build_run(rl_settings(checkpoint, tmp_path / "run", signal_prompts=8, signal_samples=5), stack)
    signal = check(run)
    assert json.loads((tmp_path / "run" / "signal.json").read_text()) == {
        name: getattr(signal, name) for name in signal.__dataclass_fields__
    }
    params = SamplingParams(max_tokens=8, n=5, seed=0, logprobs=True)
    drawn = draw_problems(run.sources, 0, 8, run.config.seed + 104_729)
    rollout = collect(run.engine, run.tokenizer, drawn, params)
    right = [[v.correct for v in group] for group in rollout.verdicts]
    assert (signal.prompts, signal.samples) == (8, 5)
    assert signal.pass_at_1 == pytest.approx(sum(map(sum, right)) / 40)
    assert signal.pass_at_n == pytest.approx(sum(map(any, right)) / 8)
    assert signal.informative_groups == pytest.approx(sum(0 < sum(group) < 5 for group in right) / 8)
    assert signal.mean_reward == pytest.approx(sum(v.reward for group in rollout.verdicts for v in group) / 40)
    cut = sum(c.finish_reason == "length" for group in rollout.completions for c in group)
    assert signal.truncated == pytest.approx(cut / 40)
    assert 0.0 < signal.max_logprob_difference < 1e-4
    assert run.tokenizer.encode(signal.prompt) == render_prompt(drawn[0][1].messages, run.tokenizer).token_ids
    shown = " ".join(capsys.readouterr().err.split())
    assert "signal check on 8 training prompts x 5 samples" in shown
    assert f"pass@1 {signal.pass_at_1:.1%}, pass@5 {signal.pass_at_n:.1%}" in shown
    assert f"one prompt: {signal.prompt!r}" in shown
    assert "many samples never stop: raise max_tokens" in shown


def test_an_engine_with_other_weights_than_the_trainer_stops_the_run(checkpoint, tmp_path, stack):
    run = build_run(rl_settings(checkpoint, tmp_path / "run"), stack)
    weights = run.state.model.state_dict()
    run.state.model = build_model(run.state.model.config)
    run.state.model.load_state_dict(weights)
    assert check(run).max_logprob_difference < 1e-4  # a true copy agrees
    with torch.no_grad():
        run.engine.model.lm_head.weight[5] += 0.01
    with pytest.raises(ValueError, match=r"engine and trainer disagree: .* above logprob_tolerance = 1e-04.*float32"):
        check(run)
    assert json.loads((tmp_path / "run" / "signal.json").read_text())["max_logprob_difference"] > 1e-4
    assert check(run, logprob_tolerance=1.0).informative_groups > 0


def test_prefixes_cached_under_older_weights_are_caught(checkpoint, tmp_path, stack):
    run = build_run(rl_settings(checkpoint, tmp_path / "run"), stack)
    check(run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the trainer moves on and nobody tells the engine
        for name, parameter in run.state.model.named_parameters():
            if "self_attn" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    with pytest.raises(ValueError, match="engine and trainer disagree"):
        check(run)
    run.engine.update_weights(run.state.model)
    check(run)


def test_weights_that_are_not_finite_do_not_pass_for_agreement(checkpoint, tmp_path, stack):
    run = build_run(rl_settings(checkpoint, tmp_path / "run"), stack)
    rollout = collect(
        run.engine, run.tokenizer, draw_problems(run.sources, 0, 2, 0), SamplingParams(logprobs=True, max_tokens=4)
    )
    with torch.no_grad():
        run.state.model.lm_head.weight[5] = float("nan")
    difference = max_logprob_difference(run.state.model, rollout, 1.0)
    assert math.isnan(difference)


def test_without_one_informative_group_nothing_is_trained(checkpoint, tmp_path):
    config = rl_settings(checkpoint, tmp_path / "run", tasks=("toy_task:Hopeless",), signal_check=True)
    with pytest.raises(ValueError, match=r"no signal: in none of 6 groups of 6 .*pass@1 0.0%.*--no-signal-check"):
        main(config)
    assert json.loads((tmp_path / "run" / "signal.json").read_text())["mean_reward"] == pytest.approx(-0.3)
    assert not (tmp_path / "run" / "checkpoints").exists()
    main(replace(config, signal_check=False, steps=1))  # the directory is still free
    assert (tmp_path / "run" / "checkpoints" / "step-000001").exists()


def test_few_informative_groups_are_a_warning(checkpoint, tmp_path, stack, capsys):
    run = build_run(rl_settings(checkpoint, tmp_path / "run", signal_prompts=12, signal_samples=2, max_tokens=1), stack)
    signal = check(run)
    assert 0 < signal.informative_groups < 0.3
    assert "few groups mix right and wrong samples" in capsys.readouterr().err


def test_a_run_directory_that_is_deleted_while_the_signal_is_sampled_is_not_made_again(checkpoint, tmp_path, stack):
    run = build_run(rl_settings(checkpoint, tmp_path / "run"), stack)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run is gone, deleted"):
        check(run)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_deleted_before_an_evaluation_is_not_made_again(checkpoint, tmp_path, stack):
    run = build_run(rl_settings(checkpoint, tmp_path / "run", eval_questions=4), stack)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run.toml is gone, deleted"):
        measure(run)
    assert not (tmp_path / "run").exists()
