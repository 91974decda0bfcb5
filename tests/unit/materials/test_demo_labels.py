"""The bundled crystals: whole, reproducible from their raw rows, and in line with published PBE values."""

import importlib.util
import json
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

MADSEN = "G. Madsen, all-electron PBE, in the GPAW documentation, 'Bulk tests'"
TRAN = "Tran, Laskowski, Blaha, Schwarz, Phys. Rev. B 75, 115131 (2007)"
PAIER = "Paier, Marsman, Hummer, Kresse, Gerber, Angyan, J. Chem. Phys. 124, 154709 (2006)"
BETZINGER = "Betzinger, Friedrich, Bluegel, Phys. Rev. B 81, 195117 (2010)"
ATOMS_PER_CUBE = {"rocksalt": 8, "zincblende": 8, "diamond": 8, "fcc": 4, "bcc": 2}


@dataclass(frozen=True)
class Published:
    """PBE lattice constant (angstrom) and bulk modulus (GPa) of a cubic crystal."""

    crystal: str
    a: float
    bulk: float
    source: str


# PAW data sets and codes agree on `a` within 0.3 % (Lejaeghere et al., Science 351, aad3000); 1 % leaves room
# for GPAW's data set of Li, whose 1s electrons are frozen (LiF: 0.8 %). The curvature is more delicate:
# codes, ranges of volume and forms of the equation of state differ by 5 %, our 600 eV basis scatters as much.
TEXTBOOK = [
    Published("MgO-rocksalt", 4.259, 147.8, MADSEN),
    Published("CaO-rocksalt", 4.841, 105.0, TRAN),
    Published("LiF-rocksalt", 4.064, 71.7, MADSEN),
    Published("LiCl-rocksalt", 5.167, 32.2, TRAN),
    Published("NaF-rocksalt", 4.709, 44.5, TRAN),
    Published("NaCl-rocksalt", 5.714, 23.7, TRAN),
    Published("ZrN-rocksalt", 4.602, 250.0, TRAN),
    Published("C-diamond", 3.575, 431.0, PAIER),
    Published("Si-diamond", 5.459, 87.8, MADSEN),
    Published("Ge-diamond", 5.758, 59.4, MADSEN),
    Published("SiC-zincblende", 4.381, 211.8, MADSEN),
    Published("AlN-zincblende", 4.406, 193.0, TRAN),
    Published("AlP-zincblende", 5.513, 82.6, TRAN),
    Published("AlAs-zincblende", 5.734, 67.0, TRAN),
    Published("GaP-zincblende", 5.514, 77.0, TRAN),
    Published("GaAs-zincblende", 5.749, 60.9, MADSEN),
    Published("Al-fcc", 4.039, 76.5, MADSEN),
    Published("Cu-fcc", 3.628, 143.9, MADSEN),
    Published("Ca-fcc", 5.530, 17.3, TRAN),
    Published("Li-bcc", 3.438, 13.7, PAIER),
    Published("Na-bcc", 4.200, 7.6, PAIER),
]

# Direct PBE gap at the zone centre (eV) at a given lattice constant: all-electron. Gaps of ionic crystals
# change by 0.3 eV per 1 % of `a`, so they are compared at the same `a`, from the gaps along our curves.
GAPS = [("C-diamond", 3.553, 5.64), ("Si-diamond", 5.421, 2.56), ("MgO-rocksalt", 4.189, 4.84)]
GAPS += [("GaAs-zincblende", 5.640, 0.55)]


