"""The model that is taken where none is named: the project's own, which a checkout has. Torch-free."""

from pathlib import Path

OWN = "checkpoints/kogia-nano"
CONFIG = "config.json"


def own_model() -> str:
    """Where it is, here or beside the package. Raises ValueError where it is not."""
    places = [Path(OWN), Path(__file__).parents[2] / OWN]
    for place in places:
        if (place / CONFIG).is_file():
            return str(place)
    raise ValueError(
        f"no model is named, and there is no {OWN} here or in {places[1].parents[1]}: name a model or run directory, a "
        "GGUF file or org/name of the Hugging Face Hub, or make it by reproductions/kogia-nano/run.py"
    )
