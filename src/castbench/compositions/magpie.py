"""Magpie's features of formulas, for the random forest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matminer.featurizers.composition import ElementProperty
from pymatgen.core import Composition

from castbench.provenance import atomic_path


def featurize_compositions(compositions: Path, output: Path) -> None:
    """Write Magpie's features of every formula (Ward et al. 2016), as matminer computes them.

    Args:
        compositions: table of aggregate_compositions.
        output: Parquet file: formula and one column a feature; NaN where an element's property is unknown.
    """
    featurizer = ElementProperty.from_preset("magpie", impute_nan=False)
    formulas = pq.read_table(compositions, columns=["formula"])["formula"].to_pylist()
    rows = np.array([featurizer.featurize(Composition(formula)) for formula in formulas], dtype=np.float32)
    columns = {"formula": formulas} | dict(zip(featurizer.feature_labels(), rows.T, strict=True))
    with atomic_path(output) as partial:
        pq.write_table(pa.table(columns), partial, compression="zstd")
