from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.tasks.expression import MAX_DEPTH, MAX_LENGTH, parse_expression


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("(15-4)+6", 17, (15, 4, 6)),
        (" 1 + 2*3 ", 7, (1, 2, 3)),
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),
        ("10/4", Fraction(5, 2), (10, 4)),
        ("3-5", -2, (3, 5)),
        ("7", 7, (7,)),
        ("((((7))))", 7, (7,)),
        ("1/(2-2)", None, (1, 2, 2)),
        ("1+1/0*2", None, (1, 1, 0, 2)),
        ("1/3+1/3+1/3", 1, (1, 3, 1, 3, 1, 3)),
    ],
)
def test_values_are_exact(text, value, numbers):
    expression = parse_expression(text)
    assert (expression.value, expression.numbers) == (value, numbers)


REFUSED = [
    "", "()", "1+", "2**3", "9**9**9", "7//2", "7%2", "-3+5", "+3", "3+-2", "3--2", "4 6", "4(6)", "(4)(6)", "1.5*2",
    "1e3", "1_0", "0x1f", "0b1", "007", "1,2", "[1]", "x+1", "abs(3)", "__import__('os')", "1 if 1 else 2", "1==1",
    "1<2", "~3", "1<<9", "3&1", "3|1", "3^1", "not 1", "'a'*3", "1\n+2", "1\t+2", "１５-4", "٣+1", "5×3", "6÷2", "3−1",
    "²", "1+2=3", "a:=3", "lambda:1", "1+2#", "1;2", "2+(3", "2+3)", "1j", "True+1", "1234567", "()+1", "1 +\\\n2",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError):
        parse_expression(text)


def test_long_and_deep_expressions_are_refused():
    with pytest.raises(ValueError, match="at most"):
        parse_expression("1+" * MAX_LENGTH + "1")
    with pytest.raises(ValueError, match="nested deeper"):
        parse_expression("1+" * (MAX_DEPTH + 1) + "1")
    assert parse_expression("1+" * MAX_DEPTH + "1").value == MAX_DEPTH + 1
    with pytest.raises(ValueError):
        parse_expression("(" * 95 + "1" + ")" * 95 + "(")


def test_an_operator_that_is_not_allowed_is_refused():
    assert parse_expression("3-1", "+-").value == 2
    with pytest.raises(ValueError, match=r"operator \* is not allowed"):
        parse_expression("3*1", "+-")


@given(st.text(alphabet="0123456789+-*/() .,_eEjx\n１²", max_size=20))
def test_nothing_but_a_value_or_a_value_error_comes_out(text):
    """Where something is accepted, Python's own arithmetic on fractions agrees."""
    try:
        expression = parse_expression(text)
    except ValueError:
        return
    wrapped = "".join(f"F({part})" if part.isdigit() else part for part in _tokens(text))
    try:
        expected = eval(wrapped, {"F": Fraction})  # noqa: S307 - the text consists of digits and + - * / ( )
    except ZeroDivisionError:
        expected = None
    assert expression.value == expected


def _tokens(text):
    token = ""
    for char in text:
        if char.isdigit():
            token += char
            continue
        if token:
            yield token
        token = ""
        yield char
    if token:
        yield token


def test_expressions_compare_as_the_numbers_they_use():
    assert sorted(parse_expression("(6-4)*15").numbers) == [4, 6, 15]
