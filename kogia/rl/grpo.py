"""Group relative policy optimisation: the reinforcement-learning loop (DeepSeekMath section 4.1, DeepSeek-R1 2.2).

For every step: draw problems -> sample a group of completions each through the engine -> verify -> advantage of a
sample = its reward relative to its group -> one or more policy updates through the same `Transformer` -> the engine
takes the new weights. No critic, no reward model: rewards are rules.

A run directory holds run.toml, metrics.jsonl, signal.json, samples.jsonl (one group every few steps), checkpoints/ and
evals/. Problems and sampling are pure functions of (seed, step), so a resumed run continues to the bit.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kogia import log
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.open import Found, check_thinking_switch, find_model
from kogia.checkpoint.resume import ResumeState, load_train_state, restore_random, save_checkpoint, seed_random
from kogia.config import to_dict
from kogia.engine.engine import Engine
from kogia.engine.group import build_engine
from kogia.engine.limits import Longest, check_engine, longest_sequence
from kogia.engine.request import SamplingParams
from kogia.engine.threads import generation_threads
from kogia.eval.config import EvalConfig
from kogia.eval.run import evaluate
from kogia.eval.sample import choose_problems, fitting_problems, load_tasks
from kogia.model.costs import num_params
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer
from kogia.ops.cpu import pages
from kogia.plan.dry_run import Line, cache_memory, print_dry_run, training_memory
from kogia.rl.advantage import group_advantages, is_zero_variance, overlong_penalty, random_rewards
from kogia.rl.config import RLConfig
from kogia.rl.loss import PolicyBatch, aggregation_weights, policy_loss
from kogia.rl.rollout import ProblemSource, Rollout, collect, draw_problems, policy_batches
from kogia.rl.rollout_log import rollout_metrics, write_samples
from kogia.rl.signal import measure_signal
from kogia.sinks import check_sinks, open_sinks
from kogia.tasks.pool import VerifyPool
from kogia.tasks.task import Problem, Task
from kogia.text.tokenizer import Tokenizer
from kogia.train.checks import resuming_from
from kogia.train.guard import Guard, heed
from kogia.train.interrupt import GracefulStop
from kogia.train.loss import LossWeights, mtp_losses
from kogia.train.optim import build_optimizer
from kogia.train.precision import memory_settings, multiply_in, rounds_products
from kogia.train.rates import REINFORCING, rate_line, settle_rate
from kogia.train.run_dir import RECIPE, check_run_dir, hold_run_dir, open_run_dir, record_settings, was_measured
from kogia.train.step import Loss, TrainState, train_step

SAMPLES_FILE = "samples.jsonl"
SAMPLES_EVERY = 10  # steps between groups written to it


@dataclass
class Run:
    """All that one reinforcement-learning run is made of."""

    config: RLConfig
    out: Path
    tokenizer: Tokenizer
    state: TrainState
    engine: Engine
    sources: list[ProblemSource]
    guard: Guard
    reference: Transformer | None
    rollouts: int = 0
    """Rollouts done; `state.step` counts optimiser steps."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that can begin."""

    config: RLConfig
    """With a learning rate."""
    found: Found
    """The model that it begins with."""
    tasks: list[tuple[str, Task, list[Problem]]]
    """(spec, task, problems to train on)."""
    rate: Line


def main(config: RLConfig) -> None:
    """Run the stage to its end and say what came out. Raises as `run_stage`."""
    plan = plan_run(config)
    if config.dry_run:
        return print_plan(plan)
    run = run_planned(plan)
    log.conclude(log.last_figures(run.out), run.out, "kogia", "report", run.out)


def run_stage(config: RLConfig) -> Run:
    """Run the stage to its end. Raises KeyboardInterrupt, with everything saved, after SIGINT or SIGTERM."""
    return run_planned(plan_run(config))


def run_planned(plan: Plan) -> Run:
    """The same after the checks."""
    with ExitStack() as stack:
        run = build_planned(plan, stack)
        config = plan.config
        if run.rollouts >= config.steps and not owes_evaluation(run):
            log.info(f"{run.out} is complete: {run.rollouts} of {config.steps} steps are done")
            return run
        if config.signal_check and run.rollouts == 0:
            measure_signal(run.state.model, run.engine, run.tokenizer, run.sources, config, run.out)
        train(run)
        return run


def plan_run(config: RLConfig) -> Plan:
    """Raises ValueError for whatever of the settings would end the run later; loads and writes nothing."""
    check_sinks(config.sinks)
    checkpoint = check_run_dir(config)
    tasks = load_tasks(config.tasks, config.task_options)
    source = checkpoint or config.init
    check_thinking_switch(config.init, config.thinking)
    weights = not config.dry_run
    with resuming_from(checkpoint):
        found = find_model(source, device=config.device, dtype=config.dtype, quantize="none", weights=weights)
    share = config.engine.share(config.engines)
    check_engine(found.config, share, found.dtype)
    longest = longest_sequence(found.config, share, found.dtype)
    chosen = [(spec, task, _training_problems(task, found.tokenizer, longest, config)) for spec, task in tasks.items()]
    optim = settle_rate(config.optim, REINFORCING, found.config)
    rate = rate_line(config.optim, optim, REINFORCING, found.config)
    return Plan(replace(config, optim=optim), found, chosen, rate)


