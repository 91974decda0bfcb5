"""The models of the benchmark: one file an idea, one line in a registry each."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castbench.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from castbench.models.base import Network
    from castbench.models.composition import CompositionNetwork

# name -> where its constructor (architecture, encoder folder) is; imported when asked for.
REGISTRY = {
    "structure_only": "structure:StructureOnly",
    "text_only": "text:TextOnly",
    "crysmmnet_frozen": "concat:crysmmnet_frozen",
    "crysmmnet_lora": "concat:crysmmnet_lora",
    "multimat": "contrastive:MultiMat",
    "cast_scratch": "cross_attention:Cast",
    "cast": "cross_attention:Cast",
}
OBJECTIVES = {
    "masked_node": "cross_attention:MaskedNodePretraining",
    "contrastive": "contrastive:ContrastivePretraining",
}
# model of the composition study -> (constructor, section of sizes); the three EDMs differ by their loss.
COMPOSITION_REGISTRY = {
    "crabnet": ("crabnet:CrabNetStyle", "crabnet"),
    "edm_cross_entropy": ("edm_transformer:EDMTransformer", "edm_transformer"),
    "edm_alpha_report": ("edm_transformer:EDMTransformer", "edm_transformer"),
    "edm_transformer": ("edm_transformer:EDMTransformer", "edm_transformer"),
}


def build_composition_model(
    name: str, architecture: dict[str, Any], targets: list[str], task_weights: str = "sum"
) -> CompositionNetwork:
    """A model of `COMPOSITION_REGISTRY` with random new weights; `architecture` holds its section of sizes.

    Raises:
        InputError: unknown name.
    """
    if name not in COMPOSITION_REGISTRY:
        raise InputError(f"{name}: no such model; choose from {', '.join(COMPOSITION_REGISTRY)}")
    constructor, section = COMPOSITION_REGISTRY[name]
    module, function = constructor.split(":")
    found = getattr(import_module(f"castbench.models.{module}"), function)
    return found(architecture[section], targets, task_weights)


def build_model(name: str, architecture: dict[str, Any], encoder: Path | None) -> Network:
    """A model of `REGISTRY` with random new weights; `encoder` is the folder of the text encoder.

    `architecture` holds the sections of the config that the model uses.

    Raises:
        InputError: unknown name.
    """
    return _build(REGISTRY, "model", name, architecture, encoder)


def build_pretraining(objective: str, architecture: dict[str, Any], encoder: Path | None) -> Network:
    """A pretraining network of `OBJECTIVES`; arguments and errors as for `build_model`."""
    return _build(OBJECTIVES, "objective", objective, architecture, encoder)


def load_pretrained(model: Network, state: dict[str, Tensor]) -> None:
    """Start the submodules named in `model.pretrained` from the trained state of a pretraining network.

    Raises:
        InputError: the pretraining network lacks them or had another architecture.
    """
    own = model.trained_state()
    shared = {name for name in own if name.split(".")[0] in model.pretrained}
    if absent := sorted(shared - state.keys()):
        raise InputError(f"pretrained state: {absent[0]} is absent; pretrain with the settings of this model")
    model.load_trained_state(own | {name: state[name] for name in shared})


def _build(
    registry: dict[str, str], kind: str, name: str, architecture: dict[str, Any], encoder: Path | None
) -> Network:
    if name not in registry:
        raise InputError(f"{name}: no such {kind}; choose from {', '.join(registry)}")
    module, constructor = registry[name].split(":")
    return getattr(import_module(f"castbench.models.{module}"), constructor)(architecture, encoder)
