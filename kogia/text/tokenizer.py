"""Strings to token ids and back, in the Hugging Face file formats: any model's tokenizer, and new byte-level BPE ones.

New ones split as DeepSeek-V3 does: digits in groups of at most three, then CJK runs, then words and punctuation; every
byte is in the alphabet, so any text survives the round trip. Their seven special tokens come first, so their ids do not
depend on the vocabulary size.

`encode` never adds a beginning-of-sentence token: the rendered chat already carries one, and a second one silently
costs accuracy.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from kogia.files import as_json
from kogia.text.added_tokens import add_tokens
from kogia.text.files import (
    ADDED_TOKENS_FILE,
    EXTRA_FILES,
    MAX_VOCABULARY_BYTES,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    parse_object,
    read_eos_ids,
    read_generation,
    read_object,
    read_text,
)
from kogia.text.template import ChatTemplate
from kogia.text.token_lengths import longest_token
from kogia.text.tokenizer_file import check_tokenizer_file, panics_as_errors

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
MAX_VOCAB_SIZE = 1 << 22
"""The trainer takes memory for all tokens that it may make, and ends the process where it gets none."""
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

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

_LONG_RUN = re.compile(r"\S{512}(?=\S)|\s{512}(?=\s)")
_DIGITS = r"\p{N}{1,3}"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LONG_CHARS = 4096
"""Texts above it are encoded as a batch of one: that call lets other threads run meanwhile, the other one does not, and
a request may bring 8 million characters."""


class Tokenizer:
    """A `tokenizer.json` with what the files beside it say; `save` writes all of them back as they were read."""

    def __init__(
        self,
        backend: Backend,
        config: dict[str, Any],
        *,
        files: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        generation: Mapping[str, Any] | None = None,
        origin: str = "chat_template",
    ) -> None:
        """`config` is tokenizer_config.json; `files` are further files by name, `eos_ids` further ids that end a text.
        `generation` is generation_config.json, which goes with the tokenizer into every model that is saved with it.

        `origin` names the place of the chat template in error messages.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config
        self.files = dict(files or {})
        self.generation = dict(generation or {})
        self.is_byte_level = _is_byte_level(backend)
        names = parse_object(self.files.get(SPECIAL_TOKENS_FILE, "{}"), SPECIAL_TOKENS_FILE)
        self.special_tokens = _special_tokens({**names, **config})
        """Names by role ("bos_token", "pad_token", ...), as chat templates see them."""
        self.bos = self.special_tokens.get("bos_token")
        """None for a model without one (Qwen)."""
        self.bos_id = None if self.bos is None else self.token_id(self.bos)
        self.eos = self.special_tokens.get("eos_token") or _name_of(backend, eos_ids)
        self.eos_id = self.token_id(self.eos)
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *eos_ids)))
        """Every id that ends a text; the first is `eos_id`, the one that training writes."""
        listed = parse_object(self.files.get(ADDED_TOKENS_FILE, "{}"), ADDED_TOKENS_FILE)
        add_tokens(backend, config, names, listed, self.special_tokens)
        self._origin = origin

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Reads tokenizer.json and tokenizer_config.json, and what there is of the other files that a model has.

        Raises ValueError, naming the file, when one is missing, too large, or cannot be read.
        """
        directory = Path(directory)
        path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
        backend = parse_backend(read_text(path, MAX_VOCABULARY_BYTES), str(path))
        config = read_object(config_path)
        files = {name: read_text(directory / name) for name in EXTRA_FILES if os.path.lexists(directory / name)}
        origin = directory / (TEMPLATE_FILE if TEMPLATE_FILE in files else config_path.name)
        try:
            ids, generation = read_eos_ids(directory), read_generation(directory)
            return cls(backend, config, files=files, eos_ids=ids, generation=generation, origin=str(origin))
        except ValueError as error:
            prefix = "" if str(directory) in str(error) else f"{config_path}: "
            raise ValueError(f"{prefix}{error}") from error

    def save(self, directory: Path | str) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the further files into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(as_json(self.config), encoding="utf-8")
        for name in EXTRA_FILES:
            (directory / name).unlink(missing_ok=True)
        for name, text in self.files.items():
            (directory / name).write_text(text, encoding="utf-8", newline="")

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Special tokens written out in `text` become their ids; no BOS is added.

        Raises ValueError where it must have more than `most` tokens, without encoding it: those that may have fewer
        are encoded whole, however many they turn out to have.
        """
        self.check_length(text, most)
        if len(text) > LONG_CHARS:
            return self.encode_batch([text])[0]
        with panics_as_errors("encoding"):
            return self.backend.encode(sound(text), add_special_tokens=False).ids

    def check_length(self, text: str, most: int | None) -> None:
        """Raise ValueError for a text that must have more than `most` tokens."""
        if most is not None and (least := self.least_tokens(text)) > most:
            raise ValueError(f"a text of at least {least:,} tokens, where {most:,} fit: shorten it")

    def encode_plain(self, text: str) -> list[int]:
        """A short text, marks that it spells included: each is cut behind its first character, and is none then."""
        ids, end = [], 0
        while found := self.find_marks(text[end:]):
            cut = end + found[0][0] + 1
            ids += self.encode(text[end:cut])
            end = cut
        return ids + self.encode(text[end:])

    def find_marks(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of what spells a mark: a special token, a tag of thoughts, or another added token that the chat
        template writes. Words that a tokenizer only happens to have added are none."""
        if not self._marks or not self._mark_beginnings.search(self._normalized(text)):
            return []
        with panics_as_errors("encoding"):
            if len(text) > LONG_CHARS:
                (found,) = self._mark_finder.encode_batch([sound(text)], add_special_tokens=False)
            else:
                found = self._mark_finder.encode(sound(text), add_special_tokens=False)
        return [span for token_id, span in zip(found.ids, found.offsets) if token_id]

    @cached_property
    def _marks(self) -> list[AddedToken]:
        added, written = self.backend.get_added_tokens_decoder().values(), f"{THINK}{END_THINK}{self.template_source}"
        return [token for token in added if token.special or (_is_tag(token.content) and token.content in written)]

    @cached_property
    def _mark_beginnings(self) -> re.Pattern[str]:
        """Most texts have none, which is soon found."""
        return re.compile("|".join(sorted({re.escape(token.content[:3]) for token in self._marks})))

    def _normalized(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(sound(text))

    @cached_property
    def _mark_finder(self) -> Backend:
        """Knows the marks, from 1 on, and takes all between two of them for one word, 0."""
        finder = Backend(models.WordLevel({"?": 0}, unk_token="?"))
        if self.backend.normalizer is not None:
            finder.normalizer = self.backend.normalizer
        finder.add_tokens(self._marks)
        return finder

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        with panics_as_errors("encoding"):
            encodings = self.backend.encode_batch_fast([sound(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_raw(self, text: str, most: int | None = None) -> list[int]:
        """A text to be continued as it is: with one BOS in front if this model's texts have one. As `encode`."""
        return self._begun(self.encode(text, most))

    def least_tokens(self, text: str) -> int:
        """No more than the tokens that `encode` makes of a text: as if each were the longest one."""
        if len(text) <= LONG_CHARS or self._longest_token is None:
            return 0
        return -(-len(text.encode(errors="replace")) // self._longest_token)

    @cached_property
    def _longest_token(self) -> int | None:
        return longest_token(self.backend)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Whole texts to learn: begun as `encode_raw` does, ended by EOS unless they have an end token already."""
        return [self._ended(self._begun(ids)) for ids in self.encode_batch(texts)]

    def _begun(self, ids: list[int]) -> list[int]:
        return [self.bos_id, *ids] if self.bos_id is not None and self.adds_bos and ids[:1] != [self.bos_id] else ids

    def _ended(self, ids: list[int]) -> list[int]:
        """Blanks behind the end token, as chat templates write them, do not make it another text."""
        last = next((token_id for token_id in reversed(ids) if self.decode([token_id]).strip()), None)
        return ids if last in self.eos_ids else [*ids, self.eos_id]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Bytes that are no valid UTF-8 become U+FFFD."""
        with panics_as_errors("decoding"):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The model's own chat template; None where the built-in format is meant: there is no other."""
        if self.template_source is not None:
            return ChatTemplate(self.template_source, self._origin)
        if (size := len(self.encode(USER))) > 1:
            from kogia import log  # brings rich along, for which verifier processes need not wait

            log.warn(
                f"{self._origin}: no chat template, so chats are written in DeepSeek-R1's format, whose marks are no "
                f"tokens of this model ({USER} is {size}); give it its own as {TEMPLATE_FILE}, or continue raw text"
            )
        return None

    @cached_property
    def template_source(self) -> str | None:
        """The text of `template`."""
        source = self.files.get(TEMPLATE_FILE, self.config.get("chat_template"))
        if isinstance(source, list):  # several templates by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default", named)
        if source is None or source == CHAT_TEMPLATE:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{self._origin}: chat_template is no text and none named 'default'; correct the file")
        return source

    @cached_property
    def adds_bos(self) -> bool:
        """Whether texts of this model start with BOS, by its configuration or by the post-processor of its file."""
        if self.bos_id is None:
            return False
        with panics_as_errors(f"{self._origin}: the post_processor of tokenizer.json"):
            return self.config.get("add_bos_token") is True or self.bos_id in self.backend.encode("").ids

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
        """The bytes one byte-level token stands for; empty for an id outside the vocabulary, as in `decode`."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """What `token_bytes` has found: a stream asks for each token again and again."""
        return {}

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[char] for char in token)
        except KeyError:  # an added token with characters outside the byte alphabet, e.g. <｜User｜>
            return token.encode()


def _is_tag(name: str) -> bool:
    """Whether it is more than a word or blanks."""
    return len(name.strip()) > 2 and any(not char.isalnum() and not char.isspace() for char in name)


def sound(text: str, name: str = "the text") -> str:
    """The text itself. ValueError that begins with `name` if it holds what no UTF-8 can, half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a surrogate pair, {text[error.start]!r} at character {error.start}, which is no text; "
            "repair what wrote it, or leave it out"
        ) from None
    return text


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains on `texts`; gives fewer than `vocab_size` tokens when the texts run out of repeated pairs to merge."""
    check_vocab_size(vocab_size)
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
    backend.train_from_iterator(cut_long_runs(texts), trainer)
    return Tokenizer(backend, _default_config())


def cut_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut where a word, or a run of blanks, goes on and on: merging takes the square of a word's length."""
    for text in texts:
        begin = 0
        for run in _LONG_RUN.finditer(text):
            yield text[begin : run.end()]
            begin = run.end()
        yield text[begin:]


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError for fewer tokens than `train_bpe` must give, or more than it can."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: must hold {len(SPECIAL_TOKENS)} special tokens and 256 bytes; "
            f"give at least {MIN_VOCAB_SIZE}"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size}: a tokenizer is trained of at most {MAX_VOCAB_SIZE} tokens")