def build_run(config: RLConfig, stack: ExitStack) -> Run:
    """Everything in order: checks, tasks, directory, model, engine on the same weights, optimiser, resume."""
    return build_planned(plan_run(config), stack)


def build_planned(plan: Plan, stack: ExitStack) -> Run:
    """The rest of it after the checks."""
    config = plan.config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_random(config.seed)
    pages.keep_freed()
    out = Path(config.out)
    stack.enter_context(hold_run_dir(config))
    checkpoint = open_run_dir(config)
    model, tokenizer, _ = plan.found.open()
    log.info(f"learning rate: {plan.rate[1]}")
    sources = []
    for spec, task, problems in plan.tasks:
        pool = VerifyPool(
            spec, config.task_options.get(spec), workers=config.verify_workers, timeout=config.verify_timeout
        )
        sources.append(ProblemSource(task, problems, stack.enter_context(pool)))
    reference = load_model(config.init, device=model.device, dtype=model.dtype) if config.loss.kl_coef else None
    optimizer, guard = build_optimizer(model, config.optim), Guard(config.guard)
    multiply_in(config, model)
    state = TrainState(
        model,
        optimizer,
        config.optim,
        config.steps * config.updates_per_rollout,
        bias_update_speed=config.bias_update_speed,
        last_checkpoint=checkpoint,
        guard=guard,
        rounds_products=rounds_products(config),
    )
    engine = build_engine(model, tokenizer, config.engine, config.engines)
    run = Run(config, out, tokenizer, state, engine, sources, guard, reference)
    if checkpoint is not None:
        restore(run, checkpoint)
        record_settings(config)
    log.cut_back(out / SAMPLES_FILE, run.rollouts - 1)
    return run


def _training_problems(task: Task, tokenizer: Tokenizer, longest: Longest, config: RLConfig) -> list[Problem]:
    """The problems to train on; those to measure on are checked with them, or they would end the run when it is due."""
    if config.eval_questions:
        held_out = choose_problems(task, "test", config.eval_questions, EvalConfig.question_seed)
        fitting_problems(held_out, tokenizer, longest, config.long_prompts, config.thinking)
    problems = task.problems("train")
    if len(problems) == 0:
        raise ValueError(f"task {task.name!r} has no problem in its 'train' split: there is nothing to train on")
    return fitting_problems(problems, tokenizer, longest, config.long_prompts, config.thinking)


def train(run: Run) -> None:
    """The loop. Leaves a checkpoint of the last step in every way it can end but by an error."""
    config = run.config
    log.check_in_place(run.out / RECIPE)
    metric_log = log.MetricLog(
        run.out,
        total_steps=config.steps,
        description=run.out.name,
        quiet=config.quiet,
        resume_step=run.rollouts,
        sinks=open_sinks(config.sinks, run.out, to_dict(config), run.rollouts),
    )
    with metric_log, GracefulStop() as stop:
        if owes_evaluation(run):
            metric_log.log(run.rollouts, measure(run))
        while run.rollouts < config.steps:
            metric_log.log(run.rollouts + 1, step(run))
            run.rollouts += 1
            last, due, stopping = run.rollouts == config.steps, is_evaluation_due(run), stop.requested
            if last or due or stopping or (config.save_every and run.rollouts % config.save_every == 0):
                save(run)  # what is measured is what is saved, and has its name
            if due and not stopping:
                metric_log.log(run.rollouts, measure(run))
            if stopping and (due or not last):
                log.info(f"stopped after step {run.rollouts}, saved as {run.state.last_checkpoint}; --resume continues")
                raise KeyboardInterrupt


def is_evaluation_due(run: Run) -> bool:
    """Whether an evaluation belongs to the step that was just done."""
    config, step = run.config, run.rollouts
    due = step >= config.steps or (config.eval_every > 0 and step % config.eval_every == 0)
    return config.eval_questions > 0 and step > 0 and due


def owes_evaluation(run: Run) -> bool:
    """Whether it was due and not done, because the run was stopped or killed after the save."""
    return is_evaluation_due(run) and not was_measured(run.out, run.rollouts, "eval_")


