"""The GRPO loop with a real tiny model, engine and verification pool."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from rl.tiny import rl_settings
from safetensors.torch import load_file

from kogia.checkpoint.hf import load_model
from kogia.checkpoint.resume import latest_checkpoint, load_train_state
from kogia.config import from_dict, load_toml, save_toml
from kogia.engine.request import SamplingParams
from kogia.log import read_metrics
from kogia.model.costs import num_active_params, num_params
from kogia.model.packed import pack
from kogia.rl.config import PolicyLossConfig, RLConfig
from kogia.rl.grpo import Run, build_run, main, step, update
from kogia.rl.rollout import Rollout, collect, draw_problems
from kogia.text.tokenizer import Tokenizer
from kogia.train.config import OptimConfig

TIMINGS = {"seconds", "seconds_rollout", "seconds_train", "tokens_per_second"}
SGD_LIKE = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0, clip=0.0)


@pytest.fixture
def build(checkpoint, tmp_path):
    """build(**settings) -> Run, with its processes ended after the test."""
    with ExitStack() as stack:
        yield lambda name="run", **changes: build_run(rl_settings(checkpoint, tmp_path / name, **changes), stack)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.state.model.state_dict().items()}


def sampled(run: Run, problems: int = 4) -> Rollout:
    """The rollout of the run's first step."""
    c = run.config
    params = SamplingParams(
        temperature=c.temperature, max_tokens=c.max_tokens, n=c.group_size, seed=c.seed * 1_000_003, logprobs=True
    )
    rollout = collect(run.engine, run.tokenizer, draw_problems(run.sources, 0, problems, c.seed), params)
    return rollout


def gradients(run: Run) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in run.state.model.named_parameters() if p.grad is not None}


def reinforce(run: Run, rollout: Rollout, rewards: torch.Tensor, weight) -> dict[str, torch.Tensor]:
    """Gradient of -sum_i A_i w_i sum_t log pi(o_t), one sequence at a time, with the group's mean as baseline."""
    run.state.model.zero_grad(set_to_none=True)
    for p, group in enumerate(rollout.completions):
        correction = 1 if run.config.std == "sample" else 0
        baseline, deviation = float(rewards[p].mean()), float(rewards[p].std(correction=correction))
        for g, completion in enumerate(group):
            advantage = (
                (float(rewards[p, g]) - baseline) / (deviation + 1e-6)
                if run.config.normalize_std
                else (float(rewards[p, g]) - baseline)
            )
            ids = rollout.prompts[p] + completion.token_ids
            logits = run.state.model.logits(run.state.model(pack([ids]))) / run.config.temperature
            table = torch.log_softmax(logits, -1)
            start = len(rollout.prompts[p])
            total = sum(table[t - 1, ids[t]] for t in range(start, len(ids)))
            (-advantage * weight(len(completion.token_ids)) * total).backward()
    return gradients(run)


