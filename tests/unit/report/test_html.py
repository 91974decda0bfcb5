import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import yaml

from castbench.config import table_settings
from castbench.provenance import write_json
from castbench.report.attention import plot_evidence
from castbench.report.html import (
    attention_summary,
    code,
    gain_rows,
    kind_of_run,
    render_report,
    significant,
    table1_rows,
    verdict,
)

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects ids and link targets."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(results, config, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    render_report(config, results, output)
    return output.read_text()


def test_one_file_that_needs_nothing_beside_it(page):
    assert len(page.encode()) < 10e6
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in page and "url(http" not in page
    assert not re.search(r"<(link|iframe|object)\b", page) and "<script src" not in page


def test_the_markup_is_sound_and_the_navigation_complete(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    anchors = {link[1:] for link in parser.links if link.startswith("#")}
    assert anchors == set(re.findall(r'<section id="([^"]+)"', page))


def test_sections_stand_in_the_order_that_readers_want(page):
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert sections[0] == "table1"
    order = [
        "table1",
        "data",
        "seeds",
        "curves",
        "parity-plots",
        "groups",
        "attention",
        "costs",
        "deviations",
        "versions",
    ]
    assert [name for name in sections if name in order] == order


def test_a_demo_says_so_in_every_section(page):
    for section in re.findall(r"<section.*?</section>", page, flags=re.DOTALL):
        assert '<span class="badge demo">demo</span>' in section
    assert "hull that knows only the phases in this set" in page


def test_it_says_what_ran_where(page):
    for text in (
        "Invented CPU",
        "abc123",
        "minilm",
        "63 / 9 / 18",
        "20 finished",
        "2.13.0",
        "0, 1",
        "CC0-1.0",
        "1 timeout",
    ):
        assert text in page, text


def test_table2_shows_the_papers_values_below_ours(page):
    table = re.search(r"<h3>Table 2.*?</table>", page, flags=re.DOTALL)[0]
    rows = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in table.split("<tr")[2:]]
    assert rows[0].endswith("Total energy (eV/atom)")
    assert "train the paper 63 91,520 2.41 (1.12) 17.28 (28.59) 442.0 (212.4) 1,796.7 (3,574.8)" in rows[1]
    assert "98.4 % (62) 99.9 % (91,437)" in rows[1] and rows[1].endswith("-9.14 (7.22)")
    assert "the paper" not in rows[2] + rows[3]
    assert "validation + test the paper 27 22,878" in rows[4]
    assert "all the paper 90 114,398" in rows[5] and "98.9 % (89) 99.9 % (114,292)" in rows[5]
    assert len(rows) == 12


def test_every_item_says_how_to_rebuild_it(page):
    for item in (
        "tables/table1.csv",
        "tables/table2.csv",
        "tables/runs.csv",
        "figures/parity.svg",
        "report.html",
    ):
        assert f"snakemake --cores all --force results/invented/{item}" in page, item


def test_downloads_are_the_tables(page, results):
    found = dict(re.findall(r'download="invented-([^"]+)" href="data:[^,]*;base64,([^"]+)"', page))
    assert set(found) == {file.name for file in (results / "tables").iterdir()}
    assert base64.b64decode(found["table1.csv"]) == (results / "tables" / "table1.csv").read_bytes()


