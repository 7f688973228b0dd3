"""The report of a run: what it warns of, what it shows, and what a browser makes of it."""

import dataclasses
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pm_jax.continual.report import (
    advice,
    comparison,
    comparison_plots,
    comparison_report,
    figures,
    finished_run,
    report,
)
from pm_jax.continual.run import run_seeds, run_with_baseline
from tests.binaries import call, refused
from tests.small_runs import QUIET, SMALL

pytest.importorskip("matplotlib")
LABELS = ["Perturb-and-Merge", "averaging (baseline)"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The work directory of two seeds with landscapes and a baseline, and its report."""
    workdir = tmp_path_factory.mktemp("full")
    config = dataclasses.replace(SMALL, landscape_points=5, plane_points=3)
    baseline = dataclasses.replace(config, rule="averaging", landscape_points=0, plane_points=0)
    run_with_baseline(config, baseline, [0, 1], workdir, QUIET)
    assert report.write_report(workdir) == workdir / "report.html"
    return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One seed without landscapes."""
    workdir = tmp_path_factory.mktemp("plain")
    run_seeds(SMALL, [3], workdir, QUIET)
    return workdir


@pytest.fixture
def plain(finished, tmp_path):
    """A copy of it that a test may damage."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


class Page(html.parser.HTMLParser):
    """Charts, ids and rows of tables of a report; every tag must be closed in its order."""

    def __init__(self, path):
        super().__init__()
        self.charts, self.rows, self.ids, self.tags, self._open = [], [], [], set(), []
        self.feed(path.read_text())
        assert not self._open
        self.text = re.sub(r"<[^>]*>", "", path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "svg":
            self.charts.append(dict(attrs))
        if tag not in ("meta", "wbr"):
            self._open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, beginning):
        return next(row for row in self.rows if row[0].startswith(beginning))


def test_the_page_begins_with_the_gain_and_shows_every_doubt(full):
    content = (full / "report.html").read_text()
    runs = [json.loads((full / f"seed_{seed}/results.json").read_text()) for seed in (0, 1)]
    page = Page(full / "report.html")
    headline = re.search(r'<p class="headline">(.*)</p>', content)[1]
    assert headline.startswith("Perturb-and-Merge forgets ") and "over 2 seeds" in headline
    expected = [
        text
        for doubt in (*advice.warnings_of(runs), advice.remark_on_predictions(runs))
        if doubt
        for text in doubt.merges
    ]
    assert expected and all(text in html.unescape(page.text) for text in expected)


def test_figures_of_two_seeds_are_in_the_page(full):
    runs = [json.loads((full / f"seed_{seed}/results.json").read_text()) for seed in (0, 1)]
    page = Page(full / "report.html")
    values = [100 * run["final_average_accuracy"] for run in runs]
    cell = f"{np.mean(values):.1f}\u00a0±\u00a0{np.std(values, ddof=1):.1f}"
    row = page.row("final average accuracy")
    assert row[1] == cell and len(row) == 3 and cell not in row[2]
    entries = [100 * run["accuracy_matrix"][2][1] for run in runs]
    cell = f"{np.mean(entries):.1f}\u00a0±\u00a0{np.std(entries, ddof=1):.1f}"
    assert page.row("after\u00a0task\u00a03")[2] == cell
    assert page.row("percent, test split")[1:] == LABELS
    assert page.row("num_tasks") == ["num_tasks", "3", "3", "5"]
    assert page.row("landscape_points")[1:] == ["5", "0", "0"]
    assert page.row("hidden_sizes")[1:] == ["16", "16", "256, 256"]
    differing = page.rows[page.rows.index(["setting", *LABELS, "default"]) :]
    assert differing[1][0] == "num_tasks"  # the first of Config that is not its default
    seconds = [run["seconds"]["train"] for run in runs]
    assert page.row("training, seconds")[1].startswith(f"{np.mean(seconds):.1f}\u00a0±\u00a0")
    assert "regret against the best coefficients, on validation data: " in page.text  # of one run
    metrics = [row for row in page.rows if row[0] in report.METRICS.values()]
    assert len(metrics) == 6 and not any("-" in row for row in metrics)
    names = [chart["aria-label"].split(".")[0] for chart in page.charts]
    assert names == [
        *("Accuracy on the tasks seen", "Accuracy matrix", "Training loss", "Merge coefficients"),
        "Predicted against measured loss change",
        *("Loss along the merges", "Accuracy along the merges", "Around the last merge"),
    ]


def test_nothing_but_the_file_is_needed_and_it_is_the_same_again(full):
    page, content = Page(full / "report.html"), (full / "report.html").read_bytes()
    assert len(page.charts) == 8 and len(page.ids) == len(set(page.ids)) > 8
    assert not page.tags & {"script", "link", "iframe", "a", "metadata"}
    assert not re.search(rb"url\((?!#)|@import|https?:|href=\"(?!#|data:image/png)", content)
    assert b'name="viewport"' in content
    report.write_report(full)
    assert (full / "report.html").read_bytes() == content
    assert not list(full.glob("*.tmp"))


def test_one_seed_without_a_landscape_says_how_to_have_one(plain):
    page = Page(report.write_report(plain))
    assert len(page.charts) == 5
    assert "<code>--landscape_points=21</code>" in (plain / "report.html").read_text()
    assert "seed 3: no spread is known." in page.text
    result = json.loads((plain / "seed_3/results.json").read_text())
    value = f"{100 * result['final_average_accuracy']:.1f}"
    assert page.row("final average accuracy, over") == [page.row("final")[0], value]
    (plain / "seed_3/metrics.jsonl").unlink()
    page = Page(report.write_report(plain))
    assert len(page.charts) == 4 and "The training loss is not shown" in page.text
    edited(plain / "config.json", rule="ties")  # whose constant scale is no coefficient
    assert len(Page(report.write_report(plain)).charts) == 3
    assert not any(row[0].startswith("final average accuracy among") for row in page.rows)


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_that_knows_nothing_of_its_merges_still_has_a_report(plain):
    """As joint training's, which is measured after the last task only."""
    merges = [dict.fromkeys(("alpha", "predicted_loss_change"))] * 3
    matrix = [[None] * 3, [None] * 3, [0.5, 0.75, 1.0]]
    aware = {"final_average_accuracy": 0.875}
    edited(plain / "seed_3/results.json", merges=merges, accuracy_matrix=matrix, forgetting=None,
           task_aware=aware)  # fmt: skip
    edited(plain / "config.json", scenario="class_incremental")
    page = Page(report.write_report(plain))
    assert len(page.charts) == 3 and page.row("after\u00a0task\u00a03")[1:] == [
        "50.0",
        "75.0",
        "100.0",
    ]
    assert page.row("after\u00a0task\u00a01")[1:] == ["-"] * 3
    assert page.row("final average accuracy among the classes of the task")[1:] == ["87.5"]
    assert not any(row[0].startswith("forgetting") for row in page.rows)
    assert "None: nothing about the merges asks for a change." in page.text
    assert "The rule has no coefficients." in page.text


def test_several_classifiers_have_a_row_each_on_both_splits(plain):
    path = plain / "seed_3/results.json"
    content = json.loads(path.read_text())
    part = content["scores"]["trained"]
    other = {split: {**part[split], "final_average_accuracy": 0.125} for split in part}
    edited(path, scores={"trained": part, "ridge": other}, classifiers=["trained", "ridge"])
    page = Page(report.write_report(plain, "validation"))
    value = f"{100 * part['validation']['final_average_accuracy']:.1f}"
    assert page.row("percent, validation split, trained")[1:] == LABELS[:1]
    assert page.row("final average accuracy, over")[1:] == [value]
    rows = [page.row(f"{name}, {split}")[:2] for name in ("trained", "ridge") for split in part]
    assert rows[1] == ["trained, validation", value] and rows[2] == ["ridge, test", "12.5"]
    assert "validation split, trained" in page.text


def test_names_are_escaped(plain):
    edited(plain / "config.json", dataset="/data/<b>&.npz", rule='"<i>')
    page = Page(report.write_report(plain))
    assert "<h1>&#34;&lt;i&gt; on &lt;b&gt;&amp;.npz</h1>" in (plain / "report.html").read_text()
    assert page.row("dataset")[1] == "/data/<b>&.npz"


def test_losses_of_pieces_of_an_epoch_are_weighted_by_their_steps(plain):
    lines = [("epoch", 1, 1, 3, 2.0), ("epoch", 1, 1, 4, 6.0), ("epoch", 1, 2, 8, 1.0),
             ("merge", 1, None, 8, None), ("epoch", 2, 1, 10, 5.0)]  # fmt: skip
    names = ("event", "task", "epoch", "step", "loss")
    text = "".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)
    (plain / "seed_3/metrics.jsonl").write_text(text)
    ends, values = finished_run.training_losses(finished_run.read_run(plain))
    assert ends.tolist() == [0.5, 1.0, 2.0] and values.tolist() == [[3.0, 1.0, 5.0]]


