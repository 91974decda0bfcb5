"""Files in the format of Matbench's, with invented crystals."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from castbench.materials.matbench import published

CATIONS, ANIONS = ("Li", "Na", "K", "Rb", "Cs"), ("F", "Cl", "Br", "I")


def structure(number: int, a: float | None = None) -> dict[str, Any]:
    """Rock salt as pymatgen's dictionary, of another element or size for each number."""
    a = 4 + 0.05 * number if a is None else a
    matrix = [[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]]
    species = CATIONS[number % 5], ANIONS[number // 5 % 4]
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": None,
        "lattice": {"matrix": matrix},
        "sites": [
            {
                "species": [{"element": element, "occu": 1}],
                "abc": [x] * 3,
                "xyz": [x * a] * 3,
                "label": element,
            }
            for element, x in zip(species, (0.0, 0.5), strict=True)
        ],
    }


def values(task: str, n: int) -> list[Any]:
    """Numbers that follow from the size of the cell, or classes of which two fifths are metals."""
    if task == "matbench_mp_is_metal":
        return [number % 5 < 2 for number in range(n)]
    return [round(10 + 0.5 * number + np.sin(number), 4) for number in range(n)]


def write_task(
    folder: Path, task: str, n: int, overlapping: tuple[int, ...] = (), turned: bool = False
) -> Path:
    """Write {task}.json.gz; in the records `overlapping`, counted from 0, two atoms are in one place."""
    column = published(task).column
    rows = [
        [structure(i, 0.3 if i in overlapping else None), value] for i, value in enumerate(values(task, n))
    ]
    columns = ["structure", column]
    if turned:
        rows, columns = [row[::-1] for row in rows], columns[::-1]
    content = {"index": list(range(n)), "columns": columns, "data": rows}
    path = folder / f"{task}.json.gz"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path
