"""Pages in a real browser, headless Chromium, as people see them.

They are skipped where there is no Chromium, or no playwright (the extra `browser`); with
LM_BROWSER=required, as in .ci/run, that is a failure.
"""

import http.server
import importlib.util
import json
import math
import os
import shutil
import threading

import numpy as np
import pytest
from etils import epath

from lm import report
from lm.evals.scores import statistics
from lm.reports import page
from tests import report_runs
from tests.report_runs import jsonl, write_run, write_sweep

OPTIONS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
WIDE, NARROW = 1280, 400
HOSTILE = "<script>window.hacked = 1</script>\"'><img src=x onerror='window.hacked=1'></script>@x"


def lacking():
    """What is missing for these tests; "" if nothing is."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright isn't installed: pip install -c constraints.txt -e '.[browser]'"
    if not shutil.which("chromium"):
        return "there is no chromium: apt-get install chromium"
    return ""


@pytest.fixture(scope="module")
def chromium():
    if reason := lacking():
        if os.environ.get("LM_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens a page from its HTML. Afterwards it must have loaded nothing but itself, and nothing of
    it must have failed.
    """
    opened = []
    wrong = []

    def open_page(html, width=WIDE, **options):
        file = tmp_path / f"page-{len(opened)}.html"
        file.write_text(html)
        tab = chromium.new_page(viewport={"width": width, "height": 900}, **options)
        tab.set_default_timeout(60_000)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
        tab.on("console", note_errors)
        tab.on("request", note_requests)
        opened.append(tab)
        tab.goto(file.as_uri())
        return tab

    def note_errors(message):
        if message.type == "error":
            wrong.append(message.text)

    def note_requests(request):
        if not request.url.startswith(("data:", tmp_path.as_uri())):
            wrong.append(request.url)

    open_page.wrong = wrong
    yield open_page
    for tab in opened:
        tab.close()
    assert not wrong


def one_section(*parts):
    return page.render("A page", [page.Section("A section", parts)])


def figure_page(curves, **others):
    return one_section(page.Curves("step", [page.Figure("loss", curves)], **others))


# What a Bokeh plot of the page holds: its lines, by their names.
LINES = """() => {
    const plot = Bokeh.documents.at(-1).roots()[0];
    const data = plot.renderers[0].data_source.data;
    const lines = data.name.map((name, i) => [name, [...data.x[i]], [...data.y[i]]]);
    return { lines, scale: plot.y_scale.type, range: [plot.x_range.start, plot.x_range.end] };
}"""


def drawn(tab, scale="linear"):
    tab.wait_for_selector(f'[data-drawn="{scale}"]')
    return tab.evaluate(LINES)


# The kit.


def column(tab, number):
    return tab.locator(f"td:nth-child({number})").all_text_contents()


def test_tables_sort(visit):
    rows = [
        ["b", 10.0, page.Cell("0.5 (0.1 to 0.9)", 0.5), None],
        ["a", 9.0, page.Cell("0.25 (0 to 1)", 0.25), "x"],
        ["c10", -1.5, None, "y"],
        ["c9", math.nan, page.Cell("3", 3), ""],
        ["d", math.inf, page.Cell("1e-8", 1e-8), "a"],
    ]
    tab = visit(one_section(page.Table(["name", "number", "cell", "text"], rows)))
    heads = tab.locator("th button")

    heads.nth(1).click()
    assert column(tab, 2) == ["-1.5000", "9.0000", "10.0000", "inf", "nan"]
    assert column(tab, 1) == ["c10", "a", "b", "d", "c9"]
    heads.nth(1).click()
    assert column(tab, 2) == ["inf", "10.0000", "9.0000", "-1.5000", "nan"]
    heads.nth(2).click()
    assert column(tab, 3) == ["1e-8", "0.25 (0 to 1)", "0.5 (0.1 to 0.9)", "3", ""]
    heads.nth(0).click()
    assert column(tab, 1) == ["a", "b", "c9", "c10", "d"]
    heads.nth(3).click()
    heads.nth(3).click()
    assert column(tab, 4) == ["y", "x", "a", "", ""]
    assert tab.locator("th[aria-sort]").all_text_contents() == ["text"]


