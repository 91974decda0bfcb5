"""What must hold for every structure encoder on the graphs of real and random crystals."""

import functools
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pymatgen.core import Lattice, Structure

from castbench.config import STRUCTURE_ENCODERS
from castbench.graphs.kinds import KINDS
from castbench.models.elements import N_ELEMENTS, element_categories
from castbench.models.structure import ENCODERS, StructureOnly, WeightedBatchNorm, edges_into
from crystals import prototypes, varied_crystals
from model_batches import SMALL_ENCODERS, cell_batch, graph_batch, join, normalise_part

PUBLISHED = {  # sizes, parameters
    "cogn": ({"width": 128, "depth": 5}, 697_601),
    "congn": ({"width": 160, "depth": 5}, 2_799_201),
    "alignn": ({"width": 256, "embedding": 64, "alignn_layers": 4, "gcn_layers": 4}, 4_026_753),
    "cgcnn": ({"width": 64, "layers": 3, "hidden": 128}, 80_833),
    # Of 95 elements; here 119 rows of 16.
    "megnet": ({"width": 32, "hidden": 64, "blocks": 3, "vector": 16, "passes": 3}, 167_761 + 24 * 16),
}
each_encoder = pytest.mark.parametrize("name", ENCODERS)


@functools.cache
def small(name):
    """A small model, with statistics of batch normalisation that are not those of the start.

    In double precision: rounding is not what these tests are about.
    """
    torch.manual_seed(0)
    model = StructureOnly({name: SMALL_ENCODERS[name]}).double()
    with torch.no_grad():
        model.train()(join([graph_batch(name, structure) for structure in prototypes().values()]))
    return model.eval()


def test_encoders_have_the_same_names_everywhere():
    assert set(ENCODERS) == set(KINDS) == set(STRUCTURE_ENCODERS)


@each_encoder
def test_published_sizes_have_the_published_number_of_parameters(name):
    sizes, parameters = PUBLISHED[name]
    model = StructureOnly({name: sizes})
    assert model.structure_encoder == name
    assert sum(p.numel() for p in model.parameters()) == parameters


@each_encoder
def test_the_asymmetric_unit_stands_for_the_whole_cell(name):
    structures = varied_crystals()
    units = join([graph_batch(name, structure) for structure in structures])
    cells = join([cell_batch(name, structure) for structure in structures])
    assert len(units.atomic_numbers) < len(cells.atomic_numbers) / 2
    with torch.inference_mode():
        torch.testing.assert_close(small(name)(units), small(name)(cells), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["alignn", "cgcnn"])
def test_batch_normalisation_counts_the_atoms_of_the_whole_cells(name):
    outputs, statistics = [], []
    for batch_for in (graph_batch, cell_batch):
        torch.manual_seed(1)
        model = StructureOnly({name: SMALL_ENCODERS[name]}).double().train()
        outputs.append(model(join([batch_for(name, structure) for structure in varied_crystals()])))
        statistics.append({key: buffer for key, buffer in model.named_buffers() if "running" in key})
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert statistics[0]
    for key, value in statistics[0].items():
        torch.testing.assert_close(value, statistics[1][key], atol=1e-5, rtol=1e-5)


def other_descriptions(structure):
    """The same crystal with atoms in another order, another origin and other cells."""
    rng = np.random.default_rng(len(structure))
    shifted = structure.copy()
    shifted.translate_sites(range(len(structure)), rng.random(3), to_unit_cell=False)
    skewed = Lattice(np.array([[1, 0, 0], [1, 1, 0], [-1, 2, 1]]) @ structure.lattice.matrix)
    return {
        "permuted": Structure.from_sites([structure[i] for i in rng.permutation(len(structure))]),
        "shifted": shifted,
        "supercell": structure * (2, 1, 1),
        "reduced": structure.get_reduced_structure("niggli"),
        "skewed": Structure(skewed, structure.species, structure.cart_coords, coords_are_cartesian=True),
    }


