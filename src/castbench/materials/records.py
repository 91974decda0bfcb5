"""From a record of a source to a row of materials.parquet: the column mapping, labels, and the table."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from castbench.errors import InputError
from castbench.materials.readers import read_records
from castbench.materials.structures import Crystal, RecordError, pack_crystals, read_crystal, symmetry

# Names that a column is looked for under when the mapping does not name it; a dot descends into the record.
STRUCTURE = {
    "structure": ("structure",),
    "cif": ("cif",),
    "lattice": ("lattice", "cell"),
    "species": ("species", "elements"),
    "frac_coords": ("frac_coords", "frac"),
}
LABELS = {
    "energy_per_atom": ("energy_per_atom",),
    "formation_energy_per_atom": ("formation_energy_per_atom",),
    "energy_above_hull": ("energy_above_hull", "e_above_hull"),
    "band_gap": ("band_gap",),
    **{
        f"{letter}_{kind}": (f"{letter}_{kind}", f"{letter.upper()}_{kind.upper()}", f"{modulus}.{kind}")
        for letter, modulus in (("k", "bulk_modulus"), ("g", "shear_modulus"))
        for kind in ("voigt", "reuss", "vrh")
    },
}
OTHERS = {
    "material_id": ("material_id", "mp_id", "id"),
    "text": ("text", "description"),
    "origin": ("origin",),
}
COMPOSITION = {  # read where there is a study of formulas alone
    "formula": ("formula", "formula_pretty", "reduced_formula"),
    "fractions": ("fractions",),
}
COLUMNS = OTHERS | STRUCTURE | LABELS | COMPOSITION

# What no crystal has, so that it is a mistake or a mark for "missing" and becomes null. Moduli are not
# bounded here: the filters of the paper are there for the wild ones, and count them.
LIMITS = {
    "energy_per_atom": (-1e7, 1e7),  # eV/atom; all-electron codes reach -1e6
    "formation_energy_per_atom": (-100.0, 100.0),
    "energy_above_hull": (-0.999, 100.0),  # below zero: that of all other phases; -1 marks a missing one
    "band_gap": (-0.001, 100.0),
}
UNITS = dict.fromkeys(LIMITS, "eV/atom") | {"band_gap": "eV"}
MISSING = ("", "null", "none", "na", "n/a")


def make_schema(labels: Iterable[str]) -> pa.Schema:
    """Schema of materials.parquet with these columns of labels."""
    return pa.schema(
        [
            ("material_id", pa.string()),
            ("formula", pa.string()),
            (
                "structure",
                pa.struct(
                    [
                        ("lattice", pa.list_(pa.float64())),
                        ("species", pa.list_(pa.string())),
                        ("frac_coords", pa.list_(pa.float64())),
                    ]
                ),
            ),
            *((label, pa.float64()) for label in labels),
            ("text", pa.string()),
            ("origin", pa.string()),
            ("spacegroup", pa.int16()),
            ("n_sites", pa.int32()),
        ]
    )


SCHEMA = make_schema(LABELS)


@dataclass(frozen=True, slots=True)
class Material:
    """A row of materials.parquet. Labels in eV/atom, eV and GPa; None where missing."""

    material_id: str
    crystal: Crystal
    labels: dict[str, float | None]
    text: str | None
    origin: str
    spacegroup: int
    invalid: dict[str, Any]  # labels that were given, but as no number that a crystal can have, as given

    def digest(self) -> bytes:
        """Hash of everything but the id: equal for records that say the same."""
        said = repr((self.crystal.species, self.labels, self.text)).encode()
        numbers = self.crystal.lattice.tobytes() + self.crystal.frac_coords.tobytes()
        return hashlib.blake2b(said + numbers, digest_size=16).digest()


@dataclass
class Columns:
    """The column mapping at work.

    Attributes:
        mapping: our column -> path in the record; default names are tried for the others.
        fallback: whether they are also tried where a record has nothing at the path of its column.
        labels: columns of labels, those of LABELS unless the source has its own.
        found: columns that had a value in some record so far.
    """

    mapping: Mapping[str, str]
    labels: Sequence[str] = tuple(LABELS)
    fallback: bool = False
    found: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.mapping) - set(COLUMNS))
        if unknown:
            raise InputError(f"materials.columns: no column is called {unknown[0]}; use {', '.join(COLUMNS)}")

    def get(self, record: Mapping[str, Any], column: str) -> Any:
        """Look up one of our columns in a record; None where it is missing."""
        paths = COLUMNS.get(column, (column,))
        if column in self.mapping:
            paths = (self.mapping[column], *(paths if self.fallback else ()))
        for path in paths:
            value = look_up(record, path)
            if value is not None:
                self.found.add(column)
                return value
        return None

    def read(self, record: Mapping[str, Any], name: str, origin: str) -> Material:
        """Turn a record into a material. `name` (file:row) makes its id where it has none.

        Raises:
            RecordError: the record has no usable structure.
        """
        crystal = read_crystal({part: self.get(record, part) for part in STRUCTURE})
        labels, invalid = self.read_labels(record, self.labels)
        identifier = self.get(record, "material_id")
        text = self.get(record, "text")
        return Material(
            material_id=("" if identifier is None else str(identifier).strip()) or name.replace(":", "-"),
            crystal=crystal,
            labels=labels,
            text=text if isinstance(text, str) and text.strip() else None,
            origin=str(self.get(record, "origin") or origin),
            spacegroup=symmetry(crystal)[0],
            invalid=invalid,
        )

    def read_labels(
        self, record: Mapping[str, Any], labels: Iterable[str]
    ) -> tuple[dict[str, float | None], dict[str, Any]]:
        """Labels of a record, None where missing or impossible, and the impossible ones as given."""
        given = {label: self.get(record, label) for label in labels}
        read = {label: read_label(value, label) for label, value in given.items()}
        wrong = {
            label: value for label, value in given.items() if read[label] is None and not is_missing(value)
        }
        return read, wrong

    def check_found(self, unread: Mapping[str, Any] = COMPOSITION) -> None:
        """Refuse a mapping that names what no record has: a typing error would pass as missing values.

        Columns `unread` by the caller may stand in the mapping for the other study that shares it.
        """
        for column, path in self.mapping.items():
            if column not in self.found and column not in unread:
                raise InputError(
                    f"materials.columns.{column}: no record has a value at {path!r}; correct the path"
                )


def read_material(path: Path) -> Material:
    """The one crystal of a file, such as a CIF.

    Raises:
        InputError: there is no usable crystal in it.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such file; give one with a crystal, such as a CIF")
    for name, record in read_records(path):
        try:
            if isinstance(record, RecordError):
                raise record
            return Columns({}).read(record, name, "file")
        except RecordError as error:
            raise InputError(f"{path}: {error}; give a file with one ordered crystal") from error
    raise InputError(f"{path}: holds no crystal; give a file with one")


