import dataclasses
import json
import pathlib
import re
import shutil

import jax.numpy as jnp
import pytest

from pm_jax.continual import Learner, RunOptions, TrainingDiverged
from pm_jax.continual import learner as learner_module
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.checkpoints import Checkpoints
from pm_jax.continual.storage.logs import RunLog
from pm_jax.types import InvalidInput
from tests.small_runs import (
    QUIET,
    SMALL,
    VIT,
    Killed,
    comparable,
    forget_programs,
    leaves_equal,
    with_functions,
)

AUGMENTED = dataclasses.replace(SMALL, accumulation_steps=3, augmentation="crop_flip")


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, VIT, AUGMENTED], ids=["full", "lora", "augmented"])
def test_a_run_killed_within_and_between_tasks_ends_with_the_same_numbers(
    config, tmp_path, monkeypatch
):
    forget_programs()
    straight = Learner(
        config, 0, tmp_path / "straight", RunOptions(checkpoint_every=11, quiet=True)
    )
    wanted = straight.run()
    assert straight.programs.training.later.train._cache_size() == 1
    saves = learner_module.Checkpoints.save
    survived = []

    def dying_save(self, step, tree):
        saves(self, step, tree)
        if step not in survived:
            survived.append(step)
            raise Killed

    monkeypatch.setattr(learner_module.Checkpoints, "save", dying_save)
    for _ in range(200):
        learner = Learner(
            config, 0, tmp_path / "killed", RunOptions(checkpoint_every=11, quiet=True)
        )
        try:
            results = learner.run()
            break
        except Killed:
            continue
    bounds = set(straight.steps.bounds)
    assert any(step in bounds for step in survived)
    assert any(step not in bounds for step in survived)
    assert comparable(results) == comparable(wanted)
    assert leaves_equal(learner.params, straight.params)
    for name in ("metrics.jsonl", "metrics.csv"):
        counts = [
            len((tmp_path / run / name).read_text().splitlines()) for run in ("straight", "killed")
        ]
        assert counts[0] == counts[1]
    steps = [
        [
            json.loads(line)["step"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("straight", "killed")
    ]
    assert steps[0] == steps[1]


EVERY = 20


def learner_of(directory):
    return Learner(SMALL, 0, directory, RunOptions(checkpoint_every=EVERY))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The results and parameters of a run, and the directory that it leaves, two steps in it."""
    directory = tmp_path_factory.mktemp("straight") / "seed_0"
    learner = learner_of(directory)
    return learner.run(), learner.params, directory


@pytest.fixture
def left(straight, tmp_path):
    """The folder of checkpoints in a copy of what the run left, and its steps in their order."""
    copied = pathlib.Path(shutil.copytree(straight[2], tmp_path / "seed_0")) / "checkpoints"
    return copied, sorted(int(path.name) for path in copied.iterdir() if path.is_dir())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def goes_on(checkpoints, straight, capsys):
    """Run again, see that the end is the same; returns the lines printed."""
    learner = learner_of(checkpoints.parent)
    capsys.readouterr()
    found = learner.run()
    assert comparable(found) == comparable(straight[0])
    assert leaves_equal(learner.params, straight[1])
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "name,damage",
    [
        ("_CHECKPOINT_METADATA", flip),  # what Orbax would not notice
        ("default/_METADATA", pathlib.Path.unlink),
        ("default/d/*", cut_short),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    name, damage, left, straight, capsys
):
    checkpoints, (before, newest) = left
    (path,) = (checkpoints / str(newest)).glob(name)
    damage(path)
    content = manifest.checksums(checkpoints / str(newest), "")
    warning, told, *_ = goes_on(checkpoints, straight, capsys)
    relative = path.relative_to(checkpoints).as_posix()
    assert re.search(
        rf"seed 0: warning: checkpoint {newest} is damaged \({relative} (has|is) .*\); "
        rf"kept as damaged_{newest}, going on from step {before}$",
        warning,
    )
    assert told.endswith(f"going on from step {before} of {newest}")
    assert manifest.checksums(checkpoints / f"damaged_{newest}", "") == content
    assert manifest.damage(checkpoints, manifest.read(checkpoints).files) == []
    assert {path.name for path in checkpoints.iterdir()} == {
        *(str(before), str(newest), f"damaged_{newest}", manifest.FILE)
    }


def test_where_all_checkpoints_are_damaged_the_run_begins_again(left, straight, capsys):
    checkpoints, (before, newest) = left
    for step in (before, newest):
        flip(checkpoints / str(step) / "default/manifest.ocdbt")
    (checkpoints / f"damaged_{newest}").mkdir()
    first, second, *others = goes_on(checkpoints, straight, capsys)
    assert f"kept as damaged_{newest}_2, going on from step {before}" in first
    assert f"checkpoint {before} is damaged" in second
    assert second.endswith(f"kept as damaged_{before}, going on from the beginning")
    assert not any("going on" in line for line in others)


def test_a_checkpoint_without_checksums_is_used_if_it_can_be_read(left, straight, capsys):
    checkpoints, (before, newest) = left
    manifest.uncover(checkpoints, str(newest))
    (told, *_) = goes_on(checkpoints, straight, capsys)
    assert told.endswith(f"going on from step {newest} of {newest}")
    assert manifest.read(checkpoints).within(str(newest))
    (checkpoints / manifest.FILE).unlink()
    (data,) = (checkpoints / str(newest) / "default/d").iterdir()
    cut_short(data)
    warning, *_ = goes_on(checkpoints, straight, capsys)
    assert f"checkpoint {newest} is damaged (ValueError); kept as" in warning


def test_a_whole_checkpoint_that_does_not_fit_is_refused_and_stays(left):
    """A checkpoint of another version of the program, whose state has another form."""
    checkpoints, (_, newest) = left
    before = manifest.checksums(checkpoints, "")
    message = (
        f"checkpoint {newest} cannot be read .*: another version of pm_jax saved it, whose state "
        "has another form; use another workdir, or go on with that version"
    )
    with Checkpoints(checkpoints) as opened, pytest.raises(InvalidInput, match=message):
        opened.newest(lambda step: opened.restore(step, {"more": jnp.zeros(3)}))
    assert manifest.checksums(checkpoints, "") == before


def test_a_finished_run_does_not_give_away_a_damaged_model(left):
    checkpoints, (before, newest) = left
    flip(checkpoints / str(newest) / "_CHECKPOINT_METADATA")
    message = rf"checkpoint {newest} cannot be read \({newest}/_CHECKPOINT_METADATA has"
    with pytest.raises(InvalidInput, match=message):
        learner_of(checkpoints.parent).finished_params()
    assert (checkpoints / str(newest)).exists()


def test_damaged_metrics_are_told_of_and_what_can_be_read_of_them_is_kept(left, straight, capsys):
    checkpoints, (_, newest) = left
    metrics = checkpoints.parent / "metrics.jsonl"
    content = metrics.read_bytes()
    last = content.rindex(b"step")
    for damaged in (content[:-1], content[:last] + b"stop" + content[last + 4 :]):
        metrics.write_bytes(damaged)
        warning, _ = goes_on(checkpoints, straight, capsys)
        assert "warning: metrics.jsonl has " in warning and "kept" in warning
        assert content.startswith(metrics.read_bytes())
    assert metrics.read_bytes().count(b"\n") == content.count(b"\n") - 1
    assert manifest.damage(checkpoints.parent, manifest.read(checkpoints.parent).files) == []


def test_what_a_kill_has_left_of_a_save_is_gone_when_the_run_goes_on(left, straight, capsys):
    checkpoints, (before, newest) = left
    shutil.copytree(checkpoints / str(before), checkpoints / f"{before + 1}.orbax-checkpoint-tmp")
    (told,) = goes_on(checkpoints, straight, capsys)
    assert told.endswith(f"going on from step {newest} of {newest}")
    assert {path.name for path in checkpoints.iterdir()} == {
        *(str(before), str(newest), manifest.FILE)
    }


def test_the_files_of_tensorboard_are_covered_when_the_run_rests(tmp_path):
    pytest.importorskip("tensorboardX")
    earlier = "events.out.tfevents.0.host"  # of the process that was stopped
    (tmp_path / earlier).write_text("")
    manifest.cover(tmp_path, earlier, "metrics.jsonl")
    log = RunLog(tmp_path, "seed 0", total_steps=1, quiet=True, tensorboard=True)
    log.write("epoch", step=1, task=1, loss=0.5)
    assert list(manifest.read(tmp_path).files) == [earlier]
    log.close()
    files = manifest.read(tmp_path).files
    assert set(files) == {path.name for path in tmp_path.iterdir()} - {manifest.FILE}
    assert manifest.damage(tmp_path, files) == [] and len(files) == 4


def test_the_manifest_of_checkpoints_speaks_of_those_that_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.ones(2)})
        shutil.rmtree(tmp_path / "3")  # by hand, as the message says
    (tmp_path / "1").mkdir()
    (tmp_path / "1").rename(tmp_path / "deleted_1")  # killed as it was to be deleted
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"w": jnp.ones(2)})
    files = manifest.read(tmp_path).files
    assert {name.split("/")[0] for name in files} == {"2", "4"} and len(files) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4", manifest.FILE}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    learner = Learner(SMALL, 0, tmp_path, QUIET)
    train = learner.programs.training.later.train

    def poisoned(*arguments):
        *state, values = train(*arguments)
        return *state, values.at[2].set(jnp.nan) if arguments[-1].task == 1 else values

    learner = with_functions(learner, train=poisoned)
    with pytest.raises(TrainingDiverged, match="task 2, step 3: the loss is nan"):
        learner.run()
    kept = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == [learner.steps.bounds[1]]


def test_a_real_divergence_is_caught():
    config = dataclasses.replace(SMALL, optimizer="sgd", learning_rate=1e18)
    with pytest.raises(TrainingDiverged, match="task 1, step"):
        Learner(config, 0, options=QUIET).run()
