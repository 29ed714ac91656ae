"""Which checkpoints stay: the newest, the milestones, the best, and never fewer whole ones than before a newer is whole."""

import json
import os
import shutil
from typing import Any

import pytest
from little_run import resumed, trainers
from test_checkpoint_damage import cut, engine, save_steps
from typer.testing import CliRunner

from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint import folder as folders
from tubelet.engine.checkpoint import verifying
from tubelet.engine.checkpoint.folder import prunable, read_best, set_rolled_back, write_best
from tubelet.engine.checkpoint.kept import kept_checkpoints
from tubelet.engine.ckpt_cli import app
from tubelet.engine.settings import EngineSettings
from tubelet.errors import CheckpointError, SupersededError


@pytest.fixture
def run(tmp_path, one_thread):
    """Steps 1 to 8, and a process that knows none of them."""
    save_steps(tmp_path / "run", World(), *range(1, 9))
    verifying._known_whole.clear()
    return tmp_path / "run"


def steps(folders):
    return [int(folder.name.rpartition("-")[2]) for folder in folders]


def left(run):
    return steps(checkpoint.published(run))


def damage(run, step):
    cut(run / f"step-{step:08d}" / "rank-00000.safetensors")


def test_newest_milestones_and_protected_ones_are_kept(run):
    assert steps(prunable(run, keep_last=2)) == [1, 2, 3, 4, 5, 6]
    assert steps(prunable(run, keep_last=2, keep_every=3)) == [1, 2, 4, 5]
    assert steps(prunable(run, keep_last=2, keep_every=2)) == [1, 3, 5]
    assert steps(prunable(run, keep_last=2, keep_every=2, keep_milestones=2)) == [1, 2, 3, 4, 5]
    assert steps(prunable(run, keep_last=1, keep_every=2, keep_milestones=3)) == [1, 2, 3, 5, 7]
    assert steps(prunable(run, keep_last=1, keep_every=2, keep_milestones=99)) == [1, 3, 5, 7]
    assert steps(prunable(run, keep_last=2, protect=[run / "step-00000001", run / "step-00000004"])) == [2, 3, 5, 6]
    assert steps(prunable(run, keep_last=100)) == []
    assert steps(checkpoint.prune(run, keep_last=1, keep_every=4, keep_milestones=1)) == [1, 2, 3, 4, 5, 6, 7]
    assert left(run) == [8]


def test_nothing_whole_goes_before_its_successor_is_whole(run):
    damage(run, 8)
    assert steps(checkpoint.prune(run, keep_last=1)) == [1, 2, 3, 4, 5, 6]
    assert left(run) == [7, 8], "the damaged one is for people to look at"


def test_a_damaged_milestone_takes_no_whole_ones_place(run):
    damage(run, 6)
    assert steps(prunable(run, keep_last=1, keep_every=3, keep_milestones=1)) == [1, 2, 4, 5, 7]
    damage(run, 3)
    assert steps(prunable(run, keep_last=1, keep_every=2, keep_milestones=2)) == [1, 2, 3, 5, 7]


def leftover(run, step, seconds):
    """A save that was killed, whose files changed last so many seconds after step 8 was published."""
    folder = run / f"step-{step:08d}"
    folder.mkdir()
    (folder / "rank-00000.safetensors").write_bytes(b"half")
    moment = (run / "step-00000008" / "manifest.json").stat().st_mtime + seconds
    for path in (folder / "rank-00000.safetensors", folder):
        os.utime(path, (moment, moment))


def test_what_a_killed_start_left_above_the_newest_goes_once_another_has_published(run):
    leftover(run, 30, -60)
    leftover(run, 31, 5)  # a job that does not know yet that it was superseded may still write there
    assert 30 not in steps(prunable(run, keep_last=100)), "somebody else may be writing it"
    assert steps(prunable(run, keep_last=100, idle=True)) == [30]
    assert steps(checkpoint.prune(run, keep_last=2, idle=True)) == [1, 2, 3, 4, 5, 6, 30]
    assert not (run / "step-00000030").exists() and (run / "step-00000031").exists() and left(run) == [7, 8]


def test_a_leftover_stays_while_nothing_verifies(run):
    leftover(run, 30, -60)
    for step in range(1, 9):
        damage(run, step)
    assert checkpoint.prune(run, keep_last=1, idle=True) == []


def test_a_run_that_went_on_past_a_killed_save_leaves_none_of_it(tmp_path, one_thread):
    folder = tmp_path / "r"
    with trainers(tmp_path, name="r") as make:
        make(total_steps=2).fit()
        (folder / "step-00000099").mkdir()  # as the start before this one would have left it, under a longer schedule
        (folder / "step-00000099" / "rank-00000.safetensors").write_bytes(b"half")
        make(beginning=resumed(folder), total_steps=4).fit()
    assert left(folder) == [2, 4] and not (folder / "step-00000099").exists()


def test_with_no_whole_checkpoint_nothing_goes(run):
    for step in range(1, 9):
        damage(run, step)
    assert checkpoint.prune(run, keep_last=1, keep_every=2, keep_milestones=1) == []


