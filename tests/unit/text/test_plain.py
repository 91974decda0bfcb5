"""Descriptions in Unicode or HTML, by robocrystallographer or as emmet serves them, become raw text."""

import copy
import io
import json
import string
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from castbench.text import robocrystallographer
from castbench.text.normalise import plain

Condensed = dict[str, Any]
SPACE_GROUPS = range(1, 231)


def rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as packed:
        yield from map(json.loads, io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(packed)))


@cache
def condenser() -> Any:
    """Ours, which finds what robocrystallographer's own finds, but no mineral."""
    found = copy.copy(robocrystallographer._load()[0])
    found.mineral_matcher = False
    return found


def condense(lattice: Any, species: list[str], positions: list[list[float]]) -> Condensed:
    """Condensed crystal without a mineral; those of the database are put in by the tests."""
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crystal = Structure(lattice, species, positions)
        if not any(map(str.isdigit, "".join(species))):
            crystal.add_oxidation_state_by_guess(max_sites=-80)
        condensed = condenser().condense_structure(crystal)
    for component in condensed["components"].values():  # numpy 2 prints its integers with their type
        component["orientation"] = component["orientation"] and tuple(map(int, component["orientation"]))
    return condensed


@pytest.fixture(scope="module")
def layers() -> Condensed:
    """MoS2: a zero in its orientation, polyhedra, two kinds of site."""
    from pymatgen.core import Lattice

    lattice = Lattice.hexagonal(3.19, 13.38)
    positions = [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    positions += [[1 / 3, 2 / 3, 0.855], [2 / 3, 1 / 3, 0.145], [2 / 3, 1 / 3, 0.355], [1 / 3, 2 / 3, 0.645]]
    return condense(lattice, ["Mo4+"] * 2 + ["S2-"] * 4, positions)


@pytest.fixture(scope="module")
def demo(root: Path) -> list[Condensed]:
    """Every 16th of the bundled crystals."""
    crystals = islice(rows(root / "workflow/resources/demo/crystals.jsonl.zst"), 0, None, 16)
    return [condense(c["lattice"], c["species"], c["frac_coords"]) for c in crystals]


def texts(condensed: Condensed, formats: tuple[str, ...] = ("unicode", "html")) -> Iterator[tuple[str, str]]:
    """(raw text, the same in another format), by robocrystallographer and by emmet, which is served."""
    from emmet.core.featurization import StructureDescriber as EmmetDescriber
    from robocrys import StructureDescriber

    for labels in (True, False):
        raw = StructureDescriber(fmt="raw", describe_symmetry_labels=labels).describe(condensed)
        for describer in (StructureDescriber, EmmetDescriber):
            for fmt in formats:
                other = describer(fmt=fmt, describe_symmetry_labels=labels).describe(condensed)
                yield raw, other


def check(condensed: Condensed, formats: tuple[str, ...] = ("unicode", "html")) -> None:
    for raw, other in texts(condensed, formats):
        assert plain(other) == raw
        assert plain(raw) == raw


def changed(condensed: Condensed, change: Callable[[Condensed], None]) -> Condensed:
    condensed = copy.deepcopy(condensed)
    change(condensed)
    return condensed


def with_species(condensed: Condensed, old: str, new: str) -> Condensed:
    """The crystal with another species at the sites of one."""

    def change(crystal: Condensed) -> None:
        for site in crystal["sites"].values():
            if site["element"] == old:
                site["element"] = new

    return changed(condensed, change)


def test_bundled_crystals(demo: list[Condensed], layers: Condensed) -> None:
    assert len(demo) >= 8
    for condensed in [*demo, layers]:
        check(condensed)


def test_real_crystals(shared_data: Path) -> None:
    from pymatgen.core import Lattice

    small = (row for row in rows(shared_data / "elastic4.jsonl.zst") if 3 <= row["nsites"] <= 8)
    kinds = set()
    for row in islice(small, 0, 2000, 130):
        condensed = condense(Lattice.from_parameters(*row["cell"]), row["species"], row["frac"])
        check(condensed)
        kinds |= {condensed["crystal_system"], condensed["dimensionality"]}
    assert len(kinds) >= 5


@pytest.mark.parametrize("number", SPACE_GROUPS)
def test_every_space_group(layers: Condensed, number: int) -> None:
    from spglib import get_spacegroup_type

    settings = [get_spacegroup_type(hall) for hall in range(1, 531)]
    symbols = {found.international_short for found in settings if found.number == number}
    assert symbols
    for symbol in symbols:
        check(changed(layers, lambda crystal, symbol=symbol: crystal.update(spg_symbol=symbol)))


def test_space_groups_stay_apart() -> None:
    from pymatgen.symmetry.groups import sg_symbol_from_int_number
    from pymatgen.util.string import unicodeify_spacegroup as bar_behind
    from robocrys.util import htmlify_spacegroup, unicodeify_spacegroup

    symbols = [sg_symbol_from_int_number(number) for number in SPACE_GROUPS]
    for write in (bar_behind, unicodeify_spacegroup, htmlify_spacegroup):
        assert [plain(write(symbol)) for symbol in symbols] == symbols
    assert plain(bar_behind("P-1")) == "P-1" != plain(bar_behind("P1")) == "P1"
    assert plain('P<span style="text-decoration:overline">1</span>') == plain("P¯1") == "P-1"


@pytest.mark.parametrize("digit", string.digits)
def test_every_digit_in_sub_and_superscript(layers: Condensed, digit: str) -> None:
    amount = f"{digit}2" if digit != "0" else "20"
    formula = f"Mo{amount}(S{amount}O{amount}{digit})3"

    def change(crystal: Condensed) -> None:
        crystal["formula"] = formula
        for component in crystal["components"].values():
            component["formula"] = formula
        for site in crystal["sites"].values():
            site["poly_formula"] = site["poly_formula"] and f"S{amount}"

    check(changed(layers, change))
    for sign in "+-":
        check(with_species(layers, "Mo4+", f"Mo{digit}{sign}"))
        check(with_species(layers, "Mo4+", f"Mo1{digit}{sign}"))
        check(with_species(layers, "Mo4+", f"Mo{digit}.{digit}7{sign}"))
    subscript, superscript = chr(0x2080 + int(digit)), "⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)]
    assert plain(f"X{subscript}O") == f"X{digit}O"
    assert plain(f"Ti{superscript}⁺ O{superscript}⁻") == f"Ti{digit}+ O{digit}-"
    assert plain(f"P2{subscript}/c") == f"P2_{digit}/c"


@pytest.mark.parametrize("formula", ["Fe0.95O", "La1.85Sr0.15CuO4", "Pb(Zr0.50Ti0.48)O3", "Li0.5(Ni2O4)0.25"])
def test_fractional_amounts_which_are_served_as_html(layers: Condensed, formula: str) -> None:
    check(changed(layers, lambda crystal: crystal.update(formula=formula)), ("html",))


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("water", ("unicode", "html")),
        ("1,3-oxazol-4-ol", ("unicode", "html")),
        ("1-$l^{2}-azanylpropane-2-thione", ("unicode", "html")),
        ("(2H-tetrazol-5-yl)methane", ("unicode", "html")),
        ("1-nitrilo-1$l^{6},2,4-trithiabicyclo[1.1.0]butane", ("html",)),
    ],
)
def test_molecule_names(layers: Condensed, name: str, formats: tuple[str, ...]) -> None:
    def change(crystal: Condensed) -> None:
        for component in crystal["components"].values():
            component.update(molecule_name=name, dimensionality=0)

    check(changed(layers, change), formats)


