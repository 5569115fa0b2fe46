"""Tokens that only tokenizer_config.json, or a file beside it, names: added as transformers adds them, one id each."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from kogia.text.files import ADDED_TOKENS_FILE

FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
EXTRA = ("extra_special_tokens", "additional_special_tokens")


def add_tokens(
    backend: Backend,
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    listed: Mapping[str, Any],
    roles: Mapping[str, str],
) -> None:
    """Adds what `backend` lacks: the table of the configuration by index, then `roles`, then the extra tokens.

    `names` is special_tokens_map.json and `listed` added_tokens.json, which count where the configuration has no such
    table. An id is only a place in the order: new tokens follow the vocabulary. Raises ValueError for what is no token.
    """
    table = _table(config)
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    special = dict.fromkeys([*roles.values(), *_extra(config if table else {**names, **config})])
    if not table:
        table = [
            AddedToken(name, normalized=name not in special, special=name in special)
            for name in _by_id(listed)
            if name not in known
        ]
    changed = [token for token in table if token != known.get(token.content)]
    taken = known.keys() | {token.content for token in changed}
    backend.add_tokens([*changed, *(AddedToken(name, special=True) for name in special if name not in taken)])


def _table(config: Mapping[str, Any]) -> list[AddedToken]:
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, dict) or not all(index.isascii() and index.isdigit() for index in table):
        raise ValueError(f"added_tokens_decoder={table!r:.80}: must be a table of tokens by id; correct the file")
    return [_token(table[index]) for index in sorted(table, key=int)]


def _by_id(listed: Mapping[str, Any]) -> list[str]:
    if not all(name and type(index) is int for name, index in listed.items()):
        raise ValueError(
            f"{ADDED_TOKENS_FILE}: {dict(listed)!r:.80}: must be a table of ids by token; correct the file"
        )
    return sorted(listed, key=lambda name: listed[name])


def _token(entry: Any) -> AddedToken:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(flag, False), bool) for flag in FLAGS):
        raise ValueError(f"added_tokens_decoder: {entry!r:.80}: must be a table of content and flags; correct the file")
    return AddedToken(_content(entry, "added_tokens_decoder"), **{flag: entry[flag] for flag in FLAGS if flag in entry})


def _extra(config: Mapping[str, Any]) -> list[str]:
    """Names of further special tokens: tokens with a role of their own ("image_token"), then the lists of them."""
    found = [value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)]
    key = next((key for key in EXTRA if config.get(key)), None)
    if key is None:
        return found
    entries = config[key]
    if not isinstance(entries, list | dict):
        raise ValueError(f"{key}={entries!r:.80}: must be a list of tokens; correct the file")
    return found + [_content(entry, key) for entry in (entries.values() if isinstance(entries, dict) else entries)]


def _content(entry: Any, where: str) -> str:
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str) or not content:
        raise ValueError(
            f"{where}: {entry!r:.80}: must be a token's text or a table with its content; correct the file"
        )
    return content