def test_curves_are_switched_on_and_off(visit):
    curves = {name: ([1, 2, 3], [i, i + 1, i + 2]) for i, name in enumerate("abc")}
    tab = visit(figure_page(curves))
    assert [line[0] for line in drawn(tab)["lines"]] == ["a", "b", "c"]

    tab.get_by_label("b", exact=True).uncheck()
    assert drawn(tab)["lines"] == [["a", [1, 2, 3], [0, 1, 2]], ["c", [1, 2, 3], [2, 3, 4]]]
    tab.get_by_role("button", name="none").click()
    assert drawn(tab)["lines"] == []
    tab.get_by_role("button", name="all").click()
    assert len(drawn(tab)["lines"]) == 3


def test_a_logarithmic_axis_has_gaps_where_nothing_is_above_0(visit):
    tab = visit(figure_page({"a": ([1, 2, 3, 4], [10, 0, -1, 1000]), "b": ([1, 2], [1, 2])}))
    assert drawn(tab)["scale"] == "LinearScale"
    tab.get_by_label("b", exact=True).uncheck()

    tab.get_by_role("button", name="log").click()

    shown = drawn(tab, "log")
    assert shown["scale"] == "LogScale"
    ((name, x, y),) = shown["lines"]  # what was off stays off
    assert (name, x) == ("a", [1, 2, 3, 4])
    np.testing.assert_array_equal(y, [10, np.nan, np.nan, 1000])
    tab.get_by_role("button", name="linear").click()
    assert drawn(tab)["scale"] == "LinearScale"


def test_hover_says_which_run_and_value(visit):
    """In the middle of a figure with one level line."""
    tab = visit(figure_page({"the run": ([1, 2, 3], [0.25, 0.25, 0.25])}))
    drawn(tab)
    box = tab.locator(".figure canvas").first.bounding_box()
    tooltip = tab.locator(".bk-tooltip-content").first
    # The line lies in the middle of the plot; where its frame is depends on the labels around it.
    for y in range(int(box["height"]) // 4, int(box["height"]), 4):
        tab.mouse.move(box["x"] + box["width"] * 0.53, box["y"] + y)
        tab.wait_for_timeout(40)
        if tooltip.is_visible():
            break
    assert "the run" in tooltip.inner_text()
    assert "0.25" in tooltip.inner_text()


def test_zoom(visit):
    tab = visit(figure_page({"a": (list(range(100)), list(range(100)))}))
    before = drawn(tab)["range"]
    box = tab.locator(".figure canvas").first.bounding_box()
    tab.locator(".bk-tool-icon-box-zoom").first.click()
    tab.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.3)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.7, steps=5)
    tab.mouse.up()
    tab.wait_for_timeout(200)

    start, end = drawn(tab)["range"]

    assert 0.1 < (end - start) / (before[1] - before[0]) < 0.4
    tab.locator(".bk-tool-icon-reset").first.click()
    tab.wait_for_timeout(200)
    assert drawn(tab)["range"] == pytest.approx(before)


def test_a_spike_is_drawn(visit):
    y = np.sin(np.arange(20_000) / 100)
    y[12_345] = 50.0
    tab = visit(figure_page({"a": (np.arange(20_000), y)}))
    ((_, x, thinned),) = drawn(tab)["lines"]
    assert len(x) <= page.MAX_POINTS_OF_A_CURVE
    assert thinned[x.index(12_345)] == 50.0
    assert tab.get_by_text("the longest has 20,000").is_visible()


def test_figures_on_demand(visit):
    curves = {"a": ([1, 2], [1, 2])}
    others = [page.Figure("another", curves)]
    tab = visit(figure_page(curves, others=others))
    drawn(tab)
    assert tab.locator("[data-drawn]").count() == 1
    tab.get_by_text("1 more figures").click()
    tab.locator("[data-drawn]").nth(1).wait_for()


# Text of others.


def test_hostile_text_is_shown_and_does_not_run(visit, tmp_path, fast_runs):
    name = "<script>alert(1)<!--"
    path = tmp_path / name
    write_run(path)
    lines = report_runs.lines(40)
    for line in lines[:40]:
        line |= {HOSTILE: 0.5, "__proto__": 1.0, "eval/</script>/accuracy": 0.1}
    for line in lines[5:9]:
        line |= {"train/loss": math.nan, "train/grad_norm": math.inf}
    text = jsonl(lines) + '{"step": 40, "train/loss": 1e400, "constructor": 1e999}\n'
    (path / "metrics.jsonl").write_text(text)
    predictions = report_runs.predictions(texts=(HOSTILE, "</td></table></pre>"))
    for line in predictions:
        line["distribution"] = {HOSTILE: 1.0} | line["distribution"]
    (path / "predictions" / "topic-40.jsonl").write_text(jsonl(predictions))
    (path / "samples.md").write_text(f"<!-- lm step 40 -->\n</pre>{HOSTILE}\n")
    config = report_runs.config() | {HOSTILE: {"__proto__": HOSTILE}}
    (path / "config.json").write_text(json.dumps(config))

    tab = visit(report.runs_page([epath.Path(path)]))

    assert drawn(tab)["lines"][0][0] == name
    assert tab.title() == name
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.wait_for_timeout(300)
    for place in ("td", "pre", "h1"):
        shown = "\n".join(tab.locator(place).all_text_contents())
        assert (HOSTILE in shown) == (place != "h1")
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.locator("main img").count() == 2
    assert "inf" in tab.locator("tr", has_text="train/loss").locator("td.number").first.inner_text()


