"""`kogia convert`, with the calibration that takes a running model before the files are rewritten."""

from pathlib import Path

from kogia import log
from kogia.checkpoint import convert
from kogia.checkpoint.config import ConvertConfig
from kogia.checkpoint.directory import resolve_model_dir
from kogia.checkpoint.folds import Fold, search_folds
from kogia.checkpoint.open import find_model
from kogia.data.config import SourceConfig
from kogia.data.sources import has_document
from kogia.inference.calibrate import calibration_batches, measure_moments


def main(config: ConvertConfig) -> None:
    """Raises ValueError as `checkpoint.convert.convert` does, and for a calibration that cannot be."""
    if config.calibration is None:
        convert.main(config)
        return
    convert.check_target(resolve_model_dir(config.src), Path(config.dst), config.overwrite)
    if not has_document(SourceConfig(config.calibration)):
        raise ValueError(f"calibration = {config.calibration!r}: holds no text; give some thousand words")
    convert.main(config, {} if config.dry_run else folds_for(config))


def folds_for(config: ConvertConfig) -> dict[str, Fold]:
    """What the weights are to be multiplied by before they are rounded."""
    assert config.calibration is not None and config.quantize is not None, "ConvertConfig says so"
    found = find_model(config.src, quantize="none")
    if coarse := sorted(found.stored.formats - {"fp8"}):
        raise ValueError(
            f"{found.directory}: holds {' and '.join(coarse)} weights, which have been rounded already; calibrate with "
            "the checkpoint that they were made of"
        )
    model, tokenizer, _ = found.open()
    batches = calibration_batches(config.calibration, tokenizer, model.config.max_position)
    moments = measure_moments(model, batches, products=config.quantize == "int4")
    folds = search_folds(model, moments, config.quantize, asymmetric=config.asymmetric)
    scaled = sum(fold.rows is not None or fold.columns is not None for fold in folds.values())
    made_up = sum(fold.spread is not None for fold in folds.values())
    errors = f", errors of {made_up} weights are made up for" if made_up else ""
    log.info(f"calibrated on {config.calibration}: {scaled} tensors are scaled{errors}")
    return folds
