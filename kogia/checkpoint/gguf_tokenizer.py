"""The tokenizer in the metadata of a GGUF file as a Hugging Face one, and the way back.

Two kinds are there: "gpt2", byte-level BPE with its merges, and "llama", sentencepiece's BPE, where the scores of the
pieces say which are merged first. How texts are split before is a name in the file; what it means is in llama.cpp
(src/llama-vocab.cpp), and here in `_PRE`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kogia import log
from kogia.checkpoint.gguf_file import is_gguf, read_gguf
from kogia.text.files import MAX_BYTES
from kogia.text.tokenizer import CHAT_TEMPLATE, Tokenizer, parse_backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What a token is, as llama.cpp numbers it."""
_SPACE = "▁"
_MAX_PIECES = 5_000_000  # characters of all pieces of a sentencepiece vocabulary: each is cut at each of them
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
# escaped are those that an editor may compose otherwise
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6Ø-\u00f6ø-ƺƼ-ƿ\u01c4-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\u0386\u0388-\u038a\u038c\u038e-ΡΣ-\u03f5Ϸ-ҁҊ-ԯԱ-"
    "ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EAST_ASIAN = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class _Pre:
    """How texts are split before pieces are merged."""

    splits: tuple[str, ...]
    """Regular expressions, one after the other."""
    digits: bool = False
    """Each digit is by itself first."""
    gpt2: bool = False
    """GPT-2's own expression at the end."""
    nfc: bool = False
    """Texts are composed first, as the published tokenizers do and llama.cpp does not."""
    whole_first: bool = False
    """A piece that is a token stays one, whatever its merges say."""

    def steps(self) -> list[dict[str, Any]]:
        """As tokenizer.json has them."""
        digits = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        splits = [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in self.splits
        ]
        return [*digits, *splits, _byte_level(self.gpt2)]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_LLAMA3 = _Pre((_CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _ENDS,), whole_first=True)
