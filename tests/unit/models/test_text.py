from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo import testing
from torch.nn.attention import varlen

from castbench.errors import InputError
from castbench.models import attention, bert
from castbench.models.batch import different_texts, pad
from castbench.models.text import TextEncoder, TextOnly
from castbench.text import encoders
from castbench.text.encoders import LayeredEncoder
from model_batches import join

LORA = {"rank": 2, "alpha": 4, "dropout": 0.5, "layers": 2}


@pytest.fixture(params=[1, 2, 3, "all"])
def tuned(request, encoder):
    torch.manual_seed(0)
    return TextEncoder(encoder, LORA | {"layers": request.param}).eval()


def away_from_start(text):
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return text


def cached(text, crystals):
    return join(crystals(text.start_layer or None))


def test_frozen_encoder_hands_on_the_cached_states(encoder, crystals):
    text, batch = TextEncoder(encoder, None), join(crystals(3))
    assert (text.mode, text.start_layer, text.needs) == ("frozen", 3, {"token_states"})
    assert text(batch) is batch.token_states
    assert not list(text.parameters())


def test_frozen_encoder_of_a_model_that_takes_cls_alone_needs_no_other_state(encoder, crystals):
    text, batch = TextEncoder(encoder, None, pooled=True), join(crystals(3))
    assert (text.start_layer, text.needs) == (3, {"cls_states"})
    alone = replace(batch, token_states=None, token_offsets=None)
    assert torch.equal(text.cls(alone), batch.token_states[batch.token_offsets[:-1]])
    assert TextEncoder(encoder, LORA, pooled=True).needs == {"token_states"}


def test_lora_starts_as_the_frozen_encoder(tuned, crystals):
    final = join(crystals(3))
    batch = cached(tuned, crystals)
    assert tuned.needs == ({"token_ids"} if tuned.start_layer == 0 else {"token_states"})
    torch.testing.assert_close(tuned(batch), final.token_states, atol=1e-5, rtol=1e-5)


def test_lora_changes_the_states_of_every_token(tuned, crystals):
    batch = cached(tuned, crystals)
    before = tuned(batch)
    after = away_from_start(tuned)(batch)
    assert ((after - before).abs().amax(dim=1) > 1e-4).all()