CASES = {
    "grpo": (PolicyLossConfig(aggregate="sequence"), {}, lambda n, total, count: 1 / n / count),
    "population": (
        PolicyLossConfig(aggregate="sequence"),
        {"std": "population"},
        lambda n, total, count: 1 / n / count,
    ),
    "token": (PolicyLossConfig(aggregate="token"), {}, lambda n, total, count: 1 / total),
    "dr_grpo": (
        PolicyLossConfig(aggregate="constant"),
        {"normalize_std": False},
        lambda n, total, count: 1 / 8 / count,
    ),
    "cispo": (PolicyLossConfig(objective="cispo"), {}, lambda n, total, count: 1 / total),
    "gspo": (
        PolicyLossConfig(ratio="sequence", aggregate="sequence", clip_low=3e-4, clip_high=4e-4),
        {},
        lambda n, total, count: 1 / n / count,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_gradient_is_that_of_reinforce_with_the_group_mean_as_baseline(build, case, temperature):
    loss, settings, weight = CASES[case]
    run = build(loss=loss, temperature=temperature, optim=SGD_LIKE, mtp_weight=0.0, **settings)
    run.config = replace(run.config, micro_batch_tokens=60)
    rollout = sampled(run)
    rewards = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    total, count = int(rollout.num_tokens.sum()), rewards.numel()
    expected = reinforce(run, rollout, rewards, lambda n: weight(n, total, count))
    metrics = update(run, rollout, rewards)
    found = gradients(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-6, msg=name)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["mismatch"] < 1e-4


def test_a_step_moves_the_weights_and_the_engine_samples_with_the_new_ones(build):
    run = build()
    before, params = weights_of(run), SamplingParams(max_tokens=8, n=4, seed=0, logprobs=True)
    prompt = sampled(run, 1).prompts[0]
    assert run.engine.generate([prompt], params)[0][0].num_cached_tokens > 0
    metrics = step(run)
    moved = {name for name, value in weights_of(run).items() if not torch.equal(value, before[name])}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"} <= moved
    assert run.engine.weights_version == 1
    assert run.state.step == 1
    completions = run.engine.generate([prompt], params)[0]
    assert {c.weights_version for c in completions} == {1}
    assert completions[0].num_cached_tokens == 0  # nothing of the old weights is left in the prefix cache
    with torch.no_grad():
        for c in completions:
            fresh = run.state.model.logprobs(pack([prompt + c.token_ids]))[len(prompt) :]
            torch.testing.assert_close(fresh, torch.tensor(c.logprobs), rtol=0, atol=1e-4)
    expected = {"reward", "accuracy", "completion_tokens", "truncated", "zero_variance_groups", "reward_accuracy"}
    expected |= {"loss", "entropy", "grad_norm", "lr", "tokens", "mismatch", "mtp_loss_1", "approx_kl", "max_vio"}
    assert expected | TIMINGS - {"seconds"} <= metrics.keys()
    assert metrics["status_ok"] == metrics["accuracy"]
    assert sum(v for k, v in metrics.items() if k.startswith("status_")) == pytest.approx(1.0)


def test_the_split_into_micro_batches_changes_nothing(build):
    results = []
    for name, budget in (("a", 1), ("b", 50), ("c", 100_000)):
        loss = PolicyLossConfig(aggregate="sequence", truncated="mask")
        run = build(name, micro_batch_tokens=budget, loss=loss, mtp_weight=0.5, balance_weight=0.1, optim=SGD_LIKE)
        metrics = update(run, rollout := sampled(run), rollout.rewards)
        results.append((gradients(run), metrics))
    for found, metrics in results[1:]:
        for name, value in results[0][0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)
        assert metrics["loss"] == pytest.approx(results[0][1]["loss"], rel=1e-4)
        assert metrics["tokens"] == results[0][1]["tokens"]


def test_groups_with_one_reward_are_dropped_from_loss_and_denominator_and_counted(build):
    run = build(mtp_weight=0.0, optim=SGD_LIKE)
    rollout = sampled(run)
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [-0.3, -0.3, -0.3, -0.3]])
    metrics = update(run, rollout, rewards)
    kept = [0, 2]
    assert metrics["tokens"] == int(rollout.num_tokens[kept].sum())
    dropped = gradients(run)

    keeping = build("keeping", mtp_weight=0.0, optim=SGD_LIKE, drop_zero_variance=False)
    metrics = update(keeping, rollout, rewards)
    total = int(rollout.num_tokens.sum())
    assert metrics["tokens"] == total
    share = int(rollout.num_tokens[kept].sum()) / total  # the same direction, diluted by the flat groups
    for name, value in gradients(keeping).items():
        torch.testing.assert_close(value, dropped.get(name, torch.zeros(1)) * share, rtol=2e-3, atol=2e-6, msg=name)


def test_a_step_without_any_contrast_is_skipped_with_the_weights_unchanged(checkpoint, tmp_path):
    main(rl_settings(checkpoint, tmp_path / "run", tasks=("toy_task:Hopeless",), steps=2))
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [1.0, 1.0]
    assert [line["zero_variance_groups"] for line in lines] == [1.0, 1.0]
    assert all(line["reward"] == pytest.approx(-0.3) and line["status_wrong"] == 1.0 for line in lines)
    before, after = load_model(checkpoint).state_dict(), load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    values = load_train_state(latest_checkpoint(tmp_path / "run")).values
    assert (values["rollouts"], values["updates"]) == (2, 0)


