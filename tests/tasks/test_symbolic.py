import pytest

from kogia.tasks.latex import clean
from kogia.tasks.symbolic import read, relation_is_set, same_formula, same_relation


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}+\frac{31\sqrt{5}}{216}", r"\frac{108 + 31\sqrt{5}}{216}"),
        (r"10^{\frac{-5+\sqrt{13}}{6}}", r"10^{\frac{\sqrt{13} - 5}{6}}"),
        ("x^2-1", "(x-1)(x+1)"),
        (r"\tan^2(y)+1", r"\sec^2(y)"),
        (r"2\sin x\cos x", r"\sin(2x)"),
        (r"4\sqrt{2}", r"4\sqrt(2)"),
        ("6", "2(3)"),
        ("6", "(2)(3)"),
        ("6", r"\frac{4}{2}(3)"),
        (r"\frac{1}{2^{99}}", "2^{-99}"),
        ("2^{2023}", r"2 \cdot 2^{2022}"),
        ("3", r"\log_2 8"),
        ("f(x)+1", "1+f(x)"),
        ("e^{-200}", r"\frac{1}{e^{200}}"),
        (r"(-1)^{n+1}", "-(-1)^n"),
        (
            r"\begin{pmatrix}6 & 8\end{pmatrix}",
            r"\begin{pmatrix}1 & 2\end{pmatrix} + \begin{pmatrix}5 & 6\end{pmatrix}",
        ),
        (r"\sum_{k=0}^{n-1} F_k F_{n-k}", r"\sum_{k=0}^{n-1} F_{n-k} F_k"),
        ("1", r"\sum_{k=1}^\infty 2^{-k}"),
    ],
)
def test_equal_formulas_are_equal(gold, answer):
    assert same_formula(clean(gold), clean(answer))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}"),
        ("e^{-200}", "e^{-201}"),
        ("0", "e^{-200}"),
        ("20!", "20! + 1"),
        ("5", "2(3)"),
        ("x", r"\sqrt{x^2}"),
        ("x", "y"),
        ("f(x)", "f'(x)"),
        ("2 listen", "2 silent"),
        (r"\frac{silent}{2}", r"\frac{listen}{2}"),
        (r"\sum_{k=0}^{n-1} F_k F_{n-k}", r"\sum_{k=0}^{n-2} F_k F_{n-k}"),
        ("5", "x + 5"),
    ],
)
def test_other_formulas_are_not(gold, answer):
    assert not same_formula(clean(gold), clean(answer))


@pytest.mark.parametrize(
    "text",
    [
        r"5^\infty",
        r"\infty",
        r"\infty - \infty",
        r"\frac{\infty}{\infty}",
        "1^{-\\infty}",
        "9^{9^9}",
        "9^{9^{9^9}}",
        "((9!)!)!",
        "99999!",
        r"e^{9^{9^9}}",
        r"\sqrt{9^{9^9}}",
        r"\binom{99999999}{4444444}",
        r"\prod_{k=1}^{99999999} k",
        "1E99999999",
        "|x|" * 20,
        "x+" * 300 + "x",
        "3 4",
        "2 +",
        "101_2 + 1",
        "\\foo{",
    ],
)
def test_what_is_not_finite_not_bounded_or_not_whole_is_not_read(text):
    assert read(text) is None


@pytest.mark.parametrize("gold", [str(number) for number in range(0, 60, 3)])
@pytest.mark.parametrize("answer", [r"5^\infty", r"\infty^0", r"1^\infty", r"x^\infty"])
def test_no_infinity_equals_a_number(gold, answer):
    assert not same_formula(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (["2x+4y-3", "=", "0"], ["y", "=", r"-\frac{1}{2}x+\frac{3}{4}"], True),
        (["x^2/4 + y^2/3", "=", "1"], ["x^2/16 + y^2/12", "=", "1/4"], True),
        (["x", "<", "1"], ["-x", ">", "-1"], True),
        (["x", "<", "1"], ["x", ">", "1"], False),
        (["x", r"\leq", "1"], ["x", "<", "1"], False),
        (["-2", "<", "x", "<", "7"], ["7", ">", "x", ">", "-2"], True),
        (["x", "=", "1"], ["y", "=", "1"], False),
        (["x^2", "=", "1"], ["x", "=", "1"], False),
    ],
)
def test_relations_are_equal_up_to_a_factor(gold, answer, equal):
    assert same_relation(gold, answer) == equal


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (["-793", "<", "a", "<", "10"], "(-793, 10)", True),
        (["x", r"\geq", "5"], r"[5, \infty)", True),
        (["x", r"\geq", "5"], r"(5, \infty)", False),
        (["1", r"\leq", "|z|", r"\leq", "2"], r"[-2,-1] \cup [1,2]", True),
        (["x + y", ">", "1"], r"(1, \infty)", False),
    ],
)
def test_a_relation_can_be_a_set(gold, answer, equal):
    assert relation_is_set(gold, answer) == equal
