"""What the page shows of a model, from its configuration."""

from typing import Any

from kogia.model.config import ModelConfig
from kogia.model.costs import Component, model_costs
from kogia.serve.served import Entry


def model_facts(entry: Entry) -> dict[str, Any]:
    """Sizes in parameters and tokens; `topk` is 0 in a model without experts."""
    config, costs = entry.config, model_costs(entry.config)
    return {
        "name": entry.name,
        "state": entry.phase,
        "context": config.max_position,
        "params": costs.params,
        "active_params": costs.active_params,
        "defaults": {name: value for name, value in entry.defaults.items() if isinstance(value, int | float)},
        **_expert_facts(config),
    }


def mixture_layers(config: ModelConfig) -> list[int]:
    """Decoder layers that have experts."""
    return [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]


def _expert_facts(config: ModelConfig) -> dict[str, int]:
    moe = config.moe
    if moe is None:
        return {"topk": 0}
    (routed,) = (part for part in model_costs(config).parts if part.component is Component.ROUTED_EXPERTS)
    return {
        "topk": moe.topk,
        "most_active": moe.most_active,
        "num_experts": moe.num_experts,
        "num_shared_experts": moe.num_shared_experts,
        "num_mixtures": len(mixture_layers(config)),
        "expert_params": routed.params // moe.num_experts,  # of the experts of one number in all layers
    }
