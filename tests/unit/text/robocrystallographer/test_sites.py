"""Bonds and sites equal those of pymatgen's graph and robocrystallographer's analyser."""

import numpy as np
import pytest
from pymatgen.core import Structure
from pymatgen.core.local_env import CrystalNN
from robocrys.condense.site import SiteAnalyzer

from castbench.text.robocrystallographer.sites import FastCrystalNN, FastSiteAnalyzer, site_fingerprints


def as_tuples(connected: list) -> list[tuple]:
    return [
        (c.index, c.jimage, c.weight, c.dist, str(c.site.specie), c.site.coords.tolist()) for c in connected
    ]


def test_connected_sites_equal_pymatgens_in_their_order(structure: Structure):
    stock = CrystalNN().get_bonded_structure(structure)
    ours = FastCrystalNN().get_bonded_structure(structure)
    assert sorted(map(str, ours.graph.edges(data=True))) == sorted(map(str, stock.graph.edges(data=True)))
    for n in range(len(structure)):
        for image in ((0, 0, 0), (1, -2, 0)):
            assert as_tuples(ours.get_connected_sites(n, image)) == as_tuples(
                stock.get_connected_sites(n, image)
            )
            assert ours.get_connected_sites(n, image) is ours.get_connected_sites(n, image)


def summaries(analyzer: SiteAnalyzer) -> list:
    return [
        analyzer.equivalent_sites,
        analyzer.get_all_site_summaries(),
        analyzer.get_all_bond_distance_summaries(),
        analyzer.get_all_connectivity_angle_summaries(),
        analyzer.get_all_nnn_distance_summaries(),
    ]


def test_sites_equal_robocrystallographers(structure: Structure, monkeypatch: pytest.MonkeyPatch):
    stock = summaries(SiteAnalyzer(CrystalNN().get_bonded_structure(structure)))
    monkeypatch.setattr("robocrys.condense.site.get_site_fingerprints", site_fingerprints)
    ours = summaries(FastSiteAnalyzer(FastCrystalNN().get_bonded_structure(structure)))
    for mine, theirs in zip(ours, stock, strict=True):
        assert str(type(mine)) == str(type(theirs))
        assert _equal(mine, theirs), (mine, theirs)


def _equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, float | np.floating):
        return abs(first - second) < 1e-6
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_equal, sorted(first), sorted(second)))
    return first == second
