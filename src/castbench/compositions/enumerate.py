"""Candidate perovskites: every A, B and X on its site, and which of them chemistry allows.

A candidate is an ordered triple (A, B, X) of different elements for ABX3. Its ions must be charge-neutral and
in order of electronegativity, as SMACT tests it (Davies et al., Chem 1, 617, 2016), and fit together by the
tolerance factors of Goldschmidt (1926) and of Bartel et al. (Sci. Adv. 5, eaav0693, 2019), from Shannon's
radii. SMACT tests one candidate at a time; here all pairs of A and B ions are tested at once for each X.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import smact
from pymatgen.core import Element

from castbench.errors import InputError

STEPS = (
    "enumerated",
    "charge neutral",
    "electronegativities in order",
    "cations with anion, radii known",
    "Goldschmidt's t in its window",
    "Bartel's tau in its window",
)
COORDINATION = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9}
COORDINATION |= {"X": 10, "XI": 11, "XII": 12, "XIV": 14}
OXIDATION_SETS = {"icsd24": "oxidation_states_icsd24", "smact14": "oxidation_states_smact14"}


@dataclass(frozen=True)
class Ions:
    """Ions of some elements, one row an element and oxidation state.

    Attributes:
        numbers: (I,) atomic numbers.
        states: (I,) oxidation states.
        electronegativities: (I,) Pauling, NaN where there is none.
        radii_a: (I,) angstrom, on the A site: the coordination nearest to 12.
        radii_b: (I,) angstrom, on the B and X sites: the coordination nearest to 6.
    """

    numbers: np.ndarray
    states: np.ndarray
    electronegativities: np.ndarray
    radii_a: np.ndarray
    radii_b: np.ndarray

    def of(self, chosen: np.ndarray) -> Ions:
        """Some of the ions."""
        return Ions(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass
class Candidates:
    """The candidates of one X that are chemically allowed and whose radii are known, one row a formula.

    A and B may stand either way round: of the assignments to sites, one that fits the windows is taken.

    Attributes:
        a, b, x: (n,) atomic numbers.
        states: (n, 3) oxidation states of A, B and X.
        goldschmidt, bartel: (n,) tolerance factors t and tau (infinite where A is not the larger cation).
        in_window: (n,) bool, whether both are in their windows.
        counts: candidates left after each of `STEPS`.
    """

    a: np.ndarray
    b: np.ndarray
    x: np.ndarray
    states: np.ndarray
    goldschmidt: np.ndarray
    bartel: np.ndarray
    in_window: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


def shannon_radius(symbol: str, state: int, coordination: int) -> float:
    """Shannon's ionic radius (angstrom) at the nearest coordination, the larger of two; NaN where unknown.

    Of spin states the high one. Square-planar and pyramidal radii are not used.
    """
    known = Element(symbol).data.get("Shannon radii") or {}
    by_coordination: dict[int, float] = {}
    for name, spins in known.get(str(state), {}).items():
        if number := COORDINATION.get(name):
            chosen = spins.get("") or spins.get("High Spin") or next(iter(spins.values()))
            by_coordination[number] = float(chosen["ionic_radius"])
    if not by_coordination:
        return float("nan")
    nearest = min(by_coordination, key=lambda n: (abs(n - coordination), -n))
    return by_coordination[nearest]


def known_elements() -> list[str]:
    """Symbols of the elements that SMACT has data for, by atomic number: H to Lr."""
    return [Element.from_Z(z).symbol for z in range(1, 104)]


def ions(symbols: Sequence[str], oxidation_states: str = "icsd24") -> Ions:
    """The ions of elements; one without a common oxidation state has none.

    Raises:
        InputError: no such element.
    """
    rows: list[tuple[int, int, float, float, float]] = []
    for symbol in symbols:
        if symbol not in known_elements():
            raise InputError(f"compositions.screening: SMACT has no element {symbol!r}; leave it out")
        element = smact.Element(symbol)
        electronegativity = element.pauling_eneg
        for state in getattr(element, OXIDATION_SETS[oxidation_states]) or []:
            rows.append(
                (
                    Element(symbol).Z,
                    int(state),
                    float("nan") if electronegativity is None else float(electronegativity),
                    shannon_radius(symbol, int(state), 12),
                    shannon_radius(symbol, int(state), 6),
                )
            )
    columns: list[Any] = list(zip(*rows, strict=True)) or [()] * 5
    return Ions(
        np.array(columns[0], dtype=np.int16),
        np.array(columns[1], dtype=np.int8),
        *(np.array(column, dtype=np.float64) for column in columns[2:]),
    )


def goldschmidt(r_a: np.ndarray, r_b: np.ndarray, r_x: float | np.ndarray) -> np.ndarray:
    """Tolerance factor t = (r_A + r_X) / (sqrt 2 (r_B + r_X)); radii in angstrom."""
    return (r_a + r_x) / (np.sqrt(2) * (r_b + r_x))


def bartel(r_a: np.ndarray, r_b: np.ndarray, r_x: float | np.ndarray, n_a: np.ndarray) -> np.ndarray:
    """Tolerance factor tau = r_X / r_B - n_A (n_A - (r_A / r_B) / ln(r_A / r_B)); perovskites lie below 4.18.

    `n_a` is the oxidation state of A. Infinite where A is not the larger cation, for which it is not defined.
    """
    ratio = r_a / r_b
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = r_x / r_b - n_a * (n_a - ratio / np.log(ratio))
    return np.where(ratio > 1, tau, np.where(np.isnan(ratio), np.nan, np.inf))


def neutral(a: Ions, b: Ions, x_state: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (m,) of A ions and of B ions with which an X ion is neutral in ABX3."""
    i, j = np.nonzero(a.states[:, None].astype(np.int16) + b.states[None, :] == -3 * x_state)
    return i, j


