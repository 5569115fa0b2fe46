"""How many tokens a text has at least, from its bytes alone: what is far too long need not be encoded to be refused."""

import json
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

_KEEP = {"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"}
"""Pre-tokenizers that cut a text and lose nothing of it, unless they remove what they cut at."""


def longest_token(backend: Backend) -> int | None:
    """The most bytes of a text that one token stands for; None where a tokenizer may leave parts of a text out."""
    if not (_keeps_bytes(backend) and all(map(_keeps, _steps(backend.normalizer, "normalizers")))):
        return None
    cuts = _steps(backend.pre_tokenizer, "pretokenizers")
    if not all(step["type"] in _KEEP and step.get("behavior") != "Removed" for step in cuts):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # one takes all blanks beside it
        return None
    marked = any(step["type"] == "ByteLevel" for step in cuts)
    own = (len(name) if marked else len(name.encode()) for name in backend.get_vocab(False))
    return max([*own, *(len(token.content.encode()) for token in added), 1])


def _keeps_bytes(backend: Backend) -> bool:
    """Whether every byte has a token: as one of GPT-2's characters, or by its number."""
    model = backend.model
    if not isinstance(model, models.BPE):
        return False
    if model.byte_fallback:
        return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    cuts = _steps(backend.pre_tokenizer, "pretokenizers")
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
    return any(step["type"] == "ByteLevel" for step in cuts) and all(
        backend.token_to_id(char) is not None for char in alphabet
    )


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a normalizer makes no text shorter."""
    if step["type"] == "Replace":
        return len(step["content"].encode()) >= len(step["pattern"].get("String", "").encode()) > 0
    return step["type"] == "Prepend"


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """What a part of a tokenizer does, in order."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]
