"""Target values, in the target's unit, from the columns of materials.parquet."""

import numpy as np
import pyarrow as pa

from castbench.labels import TARGETS


def target_values(table: pa.Table, target: str) -> np.ndarray:
    """Values (n,) of `target` in its unit, float64: NaN where missing, or where there is no logarithm.

    Args:
        table: has the target's column; energies in eV/atom or eV, moduli in GPa.
        target: a name of `castbench.labels.TARGETS`.
    """
    values = column_values(table, TARGETS[target].column)
    if TARGETS[target].transform == "log10":
        return np.log10(values, out=np.full_like(values, np.nan), where=values > 0)
    return values


def column_values(table: pa.Table | pa.RecordBatch, column: str) -> np.ndarray:
    """A column of numbers (n,) as float64, NaN where it is null."""
    return table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
