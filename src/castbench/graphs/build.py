"""Build the graph of every crystal of materials.parquet into a packed cache."""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import spglib
from pymatgen.core import Element

from castbench.errors import InputError
from castbench.graphs.kinds import KINDS, structure_graph
from castbench.graphs.packed import PackedGraphs, PackedWriter, Result
from castbench.provenance import measured, sha256_file

Chunk = tuple[list[str], list[Result]]
CHUNK = 128  # crystals that a worker takes at once
ATOMIC_NUMBERS = {element.symbol: element.Z for element in Element}
log = logging.getLogger(__name__)


def build_graphs(settings: dict[str, Any], materials: Path, output: Path, threads: int) -> None:
    """Write `output`, a `PackedGraphs` folder with the rows of `materials`, unless it is there already.

    A crystal that has no graph gets a warning, a status, and no nodes; the others go on.

    Args:
        settings: "structure_encoder" whose graphs they are; "symprec" in angstrom; "neighbours" of a node,
            where the encoder's graph has that number.
        materials: materials.parquet.
        output: folder to write.
        threads: worker processes; the files do not depend on it.
    """
    source = sha256_file(materials)
    settings = settings | {"spglib": spglib.__version__}
    if _is_current(output, settings, source):
        log.info("%s is of these materials and settings; nothing to do", output)
        return
    arrays = KINDS[settings["structure_encoder"]].arrays
    with measured(output / "cost.json"), PackedWriter(output, settings, source, arrays) as writer:
        for material_ids, results in _chunks(settings, materials, threads):
            for material_id, result in zip(material_ids, results, strict=True):
                if isinstance(result, str):
                    log.warning("%s: no graph: %s", material_id, result)
            writer.append(material_ids, results)
    counts = PackedGraphs.open(output).manifest
    log.info(
        "%d crystals, %d without a graph, %.2f +- %.2f nodes, %d edges (%d before parallel ones were merged)",
        counts["n_graphs"], counts["n_failed"], counts["nodes_mean"], counts["nodes_std"],
        counts["n_edges"], counts["n_edges_expanded"],
    )  # fmt: skip


def _is_current(folder: Path, settings: dict[str, Any], source: str) -> bool:
    try:
        return PackedGraphs.open(folder, source, verify=True).manifest["settings"] == settings
    except InputError:
        return False


def _chunks(settings: dict[str, Any], materials: Path, threads: int) -> Iterator[Chunk]:
    """Material ids and results of each chunk of rows, in order; a bounded number of chunks is held."""
    file = pq.ParquetFile(materials)
    batches = file.iter_batches(CHUNK, columns=["material_id", "structure"])
    if threads == 1 or file.metadata.num_rows <= CHUNK:
        yield from (graphs_of(batch, settings) for batch in batches)
        return
    # Not forked: Arrow's threads do not survive it.
    with ProcessPoolExecutor(threads, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[Chunk]] = deque()
        for batch in batches:
            pending.append(pool.submit(graphs_of, batch, settings))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def graphs_of(materials: pa.RecordBatch, settings: dict[str, Any]) -> Chunk:
    """Material ids, and of each the graph or the reason that there is none."""
    results = [_graph_or_reason(structure, settings) for structure in materials["structure"].to_pylist()]
    return materials["material_id"].to_pylist(), results


def _graph_or_reason(structure: dict[str, Any], settings: dict[str, Any]) -> Result:
    try:
        return structure_graph(
            np.reshape(structure["lattice"], (3, 3)),
            np.reshape(structure["frac_coords"], (-1, 3)),
            np.array([ATOMIC_NUMBERS[symbol] for symbol in structure["species"]], dtype=int),
            settings,
        )
    except KeyError as error:
        return f"unknown element {error}"
    except Exception as error:  # one crystal never stops the others
        return str(error) or type(error).__name__
