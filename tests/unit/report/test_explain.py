import json
import re

import pandas as pd
import pytest

from castbench.cli import main
from castbench.evaluation.probes import Row, Subject
from castbench.provenance import write_json
from castbench.report.explain import curve_rows
from small_study import write_study

# Rock salt: one site of each element.
CIF = """data_MgO
_cell_length_a 2.978
_cell_length_b 2.978
_cell_length_c 2.978
_cell_angle_alpha 60
_cell_angle_beta 60
_cell_angle_gamma 60
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Mg1 Mg 0 0 0
O1 O 0.5 0.5 0.5
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("explain") / "results")


@pytest.fixture
def crystal(tmp_path):
    (tmp_path / "rock_salt.cif").write_text(CIF)
    return tmp_path / "rock_salt.cif"


def data_of(page, kind):
    """What the page's interactive view draws."""
    found = re.search(
        rf'<div class="view {kind}-view.*?<script type="application/json">(.*?)</script>', page, re.S
    )
    return json.loads(found[1].replace("<\\/", "</"))


def test_a_page_for_a_new_crystal(study, crystal, tmp_path, capsys, monkeypatch):
    """The describer is robocrystallographer, in a process of its own; the rest is the run's own settings."""
    predicted = []
    original = Subject.values
    monkeypatch.setattr(
        Subject, "values", lambda s, r, t: predicted.append(original(s, r, t)) or predicted[-1]
    )
    run, output = study / "runs" / "band_gap" / "cast" / "0", tmp_path / "page.html"
    assert main(["explain", str(run), str(crystal), "--output", str(output)]) == 0
    page = output.read_text()
    assert f"<strong>{predicted[0][0]:.3f} eV</strong>" in page
    assert "MgO" in page and "2 sites, space group 225" in page
    material = data_of(page, "map")["materials"][0]
    assert sorted(material["nodes"]) == ["Mg1", "O1"] and material["words"][1] == "MgO"
    assert material["words"][2:4] == ["is", "Halite,"]
    for words in ("the formula alone", "most attended first", "Rank correlation"):
        assert words in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("<polyline") == 3 and "Area<small>under the curve, eV</small>" in page


def test_the_area_is_that_under_the_curve():
    rows = [(f"delete {order}", None, share, draw, 5 + change * (-1) ** draw)
            for order in ("attended", "attributed", "random") for draw in (0, 1)
            for share, change in ((0.5, 2.0), (1.0, 1.0))]  # fmt: skip
    first = curve_rows(pd.DataFrame(rows, columns=list(Row._fields)), 5.0)[0]
    assert first == {
        "name": "most attended first",
        "points": [(0.0, 0.0), (0.5, 2.0), (1.0, 1.0)],
        "area": 1.25,
    }


@pytest.mark.parametrize(
    ("run", "file", "reason"),
    [
        ("structure_only/0", "rock_salt.cif", "structure_only reads no text"),
        ("cast/7", "rock_salt.cif", "no finished run is here"),
        ("cast/0", "nothing.cif", "there is no such file"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(study, crystal, capsys, run, file, reason):
    folder = study / "runs" / "band_gap" / run
    assert main(["explain", str(folder), str(crystal.with_name(file))]) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_encoder_is_refused(study, crystal, tmp_path, capsys):
    manifest = study / "tokens" / "manifest.json"
    before = manifest.read_text()
    content = json.loads(before)
    try:
        write_json(manifest, content | {"encoder": content["encoder"] | {"checksum": "other"}})
        assert main(["explain", str(study / "runs/band_gap/cast/0"), str(crystal)]) == 2
    finally:
        manifest.write_text(before)
    assert "does not hold the text encoder" in capsys.readouterr().err
