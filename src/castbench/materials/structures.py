"""One crystal: reading it in whatever form a record has it, checking it, its symmetry."""

import io
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

import numpy as np
import pyarrow as pa
import spglib
from pymatgen.core import Composition, Element, Lattice
from pymatgen.io.cif import CifParser

ATOMIC_NUMBERS = {element.symbol: element.Z for element in Element}
SYMBOLS = {number: symbol for symbol, number in ATOMIC_NUMBERS.items()}
# Deuterium and tritium have hydrogen's electrons, so the labels are hydrogen's too.
ISOTOPES = {"D": "H", "T": "H"}
SYMBOL = re.compile(r"([A-Z][a-z]?)(?:[\d.]*[+-].*)?")  # an element, perhaps with an oxidation state: Fe3+
BLOCK = re.compile(r"^(?=[ \t]*data_)", re.MULTILINE)  # where a data block of a CIF begins
OVERLAP = 0.5  # angstrom; the shortest bond known, H-H, has 0.74
SYMPREC = 0.01  # angstrom


class RecordError(ValueError):
    """A record that cannot be used: `reason` is what it is counted under, `detail` what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = " ".join(detail.split())[:200]


@dataclass(frozen=True, slots=True)
class Crystal:
    """An ordered crystal.

    Attributes:
        lattice: (3, 3), a vector a row, angstrom.
        species: N element symbols.
        frac_coords: (N, 3) fractional coordinates.
    """

    lattice: np.ndarray
    species: list[str]
    frac_coords: np.ndarray

    @property
    def formula(self) -> str:
        """Reduced formula, as pymatgen orders it."""
        # Sorted, because pymatgen has no order of its own for elements without electronegativity.
        return Composition(Counter(sorted(self.species))).reduced_formula


def read_crystal(parts: Mapping[str, Any]) -> Crystal:
    """Read and check a crystal.

    Args:
        parts: either `structure` (a pymatgen dict, our own struct, JSON of these, or CIF text), or `cif`,
            or `lattice` (3x3, or a, b, c in angstrom and alpha, beta, gamma in degrees) with `species` and
            `frac_coords`.

    Raises:
        RecordError: missing, unreadable or disordered structure, unknown element, overlapping atoms.
    """
    structure = parts.get("cif") or parts.get("structure")
    if isinstance(structure, str) and structure.lstrip().startswith("{"):
        structure = decode(structure)
    lattice: Any
    species: Any
    frac_coords: Any
    if isinstance(structure, str):
        lattice, species, frac_coords = read_cif(structure)
    elif isinstance(structure, Mapping) and "sites" in structure:
        lattice, species, frac_coords = read_sites(structure)
    else:
        fields = structure if isinstance(structure, Mapping) else parts
        absent = [name for name in ("lattice", "species", "frac_coords") if fields.get(name) is None]
        if absent:
            raise RecordError("missing structure", f"it has no structure, no CIF and no {', '.join(absent)}")
        lattice, species, frac_coords = (decode(fields[n]) for n in ("lattice", "species", "frac_coords"))
    if not isinstance(species, list):
        raise RecordError("unreadable structure", "species are not a list of elements")
    crystal = Crystal(
        read_lattice(lattice), [read_symbol(s) for s in species], read_numbers(frac_coords).reshape(-1, 3)
    )
    if not crystal.species:
        raise RecordError("missing structure", "it has no atoms")
    if len(crystal.species) != len(crystal.frac_coords):
        counts = f"{len(crystal.species)} species for {len(crystal.frac_coords)} positions"
        raise RecordError("unreadable structure", counts)
    distance = overlap(crystal)
    if distance is not None:
        raise RecordError("overlapping atoms", f"two atoms are {distance:.3f} angstrom apart")
    return crystal


def decode(value: Any) -> Any:
    """Decode JSON that stands in a cell of a table; anything else passes unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RecordError("unreadable structure", f"it is not JSON: {error}") from None


