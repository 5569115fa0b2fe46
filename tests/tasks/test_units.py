import pytest

from kogia.tasks.units import MEASURES, UNITS


@pytest.mark.parametrize("word", ["apples", "apple", "boxes", "children", "dollars", "km", "inches", "per", "°"])
def test_units_stand_in_singular_and_plural(word):
    assert word in UNITS


@pytest.mark.parametrize(
    "word",
    "zero one two ten twenty hundred hundreds thousand million billions trillion dozen dozens score gross pair couple "
    "lakh crore half halves third thirds quarter quarters fourth tenth tenths hundredth hundredths thousandths squared "
    "cubed factorial plus minus over by doubled twice triple percent or and not more less fewer most least than to up "
    "about below above pi e i x tau infinity mod choose K k M".split(),
)
def test_no_word_that_changes_a_value_is_a_unit(word):
    assert word not in UNITS


def test_spellings_of_a_measure_have_one_name():
    assert MEASURES["metres"] == MEASURES["m"] != MEASURES["cm"]
    assert MEASURES["hrs"] == MEASURES["hours"]
