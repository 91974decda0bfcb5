"""Formulas become arrays, and what cannot be one says why."""

import numpy as np
import pytest
from pymatgen.core import Composition

from castbench.compositions import descriptors
from castbench.compositions.formulas import check_fractions, encode_formulas, is_abx3, parse_formula
from castbench.materials.structures import RecordError


@pytest.mark.parametrize(
    ("given", "reduced"),
    [
        ("CaTiO3", "CaTiO3"),
        ("Ca2Ti2O6", "CaTiO3"),
        ("Ca(TiO3)", "CaTiO3"),
        ({"Ca": 0.2, "Ti": 0.2, "O": 0.6}, "CaTiO3"),
        ({"Al": 0.4, "O": 0.6, "N": None}, "Al2O3"),
        ({"Li": 1 / 3, "O": 1 / 6, "F": 0.5}, "Li2OF3"),
    ],
)
def test_formulas_and_fractions_are_read(given, reduced: str):
    assert parse_formula(given) == Composition(reduced)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("not a formula", "unreadable formula"),
        ("Ca(TiO3", "unreadable formula"),
        ("", "missing formula"),
        (None, "missing formula"),
        ({"Ca": 0.2, "O": 0.6}, "fractions do not sum to 1"),
        ({"Ca": 0.5, "Ti": -0.5, "O": 1.0}, "unreadable formula"),
        ({"Ca": "half", "O": 0.5}, "unreadable formula"),
        ("CaTiXx3", "element without embedding"),
    ],
)
def test_what_is_no_formula_says_why(given, reason: str):
    with pytest.raises(RecordError) as error:
        parse_formula(given)
    assert error.value.reason == reason


def test_an_element_without_embedding_is_named(monkeypatch: pytest.MonkeyPatch):
    known = frozenset(descriptors.embedded_elements() - {"Og"})
    monkeypatch.setattr("castbench.compositions.formulas.embedded_elements", lambda: known)
    with pytest.raises(RecordError, match="Og") as error:
        parse_formula("CaOgO3")
    assert error.value.reason == "element without embedding"


@pytest.mark.parametrize(
    ("formula", "counts"),
    [
        ("CaTiO3", True),
        ("Ca2Ti2O6", True),
        ("Ca3SnO", True),
        ("CaO3", False),
        ("Ca2TiO4", False),
        ("K2NaAlF6", False),
    ],
)
def test_abx3_is_three_elements_in_one_ratio(formula: str, counts: bool):
    assert is_abx3(Composition(formula)) is counts


def test_slots_hold_numbers_and_fractions():
    numbers, fractions = encode_formulas(["CaTiO3", "Al2O3"], 4)
    assert numbers.tolist() == [[20, 22, 8, 0], [13, 8, 0, 0]]
    assert fractions == pytest.approx(np.array([[0.2, 0.2, 0.6, 0], [0.4, 0.6, 0, 0]]))
    check_fractions(numbers, fractions)


def test_more_elements_than_slots_are_refused():
    with pytest.raises(RecordError, match=r"compositions.max_elements is 4") as error:
        encode_formulas(["LiNaKRbCsO3"], 4)
    assert error.value.reason == "more elements than slots"


def test_packed_fractions_that_do_not_sum_are_refused():
    numbers, fractions = encode_formulas(["CaTiO3", "Al2O3"], 4)
    fractions[1, 1] = 0.5
    with pytest.raises(ValueError, match=r"composition 1: fractions sum to 0\.9"):
        check_fractions(numbers, fractions)
    numbers[1, 1], fractions[1, 0] = 0, 0.5
    with pytest.raises(ValueError, match="without an element"):
        check_fractions(numbers, fractions)


def test_fractions_may_be_off_by_rounding_alone():
    assert parse_formula({"Li": 0.3333, "O": 0.6667}) == Composition("LiO2")
    assert parse_formula({"Li": 0.33, "O": 0.67}) == Composition("Li33O67")
    with pytest.raises(RecordError, match=r"they sum to 0\.99"):
        parse_formula({"Ca": 0.2, "Ti": 0.2, "O": 0.59})
