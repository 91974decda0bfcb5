"""A tiny random BERT, small crystals with text, and settings to match."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from castbench.models.batch import Batch
from castbench.provenance import sha256_file, write_json
from castbench.text.encoders import LayeredEncoder
from model_batches import SMALL_ENCODERS

WIDTH, LAYERS, VOCABULARY = 32, 3, 60
ARCHITECTURE = {
    "cogn": {"width": 16, "depth": 2},
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "layers": 2},
    "concat": {"width": 8, "dropout": 0.1},
    "contrastive": {"hidden": 24, "temperature": 0.2},
    "cross_attention": {
        "text": "frozen",
        "layers": 2,
        "heads": 4,
        "width": 16,
        "feedforward": 32,
        "dropout": 0.0,
    },
}


@pytest.fixture
def architecture():
    """The small settings; a test may change its copy."""
    return copy.deepcopy(ARCHITECTURE)


@pytest.fixture
def architecture_with():
    """Function name -> the small settings with that structure encoder."""

    def settings(name):
        found = copy.deepcopy(ARCHITECTURE)
        if name != "cogn":
            del found["cogn"]
            found[name] = SMALL_ENCODERS[name]
        return found

    return settings


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Folder of a random three-layer BERT, as prefetch_encoder leaves it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, **sizes)
    model = BertModel(config)
    for module in model.modules():  # BERT's own start is so small that attention is almost uniform
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model.save_pretrained(folder)
    files = {name: sha256_file(folder / name) for name in ("config.json", "model.safetensors")}
    write_json(folder / "manifest.json", {"files": files, "hidden_size": WIDTH, "layers": LAYERS})
    return folder


@pytest.fixture(scope="session")
def states(encoder):
    """Function (token ids (T,), layer) -> states (T, d) of one text after that many layers."""
    backbone = LayeredEncoder.from_folder(encoder)

    @torch.no_grad()
    def run(ids, layer):
        hidden = backbone.embed(ids[None])
        return backbone.run(hidden, torch.ones(1, len(ids), dtype=torch.bool), 0, layer)[0]

    return run


@pytest.fixture(scope="session")
def crystals(states):
    """Function layer -> five crystals, each a batch of its own; the last has [CLS] alone for a text."""

    def make(layer=None):
        generator = torch.Generator().manual_seed(11)

        def integers(low, high, size):
            return torch.randint(low, high, (size,), generator=generator)

        made = []
        for n_nodes, n_tokens in ((1, 7), (4, 12), (2, 30), (6, 3), (3, 1)):
            n_edges = 5 * n_nodes  # five into each node
            source = integers(0, n_nodes, n_edges)
            distances = 2 + 5 * torch.rand(n_edges, generator=generator)
            directions = functional.normalize(torch.randn(n_edges, 3, generator=generator))
            ids = integers(1, VOCABULARY, n_tokens)
            made.append(
                Batch(
                    n=1,
                    atomic_numbers=integers(1, 119, n_nodes),
                    multiplicities=integers(1, 5, n_nodes).float(),
                    node_offsets=torch.tensor([0, n_nodes]),
                    edge_source=source,
                    edge_target=torch.arange(n_nodes).repeat_interleave(5),
                    distances=distances,
                    edge_multiplicities=integers(1, 4, n_edges).float(),
                    vectors=directions * distances[:, None],
                    edge_reverse=5 * source + integers(0, 5, n_edges),
                    ridge_areas=10 * torch.rand(n_edges, generator=generator),
                    token_ids=ids,
                    token_states=None if layer is None else states(ids, layer),
                    cls_states=None if layer is None else states(ids, layer)[:1],
                    token_offsets=torch.tensor([0, n_tokens]),
                    targets=torch.randn(1, generator=generator),
                    masked_nodes=torch.arange(n_nodes) % 2 == 0,
                )
            )
        return made

    return make
