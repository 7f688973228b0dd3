"""The report of a run: what it warns of, what it shows, and what a browser makes of it."""

import base64
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

from pm_jax.continual.merging import trust
from pm_jax.continual.report import figures, finished_run, report
from pm_jax.continual.run import run_seeds, run_with_baseline
from tests.binaries import call, refused
from tests.small_runs import QUIET, SMALL

pytest.importorskip("matplotlib")
ROOT = pathlib.Path(__file__).parents[2]
LABELS = ["perturb_and_merge", "averaging (baseline)"]


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
    """Images and rows of tables of a report; every tag must be closed in its order."""

    def __init__(self, path):
        super().__init__()
        self.images, self.rows, self.tags, self._open = [], [], set(), []
        self.feed(path.read_text())
        assert not self._open
        self.text = re.sub(r"<[^>]*>", "", path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "wbr"):
            self._open.append(tag)
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


PREDICTION = "predicted_loss_change", "actual_loss_change"
WARNINGS = {
    "3.1 times too much": (
        dict(zip(PREDICTION, (0.031, 0.01), strict=True)),
        ["the quadratic model over-predicted the rise of the task's own loss by 3.1 x "
         "(0.031 predicted, 0.01 measured)"],
    ),
    "2.9 times too much": (dict(zip(PREDICTION, (0.029, 0.01), strict=True)), []),
    "4 times too little": (
        dict(zip(PREDICTION, (0.005, 0.02), strict=True)),
        ["the quadratic model under-predicted the rise of the task's own loss by 4.0 x "
         "(0.005 predicted, 0.02 measured)"],
    ),
    "nothing predicted": (
        dict(zip(PREDICTION, (0.0, 0.02), strict=True)),
        ["the quadratic model under-predicted the rise of the task's own loss by more than "
         "1,000 x (0 predicted, 0.02 measured)"],
    ),
    "a fall of which too little was predicted": (
        dict(zip(PREDICTION, (-0.01, -0.04), strict=True)),
        ["the quadratic model under-predicted the fall of the task's own loss by 4.0 x "
         "(-0.01 predicted, -0.04 measured)"],
    ),
    "a fall": (
        dict(zip(PREDICTION, (0.02, -0.015), strict=True)),
        ["the task's own loss fell by 0.015 although a rise by 0.02 was predicted"],
    ),
    "a rise": (
        dict(zip(PREDICTION, (-0.02, 0.3), strict=True)),
        ["the task's own loss rose by 0.3 although a fall by 0.02 was predicted"],
    ),
    "far too small to matter": (dict(zip(PREDICTION, (1e-6, 9e-4), strict=True)), []),
    "nothing known of the prediction": (dict(zip(PREDICTION, (None, 2.0), strict=True)), []),
    "nothing known of the loss": (dict(zip(PREDICTION, (2.0, None), strict=True)), []),
    "clipped": (
        {"alpha": 0.0, "alpha_raw": -0.25, "standard_error": 0.1},
        ["the quadratic model's minimum is at -0.25, outside [0, 1], and was clipped to 0.00",
         "the merge, with the coefficient 0.000, kept almost nothing of the new task"],
    ),
    "beyond, without clipping": (
        {"alpha": 1.5, "alpha_raw": 1.5},
        ["the quadratic model's minimum is at 1.50, outside [0, 1], and was used as it is",
         "the merge, with the coefficient 1.500, kept almost nothing of the earlier tasks' model"],
    ),
    "just within": ({"alpha": 0.02, "alpha_raw": 0.02}, []),
    "just below": (
        {"alpha": 0.019, "alpha_raw": 0.019},
        ["the merge, with the coefficient 0.019, kept almost nothing of the new task"],
    ),
    "a coefficient that is only set": ({"alpha": 1.0, "alpha_raw": 1.0, "numerator": None}, []),
    "no minimum": (
        {"alpha": 1 / 3, "alpha_raw": 1 / 3, "degenerate": 1.0, "standard_error": None},
        ["the curvature gave no minimum along the task vector; the coefficient 0.33 was used for "
         "want of one"],
    ),
    "uncertain": (
        {"standard_error": 0.26},
        ["the coefficient 0.50 is uncertain: its standard error 0.26 is more than half of it"],
    ),
    "certain": ({"standard_error": 0.24}, []),
    "regret": (
        {"alpha": 0.1, "most_accurate_alpha": 0.35, "regret_accuracy": 0.023},
        ["a coefficient of 0.35 instead of 0.10 would have been 2.3 points better on validation "
         "data"],
    ),
    "little regret": ({"most_accurate_alpha": 0.35, "regret_accuracy": 0.0099}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings(case):
    own, texts = WARNINGS[case]
    sound = {"alpha": 0.5, "alpha_raw": 0.5, "numerator": 1.0, "degenerate": 0.0}
    first = {**sound, **own}  # of which nothing is said
    found = trust.warnings_of({"merges": [first, sound, {**sound, **own}]})
    assert found == [f"task 3: {text}" for text in texts]


def test_warnings_and_figures_of_two_seeds_are_in_the_page(full):
    runs = [json.loads((full / f"seed_{seed}/results.json").read_text()) for seed in (0, 1)]
    page = Page(full / "report.html")
    expected = [
        f"seed {seed}, {text}"
        for seed, run in enumerate(runs)
        for text in trust.warnings_of(run)
    ]  # fmt: skip
    assert all(text in html.unescape(page.text) for text in expected)
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
    assert page.row("train, seconds")[1].startswith(f"{np.mean(seconds):.1f}\u00a0±\u00a0")
    names = [image["alt"].split(".")[0] for image in page.images]
    assert names == [
        *("Accuracy on the tasks seen", "Accuracy matrix", "Training loss", "Merge coefficients"),
        "Predicted against actual loss change",
        *("Loss along the merges", "Accuracy along the merges", "Around the last merge"),
    ]


def test_nothing_but_the_file_is_needed_and_it_is_the_same_again(full):
    page, content = Page(full / "report.html"), (full / "report.html").read_bytes()
    for image in page.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64" and b"</svg>" in base64.b64decode(data)
    assert not page.tags & {"script", "link", "iframe", "a"}
    assert not re.search(rb"url\(|@import|https?:", content)
    assert b'name="viewport"' in content
    report.write_report(full)
    assert (full / "report.html").read_bytes() == content
    assert not list(full.glob("*.tmp"))


def test_one_seed_without_a_landscape_says_how_to_have_one(plain):
    page = Page(report.write_report(plain))
    assert len(page.images) == 5 and "--landscape_points=21" in page.text
    assert "seed 3: no spread is known." in page.text
    result = json.loads((plain / "seed_3/results.json").read_text())
    value = f"{100 * result['final_average_accuracy']:.1f}"
    assert page.row("final average accuracy, over") == [page.row("final")[0], value]
    (plain / "seed_3/metrics.jsonl").unlink()
    page = Page(report.write_report(plain))
    assert len(page.images) == 4 and "The training loss is not shown" in page.text
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
    assert len(page.images) == 3 and page.row("after\u00a0task\u00a03")[1:] == [
        "50.0",
        "75.0",
        "100.0",
    ]
    assert page.row("after\u00a0task\u00a01")[1:] == ["-"] * 3
    assert page.row("final average accuracy among the classes of the task")[1:] == ["87.5"]
    assert not any(row[0].startswith("forgetting") for row in page.rows)
    assert "None: nothing about the merges is conspicuous." in page.text


def test_several_classifiers_have_a_row_each_on_both_splits(plain):
    path = plain / "seed_3/results.json"
    content = json.loads(path.read_text())
    part = content["scores"]["trained"]
    other = {split: {**part[split], "final_average_accuracy": 0.125} for split in part}
    edited(path, scores={"trained": part, "ridge": other}, classifiers=["trained", "ridge"])
    page = Page(report.write_report(plain, "validation"))
    value = f"{100 * part['validation']['final_average_accuracy']:.1f}"
    assert page.row("percent, validation split, trained")[1:] == ["perturb_and_merge"]
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
    assert [text.get_text() for text in texts] == ["50.0", "30.0", "50.0"]


def test_a_landscape_shows_new_and_earlier_tasks_apart():
    alphas = np.asarray([-0.5, 0.0, 1.0])
    values, merged = np.full((3, 3, 3), np.nan), np.full((3, 3), np.nan)
    values[2] = [[9, 9, 9], [1, 2, 6], [3, 4, 2]]
    values[1, :, :2], merged[1, :2], merged[2] = 1.0, 1.0, [1, 2, 3]
    used, best = np.asarray([1, 0.5, 0.25]), np.asarray([np.nan, 0.5, 1.0])
    first, second, *_ = figures.landscape(alphas, values, merged, used, best).axes
    new, earlier, both, vertical, dot = second.lines
    assert (first.get_title(), second.get_title()) == ("task 2", "task 3")
    assert new.get_ydata().tolist() == [9, 6, 2] and earlier.get_ydata().tolist() == [9, 1.5, 3.5]
    assert both.get_ydata().tolist() == [9, 3, 3] and vertical.get_xdata()[0] == 1.0
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.25, 2.0)
    assert second.get_ylim()[1] < 9  # what is outside [0, 1] does not squeeze what is inside


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


MEASURE = """<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentDocument: report}) => ({
    sizes: [...report.images].map(x => [x.complete, x.naturalWidth, x.width, x.height]),
    inner: report.documentElement.clientWidth, whole: report.documentElement.scrollWidth
  }));
  document.body.textContent = JSON.stringify(found);
});
</script>"""


def test_a_browser_shows_every_figure_and_its_console_is_silent(full, tmp_path):
    """In frames as wide as a phone and as a desk's screen: windows have a least width."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    content = (full / "report.html").read_text()
    frames = "".join(
        f'<iframe style="border: 0; width: {width}px" srcdoc="{html.escape(content)}"></iframe>'
        for width in (390, 1200)
    )
    page = tmp_path / "page.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8">{MEASURE}<body>{frames}</body>')
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
               "--dump-dom", page.as_uri()]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "CONSOLE" not in ended.stderr, ended.stderr
    phone, desk = json.loads(re.search(r"<body>(.*)</body>", ended.stdout, re.DOTALL)[1])
    for found, width in ((phone, 390), (desk, 1200)):
        assert len(found["sizes"]) == content.count("<img") == 8
        for complete, natural, wide, high in found["sizes"]:
            assert complete and natural > 0 and 300 < wide < width and high > 150
        assert found["whole"] <= found["inner"] <= width  # nothing to scroll sideways
    assert phone["inner"] > 370  # less a scroll bar
