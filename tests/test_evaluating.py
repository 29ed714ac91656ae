"""Evaluation inside the loop and what may come in between: a signal, a failing reader, a resume, a number that is none."""

import json
import os
import signal

import pytest
import torch
from little_run import Objective, resumed, trainers

from tubelet.engine.checkpoint.folder import published, read_best
from tubelet.engine.phases import Phases
from tubelet.engine.trainer import Stopped
from tubelet.errors import ConfigError, DataError
from tubelet.program.main import report

BEST = {"checkpoint": {"best": {"metric": "val/loss", "mode": "min"}}}


class Pictures:
    """Two batches of two samples; `during` is called before the second."""

    name, size, protocol = "pictures", 4, ""

    def __init__(self, during=lambda: None):
        self.during, self.passes = during, 0

    def __iter__(self):
        self.passes += 1
        for first in (0, 2):
            if first:
                self.during()
            ids = torch.arange(first, first + 2)
            yield {"ids": ids, "pixels": torch.full((2, 3, 4, 4), 9, dtype=torch.uint8), "labels": ids % 3}


@pytest.fixture
def trainer(tmp_path, one_thread):
    with trainers(tmp_path, name="r", ema=None) as make:
        yield make


def test_asked_to_leave_at_the_last_step_the_next_start_evaluates_and_names_the_best(trainer, tmp_path):
    first = trainer(eval_loaders=[Pictures()], **BEST)
    step = first.train_step

    def signalled(batches):
        if first.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    first.train_step = signalled
    with pytest.raises(Stopped):
        first.fit()
    assert first.evaluation.loaders[0].passes == 0 and published(tmp_path / "r")[-1].name == "step-00000006"
    second = trainer(eval_loaders=[Pictures()], beginning=resumed(tmp_path / "r"), **BEST)
    results = second.fit()
    assert second.evaluation.loaders[0].passes == 1
    best = read_best(tmp_path / "r")
    assert best and best["step"] == 6 and best["value"] == results["val/loss"]


@pytest.mark.parametrize(("every", "left_at"), [(2, 2), (None, 6)])
def test_an_evaluation_is_given_up_for_a_signal_saved_and_done_by_the_next_start(trainer, tmp_path, every, left_at):
    pictures = Pictures(lambda: os.kill(os.getpid(), signal.SIGTERM))
    first = trainer(eval_loaders=[pictures], eval_every=every, save_every=100)
    with pytest.raises(Stopped) as caught:
        first.fit()
    assert caught.value.code == 85 and first.results == {} and first.state.step == left_at
    assert published(tmp_path / "r")[-1].name == f"step-{left_at:08d}"
    second = trainer(eval_loaders=[Pictures()], eval_every=every, beginning=resumed(tmp_path / "r"))
    second.fit()
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/loss" in row] == ([2, 4, 6] if every else [6])


def test_a_finished_run_that_is_started_again_returns_its_results_without_evaluating(trainer, tmp_path):
    results = trainer(eval_loaders=[Pictures()]).fit()
    pictures = Pictures()
    again = trainer(eval_loaders=[pictures], beginning=resumed(tmp_path / "r"))
    assert "val/loss" in results and again.fit() == results and pictures.passes == 0
    assert "val/loss" in (tmp_path / "r" / "README.md").read_text()


def test_what_is_done_on_eval_is_done_after_every_evaluation_with_model_step_and_trackers(trainer):
    seen = []

    def on_eval(model, step, trackers):
        seen.append((step, model.training, sum(value.numel() for value in model.parameters()) > 0))
        trackers.write(step, {"few_shot/acc1": step / 10})

    running = trainer(eval_loaders=[Pictures()], eval_every=3, on_eval=on_eval)
    running.fit()
    assert [step for step, *_ in seen] == [3, 6] and all(there for *_, there in seen)
    rows = [json.loads(line) for line in (running.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["few_shot/acc1"] for row in rows if "few_shot/acc1" in row] == [0.3, 0.6]


def test_what_an_evaluation_ends_the_run_for_costs_no_step(trainer, tmp_path):
    def broken():
        raise DataError("https://host/val.tar did not answer for 300 s.", "check the server")

    with pytest.raises(DataError, match="val.tar"):
        trainer("reader", eval_loaders=[Pictures(broken)], save_every=100).fit()
    with pytest.raises(ConfigError, match="val/loss"):
        trainer("metric", eval_loaders=[Pictures()], save_every=100,
                checkpoint={"best": {"metric": "val/top1", "mode": "max"}}).fit()
    for name in ("reader", "metric"):
        assert published(tmp_path / name)[-1].name == "step-00000006"


def test_an_evaluation_that_is_not_finite_is_no_best(trainer, tmp_path):
    objective, said = Objective(), iter([float("nan"), 3.0, 1.0, 2.0])
    objective.evaluate = lambda model, batch: {"loss": torch.tensor(2 * value), "count": torch.tensor(2.0)}
    value = next(said)

    def following():
        nonlocal value
        value = next(said, 2.0)

    pictures = Pictures()
    running = trainer(eval_loaders=[pictures], eval_every=2, objective=objective, **BEST)
    evaluated = running.view.evaluated
    running.view.evaluated = lambda state, results: (evaluated(state, results), following())
    running.fit()
    best = read_best(tmp_path / "r")
    assert best and (best["step"], best["value"]) == (6, 1.0)


def test_a_long_evaluation_moves_with_every_batch_and_stands_where_a_batch_does(trainer):
    """On a clock that the test moves: 2000 s for the first batch of each set, 3000 s for the second; an hour is allowed."""
    now, seen = 0.0, []

    class Slow(Pictures):
        def __iter__(self):
            nonlocal now
            for seconds, batch in zip((2000.0, 3000.0), super().__iter__()):
                now += seconds
                seen.append((running.phases.standing().owner, running.phases.standing().idle))
                yield batch

    running = trainer(eval_loaders=[Slow(), Slow()], ema={"decay": 0.5}, phases=Phases(lambda: now))
    with running.phases("evaluate"):
        assert running.evaluation.run(lambda: False) and now == 4 * 5000
    assert seen == 4 * [("evaluate", 2000.0), ("evaluate", 3000.0)], "time since the batch before, weights and average"


def test_a_start_that_compiles_for_long_is_still_a_start_at_its_first_step(trainer):
    running, finished = trainer(), []
    step = running.train_step
    running.train_step = lambda batches: (finished.append(running.phases.finished), step(batches))[1]
    running.fit()
    assert finished[:3] == [0, 1, 2]


def test_an_error_before_the_folder_is_claimed_is_printed_whatever_earlier_starts_left_there(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0001.yaml").write_text("")
    error = ConfigError("`lr` is 0.", "lr=1")
    for started, said in ((1, True), (1, False), (0, True)):  # the second: another rank has said it
        report(error, 0, tmp_path, started)
        assert ("`lr` is 0." in capsys.readouterr().err) == said
