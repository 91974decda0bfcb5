"""The element descriptor matrix: no gap for any element, and nothing at padding."""

import math

import numpy as np
import pytest
from pymatgen.core import Element

from castbench.compositions import descriptors
from castbench.compositions.formulas import encode_formulas


@pytest.mark.parametrize("z", range(1, 119))
def test_every_element_has_ten_finite_properties(z: int):
    properties, imputed = descriptors.element_properties()
    row, missing = properties[z - 1], imputed[z - 1]
    assert np.isfinite(row).all()
    element = Element.from_Z(z)
    assert row[0] == z
    assert row[1] == pytest.approx(float(element.atomic_mass))
    assert (row[5], row[6]) == (element.group, element.row)
    assert row[7:].tolist() == [element.is_metal, element.is_transition_metal, element.is_metalloid]
    if not missing[3]:
        assert row[3] == pytest.approx(float(element.atomic_radius))
    assert missing[3] == (element.atomic_radius is None)
    assert missing[4] == (element.average_ionic_radius == 0)
    assert row[2:5].min() > 0


def test_missing_values_are_those_of_the_nearest_relative():
    properties, imputed = descriptors.element_properties()
    symbols = {Element.from_Z(z).symbol: z - 1 for z in range(1, 119)}
    for gap, relative, column in (("Fr", "Cs", 3), ("Xe", "Ar", 3), ("Cm", "Am", 3), ("Rf", "Hf", 2)):
        assert imputed[symbols[gap], column]
        assert properties[symbols[gap], column] == properties[symbols[relative], column]


def test_the_table_is_standardised_and_empty_at_padding():
    table = descriptors.element_table()
    assert table.shape == (119, 210)
    assert not table[0].any()
    numeric = table[1:, : 200 + descriptors.NUMERIC]
    assert np.isfinite(table).all()
    assert np.abs(numeric.mean(axis=0)).max() < 1e-4
    assert np.abs(numeric.std(axis=0) - 1).max() < 1e-3
    assert len({row.tobytes() for row in table}) == 119


def test_an_element_without_a_vector_never_passes_for_one(monkeypatch: pytest.MonkeyPatch):
    without = {symbol: vector for symbol, vector in descriptors.mat2vec().items() if symbol != "Og"}
    monkeypatch.setattr(descriptors, "mat2vec", lambda: without)
    table = descriptors.element_table.__wrapped__()
    assert np.isnan(table[118, :200]).all()
    assert np.isfinite(table[:118]).all()


def test_fractions_are_told_apart_on_all_scales():
    encoded = descriptors.encode_fractions(np.array([0.0, 0.001, 0.01, 0.2, 0.6, 1.0]))
    assert encoded.shape == (6, 256)
    assert not encoded[0].any()
    assert np.abs(encoded).max() <= 1
    start = 0
    for scale, width in descriptors.FRACTION_WIDTHS.items():
        part = encoded[1:, start : start + width]
        apart = np.linalg.norm(part[:, None] - part[None], axis=-1) + np.eye(5)
        assert apart.min() > 0.1, scale
        start += width


def test_scales_do_what_the_report_says():
    fractions = np.array([descriptors.LOWEST_FRACTION, 0.01, 1.0])
    scaled = descriptors.scaled_fractions(fractions)
    assert scaled["log"] == pytest.approx([0, 0.5, 1])
    assert scaled["sqrt"] == pytest.approx([0.01, 0.1, 1])
    assert scaled["linear"] == pytest.approx(fractions)


def test_the_matrix_joins_the_three_and_is_zero_at_padding():
    numbers, fractions = encode_formulas(["Al2O3"], 4)
    matrix = descriptors.descriptor_matrix(numbers, fractions)[0]
    assert matrix.shape == (4, descriptors.N_FEATURES) == (4, 466)
    assert not matrix[2:].any()
    assert matrix[0, :210] == pytest.approx(descriptors.element_table()[13])
    longest = 2 * math.pi / descriptors.LONGEST
    assert matrix[0, 210] == pytest.approx(math.sin(longest * 0.4), abs=1e-6)


def test_wavelengths_are_steps_of_one_ratio_between_the_longest_and_the_shortest():
    for width in descriptors.FRACTION_WIDTHS.values():
        wavelengths = 2 * math.pi / descriptors.frequencies(width)
        assert len(wavelengths) == width / 2
        assert wavelengths[[0, -1]] == pytest.approx([4.0, 0.01], rel=1e-6)
        assert np.ptp(wavelengths[1:] / wavelengths[:-1]) < 1e-5
