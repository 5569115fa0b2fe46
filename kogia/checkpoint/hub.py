"""Models by their name on the Hugging Face Hub, `org/name`: a snapshot in the local cache. Torch-free.

What is in the cache is taken as it is, so that a model stays the same until somebody fetches it anew
(`hf download org/name`). Only what is not there is asked of the network, and only where `org` is no directory here, as
`runs/new` is a misspelt path then. Both is done by `huggingface_hub`, which comes with `tokenizers`.
"""

import json
import re
from pathlib import Path

from kogia import log

_PART = re.compile(r"\w([\w.-]{0,94}\w)?", re.ASCII)
_INDEX = "model.safetensors.index.json"
_TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""All that is read of a model beside its weights. Nothing else is fetched: no code, no weights in other formats."""


def is_hub_name(name: str) -> bool:
    """Whether this is how models are named there: `org/name` of letters, digits and `-_.`, neither `..` nor `--`."""
    parts = name.split("/")
    plain = len(parts) == 2 and all(_PART.fullmatch(part) for part in parts)
    return plain and ".." not in name and "--" not in name and not name.endswith(".git")


def find_on_hub(name: str, needed: str, *, weights: bool) -> Path:
    """The snapshot of a model that has the file `needed` and, if asked for, weights. Fetches what the cache lacks.

    Raises ValueError that says why there is none, and how to get it.
    """
    cached = None
    try:
        cached = _snapshot(name, weights=weights, local_only=True)
    except ImportError:
        raise _absent(name, "huggingface_hub, which would look for a model of that name, is not installed") from None
    except (OSError, ValueError):  # not in the cache, or in part
        pass
    usable = cached is not None and _holds(cached, needed, weights)
    if cached is not None and usable and (cached / "tokenizer.json").is_file():
        return cached
    try:
        if Path(name).parent.is_dir():
            raise ValueError(f"the Hub was not asked, as there is a directory {Path(name).parent} here")
        found = _snapshot(name, weights=weights, local_only=False)
        if not _holds(found, needed, weights):
            raise ValueError(f"nor can {needed}{' and safetensors weights' if weights else ''} be had from the Hub")
    except Exception as error:  # what can go wrong in a network is a matter of three libraries
        if cached is not None and usable:
            return cached
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        held = "does not hold a model" if cached is None else "holds only a part of a model"
        raise _absent(name, f"the Hugging Face cache {held} of that name ({reason})") from error
    log.info(f"{name} is {found}")
    return found


def _snapshot(name: str, *, weights: bool, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name,
            local_files_only=local_only,
            allow_patterns=[*_TEXTS, *(("*.safetensors", _INDEX) if weights else ())],
            ignore_patterns=["*/*", "consolidated*"],  # the weights once more, as other programs have them
        )
    )


def _holds(snapshot: Path, needed: str, weights: bool) -> bool:
    """Whether all is there: a download that was cut off, or one of the tokenizer alone, leaves a snapshot too."""
    return (snapshot / needed).is_file() and (not weights or _has_weights(snapshot))


def _has_weights(snapshot: Path) -> bool:
    if (snapshot / "model.safetensors").is_file():
        return True
    try:
        files = json.loads((snapshot / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return all((snapshot / file).is_file() for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _absent(name: str, reason: str) -> ValueError:
    return ValueError(
        f"{name}: no such file or directory, and {reason}; give a model directory or a run directory, or fetch the "
        f"model with `hf download {name}`"
    )
