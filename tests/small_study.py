"""A small data set with descriptions, and runs of untrained models, as the workflow would leave them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import nn

from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.packed import PackedWriter
from castbench.materials.splits import write_split
from castbench.models import OBJECTIVES, build_model, build_pretraining
from castbench.provenance import sha256_file, write_json
from castbench.text.encoders import prefetch_encoder
from castbench.text.states import embed_text
from castbench.text.tokens import tokenize_text

# The fourth has more elements than the third; the ninth and tenth are not in test.
NODES = [1, 2, 4, 4, 3, 1, 2, 3, 5, 2]
IDS = [f"m-{i}" for i in range(len(NODES))]
TEST, WITHOUT_TEXT, WITHOUT_GRAPH = IDS[:8], 0, 7
TEXTS = [
    "MgO is Halite structured and crystallizes in the cubic Fm-3m space group. Mg(1)2+ is bonded to six "
    "equivalent O(1)2- atoms to form MgO6 octahedra. The corner-sharing octahedra are not tilted. All "
    "Mg(1)-O(1) bond lengths are 2.12 Å.",
    "TiO2 crystallizes in the tetragonal I4_1/amd space group. Ti(1) is bonded to six O(1) atoms.",
]
MAX_TOKENS = 150
SEEDS = [0, 1]
ARCHITECTURE = {
    "cogn": {"width": 8, "depth": 1},
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "layers": 1},
    "concat": {"width": 8, "dropout": 0.1},
    "cross_attention": {
        "text": "frozen", "layers": 2, "heads": 2, "width": 8, "feedforward": 16, "dropout": 0.1,
    },
}  # fmt: skip


def write_encoder(folder: Path) -> None:
    """A random BERT of two layers whose word pieces are single letters and a few words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()] + ["å", "°"]
    words = ["is", "cubic", "bonded", "space", "group", "atoms", "the", "to"]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *words,
        *letters,
        *(f"##{x}" for x in letters),
    ]
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=600, **sizes)
    model = BertModel(config)
    for module in model.modules():  # BERT's own start is so small that attention is almost uniform
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), strip_accents=False).save_pretrained(folder)


MASKED = 0.8  # share of nodes that pretraining hides


def write_graphs(root: Path) -> None:
    """Random graphs; the crystal WITHOUT_GRAPH has none."""
    rng = np.random.default_rng(1)
    graphs: list[CrystalGraph | str] = []
    for row, n in enumerate(NODES):
        elements = np.array([8] * n if row == 2 else [12, 8, 8, 13, 1][:n], np.uint8)
        source, target = (rng.integers(0, n, 6).astype(np.int32) for _ in range(2))
        ones, distances = np.ones(6, np.float32), rng.uniform(2, 5, 6).astype(np.float32)
        graphs.append(
            CrystalGraph(elements, np.ones(n, np.float32), source, np.sort(target), distances, ones, 1)
        )
    graphs[WITHOUT_GRAPH] = "two atoms are in one place"
    settings = {"structure_encoder": "cogn", "neighbours": 24, "symprec": 1e-4, "spglib": "any"}
    with PackedWriter(root / "graphs", settings, sha256_file(root / "materials.parquet")) as writer:
        writer.append(IDS, graphs)


def write_run(folder: Path, name: str, encoder: Path, **record: object) -> None:
    """A run, or a pretraining, of a model that nobody trained; its adapters are moved off zero."""
    objective = name in OBJECTIVES
    model = (build_pretraining if objective else build_model)(name, ARCHITECTURE, encoder)
    with torch.no_grad():
        for parameter in model.parameter_groups()["lora"]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    config = {"objective" if objective else "model": name, "architecture": ARCHITECTURE}
    if objective:
        config["pretraining"] = {"mask_probability": MASKED}
    write_json(folder / "config.json", config)
    state = {key: value.contiguous() for key, value in model.trained_state().items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / "metrics.json", {"status": "finished", "text": model.text_mode, **record})


def write_study(results: Path) -> Path:
    """The folder results/{dataset}; runs of all models that read text are on band_gap, with every seed."""
    torch.manual_seed(0)
    root = results / "small"
    root.mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "material_id": IDS,
                "formula": [f"F{i}" for i in IDS],
                "spacegroup": pa.array([225, 1, 2, 62, 62, 194, 166, 62, 2, 1], pa.int16()),
                "band_gap": np.linspace(0, 3, len(IDS)),
            }
        ),
        root / "materials.parquet",
    )
    lists = {"train": IDS[8:], "validation": [], "test": TEST}
    write_split(root / "splits" / "band_gap.json", {"target": "band_gap"}, lists)
    write_graphs(root)
    texts = [TEXTS[i % 2] for i in range(len(IDS))]
    texts[WITHOUT_TEXT] = None
    pq.write_table(pa.table({"material_id": IDS, "text": texts}), root / "descriptions.parquet")
    encoder = results / "encoders" / "bert"
    write_encoder(results / "bert")
    prefetch_encoder(str(results / "bert"), encoder)
    tokenize_text({"max_tokens": MAX_TOKENS}, root / "descriptions.parquet", encoder, root / "tokens")
    embed_text(root / "tokens", encoder, 0, root / "text_states" / "0")
    scale = {"target": "band_gap", "target_mean": 2.0, "target_std": 3.0}
    models = ("cast_scratch", "cast", "crysmmnet_frozen", "crysmmnet_lora", "text_only", "structure_only")
    for place, (name, seed) in enumerate((name, seed) for name in models for seed in SEEDS):
        record = scale | {"model": name, "seed": seed, "test": {"mae": 0.5}}
        run = root / "runs" / "band_gap" / name / str(seed)
        write_run(run, name, encoder, **record)
        errors = np.random.default_rng(place).normal(size=len(TEST))
        found = {"material_id": TEST, "split": "test", "y_true": 0.0, "y_pred": errors}
        pd.DataFrame(found).to_parquet(run / "predictions.parquet")
    for seed in SEEDS:
        run = root / "pretrain" / "masked_node" / str(seed)
        write_run(run, "masked_node", encoder, objective="masked_node")
    return root
