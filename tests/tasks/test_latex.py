import re

import pytest

from kogia.tasks.latex import COMMA, RELATION, UNION, clean, divide, enclosed, split


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (r"$\left( \dfrac{1}{3} \right)$", r"( \frac{1}{3} )"),
        (r"\(x \le 5\)", r"x \leq 5"),
        (r"x>=5.", r"x\geq 5"),
        (r"\\frac{1}{2}", r"\frac{1}{2}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"6 \text{ and } 8", "6 and 8"),
        (r"\boxed{\boxed{3}}", "3"),
        ("**73**", "73"),
        ("2**3", "2**3"),
        (r"5\%", "5%"),
        ("28 percent", "28%"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"(\begin{bmatrix}1\\2\\\end{bmatrix})", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("√17 ≤ x", r"\sqrt{17} \leq x"),
        ("{1,2}", "1,2"),
        ("@@", "@@"),
    ],
)
def test_one_thing_has_one_spelling(text, cleaned):
    assert re.sub(r"\s+", " ", clean(text)) == cleaned


def test_brackets_of_every_kind_hold_their_content_together():
    assert split(r"(1,2), \{3,4\} and [5,6), f(x,y) or \begin{pmatrix}1,2\end{pmatrix}", COMMA) == [
        "(1,2)",
        r"\{3,4\}",
        "[5,6)",
        "f(x,y)",
        r"\begin{pmatrix}1,2\end{pmatrix}",
    ]
    assert split(r"[0,1) \cup (2,3]", UNION) == ["[0,1)", "(2,3]"]
    assert divide(r"-2 \leq f(a=1) < 7", RELATION) == (["-2", "f(a=1)", "7"], [r"\leq", "<"])


@pytest.mark.parametrize(
    ("text", "opening", "inner"),
    [("(1,2)", "(", "1,2"), ("(1)(2)", "(", None), ("[0,1)", "[", "0,1"), ("(1", "(", None), (r"\{1\}", "\\{", "1")],
)
def test_one_pair_of_brackets_must_enclose_all(text, opening, inner):
    assert enclosed(text, opening) == inner