@each_encoder
def test_how_a_crystal_is_given_does_not_matter(name):
    with torch.inference_mode():
        for structure in varied_crystals()[::3]:
            expected = small(name)(graph_batch(name, structure))
            for which, other in other_descriptions(structure).items():
                found = small(name)(graph_batch(name, other))
                assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5), which


@each_encoder
def test_batched_crystals_are_predicted_as_one_by_one(name):
    singles = [graph_batch(name, structure) for structure in prototypes().values()]
    with torch.inference_mode():
        alone = torch.cat([small(name)(single) for single in singles])
        torch.testing.assert_close(small(name)(join(singles)), alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 1e-3


@each_encoder
@pytest.mark.parametrize("training", [False, True])
def test_hidden_nodes_show_nothing_of_their_element(name, training):
    batch = join([graph_batch(name, structure) for structure in prototypes().values()])
    batch.masked_nodes = torch.arange(len(batch.atomic_numbers)) % 2 == 0
    torch.manual_seed(0)
    encoder = StructureOnly({name: SMALL_ENCODERS[name]}).double().structure.train(training)
    hidden = torch.randn(encoder.width, dtype=torch.double)
    with torch.no_grad():
        before = encoder.nodes(batch, hidden)
        assert not torch.allclose(encoder.nodes(batch), before)
        batch.atomic_numbers = torch.where(batch.masked_nodes, 7, batch.atomic_numbers)
        torch.testing.assert_close(encoder.nodes(batch, hidden), before, atol=1e-6, rtol=1e-5)


@each_encoder
def test_elements_are_told_apart(name):
    batch = graph_batch(name, prototypes()["fcc"])
    with torch.inference_mode():
        values = [small(name)(replace(batch, atomic_numbers=torch.tensor([z]))) for z in range(1, 119)]
    assert len(np.unique(torch.cat(values).numpy())) > N_ELEMENTS - 3  # float32 has its limits


def test_categories_are_those_of_cgcnn():
    rows = element_categories()
    assert rows.shape == (118, 92)
    assert len(np.unique(rows, axis=0)) == 118
    groups, periods, valence, blocks = rows[:, :18], rows[:, 18:25], rows[:, 76:88], rows[:, 88:]
    for z, group, period, electrons, block in (
        (1, 1, 1, 1, 0), (2, 18, 1, 2, 0), (8, 16, 2, 6, 1), (26, 8, 4, 8, 2), (30, 12, 4, 12, 2),
        (58, 3, 6, 4, 3), (66, 3, 6, 12, 3), (92, 3, 7, 6, 3),
    ):  # fmt: skip
        found = [int(part[z - 1].argmax()) for part in (groups, periods, valence, blocks)]
        assert found == [group - 1, period - 1, electrons - 1, block], z
        assert [part[z - 1].sum() for part in (groups, periods, valence, blocks)] == [1, 1, 1, 1]
    ranges = ((0.5, 4.0), (25, 250), (1.3, 3.3), (-3, 3.7), (1.5, 4.3))  # the supplement's Table II
    for z, values in (  # Pauling, pm, log of eV, eV, log of cubic centimetres a mole
        (26, (1.83, 142, np.log(7.902), 0.153, np.log(7.09))),
        (2, (None, 28, np.log(24.587), -0.52, np.log(21.0))),
        (5, (2.04, 84, np.log(8.298), 0.28, np.log(4.39))),  # a volume below the range
        (87, (0.7, 260, np.log(4.073), 0.486, None)),  # a radius above it
        (109, (None,) * 5),  # pymatgen has a placeholder for the energy
    ):
        for found, value, (low, high) in zip(rows[z - 1, 26:76].reshape(5, 10), values, ranges, strict=True):
            place = None if value is None else min(max(int(10 * (value - low) / (high - low)), 0), 9)
            assert np.flatnonzero(found).tolist() == ([] if place is None else [place]), z


def test_weighted_normalisation_is_that_of_the_rows_spelled_out():
    torch.manual_seed(2)
    rows, counts = torch.randn(6, 4), torch.tensor([1, 3, 2, 5, 1, 2])
    ours, torchs = WeightedBatchNorm(4), torch.nn.BatchNorm1d(4)
    for norm in (ours, torchs):
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1.0, 5.0))
    for _ in range(3):
        rows = rows * 1.5 + 1
        expected = torchs(rows.repeat_interleave(counts, dim=0))
        found = ours(rows, counts.float()).repeat_interleave(counts, dim=0)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours.running_mean, torchs.running_mean)
        torch.testing.assert_close(ours.running_var, torchs.running_var)
    torch.testing.assert_close(ours.eval()(rows, counts.float()), torchs.eval()(rows))


