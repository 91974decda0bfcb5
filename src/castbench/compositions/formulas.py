"""Formulas as arrays: parsing, the ABX3 rule, and the element slots that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pymatgen.core import Composition

from castbench.compositions.descriptors import embedded_elements
from castbench.materials.structures import RecordError

ABX3 = (1, 1, 3)
SUM_TOLERANCE = 1e-3  # of atomic fractions that are given as such


def parse_formula(given: Any) -> Composition:
    """Read a formula ("CaTiO3", "Ca(TiO3)2"), or a mapping of elements to atomic fractions that sum to 1.

    Returns:
        The reduced composition.

    Raises:
        RecordError: it does not parse, has an element without a mat2vec embedding, or its fractions do not
            sum to 1.
    """
    if isinstance(given, Mapping):
        amounts: Any = _fractions(given)
    elif isinstance(given, str) and given.strip():
        amounts = given.strip()
    else:
        raise RecordError("missing formula", "it has no formula")
    try:
        composition = Composition(amounts)
        symbols = [element.symbol for element in composition.elements]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError("unreadable formula", f"{given!r}: {error}") from None
    if not symbols:
        raise RecordError("unreadable formula", f"{given!r}: no element in it")
    unknown = [symbol for symbol in symbols if symbol not in embedded_elements()]
    if unknown:
        raise RecordError("element without embedding", f"{given!r}: mat2vec has no vector for {unknown[0]}")
    return composition.reduced_composition


def _fractions(given: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers in the ratio of atomic fractions."""
    present = {symbol: value for symbol, value in given.items() if value is not None}
    try:
        values = np.array([float(value) for value in present.values()])
    except (TypeError, ValueError):
        raise RecordError("unreadable formula", f"{dict(given)!r}: a fraction is no number") from None
    if not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise RecordError("unreadable formula", f"{dict(given)!r}: fractions must be positive")
    if abs(values.sum() - 1) > SUM_TOLERANCE:
        raise RecordError("fractions do not sum to 1", f"{dict(given)!r}: they sum to {values.sum():.4g}")
    atoms = next((n for n in range(1, 1001) if np.abs(values * n - np.rint(values * n)).max() < 5e-3), None)
    if atoms is None:
        raise RecordError("unreadable formula", f"{dict(given)!r}: no ratio of up to 1,000 atoms")
    whole = np.rint(values * atoms).astype(int)
    return {symbol: int(n) for symbol, n in zip(present, whole, strict=True) if n}


def is_abx3(composition: Composition) -> bool:
    """Whether a formula counts as a perovskite's: exactly three elements, 1 : 1 : 3 once reduced.

    A rule on formulas alone: which structure a compound has, and which of the two is A, plays no part, so
    antiperovskites (Ca3SnO) and ABX3 compounds of other structure types count as well.
    """
    return tuple(sorted(composition.reduced_composition.values())) == ABX3


def encode_formulas(formulas: Sequence[Any], max_elements: int) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers (n, max_elements) uint8 and atomic fractions (n, max_elements) float32, 0 at padding.

    Elements stand in the order of the formula.

    Raises:
        RecordError: a formula that `parse_formula` refuses, or with more elements than slots.
    """
    numbers = np.zeros((len(formulas), max_elements), dtype=np.uint8)
    fractions = np.zeros((len(formulas), max_elements), dtype=np.float32)
    for row, formula in enumerate(formulas):
        composition = parse_formula(formula)
        check_slots(composition, max_elements)
        for slot, (element, amount) in enumerate(composition.items()):
            numbers[row, slot] = element.Z
            fractions[row, slot] = amount / composition.num_atoms
    return numbers, fractions


def check_slots(composition: Composition, max_elements: int) -> None:
    """Refuse a composition with more elements than slots.

    Raises:
        RecordError: it has more.
    """
    if len(composition) > max_elements:
        raise RecordError(
            "more elements than slots",
            f"{composition.reduced_formula}: {len(composition)} elements, "
            f"compositions.max_elements is {max_elements}",
        )


def check_fractions(numbers: np.ndarray, fractions: np.ndarray) -> None:
    """Check packed compositions before a model reads them.

    Raises:
        ValueError: fractions of a row do not sum to 1, or stand at padding.
    """
    sums = fractions.sum(axis=1)
    if len(wrong := np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)):
        raise ValueError(f"composition {wrong[0]}: fractions sum to {sums[wrong[0]]:.4g}, not 1")
    if ((numbers == 0) != (fractions == 0)).any():
        raise ValueError("a fraction without an element, or an element without a fraction")
