import json

import pyarrow as pa
import pytest

from castbench.text.normalise import normalise_matscibert
from castbench.text.parts import PARTS, find_parts

PEROVSKITE = (
    "CaTiO3 is (Cubic) Perovskite structured and crystallizes in the orthorhombic Pnma space group. "
    "Ca(1)2+ is bonded in a 8-coordinate geometry to four equivalent O(2)2- atoms. "
    "There are two shorter (2.35 Å) and two longer (2.47 Å) Ca(1)-O(1) bond lengths. "
    "Ti(1)4+ is bonded to six O(1)2- atoms to form corner-sharing TiO6 octahedra. "
    "The corner-sharing octahedral tilt angles range from 23-26°. Both Ti(1)-O(1) bond lengths are 1.96 Å. "
    "There are two inequivalent O2- sites. In the first O2- site, O(1)2- is bonded in a 4-coordinate "
    "geometry to two equivalent Ca(1)2+ atoms."
)


def pieces(text):
    return [(text[span.start : span.stop], span.part) for span in find_parts(text)]


def test_every_sentence_of_a_description_has_its_part():
    assert [part for _, part in pieces(PEROVSKITE)] == [
        "formula", "mineral", "symmetry", "coordination", "bond lengths", "coordination", "angles",
        "bond lengths", "coordination", "coordination",
    ]  # fmt: skip
    assert pieces(PEROVSKITE)[:3] == [
        ("CaTiO3", "formula"),
        (" is (Cubic) Perovskite structured and", "mineral"),
        (" crystallizes in the orthorhombic Pnma space group.", "symmetry"),
    ]


def test_sentences_are_numbered():
    assert [span.sentence for span in find_parts(PEROVSKITE)] == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("sentence", "part"),
    [
        ("The structure is two-dimensional and consists of one MoS2 sheet oriented in the (0, 0, 1) "
         "direction.", "dimensionality"),
        ("The structure consists of four hydrogen molecules inside a ZrO2 framework.", "dimensionality"),
        ("Mo(1)4+ is bonded to six equivalent S(1)2- atoms to form edge-sharing MoS6 pentagonal pyramids.",
         "coordination"),
        ("There are four inequivalent B1.50- sites.", "coordination"),
        ("In the twenty-first Ba2+ site, Ba(21)2+ is bonded in a linear geometry to two O(1)2- atoms.",
         "coordination"),
        ("The Cu(2)-Se(1) bond length is 2.49 Å.", "bond lengths"),
        ("All Li(1)-P(1) bond lengths are 2.47 Å.", "bond lengths"),
        ("There is one shorter (3.73 Å) and one longer (3.85 Å) Ba(1)-Si(3) bond length.", "bond lengths"),
        ("There are a spread of Re(1)-B(1) bond distances ranging from 2.35-2.40 Å.", "bond lengths"),
        ("The corner-sharing octahedra are not tilted.", "angles"),
        ("The corner-sharing octahedral tilt angles are 7°.", "angles"),
        ("Prepared by the sol-gel method.", "other"),
    ],
)  # fmt: skip
def test_forms_of_sentences(sentence, part):
    text = f"MgO crystallizes in the cubic Fm-3m space group. {sentence}"
    assert pieces(text)[2:] == [(sentence, part)]


def test_a_component_is_named_before_its_sites():
    text = (
        "MgO crystallizes in the cubic Fm-3m space group. In two of the Te clusters, there are two "
        "inequivalent Te sites. In the ZrO2 framework, Zr(1) is bonded to six O(1) atoms to form ZrO6 "
        "octahedra."
    )
    assert pieces(text)[2:] == [
        ("In two of the Te clusters, ", "dimensionality"),
        ("there are two inequivalent Te sites.", "coordination"),
        ("In the ZrO2 framework, ", "dimensionality"),
        ("Zr(1) is bonded to six O(1) atoms to form ZrO6 octahedra.", "coordination"),
    ]


def test_texts_of_another_kind_are_other():
    assert pieces("A white powder. It melts.") == [("A white powder.", "other"), ("It melts.", "other")]
    assert find_parts("") == [] and find_parts("  ") == []


@pytest.mark.parametrize("prepare", [str, normalise_matscibert])
def test_published_descriptions_are_understood_to_the_last_character(shared_data, prepare):
    found = set()
    for name in ("elastic4", "phonons_text"):
        with pa.input_stream(str(shared_data / f"{name}.jsonl.zst")) as lines:
            for line in lines.read().decode().splitlines()[::3]:
                text = prepare(json.loads(line).get("description") or "")
                spans = find_parts(text)
                assert "".join(text[s.start : s.stop] for s in spans).replace(" ", "") == text.replace(
                    " ", ""
                )
                found |= {span.part for span in spans}
    assert found == set(PARTS) - {"other"}
