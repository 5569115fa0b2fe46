"""A longer context for a trained model: YaRN, then a little training on long documents (DeepSeek-V3 section 4.3).

Rotary angles beyond those a model was trained with mean nothing to it. YaRN (arXiv 2309.00071) slows the slow ones down
by `factor`, leaves the fast ones, and sharpens attention a little; a few steps on longer documents do the rest. V3 went
from 4k to 32k to 128k in two such runs of 1000 steps, both with factor 40: the first one sets it (`extend_context`),
the second goes on with what is then the model's own.
"""

from dataclasses import replace

from kogia.model.config import ModelConfig, YarnConfig


def extended_config(model: ModelConfig, yarn: YarnConfig) -> ModelConfig:
    """The architecture with rotary positions for `factor` times the context that it was trained with.

    Raises ValueError for a model whose positions are stretched already, for `original_max_position` beyond its context,
    and for a factor that does not make it longer.
    """
    if (present := model.attention.rope_scaling) is not None:
        raise ValueError(
            f"extend_context: the positions of the model of init are stretched already, by {present.kind} to "
            f"{model.max_position}; leave it out to go on with them, and raise data.max_seqlen"
        )
    if yarn.original_max_position > model.max_position:
        raise ValueError(
            f"extend_context.original_max_position = {yarn.original_max_position}: the model of init has positions up "
            f"to {model.max_position}; give the length that it was trained with"
        )
    longest = int(yarn.factor * yarn.original_max_position)
    if yarn.factor <= 1 or longest <= model.max_position:
        raise ValueError(
            f"extend_context.factor = {yarn.factor:g}: {longest} positions, and the model of init has "
            f"{model.max_position}; give a larger factor"
        )
    return replace(model, max_position=longest, attention=replace(model.attention, rope_scaling=yarn))
