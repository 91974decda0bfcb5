"""What the EDM Transformer sees of a formula, and what its heads look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pymatgen.core import Element

from castbench.compositions.descriptors import N_FEATURES, descriptor_matrix
from castbench.compositions.formulas import encode_formulas
from castbench.errors import InputError
from castbench.evaluation.ensemble import Ensemble
from castbench.materials.structures import RecordError
from castbench.models.composition import CompositionBatch
from castbench.models.edm_transformer import EDMTransformer
from castbench.provenance import write_json
from castbench.training.session import make_fabric


def explain_compositions(settings: dict[str, Any], seeds: list[int], runs: Path, output: Path) -> None:
    """Write the element descriptor matrix of one formula, and the attention of every head on another.

    Args:
        settings: those of the EDM Transformer's runs, and the formulas `edm` and `attention`.
        seeds: whose runs are looked at.
        runs: folder of the model, with a folder a seed.
        output: JSON file to write. `edm`: its matrix (slots, 466). `attention`: tokens, [CLS] first and
            padding last, and for every seed that finished the weights (layers, heads, queries, keys), 0 at
            padding.

    Raises:
        InputError: a formula that cannot be encoded, or no finished run.
    """
    try:
        numbers, fractions = encode_formulas(
            [settings["edm"], settings["attention"]], settings["max_elements"]
        )
    except RecordError as error:
        raise InputError(f"compositions.explain: {error}; change the formula") from None
    ensemble = Ensemble(settings, runs, seeds, make_fabric("cpu", "32-true", devices=1))
    batch = CompositionBatch(torch.from_numpy(numbers[1:]).long(), torch.from_numpy(fractions[1:]))
    found = {}
    for seed, (module, _) in zip(ensemble.seeds, ensemble.members, strict=True):
        network = module.module
        assert isinstance(network, EDMTransformer)
        with torch.inference_mode():
            _, mask, maps = network.encode(batch, weights=True)
        weights = torch.cat(maps).numpy() * mask[0, :, None].numpy()  # padded queries mean nothing
        found[str(seed)] = weights.round(5).tolist()
    content = {
        "edm": {
            "formula": settings["edm"],
            "slots": tokens(numbers[0]),
            "matrix": descriptor_matrix(numbers[:1], fractions[:1])[0].round(4).tolist(),
            "features": N_FEATURES,
        },
        "attention": {
            "formula": settings["attention"],
            "tokens": ["[CLS]", *tokens(numbers[1])],
            "seeds": found,
        },
    }
    write_json(output, content)


def tokens(numbers: np.ndarray) -> list[str]:
    """Names of the slots: symbols, [PAD] at padding."""
    return [Element.from_Z(int(z)).symbol if z else "[PAD]" for z in numbers]
