"""LaTeX in Markdown, as models write it: `$..$`, `$$..$$`, `\\(..\\)` and `\\[..\\]` become MathML.

A formula on lines of its own opens with `$$` or `\\[` and ends where it is closed, or before an empty line, which TeX
has none of inside a formula. So where it ends depends on no later line, and a text may be rendered as it grows.
"""

import re
from html import escape

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.ruler import RuleOptionsType
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

MOST_CHARS = 2000
"""Longer formulas are shown as they are written."""
_ENVIRONMENT = re.compile(r"(\\(?:begin|end)\s*\{)(aligned|gathered|gather\*?|equation\*?)\}")
_KNOWN = {"aligned": "split", "equation": "split", "equation*": "split"}
"""What the library calls environments that it does not know; the others are centred, as a matrix is."""
_INTERRUPTS: RuleOptionsType = {"alt": ["paragraph", "blockquote", "list"]}
_CLOSINGS = {"$$": "$$", r"\[": r"\]"}
_INLINE = re.compile(
    r"\$\$(?P<double>[^$]+)\$\$"
    r"|\$(?![\s$])(?P<single>[^$\n]*[^\s$\\])\$(?!\d)"
    rf"|\\\((?P<round>.{{1,{MOST_CHARS}}}?)\\\)"
    rf"|\\\[(?P<square>.{{1,{MOST_CHARS}}}?)\\\]",
    re.DOTALL,
)


def add_formulas(markdown: MarkdownIt) -> None:
    """Teach a parser formulas, and its renderer what to make of them."""
    markdown.block.ruler.before("fence", "formula_block", _block_rule, _INTERRUPTS)
    markdown.inline.ruler.before("escape", "formula", _inline_rule)
    markdown.add_render_rule("formula", lambda _, tokens, at, *__: mathml(tokens[at].content, tokens[at].markup))
    markdown.add_render_rule("formula_block", lambda _, tokens, at, *__: _shown_block(tokens[at].content))


def mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula, "inline" or as a "block"; its source, as code, where it cannot be read."""
    try:
        if len(latex) > MOST_CHARS:
            raise ValueError("too long")
        known = _ENVIRONMENT.sub(lambda found: f"{found[1]}{_KNOWN.get(found[2], 'matrix')}}}", latex)
        return convert(known, display=display)
    except Exception:  # noqa: BLE001 - the library raises whatever its parser stumbles over: KeyError, IndexError, ...
        return f'<code class="formula">{escape(latex)}</code>'


def _shown_block(source: str) -> str:
    opening = source[:2]
    inner, closing, rest = source[2:].partition(_CLOSINGS[opening])
    if not closing or rest.strip():  # still open, or no formula after all
        return f'<p class="formula">{escape(source)}</p>\n'
    return f'<p class="formula">{mathml(inner.strip(), "block")}</p>\n'


def _block_rule(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    if state.is_code_block(start) or _line(state, start)[:2] not in _CLOSINGS:
        return False
    if silent:
        return True
    last = _last_line(state, start, end)
    state.line = last + 1
    token = state.push("formula_block", "", 0)
    token.content = "\n".join(_line(state, line) for line in range(start, last + 1))
    token.map = [start, last + 1]
    token.block = True
    return True


def _last_line(state: StateBlock, start: int, end: int) -> int:
    """Of the formula that opens at `start`: the line that closes it, or the last before an empty or outer one."""
    opening = _line(state, start)[:2]
    line, text = start, _line(state, start)[2:]
    while _CLOSINGS[opening] not in text:
        if line + 1 >= end or state.isEmpty(line + 1) or state.sCount[line + 1] < state.blkIndent:
            break
        line += 1
        text = _line(state, line)
    return line


def _line(state: StateBlock, line: int) -> str:
    """Without its indentation."""
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]]


def _inline_rule(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    match = _INLINE.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        token = state.push("formula", "math", 0)
        token.content = match[match.lastgroup or 0].strip()
        token.markup = "block" if match.lastgroup in ("double", "square") else "inline"
    state.pos = match.end()
    return True
