"""Pretrain on the training crystals of all targets: masked nodes (CAST) or contrastive (MultiMat)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from castbench.materials.splits import PARTS, load_split
from castbench.models import build_pretraining
from castbench.models.base import Network
from castbench.models.batch import Batch, with_text
from castbench.provenance import alone_in
from castbench.staging import stage_cache
from castbench.text.states import round_states
from castbench.training.dataset import Crystals
from castbench.training.loop import Trainer
from castbench.training.objectives import MaskedNode, Pretraining
from castbench.training.records import Result, encoder_record, run_result, write_run
from castbench.training.schedule import generator
from castbench.training.session import open_session, run_key

log = logging.getLogger(__name__)

Alter = Callable[[Batch, Tensor], Batch]  # a batch of rows, and the rows
OBJECTIVES: dict[str, type[Pretraining]] = {"masked_node": MaskedNode, "contrastive": Pretraining}


def pretrain_model(
    settings: dict[str, Any],
    objective: str,
    seed: int,
    graphs: Path,
    tokens: Path,
    states: Path | None,
    encoder: Path,
    splits: list[Path],
    output: Path,
    threads: int,
    stage: int = 0,
) -> None:
    """Pretrain with `objective` and write a run folder.

    Trains on the crystals that are in the train list of some target and in no other list of any, and selects
    by the loss on those in some validation list and in no test list: no crystal is seen before its time.

    Args:
        settings: {dataset, architecture, training, pretraining: that of the objective}; as in config.json.
        objective: "masked_node" or "contrastive".
        seed: of weights, data order and masks.
        graphs: cache of graphs.
        tokens: cache of tokens.
        states: cache of token states, for a network that reads them.
        encoder: folder of the text encoder.
        splits: id lists of all targets.
        output: the run folder {seed}/; checkpoints/{seed}/ beside it is undeclared.
        threads: cores that the job has.
        stage: 1 copies the caches to the node's own disk first.

    Raises:
        InputError: a cache is missing or of other materials; no such objective.
    """
    fabric = open_session(settings["training"], threads)
    if stage:
        graphs, tokens = stage_cache(graphs), stage_cache(tokens)
        states = states and stage_cache(states)
    torch.manual_seed(seed)
    network = build_pretraining(objective, settings["architecture"], encoder)
    crystals = Crystals(network, graphs, tokens, states, fabric.device)
    lists = [load_split(path) for path in splits]
    train, validation, test = ({i for ids in lists for i in ids[part]} for part in PARTS)
    rows, _ = crystals.rows(sorted(train - validation - test))
    held_out, _ = crystals.rows(sorted(validation - test))
    record = {
        "dataset": settings["dataset"],
        "objective": objective,
        "seed": seed,
        "n": {"train": len(rows), "validation": len(held_out)},
        "n_without_text": crystals.n_without_text(torch.cat([rows, held_out])),
        "text_encoder": encoder_record(network, encoder),
        "validation": None,
        "inputs": crystals.checksums | {"splits": [ids["checksum"] for ids in lists]},
    }
    task = OBJECTIVES[objective](crystals, rows, held_out, settings["pretraining"], seed)
    if len(rows) and len(held_out):
        log.info("%s, seed %d: %s", objective, seed, record["n"])
        result = run_objective(
            network, task, record, settings, fabric, output.parent / "checkpoints" / output.name, encoder
        )
    else:
        result = Result("skipped", "no target has enough crystals")
        log.warning("%s, seed %d: skipped, %s", objective, seed, result.reason)
    if fabric.is_global_zero:
        config = settings | {"objective": objective, "seed": seed}
        with alone_in(output):
            write_run(output, record, config, result, task.columns)


def run_objective(
    network: Network,
    task: Pretraining,
    record: dict[str, Any],
    settings: dict[str, Any],
    fabric: Fabric,
    checkpoints: Path,
    encoder: Path,
) -> Result:
    """Pretrain, then evaluate the best weights on validation; masked nodes also without their own text."""
    key, epochs = run_key(fabric, settings=settings, record=record), settings["pretraining"]["epochs"]
    trainer = Trainer(network, task, settings["training"], epochs, record["seed"], fabric, checkpoints, key)
    trainer.fit()
    result = run_result(trainer, task.crystals.ids)
    if result.status == "failed":
        return result
    loss, accuracy = task.evaluate(trainer.module)
    scores = {"loss": loss, "accuracy": accuracy}
    if isinstance(task, MaskedNode):
        controls = {
            "shuffled_text": shuffled_text(task),
            "without_text": without_text(task, network, encoder),
        }
        scores |= {
            f"accuracy_{name}": task.evaluate(trainer.module, alter)[1] for name, alter in controls.items()
        }
    log.info("%s, validation: %s", record["objective"], scores)
    result.record["validation"] = scores
    return result


def shuffled_text(task: Pretraining) -> Alter:
    """Give each validation crystal the text of another: one cycle through all of them in random order."""
    cycle = task.validation[torch.randperm(len(task.validation), generator=generator("shuffled text"))]
    donors = torch.arange(len(task.crystals.material_ids))
    donors[cycle] = cycle.roll(1)

    def alter(batch: Batch, rows: Tensor) -> Batch:
        return with_text(batch, task.crystals.batch(donors[rows]))

    return alter


def without_text(task: Pretraining, network: Network, encoder: Path) -> Alter:
    """Leave each crystal [CLS] alone, as for one that has no description."""
    assert task.crystals.cls_id is not None and network.text is not None
    token = torch.tensor([task.crystals.cls_id], device=task.crystals.device)
    state = None
    if network.text_layer is not None:
        from castbench.text.encoders import LayeredEncoder  # seconds, and only a frozen text needs it

        model = LayeredEncoder.from_folder(encoder).to(token.device)
        with torch.inference_mode():
            mask = torch.ones(1, 1, dtype=torch.bool, device=token.device)
            state = round_states(model.run(model.embed(token[None]), mask, 0, network.text_layer)[0])

    def alter(batch: Batch, rows: Tensor) -> Batch:
        alone = Batch(batch.n, token_offsets=torch.arange(batch.n + 1, device=token.device))
        if state is None:
            alone.token_ids = token.expand(batch.n)
        else:
            alone.token_states = state.expand(batch.n, -1)
        return with_text(batch, alone)

    return alter