def test_first_token_alone_equals_the_full_run(tuned, crystals):
    away_from_start(tuned)
    batch = cached(tuned, crystals)
    full = tuned(batch)[batch.token_offsets[:-1]]
    torch.testing.assert_close(tuned.cls(batch), full, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_first_token_equal_those_of_the_full_run(tuned, crystals):
    away_from_start(tuned)
    batch = cached(tuned, crystals)
    gradients = []
    for states in (tuned.cls(batch), tuned(batch)[batch.token_offsets[:-1]]):
        tuned.zero_grad()
        states.square().sum().backward()
        gradients.append([p.grad for p in tuned.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_dropout_is_loras_alone(encoder, crystals):
    text, batch = TextEncoder(encoder, LORA).train(), join(crystals(1))
    assert torch.equal(text(batch), text(batch))  # B = 0: LoRA adds nothing, and the backbone has no dropout
    away_from_start(text)
    assert not torch.equal(text(batch), text(batch))
    assert torch.equal(text.eval()(batch), text(batch))


def test_lora_adapts_query_and_value_of_the_upper_layers(encoder):
    text = TextEncoder(encoder, LORA)
    names = [name for name, p in text.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2  # layers, query and value, A and B
    assert all(".lora_" in name and ("query" in name or "value" in name) for name in names)
    assert {name.split("layers.")[1][0] for name in names} == {"1", "2"}


def test_loras_part_is_scaled_by_alpha_over_rank(encoder):
    query = TextEncoder(encoder, LORA | {"alpha": 6}).eval().encoder.layers[-1].attention.self.query
    nn.init.normal_(query.lora_B["default"].weight)
    x = torch.randn(3, query.in_features)
    part = query.lora_B["default"](query.lora_A["default"](x))
    torch.testing.assert_close(query(x) - query.base_layer(x), 3 * part, atol=1e-5, rtol=1e-5)


def test_minilm_at_rank_8_has_73728_lora_parameters():
    """On a model of that size without its weights."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536))
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["query", "value"]), LayeredEncoder(model))
    assert sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name) == 73_728


@pytest.mark.parametrize("layers", [0, 4, "top", 1.5, None])
def test_impossible_number_of_layers_is_refused(encoder, layers):
    with pytest.raises(InputError, match=r"architecture\.lora\.layers: .* from 1 to 3"):
        TextEncoder(encoder, LORA | {"layers": layers})


def test_text_only_reads_no_graph(encoder):
    assert TextOnly({"lora": LORA}, encoder).needs == {"token_states"}


def padded(text, batch):
    """The plain way: all texts of the batch padded to the longest, through every layer."""
    if text.start_layer:
        hidden, mask = pad(batch.token_states, batch.token_offsets)
    else:
        ids, mask = pad(batch.token_ids, batch.token_offsets)
        hidden = text.encoder.embed(ids)
    return text.encoder.run(hidden, mask, text.start_layer, text.n_layers)[mask]


def with_gradients(text, states):
    text.zero_grad()
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return [states.detach(), *(p.grad.clone() for p in text.parameters() if p.requires_grad)]


def reference_varlen(q, k, v, q_offsets, k_offsets, most_q, most_k):
    """What variable-length attention computes, a text at a time."""
    assert q_offsets.dtype == k_offsets.dtype == torch.int32
    assert most_q >= int(q_offsets.diff().max()) and most_k >= int(k_offsets.diff().max())
    found = []
    for text in range(len(q_offsets) - 1):
        queries = q[q_offsets[text] : q_offsets[text + 1]]
        keys, values = (part[k_offsets[text] : k_offsets[text + 1]] for part in (k, v))
        heads = (part.transpose(0, 1) for part in (queries, keys, values))
        found.append(torch.nn.functional.scaled_dot_product_attention(*heads).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("flash", [False, True])
def test_packed_texts_give_the_states_and_gradients_of_padded_ones(tuned, crystals, monkeypatch, flash):
    if flash:  # the way of a GPU
        monkeypatch.setattr(attention, "has_variable_length", lambda q: True)
        monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    away_from_start(tuned)
    monkeypatch.setattr(attention, "GROUP", 2)
    batch = cached(tuned, crystals)
    plain = with_gradients(tuned, padded(tuned, batch))
    for ours, theirs in zip(with_gradients(tuned, tuned(batch)), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)
    first = tuned(batch)[batch.token_offsets[:-1]]
    torch.testing.assert_close(tuned.cls(batch), first, atol=1e-5, rtol=1e-5)


def packed_reference(q, k, v, offsets, *rest):
    """The same in a form that torch.compile traces: each token attends to those of its own text."""
    text = torch.bucketize(torch.arange(len(q), device=q.device, dtype=offsets.dtype), offsets, right=True)
    heads = (part.transpose(0, 1) for part in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(*heads, text[:, None] == text)
    return found.transpose(0, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_layers_give_the_states_and_gradients_of_the_others(tuned, crystals, monkeypatch, compiled):
    """The way of a GPU, in float32."""
    away_from_start(tuned)
    some = crystals(tuned.start_layer or None)
    batch = join([some[1], some[2], some[1], some[3], some[2]])
    batch.texts = different_texts(batch.token_offsets, torch.tensor([40, 7, 40, 9, 7]))
    apart = [with_gradients(tuned, states(batch)) for states in (tuned, tuned.cls)]
    traced = testing.CompileCounterWithBackend("aot_eager")
    layer = torch.compile(bert.fused_layer, backend=traced) if compiled else bert.fused_layer
    monkeypatch.setattr(bert, "compiled_layer", layer)
    monkeypatch.setattr(encoders, "is_fused", lambda hidden: True)
    monkeypatch.setattr(varlen, "varlen_attn", packed_reference)
    for states, expected in zip((tuned, tuned.cls), apart, strict=True):
        for ours, theirs in zip(with_gradients(tuned, states(batch)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)
    with torch.inference_mode():
        for crystal, theirs in ((some[1], apart[0][0][:12]), (some[2], apart[0][0][12:42])):
            torch.testing.assert_close(tuned(join([some[3], crystal]))[3:], theirs, atol=1e-5, rtol=1e-5)
    # Once for any texts and layers: without gradients, with them, and with those of LoRA's weights alone.
    assert traced.frame_count <= (3 if compiled else 0)


def test_equal_texts_are_encoded_once_a_batch(tuned, crystals, monkeypatch):
    away_from_start(tuned)
    some = crystals(tuned.start_layer or None)
    batch = join([some[1], some[2], some[1], some[3], some[2]])
    apart = with_gradients(tuned, tuned(batch))
    batch.texts = different_texts(batch.token_offsets, torch.tensor([40, 7, 40, 9, 7]))
    seen, run = [], tuned.encoder.run_packed
    monkeypatch.setattr(
        tuned.encoder, "run_packed", lambda hidden, *rest: seen.append(len(hidden)) or run(hidden, *rest)
    )
    for once, each in zip(with_gradients(tuned, tuned(batch)), apart, strict=True):
        torch.testing.assert_close(once, each, atol=1e-5 * float(each.abs().max()), rtol=1e-5)
    assert seen == [12 + 30 + 3]
    torch.testing.assert_close(tuned.cls(batch), apart[0][batch.token_offsets[:-1]], atol=1e-5, rtol=1e-5)
