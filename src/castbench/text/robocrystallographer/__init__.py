"""Robocrystallographer (Ganose and Jain, MRS Commun. 9, 874, 2019), the same text thirty times as fast."""

import sys
import warnings
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import numpy as np

from castbench.errors import InputError

# Versions whose texts were compared with ours: tests/reference/make_robocrystallographer_texts.py.
COMPARED = {
    "robocrys": "0.2.13",
    "pymatgen": "2026.10.24",
    "pymatgen-core": "2026.10.16",
    "matminer": "0.10.1",
}


def check_versions() -> None:
    """Refuse versions that were not compared.

    Raises:
        InputError: one of the packages has another version.
    """
    for package, compared in COMPARED.items():
        if version(package) != compared:
            raise InputError(
                f"{package} {version(package)}: its descriptions were not compared with ours; install "
                f"{compared}, or compare them (src/castbench/text/robocrystallographer/README.md)"
            )


def prepare() -> None:
    """Imports and tables that every description needs, outside its time limit."""
    if sys.flags.hash_randomization:
        raise RuntimeError("word order depends on the hash seed: start Python with PYTHONHASHSEED=0")
    warnings.simplefilter("ignore")
    _load()


def describe(structure: dict[str, list]) -> str:
    """Description of one crystal (`structure` of materials.parquet), oxidation states guessed."""
    from pymatgen.core import Structure

    crystal = Structure(
        np.reshape(structure["lattice"], (3, 3)),
        structure["species"],
        np.reshape(structure["frac_coords"], (-1, 3)),
    )
    with suppress(ValueError):  # no charge-balanced guess: described without, as its command line does
        crystal.add_oxidation_state_by_guess(max_sites=-80)
    condenser, describer = _load()
    return describer.describe(_plain_integers(condenser.condense_structure(crystal)))


def import_package() -> None:
    """Import robocrystallographer in a quarter of the time."""
    from monty.serialization import loadfn

    def skip_aflow(path: str) -> Any:
        # pymatgen's own prototypes, 5 of 12 s of import: robocrystallographer never looks into them
        return {} if "/prototypes/" in path else loadfn(path)

    with patch("monty.serialization.loadfn", skip_aflow):
        import pymatgen.analysis.prototypes  # noqa: F401
    # 3 s of import less: inflect has each of its functions checked at every call
    with patch("typeguard.typechecked", lambda function: function):
        import robocrys  # noqa: F401


@cache
def _load() -> tuple[Any, Any]:
    """Condenser and describer of this process."""
    check_versions()
    import_package()
    from robocrys import StructureCondenser, StructureDescriber
    from robocrys.condense import condenser, site

    from castbench.text.robocrystallographer.minerals import FastMineralMatcher
    from castbench.text.robocrystallographer.sites import FastCrystalNN, FastSiteAnalyzer, site_fingerprints

    namer = condenser.MoleculeNamer(use_online_pubchem=False)  # its table is loaded for every crystal else
    condenser.MoleculeNamer = lambda: namer  # type: ignore[assignment,misc]
    condenser.SiteAnalyzer = FastSiteAnalyzer  # type: ignore[misc]
    site.get_site_fingerprints = site_fingerprints  # type: ignore[assignment]
    return (
        StructureCondenser(near_neighbors=FastCrystalNN(), mineral_matcher=FastMineralMatcher()),
        StructureDescriber(fmt="raw"),
    )


def _plain_integers(value: Any) -> Any:
    """Replace numpy integers by Python's: numpy 2 writes orientations as (np.int64(0), ...)."""
    if isinstance(value, dict):
        return {_plain_integers(key): _plain_integers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain_integers(entry) for entry in value)
    return int(value) if isinstance(value, np.integer) else value
