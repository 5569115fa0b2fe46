from fractions import Fraction

import pytest

from kogia.tasks.latex import clean
from kogia.tasks.numerals import Quantity, parse_number, read_quantity, same_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("2½", Fraction(5, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"\dfrac{0.5}{2}", Fraction(1, 4)),
        ("1 / 2", Fraction(1, 2)),
        ("-1./3", Fraction(-1, 3)),
        (r"2.01\times10^{2}", 201),
        ("2.01 × 10^2", 201),
        ("4.5E33", 45 * 10**32),
        ("1e-3", Fraction(1, 1000)),
        ("10^5", 100_000),
        ("−5", -5),
        ("-$5", -5),
        ("1 000", 1000),
        (r"14{,}916", 14916),
        (r"11,\! 111,\! 100", 11_111_100),
        (r"\text{0.8}", Fraction(4, 5)),
        (r"\text{7 apples}", 7),
        (r"15\mbox{ cm}^2", 15),
        ("90^\\circ", 90),
        ("60 km/h", 60),
        ("12 square meters", 12),
        (r"0.06 \text{ yuan}", Fraction(3, 50)),
    ],
)
def test_numbers_are_read_whole(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "5 3",
        "3 4",
        "5 3/x",
        "48, 384",
        "1,23",
        "18 or 19",
        "2 hours 30 minutes",
        "5x",
        "5m",
        "3 pi",
        "3 tau",
        "5 squared",
        "5 cubed",
        "5 hundredths",
        "7 tenths",
        "3 quarters",
        "5 or more",
        "5 at least",
        "4 score",
        "5 gross",
        "5 K",
        "1/0",
        "5 million",
        "5 thousands",
        "2 dozen",
        "3 billion",
        "9^{999}",
        "1e99999",
        "1^" + "9" * 50,
        "101_2",
        "x",
        "",
        "-",
    ],
)
def test_what_is_another_value_is_no_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"), [("18 million", 18_000_000), ("2 dozen eggs", 24), ("5 hundred thousands", 500_000)]
)
def test_words_that_multiply_do(text, value):
    found = read_quantity(text)
    assert found is not None
    assert (found.value, found.scaled) == (value, True)


@pytest.mark.parametrize(("text", "value"), [("101_2", 5), ("(204)_{5}", 54), ("-1A_{16}", -26), ("101_{10}", 101)])
def test_a_base_is_part_of_the_number(text, value):
    found = read_quantity(text)
    assert found is not None and found.value == value


@pytest.mark.parametrize("text", ["x_2", "12_2", "9_1", "10_{40}"])
def test_an_index_that_is_no_base_is_no_number(text):
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("3244047.0999999996", "3244047.1", True),
        ("3244047.1", "3244047.0999999996", True),
        ("0.30000000000000004", "0.3", True),
        ("3244047.14", "3244047.1", False),
        ("1/3", "0.333333", True),
        ("0.1428571428571428", "0.142857", True),
        ("1/3", "0.33333", False),
        ("2/3", "0.666666", False),
        ("18", "17.9999999", False),
        ("17.9999999", "18", False),
        ("1.6e-19", "9.1e-31", False),
        ("1.6e-19", "1.7e-19", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("28%", "28", True),
        ("0.28", "28%", True),
        ("0.28", "28", False),
        ("101_2", "101", False),
        ("101_2", "101_3", False),
        ("5 m", "5 cm", False),
        ("5 m", "5 meters", True),
        ("5", "5 cm", True),
    ],
)
def test_quantities_are_compared_by_value(gold, answer, equal):
    sides = [read_quantity(clean(text)) for text in (gold, answer)]
    assert all(isinstance(side, Quantity) for side in sides)
    assert same_quantity(*sides) == equal
