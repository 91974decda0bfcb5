import numpy as np
import pytest
import torch

from castbench.errors import InputError
from castbench.graphs.kinds import KINDS, structure_graph
from castbench.graphs.packed import PackedGraphs, PackedWriter
from castbench.models import build_model
from castbench.text.states import PackedStates
from castbench.text.tokens import PackedTokens
from castbench.training.dataset import Crystals, Ragged
from crystals import prototypes

CPU = torch.device("cpu")


@pytest.fixture
def crystals_of(data):
    """The caches as a model reads them; `changes` replaces paths."""

    def open_caches(model, **changes):
        network = build_model(model, data.settings(model)["architecture"], data.root / "encoder")
        paths = {name: path for name, path in data.caches(model).items() if name != "encoder"} | changes
        return Crystals(network, **paths, device=CPU)

    return open_caches


@pytest.mark.parametrize("rows", [[3, 0, 11], [5], [7, 2], [2, 2]])
def test_a_batch_is_the_crystals_end_to_end(data, crystals_of, rows):
    batch = crystals_of("cast").batch(torch.tensor(rows))
    graphs, tokens = PackedGraphs.open(data.root / "graphs"), PackedTokens.open(data.root / "tokens")
    states = PackedStates.open(data.root / "text_states" / "0").states
    edge = 0
    assert batch.n == len(rows)
    for place, row in enumerate(rows):
        graph = graphs[row]
        first, last = batch.node_offsets[place : place + 2].tolist()
        assert batch.atomic_numbers[first:last].tolist() == graph.atomic_numbers.tolist()
        assert batch.multiplicities[first:last].tolist() == graph.multiplicities.tolist()
        edges = slice(edge, edge + len(graph.distances))
        assert (batch.edge_source[edges] - first).tolist() == graph.edge_source.tolist()
        assert (batch.edge_target[edges] - first).tolist() == graph.edge_target.tolist()
        assert batch.distances[edges].tolist() == graph.distances.tolist()
        assert batch.edge_multiplicities[edges].tolist() == graph.edge_multiplicities.tolist()
        edge = edges.stop
        text = slice(*tokens.token_offsets[row : row + 2])
        place_of_text = slice(*batch.token_offsets[place : place + 2].tolist())
        found = batch.token_states[place_of_text]
        assert found.dtype == torch.bfloat16
        np.testing.assert_array_equal(found.view(torch.uint16).numpy(), states[text])
    assert edge == len(batch.distances) and batch.node_offsets[-1] == len(batch.atomic_numbers)
    assert batch.token_ids is None


def test_a_model_gets_what_it_declares_and_nothing_else(crystals_of, data, tmp_path):
    graph_only = crystals_of("structure_only", tokens=tmp_path / "none", states=None).batch(torch.tensor([1]))
    assert graph_only.token_offsets is None and graph_only.distances is not None
    text_only = crystals_of("text_only").batch(torch.tensor([1]))
    assert text_only.node_offsets is None and text_only.token_states is not None


def test_models_of_cls_alone_get_its_states_and_no_others(data, crystals_of):
    tokens = PackedTokens.open(data.root / "tokens")
    states = PackedStates.open(data.root / "text_states" / "0").states
    batch = crystals_of("crysmmnet_frozen").batch(torch.tensor([5, 2, 5]))
    assert batch.token_states is batch.token_offsets is None
    assert batch.cls_states.dtype == torch.bfloat16
    first = states[tokens.token_offsets[[5, 2, 5]]]
    np.testing.assert_array_equal(batch.cls_states.view(torch.uint16).numpy(), first)


def test_token_ids_are_read_where_the_whole_encoder_is_tuned(data):
    architecture = data.settings("text_only")["architecture"]
    architecture = architecture | {"lora": architecture["lora"] | {"layers": "all"}}
    network = build_model("text_only", architecture, data.root / "encoder")
    batch = Crystals(network, data.root / "graphs", data.root / "tokens", None, CPU).batch(
        torch.tensor([4, 11])
    )
    tokens = PackedTokens.open(data.root / "tokens")
    assert batch.token_ids.tolist() == [*tokens[4].tolist(), *tokens[11].tolist()]
    assert batch.token_ids.dtype == torch.int64 and batch.token_offsets.tolist() == [
        0,
        len(tokens[4]),
        len(tokens[4]) + 1,
    ]


