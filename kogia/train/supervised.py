"""The supervised loop: pretraining, context extension, cold-start and rejection-sampled SFT, distillation.

They differ in data and loss mask only. A run directory holds run.toml, metrics.jsonl, routing.jsonl, checkpoints/,
data/ (the tokens), and bad_steps/ where there were any. Each step: loader -> train_step -> metrics -> every N steps
save, then evaluate.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kogia import log
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.checkpoint.hf import load_model, read_stored
from kogia.checkpoint.open import pick_device
from kogia.checkpoint.resume import (
    AVERAGE,
    ResumeState,
    checkpoints,
    load_train_state,
    restore_random,
    save_checkpoint,
    seed_random,
)
from kogia.config import to_dict
from kogia.data.loader import Batch, Loader, LoaderState, validation_batches
from kogia.data.shards import Shard, build_shards
from kogia.data.sources import read_source
from kogia.files import replacing_directory
from kogia.model.config import ModelConfig
from kogia.model.costs import train_memory
from kogia.model.transformer import Transformer, build_model
from kogia.ops.cpu import pages
from kogia.ops.machine import free_memory, name_of
from kogia.plan.dry_run import Line, mib, print_dry_run, training_memory
from kogia.sinks import open_sinks
from kogia.text.chat import render_text
from kogia.text.tokenizer import Tokenizer, train_bpe
from kogia.train.average import Average
from kogia.train.checks import TRAINED, Plan, plan_run, tokenizer_directory
from kogia.train.config import SupervisedConfig
from kogia.train.forecast import Forecast, Step, forecast, trials
from kogia.train.guard import Guard, heed
from kogia.train.indexer import prepare_indexer, with_indexer
from kogia.train.interrupt import GracefulStop
from kogia.train.loss import LossWeights, balance_of, supervised_loss, validation_loss
from kogia.train.optim import build_optimizer
from kogia.train.precision import memory_settings, multiply_in, rounds_products
from kogia.train.routing_log import RoutingLog
from kogia.train.run_dir import RECIPE, hold_run_dir, open_run_dir, record_settings, was_measured
from kogia.train.schedule import Ramp
from kogia.train.speed import Speed, measured_speed
from kogia.train.step import LossFn, TrainState, train_step


@dataclass
class Run:
    """All that one supervised run is made of."""

    config: SupervisedConfig
    out: Path
    tokenizer: Tokenizer
    state: TrainState
    loader: Loader
    validation: list[Batch]
    guard: Guard
    routing: RoutingLog
    speed: Speed
    average: Average | None = None


def main(config: SupervisedConfig) -> None:
    """Run the stage to its end and say what came out. Raises as `run_stage`."""
    plan = plan_run(config)
    if config.dry_run:
        return print_plan(plan)
    run = run_planned(plan)
    words = ("chat", run.out) if config.init else ("generate", run.out, "--raw", "--prompt", "The")
    log.conclude(log.last_figures(run.out), run.out, "kogia", *words)


def run_stage(config: SupervisedConfig) -> Run:
    """Run the stage to its end. Raises KeyboardInterrupt, with everything saved, after SIGINT or SIGTERM."""
    return run_planned(plan_run(config))


def run_planned(plan: Plan) -> Run:
    """The same after the checks."""
    with hold_run_dir(plan.config):
        run = build_planned(plan)
        if run.state.step < run.state.num_steps or owes_validation(run):
            train(run)
        else:
            log.info(f"{run.out} is complete: {run.state.step} of {run.state.num_steps} steps are done")
        return run


def build_run(config: SupervisedConfig) -> Run:
    """Everything in order: checks, directory, tokenizer, tokens, model, optimiser, loader, resume."""
    return build_planned(plan_run(config))


def build_planned(plan: Plan) -> Run:
    """The rest of it after the checks."""
    config = plan.config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_random(config.seed)
    pages.keep_freed()
    device, out = pick_device(config.device), Path(config.out)
    checkpoint = open_run_dir(config)
    tokenizer = build_tokenizer(config, checkpoint)
    shards = build_shards(config.data, tokenizer, out / "data")
    model = _build_model(plan, tokenizer, checkpoint, device)
    prepare_indexer(model, config)
    optimizer = build_optimizer(model, config.optim)
    loader = _loader(config, shards["train"])
    ramp = batch_ramp(config)
    num_steps = config.steps or ramp.steps_for(
        (config.epochs or 0) * loader.tokens_per_epoch / config.data.batch_tokens
    )
    guard = Guard(config.guard)
    routing = RoutingLog(out, num_steps)
    average = Average(model, config.average_decay) if config.average_decay else None
    multiply_in(config, model)
    state = TrainState(
        model,
        optimizer,
        config.optim,
        num_steps,
        last_checkpoint=checkpoint,
        ramp=ramp,
        guard=guard,
        rounds_products=rounds_products(config),
    )
    speed = measured_speed(config, model.config, device)
    run = Run(config, out, tokenizer, state, loader, _validation(config, shards["val"]), guard, routing, speed, average)
    _describe(plan, shards, loader, num_steps, speed)
    if checkpoint is not None:
        restore(run, checkpoint)
        record_settings(config)
    return run


def train(run: Run) -> None:
    """The loop. Leaves a checkpoint of the last step in every way it can end but by an error.

    A step that the guard no longer passes over, or weights that cannot be saved, send the run back as often as
    `guard.rollbacks` says.
    """
    while True:
        try:
            return _go_on(run)
        except FloatingPointError as error:
            roll_back(run, error)


def _go_on(run: Run) -> None:
    config, state = run.config, run.state
    log.check_in_place(run.out / RECIPE)  # making the data takes long, and makes directories
    metric_log = log.MetricLog(
        run.out,
        total_steps=state.num_steps,
        description=run.out.name,
        quiet=config.quiet,
        resume_step=state.step,
        sinks=open_sinks(config.sinks, run.out, to_dict(config), state.step),
    )
    log.cut_back(run.routing.path, state.step)
    with metric_log, GracefulStop() as stop:
        if owes_validation(run):
            metric_log.log(state.step, validate(run))
        while state.step < state.num_steps:
            metrics = step(run)
            metric_log.log(state.step, metrics)
            last, due, stopping = state.step == state.num_steps, is_validation_due(run), stop.requested
            if last or stopping or is_save_due(run):
                save(run)
            if due and not stopping:
                metric_log.log(state.step, validate(run))
            if stopping and (due or not last):
                log.info(f"stopped after step {state.step}, saved as {state.last_checkpoint}; --resume continues")
                raise KeyboardInterrupt


def step(run: Run) -> dict[str, float]:
    """One optimiser step, and what it tells. Raises FloatingPointError where the guard passes over no more bad ones."""
    config, state = run.config, run.state
    start, position = time.perf_counter(), run.loader.state
    batches = [run.loader.next_batch() for _ in range(state.ramp.size(state.step))]
    lengths = np.concatenate([batch.tokens.segments.lengths for batch in batches])
    batches = [batch.to(state.model.device) for batch in batches]
    metrics = train_step(state, batches, loss_for_step(config, state, batches))
    if run.guard.reason is not None:
        heed(run.guard, state, run.out, batches, metrics, loader=asdict(position))
    else:
        run.routing.add(state.step, state.loads)
    if run.guard.reason is None and run.average is not None and state.done > config.average_from:
        run.average.update(state.model, list(state.optimizer.weights.values()))
    return metrics | run.speed.metrics(lengths, time.perf_counter() - start)


def roll_back(run: Run, error: FloatingPointError) -> None:
    """Go back to the last checkpoint that no bad step led to, but not in the data: on behind the bad steps.

    Raises `error` where the run may not go back, any more or at all.
    """
    state, guard = run.state, run.guard
    checkpoint = next(filter(was_good, reversed(checkpoints(run.out))), None)
    if guard.rollbacks >= run.config.guard.rollbacks or checkpoint is None:
        raise error
    position, rollbacks = run.loader.state, guard.rollbacks + 1
    log.warn(f"{error}")
    saved = load_model(read_stored(checkpoint), device=state.model.device, dtype=state.model.dtype)
    state.model.load_state_dict(saved.state_dict())
    restore(run, checkpoint)
    run.loader.state, guard.rollbacks = position, rollbacks
    log.warn(f"gone back to step {state.step}, on with other data: {rollbacks} of {run.config.guard.rollbacks} times")


def was_good(checkpoint: Path) -> bool:
    """Whether the step that it was saved after was none that the guard left out."""
    resume = load_train_state(checkpoint)
    return "guard" not in resume.values or resume.count("guard", "streak") == 0


def is_save_due(run: Run) -> bool:
    """Whether a checkpoint belongs to the step that was just done; none does to a bad one, which may lead back."""
    return _is_due(run.config.save_every, run.state.step) and not run.guard.streak


def is_validation_due(run: Run) -> bool:
    """Whether a validation loss belongs to the step that was just done."""
    step, last = run.state.step, run.state.step >= run.state.num_steps
    return bool(run.validation) and step > 0 and (last or _is_due(run.config.eval_every, step))


def owes_validation(run: Run) -> bool:
    """Whether it was due and not done, because the run was stopped or killed after the save."""
    return is_validation_due(run) and not was_measured(run.out, run.state.step, "val_loss")


def batch_ramp(config: SupervisedConfig) -> Ramp:
    return Ramp(config.micro_batches, config.micro_batches_first or config.micro_batches, config.ramp_steps)


def validate(run: Run) -> dict[str, float]:
    """Validation losses of the weights, and of their average."""
    losses = validation_loss(run.state.model, run.validation)
    if run.average is not None and run.average.count:
        averaged = validation_loss(run.average.model, run.validation)
        losses |= {f"{name}_average": value for name, value in averaged.items()}
    return losses


def loss_for_step(config: SupervisedConfig, state: TrainState, batches: Sequence[Batch]) -> LossFn[Batch]:
    """The loss function of the step on `batches`; also sets the step's bias speed. Both change late in a run."""
    moving = state.done < config.bias_freeze_at and config.train_only == "all"
    state.bias_update_speed = config.bias_update_speed if moving else 0.0
    mtp_weight = config.mtp_weight if state.done < config.mtp_late_at else config.mtp_weight_late
    share = sum(b.num_loss_tokens for b in batches) / sum(b.tokens.num_tokens for b in batches)
    weights = LossWeights(
        mtp_weight,
        config.balance_weight,
        config.indexer_weight,
        config.device_balance_weight,
        config.communication_balance_weight,
        balance_of(config, state.model.config),
        share,
    )
    return partial(supervised_loss, weights=weights, nested_rank_min=config.nested_rank_min, recompute=config.recompute)