def parse_backend(text: str, name: str) -> Backend:
    """The tokenizer of the text of a tokenizer.json; ValueError that begins with `name` if it is none to be run."""
    data = parse_object(text, f"{name}: not a tokenizer.json")
    try:
        check_tokenizer_file(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        with panics_as_errors(name):
            return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise ValueError(f"{name}: not a tokenizer.json ({error}); copy the file again or train a new one") from error


def _default_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _special_tokens(known: Mapping[str, Any]) -> dict[str, str]:
    """Names by role from tokenizer_config.json, else special_tokens_map.json; there plain or tables with `content`."""
    names: dict[str, str] = {}
    for role in SPECIAL_ROLES:
        value = known.get(role)
        name = value.get("content") if isinstance(value, dict) else value
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{role}={value!r:.100}: must be the token's text or null; correct the file")
        if name is not None:
            names[role] = name
    return names


def _name_of(backend: Backend, eos_ids: Sequence[int]) -> str:
    name = backend.id_to_token(eos_ids[0]) if eos_ids else None
    if name is None:
        raise ValueError("eos_token=None: tokenizer_config.json must name this token; add it to the file")
    return name


def _is_byte_level(backend: Backend) -> bool:
    """True for tokens in GPT-2's byte alphabet, False for text with byte fallback; ValueError for anything else."""
    decoder: Any = backend.decoder
    state: dict[str, Any] = {"type": None} if decoder is None else json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True
    # Streaming needs a token's text to depend on its neighbours only through runs of bytes and the first place.
    plain = all(_is_local(step) for step in steps)
    if not plain or ("Fuse" in kinds and set(kinds[kinds.index("Fuse") :]) - {"Fuse", "Strip"}):
        raise ValueError(
            f"tokenizer.json: decoder {kinds} is not supported; use a tokenizer of the DeepSeek, Qwen or Llama kind"
        )
    return False


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Strip":
        return step["start"] <= 1 and step["stop"] == 0
    if step["type"] == "Replace":
        return "String" in step["pattern"] and step["content"] != ""
    return step["type"] in ("ByteFallback", "Fuse", "Metaspace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest is moved to U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