def test_curves_have_mean_and_deviation_over_seeds():
    runs = [{"accuracy_matrix": [[0.5, None], [x, 0.5]]} for x in (0.1, 0.5)]
    axes = figures.accuracy_curves({"one": runs, "other": runs[:1]}).axes[0]
    line, _, (bars,) = axes.containers[0].lines
    np.testing.assert_allclose(line.get_ydata(), [50, 40])
    spans = np.asarray(bars.get_segments())[:, :, 1]
    deviation = np.std([30, 50], ddof=1)
    np.testing.assert_allclose(spans, [[50, 50], [40 - deviation, 40 + deviation]])
    texts = figures.accuracy_matrix(runs).axes[0].texts
    assert [text.get_text() for text in texts] == ["50.0\n±0.0", "30.0\n±28.3", "50.0\n±0.0"]


def test_a_landscape_shows_new_and_earlier_tasks_apart():
    alphas = np.asarray([-0.5, 0.0, 1.0])
    values, merged = np.full((3, 3, 3), np.nan), np.full((3, 3), np.nan)
    values[2] = [[9, 9, 9], [1, 2, 6], [3, 4, 2]]
    values[1, :, :2], merged[1, :2], merged[2] = 1.0, 1.0, [1, 2, 3]
    used, best = np.asarray([1, 0.5, 0.25]), np.asarray([np.nan, 0.5, 1.0])
    one = figures.Segments(values, merged, used, best)
    first, second, *_ = figures.landscape(alphas, [one]).axes
    new, earlier, both, vertical, dot = second.lines
    assert (first.get_title(), second.get_title()) == ("task 2", "task 3")
    assert new.get_ydata().tolist() == [9, 6, 2] and earlier.get_ydata().tolist() == [9, 1.5, 3.5]
    assert both.get_ydata().tolist() == [9, 3, 3] and vertical.get_xdata()[0] == 1.0
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.25, 2.0)
    assert second.get_ylim()[1] < 9  # what is outside [0, 1] does not squeeze what is inside
    other = one._replace(values=values + 2, used=used + 0.25)
    second = figures.landscape(alphas, [one, other]).axes[1]
    new, *_, dots = second.lines
    assert new.get_ydata().tolist() == [10, 7, 3] and list(dots.get_xdata()) == [0.25, 0.5]
    band = second.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.y0, band.y1], [3 - 2**0.5, 10 + 2**0.5])


