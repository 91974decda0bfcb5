import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from castbench import kernels
from castbench.kernels import cross_attention, segments, self_attention
from castbench.kernels.cross_attention import Reader, Segments
from castbench.kernels.self_attention import attend_own
from castbench.models import bert
from castbench.models.batch import Batch, Sizes
from castbench.models.cross_attention import Fusion


def offsets(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def exact(q, k, v, q_lengths, k_lengths, heads):
    """Outputs in float64, by torch, of one segment after the other."""
    found = []
    k, v = k.split(k_lengths), v.split(k_lengths)
    for own_q, own_k, own_v in zip(q.split(q_lengths), k, v, strict=True):
        parts = (part.double().unflatten(1, (heads, -1)).transpose(0, 1) for part in (own_q, own_k, own_v))
        found.append(functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1))
    return torch.cat(found)


def assert_near(found, wanted):
    """To the rounding of the type in which `found` was computed."""
    limit = 0.02 if found.dtype == torch.bfloat16 else 5e-5
    assert (found - wanted).norm() <= limit * wanted.norm()
    assert (found - wanted).abs().max() <= 5 * limit * (1 + wanted.abs().max())


def gradients(outputs, inputs, weights):
    return torch.autograd.grad((outputs.double() * weights).sum(), inputs)


@pytest.fixture
def drawn(device):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return draw