def ordered(
    state_1: np.ndarray, eneg_1: np.ndarray, state_2: np.ndarray | int, eneg_2: np.ndarray | float
) -> np.ndarray:
    """Mask (m,): both electronegativities are known; of a cation and an anion, the anion's is larger."""
    wrong = (state_1 > 0) & (state_2 < 0) & (eneg_1 >= eneg_2)
    wrong |= (state_1 < 0) & (state_2 > 0) & (eneg_1 <= eneg_2)
    return ~wrong & ~np.isnan(eneg_1) & ~np.isnan(eneg_2)


def enumerate_candidates(settings: dict[str, Any]) -> Iterator[Candidates]:
    """Iterate over X, each with its allowed candidates; memory is that of one X.

    Args:
        settings: `a`, `b`, `x` (symbols, or None for every element that SMACT knows), `oxidation_states`,
            `goldschmidt` (lowest and highest t) and `bartel` (highest tau); either may be None.
    """
    sites = {name: settings[name] or known_elements() for name in ("a", "b", "x")}
    a, b = (ions(sites[name], settings["oxidation_states"]) for name in ("a", "b"))
    for symbol in sites["x"]:
        yield candidates_of(symbol, a, b, ions([symbol], settings["oxidation_states"]), sites, settings)


def candidates_of(
    symbol: str, a: Ions, b: Ions, x: Ions, sites: dict[str, list[str]], settings: dict[str, Any]
) -> Candidates:
    """The allowed candidates of one X."""
    z_x = Element(symbol).Z
    others_a, others_b = set(sites["a"]) - {symbol}, set(sites["b"]) - {symbol}
    found: list[np.ndarray] = []
    passed: dict[str, list[np.ndarray]] = {step: [] for step in STEPS[1:]}
    for row in range(len(x.states)):
        state, electronegativity = int(x.states[row]), x.electronegativities[row]
        i, j = neutral(a, b, state)
        apart = (a.numbers[i] != b.numbers[j]) & (a.numbers[i] != z_x) & (b.numbers[j] != z_x)
        i, j = i[apart], j[apart]

        def note(step: str, i: np.ndarray, j: np.ndarray) -> None:
            passed[step].append(np.unique(a.numbers[i].astype(np.int32) * 1000 + b.numbers[j]))

        note(STEPS[1], i, j)
        first, second = a.of(i), b.of(j)
        fits = ordered(first.states, first.electronegativities, second.states, second.electronegativities)
        fits &= ordered(first.states, first.electronegativities, state, electronegativity)
        fits &= ordered(second.states, second.electronegativities, state, electronegativity)
        i, j = i[fits], j[fits]
        note(STEPS[2], i, j)
        r_x = x.radii_b[row]
        fits = (a.states[i] > 0) & (b.states[j] > 0) & (state < 0)
        fits &= ~np.isnan(a.radii_a[i]) & ~np.isnan(b.radii_b[j]) & ~np.isnan(r_x)
        i, j = i[fits], j[fits]
        note(STEPS[3], i, j)
        t = goldschmidt(a.radii_a[i], b.radii_b[j], r_x)
        tau = bartel(a.radii_a[i], b.radii_b[j], r_x, a.states[i].astype(np.float64))
        fits = np.ones(len(i), dtype=bool)
        if settings["goldschmidt"] is not None:
            low, high = settings["goldschmidt"]
            fits = (t >= low) & (t <= high)
        note(STEPS[4], i[fits], j[fits])
        if settings["bartel"] is not None:
            fits &= tau <= settings["bartel"]
        note(STEPS[5], i[fits], j[fits])
        state_x = np.full(len(i), state)
        found.append(
            np.stack([a.numbers[i], b.numbers[j], a.states[i], b.states[j], state_x, t, tau, fits], axis=1)
        )
    counts = {STEPS[0]: sum(len(others_b - {first}) for first in others_a)}
    counts |= {step: len(np.unique(np.concatenate(keys))) if keys else 0 for step, keys in passed.items()}
    return one_a_formula(np.concatenate(found or [np.zeros((0, 8))]), z_x, counts)


def one_a_formula(rows: np.ndarray, z_x: int, counts: dict[str, int]) -> Candidates:
    """Keep of a formula's assignments (n, 8) one in the windows, of lowest tau, of t nearest to 1."""
    low, high = rows[:, :2].min(axis=1), rows[:, :2].max(axis=1)
    order = np.lexsort((np.abs(rows[:, 5] - 1), rows[:, 6], -rows[:, 7], high, low))
    rows, low, high = rows[order], low[order], high[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    rows = rows[first]
    return Candidates(
        rows[:, 0].astype(np.uint8),
        rows[:, 1].astype(np.uint8),
        np.full(len(rows), z_x, dtype=np.uint8),
        rows[:, 2:5].astype(np.int8),
        rows[:, 5],
        rows[:, 6],
        rows[:, 7].astype(bool),
        counts,
    )