def test_processes_that_share_a_batch_share_its_statistics(tmp_path):
    torch.manual_seed(5)
    rows, weights = torch.randn(8, 4), torch.tensor([1.0, 2, 1, 3, 1, 1, 4, 2])
    whole, norm = rows.clone().requires_grad_(), WeightedBatchNorm(4)
    expected = norm(whole, weights)
    expected.pow(3).sum().backward()
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (f"file://{tmp_path}/rendezvous", rows, weights, results)
        torch.multiprocessing.spawn(normalise_part, arguments, nprocs=2)
        (out0, grad0, *running), (out1, grad1, *_) = results[0], results[1]
    torch.testing.assert_close(torch.tensor(out0 + out1), expected.detach())
    torch.testing.assert_close(torch.tensor(grad0 + grad1), whole.grad)
    torch.testing.assert_close(torch.tensor(running[0]), norm.running_mean)
    torch.testing.assert_close(torch.tensor(running[1]), norm.running_var)


def test_normalisation_without_weights_keeps_its_statistics_and_stays_finite():
    norm = WeightedBatchNorm(2)
    assert norm(torch.randn(3, 2), torch.zeros(3)).isfinite().all()
    assert torch.equal(norm.running_mean, torch.zeros(2)) and torch.equal(norm.running_var, torch.ones(2))


def test_normalisation_of_one_row_keeps_its_statistics_finite():
    norm = WeightedBatchNorm(2)
    assert norm(torch.randn(1, 2), torch.ones(1)).isfinite().all()
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


def test_recurrent_layers_start_as_keras_does():
    """Orthogonal, with zero biases, and ones for the forget gate of MEGNet's LSTM."""
    gate = StructureOnly({"congn": SMALL_ENCODERS["congn"]}).structure.blocks[0].gate
    megnet = StructureOnly({"megnet": SMALL_ENCODERS["megnet"]}).structure
    for weight in (gate.weight_hh, megnet.pool_bonds.gates.weight):
        torch.testing.assert_close(weight.T @ weight, torch.eye(weight.shape[1]), atol=1e-5, rtol=1e-5)
    assert not gate.bias_ih.any() and not gate.bias_hh.any()
    assert megnet.pool_bonds.gates.bias.tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
    assert 0.04 < megnet.embedding.weight.abs().max() <= 0.05


def test_pairs_of_edges_are_those_of_a_loop():
    torch.manual_seed(3)
    target, at = torch.randint(0, 6, (20,)), torch.randint(0, 6, (9,))
    row, edge = edges_into(target, at, 7)
    expected = [
        (i, e) for i, node in enumerate(at.tolist()) for e, to in enumerate(target.tolist()) if to == node
    ]
    assert sorted(zip(row.tolist(), edge.tolist(), strict=True)) == expected
    assert (row.diff() >= 0).all()


def test_constructors_take_the_sections_of_the_config():
    config = yaml.safe_load((Path(__file__).parents[3] / "config.yaml").read_text())
    for name in ENCODERS:
        sizes = config["architecture"][name]
        assert sizes == PUBLISHED[name][0]
        encoder = type(StructureOnly({name: sizes}).structure)
        assert set(sizes) | {"pooled"} == set(inspect.signature(encoder).parameters)
