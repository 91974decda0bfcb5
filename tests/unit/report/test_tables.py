import math

import pytest

from castbench.report.tables import cell_text, mean_std, model_label, paper_text

CELL = {"model": "cast", "mean": 0.2561, "std": 0.0449, "finished": 3, "expected": 3, "comparable": False}


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.2561, 0.0449, "0.256 (0.045)"),
        (0.039, 0.0003, "0.039 (0.0003)"),  # the paper's own: three decimals would hide the spread
        (0.5, 0.0, "0.500 (0.000)"),
        (0.5, math.nan, "0.500 (–)"),
        (math.nan, math.nan, "–"),
    ],
)
def test_mean_std(mean, std, text):
    assert mean_std(mean, std) == text


def test_a_cell_says_how_many_runs_finished():
    assert cell_text(CELL) == "0.256 (0.045)"
    assert cell_text(CELL | {"finished": 2}) == "0.256 (0.045) [2/3 runs]"


def test_the_paper_is_compared_only_where_it_can_be():
    paper = CELL | {"paper_mean": 0.25, "paper_std": 0.01, "difference": 0.006}
    assert paper_text(paper) == "paper 0.250 (0.010)"
    assert paper_text(paper | {"comparable": True}) == "paper 0.250 (0.010), difference +0.006"
    assert paper_text(CELL | {"paper_mean": math.nan}) == ""


def test_labels_of_models_and_baseline():
    assert model_label("cast") == "CAST"
    assert model_label("training_mean") == "Training mean (baseline)"
    assert model_label("my_model") == "my_model"