def test_crystals_without_graph_are_dropped_and_counted_for_every_model(crystals_of):
    for model in ("structure_only", "text_only"):
        rows, dropped = crystals_of(model).rows(["m-9", "m-7", "m-2"])
        assert (rows.tolist(), dropped) == ([9, 2], 1)


def test_a_crystal_that_the_caches_do_not_know_is_refused(crystals_of):
    with pytest.raises(InputError, match="m-999: in the split but not in the graphs"):
        crystals_of("structure_only").rows(["m-1", "m-999"])


def test_tokens_of_other_crystals_are_refused(crystals_of, tmp_path):
    with PackedWriter(tmp_path, {"structure_encoder": "cogn"}, "0") as writer:
        writer.append(["m-1"], ["two atoms are in one place"])
    with pytest.raises(InputError, match="other crystals than the graphs have; make both caches again"):
        crystals_of("text_only", graphs=tmp_path)


def test_states_of_another_layer_and_absent_states_are_refused(data, crystals_of):
    with pytest.raises(InputError, match="states after 1 layers, and the model reads those after 2"):
        crystals_of("cast", states=data.root / "text_states" / "1")
    with pytest.raises(InputError, match="give their folder with --states"):
        crystals_of("cast", states=None)


def test_texts_without_description_are_counted(crystals_of):
    assert crystals_of("cast").n_without_text(torch.tensor([10, 11, 12])) == 1
    assert crystals_of("structure_only").n_without_text(torch.tensor([10, 11])) is None


def test_arrays_stay_mapped_and_ragged_rows_may_be_empty(tmp_path):
    np.save(tmp_path / "values.npy", np.arange(6, dtype=np.uint8))
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    ragged = Ragged(np.array([0, 2, 2, 6]), CPU, values=mapped)
    assert ragged.arrays["values"].data_ptr() == mapped.__array_interface__["data"][0]
    offsets, values = ragged.take(torch.tensor([2, 1, 0]))
    assert offsets.tolist() == [0, 4, 4, 6] and values["values"].tolist() == [2, 3, 4, 5, 0, 1]


def test_equal_texts_are_found_for_models_that_encode_them(data, crystals_of):
    tokens = PackedTokens.open(data.root / "tokens")
    rows = torch.tensor([3, 5, 3])
    texts = crystals_of("text_only").batch(rows).texts
    of = texts.of.tolist()
    assert of[0] == of[2] != of[1] and texts.first[texts.of].tolist() == [0, 1, 0]
    assert texts.size == len(tokens[3]) + len(tokens[5])
    assert crystals_of("cast").batch(rows).texts is None


@pytest.fixture
def with_alignn(data, tmp_path):
    """A network on ALIGNN, and the caches of a few real graphs for it."""
    ids = [f"m-{i}" for i in range(3)]
    settings = {"structure_encoder": "alignn", "neighbours": 12, "symprec": 1e-4}
    with PackedWriter(tmp_path, settings, "0", KINDS["alignn"].arrays) as writer:
        graphs = [
            structure_graph(s.lattice.matrix, s.frac_coords, np.array(s.atomic_numbers), settings)
            for s in list(prototypes().values())[-3:]
        ]
        writer.append(ids, graphs)
    sizes = {"width": 8, "embedding": 8, "alignn_layers": 1, "gcn_layers": 1}
    return build_model("structure_only", {"alignn": sizes}, None), tmp_path, graphs


def test_edges_of_a_batch_are_numbered_through(with_alignn):
    network, folder, graphs = with_alignn
    batch = Crystals(network, folder, folder, None, CPU).batch(torch.tensor([2, 0]))
    n = len(graphs[2].distances)
    assert batch.edge_reverse[:n].tolist() == graphs[2].edge_reverse.tolist()
    assert (batch.edge_reverse[n:] - n).tolist() == graphs[0].edge_reverse.tolist()
    assert batch.vectors.tolist() == [*graphs[2].vectors.tolist(), *graphs[0].vectors.tolist()]
    assert batch.ridge_areas is None
    assert torch.equal(batch.edge_source[batch.edge_reverse], batch.edge_target)


def test_graphs_of_another_encoder_are_refused(data, with_alignn):
    network, _, _ = with_alignn
    with pytest.raises(InputError, match="graphs for cogn, and the model reads those for alignn; build"):
        Crystals(network, data.root / "graphs", data.root / "tokens", None, CPU)
