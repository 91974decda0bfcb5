"""Descriptions by the unpatched robocrystallographer: python describe_stock.py < crystals.jsonl > texts.jsonl

A line of input has `structure` (lattice, species, frac_coords, as in materials.parquet), a line of output
also text, or error, and the CPU seconds that it took. Settings are those of its command line: oxidation
states are guessed. Numpy 2's way to write an integer in an orientation, np.int64(0), becomes the number.

`--record FOLDER` prints what tests/reference/stock_texts.jsonl holds: the SHA-256 of each text of a sample of
the real crystals in FOLDER. It takes about half an hour.
"""

import hashlib
import json
import re
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from pymatgen.core import Structure
from robocrys import StructureCondenser, StructureDescriber


def main() -> None:
    """One JSON line a crystal."""
    if sys.flags.hash_randomization:
        sys.exit("word order depends on the hash seed: start with PYTHONHASHSEED=0")
    warnings.simplefilter("ignore")
    recording = "--record" in sys.argv
    if recording:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from real_crystals import DESCRIBED, sample

        rows = iter(sample(Path(sys.argv[sys.argv.index("--record") + 1]), DESCRIBED))
    else:
        rows = map(json.loads, sys.stdin)
    condenser, describer = StructureCondenser(), StructureDescriber()
    for row in rows:
        given = row.pop("structure")
        row.pop("description", None)  # not ours to record
        structure = Structure(
            np.reshape(given["lattice"], (3, 3)), given["species"], np.reshape(given["frac_coords"], (-1, 3))
        )
        start = time.process_time()
        try:
            with suppress(ValueError):
                structure.add_oxidation_state_by_guess(max_sites=-80)
            text = describer.describe(condenser.condense_structure(structure))
            row["text"] = re.sub(r"np\.int64\((-?\d+)\)", r"\1", text)
        except Exception as error:
            row["error"] = type(error).__name__
        row["seconds"] = time.process_time() - start
        if recording:
            del row["seconds"]
            if "text" in row:
                row["sha256"] = hashlib.sha256(row.pop("text").encode()).hexdigest()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