def test_masked_truncated_samples_do_not_train(build):
    run = build(max_tokens=1, loss=PolicyLossConfig(truncated="mask"), mtp_weight=0.0)
    rollout = sampled(run)
    rewards = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    metrics = update(run, rollout, rewards)
    assert 0 < metrics["tokens"] == int((~rollout.truncated).sum()) < 16
    # all cut off: nothing to update
    for group in rollout.completions:
        for index, completion in enumerate(group):
            group[index] = replace(completion, finish_reason="length")
    before = weights_of(run)
    assert update(run, rollout, rewards) == {"skipped_updates": 1.0}
    assert all(torch.equal(value, before[name]) for name, value in weights_of(run).items())


@pytest.mark.parametrize("how", ["permute", "bernoulli"])
def test_random_rewards_train_on_noise_while_the_log_keeps_the_truth(build, how):
    truth, noise = build("truth"), build("noise", random_reward=how)
    a, b = step(truth), step(noise)
    for name in ("accuracy", "status_ok", "reward_accuracy", "completion_tokens", "truncated"):
        assert a[name] == b[name]  # the same samples
    if how == "permute":
        assert b["reward"] == pytest.approx(a["reward"])
        assert b["zero_variance_groups"] == a["zero_variance_groups"]
    assert not torch.equal(truth.state.model.lm_head.weight, noise.state.model.lm_head.weight)
    again = build("again", random_reward=how)
    step(again)
    assert torch.equal(again.state.model.lm_head.weight, noise.state.model.lm_head.weight)


def test_the_reference_stays_the_start_or_follows_every_few_steps(build):
    fixed = build("fixed", loss=PolicyLossConfig(kl_coef=0.1))
    start = weights_of(fixed)
    lines = [step(fixed)]
    fixed.rollouts = 1
    lines.append(step(fixed))
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[1]["kl"] > 1e-4
    assert all(torch.equal(value, start[name]) for name, value in fixed.reference.state_dict().items())

    moving = build("moving", loss=PolicyLossConfig(kl_coef=0.1), reference_every=2)
    for number in range(3):
        moving.rollouts = number
        metrics = step(moving)
        follows = all(torch.equal(v, weights_of(moving)[name]) for name, v in moving.reference.state_dict().items())
        assert follows == (number == 1)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)  # step 3 began where the reference was taken


def test_two_updates_of_one_rollout_take_disjoint_prompts_and_ratios_to_the_policy_that_sampled(build):
    run = build(updates_per_rollout=2, mtp_weight=0.0, loss=PolicyLossConfig(aggregate="token"))
    rollout = sampled(run)
    rewards = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    metrics = update(run, rollout, rewards)
    assert run.state.step == 2
    assert metrics["tokens"] == int(rollout.num_tokens.sum()) / 2
    assert metrics["mismatch"] < 1e-4  # of the first update: the second one is off-policy by intent

    # the same by hand: the first half on-policy, the second with the first one's weights against the old ones
    single = build("single", mtp_weight=0.0)
    halves = [[0, 2], [1, 3]]
    old = [c.logprobs for p in halves[1] for c in rollout.completions[p]]
    parts = [
        replace(
            rollout,
            **{f: [getattr(rollout, f)[p] for p in half] for f in ("problems", "prompts", "completions", "verdicts")},
        )
        for half in halves
    ]
    update(single, parts[0], rewards[halves[0]])
    sequences = [
        p + c.token_ids for p, group in zip(parts[1].prompts, parts[1].completions, strict=True) for c in group
    ]
    with torch.no_grad():
        new = single.state.model.logprobs(batch := pack(sequences))
    ends = batch.segments.cu_seqlens[1:].tolist()
    ratios = [(new[end - len(o) : end] - torch.tensor(o)).exp() for end, o in zip(ends, old, strict=True)]
    mean_ratio = float(torch.cat(ratios).mean())
    assert abs(mean_ratio - 1) > 1e-3
    assert metrics["ratio"] == pytest.approx((1 + mean_ratio) / 2, rel=1e-4)
    assert metrics["approx_kl"] > 1e-4


