"""Enumeration and chemistry: the same answers as SMACT's own, and tolerance factors as published."""

import itertools
import random

import numpy as np
import pytest
import smact
from pymatgen.core import Element
from smact.screening import smact_filter

from castbench.compositions import enumerate as enumeration
from castbench.errors import InputError

OPEN = {"oxidation_states": "icsd24", "goldschmidt": None, "bartel": None}


def by_formula(**settings) -> dict[frozenset, dict]:
    """Candidates by ({A, B}, X)."""
    found = {}
    for candidates in enumeration.enumerate_candidates(OPEN | settings):
        for row in range(len(candidates.a)):
            a, b, x = (Element.from_Z(int(z[row])).symbol for z in (candidates.a, candidates.b, candidates.x))
            found[frozenset((a, b)), x] = {
                "a": a, "b": b, "states": tuple(candidates.states[row].tolist()),
                "t": candidates.goldschmidt[row], "tau": candidates.bartel[row],
                "in_window": bool(candidates.in_window[row]),
            }  # fmt: skip
    return found


@pytest.mark.parametrize("states", ["icsd24", "smact14"])
def test_the_tests_are_smacts_own(states: str):
    """Neutral and ordered assignments of a random sample of triples, against smact_filter called on each."""
    symbols = [s for s in enumeration.known_elements() if len(enumeration.ions([s], states).states)]
    triples = random.Random(0).sample(list(itertools.permutations(symbols, 3)), 400)
    allowed = 0
    for triple in triples:
        ours = set()
        a, b, x = (enumeration.ions([symbol], states) for symbol in triple)
        for row, state in enumerate(x.states.tolist()):
            i, j = enumeration.neutral(a, b, state)
            e_a, e_b, e_x = a.electronegativities[i], b.electronegativities[j], x.electronegativities[row]
            fits = enumeration.ordered(a.states[i], e_a, b.states[j], e_b)
            fits &= enumeration.ordered(a.states[i], e_a, state, e_x)
            fits &= enumeration.ordered(b.states[j], e_b, state, e_x)
            ours |= {
                (int(p), int(q), state) for p, q in zip(a.states[i[fits]], b.states[j[fits]], strict=True)
            }
        elements = [smact.Element(symbol) for symbol in triple]
        theirs = smact_filter(elements, stoichs=[[1], [1], [3]], oxidation_states_set=states)
        assert ours == {tuple(found[1]) for found in theirs}, triple
        allowed += bool(ours)
    assert 0 < allowed < len(triples)


def test_counts_are_of_ordered_triples_that_pass(monkeypatch: pytest.MonkeyPatch):
    """Each step's count, against the same tests on one triple at a time."""
    symbols = ["Ca", "Ti", "Cs", "Pb", "O", "I"]
    settings = {"a": symbols, "b": symbols, "x": symbols, "goldschmidt": [0.825, 1.059], "bartel": 4.18}
    total = dict.fromkeys(enumeration.STEPS, 0)
    for candidates in enumeration.enumerate_candidates(OPEN | settings):
        for step, n in candidates.counts.items():
            total[step] += n
    single = dict.fromkeys(enumeration.STEPS, 0)
    for a, b, x in itertools.permutations(symbols, 3):
        (candidates,) = enumeration.enumerate_candidates(OPEN | settings | {"a": [a], "b": [b], "x": [x]})
        for step, n in candidates.counts.items():
            single[step] += n
    assert total == single
    assert total["enumerated"] == 6 * 5 * 4
    assert list(total.values()) == sorted(total.values(), reverse=True)
    assert 0 < total["Bartel's tau in its window"] < total["charge neutral"]


def test_elements_of_a_candidate_differ():
    found = by_formula(a=["Ca", "Ti"], b=["Ca", "Ti"], x=["O"])
    assert {pair for pair, _ in found} == {frozenset(("Ca", "Ti"))}


def test_the_larger_cation_stands_on_a():
    found = by_formula(a=["Ca", "Ti"], b=["Ca", "Ti"], x=["O"], goldschmidt=[0.825, 1.059], bartel=4.18)
    row = found[frozenset(("Ca", "Ti")), "O"]
    assert (row["a"], row["b"], row["states"]) == ("Ca", "Ti", (2, 4, -2))
    assert row["in_window"]


@pytest.mark.parametrize(
    ("a", "b", "x", "t", "tau", "perovskite"),
    [  # by hand from Shannon's radii (Acta Cryst. A32, 751, 1976): XII for A, VI for B and X
        ("Ca", "Ti", "O", 0.966, 3.88, True),
        ("Sr", "Ti", "O", 1.002, 3.80, True),
        ("Cs", "Pb", "Br", 0.862, 4.10, True),
        ("Cs", "Pb", "I", 0.851, 4.30, False),
        ("Mg", "Si", "O", None, None, False),
    ],
)
def test_tolerance_factors(a: str, b: str, x: str, t: float | None, tau: float | None, perovskite: bool):
    found = by_formula(a=[a], b=[b], x=[x], goldschmidt=[0.825, 1.059], bartel=4.18)
    row = found[frozenset((a, b)), x]
    if t is not None:
        assert (row["t"], row["tau"]) == (pytest.approx(t, abs=2e-3), pytest.approx(tau, abs=2e-2))
    assert row["in_window"] is perovskite


def test_tau_is_only_defined_for_the_larger_cation_on_a():
    radii = np.array([1.0, 1.0, np.nan])
    tau = enumeration.bartel(radii, np.array([1.0, 1.2, 1.0]), 1.4, np.ones(3))
    assert np.isinf(tau[:2]).all()
    assert np.isnan(tau[2])


def test_radii_are_shannons_at_the_nearest_coordination():
    assert enumeration.shannon_radius("Ca", 2, 12) == 1.34
    assert enumeration.shannon_radius("Ti", 4, 6) == 0.605
    assert enumeration.shannon_radius("Fe", 3, 6) == 0.645  # high spin
    assert enumeration.shannon_radius("N", -3, 6) == 1.46  # only IV is tabulated
    assert np.isnan(enumeration.shannon_radius("H", -1, 6))


def test_an_unknown_element_is_named():
    with pytest.raises(InputError, match="Xx"):
        list(enumeration.enumerate_candidates(OPEN | {"a": ["Xx"], "b": None, "x": ["O"]}))


def test_of_two_assignments_that_fit_the_one_of_lower_tau_is_taken():
    """Nd(II) and Ti(IV) have the t nearer to 1, and tau 3.87."""
    found = by_formula(a=["Nd", "Ti"], b=["Nd", "Ti"], x=["O"], goldschmidt=[0.825, 1.059], bartel=4.18)
    row = found[frozenset(("Nd", "Ti")), "O"]
    assert (row["a"], row["states"]) == ("Nd", (3, 3, -2))
    assert (row["t"], row["tau"]) == (pytest.approx(0.912, abs=1e-3), pytest.approx(1.982, abs=1e-3))
