"""The files of a model directory that belong to its tokenizer, read within limits: they may come from anywhere."""

import json
import os
from pathlib import Path
from typing import Any

from kogia.files import check_fetched

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
EXTRA_FILES = (TEMPLATE_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)
MAX_VOCABULARY_BYTES = 200_000_000
MAX_BYTES = 1_000_000


def inside(directory: Path, name: str) -> Path:
    """The path of `name` in a model directory, there or not. Raises ValueError if a link leads out of the directory.

    Links within a repository of the Hugging Face cache are its layout: models--X/snapshots/REV/file -> ../../blobs.
    """
    file, root = directory / name, Path(os.path.realpath(directory))
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(root):
        raise ValueError(
            f"{file}: a link to {target}, outside the model directory; refusing to follow it. Copy the file"
        )
    return file


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a model directory's file of at most `limit` bytes, without a byte order mark.

    Raises ValueError naming the file if it cannot be read or is a link out of its directory.
    """
    inside(path.parent, path.name)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a file; copy the model's own file there")
        check_fetched(path)
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"{path}: larger than {limit:,} bytes; that is no tokenizer file, restore the real one")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; restore the file") from error
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; a model directory must hold tokenizer.json and tokenizer_config.json; "
            "copy them there or save the model again with its tokenizer"
        ) from error


def parse_object(text: str, name: str) -> dict[str, Any]:
    """A JSON object; ValueError opening with `name` for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds a JSON {type(value).__name__}, not an object; restore the file")
    return value


def read_object(path: Path) -> dict[str, Any]:
    return parse_object(read_text(path), str(path))


def read_generation(directory: Path) -> dict[str, Any]:
    """generation_config.json: how the model's makers have it sampled; empty where there is none."""
    path = directory / "generation_config.json"
    return read_object(path) if os.path.lexists(path) else {}


def read_eos_ids(directory: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: none, one, or a list (Llama 3)."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = read_object(path).get("eos_token_id") if os.path.lexists(path) else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{path}: eos_token_id={found!r}: must be a token id or a list of them")
            return tuple(ids)
    return ()
