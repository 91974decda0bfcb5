"""Evenly spread samples of the real crystals beside the project."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from pymatgen.core import Lattice

ROWS = {"elastic4": 2880, "mp36k": 33124, "phonons_text": 1103}
# The crystals whose stock descriptions are recorded in tests/reference/: 202, of 1 to 138 sites.
DESCRIBED = {"elastic4": 80, "mp36k": 90, "phonons_text": 30}


def sample(folder: Path, counts: dict[str, int]) -> list[dict[str, Any]]:
    """About that many crystals of each file: file, material_id, nsites, structure (as materials.parquet), and
    its own description, if it has one."""
    found = []
    for name, count in counts.items():
        with zstandard.open(folder / f"{name}.jsonl.zst", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, itertools.islice(lines, 0, None, max(ROWS[name] // count, 1))):
                structure = {
                    "lattice": Lattice.from_parameters(*row["cell"]).matrix.ravel().tolist(),
                    "species": row["species"],
                    "frac_coords": np.ravel(row["frac"]).tolist(),
                }
                kept = {key: row[key] for key in ("material_id", "nsites")}
                text = row.get("description")
                found.append({"file": name, **kept, "structure": structure, "description": text})
    return found
