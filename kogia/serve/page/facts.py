"""What the page shows of a model, from its configuration."""

from typing import Any

from kogia.model.config import ModelConfig
from kogia.model.costs import Component, model_costs
from kogia.serve.state import ServedModel


def model_facts(name: str, served: ServedModel) -> dict[str, Any]:
    """Sizes in parameters and tokens; `topk` is 0 in a model without experts."""
    config, costs = served.config, model_costs(served.config)
    return {
        "name": name,
        "context": config.max_position,
        "params": costs.params,
        "active_params": costs.active_params,
        "defaults": {name: value for name, value in served.defaults.items() if isinstance(value, int | float)},
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
