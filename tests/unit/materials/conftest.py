"""Small real files of crystals, and the verbs run on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.materials.records import SCHEMA, Columns, to_table
from castbench.materials.sources import collect_materials

# As in the README: every column of elastic4 by name.
ELASTIC4 = {
    "material_id": "material_id",
    "lattice": "cell",
    "species": "species",
    "frac_coords": "frac",
    "energy_per_atom": "energy_per_atom",
    "formation_energy_per_atom": "formation_energy_per_atom",
    "band_gap": "band_gap",
    "k_voigt": "bulk_modulus.voigt",
    "k_reuss": "bulk_modulus.reuss",
    "k_vrh": "bulk_modulus.vrh",
    "g_voigt": "shear_modulus.voigt",
    "g_reuss": "shear_modulus.reuss",
    "g_vrh": "shear_modulus.vrh",
    "text": "description",
}


Collect = Callable[..., tuple[pa.Table, dict[str, Any]]]


@pytest.fixture
def salt() -> dict[str, Any]:
    """Caesium chloride with every label."""
    return {
        "material_id": "salt-1",
        "lattice": [[4.1, 0, 0], [0, 4.1, 0], [0, 0, 4.1]],
        "species": ["Cs", "Cl"],
        "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5]],
        "energy_per_atom": -3.4,
        "formation_energy_per_atom": -2.1,
        "energy_above_hull": 0.0,
        "band_gap": 5.1,
        **{f"k_{kind}": 17.0 for kind in ("voigt", "reuss", "vrh")},
        **{f"g_{kind}": 9.0 for kind in ("voigt", "reuss", "vrh")},
        "text": "CsCl is Tetraauricupride structured.",
    }


@pytest.fixture
def salt_cif() -> str:
    """Caesium chloride as a CIF with symmetry operations left to P1."""
    return make_cif("Cs1 Cs 0 0 0 1", "Cl1 Cl 0.5 0.5 0.5 1")


def make_cif(*atoms: str, a: str = "4.1") -> str:
    """A cubic CIF; an atom is label, symbol, x, y, z, occupancy."""
    return "\n".join(
        [
            "data_crystal",
            *(f"_cell_length_{axis} {a}" for axis in "abc"),
            *(f"_cell_angle_{angle} 90" for angle in ("alpha", "beta", "gamma")),
            "_symmetry_space_group_name_H-M 'P 1'",
            "loop_",
            "_symmetry_equiv_pos_as_xyz",
            "'x, y, z'",
            "loop_",
            *(f"_atom_site_{column}" for column in ("label", "type_symbol", "fract_x", "fract_y", "fract_z")),
            "_atom_site_occupancy",
            *atoms,
            "",
        ]
    )


@pytest.fixture
def collect(tmp_path: Path) -> Collect:
    """Collect a file, or records written as JSON lines; return the table and the manifest."""

    def run(
        crystals: Path | list[Any], columns: dict[str, str] | None = None, source: str = "local"
    ) -> tuple[pa.Table, dict[str, Any]]:
        if isinstance(crystals, list):
            lines = [record if isinstance(record, str) else json.dumps(record) for record in crystals]
            crystals = tmp_path / "crystals.jsonl"
            crystals.write_text("\n".join(lines) + "\n")
        output, manifest = tmp_path / "collected.parquet", tmp_path / "manifest.json"
        settings = {"source": source, "path": str(crystals), "columns": columns or {}}
        collect_materials(settings, output=output, manifest=manifest)
        return pq.read_table(output), json.loads(manifest.read_text())

    return run


@pytest.fixture
def write_materials(tmp_path: Path) -> Callable[..., Path]:
    """Write records as the table of collect_materials, in row groups of the size asked for."""

    def write(records: list[dict[str, Any]], group: int = 1000) -> Path:
        columns = Columns({})
        table = to_table([columns.read(record, f"row:{i}", "test") for i, record in enumerate(records)])
        path = tmp_path / "collected.parquet"
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for start in range(0, len(table), group):
                writer.write_table(table.slice(start, group))
        return path

    return write


@pytest.fixture(scope="session")
def elastic4(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real elastic crystals, collected: once, because symmetry takes 15 s of a core."""
    folder = tmp_path_factory.mktemp("elastic4")
    settings = {"source": "local", "path": str(shared_data / "elastic4.jsonl.zst"), "columns": ELASTIC4}
    collect_materials(settings, folder / "collected.parquet", folder / "manifest.json")
    return folder


@pytest.fixture(scope="session")
def hull(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real crystals whose energy above the hull is known, collected."""
    folder = tmp_path_factory.mktemp("hull")
    settings = {"source": "local", "path": str(shared_data / "mp20_hull.jsonl.zst"), "columns": {}}
    collect_materials(settings, folder / "collected.parquet", folder / "manifest.json")
    return folder
