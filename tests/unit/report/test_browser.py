"""The report's interactive views in a headless Chromium, with a real mouse."""

import pytest

from browser import Page, find_chromium
from castbench.report.attention import read_maps
from castbench.report.html import render_report


@pytest.fixture(scope="module")
def page(results, config, tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    render_report(config, results, folder / "report.html")
    with Page(program, folder / "profile") as page:
        page.open(folder / "report.html")
        page.wait_for("[...document.querySelectorAll('.view')].every((view) => view.dataset.ready)")
        yield page


def pick(page, selector, value):
    """Choose an option as a person does."""
    page.run(
        f"(s => {{ s.value = {value!r}; s.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
        f"(document.querySelector({selector!r}))"
    )


def point_at(page, node, word, row=0):
    """Move the mouse to a cell of the large map, and read the tooltip."""
    page.run("document.querySelector('.detail').scrollIntoView({block: 'center'})")
    x, y = page.run(
        f"""(() => {{ const c = document.querySelector('.detail canvas');
        const b = c.getBoundingClientRect(), d = c.dataset;
        return [b.x + +d.margin + ({word} + 0.5) * d.wide,
                b.y + {row} * d.block + +d.top + ({node} + 0.5) * d.high]; }})()"""
    )
    page.move(x, y)
    return page.run("document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').innerText")


def test_pick_a_crystal_and_read_a_cell(page, results):
    page.wait_for("document.querySelectorAll('.pick-material option').length === 2")
    pick(page, ".map-view .pick-material", "1")
    page.wait_for("document.querySelector('.map-view .facts-line').textContent.startsWith('Al2Te5')")
    pick(page, ".map-view .pick-layer", "0")
    pick(page, ".map-view .pick-head", "3")
    told = point_at(page, node=1, word=3, row=1).splitlines()
    entry = read_maps(results)["materials"][1]
    weight = entry["maps"]["cast"][0, 2, 1, 3]
    assert told[0] == "Te1 → Halite" and told[1] == "mineral, word 4 of 8"
    assert float(told[2].split()[-1]) == pytest.approx(weight, abs=0.005)
    assert told[3] == "CAST with pretraining, layer 1, head 3"
    pick(page, ".map-view .pick-head", "0")
    told = point_at(page, node=0, word=1).splitlines()
    assert told[0] == "Al1 → MgO" and told[3] == "CAST without pretraining, layer 1, mean over heads"
    mean = entry["maps"]["cast_scratch"][0, :, 0, 1].mean()
    assert float(told[2].split()[-1]) == pytest.approx(mean, abs=0.005)


def test_a_click_on_a_small_map_shows_it_with_its_words(page):
    page.run("document.querySelector('.overview').scrollIntoView({block: 'center'})")
    x, y = page.run(
        "(b => [b.x + b.width - 20, b.y + b.height - 12])"
        "(document.querySelectorAll('.overview canvas')[1].getBoundingClientRect())"
    )
    page.click(x, y)
    chosen = "['layer', 'head'].map((name) => document.querySelector(`.map-view .pick-${name}`).value).join()"
    assert page.run(chosen) == "1,4"


def test_the_mouse_leaves_and_the_tooltip_goes(page):
    assert point_at(page, node=0, word=2)
    page.move(1, 1)
    assert page.run("document.querySelector('.tip').hidden")


def test_cls_over_the_running_text(page):
    pick(page, ".text-view .pick-layer", "5")
    pick(page, ".text-view .pick-head", "2")
    page.run("document.querySelector('.text-view .running').scrollIntoView({block: 'center'})")
    x, y = page.run(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        "(document.querySelectorAll('.text-view .running span')[3].getBoundingClientRect())"
    )
    page.move(x, y)
    told = page.run("document.querySelector('.tip').innerText").splitlines()
    assert told[0] == "Halite" and told[3] == "layer 6, head 2"
    assert page.run("document.querySelector('.text-view .facts-line').textContent").startswith("Share of")


def test_it_works_offline_and_without_errors(page):
    assert page.errors == []
    assert all(address.startswith(("file:", "data:", "blob:")) for address in page.requests)