_QWEN2 = _Pre((_CONTRACTIONS + _WORD + r"\p{N}" + _ENDS,), nfc=True)
_PRE = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-2": _Pre((), gpt2=True),
    "smollm": _Pre((), digits=True, gpt2=True),
    "deepseek-llm": _Pre(
        (r"[\r\n]", rf"\s?[{_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _EAST_ASIAN, r"\p{N}+")
    ),
    "deepseek-coder": _Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "deepseek-v3": _Pre(
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}
"""`tokenizer.ggml.pre` -> rules; of several names for the same the first is written."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory or of a GGUF file."""
    return tokenizer_from_gguf(path) if is_gguf(path) else Tokenizer.load(path)


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """Raises ValueError where the file has none, or one of a kind that is not known here."""
    metadata = read_gguf(path).metadata
    try:
        words = _Words(metadata)
        return Tokenizer(
            parse_backend(json.dumps(words.tokenizer_json()), "its tokenizer"),
            words.config(),
            eos_ids=words.eos_ids(),
            origin=str(path),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Words:
    """The entries `tokenizer.*` of a file."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.kind = self._get("model")
        if self.kind not in ("gpt2", "llama"):
            raise ValueError(
                f"its tokenizer is of the kind {self.kind!r:.50}; known: gpt2 (byte-level BPE), llama (SPM)"
            )
        self.tokens = self._texts("tokens")
        self.types = self._get("token_type", [NORMAL] * len(self.tokens))
        if not isinstance(self.types, list) or len(self.types) != len(self.tokens):
            raise ValueError("tokenizer.ggml.token_type must have a number for each token")

    def tokenizer_json(self) -> dict[str, Any]:
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            "post_processor": self._post_processor(),
            **(self._byte_level() if self.kind == "gpt2" else self._sentencepiece()),
        }

    def config(self) -> dict[str, Any]:
        """As tokenizer_config.json has it."""
        roles = {role: self._token(name) for name, role in _ROLES.items()}
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and (not isinstance(template, str) or len(template) > MAX_BYTES):
            raise ValueError(f"tokenizer.chat_template must be a text of at most {MAX_BYTES:,} characters")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: token for role, token in roles.items() if token is not None},
            "add_bos_token": self._adds_bos,
            "clean_up_tokenization_spaces": False,
            **({} if template is None else {"chat_template": template}),
        }

    def eos_ids(self) -> list[int]:
        return [each for each in (self._id("eos"), self._id("eot")) if each is not None]

    @property
    def _adds_bos(self) -> bool:
        absent = self.kind == "llama" or _PRE.get(str(self._get("pre"))) == _LLAMA3
        return bool(self._get("add_bos_token", absent)) and self._id("bos") is not None

    def _get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    def _texts(self, name: str) -> list[str]:
        texts = self._get(name)
        if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
            raise ValueError(f"tokenizer.ggml.{name} is missing, or no list of texts; the file has no tokenizer to use")
        return texts

    def _id(self, name: str) -> int | None:
        token_id = self._get(f"{name}_token_id")
        if token_id is not None and (type(token_id) is not int or not 0 <= token_id < len(self.tokens)):
            raise ValueError(
                f"tokenizer.ggml.{name}_token_id = {token_id!r:.50}: there are {len(self.tokens):,} tokens"
            )
        return token_id

    def _token(self, name: str) -> str | None:
        token_id = self._id(name)
        return None if token_id is None else self.tokens[token_id]

    def _added(self) -> Iterator[dict[str, Any]]:
        """Tokens that are found in a text as they are."""
        for token_id, (token, kind) in enumerate(zip(self.tokens, self.types)):
            if token and (kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and self.kind == "llama")):
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                yield {"id": token_id, "content": token, **flags, "special": kind != USER_DEFINED}

    def _post_processor(self) -> dict[str, Any] | None:
        """For other tools: BOS in front of a text, where the file wants it."""
        bos, bos_id = self._token("bos"), self._id("bos")
        if not self._adds_bos or bos is None:
            return None
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
        tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
        return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b], "special_tokens": tokens}

    def _byte_level(self) -> dict[str, Any]:
        pre = self._pre()
        merges = [merge.split(" ", 1) for merge in self._texts("merges")]
        return {
            "normalizer": {"type": "NFC"} if pre.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps()},
            "decoder": _byte_level(True),
            "model": {"type": "BPE", "ignore_merges": pre.whole_first, "vocab": self._vocabulary(), "merges": merges},
        }

    def _pre(self) -> _Pre:
        name = self._get("pre")
        if name is None:
            log.warn("the file does not say how its tokenizer splits texts; GPT-2's way is taken")
            return _PRE["gpt-2"]
        if not isinstance(name, str) or name not in _PRE:
            raise ValueError(
                f"tokenizer.ggml.pre = {name!r:.50}: this way of splitting texts is not known here; known: "
                f"{', '.join(_PRE)}. Use the model in the Hugging Face layout, with its tokenizer.json"
            )
        return _PRE[name]

    def _sentencepiece(self) -> dict[str, Any]:
        prefixed = bool(self._get("add_space_prefix", True))
        prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": {
                "type": "BPE",
                "unk_token": self._token("unknown"),
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": self._vocabulary(),
                "merges": self._merges_by_score(),
            },
        }

    def _vocabulary(self) -> dict[str, int]:
        """Without rows of the model that stand for nothing: `[PAD448]` is no text."""
        used = [(token, i) for i, (token, kind) in enumerate(zip(self.tokens, self.types)) if kind != UNUSED]
        vocabulary = dict(used)
        if twice := next((token for token, i in used if vocabulary[token] != i), None):
            raise ValueError(f"token {twice[:50]!r} is there twice")
        return vocabulary

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Every pair of pieces that makes a third, that of the highest score first; as sentencepiece merges."""
        scores = self._get("scores")
        if not isinstance(scores, list) or len(scores) != len(self.tokens) or not isinstance(scores[0], float):
            raise ValueError("tokenizer.ggml.scores must have a number for each token")
        if (size := sum(map(len, self.tokens))) > _MAX_PIECES:
            raise ValueError(f"its pieces have {size:,} characters, more than {_MAX_PIECES:,}")
        ids = {
            token: i for i, (token, kind) in enumerate(zip(self.tokens, self.types)) if kind in (NORMAL, USER_DEFINED)
        }
        merges = [
            (-scores[i], ids[token[:cut]], ids[token[cut:]])
            for token, i in ids.items()
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(merges)]


# The way back ---------------------------------------------------------------------------------------------------------


def tokenizer_to_gguf(tokenizer: Tokenizer, num_tokens: int) -> dict[str, Any]:
    """The entries `tokenizer.*` of a file, with as many tokens as the model has rows.

    Raises ValueError for a tokenizer that llama.cpp has no rules for.
    """
    state = json.loads(tokenizer.backend.to_str())
    added = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    tokens = [tokenizer.backend.id_to_token(i) for i in range(num_tokens)]
    kinds = [_kind(token, added.get(i), tokenizer) for i, token in enumerate(tokens)]
    words: dict[str, Any] = {
        "ggml.tokens": [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)],
        "ggml.token_type": kinds,
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.add_bos_token": tokenizer.adds_bos,
        **(_byte_level_words(state) if tokenizer.is_byte_level else _sentencepiece_words(state, tokens)),
    }
    if tokenizer.bos_id is not None:
        words["ggml.bos_token_id"] = tokenizer.bos_id
    if tokenizer.eos_ids[1:]:
        words["ggml.eot_token_id"] = tokenizer.eos_ids[1]
    for name in ("unknown", "padding"):
        token = tokenizer.special_tokens.get(_ROLES[name])
        token_id = None if token is None else tokenizer.backend.token_to_id(token)
        if token_id is not None:
            words[f"ggml.{name}_token_id"] = token_id
    words["chat_template"] = tokenizer.template_source or tokenizer.config.get("chat_template") or CHAT_TEMPLATE
    return {f"tokenizer.{name}": value for name, value in words.items()}


def _kind(token: str | None, special: bool | None, tokenizer: Tokenizer) -> int:
    if token is None:
        return UNUSED
    if special is not None:
        is_unknown = not tokenizer.is_byte_level and token == tokenizer.special_tokens.get("unk_token")
        return UNKNOWN if is_unknown else CONTROL if special else USER_DEFINED
    is_byte = not tokenizer.is_byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _byte_level_words(state: Mapping[str, Any]) -> dict[str, Any]:
    normalizers = [step["type"] for step in _flat(state["normalizer"], "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise ValueError(f"its tokenizer changes texts by {', '.join(normalizers)} first, which llama.cpp does not do")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {"ggml.model": "gpt2", "ggml.pre": _pre_name(state["pre_tokenizer"]), "ggml.merges": merges}


def _pre_name(pre_tokenizer: Any) -> str:
    steps = _flat(pre_tokenizer, "pretokenizers")
    for name, pre in _PRE.items():
        if [_rule(step) for step in steps] == [_rule(step) for step in pre.steps()]:
            return name
    raise ValueError(f"its tokenizer splits texts by {json.dumps(steps)[:200]}, for which llama.cpp has no name here")


def _rule(step: Mapping[str, Any]) -> object:
    """What of a step matters, without how offsets are counted."""
    if step["type"] == "ByteLevel":
        return ("ByteLevel", step["add_prefix_space"], step.get("use_regex", True))
    return json.dumps(step, sort_keys=True)


def _flat(step: Any, members: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [one for each in step[members] for one in _flat(each, members)] if step["type"] == "Sequence" else [step]


def _sentencepiece_words(state: Mapping[str, Any], tokens: Sequence[str | None]) -> dict[str, Any]:
    """A piece's score is how early it is merged; single characters and what is never merged come last."""
    merges = state["model"]["merges"]
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(pairs))) if token else 0.0 for token in tokens]
    steps = [*_flat(state["normalizer"], "normalizers"), *_flat(state["pre_tokenizer"], "pretokenizers")]
    prefixed = any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)
    return {"ggml.model": "llama", "ggml.scores": scores, "ggml.add_space_prefix": prefixed}
