"""The Geometry tab in a real TensorBoard server and a real headless Chromium."""

from __future__ import annotations

import json
import time
import warnings

import pytest
import torch
from tensorboards import chromium, open_tab, serving, wait, why_no_browser
from torchgeom_probe.integrations.tensorboard import TensorBoardWriter

import torchgeom_probe as tgp
from torchgeom_probe.report import GeometryReport, LayerGeometry

pytest.importorskip("tensorboard")

EVIL = ["<script>hacked=1</script>", "<img src=x onerror=hacked=1>", "quo\"te's & größe/…/ünï", "%{x}<b>$1$</b>"]


def train(log_dir, study, *, seed, probes, labels):
    """A small network on pictures of a bright third: probes, maps of a plane and a line, a study at two steps."""
    torch.manual_seed(seed)
    x = torch.rand(60, 1, 6, 6)
    y = torch.arange(60) % 3
    for sample, label in zip(x, y, strict=True):
        sample[:, 2 * label : 2 * label + 2] += 1
    layers = [torch.nn.Linear(36, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)]
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    maps = {"plane": tgp.Plane(*x[:3], steps=6), "line": tgp.Line(x[0], x[1], steps=12)}
    options = {"layers": ["1", "2", "3"], "every": 5, "maps": maps, "maps_every": 2, "on_error": "raise"}
    with tgp.Monitor(model, x[:9], labels=labels or y[:9], writer=log_dir, **options).follow(optimizer) as monitor:
        for step in range(5 * (probes - 1)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step in (4, 9):
                monitor.writers[0].write_study(study, monitor.steps)


def odd_report(step):
    value = torch.tensor([1.0, 2.0, float("nan"), float("-inf")], dtype=torch.float64) + step
    told = {"estimand": EVIL[0], "engine": "fused", "num_features": 3, "num_inputs": 2, "num_directions": 2}
    told |= {"quantity": EVIL[1], "unit": EVIL[2]}
    layers = [LayerGeometry(n, value=value, singular_values=torch.ones(4, 2), normalized=True, **told) for n in EVIL]
    return GeometryReport({layer.name: layer for layer in layers})


class Page:
    """The tab in a browser, by what a person does with it."""

    def __init__(self, browser):
        self.browser = browser

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def drawn(self):
        """What is drawn: run, layer, step, sample."""
        return json.loads(self.js("return document.body.dataset.drawn"))

    def until(self, **wanted):
        places = {"run": 0, "layer": 1, "step": 2, "sample": 3}
        wait(lambda: all(self.drawn()[places[name]] == value for name, value in wanted.items()))

    def card(self, title):
        cards = self.browser.find_elements("css selector", ".card")
        return next(card for card in cards if card.find_element("css selector", "h2").text == title)

    def plot(self, title):
        return self.card(title).find_element("css selector", ".js-plotly-plot")

    def point(self, plot, trace, x, y):
        """Move the pointer to a point of a chart's axes, through the browser's own events."""
        from selenium.webdriver import ActionChains

        self.js("arguments[0].scrollIntoView({block: 'center'})", plot)
        across, down = self.js(
            "const [plot, k, x, y] = arguments, trace = plot._fullData[k], layout = plot._fullLayout;"
            "const axis = (name) => layout[name[0] + 'axis' + name.slice(1)];"
            "const a = axis(trace.xaxis ?? 'x'), b = axis(trace.yaxis ?? 'y');"
            "return [a._offset + a.l2p(x) - plot.clientWidth / 2, b._offset + b.l2p(y) - plot.clientHeight / 2]",
            plot, trace, x, y,
        )  # fmt: skip
        pointer = ActionChains(self.browser, duration=50)
        for near in (3, 0):
            pointer.move_to_element_with_offset(plot, round(across) - near, round(down))
        return pointer

    def choose(self, title, value):
        self.js(
            "const one = [...document.querySelectorAll('select')].find((own) => own.title === arguments[0]);"
            "one.value = arguments[1]; one.dispatchEvent(new Event('change'))",
            title, value,
        )  # fmt: skip

    def complaints(self):
        lines = [line for line in self.browser.get_log("browser") if "favicon.ico" not in line["message"]]
        return [line["message"] for line in lines if line["level"] == "SEVERE" or "geometry/" in line["message"]]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A tab over two trainings and a run with odd names, in light mode."""
    if reason := why_no_browser():
        warnings.warn(reason, pytest.PytestWarning, stacklevel=1)  # in the summary of a quiet run too
        pytest.skip(reason)
    logs, beside = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("beside")
    network = torch.nn.Sequential(torch.nn.Linear(2, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    options = {"layers": ["1", "2"], "pairs": 20, "share": True, "progress": False, "estimator": "subspace:1"}
    study = tgp.boundary_study(network, torch.randn(120, 2), **options)
    train(logs / "a", study, seed=0, probes=7, labels=None)
    train(logs / "b", study, seed=1, probes=3, labels=[EVIL[i % 4] for i in range(9)])
    odd = TensorBoardWriter(logs / "c <b>&'odd" / "ünï")
    odd.write(0, odd_report(0))
    with serving(logs, beside, "--reload_interval", "1") as ask, chromium(downloads=beside) as browser:
        open_tab(browser, ask.address)
        page = Page(browser)
        page.logs, page.ask, page.beside, page.odd = logs, ask, beside, odd
        yield page


@pytest.mark.filterwarnings("default:NOBODY LOOKS")
def test_the_tab_in_a_browser(page):
    assert (
        page.js("return parent.document.querySelector('[role=tab][aria-selected=true]').textContent.trim()")
        == "Geometry"
    )
    assert page.js("return getComputedStyle(document.body).fontFamily").startswith("Roboto")
    every_panel_draws(page)
    a_click_chooses_run_layer_and_step(page)
    hover_and_click_on_a_sample(page)
    the_choices_change_what_they_say(page)
    a_slider_moves_and_plays_the_maps(page)
    runs_are_hidden_and_shown(page)
    odd_names_are_text(page)
    a_live_run_grows_on_reload(page)
    dark_mode_follows_tensorboards(page)
    a_picture_downloads(page)
    assert page.complaints() == []


def every_panel_draws(page):
    assert page.drawn()[:2] == ["a", "2"]  # layer 3 has 3 features, and 8 directions have no volume in it
    depth = page.js("return arguments[0].data.map((own) => [own.type, own.x, own.z.length])", page.plot("Depth × time"))
    assert depth == [["heatmap", [0, 5, 10, 15, 20, 25, 30], 3], ["heatmap", [0, 5, 10], 3], ["heatmap", [0], 4]]
    types = page.js("return arguments[0].data.map((own) => own.type)", page.plot("Samples"))
    assert types == ["scatter"] * 3 + ["histogram"]  # a class each
    assert page.js("return arguments[0].querySelectorAll('.tile canvas').length", page.card("Samples")) == 9
    types = page.js("return arguments[0].data.map((own) => own.type)", page.plot("Maps"))
    assert types == ["heatmap", "scatter"] * 3
    assert page.js("return arguments[0].layout.images.length", page.plot("Maps")) == 9  # three corners of three layers
    lines = page.js(
        "return arguments[0].data.filter((own) => own.mode === 'lines+markers').length", page.plot("Boundary profile")
    )
    assert lines == 2
    texts = page.js(
        "return [...document.querySelectorAll('.js-plotly-plot')].map((own) => Object.entries(own._fullLayout)"
        ".filter(([key, value]) => /^[xy]axis/.test(key)).map(([, axis]) => axis.title?.text))"
    )
    assert all("log-volume [nat]" in text or "[nat]" in str(text) or "step" in text or "u" in text for text in texts)
    assert "√det" in page.card("Depth × time").text


def a_click_chooses_run_layer_and_step(page):
    plot = page.plot("Depth × time")
    page.point(plot, 0, 10, 1).click().perform()
    page.until(run="a", layer="2", step=10)
    assert page.card("Samples").text.count("at step 10") >= 2
    assert page.card("Samples").find_element("css selector", ".note").text.startswith("2: ")
    page.point(page.plot("Depth × time"), 1, 5, 0).click().perform()
    page.until(run="b", layer="1", step=5)
    page.point(page.plot("Depth × time"), 0, 20, 2).click().perform()
    page.until(run="a", layer="3", step=20)
    wait(lambda: "9 of 9 samples are not finite" in page.card("Samples").text)
    page.point(page.plot("Depth × time"), 0, 20, 1).click().perform()
    page.until(run="a", layer="2", step=20)


def hover_and_click_on_a_sample(page):
    plot = page.plot("Samples")
    x, y, sample = page.js(
        "const own = arguments[0].data[1], k = own.x.indexOf(15); return [own.x[k], own.y[k], own.customdata[k]]", plot
    )
    page.point(plot, 1, x, y).perform()
    tip = page.browser.find_element("id", "tip")
    wait(tip.is_displayed)
    assert "label 1" in tip.text
    assert "step 15" in tip.text
    assert "predicted" in tip.text
    assert "margin" in tip.text
    assert tip.find_elements("css selector", "canvas")
    page.point(plot, 1, x, y).click().perform()
    page.until(sample=sample, step=15)
    assert page.js("return arguments[0].data.filter((own) => own.line?.width === 3).length", plot) == 1
    tile = page.card("Samples").find_elements("css selector", ".tile")[-1]
    page.js("arguments[0].click()", tile)
    wait(lambda: page.drawn()[3] != sample)
    chosen = page.card("Samples").find_elements("css selector", ".tile.chosen")
    assert len(chosen) == 1


def the_choices_change_what_they_say(page):
    def depth():
        return page.js(
            "const own = arguments[0]; return [own.data[0].z[0][0], own.layout.coloraxis.colorbar.title.text]",
            page.plot("Depth × time"),
        )

    value, title = depth()
    assert "log-volume [nat], median" in title or "log frame volume [nat], median" in title
    page.choose("Number", "sigma_max")
    wait(lambda: depth()[1] == "largest σ")
    assert depth()[0] != value
    page.choose("Show", "yes")
    wait(lambda: depth() == [0, "largest σ, change"])
    page.choose("Show", "")
    page.choose("Number", "median")
    wait(lambda: depth() == [value, title])

    def groups():
        return page.js(
            "return arguments[0].data.filter((own) => own.showlegend).map((own) => own.name)", page.plot("Samples")
        )

    assert groups() == ["0", "1", "2"]
    page.choose("Colour", "correct")
    wait(lambda: groups() and set(groups()) <= {"correct", "wrong"})
    page.choose("Colour", "margin")
    wait(lambda: len(groups()) == 5)
    assert groups()[0].startswith("margin")
    page.choose("Colour", "none")
    wait(lambda: groups() == [])


def a_slider_moves_and_plays_the_maps(page):
    from selenium.webdriver.common.keys import Keys

    card = page.card("Maps")

    def told():
        return card.find_element("css selector", ".step").text

    def field():
        return page.js("return arguments[0].data[0].z ?? arguments[0].data[0].y", page.plot("Maps"))

    slider = card.find_element("css selector", "input[type=range]")
    slider.send_keys(Keys.HOME)
    wait(lambda: told() == "step 0")
    first = field()
    slider.send_keys(Keys.ARROW_RIGHT)
    wait(lambda: told() == "step 10" and field() != first)
    page.js("arguments[0].click()", card.find_element("css selector", "button[title=play]"))
    wait(lambda: told() == "step 30")
    wait(lambda: card.find_elements("css selector", "button[title=play]"))

    def ends():
        return page.js("return arguments[0].data.map((own) => [own.zmin, own.zmax])", page.plot("Maps"))

    of_this_step = ends()
    page.choose("Colours", "all")
    wait(lambda: ends() != of_this_step)
    page.choose("Map", "line")
    wait(lambda: page.js("return arguments[0].data.map((own) => own.type)", page.plot("Maps")) == ["scatter"] * 3)
    page.choose("Map", "plane")
    wait(lambda: page.js("return arguments[0].data[0].type", page.plot("Maps")) == "heatmap")


def runs_are_hidden_and_shown(page):
    def shown():
        return page.js("return document.querySelector('.card .js-plotly-plot').data.length")

    boxes = page.browser.find_elements("css selector", ".run input")
    assert [box.is_selected() for box in boxes] == [True] * 3
    boxes[0].click()
    wait(lambda: shown() == 2)
    page.until(run="b")
    assert "No study" not in page.card("Boundary profile").text
    page.js("document.querySelectorAll('.run button')[2].click()")
    wait(lambda: shown() == 1)
    assert "tgp.boundary_study" in page.card("Boundary profile").text  # what to write
    assert "tgp.Plane" in page.card("Maps").text
    page.browser.find_elements("css selector", ".run input")[2].click()
    wait(lambda: "Every run is hidden" in page.js("return document.body.textContent"))
    search = page.browser.find_element("css selector", "input[type=search]")
    search.send_keys("ÜN")
    wait(lambda: len(page.browser.find_elements("css selector", ".run")) == 1)
    search.clear()
    search.send_keys(" \b")
    wait(lambda: len(page.browser.find_elements("css selector", ".run")) == 3)
    for place in range(3):
        page.js("document.querySelectorAll('.run input')[arguments[0]].click()", place)
    wait(lambda: shown() == 3)


def odd_names_are_text(page):
    page.js("document.querySelectorAll('.run button')[2].click()")
    page.until(layer=EVIL[3])
    names = page.js("return [...document.querySelectorAll('.ytick text')].map((own) => own.textContent)")
    for name in EVIL:
        assert any(name in own or own in name or own.split("…")[0] in name for own in names), (name, names)
    assert EVIL[0] in page.js("return document.body.textContent")
    page.js("document.querySelectorAll('.run button')[1].click()")
    page.until(run="b")
    page.choose("Colour", "class")
    wait(lambda: EVIL[0] in page.js("return [...document.querySelectorAll('.tile')].map((own) => own.title)"))
    assert "<scr" in page.js("return arguments[0].querySelector('.tiles').textContent", page.card("Samples"))
    legend = page.js("return [...document.querySelectorAll('.legendtext')].map((own) => own.textContent)")
    assert any("<script>" in text for text in legend), legend
    assert page.js("return window.hacked ?? parent.hacked ?? null") is None
    assert not page.browser.find_elements("css selector", "main img, main script, aside b")


def a_live_run_grows_on_reload(page):
    page.js("document.querySelectorAll('.run button')[2].click()")
    page.until(run="c <b>&'odd/ünï", step=0)
    page.odd.write(5, odd_report(5))
    page.js("parent.document.querySelector('app-header-reload button').click()")
    page.until(step=5)  # who looks at the last step goes on doing so
    assert page.js("return document.querySelector('.card .js-plotly-plot').data[0].x") == [0, 5]


def dark_mode_follows_tensorboards(page):
    def paper():
        return page.js("return document.querySelector('.card .js-plotly-plot')._fullLayout.paper_bgcolor")

    light = paper()
    page.js("parent.document.body.classList.add('dark-mode')")
    wait(lambda: paper() != light)
    assert page.js("return document.body.classList.contains('dark')")
    page.js("parent.document.body.classList.remove('dark-mode')")
    wait(lambda: paper() == light)


def a_picture_downloads(page):
    page.js("arguments[0].querySelector('button[title^=download]').click()", page.card("Depth × time"))
    path = page.beside / "geometry depth.png"
    wait(path.exists)
    wait(lambda: path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000)


@pytest.mark.slow
def test_a_log_without_geometry_says_what_to_write(page, tmp_path):
    (tmp_path / "logs").mkdir()
    with serving(tmp_path / "logs", tmp_path / "beside") as ask:
        page.browser.switch_to.default_content()
        page.browser.get(f"{ask.address}/data/plugin_entry.html?name=geometry")
        wait(lambda: "tgp.Monitor(model, x[:32]" in page.js("return document.body.textContent"))
        time.sleep(0.2)
        assert page.complaints() == []
