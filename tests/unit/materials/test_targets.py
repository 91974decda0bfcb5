import numpy as np
import pyarrow as pa
import pytest

from castbench.materials.records import LABELS
from castbench.materials.targets import target_values


def test_energies_are_taken_as_they_are_and_null_is_nan():
    table = pa.table({"band_gap": pa.array([1.5, None, 0.0])})
    np.testing.assert_array_equal(target_values(table, "band_gap"), [1.5, np.nan, 0.0])


def test_moduli_become_logarithms_and_the_impossible_ones_nan():
    table = pa.table({"k_vrh": pa.array([100.0, None, 0.0, -5.0])})
    np.testing.assert_array_equal(target_values(table, "log_bulk_modulus"), [2.0, np.nan, np.nan, np.nan])


def test_column_of_nulls_alone():
    table = pa.table({"g_vrh": pa.array([None, None], pa.float64())})
    assert np.isnan(target_values(table, "log_shear_modulus")).all()


@pytest.mark.parametrize(
    ("target", "column"),
    [
        ("total_energy", "energy_per_atom"),
        ("formation_energy", "formation_energy_per_atom"),
        ("band_gap", "band_gap"),
        ("energy_above_hull", "energy_above_hull"),
        ("log_shear_modulus", "g_vrh"),
        ("log_bulk_modulus", "k_vrh"),
    ],
)
def test_every_target_has_its_column(target, column):
    values = {name: [1.0] for name in LABELS} | {column: [10.0]}
    expected = 1.0 if target.startswith("log") else 10.0
    assert target_values(pa.table(values), target) == [expected]