def test_the_best_one_stays_until_another_is_recorded_and_whole(run):
    write_best(run, run / "step-00000003", "val/acc1", 71.25)
    assert read_best(run) == {"folder": "step-00000003", "step": 3, "metric": "val/acc1", "value": 71.25}
    assert steps(checkpoint.prune(run, keep_last=2)) == [1, 2, 4, 5, 6]
    damage(run, 8)
    with pytest.raises(CheckpointError, match="step-00000008 is not a whole checkpoint"):
        write_best(run, run / "step-00000008", "val/acc1", 99.0)
    for wrong in (run, run / "step-00000099"):
        with pytest.raises(CheckpointError):
            write_best(run, wrong, "val/acc1", 99.0)
    assert (read_best(run) or {})["step"] == 3
    write_best(run, run / "step-00000007", "val/acc1", 72.0)
    assert steps(checkpoint.prune(run, keep_last=1)) == [3]


def test_a_record_of_the_best_is_a_hint_and_never_believed(run):
    write_best(run, run / "step-00000003", "loss", 0.5)
    good = json.loads((run / "best.json").read_text())
    for wrong in ("", "{", "[]", "null", json.dumps(good | {"step": 4}),
                  json.dumps(good | {"folder": "../run/step-00000003"}),
                  json.dumps(good | {"folder": "step-00000033", "step": 33}), json.dumps(good | {"value": None}),
                  json.dumps(good | {"value": float("nan")}), json.dumps({})):
        (run / "best.json").write_text(wrong)
        assert read_best(run) is None and 3 in steps(prunable(run, keep_last=1)), wrong
    (run / "best.json").write_text(json.dumps(good))
    assert (read_best(run) or {})["value"] == 0.5
    set_rolled_back(run, 2)
    assert read_best(run) is None, "it was rolled back"


def test_one_that_cannot_be_removed_is_said_once_and_stops_nothing(run, monkeypatch, capfd):
    def locked(folder, remove=folders.remove):
        if folder.name == "step-00000002":
            raise PermissionError(1, "Operation not permitted")
        remove(folder)

    monkeypatch.setattr(folders, "remove", locked)
    assert steps(checkpoint.prune(run, keep_last=3)) == [1, 3, 4, 5]
    assert checkpoint.prune(run, keep_last=2) == [run / "step-00000006"] and left(run) == [2, 7, 8]
    told = capfd.readouterr().out
    assert told.count("step-00000002 could not be removed and stays") == 1 and "Operation not permitted" in told


def test_what_is_rolled_back_is_never_resumed_and_goes_when_two_newer_ones_are_whole(run):
    moved = set_rolled_back(run, 5)
    assert [path.name for path in moved] == [f"rolled-back-step-0000000{step}" for step in (6, 7, 8)]
    assert left(run) == [1, 2, 3, 4, 5] and (run / "latest").read_text() == "step-00000005\n"
    assert checkpoint.choose(run) == (run / "step-00000005", []) and checkpoint.verify(moved[0]) == []
    assert set_rolled_back(run, 5) == []
    save_steps(run, World(), 6, 7)
    assert [path.name for path in set_rolled_back(run, 5)] == ["rolled-back-step-00000006-2", "rolled-back-step-00000007-2"]
    save_steps(run, World(), 6, 7)
    assert not [path for path in checkpoint.prune(run, keep_last=2) if path.name.startswith("rolled")]
    save_steps(run, World(), 8)
    away = [path.name for path in checkpoint.prune(run, keep_last=2) if path.name.startswith("rolled")]
    assert sorted(away) == ["rolled-back-step-00000006", "rolled-back-step-00000006-2"]
    save_steps(run, World(), 9, 10)
    checkpoint.prune(run, keep_last=2)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["step-00000009", "step-00000010"]


def test_a_run_that_keeps_one_does_not_keep_what_was_rolled_back_for_ever(run):
    set_rolled_back(run, 7)
    save_steps(run, World(), 9)
    assert "rolled-back-step-00000008" in [path.name for path in checkpoint.prune(run, keep_last=1)]


def test_an_attempt_that_lost_the_run_removes_and_moves_nothing(run):
    def lost():
        raise SupersededError("another attempt owns this run")

    with pytest.raises(SupersededError):
        checkpoint.prune(run, keep_last=1, before_delete=lost)
    with pytest.raises(SupersededError):
        set_rolled_back(run, 2, before_move=lost)
    assert left(run) == list(range(1, 9))


def test_checkpoints_are_read_whole_once_a_process(run, monkeypatch):
    read, hashed = [], verifying.place.sha256
    monkeypatch.setattr(verifying.place, "sha256", lambda path: read.append(path.parent.name) or hashed(path))
    assert len(checkpoint.prune(run, keep_last=2)) == 6 and set(read) == {"step-00000007", "step-00000008"}
    read.clear()
    save_steps(run, World(), 9)
    assert steps(checkpoint.prune(run, keep_last=2)) == [7] and not read, "known ones, and one written here"
    damage(run, 9)  # sizes are looked at all the same
    assert checkpoint.prune(run, keep_last=1) == [] and left(run) == [8, 9]


