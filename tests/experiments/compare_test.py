"""`experiments.compare`, in-process."""

import contextlib
import csv
import importlib.util
import json
import re
import sys

import pytest
from absl import flags

from experiments import flags as experiment_flags
from pm_jax import rules
from pm_jax.continual import learner as learner_module
from pm_jax.continual import rule_comparison, run
from pm_jax.continual.rule_comparison import configurations
from tests.binaries import call, refused

TINY = ["--num_tasks=3", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8"]


@pytest.fixture
def learners(monkeypatch):
    """Rule and seed of every learner that is made."""
    made = []
    original = learner_module.Learner.__init__

    def counted(self, config, seed, *arguments, **named):
        made.append((config.rule, config.curvature, seed))
        original(self, config, seed, *arguments, **named)

    monkeypatch.setattr(learner_module.Learner, "__init__", counted)
    return made


def test_two_rules_with_two_seeds_then_a_restart_that_runs_nothing(
    tmp_path, capsys, learners, monkeypatch
):
    pytest.importorskip("matplotlib")
    shown: list[str] = []

    def waiting(text, quiet):
        shown.append(text)
        return contextlib.nullcontext()

    monkeypatch.setattr(run, "waiting", waiting)
    arguments = [f"--workdir={tmp_path}", "--seeds=0,1", *TINY]
    named = "--rules=sequential,averaging+curvature=identity"
    call("compare", *arguments, named)
    assert learners == [
        (rule, curvature, seed)
        for rule, curvature in (("sequential", "fisher_exact"), ("averaging", "identity"))
        for seed in (0, 1)
    ]
    assert shown[0] == "reading data, compiling; run 1 of 4, sequential, seed 0"
    assert shown[3].endswith("; run 4 of 4, averaging+curvature=identity, seed 1")
    output = capsys.readouterr().out
    table = output.splitlines()[:3]
    assert table[0].startswith("rule ") and "to the best" in table[0]
    assert {line.split()[0] for line in table[1:]} == {
        "sequential",
        "averaging+curvature=identity",
    }
    assert re.search(r"0\.0 \+- 0\.0", table[1]) and re.search(r"-\d+\.\d \+- \d", table[2])
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["seeds"] == [0, 1]
    for record in content["rules"]:
        runs = [json.loads((tmp_path / record["rule"] / f"seed_{seed}/results.json").read_text())
                for seed in (0, 1)]  # fmt: skip
        accuracies = [found["final_average_accuracy"] for found in runs]
        assert record["over_seeds"]["final_average_accuracy"] == accuracies
        assert record["final_average_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
        assert record["rule_state_bytes"] == 4  # both only count
    names = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["rule"] for row in names] == [record["rule"] for record in content["rules"]]
    assert (tmp_path / "comparison.tex").read_text().count(r"\\") == 3
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert "<h1>2 merge rules on digits</h1>" in (tmp_path / "report.html").read_text()

    learners.clear()
    call("compare", *arguments, named)
    assert learners == []
    # Those that print the table again say what is finished first.
    assert capsys.readouterr().out.endswith(output)
    (tmp_path / "sequential" / "seed_1" / "results.json").unlink()
    call("compare", *arguments, named)
    assert learners == [("sequential", "fisher_exact", 1)]
    assert json.loads((tmp_path / "comparison.json").read_text())["rules"][0]["rank"] >= 1


def test_rules_have_settings_of_their_own_and_all_is_each_once():
    flags.FLAGS.unparse_flags()
    experiment_flags.parse(["compare", "--epochs=2"])
    base = experiment_flags.config_from_flags()
    label = "perturb_and_merge+clip=false+epochs=4+probabilities=1/2:1/4:1/4"
    found = configurations(base, ["all", "sequential", label], (), experiment_flags.parse_setting)
    assert list(found)[:-1] == list(rules.REGISTRY)
    assert all(config.rule == label for label, config in list(found.items())[:-1])
    own = found[label]
    assert (own.rule, own.rule_settings, own.epochs) == ("perturb_and_merge", "clip=false", 4)
    assert own.perturbation == "symmetric" and found["trm"].perturbation == "none"
    assert own.probabilities == (0.5, 0.25, 0.25)
    assert found["averaging"].epochs == 2 and found["averaging"].rule_settings == ""


def test_a_list_of_curvatures_is_a_run_of_each_for_the_rules_that_take_one(capsys, learners):
    own = "perturb_and_merge+curvature=low_rank"
    # regmean takes one kind, which it has in any case.
    named = f"--rules=sequential,regmean,perturb_and_merge+per=block,fisher_averaging,{own}"
    call("compare", "--dry_run", named, "--curvature=identity,fisher_empirical", *TINY)
    lines = capsys.readouterr().out.splitlines()
    assert "  curvature=identity (default fisher_exact)" in lines
    *_, first, moments, blocks, empirical_blocks, fisher, empirical_fisher, alone, _ = lines
    assert first == "sequential: perturbation=none, rule=sequential"
    assert moments == "regmean: perturbation=none, rule=regmean"
    assert blocks == "perturb_and_merge+per=block+curvature=identity: rule_settings=per=block"
    assert empirical_blocks.endswith("rule_settings=per=block, curvature=fisher_empirical")
    assert fisher.startswith("fisher_averaging+curvature=identity: perturbation=none, rule=fish")
    assert empirical_fisher.startswith("fisher_averaging+curvature=fisher_empirical: ")
    assert alone == f"{own}: curvature=low_rank"
    assert not learners


def test_a_dry_run_says_what_would_run_and_trains_nothing(capsys, learners):
    call("compare", "--dry_run", "--rules=perturb_and_merge,ties+keep=0.1", *TINY)
    *_, first, second, duration = capsys.readouterr().out.splitlines()
    assert duration.startswith("duration: it is not known before something has run")
    assert first == "perturb_and_merge: as above"
    assert second == "ties+keep=0.1: perturbation=none, rule=ties, rule_settings=keep=0.1"
    assert not learners


def test_without_matplotlib_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    call("compare", f"--workdir={tmp_path}", "--rules=sequential", *TINY)
    assert (
        "plots, report: skipped, matplotlib is not installed; pip install"
        in capsys.readouterr().out
    )
    assert (tmp_path / "comparison.csv").exists() and not list(tmp_path.glob("*[pngreport].*l"))


def test_a_comparison_of_other_settings_or_beside_something_else_is_refused(
    tmp_path, capsys, learners
):
    compared = [f"--workdir={tmp_path}", *TINY]
    call("compare", *compared, "--rules=averaging")
    learners.clear()
    line = refused(capsys, "compare", *compared, "--rules=averaging,sequential", "--epochs=2")
    assert "holds a run with epochs=1, not 2" in line
    thesis = tmp_path / "sequential"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    assert f"{thesis}: is not empty" in refused(capsys, "compare", *compared, "--rules=sequential")
    assert not learners


BY_CLASS = ["--scenario=class_incremental", "--num_tasks=2", *TINY[1:]]


@pytest.mark.slow
def test_classifiers_are_columns_of_one_training_and_both_splits_are_measured(
    tmp_path, capsys, learners
):
    arguments = [f"--workdir={tmp_path}", *BY_CLASS]
    arguments += ["--rules=sequential+classifiers=nearest_mean,sequential,averaging"]
    call("compare", *arguments, "--classifiers=trained,discriminant")
    assert [rule for rule, *_ in learners] == ["sequential", "averaging"]
    names = ["trained", "discriminant", "nearest_mean"]
    output = capsys.readouterr().out
    heading = "final accuracy, test: trained  final, discriminant  final, nearest_mean"
    assert heading in output and "on test data; AAA and what follows are with the" in output

    def check(content, split):
        assert (content["evaluate_on"], content["classifiers"]) == (split, names)
        for record in content["rules"]:
            run = json.loads((tmp_path / record["rule"] / "seed_0/results.json").read_text())
            scores = {name: run["scores"][name][split] for name in names}
            for name in names:
                found = record["over_seeds"][f"final_average_accuracy_{name}"]
                assert found == [scores[name]["final_average_accuracy"]]
            for figure in ("final_average_accuracy", "forgetting"):
                assert record["over_seeds"][figure] == [scores["trained"][figure]]

    test_table = (tmp_path / "comparison.json").read_text()
    check(json.loads(test_table), "test")
    learners.clear()
    call("compare", *arguments, "--classifiers=trained,discriminant", "--evaluate_on=validation")
    assert learners == [] and (tmp_path / "comparison.json").read_text() == test_table
    check(json.loads((tmp_path / "comparison_validation.json").read_text()), "validation")
    assert "final accuracy, validation: trained" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert len(list(tmp_path.glob("*_validation.png"))) == 5
        for split, name in (("test", "report"), ("validation", "report_validation")):
            page = (tmp_path / f"{name}.html").read_text()
            assert f"Accuracies in percent on {split} data" in page
            assert all(f"<th>final, {other.replace('_', '_<wbr>')}" in page for other in names[1:])
    assert call("inspect", tmp_path) == 0


def test_labels_that_differ_in_classifiers_only_are_one_rule_with_all_of_them():
    flags.FLAGS.unparse_flags()
    experiment_flags.parse(["compare", "--scenario=class_incremental", "--classifiers=trained"])
    base = experiment_flags.config_from_flags()
    ridge = "sequential+classifiers=ridge:features=50:discriminant:drift_correction=affine"
    labels = [ridge, "ties+keep=0.1", "sequential+epochs=9+classifiers=nearest_mean", "sequential"]
    labels += ["averaging+classifiers=discriminant:aligned+drift_correction=affine"]
    found = configurations(base, labels, (), experiment_flags.parse_setting)
    assert list(found) == ["sequential", "ties+keep=0.1", "sequential+epochs=9", "averaging"]
    corrected = "discriminant:drift_correction=affine"
    wanted = ("trained", "ridge:features=50", corrected, "nearest_mean")
    wanted += ("aligned:drift_correction=affine",)
    assert {config.classifiers for config in found.values()} == {wanted}
    assert {config.drift_correction for config in found.values()} == {"none"}
    assert [found[label].epochs for label in found] == [3, 3, 9, 3]


@pytest.mark.slow
def test_shared_training_is_deleted_when_all_rules_are_finished_or_kept(tmp_path, capsys, learners):
    shared = tmp_path / "shared_training"
    kept = [f"--workdir={tmp_path}", "--rules=sequential,magmax", *TINY, "--keep_shared_training"]
    call("compare", *kept)
    assert len(list(shared.glob("*/seed_0/task_*.safetensors"))) == 3
    learners.clear()
    call("compare", *kept[:-1])
    assert learners == [] and not shared.exists()
    assert not list(tmp_path.glob("shared_training*")) and call("inspect", tmp_path) == 0
    call("compare", *kept[:-1])
    assert learners == []


def test_a_comparison_that_is_not_finished_keeps_what_rules_share(tmp_path, monkeypatch, learners):
    def interrupted(config, *_):
        if config.rule == "magmax":
            raise KeyboardInterrupt
        return run_seeds(config, *_)

    run_seeds = rule_comparison.run_seeds
    monkeypatch.setattr(rule_comparison, "run_seeds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("compare", f"--workdir={tmp_path}", "--rules=sequential,magmax", *TINY)
    assert list(tmp_path.glob("shared_training/*/seed_0/task_3.safetensors"))


@pytest.mark.slow
def test_a_sentence_says_whether_adapting_pays(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", *BY_CLASS, "--classifiers=discriminant"]
    call("compare", *arguments, "--rules=averaging")
    assert "adapting pays is not known: compare frozen with a rule" in capsys.readouterr().out
    call("compare", *arguments, "--rules=frozen,first_session,averaging,joint,sequential")
    found = json.loads((tmp_path / "comparison.json").read_text())["adapting"]
    assert found["sentence"] in capsys.readouterr().out.splitlines()
    assert (found["rules"], found["classifier"], found["split"]) == (2, "discriminant", "test")

    def run(rule):
        return json.loads((tmp_path / rule / "seed_0/results.json").read_text())

    adapted = max(run(rule)["final_average_accuracy"] for rule in ("averaging", "sequential"))
    frozen = run("frozen")["final_average_accuracy"]
    assert found["difference"] == pytest.approx(adapted - frozen)
    assert found["pays"] is (None if 0 < adapted - frozen <= 2 * found["error"]
                             else adapted > frozen)  # fmt: skip
    variances = []
    for rule in ("frozen", found["rule"]):
        sizes = [task["test"]["examples"] for task in run(rule)["manifest"]["tasks"]]
        last = run(rule)["accuracy_matrix"][-1]
        variances += [p * (1 - p) / n / 4 for p, n in zip(last, sizes, strict=True)]
    assert found["error"] == pytest.approx(sum(variances) ** 0.5)