def test_the_mtp_loss_moves_its_module_and_what_it_shares_only(build):
    def after(name, **settings):
        run = build(name, optim=SGD_LIKE, **settings)
        rollout = sampled(run)
        metrics = update(run, rollout, torch.tensor([[1.0, 0, 0, 0]] * 4))
        return gradients(run), metrics

    with_mtp, metrics = after("with", mtp_weight=0.5)
    without, bare = after("without", mtp_weight=0.0)
    assert "mtp_loss_1" in metrics
    assert "mtp_loss_1" not in bare
    changed = {
        name for name in with_mtp if name not in without or not torch.allclose(with_mtp[name], without[name], atol=1e-8)
    }
    module = {name for name in with_mtp if name.startswith("model.layers.2.")}
    assert len(module) > 5
    assert not module & without.keys()
    assert changed == module | {"lm_head.weight", "model.embed_tokens.weight"}


def test_speculative_rollouts_train_alike_and_report_their_acceptance(build):
    plain = build("plain")
    drafting = build("drafting", engine=replace(plain.config.engine, num_draft_tokens=1))
    a, b = step(plain), step(drafting)
    assert 0.0 <= b["mtp_acceptance"] <= 1.0
    assert "mtp_acceptance" not in a
    assert b["mismatch"] < 1e-4
    assert b["completion_tokens"] == pytest.approx(a["completion_tokens"], rel=0.5)


# Runs --------------------------------------------------------------------------------------------------------------


def start(config: RLConfig, directory: Path) -> subprocess.Popen:
    save_toml(config, directory / "recipe.toml")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "kogia.cli", "rl", str(directory / "recipe.toml")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def checkpoint_contents(path: Path) -> dict[str, object]:
    tensors = {}
    for file in path.rglob("*.safetensors"):
        tensors |= {f"{file.name}:{name}": value for name, value in load_file(file).items()}
    values = {str(f.relative_to(path)): json.loads(f.read_text()) for f in path.rglob("*.json")}
    del values["train_state/state.json"]["random"]["python"]  # the type checker of the test run draws from it
    return tensors | values


def assert_same_run(a: Path, b: Path) -> None:
    first, second = (checkpoint_contents(latest_checkpoint(run)) for run in (a, b))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name
    lines = [[{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run)] for run in (a, b)]
    assert lines[0] == lines[1]
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def test_a_run_killed_in_the_middle_and_resumed_equals_one_that_never_stopped_to_the_bit(checkpoint, tmp_path):
    config = rl_settings(
        checkpoint,
        tmp_path / "run",
        tasks=("toy_task:Checksum", "toy_task:Brief"),
        steps=24,
        save_every=6,
        updates_per_rollout=2,
        loss=PolicyLossConfig(kl_coef=0.05),
        reference_every=4,
        signal_check=True,
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=3, weight_decay=0.0),
    )
    process = start(config, tmp_path)
    wait_for((tmp_path / "run" / "checkpoints" / "step-000006").exists, process)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 11, process)  # beyond the group written at step 11
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "run")) < 24
    process = start(replace(config, resume=True), tmp_path)
    messages = process.communicate(timeout=100)[1]
    assert process.returncode == 0, messages
    assert "resuming" in messages
    assert "signal check" not in messages
    main(replace(config, out=str(tmp_path / "whole")))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("resume", [True, False])