def save(run: Run) -> None:
    """Write a checkpoint of the current step and remember it as the last good one."""
    state, average = run.state, run.average
    values: dict[str, Any] = {"loader": asdict(run.loader.state), "guard": run.guard.values()}
    if average is not None:
        values["average"] = average.count
    state.last_checkpoint = save_checkpoint(
        run.out,
        state.step,
        state.model,
        run.tokenizer,
        ResumeState(values, state.optimizer.tensors() | run.routing.tensors()),
        keep=run.config.keep_checkpoints,
        average=average.model if average is not None and average.count else None,
    )


def restore(run: Run, checkpoint: Path) -> None:
    """Put step, data position, optimiser and random states back; the weights are already the checkpoint's."""
    resume = load_train_state(checkpoint)
    run.state.step = resume.count("step")
    run.loader.state = LoaderState(resume.count("loader", "epoch"), resume.count("loader", "cursor"))
    run.state.optimizer.load(resume.tensors)
    run.guard.restore(resume)
    run.routing.restore(resume)
    if run.average is not None:
        count = resume.count("average") if "average" in resume.values else 0
        run.average.restore(checkpoint / AVERAGE, count)
    restore_random(resume)
    log.info(f"resuming {checkpoint} at step {run.state.step} of {run.state.num_steps}")


