"""Markdown that a model writes, as HTML that a page may show while it grows.

`render` is a pure function from a text to blocks of HTML. `GrowingText` gives the same blocks piece by piece: a block
that a later one follows stands, and only the last is rendered again. That holds because what a block is depends on no
later line: link references, which reach back, are off, and boundaries are looked for in whole lines alone.

Nothing of the text comes through as HTML. The parser escapes it, and what its renderer makes passes an allow-list.
"""

import re
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block import table as parse_table
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES

from kogia.serve.page.formulas import add_formulas

MOST_HIGHLIGHTED = 20_000
"""Characters of code beyond which it is shown without colours."""
MOST_LABEL_STEPS = 2_000_000
"""Of a paragraph: opening brackets times characters. For each of them the parser looks for the end of a label, so
a paragraph of nothing else would take minutes. Beyond this it is shown as it is written."""
MOST_PARAGRAPH = 50_000
"""Characters of a paragraph, or another run of text, beyond which it is shown as it is written."""
MOST_COLUMNS = 100
"""Of a table: what has more is none."""
MOST_CELLS = 5_000
"""Of a table: the rows behind them are text. A cell is a dozen objects, and while Python looks through a million of
them for garbage, the server stands still."""
LANGUAGES = frozenset(
    "bash c c++ cpp csharp css diff docker dockerfile go haskell html ini java javascript js json julia kotlin latex "
    "lua make makefile nix ocaml perl php powershell py python r rb ruby rs rust scala sh shell sql swift tex toml ts "
    "typescript xml yaml yml zig".split()
)
"""What code may name itself for colours."""
PAUSE_FACTOR = 10
"""After a rendering the next one waits so many times as long as it took: at most a tenth of a core goes into it."""

_MATH_TAGS = frozenset(
    "math menclose merror mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace msqrt "
    "mstyle msub msubsup msup mtable mtd mtext mtr munder munderover".split()
)
_MATH_ATTRIBUTES = set(
    "accent columnalign columnlines columnspacing depth display displaystyle fence form frame height largeop "
    "linebreak linethickness lspace mathcolor mathsize mathvariant maxsize minsize movablelimits notation rowlines "
    "rowspacing rspace scriptlevel separator stretchy symmetric voffset width".split()
)
_TEXT_TAGS = frozenset(
    "a blockquote br code div em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul".split()
)
_STARS = re.compile(r"(?:(?<=\d)\*+|(?<=\))\*)(?=[\d(])", re.ASCII)
_PLAIN = re.compile(r"[\w#.+\- ]{0,60}")
"""What an attribute may say that is no link: a size, a colour, a language."""


def _keep(tag: str, attribute: str, value: str) -> str | None:
    return value if attribute == "href" or _PLAIN.fullmatch(value) else None


_CLEANER = nh3.Cleaner(
    tags=set(_TEXT_TAGS | _MATH_TAGS),
    attributes={
        "a": {"href", "target"},
        "ol": {"start"},
        "pre": {"data-language"},
        **{tag: set(_MATH_ATTRIBUTES) for tag in _MATH_TAGS},
    },
    attribute_filter=_keep,
    allowed_classes={
        "code": {"formula"},
        "p": {"formula"},
        "div": {"scroll"},
        "span": set(STANDARD_TYPES.values()) - {""},
        "td": {"left", "center", "right"},
        "th": {"left", "center", "right"},
    },
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
)
_FORMATTER = HtmlFormatter(nowrap=True)


@dataclass(frozen=True)
class Change:
    """The first `kept` blocks stay as they are; `blocks` follow them, whatever stood there."""

    kept: int
    blocks: list[str]


def render(text: str) -> list[str]:
    """Safe HTML of the top-level blocks of a Markdown text, in order."""
    return [_html(tokens) for tokens in _blocks(_MARKDOWN.parse(normalised(text)))]


