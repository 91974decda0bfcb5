"""Order parameters of many sites at once equal pymatgen's, motif by motif."""

import numpy as np
import pytest
from pymatgen.core import Lattice
from pymatgen.core.local_env import LocalStructOrderParams
from pymatgen.core.sites import PeriodicSite

from castbench.text.robocrystallographer.order_parameters import (
    BLOCK,
    MOTIFS,
    Angles,
    fingerprints,
    layout,
    stock_featurizer,
)

LABELS, WEIGHT_COLUMN, BY_CN = layout()
CASES = [(cn, *motif) for cn, motifs in BY_CN.items() for motif in motifs]
CELL = Lattice.cubic(1000)
IDEAL = {
    4: [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]],
    6: [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]],
    8: [[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)],
    12: [v for a in (1, -1) for b in (1, -1) for v in ([a, b, 0], [a, 0, b], [0, a, b])],
}


def pymatgen(vectors: np.ndarray, motif: str, parameters: dict) -> float:
    sites = [PeriodicSite("C", v, CELL, coords_are_cartesian=True) for v in ([0, 0, 0], *vectors)]
    order = LocalStructOrderParams([motif], parameters=[parameters or None])
    return order.get_order_parameters(sites, 0, indices_neighs=list(range(1, len(sites))))[0] or 0.0


@pytest.mark.parametrize(("cn", "column", "motif", "parameters"), CASES, ids=[LABELS[c[1]] for c in CASES])
def test_motif_equals_pymatgens(cn: int, column: int, motif: str, parameters: dict):
    rng = np.random.default_rng(cn)
    crooked = rng.normal(size=(4, cn, 3))
    near = [np.array(IDEAL[cn]) + rng.normal(scale=0.05, size=(cn, 3))] if cn in IDEAL else []
    batch = np.array([*crooked, *near])
    expected = [pymatgen(vectors, motif, parameters) for vectors in batch]
    assert MOTIFS[motif](Angles(batch), parameters) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("cn", "label"), [(4, "tetrahedral CN_4"), (6, "octahedral CN_6"), (12, "cuboctahedral CN_12")]
)
def test_ideal_motifs_are_recognised(cn: int, label: str):
    values, _ = fingerprints([np.array(IDEAL[cn], dtype=float)], [{cn: 1.0}])
    assert values[0, LABELS.index(label)] > 0.9


def test_parameters_count_by_the_weight_of_their_coordination_number():
    neighbours = np.random.default_rng(0).normal(size=(6, 3))
    values, _ = fingerprints([neighbours, neighbours], [{4: 1.0}, {6: 0.5, 4: 0.25, 0: 0.25}])
    tetrahedral, weight = LABELS.index("tetrahedral CN_4"), LABELS.index("wt CN_4")
    assert values[1, weight] == 0.25
    assert values[1, tetrahedral] == pytest.approx(0.25 * values[0, tetrahedral])
    assert values[0, LABELS.index("octahedral CN_6")] == 0 != values[1, LABELS.index("octahedral CN_6")]


def test_sites_beyond_a_block_and_large_numbers_of_neighbours():
    rng = np.random.default_rng(1)
    neighbours = list(rng.normal(size=(BLOCK + 3, 24, 3)))
    values, on_edge = fingerprints(neighbours, [{6: 0.7, 24: 0.3}] * len(neighbours))
    alone, _ = fingerprints(neighbours[-1:], [{6: 0.7, 24: 0.3}])
    assert values[-1] == pytest.approx(alone[0], abs=1e-12)
    assert (values[:, WEIGHT_COLUMN[24]] == 0.3).all() and not on_edge


def test_where_rounding_would_decide_is_said():
    square = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]] * 3)[:8]
    square[3:6] *= -1
    square[6:] += 0.3  # eight neighbours, pairs of them at right angles: where the formula of a cube jumps
    rng = np.random.default_rng(2)
    _, on_edge = fingerprints([rng.normal(size=(8, 3)), square], [{8: 1.0}] * 2)
    assert on_edge == {1}


def test_labels_are_the_stock_featurizers():
    assert stock_featurizer().feature_labels() == LABELS
    assert len(LABELS) == len(WEIGHT_COLUMN) + len(CASES)