def test_the_binary_prints_where_the_report_is(plain, capsys):
    call("report", f"--workdir={plain}")
    assert capsys.readouterr().out == f"{plain / 'report.html'}\n"
    assert (plain / "report.html").exists()


def test_what_cannot_be_written_is_one_line(plain, capsys):
    (plain / "report.html").mkdir()
    line = refused(capsys, "report", f"--workdir={plain}")
    assert "report.html" in line and "cannot be read or written" in line


def test_without_matplotlib_one_line_says_so(plain, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(capsys, "report", f"--workdir={plain}")
    assert "needs matplotlib" in line and "pip install 'pm_jax[plots]'" in line
    assert not (plain / "report.html").exists()


@pytest.fixture(scope="module")
def compared(full):
    """The page of a comparison of the run with its baseline and a rule without coefficients."""
    results = {"perturb_and_merge+curvature=kronecker+epochs=4+first_task_epochs=40": [],
               "averaging": [], "ties": []}  # fmt: skip
    for label, folder in zip(results, (full, full / "baseline", full / "baseline"), strict=True):
        for seed in (0, 1):
            content = json.loads((folder / f"seed_{seed}/results.json").read_text())
            content["config"]["rule"] = label.split("+")[0]
            part = content["scores"]["trained"]
            scores = {"trained": part, "ridge": part}
            results[label].append({**content, "scores": scores, "classifiers": list(scores)})
    rows = comparison.compare(results, classifiers=["trained", "ridge"])
    plots = comparison_plots.plots_of(rows, results)
    own = dict.fromkeys(results, "rule=<b>")
    path = full / "comparison"
    path.mkdir()
    return comparison_report.write_report(rows, results, plots, (SMALL, own), path), plots, rows


def test_a_comparison_has_a_page_with_its_classifiers_side_by_side(compared):
    path, plots, rows = compared
    page = Page(path)
    assert path.name == "report.html" and "3 merge rules on digits" in page.text
    heading = page.row("rule")
    assert heading[1:3] == ["final accuracy, test: trained", "final, ridge"]
    row = page.row(rows[1].rule)
    assert row[1] == row[2] and "\u00a0±\u00a0" in row[1] and row[4] != "-"
    assert page.row(rows[0].rule)[1].split("\u00a0")[0] in page.text.split("Result")[0]
    assert "points above" in page.text and "paired over 2 seeds" in page.text
    assert [chart["aria-label"].split(".")[0] for chart in page.charts] == [
        plot.name for plot in plots.values()
    ]
    assert "rule=&lt;b&gt;" in path.read_text() and len(page.ids) == len(set(page.ids))


def test_plots_have_markers_on_their_ticks_labels_outside_and_alpha_where_there_is_one(compared):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    _, plots, rows = compared
    for name in ("accuracy_after_each_task", "alpha_of_each_task"):
        axes = plots[name].figure.axes[0]
        assert all(line.get_xdata().tolist() == [1, 2, 3] for line, *_ in axes.containers)
    labels = [each.get_label() for each in plots["alpha_of_each_task"].figure.axes[0].containers]
    assert set(labels) == {row.rule for row in rows} - {"ties"}
    colors = {
        name: {c.get_label(): c.lines[0].get_color() for c in plots[name].figure.axes[0].containers}
        for name in ("accuracy_after_each_task", "alpha_of_each_task")
    }
    assert colors["alpha_of_each_task"].items() <= colors["accuracy_after_each_task"].items()
    for plot in plots.values():
        canvas = FigureCanvasAgg(plot.figure)
        canvas.draw()
        width, height = canvas.get_width_height()
        # Ticks outside of the axes are not drawn.
        ticks = {t for axes in plot.figure.axes for t in (*axes.get_xticklabels(),
                                                          *axes.get_yticklabels())}  # fmt: skip
        for text in {t for t in plot.figure.findobj(Text) if t.get_text()} - ticks:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        for legend in plot.figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in plot.figure.axes)