def measure(run: Run) -> dict[str, float]:
    """pass@1 on held-out problems of every task, as metrics; files go to evals/."""
    config = run.config
    settings = EvalConfig(
        str(run.out),
        num_questions=config.eval_questions,
        num_samples=config.eval_samples,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        thinking=config.thinking,
        seed=config.seed,
        long_prompts=config.long_prompts,
    )
    results = {}
    for source in run.sources:
        log.check_in_place(run.out / RECIPE)  # the evaluation makes its directory
        name = f"{source.task.name}-{run.rollouts:06d}"
        where = {"checkpoint": str(run.state.last_checkpoint), "out": run.out / "evals"}
        result = evaluate(run.engine, run.tokenizer, source.task, source.pool, settings, name=name, **where)
        results[f"eval_{source.task.name}"] = result.summary["pass@1"][0]
    return results


def step(run: Run) -> dict[str, float]:
    """One rollout and the updates from it."""
    config, model = run.config, run.state.model
    start = time.perf_counter()
    drawn = draw_problems(run.sources, run.rollouts, config.prompts_per_step, config.seed)
    seed = config.seed * 1_000_003 + run.rollouts
    params = SamplingParams.of(config, n=config.group_size, seed=seed, logprobs=True)
    with generation_threads(config.threads, num_params(model.config)):
        rollout = collect(run.engine, run.tokenizer, drawn, params, thinking=config.thinking)
    sampled = time.perf_counter()
    rewards = shaped_rewards(rollout, config, run.rollouts)
    metrics = rollout_metrics(rollout, rewards)
    metrics |= update(run, rollout, rewards)
    run.engine.update_weights(model, run.rollouts + 1)
    if run.reference is not None and config.reference_every and (run.rollouts + 1) % config.reference_every == 0:
        run.reference.load_state_dict(model.state_dict())
    if run.rollouts % SAMPLES_EVERY == 0:
        write_samples(run.out / SAMPLES_FILE, run.rollouts, rollout, rewards)
    seconds = time.perf_counter() - start
    metrics["seconds_rollout"], metrics["seconds_train"] = sampled - start, start + seconds - sampled
    metrics["tokens_per_second"] = float(rollout.num_tokens.sum()) / seconds
    return metrics


def shaped_rewards(rollout: Rollout, config: RLConfig, rollouts: int) -> Tensor:
    """The verifiers' rewards, with the overlong penalty; or rewards without information for the control arm."""
    rewards = rollout.rewards
    if config.overlong_penalty:
        rewards = rewards + config.overlong_penalty * overlong_penalty(
            rollout.num_tokens, config.max_tokens, config.overlong_buffer
        )
    if config.random_reward is None:
        return rewards
    generator = torch.Generator().manual_seed(config.seed * 7_919 + rollouts)
    return random_rewards(rewards, config.random_reward, generator)