def test_every_mineral(layers: Condensed) -> None:
    from robocrys.condense.mineral import MineralMatcher

    minerals = sorted(MineralMatcher().mineral_db["mineral"].unique())
    assert len(minerals) > 150
    for name in minerals:
        for match, distance in ((True, -1), (True, 0.1), (False, 0.1)):
            mineral = {"type": name, "n_species_type_match": match, "distance": distance, "simplified": False}
            check(changed(layers, lambda crystal, mineral=mineral: crystal.update(mineral=mineral)))


@pytest.mark.parametrize("orientation", [(0, 0, 1), (1, -1, 0), (-1, 2, -10)])
def test_orientations(layers: Condensed, orientation: tuple[int, ...]) -> None:
    import numpy as np

    def orient(as_integer: Callable[[int], Any]) -> Condensed:
        def change(crystal: Condensed) -> None:
            for component in crystal["components"].values():
                component.update(dimensionality=2, orientation=tuple(map(as_integer, orientation)))

        return changed(layers, change)

    check(orient(int))
    for (raw, _), (_, served) in zip(texts(orient(int)), texts(orient(np.int64)), strict=True):
        assert str(orientation) in raw
        assert "np.int64" in served
        assert plain(served) == raw


def test_lengths_and_angles_keep_their_signs(demo: list[Condensed]) -> None:
    raw = " ".join(text for condensed in demo for text, _ in texts(condensed))
    assert " Å" in raw
    assert plain(raw) == raw
    assert plain("tilt angles range from 0-13°. 2.82 Å") == "tilt angles range from 0-13°. 2.82 Å"


WORDS = "SnO2|Ti(1)4+|Fe2.67+|P-1|P2_12_12_1|Fm-3m|(0, 0, 1)|2.82 Å|13°|is|$\\mu$".split("|")  # noqa: SIM905


@given(st.lists(st.sampled_from(WORDS) | st.text(string.printable.replace("<", "") + "Å°")).map(" ".join))
def test_raw_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@given(st.text("0123AaPm _-+./()⁰¹²⁺⁻₀₁₂\u1427\u0304\u0305\u00afμć"))
def test_plain_text_is_plain(text: str) -> None:
    assert plain(plain(text)) == plain(text)
