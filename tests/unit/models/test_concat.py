import torch
from torch.nn import functional

from castbench.models.concat import crysmmnet_frozen, crysmmnet_lora
from castbench.models.heads import ProjectionHead
from model_batches import join, only


def test_projection_head_is_crysmmnets():
    """Linear to p, GELU, linear, plus p, LayerNorm (models.md 3.1), with dropout off."""
    head = ProjectionHead(n_in=12, width=64, dropout=0.1).eval()
    x = torch.randn(5, 12)
    p = x @ head.project.weight.T + head.project.bias
    inner = torch.nn.functional.gelu(p) @ head.refine.weight.T + head.refine.bias + p
    expected = (inner - inner.mean(1, keepdim=True)) / (
        inner.var(1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-5)


def test_what_is_refined_can_drop_out():
    """Where all does, its normalised input is left."""
    head = ProjectionHead(n_in=12, width=64, dropout=1.0)
    x = torch.randn(5, 12)
    assert torch.equal(head(x), head.norm(head.project(x)))
    assert not torch.allclose(head.eval()(x), head.norm(head.project(x)))


def test_a_prediction_is_that_of_both_projections_through_one_layer(architecture, encoder, crystals):
    model = crysmmnet_frozen(architecture, encoder).eval()
    batch = only(join(crystals(3)), model.needs)
    vectors = model.project_structure(model.structure(batch)), model.project_text(batch.cls_states)
    fused = functional.relu(model.fuse[0](torch.cat(vectors, dim=1)))
    torch.testing.assert_close(model(batch), model.head[0](fused).squeeze(1))


def test_published_size_of_projections_and_fusion(encoder):
    architecture = {"cogn": {"width": 128, "depth": 1}, "concat": {"width": 64, "dropout": 0.1}}
    model = crysmmnet_frozen(architecture, encoder)
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    second = 64 * 64 + 64 + 2 * 64
    assert size["project_structure"] == 128 * 64 + 64 + second
    assert size["project_text"] == 32 * 64 + 64 + second
    assert size["fuse"] == 128 * 64 + 64
    assert size["head"] == 65


def test_both_variants_differ_in_lora_alone(architecture, encoder):
    frozen, tuned = crysmmnet_frozen(architecture, encoder), crysmmnet_lora(architecture, encoder)
    assert frozen.text_mode == "frozen" and tuned.text_mode == "lora"
    assert (frozen.text_layer, tuned.text_layer) == (3, 1)
    added = tuned.trained_state().keys() - frozen.trained_state().keys()
    assert added and all(".lora_" in name for name in added)