def flip(run, step):
    """Damage that sizes do not show."""
    path = run / f"step-{step:08d}" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_all_ranks_wait_for_no_more_reading_than_a_removal_needs(run, monkeypatch):
    read, hashed = [], verifying.place.sha256
    monkeypatch.setattr(verifying.place, "sha256", lambda path: read.append(path.parent.name) or hashed(path))
    assert checkpoint.prune(run, keep_last=8) == [] and checkpoint.prune(run, keep_last=4, keep_every=1) == []
    assert not read, "there was nothing to remove"
    flip(run, 8)
    assert steps(prunable(run, keep_last=2, keep_every=2, keep_milestones=3)) == [1, 2, 3, 5]
    assert set(read) == {"step-00000008", "step-00000007", "step-00000006"}, "milestones are not read"
    read.clear()
    assert steps(checkpoint.prune(run, keep_last=2)) == [1, 2, 3, 4, 5] and not read, "the damaged one is known to be that"
    save_steps(run, World(), 8)
    assert steps(checkpoint.prune(run, keep_last=2)) == [6] and left(run) == [7, 8], "until it is written again"


def test_the_number_of_checkpoints_on_the_disk_is_known_before_a_run(tmp_path, one_thread):
    """Against the pruning of a run that saves every 2 steps; milestones among the newest are counted twice."""
    def engine_settings(**more):
        return EngineSettings.model_validate({"global_batch_size": 4, "save_every": 2, **more,
                                              "optimizer": {"name": "adamw", "lr": 1e-3}})

    rules: list[Any] = [{"keep_last": 2}, {"keep_last": 2, "keep_every": 4}, {"keep_last": 1, "keep_every": 3},
                        {"keep_last": 1, "keep_every": 2, "keep_milestones": 3}]
    made = tmp_path / "made"
    save_steps(made, World(), *range(2, 21, 2))
    for number, rule in enumerate(rules):
        most, run = 0, tmp_path / str(number)
        run.mkdir()
        for folder in sorted(made.glob("step-*")):
            shutil.copytree(folder, run / folder.name)
            most = max(most, len(left(run)))
            checkpoint.prune(run, **rule)
        twice = sum(step % rule.get("keep_every", 99) == 0 for step in left(run)[-rule["keep_last"] - 1:])
        assert most <= kept_checkpoints(engine_settings(**rule), 20).count <= most + twice, rule
    best = kept_checkpoints(engine_settings(keep_last=3, keep_every=5, checkpoint={"best": {}}), 20)
    assert best.count == 3 + 4 + 1 + 1 and "4 of keep_every=5" in best.why and "the best" in best.why
    unknown = kept_checkpoints(engine_settings(keep_every=5), None)
    assert not unknown.complete and unknown.count == 3 + 1 and "not counted" in unknown.why
    assert kept_checkpoints(engine_settings(keep_every=5, keep_milestones=2), None).count == 3 + 2 + 1


def test_the_command_keeps_what_the_run_keeps_and_says_what_goes_before_it_goes(run, tmp_path):
    def prune(*words):
        done = CliRunner().invoke(app, ["prune", *map(str, words)])
        return f"{done.output} {done.exception}"

    (run / "config.yaml").write_text("keep_last: 3\nkeep_every: 3\nkeep_milestones: null\n")
    assert "would remove step-00000001, step-00000002, step-00000004, step-00000005 " in prune(run, "--dry-run")
    said = prune(run, "--keep-last", 1)
    assert said.index("removing step-00000001") < said.index("removed step-00000001") and "keep_every=3" in said
    assert left(run) == [3, 6, 8]
    elsewhere = tmp_path / "elsewhere"  # as under `checkpoint.dir`: there the newest manifest knows
    written = engine(World())
    for step in (1, 2, 3, 4):
        checkpoint.save(elsewhere, written, step=step, ema=None, extra={"config": {"keep_last": 1, "keep_every": 2}})
    assert "would remove step-00000001, step-00000003 " in prune(elsewhere, "--dry-run")
    assert "would remove step-00000001, step-00000002 " in prune(elsewhere, "--dry-run", "--keep-every", 3)
    assert "there are none" in prune(elsewhere, "--keep-every", 0, "--keep-milestones", 2)
    assert "removed step-00000001, step-00000002, step-00000003" in prune(elsewhere, "--keep-every", 0)
    assert left(elsewhere) == [4] and "nothing to remove" in prune(elsewhere)
    (run / "config.yaml").unlink()
    assert "does not say how many" in prune(run) and left(run) == [3, 6, 8]


def test_a_number_of_milestones_without_milestones_is_refused():
    least = {"total_steps": 1, "global_batch_size": 1, "optimizer": {"lr": 1.0}}
    EngineSettings(**least, keep_every=10, keep_milestones=2)
    with pytest.raises(ValueError, match="keep_milestones=2 .* give keep_every too"):
        EngineSettings(**least, keep_milestones=2)
