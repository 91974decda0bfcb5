import math

import torch

from castbench.models import build_pretraining
from castbench.models.contrastive import info_nce
from model_batches import join, only


def test_loss_of_orthogonal_pairs_is_known():
    vectors = torch.eye(4)[:3]
    outcome = info_nce(5 * vectors, 0.1 * vectors, temperature=0.2)
    assert math.isclose(float(outcome.loss), math.log(1 + 2 * math.exp(-1 / 0.2)), rel_tol=1e-5)
    assert (float(outcome.correct), outcome.count) == (3, 3)


def test_loss_is_symmetric_and_higher_for_wrong_partners():
    torch.manual_seed(0)
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    torch.testing.assert_close(info_nce(a, b, 0.2).loss, info_nce(b, a, 0.2).loss)
    assert info_nce(a, a.roll(1, 0), 0.2).loss > info_nce(a, a, 0.2).loss
    assert float(info_nce(a, a.roll(1, 0), 0.2).correct) == 0


def test_similarities_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    a, b = torch.randn(2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(a, b, 0.2).loss
    assert torch.equal(found, info_nce(a, b, 0.2).loss)


def test_correct_is_the_mean_of_both_directions():
    a = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    b = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    outcome = info_nce(a, b, 0.2)  # crystals: 1 of 2 right; texts: both wrong or right by the argmax
    forward = (torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T).argmax(1)
    backward = (torch.nn.functional.normalize(b) @ torch.nn.functional.normalize(a).T).argmax(1)
    hits = (forward == torch.arange(2)).sum() + (backward == torch.arange(2)).sum()
    assert float(outcome.correct) == float(hits) / 2


def test_a_batch_is_compared_at_the_temperature_of_the_config(architecture, encoder, crystals):
    architecture["contrastive"]["temperature"] = 0.7
    network = build_pretraining("contrastive", architecture, encoder)
    batch = only(join(crystals(3)), network.needs)
    found, (first, _, second, _, third) = network(batch), network.project_text
    texts = third(second(first(batch.cls_states).relu()).relu())
    torch.testing.assert_close(found.loss, info_nce(network.structure(batch), texts, 0.7).loss)
