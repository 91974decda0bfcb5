"""Where castbench departs from the papers, as workflow/resources/deviations.yaml says it."""

from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).resolve().parents[2] / "workflow" / "resources" / "deviations.yaml"


def deviations(study: str) -> list[dict[str, Any]]:
    """The entries that speak of a study, "cast", "compositions" or "matbench"."""
    entries = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return [entry for entry in entries if study in entry.get("study", ["cast"])]