@pytest.fixture(scope="module")
def build(root) -> ModuleType:
    path = root / "workflow/resources/demo/build_demo.py"
    spec = importlib.util.spec_from_file_location("build_demo", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def crystals(build) -> dict[str, dict[str, Any]]:
    return {row["material_id"]: row for row in build.read_rows([build.CRYSTALS])}


@pytest.fixture(scope="module")
def raw(build) -> dict[str, dict[str, Any]]:
    return {build.identifier(row): row for row in build.read_rows([build.RAW])}


def lattice_constant(row: dict[str, Any]) -> float:
    volume = abs(np.linalg.det(row["lattice"]))
    return (volume * ATOMS_PER_CUBE[row["prototype"]] / len(row["species"])) ** (1 / 3)


@pytest.mark.parametrize("published", TEXTBOOK, ids=lambda entry: entry.crystal)
def test_lattice_constants_and_bulk_moduli_agree_with_the_literature(crystals, published):
    row = crystals[f"demo-{published.crystal}"]
    assert lattice_constant(row) == pytest.approx(published.a, rel=0.01), published.source
    assert row["k_vrh"] == pytest.approx(published.bulk, rel=0.12), published.source


@pytest.mark.parametrize(("crystal", "a", "gap"), GAPS)
def test_gaps_agree_with_the_literature(raw, crystal, a, gap):
    row = raw[f"demo-{crystal}"]
    volume = len(row["species"]) / ATOMS_PER_CUBE[row["prototype"]] * a**3
    volumes, gaps = np.transpose([(point[0], point[3]) for point in row["points"]])
    ours = np.polyval(np.polyfit(volumes, gaps, 2), volume)
    assert ours == pytest.approx(gap, abs=0.25), BETZINGER


@pytest.mark.parametrize("metal", ["Al-fcc", "Cu-fcc", "Li-bcc", "Na-bcc", "ZrN-rocksalt"])
def test_metals_have_no_gap(crystals, metal):
    assert crystals[f"demo-{metal}"]["band_gap"] == 0


# C11 - C12 and C44 (GPa) as measured; PBE is softer by 5 to 10 %.
@pytest.mark.parametrize(
    ("crystal", "difference", "c44", "source"),
    [
        ("MgO-rocksalt", 202.1, 154.4, "Sinogeikin, Bass, Phys. Earth Planet. Inter. 120, 43 (2000)"),
        ("Si-diamond", 101.8, 79.6, "McSkimin, Andreatch, J. Appl. Phys. 35, 2161 (1964)"),
    ],
)
def test_elastic_constants_agree_with_measurements(raw, crystal, difference, c44, source):
    row = raw[f"demo-{crystal}"]
    assert row["c44"] == pytest.approx(c44, rel=0.12), source
    assert row["c11"] - row["c12"] == pytest.approx(difference, rel=0.12), source


def test_the_set_is_as_large_as_promised(crystals):
    assert len(crystals) >= 150
    assert sum(row["g_vrh"] is not None for row in crystals.values()) >= 60
    assert sum((row["band_gap"] or 0) > 0 for row in crystals.values()) >= 80
    assert len({row["prototype"] for row in crystals.values()}) >= 12


def test_every_row_is_valid(build, crystals):
    from castbench.materials.structures import read_crystal

    for name, row in crystals.items():
        crystal = read_crystal(row)
        assert crystal.formula == row["formula"], name
        assert name.startswith(
            f"demo-{row['formula'].rstrip('2') if len({*row['species']}) == 1 else row['formula']}-"
        )
        assert math.isfinite(row["energy_per_atom"]), name
        assert row["prototype"] == "graphite" or 0 <= row["band_gap"] < 15, name
        cubic = row["prototype"] in build.CUBIC
        assert (row["k_vrh"] is not None) == cubic, name
        assert row["k_voigt"] == row["k_reuss"] == row["k_vrh"], name
        if cubic:
            assert 0.5 < row["k_vrh"] < 600, name
        if row["g_vrh"] is not None:
            assert cubic, name
            assert len({*row["species"]}) > 1 or row["band_gap"] > 0, f"{name}: the grids are too coarse"
            assert row["g_vrh"] == pytest.approx((row["g_voigt"] + row["g_reuss"]) / 2, abs=1e-3), name


def test_ids_are_unique(build):
    names = [row["material_id"] for row in build.read_rows([build.CRYSTALS])]
    assert names == sorted(set(names))


def test_the_hull_is_below_every_crystal(crystals):
    hull = [row["energy_above_hull"] for row in crystals.values()]
    known = [value for value in hull if value is not None]
    assert min(known) == 0
    assert sum(value == 0 for value in known) >= 30
    for row in crystals.values():
        assert (row["energy_above_hull"] is None) == (row["formation_energy_per_atom"] is None)


def test_references_are_the_zero_of_formation_energies(build, crystals, raw):
    elements = {symbol for row in crystals.values() for symbol in row["species"]}
    for element in elements & build.REFERENCES.keys():
        name = f"demo-{element}-{build.REFERENCES[element].replace(' ', '-')}"
        if name in crystals:
            assert crystals[name]["formation_energy_per_atom"] == 0, name
            assert crystals[name]["energy_above_hull"] < 0.02, name
    missing = [row["material_id"] for row in crystals.values() if row["formation_energy_per_atom"] is None]
    assert len(missing) <= 0.02 * len(crystals), missing


def test_formation_energies_have_the_size_of_measured_ones(crystals):
    # Enthalpies of formation at 298 K (CRC Handbook), eV/atom; PBE makes them up to 0.4 eV/atom too small,
    # because it binds O2 too strongly.
    measured = {"MgO-rocksalt": -3.12, "LiF-rocksalt": -3.19, "NaCl-rocksalt": -2.13, "LiCl-rocksalt": -2.12}
    for name, value in measured.items():
        row = crystals[f"demo-{name}"]
        assert row["formation_energy_per_atom"] == pytest.approx(value, abs=0.45), name
        assert row["energy_above_hull"] < 0.05, name


def test_oxygen_is_a_triplet(raw):
    molecule = raw["demo-O-molecule"]
    assert molecule["magnetic_moment"] == pytest.approx(2, abs=0.05)
    assert not any(row.get("magnetic_moment") for name, row in raw.items() if name != "demo-O-molecule")


def test_the_shipped_file_follows_from_the_raw_rows(build, tmp_path):
    again = tmp_path / "crystals.jsonl.zst"
    build.write_rows(again, build.build_crystals(build.read_rows([build.RAW])))
    assert again.read_bytes() == build.CRYSTALS.read_bytes()


def test_rows_are_merged_and_failures_left_out(build, tmp_path):
    sites = {"A": "Na", "X": "Cl"}
    row = {
        "prototype": "rocksalt",
        "sites": sites,
        "formula": "NaCl",
        "species": ["Na", "Cl"],
        "energy": -7.0,
    }
    rows = [
        {"prototype": "rocksalt", "sites": sites, "shear_vrh": 14.0, "seconds": 2.0},
        {"prototype": "bcc", "sites": {"A": "Na"}, "error": "Timeout: over the time limit", "seconds": 9.0},
        row | {"seconds": 1.5},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert build.collect_rows([path]) == [row | {"shear_vrh": 14.0, "seconds": 3.5}]
    with pytest.raises(ValueError, match="demo-NaCl-rocksalt: is there twice"):
        build.collect_rows([path, path])