def test_a_kill_before_the_first_checkpoint_leaves_nothing_of_the_first_start(checkpoint, tmp_path, resume):
    config = rl_settings(checkpoint, tmp_path / "run", steps=4000)
    process = start(config, tmp_path)
    wait_for(lambda: (tmp_path / "run" / "samples.jsonl").exists(), process)
    if resume:
        wait_for(lambda: read_metrics(tmp_path / "run"), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if not resume:
        (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)  # as if killed between the two files
    main(replace(config, steps=2, resume=resume))
    main(replace(config, steps=2, out=str(tmp_path / "whole")))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("tail", [b'{"step": 1, "text": "{1}', b"\xff\xfe", b'{"step": 1, "text": {}}'])
def test_torn_lines_of_either_log_do_not_keep_a_run_from_going_on(checkpoint, tmp_path, tail, capsys):
    for out in ("whole", "run"):
        main(rl_settings(checkpoint, tmp_path / out, steps=2))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "run" / name).open("ab") as file:
            file.write(tail.replace(b'"step": 1', b'"step": 12'))
    for out in ("whole", "run"):
        main(rl_settings(checkpoint, tmp_path / out, steps=3, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    damaged = capsys.readouterr().err.count("torn or damaged lines")
    assert damaged == (0 if tail.endswith(b"}}") else 2)


def test_a_run_directory_deleted_while_it_trains_ends_the_run_with_one_line(checkpoint, tmp_path):
    process = start(rl_settings(checkpoint, tmp_path / "run", steps=4000), tmp_path)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 2, process)
    (tmp_path / "run").rename(tmp_path / "moved")
    messages = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "kogia: error: " in messages
    assert str(tmp_path / "run") in messages
    assert "Traceback" not in messages
    assert not (tmp_path / "run").exists()


def test_equal_runs_have_equal_random_states_whatever_was_drawn_before(build):
    states = []
    for name, drawn in (("a", 1), ("b", 2), ("other", 1)):
        random.seed(drawn)
        torch.manual_seed(drawn)
        np.random.seed(drawn)
        build(name, seed=1 if name == "other" else 0)
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()))
    assert states[0] == states[1]
    assert states[0] != states[2]


def test_ctrl_c_saves_the_step_exits_130_and_the_run_continues_exactly(checkpoint, tmp_path):
    config = rl_settings(checkpoint, tmp_path / "run", steps=4000)
    process = start(config, tmp_path)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "--resume continues" in messages
    assert "Traceback" not in messages
    done = read_metrics(tmp_path / "run")[-1]["step"]
    assert latest_checkpoint(tmp_path / "run").name == f"step-{done:06d}"
    for out, resume in (("whole", False), ("run", True)):
        main(replace(config, out=str(tmp_path / out), steps=done + 2, resume=resume))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("killed_at", [2, 4])
def test_an_evaluation_is_of_a_checkpoint_and_one_that_a_kill_prevented_is_done_on_resume(
    checkpoint, tmp_path, killed_at
):
    changes = {"steps": 4, "eval_every": 2, "eval_questions": 3, "eval_samples": 2, "keep_checkpoints": 9}
    main(rl_settings(checkpoint, tmp_path / "whole", **changes))
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "eval_checksum" in line] == [2, 4]
    before = [line for line in lines if line["step"] <= killed_at and line != {2: lines[2], 4: lines[-1]}[killed_at]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    (run / "evals" / f"checksum-{killed_at:06d}.json").unlink()
    if killed_at == 2:
        shutil.rmtree(run / "checkpoints" / "step-000004")
    main(rl_settings(checkpoint, run, **changes, resume=True))
    assert_same_run(tmp_path / "whole", run)
    for out, number in itertools.product(("whole", "run"), (2, 4)):
        summary = json.loads((tmp_path / out / "evals" / f"checksum-{number:06d}.json").read_text())
        resumed = out == "run" and number >= killed_at
        name = f"{'run' if resumed else 'whole'}/checkpoints/step-{number:06d}"
        assert summary["checkpoint"] == str(tmp_path / name)


def test_a_run_leaves_a_complete_directory_that_loads_everywhere(checkpoint, tmp_path):
    config = rl_settings(checkpoint, tmp_path / "run", steps=3, save_every=1, signal_check=True)
    main(config)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "run.toml",
        "metrics.jsonl",
        "signal.json",
        "samples.jsonl",
        "checkpoints",
    }
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000003"]
    assert load_toml(run / "run.toml", RLConfig) == config
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == config.group_size
    assert len({row["problem_id"] for row in rows}) == 1
    assert load_model(run).config == load_model(checkpoint).config
    main(replace(config, resume=True))  # complete: nothing to do
    assert len(read_metrics(run)) == 3
    with pytest.raises(ValueError, match="already holds a run up to step-000003"):
        main(config)


