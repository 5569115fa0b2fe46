"""The process in which documents are hashed and tokenised: one JSON line in for each chunk, its part out."""

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # there is a process for every core

import base64
import json
import socket
from typing import Any

from kogia.config import from_dict
from kogia.data.sources import read_source
from kogia.prepare.config import PreparedSource
from kogia.prepare.evaluations import Index
from kogia.prepare.part import Recipe, from_json, make_part
from kogia.text.tokenizer import Tokenizer


def main(channel: socket.socket) -> None:
    """Serves the socket. First line in: where tokenizer and index are, and the settings."""
    with channel.makefile("rb") as lines:
        setup = json.loads(next(lines))
        recipe = Recipe(
            Tokenizer.load(setup["tokenizer"]), Index.load(setup["index"]), setup["max_seqlen"], setup["val_share"]
        )
        for line in lines:
            channel.sendall(json.dumps(_answer(json.loads(line), recipe)).encode() + b"\n")


def _answer(chunk: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """{"part": base64} or, of what cannot be tokenised or generated, {"error": words}."""
    try:
        if "source" in chunk:
            documents = list(read_source(from_dict(PreparedSource, chunk["source"])))
        else:
            documents = [from_json(value) for value in chunk["documents"]]
        part = make_part(documents, recipe, near=chunk["near"])
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - a generator is code that is not ours
        return {"error": f"{chunk.get('source', {}).get('spec', 'a chunk')}: {type(error).__name__}: {error}"}
    return {
        "part": base64.b64encode(part.to_bytes()).decode(),
        "documents": len(documents),
        "nbytes": int(part.nbytes.sum()),
        "tokens": len(part.tokens),
    }
