"""Multiply-adds of one crystal in a training step, from a run's settings alone: how cost grows with size.

Matrix products are counted, which is where the time of large models goes; activations, norms, embeddings,
padding and the heads are not. `tests/unit/report/test_work.py` compares with what torch counts.
"""

import math
from dataclasses import dataclass
from typing import Any

FUSION = ("lora", "concat", "contrastive", "cross_attention")  # sections beside the structure encoder's
BASIS = 32  # distance basis of coGN
MESSAGE_LAYERS = 4  # of coGN's message network after its first
TRAINED = 3  # forward, gradient by the input, gradient by the weights
PASSED = 2  # one gradient less: by frozen weights, or by a frozen input


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a BERT."""

    layers: int
    width: int
    feedforward: int


@dataclass(frozen=True)
class CrystalSize:
    """Means over crystals: nodes and edges of the graph, tokens before and after the cut."""

    nodes: float
    edges: float
    tokens_full: float
    tokens: float


def structure_work(sizes: dict[str, Any], crystal: CrystalSize) -> float:
    """Forward pass of the structure encoder with coGN's constants, for which a measured factor makes up."""
    width, depth = sizes["width"], sizes.get("depth") or layers_of(sizes)
    edge = BASIS * width + MESSAGE_LAYERS * width**2
    node = 3 * width**2  # receiver, sender, update
    return float(depth * (crystal.edges * edge + crystal.nodes * node))


def layers_of(sizes: dict[str, Any]) -> int:
    """Number of layers that an encoder without a `depth` has."""
    return sum(value for key, value in sizes.items() if key.endswith(("layers", "blocks")))


def layer_work(shape: EncoderShape, tokens: float) -> float:
    """Forward pass of one layer of the text encoder over all tokens."""
    dense = 4 * shape.width**2 + 2 * shape.width * shape.feedforward
    return tokens * dense + 2 * tokens**2 * shape.width


def first_token_work(shape: EncoderShape, tokens: float) -> float:
    """The same for the output at the first token alone: keys and values of all, the rest of one."""
    one = 2 * shape.width**2 + 2 * shape.width * shape.feedforward
    return tokens * 2 * shape.width**2 + one + 2 * tokens * shape.width


def fusion_work(sizes: dict[str, Any], n_node: int, crystal: CrystalSize) -> float:
    """Forward pass of CAST's cross-attention layers, but for keys and values."""
    dense = 2 * n_node * sizes["width"] + 2 * n_node * sizes["feedforward"]
    return sizes["layers"] * crystal.nodes * (dense + 2 * crystal.tokens * sizes["width"])


def key_work(sizes: dict[str, Any], n_text: int, crystal: CrystalSize) -> float:
    """Forward pass of their keys and values."""
    return sizes["layers"] * crystal.tokens * 2 * n_text * sizes["width"]


def step_work(settings: dict[str, Any], shape: EncoderShape, crystal: CrystalSize) -> float:
    """Multiply-adds that one crystal costs in a training step.

    Args:
        settings: {text, architecture, ...} of a model or a pretraining, as in a run's config.json.
        shape: of the text encoder.
        crystal: its size.
    """
    sections, tuned = settings["architecture"], settings["text"] == "lora"
    trained, passed = 0.0, 0.0
    structure = next((sizes for name, sizes in sections.items() if name not in FUSION), None)
    if structure:
        trained += structure_work(structure, crystal)
    fusion = sections.get("cross_attention")
    if fusion and structure:
        trained += fusion_work(fusion, structure["width"], crystal)
        keys = key_work(fusion, shape.width, crystal)
        trained, passed = (trained + keys, passed) if tuned else (trained, passed + keys)
    if tuned:
        layers = shape.layers if sections["lora"]["layers"] == "all" else sections["lora"]["layers"]
        below = layers if fusion else layers - 1  # without fusion only [CLS] leaves the last one
        passed += below * layer_work(shape, crystal.tokens)
        passed += (layers - below) * first_token_work(shape, crystal.tokens)
    return TRAINED * trained + PASSED * passed


def embedding_work(remaining: int, shape: EncoderShape, crystal: CrystalSize) -> float:
    """Multiply-adds of the frozen layers, of one crystal, once."""
    return (shape.layers - remaining) * layer_work(shape, crystal.tokens)


def mean_of_cut(mean: float, deviation: float, limit: float) -> float:
    """Mean of min(x, limit) for log-normal x of this mean and standard deviation."""
    variance = math.log1p((deviation / mean) ** 2)
    centre, spread = math.log(mean) - variance / 2, math.sqrt(variance)
    place = (math.log(limit) - centre) / spread
    return mean * _normal(place - spread) + limit * (1 - _normal(place))


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