def is_missing(value: Any) -> bool:
    """Whether a cell says that there is no value."""
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING)


def read_label(value: Any, column: str) -> float | None:
    """Read a label: None where it is missing, or no number that a crystal can have."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    low, high = LIMITS.get(column, (-math.inf, math.inf))
    return number if math.isfinite(number) and low <= number <= high else None


def what_is_possible(label: str) -> str:
    """The numbers that a label can be, in words."""
    if label not in LIMITS:
        return "a number"
    low, high = LIMITS[label]
    return f"a number from {low:g} to {high:g} {UNITS[label]}"


def look_up(record: Mapping[str, Any], path: str) -> Any:
    """Follow a dotted path into a record; a key that itself has dots is found first."""
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    inner = record.get(head) if dot else None
    return look_up(inner, rest) if isinstance(inner, Mapping) else None


def to_table(materials: Sequence[Material]) -> pa.Table:
    """Pack materials, which have the same labels, into a table."""
    crystals, labels = [material.crystal for material in materials], list(materials[0].labels)
    columns = {
        "material_id": [material.material_id for material in materials],
        "formula": [crystal.formula for crystal in crystals],
        "structure": pack_crystals(crystals),
        **{label: [material.labels[label] for material in materials] for label in labels},
        "text": [material.text for material in materials],
        "origin": [material.origin for material in materials],
        "spacegroup": [material.spacegroup for material in materials],
        "n_sites": [len(crystal.species) for crystal in crystals],
    }
    return pa.table(columns, schema=make_schema(labels))