def read_numbers(values: Any) -> np.ndarray:
    """Flatten nested lists of finite numbers, a multiple of three of them."""
    try:
        numbers = np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        raise RecordError("unreadable structure", "coordinates are not numbers, three a row") from None
    if numbers.size % 3 or not np.isfinite(numbers).all():
        raise RecordError("unreadable structure", "coordinates are not finite numbers, three a row")
    return numbers


def read_lattice(value: Any) -> np.ndarray:
    """Read cell vectors (3, 3) in angstrom from 3x3, nine or six numbers, or pymatgen's mapping."""
    if isinstance(value, Mapping):
        value = value.get("matrix") or [value.get(k) for k in ("a", "b", "c", "alpha", "beta", "gamma")]
    numbers = read_numbers(value)
    if numbers.size == 6:
        numbers = np.asarray(Lattice.from_parameters(*numbers.tolist()).matrix).ravel()
    # A cell flatter than a tenth of an atom is a mistake, and costs the overlap check dearly.
    if numbers.size != 9 or not np.isfinite(numbers).all() or heights(numbers.reshape(3, 3)).min() < 0.1:
        raise RecordError("unreadable structure", "the lattice is not a cell with a volume")
    return numbers.reshape(3, 3)


def heights(lattice: np.ndarray) -> np.ndarray:
    """Distances (3,) between opposite faces of the cell, angstrom; 0 where it has no volume."""
    volume = abs(np.linalg.det(lattice))
    areas = np.linalg.norm(np.cross(lattice[[1, 2, 0]], lattice[[2, 0, 1]]), axis=1)
    return volume / np.maximum(areas, 1e-12)


def read_symbol(value: Any) -> str:
    """Read an element: a symbol, a symbol with an oxidation state, or an atomic number."""
    if isinstance(value, int) and value in SYMBOLS:
        return SYMBOLS[value]
    found = SYMBOL.fullmatch(str(value).strip())
    symbol = found[1] if found else ""
    symbol = ISOTOPES.get(symbol, symbol)
    if symbol not in ATOMIC_NUMBERS:
        raise RecordError("unknown element", f"{str(value)[:40]!r} is no element")
    return symbol


def read_sites(structure: Mapping[str, Any]) -> tuple[Any, list[str], list[Any]]:
    """Read lattice, species and fractional coordinates from the dict of a pymatgen Structure."""
    try:
        species = []
        for site in structure["sites"]:
            check_occupancy({str(s["element"]): float(s.get("occu", 1)) for s in site["species"]})
            species.append(site["species"][0]["element"])
        return structure["lattice"], species, [site["abc"] for site in structure["sites"]]
    except RecordError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise RecordError(
            "unreadable structure", f"not the dict of a pymatgen structure: {error!r}"
        ) from None


def cif_blocks(text: str) -> list[str]:
    """The data blocks of a CIF that hold a crystal; others have the publication or a powder pattern."""
    return [block for block in BLOCK.split(text) if "_cell_length_a" in block.lower()]