def normalised(text: str) -> str:
    """With line feeds for line ends, and without the character that no document may hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")


class GrowingText:
    """A text that comes in pieces. However it is cut, all changes together make `render` of the whole."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open = ""
        """The text from the first line that is not in a standing block."""
        self._pieces: list[str] = []
        self._num_standing = 0
        self._resume_at = 0.0

    def push(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def change(self) -> Change | None:
        """What the text pushed since the last change does to the blocks; None where it is too early to say again."""
        began = self._clock()
        if not self._pieces or began < self._resume_at:
            return None
        change = self._change(is_end=False)
        ended = self._clock()
        self._resume_at = ended + PAUSE_FACTOR * (ended - began)
        return change

    def finish(self) -> Change:
        """The rest, when no more text comes."""
        return self._change(is_end=True)

    def _change(self, *, is_end: bool) -> Change:
        pushed, kept = "".join(self._pieces), self._num_standing
        held = "\r" if pushed.endswith("\r") and not is_end else ""  # may be half a line end
        self._pieces = [held] if held else []
        self._open += normalised(pushed[: len(pushed) - len(held)])
        standing = self._take_standing()
        self._num_standing += len(standing)
        return Change(kept, [*standing, *render(self._open)])

    def _take_standing(self) -> list[str]:
        """Cut off and render all but the last block of the lines that are whole."""
        whole = self._open[: self._open.rfind("\n") + 1]
        tokens: list[Token] = []
        _MARKDOWN.block.parse(whole, _MARKDOWN, {}, tokens)
        starts = [token.map[0] for token in tokens if token.level == 0 and token.nesting >= 0 and token.map]
        if len(starts) < 2:
            return []
        cut = _line_start(whole, starts[-1])
        self._open, standing = self._open[cut:], whole[:cut]
        return render(standing)


def _line_start(text: str, line: int) -> int:
    position = 0
    for _ in range(line):
        position = text.index("\n", position) + 1
    return position


def _blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each top-level block."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _html(tokens: list[Token]) -> str:
    return _CLEANER.clean(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


# The parser -----------------------------------------------------------------------------------------------------------


def _make_parser() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    markdown.disable(["reference", "html_block", "html_inline"])
    markdown.validateLink = _is_safe_link  # type: ignore[method-assign]
    markdown.block.ruler.at("table", _bounded_table, {"alt": ["paragraph", "reference"]})
    _bound_inline(markdown)
    add_formulas(markdown)
    markdown.inline.ruler.before("emphasis", "product", _product)
    markdown.add_render_rule("fence", lambda _, tokens, at, *__: _code(tokens[at].content, tokens[at].info))
    markdown.add_render_rule("code_block", lambda _, tokens, at, *__: _code(tokens[at].content, ""))
    markdown.add_render_rule("image", _image)
    markdown.add_render_rule("link_open", _link)
    markdown.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    for cell in ("th_open", "td_open"):
        markdown.add_render_rule(cell, _cell)
    return markdown


def _bounded_table(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """Where a table ends depends on no line that comes later, as everywhere here."""
    columns = max(1, state.src.count("|", state.bMarks[first], state.eMarks[first]))
    last = first + 2 + MOST_CELLS // columns
    return columns <= MOST_COLUMNS and parse_table(state, first, min(end, last), silent)


def _bound_inline(markdown: MarkdownIt) -> None:
    parse = markdown.inline.parse

    def bounded(src: str, md: MarkdownIt, env: MutableMapping[str, Any], tokens: list[Token]) -> list[Token]:
        if len(src) <= MOST_PARAGRAPH and src.count("[") * len(src) <= MOST_LABEL_STEPS:
            return parse(src, md, env, tokens)
        tokens.append(Token("text", "", 0, content=src))
        return tokens

    markdown.inline.parse = bounded  # type: ignore[method-assign]


def _product(state: StateInline, silent: bool) -> bool:
    """Stars between numbers are what they are in arithmetic, and make nothing slanted or bold."""
    found = _STARS.match(state.src, state.pos)
    if found is None:
        return False
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


def _is_safe_link(url: str) -> bool:
    return url.lower().startswith(("https://", "http://", "mailto:"))


def _link(renderer: Any, tokens: Sequence[Token], at: int, options: Any, env: MutableMapping[str, Any]) -> str:
    return f'<a href="{escape(str(tokens[at].attrGet("href") or ""))}" target="_blank">'


def _image(renderer: Any, tokens: Sequence[Token], at: int, options: Any, env: MutableMapping[str, Any]) -> str:
    """As a link: the page loads nothing from elsewhere."""
    source, words = str(tokens[at].attrGet("src") or ""), tokens[at].content
    return f'<a href="{escape(source)}" target="_blank">{escape(words or source)}</a>'


def _cell(renderer: Any, tokens: Sequence[Token], at: int, options: Any, env: MutableMapping[str, Any]) -> str:
    side = str(tokens[at].attrGet("style") or "").removeprefix("text-align:")
    return f'<{tokens[at].tag} class="{escape(side)}">' if side else f"<{tokens[at].tag}>"


def _code(code: str, info: str) -> str:
    language = (info.split() or [""])[0].lower()[:40]
    inner = escape(code)
    if language in LANGUAGES and len(code) <= MOST_HIGHLIGHTED:
        inner = highlight(code, get_lexer_by_name(language, stripnl=False, ensurenl=False), _FORMATTER)
    return f'<pre data-language="{escape(language)}"><code>{inner}</code></pre>\n'


_MARKDOWN = _make_parser()