NODES, TOKENS = (5, 0, 16, 1, 18, 0), (7, 40, 128, 0, 150, 0)  # the last ones pad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (3, 4)])
def test_nodes_attend_to_the_tokens_of_their_crystal_alone(device, drawn, dtype, heads, width):
    """Through two layers, whose keys and values have one gradient; the crystal with no tokens finds 0."""
    size = heads * width
    segments = Segments(offsets(NODES, device), offsets(TOKENS, device), 32, 160)
    q = drawn(sum(NODES), size, dtype=dtype).requires_grad_()
    kv = drawn(sum(TOKENS), 4 * size, dtype=dtype).requires_grad_()
    weights = drawn(sum(NODES), size)
    read = Reader(kv, segments, heads)
    first = read(q)
    second = read(first)
    wanted_first = exact(q, *kv[:, : 2 * size].chunk(2, 1), NODES, TOKENS, heads)
    wanted = exact(wanted_first, *kv[:, 2 * size :].chunk(2, 1), NODES, TOKENS, heads)
    assert not first[21].any() and first[:21].any(1).all()
    assert_near(first, wanted_first)
    assert_near(second, wanted)
    for found, own in zip(
        gradients(second, (q, kv), weights), gradients(wanted, (q, kv), weights), strict=True
    ):
        assert_near(found, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_pads_finds_nothing_and_changes_nothing(device, drawn, dtype):
    """The last crystal has more rows than a real one can have, and they hold no numbers."""
    nodes, tokens, heads, size = (3, 17, 70), (150, 9, 400), 2, 32
    q, kv = drawn(sum(nodes), size, dtype=dtype), drawn(sum(tokens), 2 * size, dtype=dtype)
    q[20:], kv[159:] = torch.nan, torch.nan
    q.requires_grad_()
    kv.requires_grad_()
    segments = Segments(offsets(nodes, device), offsets(tokens, device), 32, 256)
    found = Reader(kv, segments, heads)(q)
    wanted = exact(q[:20], *kv[:159].chunk(2, 1), nodes[:2], tokens[:2], heads)
    weights = drawn(sum(nodes), size)
    assert_near(found[:20], wanted)
    assert not found[20:].any()
    of_found, of_wanted = gradients(found, (q, kv), weights), gradients(wanted, (q, kv), weights[:20])
    for one, other, real in zip(of_found, of_wanted, (20, 159), strict=True):
        assert_near(one[:real], other[:real])
        assert not one[real:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_below_zero_are_shared_all_the_same(device, drawn, dtype):
    """Keys that are not there would have the highest score."""
    q, kv = drawn(4, 16, dtype=dtype), drawn(20, 32, dtype=dtype)
    q, kv[:, :16] = q.abs() + 6, -kv[:, :16].abs() - 6
    q.requires_grad_()
    kv.requires_grad_()
    segments = Segments(offsets([4, 0], device), offsets([20, 0], device), 16, 32)
    found = Reader(kv, segments, 1)(q)
    wanted = exact(q, *kv.chunk(2, 1), (4,), (20,), 1)
    weights = drawn(4, 16)
    assert_near(found, wanted)
    for one, other in zip(gradients(found, kv, weights), gradients(wanted, kv, weights), strict=True):
        assert one.isfinite().all() and (one - other).norm() < 0.1 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pads", [0, 150])
@pytest.mark.parametrize(("heads", "width"), [(2, 32), (1, 64), (2, 8)])
def test_tokens_attend_to_those_of_their_text_alone(device, drawn, heads, width, pads, dtype):
    """What pads holds no numbers, and may be longer than a text, or nothing."""
    lengths, size = (0, 1, 30, 64, 0, 100), heads * width
    real = sum(lengths)
    qkv = drawn(real + pads, 3 * size, dtype=dtype)
    qkv[real:] = torch.nan
    qkv.requires_grad_()
    found = attend_own(qkv, offsets((*lengths, pads), device).int(), 128, heads)
    wanted = exact(*qkv[:real].chunk(3, 1), lengths, lengths, heads)
    weights = drawn(real + pads, size)
    assert_near(found[:real], wanted)
    own, other = (gradients(out, qkv, weights[: len(out)])[0] for out in (found, wanted))
    assert_near(own[:real], other[:real])
    assert not found[real:].any() and not own[real:].any()


def test_an_operator_that_torch_compiles_for_any_number_of_tokens(device, drawn):
    torch.library.opcheck(
        torch.ops.castbench.attend_own.default,
        (drawn(40, 96, dtype=torch.bfloat16).requires_grad_(), offsets((8, 32, 0), device), 64, 2),
    )
    found = []
    compiled = torch.compile(
        lambda *parts: attend_own(*parts, 64, 2) * 2, backend="aot_eager", fullgraph=True
    )
    torch._dynamo.reset()
    counters.clear()
    for lengths in ((8, 32, 3), (5, 6, 40, 0), (60, 7)):
        qkv = drawn(sum(lengths), 96, dtype=torch.bfloat16)
        starts = offsets(lengths, device)
        for states in (qkv, starts):
            torch._dynamo.maybe_mark_dynamic(states, 0)
        found.append(compiled(qkv.requires_grad_(), starts))
        assert torch.equal(found[-1], attend_own(qkv, starts, 64, 2) * 2)
        gradients(found[-1], qkv, 1)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_fusion_of_a_padded_batch_is_that_of_torch(device, drawn, monkeypatch, autocast):
    nodes, tokens, real = (3, 17, 1, 40), (12, 70, 64, 300), 21
    sizes = Sizes(3, nodes=sum(nodes), tokens=sum(tokens), most_nodes=32, most_tokens=128)
    batch = Batch(3, node_offsets=offsets(nodes, device), token_offsets=offsets(tokens, device), sizes=sizes)
    torch.manual_seed(0)
    fusion = Fusion(24, 40, layers=2, heads=2, width=32, feedforward=24, dropout=0.0).to(device)
    h, states = drawn(sum(nodes), 24).float(), drawn(sum(tokens), 40).float()
    inputs = [h.requires_grad_(), states.requires_grad_(), *fusion.parameters()]
    weights, found = drawn(real, 24), []
    for usable in (False, True):
        monkeypatch.setattr(kernels, "usable", lambda *_, usable=usable: usable)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            fused = fusion(h, states, batch)[:real]
        found.append([fused, *gradients(fused, inputs, weights)])
        assert not found[-1][1][real:].any() and not found[-1][2][146:].any()
    names = ("fused", "nodes", "tokens", *(name for name, _ in fusion.named_parameters()))
    for name, wanted, own in zip(names, *found, strict=True):
        if "key.bias" not in name:  # 0 but for rounding
            assert (own - wanted).norm() < (0.03 if autocast else 5e-5) * wanted.norm(), name
    with torch.inference_mode():
        torch.testing.assert_close(
            fusion(h, states, batch)[:real].to(fused.dtype), fused, rtol=0.02, atol=0.02
        )


def test_a_layer_of_an_encoder_is_that_of_torch(device, drawn, monkeypatch):
    torch.manual_seed(0)
    layer = BertLayer(BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=32)).to(device)
    layer = layer.requires_grad_(False).eval()
    lengths = (9, 70, 1)
    starts, hidden = offsets(lengths, device), drawn(80, 32, dtype=torch.bfloat16).requires_grad_()

    def flash(parts, starts, longest, heads):
        assert starts.dtype == torch.int32 and longest == 128
        return exact(*parts.chunk(3, 1), lengths, lengths, heads).to(parts.dtype)

    weights, found = drawn(80, 32), []
    monkeypatch.setattr(bert, "flash", flash)
    for usable, compiled in (
        (False, bert.fused_layer),
        (True, torch.compile(bert.fused_layer, backend="aot_eager")),
    ):
        monkeypatch.setattr(kernels, "usable", lambda *_, usable=usable: usable)
        monkeypatch.setattr(bert, "compiled_layer", compiled)
        states = bert.run_fused([layer, layer], hidden, starts, 128, padded=False)
        found.append([states, *gradients(states, hidden, weights)])
    for wanted, own in zip(*found, strict=True):
        assert (own - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels_of", [cross_attention, self_attention])
def test_the_check_raises_where_a_kernel_errs(device, monkeypatch, kernels_of, kind):
    kernels_of.check(device, kind)
    monkeypatch.setattr(segments, "LOG2E", 1.2)
    with pytest.raises(RuntimeError, match="is off by"):
        kernels_of.check(device, kind)