@pytest.fixture
def server():
    """(address, paths asked for) of a web server on this machine."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_the_policy_stops_what_escaping_missed(visit, server):
    """A script, a handler and addresses that stand in the page unescaped."""
    address, asked = server
    missed = (
        "<script>window.hacked = 1</script><p onclick='window.hacked = 1'>press</p>"
        f"<img src='{address}/x.png'><link rel=stylesheet href='{address}/x.css'>"
        f"<iframe src='{address}/x.html'></iframe>"
    )
    tab = visit(one_section(page.Text("HERE")).replace("HERE", missed))
    tab.get_by_text("press").click()
    tab.wait_for_timeout(200)
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert not asked
    refused = [message for message in visit.wrong if "Content Security Policy" in message]
    assert len(refused) == 5
    visit.wrong.clear()


# Whole reports.

LONG = (
    "a_metric_whose_name_has_no_place_to_break_and_goes_on_and_on_and_on_for_a_hundred_characters"
)


@pytest.fixture
def long_sweep(tmp_path, fast_runs, monkeypatch):
    """The page of a sweep with long names, in whole and in failed runs."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 20)
    axes = {"optimizer.learning_rate": [1e-4, 1e-3], "model.num_layers": [2, 4], "seed": [0, 1]}
    plan = write_sweep(tmp_path / "sweep", axes, lambda changes: 0.3 + changes["seed"] / 10)
    path = tmp_path / "sweep" / plan["runs"][0]["name"]
    lines = report_runs.lines(40)
    for line in lines:
        line[f"train/{LONG}"] = 1.0
    (path / "metrics.jsonl").write_text(jsonl(lines))
    (path / "samples.md").write_text(f"<!-- lm step 40 -->\n{'x' * 500}\n")
    failure = {"code": 1, "lines": ["exit 1: " + "y" * 300]}
    failed = tmp_path / "sweep" / plan["runs"][3]["name"] / "failed.json"
    failed.write_text(json.dumps(failure))
    return report.sweep_page(epath.Path(tmp_path / "sweep"))


@pytest.mark.parametrize("width, colours", [(WIDE, "light"), (NARROW, "dark")])
def test_a_page_is_no_wider_than_its_window(width, colours, visit, long_sweep):
    tab = visit(long_sweep, width, color_scheme=colours)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.locator(".curves").scroll_into_view_if_needed()
    drawn(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (colours == "light")
    for heading in ("Means over seeds", "Which axis matters", "Differences from the best setting"):
        assert tab.get_by_role("heading", name=heading).is_visible()


@pytest.mark.slow
def test_fifty_runs_of_two_thousand_lines(visit, tmp_path, fast_runs):
    """All figures are drawn, and the page has less than 10 MB."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(50):
        paths.append(epath.Path(tmp_path / f"run-{i}"))
        write_run(tmp_path / f"run-{i}", steps=2000, seed=i)
        lines = report_runs.lines(2000, seed=i)
        for line in lines[:2000]:
            line |= {f"train/metric_{k}": value for k, value in enumerate(rng.normal(size=4))}
        (tmp_path / f"run-{i}" / "metrics.jsonl").write_text(jsonl(lines))
    html = report.runs_page(paths)
    assert len(html.encode()) < 10_000_000

    tab = visit(html)
    assert tab.get_by_text("the longest has 2,000").count() == 1
    tab.locator(".curves").scroll_into_view_if_needed()
    assert len(drawn(tab)["lines"]) == 50
    tab.locator("details summary").first.click()
    for figure in tab.locator(".figure").all():
        figure.scroll_into_view_if_needed()
    count = tab.locator(".figure").count()
    assert count == 10
    tab.locator("[data-drawn]").nth(count - 1).wait_for()