def update(run: Run, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
    """`updates_per_rollout` optimiser steps from one rollout, over disjoint sets of prompts."""
    config, state = run.config, run.state
    advantages = group_advantages(rewards, normalize_std=config.normalize_std, std=config.std)
    flat = is_zero_variance(rewards)
    prompts = [p for p in range(len(rewards)) if not (config.drop_zero_variance and flat[p])]
    # all parts are scored before the first update, or the ratios of the later ones would not know the rollout's policy
    parts = [
        build_batches(run, rollout, [(p, g) for p in chosen for g in range(config.group_size)], advantages)
        for chosen in (prompts[part :: config.updates_per_rollout] for part in range(config.updates_per_rollout))
    ]
    results: list[dict[str, float]] = []
    for batches, denominator in parts:
        if not denominator:
            continue  # every group is all right or all wrong: there is nothing to learn from this part
        per_loss_token = denominator / sum(batch.num_loss_tokens for batch in batches)
        per_token = denominator / sum(batch.tokens.num_tokens for batch in batches)
        loss_fn = partial(
            grpo_loss,
            config=config,
            weights=LossWeights(
                mtp=config.mtp_weight * per_loss_token,
                balance=config.balance_weight * per_token,
                indexer=config.indexer_weight * per_token,
            ),
        )
        results.append(train_step(state, batches, loss_fn, denominator=denominator))
        if run.guard.reason is not None:
            heed(run.guard, state, run.out, batches, results[-1], rollouts=run.rollouts)
    if not results:
        return {"skipped_updates": 1.0}
    # the gap between engine and trainer means something only before the first update changed the weights
    names = dict.fromkeys(name for found in results for name in found)  # a step that was left out says so
    return {name: sum(r.get(name, 0.0) for r in results) / len(results) for name in names} | {
        "mismatch": results[0]["mismatch"]
    }


def build_batches(
    run: Run, rollout: Rollout, rows: Sequence[tuple[int, int]], advantages: Tensor
) -> tuple[list[PolicyBatch], float]:
    """(micro-batches of the samples `rows`, the update's one denominator); ([], 0.0) when no token is left."""
    config, model = run.config, run.state.model
    if not rows:
        return [], 0.0
    lengths = torch.stack([rollout.num_tokens[row] for row in rows])
    truncated = torch.stack([rollout.truncated[row] for row in rows])
    weights, denominator = aggregation_weights(lengths, truncated, config.loss, config.max_tokens)
    if not denominator:
        return [], 0.0
    batches = [
        b.to(model.device) for b in policy_batches(rollout, rows, advantages, weights, config.micro_batch_tokens)
    ]
    batches = [b for b in batches if b.num_loss_tokens]
    with run.state.products():
        if config.updates_per_rollout > 1 or config.loss.rollout_is_cap is not None:
            batches = [replace(b, old_logprobs=scored(model, b, config.temperature)) for b in batches]
        if run.reference is not None:
            batches = [replace(b, reference_logprobs=scored(run.reference, b, config.temperature)) for b in batches]
    return batches, denominator


@torch.no_grad()
def scored(model: Transformer, batch: PolicyBatch, temperature: float) -> Tensor:
    """Log-probabilities of a batch under a model that is not being trained on it."""
    return model.logprobs(batch.tokens, temperature, batch.loss_rows)


def grpo_loss(model: Transformer, batch: PolicyBatch, *, config: RLConfig, weights: LossWeights) -> Loss:
    """Policy loss of a micro-batch, with the balance, indexer and multi-token-prediction losses where they are on.

    The weights are the configured ones times the update's denominator per token: after train_step's division these
    losses are means over tokens, whatever the aggregation of the policy loss and the split into micro-batches.
    "mismatch" is the largest difference between the trainer's and the engine's log-probabilities.
    """
    routing = Routing(losses=True)
    step = model.step(batch.tokens, routing=routing, recompute=config.recompute)
    hidden, rows = model(batch.tokens, step=step), batch.loss_rows
    logprobs, entropy = model.logprobs_from_hidden(hidden, batch.tokens, config.temperature, rows)
    total, metrics = policy_loss(logprobs, batch, config.loss, entropy)
    # the draft module follows the policy's own samples; detached, so that it does not steer the policy
    depths = model.config.num_mtp_layers if weights.mtp else 0
    for depth, mtp in enumerate(mtp_losses(model, hidden.detach(), batch.tokens, rows, step, depths)):
        total = total + weights.mtp / depths * mtp
        metrics[f"mtp_loss_{depth + 1}"] = mtp.detach()
    # the routers and indexers sum over all tokens, prompts included
    for weight, loss in ((weights.balance, routing.balance_loss()), (weights.indexer, routing.indexer_loss())):
        if weight and loss is not None:
            total = total + weight * loss
    mismatch = (logprobs.detach() - batch.behaviour_logprobs)[rows].abs().max()
    return Loss(total, metrics, routing.loads(len(model.routers())), maxima={"mismatch": mismatch})


def save(run: Run) -> None:
    """Write a checkpoint of the current step and remember it as the last good one."""
    state = run.state
    tensors = state.optimizer.tensors()
    if run.reference is not None:
        tensors |= {f"reference/{name}": tensor for name, tensor in run.reference.state_dict().items()}
    values = {"rollouts": run.rollouts, "updates": state.step, "guard": run.guard.values()}
    resume = ResumeState(values, tensors)
    state.last_checkpoint = save_checkpoint(
        run.out, run.rollouts, state.model, run.tokenizer, resume, keep=run.config.keep_checkpoints
    )


def restore(run: Run, checkpoint: Path) -> None:
    """Put step counts, optimiser, reference and random states back; the weights are already the checkpoint's."""
    resume = load_train_state(checkpoint)
    run.rollouts, run.state.step = resume.count("rollouts"), resume.count("updates")
    run.state.optimizer.load(resume.tensors)
    run.guard.restore(resume)
    if run.reference is not None:
        stored = {k.removeprefix("reference/"): v for k, v in resume.tensors.items() if k.startswith("reference/")}
        if stored.keys() != run.reference.state_dict().keys():
            raise ValueError(f"{checkpoint}: has no whole KL reference; resume with the run's own loss.kl_coef")
        run.reference.load_state_dict(stored)
    restore_random(resume)
    run.engine.update_weights(run.state.model, run.rollouts)
    log.info(f"resuming {checkpoint} at step {run.rollouts} of {run.config.steps}")


def print_plan(plan: Plan) -> None:
    """The resolved configuration, parameter count and memory estimate on stdout; writes and trains nothing."""
    config, model = plan.config, plan.found.config
    samples = config.prompts_per_step * config.group_size
    memory = training_memory(model, config.micro_batch_tokens, **memory_settings(config, config.optim))
    cache = cache_memory(config.engine.cache_memory_bytes)
    rollout = f"{samples:,} samples a step, up to {samples * config.max_tokens:,} tokens"
    print_dry_run(config, model, [memory, ("cache", cache), ("rollout", rollout), plan.rate])
