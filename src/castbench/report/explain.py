"""What a trained model makes of one new crystal and its text, as a small HTML page."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from castbench.errors import InputError
from castbench.evaluation.attention import attention, node_names
from castbench.evaluation.new_crystals import make_caches, run_encoder
from castbench.evaluation.probes import Row, Subject, parts_of
from castbench.evaluation.records import read_run
from castbench.evaluation.trained import results_of
from castbench.labels import MODELS, TARGETS
from castbench.materials.records import Material, read_material, to_table
from castbench.models.cross_attention import Cast
from castbench.report.attention import ORDER_NAMES, PART_COLOURS, browser_maps, quantised
from castbench.report.html import write_page
from castbench.text.reading import LABELS, Reader, Reading

log = logging.getLogger(__name__)


def explain(run: Path, crystal: Path, /, output: Path | None = None) -> None:
    """Predict one new crystal with a trained model and write a page on what the model read in its text.

    The page has the prediction, the description with what the model attends to, and what becomes of the
    prediction when parts of the text are taken out. Graph and text are made as for the run's data set.

    Args:
        run: a run folder, results/{dataset}/runs/{target}/{model}/{seed}, of a model that reads text.
        crystal: a file with one crystal, such as a CIF.
        output: the page; by default {crystal}.html in the current folder.

    Raises:
        InputError: the run did not finish or its model reads no text; the crystal cannot be used.
    """
    record = read_run(run)
    if record["status"] != "finished" or "target" not in record:
        raise InputError(f"{run}: no finished run is here; give results/DATASET/runs/TARGET/MODEL/SEED")
    if record["text"] == "none":
        raise InputError(f"{run}: {record['model']} reads no text; take a run of another model")
    results = results_of(run)
    encoder = run_encoder(record, results)
    assert encoder is not None
    material = read_material(crystal)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pq.write_table(to_table([material]), folder / "materials.parquet")
        make_caches(folder / "materials.parquet", folder, results, encoder)
        subject = Subject(run, record, folder / "graphs", folder / "tokens", encoder)
        if not subject.crystals.has_graph[0]:
            raise InputError(f"{crystal}: its graph cannot be built; the log says why")
        (described,) = pq.read_table(folder / "descriptions.parquet").to_pylist()
        if (text := described["text"]) is None:
            raise InputError(f"{crystal}: no description ({described['status']}); give another crystal")
        reading = Reader.of(folder / "tokens", encoder).read(text)
        content = page_content(subject, record, material, reading)
    output = output or Path(f"{crystal.stem}.html")
    write_page("explain.html", content, output)
    log.info("%s: %.3f %s; the page is %s", material.crystal.formula, content["prediction"], content["unit"],
             output)  # fmt: skip


def page_content(
    subject: Subject, record: dict[str, Any], material: Material, reading: Reading
) -> dict[str, Any]:
    """What the template shows."""
    rows = list(subject.probe(0, reading, None, np.random.default_rng(0)))
    frame = pd.DataFrame(rows, columns=list(Row._fields))
    own = float(frame.loc[frame["condition"] == "own", "value"].iloc[0])
    model, target = MODELS[record["model"]], TARGETS[record["target"]]
    return {
        "formula": material.crystal.formula,
        "material_id": material.material_id,
        "spacegroup": material.spacegroup,
        "sites": len(material.crystal.species),
        "model": model,
        "target": target,
        "unit": target.unit,
        "seed": record["seed"],
        "prediction": own,
        "test_mae": record["test"]["mae"],
        "tokens": len(reading.ids),
        "tokens_full": reading.n_full,
        "changes": change_rows(frame, own),
        "parts": part_rows(frame, own, reading),
        "correlation": float(frame.loc[frame["condition"] == "rank correlation", "value"].iloc[0]),
        "curve": curve_rows(frame, own),
        **views(subject, material, reading, model.label, model.colour),
    }


def views(subject: Subject, material: Material, reading: Reading, label: str, colour: str) -> dict[str, Any]:
    """Data of the interactive views: of CAST the map of its nodes, of others [CLS]; and the gradients."""
    words = {
        "material_id": material.material_id, "formula": material.crystal.formula, "words": reading.words,
        "parts": reading.part_of_word, "labels": LABELS,
    }  # fmt: skip
    gradients = reading.by_word(subject.attribution(0, reading)) * subject.std
    shown = {"words": reading.words, "values": gradients.tolist(), "colours": PART_COLOURS}
    batch = subject.batch(0, [reading.ids])
    network: Any = subject.network
    found: dict[str, Any] = {"gradients": shown, "map": None, "text": None}
    if isinstance(network, Cast):
        entry = words | {
            "why": None, "split": None, "nodes": node_names(batch.atomic_numbers.tolist()),
            "tokens": len(reading.ids), "tokens_full": reading.n_full,
            "maps": {"model": reading.by_word(attention(network, batch)[0])},
        }  # fmt: skip
        content = {"labels": LABELS, "models": ["model"], "materials": [entry]}
        return found | {"map": browser_maps(content, {"model": (label, colour)})}
    with torch.inference_mode():
        maps = torch.stack([weights[0] for weights in network.attention_maps(batch)[1]])
    weights = reading.by_word(maps.numpy())
    return found | {
        "text": words | quantised(weights) | {"colours": PART_COLOURS, "layers": [len(weights) - 1]}
    }


def change_rows(frame: pd.DataFrame, own: float) -> list[tuple[str, float]]:
    """(what the text is replaced by, change of the prediction)."""
    names = {
        "none": "no text", "only formula": "the formula alone",
        "sentences shuffled": "sentences in another order (mean of three)",
    }  # fmt: skip
    means = frame.groupby("condition")["value"].mean()
    return [(name, float(means[key]) - own) for key, name in names.items() if key in means]


def part_rows(frame: pd.DataFrame, own: float, reading: Reading) -> list[dict[str, Any]]:
    """Of each part: share of tokens, attention and gradients; change without it, and by chance."""
    rows = []
    for part in parts_of(reading):
        of_part = frame[frame["part"] == part]
        values = {name: group for name, group in of_part.groupby("condition")}
        rows.append(
            {
                "part": part,
                "colour": PART_COLOURS[LABELS.index(part)],
                "tokens": float(values["attention"]["share"].iloc[0]),
                "attention": float(values["attention"]["value"].iloc[0]),
                "gradients": float(values["attribution"]["value"].iloc[0]),
                "change": float(values["without"]["value"].iloc[0]) - own,
                "chance": float((values["random"]["value"] - own).abs().mean()),
            }
        )
    return rows


def curve_rows(frame: pd.DataFrame, own: float) -> list[dict[str, Any]]:
    """Of each order of deletion: name, points [(share taken out, absolute change)] from 0 on, area."""
    curves = []
    for order, name in ORDER_NAMES.items():
        chosen = frame[frame["condition"] == f"delete {order}"]
        change = (chosen["value"] - own).abs().groupby(chosen["share"]).mean()
        shares, changes = [0.0, *change.index.tolist()], [0.0, *change.tolist()]
        area = float(np.trapezoid(changes, shares))
        curves.append({"name": name, "points": list(zip(shares, changes, strict=True)), "area": area})
    return curves