def test_text_of_the_data_is_escaped(results, config, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    runs = pd.read_csv(copy / "tables" / "runs.csv").astype({"reason": object})
    runs.loc[0, ["status", "reason"]] = ["failed", "<script>alert(1)</script>"]
    runs.to_csv(copy / "tables" / "runs.csv", index=False)
    render_report(config, copy, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_the_pretraining_effect_is_judged_from_the_intervals(results):
    assert "the effect is seen." in attention_summary(results, ["cast", "cast_scratch"], 2)["verdict"]
    assert attention_summary(results, ["cast", "cast_scratch"], 3)["verdict"] == ""  # a seed is missing
    left = attention_summary(results, ["structure_only", "multimat"], 2)  # read no text
    assert left["maps"] is None and left["text"] is None and not left["rows"]
    assert attention_summary(results, ["cast"], 2)["maps"] is None
    for intervals, judged in (
        ([(-0.2, -0.1), (-0.1, 0.1)], "the effect is seen in part"),
        ([(-0.1, 0.1), (0.1, 0.2)], "more alike in 1 (the interval excludes zero): the effect is not seen"),
    ):
        rows = enumerate(intervals, 1)
        found = {str(i): {"low": low, "high": high, "seeds": 2} for i, (low, high) in rows}
        assert judged in verdict({"similarity, with minus without pretraining": found}, [1, 2], 2)
    assert verdict({}, [1, 2], 2) == ""


def test_attention_is_given_in_numbers_with_their_crystals(page):
    text = re.sub(r"<[^>]+>", " ", page[page.index('<section id="attention">') :])
    # mean of 0.62 to 0.66 over five crystals
    assert re.search(r"0\.640 +0\.6[23]\d to 0\.6[45]\d", text)
    assert "15 pairs of 5 crystals in each of 2 seeds, 2 more with one node left out" in " ".join(
        text.split()
    )
    for words in ("its formula alone", "without mineral", "rank correlation", "MAE of CAST − coGN"):
        assert words in text, words


def test_groups_of_fewer_than_five_crystals_have_no_interval(tmp_path):
    rows = [("total_energy", "eV/atom", "all", "all", -0.2, -0.3, -0.1, 9, 3),
            ("total_energy", "eV/atom", "sites", "1", 0.1, "", "", 3, 3)]  # fmt: skip
    columns = ["target", "unit", "by", "group", "difference", "low", "high", "n", "seeds"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "gain.csv", index=False)
    found = gain_rows(tmp_path / "gain.csv", ["total_energy", "band_gap"], 3)
    assert [(by, group) for by, group, _ in found] == [("all", "all"), ("sites", "1")]
    assert found[0][2][0]["verdict"] == "near" and found[0][2][1] is None
    assert found[1][2][0]["verdict"] == ""


def test_numbers_of_fewer_than_five_crystals_are_not_shown(results, config, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    file = copy / "tables" / "evidence.csv"
    evidence = pd.read_csv(file)
    few = (evidence["model"] == "masked_node") & (evidence["about"] == "none")
    evidence.loc[few, ["mean", "low", "high"]], evidence.loc[few, "n"] = np.nan, 3
    evidence.to_csv(file, index=False)
    gain = pd.read_csv(copy / "tables" / "text_gain.csv")
    assert gain.loc[gain["n"] < 5, ["difference", "low", "high"]].isna().all(axis=None)
    assert (gain["n"] < 5).any() and gain.loc[gain["n"] >= 5, "difference"].notna().all()
    render_report(config, copy, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>–<small>n = 3, too few</small></td>" in page  # of the pretraining's accuracy
    assert len(re.findall(r"<td>–<small>n = [1-4], too few</small></td>", page)) > 1  # and of the gain
    assert not re.search(r">[+-]?nan", page)


def test_what_could_not_be_shown_is_said(results, config, tmp_path):
    copy = shutil.copytree(results, tmp_path / "results")
    maps = json.loads((copy / "attention" / "maps.json").read_text())
    write_json(copy / "attention" / "maps.json", maps | {"note": "attention.material: mp-1 is not here"})
    write_json(copy / "attention" / "text.json", {"note": "attention.text: mp-2 has no description"})
    plot_evidence({"source": "demo", "models": config["models"], "dataset": "x"}, copy, copy / "figures")
    render_report(config, copy, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "attention.material: mp-1 is not here" in page
    assert "attention.text: mp-2 has no description" in page and 'class="view text-view' not in page
    assert "attention.text: mp-2" in (copy / "figures" / "text_attention.svg").read_text()


def test_a_report_without_attention(results, config, tmp_path):
    left_out = shutil.ignore_patterns("attention*", "evidence.csv")
    copy = shutil.copytree(results, tmp_path / "results", ignore=left_out)
    gain = pd.read_csv(copy / "tables" / "text_gain.csv")
    gain[:0].to_csv(copy / "tables" / "text_gain.csv", index=False)
    render_report(config, copy, tmp_path / "report.html")
    assert "No finished run of a model that reads text" in (tmp_path / "report.html").read_text()


def test_badge(root, settings):
    paper = table_settings(yaml.safe_load((root / "workflow" / "presets" / "paper.yaml").read_text()))
    assert kind_of_run(settings)["badge"] == "demo"
    assert kind_of_run(paper)["badge"] == "paper"
    for other in ({"source": "local"}, {"structure_encoder": "alignn"}, {"sample": 1000}):
        assert kind_of_run(paper | other)["badge"] == "own data"


def test_a_structure_encoder_whose_graph_has_no_number_of_neighbours(results, config, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    manifest = json.loads((folder / "graphs" / "manifest.json").read_text())
    assert "24 neighbours" in render(config, folder, tmp_path)
    settings = {"structure_encoder": "megnet", "symprec": 1e-4}
    write_json(folder / "graphs" / "manifest.json", manifest | {"settings": settings})
    page = render(config | {"structure_encoder": "megnet"}, folder, tmp_path)
    assert "could not be built</small>" in page and "24 neighbours" not in page


def render(config, folder, scratch):
    """The report as text."""
    render_report(config, folder, scratch / "report.html")
    return (scratch / "report.html").read_text()


def test_deviations_are_complete(root):
    import yaml

    entries = yaml.safe_load((root / "workflow" / "resources" / "deviations.yaml").read_text())
    assert len({entry["id"] for entry in entries}) == len(entries)
    for entry in entries:
        assert set(entry) - {"study"} == {"id", "paper", "here", "why", "switch"}
        assert set(entry.pop("study", ["cast"])) <= {"cast", "compositions", "matbench"}
        assert all(isinstance(value, str) and value.strip() for value in entry.values())


def test_significant():
    values = [0.123456, 12345.6, 0, None, float("nan"), 0.00012]
    assert [significant(value) for value in values] == ["0.123", "12,346", "0", "–", "–", "0.000120"]


def test_code_is_marked_and_everything_escaped():
    assert str(code("set `a: <b>` & go")) == "set <code>a: &lt;b&gt;</code> &amp; go"


def test_the_papers_values_are_compared_and_coloured_where_they_can_be(root, results, config, tmp_path):
    paper = yaml.safe_load((root / "workflow" / "presets" / "paper.yaml").read_text())
    paper = config | {key: paper[key] for key in ("materials", "text_encoder")}
    render_report(paper, results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '<small class="far">paper 0.256 (0.045), difference +0.349</small>' in page
    assert "Green: within two combined standard deviations" in page
    assert "hull that knows only" not in page


@pytest.mark.parametrize(
    ("mean", "comparable", "near"), [(0.3, True, True), (0.5, True, False), (0.3, False, None)]
)
def test_near_is_within_two_combined_standard_deviations(mean, comparable, near):
    cell = {"model": "cast", "target": "band_gap", "mean": mean, "std": 0.03, "finished": 3, "expected": 3}
    cell |= {
        "paper_mean": 0.25,
        "paper_std": 0.04,
        "difference": mean - 0.25,
        "comparable": comparable,
        "rank": 1,
    }
    (row,) = table1_rows(pd.DataFrame([cell]))
    assert row["cells"][0]["near"] is near
