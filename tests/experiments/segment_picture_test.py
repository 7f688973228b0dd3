"""The picture of a merge's segment: what it says of a run, on light and on dark pages."""

import pathlib
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from absl import flags

from experiments.studies import segment_picture

STORED = pathlib.Path(segment_picture.__file__).parents[1] / "segment.svg"


def words(svg):
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [part.text for part in texts]


def test_coefficients_and_tasks_are_named_and_all_colours_are_variables():
    pytest.importorskip("matplotlib")
    alphas = np.linspace(-0.25, 1.25, 31)
    old, new = (alphas - 0.1) ** 2, 2 * (alphas - 1.2) ** 2
    svg = segment_picture.picture(alphas, np.stack([old, old, new], axis=1), 0.4, 0.3)
    # (2 old + new) / 3 is least at (0.1 + 1.2) / 2.
    assert {"best, with all data: 0.65", "closed form, without old data: 0.40"} <= {*words(svg)}
    assert {"old: tasks 1 to 2", "new: task 3", "previous model", "trained model"} <= {*words(svg)}
    style, drawn = svg.split("</style>")
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) == set()
    for name, colors in segment_picture.COLORS.items():
        assert [f"--{name}: {color}" in style for color in colors] == [True, True]
        assert f"var(--{name})" in drawn


def test_the_stored_picture_is_a_small_one_of_this_script():
    svg = STORED.read_text()
    assert len(svg) < 60_000 and "@media (prefers-color-scheme: dark)" in svg
    assert any(word.startswith("closed form, without old data: ") for word in words(svg))


@pytest.mark.parametrize("typed,answer", [
    ("--output=x.svg", "--workdir=: needs a path, as --workdir=runs/segment"),
    ("--workdir=x", "--output=: needs a path, as --output=segment.svg"),
    ("--workdir={} --output=x.svg", "--workdir={}: has no seed_0 that is finished"),
])  # fmt: skip
def test_mistakes_are_one_line(typed, answer, tmp_path, capsys):
    values = flags.FlagValues()
    segment_picture.define_flags(values)
    with pytest.raises(SystemExit) as ended:
        values(["segment_picture", *typed.format(tmp_path).split()])
        segment_picture.main([], values)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {answer.format(tmp_path)}")