MEASURE = """<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentDocument: report}) => ({
    sizes: [...report.querySelectorAll("svg")].map(svg => {
      const frame = svg.getBoundingClientRect();
      const out = [...svg.querySelectorAll("text")].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 4 || box.right > frame.right + 4;
      });
      return [frame.width, frame.height, out.map(text => text.textContent)];
    }),
    ink: getComputedStyle(report.querySelector("svg text")).fill,
    inner: report.documentElement.clientWidth, whole: report.documentElement.scrollWidth
  }));
  document.body.textContent = JSON.stringify(found);
});
</script>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_chart_and_its_console_is_silent(full, compared, scheme, tmp_path):
    """In frames as wide as a phone and as a desk's screen: windows have a least width."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    contents = [path.read_text() for path in (full / "report.html", compared[0])]
    frames = "".join(
        f'<iframe style="border: 0; width: {width}px" srcdoc="{html.escape(content)}"></iframe>'
        for content in contents
        for width in (390, 1440)
    )
    page = tmp_path / "page.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content='
                    f'"light dark">{MEASURE}<body>{frames}</body>')  # fmt: skip
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
               "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
               "--dump-dom", page.as_uri()]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "CONSOLE" not in ended.stderr, ended.stderr
    frames = json.loads(re.search(r"<body>(.*)</body>", ended.stdout, re.DOTALL)[1])
    for number, found in enumerate(frames):
        width, count = (390, 1440)[number % 2], contents[number // 2].count("<svg")
        assert len(found["sizes"]) == count == (8, 5)[number // 2]
        for wide, high, cut in found["sizes"]:
            assert 300 < wide < min(width, 550) and high > 100 and not cut
        assert found["whole"] <= found["inner"] <= width  # nothing to scroll sideways
        assert found["ink"] == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]
    assert frames[0]["inner"] > 370  # less a scroll bar
