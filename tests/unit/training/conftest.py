"""A small data set in the pipeline's formats, and the command lines that the workflow would give for it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from castbench.graphs.crystal_graph import CrystalGraph
from castbench.graphs.packed import PackedWriter
from castbench.labels import TARGETS
from castbench.materials.splits import write_split
from castbench.provenance import sha256_file
from castbench.text.encoders import prefetch_encoder
from castbench.text.states import embed_text
from castbench.text.tokens import tokenize_text
from training_jobs import run_job, words

N, TARGET, WITHOUT_GRAPH, WITHOUT_TEXT = 40, "total_energy", 7, 11
ARCHITECTURE: dict[str, Any] = {
    "cogn": {"width": 8, "depth": 1},
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "layers": 1},
    "concat": {"width": 8, "dropout": 0.1},
    "contrastive": {"width": 8, "hidden": 8, "temperature": 0.2},
    "cross_attention": {
        "text": "frozen", "layers": 1, "heads": 2, "width": 8, "feedforward": 16, "dropout": 0.1,
    },
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "lora_learning_rate": 1e-2, "weight_decay": 1e-2,
    "loss": "l1", "warmup_steps": 1000, "cycles": 2, "precision": "32-true", "device": "cpu", "threads": 1,
}  # fmt: skip
PRETRAINING = {
    "masked_node": {"epochs": 3, "batch_size": 8, "mask_probability": 0.5},
    "contrastive": {"epochs": 3, "batch_size": 12},
}
PRETRAINED = {"multimat": "contrastive", "cast": "masked_node"}
ADAPTED = ("text_only", "crysmmnet_lora")  # models with LoRA
LAYERS = 2  # of the text encoder


@dataclass(frozen=True)
class DataSet:
    """The folder of a data set, and what the workflow would call on it."""

    root: Path

    def settings(self, name: str, **training: Any) -> dict[str, Any]:
        """Settings of a model or an objective."""
        settings = {"dataset": "invented", "architecture": ARCHITECTURE, "training": TRAINING | training}
        return settings | ({"pretraining": PRETRAINING[name]} if name in PRETRAINING else {})

    def caches(self, name: str) -> dict[str, Any]:
        """Paths of the caches for a model or an objective."""
        remaining = ARCHITECTURE["lora"]["layers"] if name in ADAPTED else 0
        return {
            "graphs": self.root / "graphs",
            "tokens": self.root / "tokens",
            "states": self.root / "text_states" / str(remaining),
            "encoder": self.root / "encoder",
        }

    def pretrain(self, objective: str, output: Path, **training: Any) -> list[str]:
        """The command that pretrains with seed 0 into `output`."""
        return words(
            "pretrain_model",
            settings=self.settings(objective, **training),
            objective=objective,
            seed=0,
            **self.caches(objective),
            splits=[self.root / "splits" / f"{TARGET}.json"],
            output=output,
            threads=1,
        )

    def train(self, model: str, output: Path, seeds: tuple[int, ...] = (0,), **training: Any) -> list[str]:
        """The command that trains `model` with `seeds` into `output`."""
        objective = PRETRAINED.get(model)
        return words(
            "train_model",
            settings=self.settings(model, **training),
            model=model,
            target=TARGET,
            seeds=list(seeds),
            materials=self.root / "materials.parquet",
            split=self.root / "splits" / f"{TARGET}.json",
            **self.caches(model),
            pretrained=[self.root / "pretrain" / objective / str(seed) for seed in seeds]
            if objective
            else [],
            output=output,
            threads=1,
        )


@pytest.fixture(scope="session")
def pretrained(data: DataSet) -> DataSet:
    """The data set with both pretrainings, seeds 0 to 2."""
    for objective in ("masked_node", "contrastive"):
        folder = data.root / "pretrain" / objective
        assert run_job(data.pretrain(objective, folder / "0")) == 0
        for seed in ("1", "2"):
            shutil.copytree(folder / "0", folder / seed)
    return data


def write_graphs(folder: Path, materials: Path, ids: list[str]) -> None:
    """Random graphs; the crystal WITHOUT_GRAPH has none."""
    rng = np.random.default_rng(1)
    graphs: list[CrystalGraph | str] = []
    for i in range(len(ids)):
        n, e = 1 + i % 4, 6 + i % 5
        source, target = (
            rng.integers(0, n, e).astype(np.int32),
            np.sort(rng.integers(0, n, e)).astype(np.int32),
        )
        elements, atoms = rng.integers(1, 90, n).astype(np.uint8), rng.integers(1, 5, n).astype(np.float32)
        distances, edges = rng.uniform(1.5, 6, e).astype(np.float32), rng.integers(1, 4, e).astype(np.float32)
        graphs.append(CrystalGraph(elements, atoms, source, target, distances, edges, 1))
    graphs[WITHOUT_GRAPH] = "two atoms are in one place"
    with PackedWriter(
        folder, {"structure_encoder": "cogn", "neighbours": 24}, sha256_file(materials)
    ) as writer:
        writer.append(ids, graphs)


def write_text(root: Path, ids: list[str]) -> None:
    """A random BERT, and its tokens and states of random texts, by the verbs; WITHOUT_TEXT has none."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    bert, vocabulary = root / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(20))]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(bert / "vocab.txt")).save_pretrained(bert)
    rng = np.random.default_rng(2)
    texts = [" ".join(map(str, rng.integers(0, 20, 3 + i % 9))) for i in range(len(ids))]
    texts[WITHOUT_TEXT] = None
    pq.write_table(pa.table({"material_id": ids, "text": texts}), root / "descriptions.parquet")
    prefetch_encoder(str(bert), root / "encoder")
    tokenize_text({"max_tokens": 16}, root / "descriptions.parquet", root / "encoder", root / "tokens")
    for remaining in (0, ARCHITECTURE["lora"]["layers"]):
        embed_text(root / "tokens", root / "encoder", remaining, root / "text_states" / str(remaining))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Forty crystals with random graphs, texts and energies."""
    root = tmp_path_factory.mktemp("invented")
    rng = np.random.default_rng(0)
    ids = [f"m-{i}" for i in range(N)]
    materials = root / "materials.parquet"
    pq.write_table(pa.table({"material_id": ids, TARGETS[TARGET].column: rng.normal(-5, 2, N)}), materials)
    lists = {"train": ids[:28], "validation": ids[28:34], "test": ids[34:]}
    write_split(root / "splits" / f"{TARGET}.json", {"target": TARGET}, lists)
    write_graphs(root / "graphs", materials, ids)
    write_text(root, ids)
    return DataSet(root)
