"""The multiply-adds that the prediction of cost counts on paper are those that torch counts in a step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from castbench import config as meaning
from castbench.models import OBJECTIVES, REGISTRY, build_model, build_pretraining
from castbench.report.work import CrystalSize, EncoderShape, embedding_work, mean_of_cut, step_work
from castbench.text.encoders import LayeredEncoder
from model_batches import join, only

SHAPE = EncoderShape(layers=3, width=32, feedforward=64)  # the random BERT of conftest.py
COPIES = 48  # so many that what a batch costs once does not show


def in_place(own, left, right, *, out_shape=None, **_) -> int:
    """Operations of `addmm_`, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def counted(run) -> float:
    """Multiply-adds of matrix products while `run` runs; attention as plain products, which are counted."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", [*REGISTRY, *OBJECTIVES, "cast-lora", "text_only-all", "crysmmnet_lora-all"])
def test_a_steps_multiply_adds_are_what_torch_counts(name, architecture, encoder, crystals):
    name, _, setting = name.partition("-")
    if setting == "lora":
        architecture["cross_attention"]["text"] = "lora"
    if setting == "all":
        architecture["lora"]["layers"] = "all"
    network = (build_pretraining if name in OBJECTIVES else build_model)(name, architecture, encoder)
    crystal = crystals(network.text_layer)[1]
    batch = join([only(crystal, network.needs)] * COPIES)

    def step():
        out = network(batch)
        (out.loss if hasattr(out, "loss") else out.square().mean()).backward()

    tokens = float(crystal.token_offsets[-1])
    size = CrystalSize(float(crystal.node_offsets[-1]), float(len(crystal.distances)), tokens, tokens)
    sections = meaning.architecture(name, {"architecture": architecture, "structure_encoder": "cogn"})
    settings = {"text": network.text_mode, "architecture": sections}
    expected = COPIES * step_work(settings, SHAPE, size)
    assert counted(step) == pytest.approx(expected, rel=0.1)


def test_so_are_those_of_the_frozen_layers(encoder):
    model = LayeredEncoder.from_folder(encoder)
    mask, size = torch.ones(4, 20, dtype=torch.bool), CrystalSize(1.0, 1.0, 20.0, 20.0)
    hidden = torch.randn(4, 20, SHAPE.width)
    for remaining in (0, 2):
        with torch.inference_mode():
            found = counted(lambda stop=3 - remaining: model.run(hidden, mask, 0, stop))
        assert found == pytest.approx(4 * embedding_work(remaining, SHAPE, size), rel=0.02)


def test_the_mean_of_a_cut_log_normal_is_that_of_a_sample():
    generator = torch.Generator().manual_seed(3)
    sample = torch.exp(6.7 + 1.26 * torch.randn(400_000, generator=generator, dtype=torch.float64))
    found = mean_of_cut(float(sample.mean()), float(sample.std()), 512)
    assert found == pytest.approx(float(sample.clamp(max=512).mean()), rel=0.02)