def test_a_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    config = rl_settings(checkpoint, tmp_path / "run", dry_run=True)
    main(config)
    text = capsys.readouterr().out
    assert from_dict(RLConfig, tomllib.loads(text)) == config
    model = load_model(checkpoint).config
    assert f"# parameters  {num_params(model):,} ({num_active_params(model):,} active" in text
    assert "# rollout     16 samples a step, up to 128 tokens" in text
    assert not (tmp_path / "run").exists()


def test_a_toy_task_is_learned_and_a_random_reward_teaches_nothing(checkpoint, tmp_path):
    config = rl_settings(
        checkpoint, tmp_path / "run", tasks=("toy_task:Brief",), steps=30, prompts_per_step=8, group_size=8
    )
    config = replace(config, optim=replace(SGD_LIKE, lr=3e-3))
    main(config)
    main(replace(config, out=str(tmp_path / "control"), random_reward="permute"))
    for out, low, high in (("run", 0.85, 1.0), ("control", 0.2, 0.7)):
        accuracy = [line["accuracy"] for line in read_metrics(tmp_path / out)]
        assert fmean(accuracy[:3]) < 0.6
        assert low <= fmean(accuracy[-5:]) <= high, accuracy


@pytest.mark.parametrize("settings", [{}, {"eval_questions": 0}])
def test_a_prompt_beyond_the_context_is_named_before_the_first_step(checkpoint, tmp_path, settings):
    split = "test" if not settings else "train"
    with pytest.raises(ValueError, match=rf"problem '{split}/\d+': .*the first of 3 in 12 .*long_prompts = 'skip'"):
        main(rl_settings(checkpoint, tmp_path / "run", tasks=("toy_task:Wordy",), **{"eval_questions": 12} | settings))


def test_prompts_beyond_the_context_are_left_out_if_asked(build, capsys):
    run = build(tasks=("toy_task:Wordy",), long_prompts="skip", eval_questions=12)
    assert [problem.id for problem in run.sources[0].problems] == [f"train/{i}" for i in range(12) if i % 4 != 3]
    assert capsys.readouterr().err.count("the first of 3 in 12 problems; left out") == 2  # to train, and to measure on
    assert step(run)["tokens_per_second"] > 0


@pytest.mark.parametrize("thinking", [True, False])
def test_a_model_that_thinks_or_not_is_trained_and_measured_as_asked(hybrid, tmp_path, monkeypatch, thinking):
    rollouts = []

    def recorded(*args, **options):
        rollouts.append(collect(*args, **options))
        return rollouts[-1]

    monkeypatch.setattr("kogia.rl.grpo.collect", recorded)
    config = rl_settings(hybrid, tmp_path / "run", thinking=thinking, steps=1, signal_check=True, eval_questions=2)
    main(config)
    tag = "<think>" if thinking else "</think>"
    assert json.loads((tmp_path / "run" / "signal.json").read_text())["prompt"].endswith(f"<｜Assistant｜>{tag}")
    (evaluation,) = (tmp_path / "run" / "evals").glob("*.json")
    assert json.loads(evaluation.read_text())["sampling"]["thinking"] is thinking
    tokenizer = Tokenizer.load(hybrid)
    prompts = [tokenizer.decode(prompt) for prompt in rollouts[0].prompts]
    assert len(prompts) == config.prompts_per_step
    assert all(prompt.endswith(f"<｜Assistant｜>{tag}") for prompt in prompts)


def test_a_thinking_switch_that_is_not_there_is_said_before_a_run_is_made(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="thinking = True: this model's chat template has no such switch"):
        main(rl_settings(checkpoint, tmp_path / "run", thinking=True))
    assert not (tmp_path / "run").exists()