def build_tokenizer(config: SupervisedConfig, checkpoint: Path | None = None) -> Tokenizer:
    """The checkpoint's, else `tokenizer`, else that of `init`, else one trained on the first documents of each source.

    A trained one is kept in RUN/tokenizer, so that a run killed before its first checkpoint finds it again.
    """
    if directory := tokenizer_directory(config, checkpoint):
        return load_tokenizer(directory)
    assert config.model is not None, "check_complete has seen to it"
    tokenizer, trained = train_bpe(_tokenizer_texts(config), config.model.vocab_size), Path(config.out) / TRAINED
    with replacing_directory(trained) as draft:
        tokenizer.save(draft)
    log.info(f"trained a tokenizer of {tokenizer.vocab_size} tokens")
    return Tokenizer.load(trained)


def print_plan(plan: Plan) -> None:
    """The resolved configuration, parameter counts and memory estimate on stdout; writes and trains nothing."""
    config, per_step = plan.config, plan.config.data.batch_tokens * plan.config.micro_batches
    length = f"{config.epochs} epochs"
    if config.steps:
        num_tokens = batch_ramp(config).before(config.steps) * config.data.batch_tokens
        length = f"{config.steps:,} steps = {num_tokens:,} tokens"
    memory = training_memory(plan.model, config.data.batch_tokens, **_memory_settings(config))
    steps = ("length", f"{length}, up to {per_step:,} tokens per step")
    print_dry_run(config, plan.model, itertools.chain([memory, steps, plan.rate], _forecast_lines(plan)))


