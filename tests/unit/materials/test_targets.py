import numpy as np
import pyarrow as pa

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
