"""Strings to token ids and back: byte-level BPE in the Hugging Face file formats.

The splitting rules are those of DeepSeek-V3: digits in groups of at most three, then CJK runs, then words and
punctuation; every byte is in the alphabet, so any text survives the round trip. The seven special tokens come first, so
their ids do not depend on the vocabulary size.

A beginning-of-sentence token is never added here: the rendered chat already carries one, and a second one silently
costs accuracy.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# The same words as kogia.text.chat.render_text, for every tool that reads tokenizer_config.json.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)

_DIGITS = r"\p{N}{1,3}"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A byte-level tokenizer with its `tokenizer_config.json`; both are written back by `save` as they were read."""

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config
        self.bos = _token_name(config, "bos_token")
        self.eos = _token_name(config, "eos_token")
        self.bos_id = self.token_id(self.bos)
        self.eos_id = self.token_id(self.eos)

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Raises ValueError, naming the file, when one of the two files is missing or cannot be read."""
        path = Path(directory) / "tokenizer.json"
        text = _read(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise ValueError(
                f"{path}: not a tokenizer.json ({error}); copy the file again or train a new one"
            ) from error
        if "ByteLevel" not in str(json.loads(text).get("decoder")):
            raise ValueError(f"{path}: not a byte-level tokenizer; use one of the DeepSeek, Qwen or Llama 3 kind")
        config_path = path.with_name("tokenizer_config.json")
        try:
            config = json.loads(_read(config_path))
            return cls(backend, config)
        except ValueError as error:  # json's own error is a ValueError too
            prefix = "" if str(config_path) in str(error) else f"{config_path}: "
            raise ValueError(f"{prefix}{error}") from error

    def save(self, directory: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json (with the chat template) into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = json.dumps(self.config, ensure_ascii=False, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Special tokens written out in `text` become their ids; no BOS is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Bytes that are no valid UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def vocab_size(self) -> int:
        """Highest id plus one: rows an embedding needs at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int:
        """The id of exactly this token; ValueError when the vocabulary lacks it."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"token {token!r} is not in the vocabulary; use a tokenizer that has it as a special token"
            )
        return token_id

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id outside the vocabulary, as in `decode`."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[char] for char in token)
        except KeyError:  # an added token with characters outside the byte alphabet, e.g. <｜User｜>
            return token.encode()


class IncrementalDecoder:
    """Turns a stream of ids into text without ever emitting part of a character.

    All pushed text and the final `flush` joined equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """Text completed by these ids; may be empty while a character is unfinished."""
        chunk = b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._skipped)
        return self._decoder.decode(chunk)

    def flush(self) -> str:
        """U+FFFD when the stream stopped inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains on `texts`; gives fewer than `vocab_size` tokens when the texts run out of repeated pairs to merge."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: must hold {len(SPECIAL_TOKENS)} special tokens and 256 bytes; "
            f"give at least {MIN_VOCAB_SIZE}"
        )
    backend = Backend(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGITS, _CJK, _WORDS)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, _default_config())


def _default_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _token_name(config: dict[str, Any], key: str) -> str:
    """A special token's text; the files hold it plain or as a table with `content`."""
    value = config.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise ValueError(f"{key}={value!r}: tokenizer_config.json must name this token; add it to the file")
    return name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(
            f"{path}: {reason}; a model directory must hold tokenizer.json and tokenizer_config.json; "
            "copy them there or save the model again with its tokenizer"
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest is moved to U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