def _forecast_lines(plan: Plan) -> Iterator[Line]:
    """How long a step will take, and on a GPU how much memory, by steps of shallow models; or why that is not known."""
    config, device = plan.config, pick_device(plan.config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = _memory_settings(config)
    needed = max(train_memory(each, config.data.longest, **settings).total for each in trials(plan.model))
    if needed > (free := free_memory(device)):
        yield "speed", f"not measured: the shallowest models take about {mib(needed)}, and {mib(free)} are free"
        return
    try:
        found = forecast_step(config, plan.model, device)
    except torch.OutOfMemoryError:
        full = f"{config.data.batch_tokens:,} tokens at once do not fit into the {mib(free)} that are free"
        yield "speed", f"not measured: {full}; lower data.batch_tokens, or set recompute"
        return
    speed = measured_speed(config, plan.model, device)
    tokens = config.data.batch_tokens * config.micro_batches
    causal, full = speed.mfu(np.full(tokens // config.data.longest, config.data.longest), found.seconds)
    yield "speed", f"about {tokens / found.seconds:,.0f} tokens/s, {found.seconds:.3g} s a step of {tokens:,} tokens"
    yield "", f"MFU {causal:.1%} with causal attention, {full:.1%} with all of it, of {speed.peak_in_words}"
    if config.steps:
        hours = found.seconds * batch_ramp(config).before(config.steps) / config.micro_batches / 3600
        yield "", f"{hours:.2g} hours for all steps, beside data, validation and checkpoints"
    if found.memory is not None:
        yield "", f"at the peak about {mib(found.memory)} of the {mib(free)} that are free on {name_of(device)}"
    if found.tokens < config.data.batch_tokens:
        yield "", f"by steps of {found.tokens:,} tokens, because those of a whole batch take long"


def forecast_step(config: SupervisedConfig, model: ModelConfig, device: torch.device) -> Forecast:
    """Of a step of a run that trains this model."""

    def trial(shallow: ModelConfig) -> Step:
        drawn = build_model(shallow, device=device, dtype=getattr(torch, config.dtype), seed=config.seed)
        prepare_indexer(drawn, config)
        optimizer = build_optimizer(drawn, config.optim)
        average = Average(drawn, config.average_decay) if config.average_decay else None
        multiply_in(config, drawn)
        state = TrainState(drawn, optimizer, config.optim, num_steps=1000, guard=Guard(config.guard))
        state.rounds_products = rounds_products(config)

        def step(batches: Sequence[Batch]) -> None:
            train_step(state, batches, loss_for_step(config, state, batches))
            if average is not None:
                average.update(drawn, list(optimizer.weights.values()))

        return step

    pages.keep_freed()  # as the run does
    data, memory = config.data, train_memory(model, config.data.batch_tokens, **_memory_settings(config))
    return forecast(
        model,
        trial,
        device,
        row=data.longest,
        batch_tokens=data.batch_tokens,
        micro_batches=config.micro_batches,
        state_bytes=memory.weights + memory.gradients + memory.optimizer,
    )


def _memory_settings(config: SupervisedConfig) -> dict[str, Any]:
    return memory_settings(config, config.optim, has_average=config.average_decay > 0)


def _build_model(plan: Plan, tokenizer: Tokenizer, checkpoint: Path | None, device: torch.device) -> Transformer:
    config = plan.config
    if plan.start is not None:
        model = load_model(plan.start, device=device, dtype=getattr(torch, config.dtype))
        if config.add_indexer is not None and checkpoint is None:
            model = with_indexer(model, config.add_indexer, config.seed)
        return model
    bos_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id  # as Qwen's files do without one
    model_config = replace(plan.model, bos_id=bos_id, eos_id=tokenizer.eos_id)
    return build_model(model_config, device=device, dtype=getattr(torch, config.dtype), seed=config.seed)


def _loader(config: SupervisedConfig, shard: Shard) -> Loader:
    data = config.data
    return Loader(
        shard,
        weights=shard.weights,
        batch_tokens=data.batch_tokens,
        seed=config.seed,
        packing=data.packing,
        row_tokens=data.longest,
    )


def _validation(config: SupervisedConfig, shard: Shard) -> list[Batch]:
    if shard.counts.loss_tokens == 0:
        if config.data.val_share:
            log.warn(f"no document fell into data.val_share = {config.data.val_share}: no validation loss; raise it")
        return []
    batches = validation_batches(shard, batch_tokens=config.data.batch_tokens, max_tokens=config.eval_tokens)
    return [batch for batch in batches if batch.num_loss_tokens]


def _describe(plan: Plan, shards: dict[str, Shard], loader: Loader, num_steps: int, speed: Speed) -> None:
    log.info(f"learning rate: {plan.rate[1]}")
    log.info(f"MFU: of {speed.peak_in_words}")
    counts = shards["train"].counts
    held_out = shards["val"].counts
    log.info(
        f"data: {counts.sequences:,} sequences, {counts.tokens:,} tokens ({counts.loss_tokens:,} count in the loss); "
        f"{held_out.documents:,} documents held out; {num_steps} steps"
    )
    if len(shards["train"].names) > 1:
        log.info(f"data: {_epochs_in_words(plan.config, loader, num_steps)}")
    if left_out := counts.too_long + held_out.too_long:
        log.warn(f"data: {left_out:,} chat examples longer than data.max_seqlen were left out")


def _epochs_in_words(config: SupervisedConfig, loader: Loader, num_steps: int) -> str:
    """How often the run visits each document of each source."""
    tokens = batch_ramp(config).before(num_steps) * config.data.batch_tokens
    epochs = tokens / max(1.0, loader.tokens_per_epoch)
    visits = zip(loader.shard.names, loader.weights, strict=True)
    return "up to " + ", ".join(f"{weight * epochs:.3g} epochs of {name}" for name, weight in visits)


def _tokenizer_texts(config: SupervisedConfig) -> Iterator[str]:
    for source in config.data.sources:
        for document in itertools.islice(read_source(source), config.tokenizer_documents):
            if document.prompt:
                yield render_text(document.prompt)
            yield document.text


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