def read_cif(text: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Read lattice, species and fractional coordinates from a CIF of one crystal, its cell kept."""
    if (n := len(cif_blocks(text))) > 1:
        raise RecordError("several crystals", f"the CIF holds {n}; give each a record of its own")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Occupancies are left for us to check: pymatgen would merge atoms that coincide.
            parser = CifParser(io.StringIO(text))
            structure = parser.parse_structures(primitive=False, check_occu=False, on_error="ignore")[0]
    except Exception as error:  # the parser raises whatever its code runs into
        raise RecordError("unreadable structure", f"the CIF does not parse: {error}") from None
    species = []
    for site in structure:
        check_occupancy({s.symbol: float(occupancy) for s, occupancy in site.species.items()})
        species.append(next(iter(site.species)).symbol)
    return structure.lattice.matrix, species, structure.frac_coords


def check_occupancy(species: Mapping[str, float]) -> None:
    """Refuse a site that is not one whole atom. `species` maps symbols to occupancies."""
    total = sum(species.values())
    mixture = " ".join(f"{symbol}:{occupancy:g}" for symbol, occupancy in species.items())
    if total > 1.001:
        raise RecordError("overlapping atoms", f"one site holds {mixture}")
    if len(species) > 1 or total < 0.999:
        raise RecordError(
            "disordered structure", f"a site holds {mixture}; only ordered crystals have a graph"
        )


def overlap(crystal: Crystal) -> float | None:
    """Find the shortest distance between two atoms, images included, if it is below OVERLAP (angstrom).

    A pair closer than r differs by less than r / height in each fractional coordinate, so a cell whose
    faces are more than 2 r apart needs the nearest image in each coordinate alone.
    """
    lattice, frac = crystal.lattice, crystal.frac_coords
    reach = np.floor(0.5 + OVERLAP / heights(lattice)).astype(int)
    shifts = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), dtype=np.float64)
    block = max(1, 1_000_000 // len(frac))
    shortest = np.inf
    for start in range(0, len(frac), block):
        delta = frac[start : start + block, None] - frac[None]
        delta -= np.round(delta)
        for shift in shifts:
            squared = np.square((delta + shift) @ lattice).sum(-1)
            if not shift.any():
                rows = np.arange(len(squared))
                squared[rows, rows + start] = np.inf
            shortest = min(shortest, float(squared.min()))
    return shortest**0.5 if shortest < OVERLAP**2 else None


def symmetry(crystal: Crystal) -> tuple[int, tuple[int, ...]]:
    """Find the space group number (0 where spglib finds none) and the sorted sizes of the orbits.

    Orbit sizes are divided by their common divisor, so that primitive and conventional cells agree.
    """
    numbers = [ATOMIC_NUMBERS[symbol] for symbol in crystal.species]
    try:
        cell = (crystal.lattice, crystal.frac_coords, numbers)
        found = spglib.get_symmetry_dataset(cell, symprec=SYMPREC)  # type: ignore[arg-type]
    except Exception:  # newer versions raise what older ones answer with None
        found = None
    if found is None:
        return 0, ()
    sizes = np.unique(found.crystallographic_orbits, return_counts=True)[1].tolist()
    divisor = reduce(gcd, sizes)
    return int(found.number), tuple(sorted(size // divisor for size in sizes))


def prototype(crystal: Crystal) -> str:
    """Name the structure type: anonymous formula, space group, orbit sizes. ZnS and GaAs share one."""
    group, orbits = symmetry(crystal)
    anonymous = Composition(Counter(crystal.species)).anonymized_formula
    return f"{anonymous} {group} {','.join(map(str, orbits))}"


def pack_crystals(crystals: Sequence[Crystal]) -> pa.StructArray:
    """Pack crystals into the `structure` column: lattice (9), species (N), frac_coords (3N)."""
    sizes = np.array([len(crystal.species) for crystal in crystals])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    lattices = np.concatenate([crystal.lattice.ravel() for crystal in crystals])
    species = list(itertools.chain.from_iterable(crystal.species for crystal in crystals))
    frac_coords = np.concatenate([crystal.frac_coords.ravel() for crystal in crystals])
    return pa.StructArray.from_arrays(
        [
            pa.ListArray.from_arrays(np.arange(len(crystals) + 1, dtype=np.int32) * 9, lattices),
            pa.ListArray.from_arrays(offsets, pa.array(species, pa.string())),
            pa.ListArray.from_arrays(offsets * 3, frac_coords),
        ],
        names=["lattice", "species", "frac_coords"],
    )


def unpack_crystals(column: pa.ChunkedArray) -> Iterator[Crystal]:
    """Iterate over the crystals of a `structure` column."""
    for chunk in column.chunks:
        lattice, species, frac = (chunk.field(name) for name in ("lattice", "species", "frac_coords"))
        vectors, coordinates = lattice.values.to_numpy(), frac.values.to_numpy()
        starts, stops = lattice.offsets.to_numpy(), frac.offsets.to_numpy()
        for i, symbols in enumerate(species.to_pylist()):
            yield Crystal(
                vectors[starts[i] : starts[i + 1]].reshape(3, 3),
                symbols,
                coordinates[stops[i] : stops[i + 1]].reshape(-1, 3),
            )
