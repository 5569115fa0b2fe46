"""What a supervised run will be, as far as it is known before the work, and all that would end it later.

The run and its `--dry-run` begin here. A setting that is doomed to fail is refused before anything is written, a
tokenizer trained, a document tokenised or a weight read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kogia.checkpoint.directory import resolve_model_dir, resolve_tokenizer_dir
from kogia.checkpoint.gguf_tokenizer import load_tokenizer
from kogia.checkpoint.hf import Stored, read_stored
from kogia.checkpoint.open import check_vocabulary, pick_device
from kogia.data.shards import prepared_directory, read_prepared
from kogia.data.sources import has_document
from kogia.files import check_directory
from kogia.model.config import ModelConfig
from kogia.plan.dry_run import Line
from kogia.sinks import check_sinks
from kogia.text.tokenizer import check_vocab_size
from kogia.train.config import SupervisedConfig
from kogia.train.context import extended_config
from kogia.train.indexer import check_indexer, indexed_config
from kogia.train.loss import balance_of, latent_rank
from kogia.train.rates import FINE_TUNING, FROM_SCRATCH, INDEXING, Rate, rate_line, settle_rate
from kogia.train.run_dir import check_run_dir

TRAINED = "tokenizer"
"""Where in a run directory the tokenizer is that the run trained."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that can begin."""

    config: SupervisedConfig
    """With a learning rate."""
    model: ModelConfig
    start: Stored | None
    """Where the weights come from; None draws them."""
    rate: Line


def plan_run(config: SupervisedConfig) -> Plan:
    """Raises ValueError for whatever of the settings would end the run later; writes nothing."""
    config.check_complete()
    check_sinks(config.sinks)
    checkpoint = check_run_dir(config)
    pick_device(config.device)
    source = checkpoint or config.init
    with resuming_from(checkpoint):
        start = read_stored(source, weights=not config.dry_run) if source else None
    if start is not None and config.extend_context is not None and checkpoint is None:
        start = replace(start, config=extended_config(start.config, config.extend_context))
    model = _architecture(config, start, is_resumed=checkpoint is not None)
    check_sizes(config, model)
    if checkpoint is None:  # else the tokens are there
        _check_data(config)
    with resuming_from(checkpoint):
        _check_tokenizer(config, model, checkpoint)
    kind = rate_kind(config)
    settled = settle_rate(config.optim, kind, model)
    data = replace(config.data, max_seqlen=min(config.data.longest, model.max_position))
    return Plan(replace(config, data=data, optim=settled), model, start, rate_line(config.optim, settled, kind, model))


@contextmanager
def resuming_from(checkpoint: Path | None) -> Iterator[None]:
    """Within the block, what is wrong with a checkpoint to go on from is told with what to do about it."""
    try:
        yield
    except ValueError as error:
        if checkpoint is None:
            raise
        raise ValueError(f"{error}; or delete {checkpoint} to resume from the checkpoint before it") from error


def rate_kind(config: SupervisedConfig) -> Rate:
    """What kind of training it is."""
    if config.train_only == "indexer":
        return INDEXING
    return FROM_SCRATCH if config.init is None else FINE_TUNING


def tokenizer_directory(config: SupervisedConfig, checkpoint: Path | None) -> Path | None:
    """Where the tokenizer is read from: the checkpoint, `tokenizer`, `init`, that of prepared data, or what an earlier
    start of this run has trained; None where one is to be trained."""
    trained = Path(config.out) / TRAINED
    prepared = prepared_directory(config.data)
    if checkpoint is not None:
        return checkpoint
    if config.tokenizer is not None:
        return resolve_tokenizer_dir(config.tokenizer)
    if config.init is not None:
        return resolve_model_dir(config.init, weights=False)
    if prepared is not None:
        return prepared / TRAINED
    return trained if config.resume and trained.exists() else None


def _architecture(config: SupervisedConfig, start: Stored | None, *, is_resumed: bool) -> ModelConfig:
    if start is None:
        assert config.model is not None, "check_complete has seen to it"
        return config.model
    if config.add_indexer is None or is_resumed:
        return start.config
    return indexed_config(start.config, config.add_indexer)


def check_sizes(config: SupervisedConfig, model: ModelConfig) -> None:
    if config.data.max_seqlen is not None and config.data.max_seqlen > model.max_position:
        raise ValueError(
            f"data.max_seqlen = {config.data.max_seqlen}: above model.max_position = {model.max_position}; "
            "lower it or raise max_position"
        )
    check_indexer(model, config)
    balance_of(config, model)
    if config.nested_rank_min is not None:
        latent_rank(model, config.nested_rank_min)


def _check_tokenizer(config: SupervisedConfig, model: ModelConfig, checkpoint: Path | None) -> None:
    directory = tokenizer_directory(config, checkpoint)
    if directory is None:
        check_vocab_size(model.vocab_size)
    else:
        check_vocabulary(load_tokenizer(directory), model, directory)


def _check_data(config: SupervisedConfig) -> None:
    if prepared := prepared_directory(config.data):
        read_prepared(prepared)
        return
    if config.data.cache_dir is not None:
        check_directory(Path(config.data.cache_dir).expanduser())
    filled = [source for source in config.data.sources if has_document(source)]
    if not filled:
        specs = ", ".join(source.spec for source in config.data.sources)
        raise ValueError(f"data: {specs}: no document in it; name a source that has some, or fill it first")
