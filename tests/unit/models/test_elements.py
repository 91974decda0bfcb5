import numpy as np
import pytest

from castbench.models.elements import element_facts


@pytest.fixture(scope="module")
def facts():
    return element_facts()


def test_four_numbers_are_standardised_over_the_elements(facts):
    assert facts.shape == (118, 18)
    assert np.isfinite(facts).all()
    np.testing.assert_allclose(facts[:, :4].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(facts[:, :4].std(axis=0, ddof=1), 1, atol=1e-5)


def test_extremes_belong_to_the_known_elements(facts):
    assert facts[:, 0].argmin() + 1 == 1  # hydrogen is lightest
    assert facts[:, 2].argmax() + 1 == 9  # fluorine is most electronegative
    assert facts[:, 3].argmax() + 1 == 2  # helium is hardest to ionise


def test_oxidation_states_set_the_reference_bits(facts):
    bits = facts[:, 4:]
    assert set(np.unique(bits)) == {0, 1}
    assert np.flatnonzero(bits[26 - 1]).tolist() == [9, 10]  # Fe: +2, +3
    assert np.flatnonzero(bits[9 - 1]).tolist() == [6]  # F: -1
    assert np.flatnonzero(bits[25 - 1]).tolist()[0] == 0  # Mn: +7 wraps to the bit of -7


def test_gaps_hold_the_reference_values(facts):
    """Two elements without a value get the same one: between the smallest and the largest that are known."""
    for column, pair in (
        (1, (110, 118)),
        (2, (2, 118)),
        (3, (112, 118)),
    ):  # radius, electronegativity, energy
        first, second = (facts[z - 1, column] for z in pair)
        assert first == second
        assert facts[:, column].min() < first < facts[:, column].max()
    for column, missing, value, known in (
        (1, 118, 209.46, {1: 110, 55: 343}),  # pm
        (2, 2, 1.18, {55: 0.79, 9: 3.98}),  # Pauling
        (3, 109, 8.0, {55: 3.894, 2: 24.587}),  # eV; pymatgen has a placeholder
    ):
        line = np.polyfit([facts[z - 1, column] for z in known], [*known.values()], 1)
        assert np.polyval(line, facts[missing - 1, column]) == pytest.approx(value, abs=0.01)
