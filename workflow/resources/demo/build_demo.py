"""Make crystals.jsonl.zst, the bundled crystals with their labels, from the rows of the labelling scripts.

    build_demo.py [--collect rows.jsonl ...]

`--collect` first puts the scripts' rows into raw.jsonl.zst (rows with an error are left out, rows that only
add to a crystal join its row). Formation energies and the hull come from here; all else is as computed.
"""

import argparse
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import zstandard
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.core import Composition

HERE = Path(__file__).parent
RAW, CRYSTALS = HERE / "raw.jsonl.zst", HERE / "crystals.jsonl.zst"
CUBIC = {
    "rocksalt", "zincblende", "cesium chloride", "fluorite", "perovskite", "half-Heusler", "Cu3Au", "diamond",
    "fcc", "bcc",
}  # fmt: skip
# Structure that is an element's zero of formation energy.
REFERENCES = {
    element: structure
    for structure, elements in {
        "bcc": "Li Na K Rb Cs Ba V Nb Ta Cr Mo W",
        "fcc": "Ca Sr Al Cu Ag Au Ni Pd Pt Rh Ir Pb",
        "diamond": "Si Ge Sn",
        "hcp": "Be Mg Ti Zr Hf Sc Y Zn Cd Co Ru Os Tl",
        "A7": "As Sb Bi",
        "trigonal chain": "Se Te",
        "graphite": "C",
        "alpha-Ga": "Ga",
        "black phosphorus": "P",
        "bct": "In",
        "molecule": "N O F Cl Br I S",
    }.items()
    for element in elements.split()
}


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """JSON objects of files, plain or compressed, one a line."""
    rows = []
    for path in paths:
        data = path.read_bytes()
        text = zstandard.decompress(data) if path.suffix == ".zst" else data
        rows += [json.loads(line) for line in text.decode().splitlines()]
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines with sorted keys, compressed; equal rows give equal bytes."""
    text = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(text.encode()))


def identifier(row: dict[str, Any]) -> str:
    """Stable id of a crystal: its reduced formula and prototype."""
    formula = Composition(row["formula"]).reduced_formula
    if Composition(formula).is_element:
        formula = row["species"][0]  # pymatgen writes O2, N2...
    return f"demo-{formula}-{row['prototype'].replace(' ', '-')}"


def collect_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Merge the scripts' rows: one a crystal or molecule, by id.

    Raises:
        ValueError: a crystal was labelled twice.
    """
    crystals: dict[str, dict[str, Any]] = {}
    additions = []  # moduli or a gap that were computed later
    for row in read_rows(paths):
        if "error" in row:
            continue
        if "energy" not in row:
            additions.append(row)
        elif identifier(row) in crystals:
            raise ValueError(f"{identifier(row)}: is there twice; remove one of the rows")
        else:
            crystals[identifier(row)] = row
    by_sites = {key(row): row for row in crystals.values() if "sites" in row}
    for row in additions:
        target = by_sites[key(row)]
        target |= row | {"seconds": round(target["seconds"] + row["seconds"], 1)}
    return [crystals[name] for name in sorted(crystals)]


def key(row: dict[str, Any]) -> str:
    """What the crystal of an addition is found by."""
    return json.dumps([row["prototype"], row["sites"]])


def build_crystals(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shipped records, by id: structure and labels in eV/atom, eV and GPa; None where missing."""
    energies = {identifier(row): row["energy_per_atom"] for row in raw}
    zero = {
        element: energies[name]
        for element, structure in REFERENCES.items()
        if (name := f"demo-{element}-{structure.replace(' ', '-')}") in energies
    }

    @cache
    def diagram(elements: frozenset[str]) -> PhaseDiagram:
        phases = [row for row in raw if elements.issuperset(row["species"])]
        return PhaseDiagram([PDEntry(row["formula"], row["energy"]) for row in phases])

    records = []
    for row in raw:
        if row.get("molecule"):
            continue  # a reference, no crystal
        composition, elements = Composition(row["formula"]), frozenset(row["species"])
        formation = above = None
        if elements <= zero.keys():
            known = sum(zero[symbol] for symbol in row["species"]) / len(row["species"])
            formation = round(row["energy_per_atom"] - known, 6)
            hull = diagram(elements).get_hull_energy_per_atom(composition)
            above = round(max(0.0, row["energy_per_atom"] - float(hull)), 6)
        bulk = round(row["bulk_modulus"], 4) if row["prototype"] in CUBIC else None
        shear = {name: row.get(f"shear_{name}") for name in ("voigt", "reuss", "vrh")}
        gap = round(row["band_gap"], 4)
        if composition.is_element and not gap:
            shear = dict.fromkeys(shear)  # these grids are too coarse: Al's is half of what it should be
        records.append(
            {
                "material_id": identifier(row),
                "formula": composition.reduced_formula,
                "prototype": row["prototype"],
                "lattice": [[round(x, 8) for x in vector] for vector in row["lattice"]],
                "species": row["species"],
                "frac_coords": [[round(x % 1, 10) % 1 for x in site] for site in row["frac_coords"]],
                "energy_per_atom": round(row["energy_per_atom"], 6),
                "formation_energy_per_atom": formation,
                "energy_above_hull": above,
                # graphite's bands touch at K, which the grid misses
                "band_gap": None if row["prototype"] == "graphite" else gap,
                **{f"k_{name}": bulk for name in shear},
                **{f"g_{name}": None if value is None else round(value, 4) for name, value in shear.items()},
            }
        )
    return records


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collect", nargs="+", type=Path, metavar="ROWS", help="files of the label scripts")
    args = parser.parse_args()
    if args.collect:
        write_rows(RAW, collect_rows(args.collect))
    write_rows(CRYSTALS, build_crystals(read_rows([RAW])))


if __name__ == "__main__":
    main()
