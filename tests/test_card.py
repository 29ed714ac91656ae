"""The run card says what was run and how it went, shows the curves, gives away no secret and never stops training."""

import json
import re
import sys

import pytest
from PIL import Image

from tubelet import files
from tubelet.engine import card
from tubelet.engine.card import CardFacts, last_results, write_card
from tubelet.engine.curves import Curves, binned, draw_curves, read_curves, smoothed
from tubelet.engine.goodput import Record, report
from tubelet.runs import Run, RunSettings

FACTS = CardFacts(
    manifest={"config": {"model": {"name": "vit_base_patch16_224"}, "global_batch_size": 4096, "engine": "zero",
                         "zero": {"stage": 2}, "precision": "bf16"},
              "micro_batch_size": 64, "model_cfg": {"input_size": [3, 224, 224]},
              "data": {"fingerprint": {"lanes": 4, "source": "https://me:word@host/a.tar?X-Amz-Signature=12345"}}},
    parameters=86_567_656, flops_per_sample=105.4e9, world_size=8, device="NVIDIA H100", total_steps=4000)
CONFIG = "data:\n  train: https://me:word@host/a.tar?X-Amz-Signature=12345\noptimizer: {lr: 0.001}\n"


def begun(tmp_path, starts=1):
    for number in range(starts):
        run = Run(RunSettings(name="r", dir=str(tmp_path)))
        run.begin(8, CONFIG)
        if number + 1 < starts:
            run.end("preempted", 85, step=1000 + number)
    return run


def with_curves(run, steps=2000, every=50):
    rows = []
    for step in range(every, steps + 1, every):
        rows.append({"step": step, "train/loss": 7.0 - step / 1000, "train/lr": 1e-3, "perf/samples_per_sec": 4000.0})
        if step % 500 == 0:
            rows.append({"step": step, "val/acc1": 70.0 - abs(step - 1500) / 100, "val/loss": 2.0})
    files.append_jsonl(run.folder / "metrics.jsonl", rows)


def section(text, title):
    found = re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found and found[1]


def test_the_card_says_what_was_run_and_how_it_went(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/pretrain/__main__.py", "configs/a b.yaml", "lr=1"])
    run = begun(tmp_path, 2)
    with_curves(run)
    time_spent = report([Record(1, 0, 100, "", {"compute": 80.0, "data": 20.0}, 0, 2000)])
    assert write_card(run, FACTS, step=2000, results={"val/acc1": 65.0, "val/loss": 2.0}, goodput=time_spent)
    text = (run.folder / "README.md").read_text()
    assert text.startswith("# r\n\n**running** at step 2,000 of 4,000 (50.0 %), on 8 x NVIDIA H100.")
    assert "| `val/acc1` | 65.0000 | 70.0000 |" in section(text, "Results")
    assert "| `val/loss` | 2.0000 | 2.0000 |" in section(text, "Results")
    assert "(curves.png)" in section(text, "Curves") and Image.open(run.folder / "curves.png").size == (1100, 682)
    assert "| compute | 80.0 % | 00:01:20 |" in section(text, "Time") and "**80.0 %**" in section(text, "Time")
    assert "python -m pretrain 'configs/a b.yaml' lr=1" in section(text, "Command")
    model = section(text, "Model")
    for said in ("`vit_base_patch16_224`", "86,567,656 (86.6 M)", "105.4 G", "3 x 224 x 224", "4,096 (micro batch 64)",
                 "zero stage 2, precision bf16"):
        assert said in model, said
    assert '"lanes": 4' in section(text, "Data")
    starts = section(text, "Starts").splitlines()
    assert "preempted at step 1,000 (exit code 85)" in starts[2] and "| running |" in starts[3]
    assert run.attempt.commit in section(text, "Code") and "| torch | " in section(text, "Code")
    assert "lr: 0.001" in section(text, "Configuration") and "<details>" in section(text, "Configuration")


def test_what_an_earlier_start_measured_stays_on_the_card_of_one_that_has_not_evaluated_yet(tmp_path):
    run = begun(tmp_path, 2)
    with_curves(run)
    for final in (False, True):  # the start goes on from step 2000; and it ends there, because that was the last step
        assert write_card(run, FACTS, step=2000, results={}, final=final)
        results = section((run.folder / "README.md").read_text(), "Results")
        assert "| `val/acc1` | 65.0000 | 70.0000 |" in results and "| `val/loss` | 2.0000 | 2.0000 |" in results
    assert write_card(run, FACTS, step=1999)  # as of a step that the last evaluation came after
    assert "| `val/acc1` | 70.0000 | 70.0000 |" in section((run.folder / "README.md").read_text(), "Results")


def test_the_last_evaluation_of_a_run_is_found_whichever_start_made_it(tmp_path):
    run = begun(tmp_path)
    assert last_results(run.folder, 2000) == {}
    with_curves(run)
    assert last_results(run.folder, 2000) == last_results(run.folder, 9999) == {"val/acc1": 65.0, "val/loss": 2.0}
    assert last_results(run.folder, 1999) == {"val/acc1": 70.0, "val/loss": 2.0} and last_results(run.folder, 499) == {}
    files.append_jsonl(run.folder / "metrics.jsonl", [{"step": 2100, "val/loss": float("nan"), "val/acc1": 1.0}])
    found = last_results(run.folder, 2100)  # all of it, as the evaluation gave it
    assert set(found) == {"val/loss", "val/acc1"} and found["val/loss"] != found["val/loss"]


def test_no_secret_is_on_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", "data.train=https://me:word@host/a.tar?X-Amz-Signature=12345"])
    run = begun(tmp_path)
    assert write_card(run, FACTS, step=0)
    text = (run.folder / "README.md").read_text()
    assert "host/a.tar" in text and "word" not in text.replace("keyword", "") and "12345" not in text


def test_uncommitted_changes_are_linked_and_a_killed_start_is_told_apart(tmp_path):
    run = begun(tmp_path)
    (run.folder / "attempts" / "0001.diff").write_text("+ a\n")
    assert write_card(run, FACTS, step=0)
    assert "[attempts/0001.diff](attempts/0001.diff)" in (run.folder / "README.md").read_text()
    (run.folder / "attempts" / "0001.diff").unlink()
    later = Run(RunSettings(name="r", dir=str(tmp_path), take_over=True))
    later.begin(8, CONFIG)
    later.end("failed", 1, error="OutOfMemory: a | b\nc")
    (run.folder / "attempts" / "0002.diff").unlink(missing_ok=True)
    assert write_card(later, FACTS, step=0)
    text = (run.folder / "README.md").read_text()
    assert "left no word (killed)" in text and "without uncommitted changes" in text
    assert "failed (exit code 1): OutOfMemory: a \\| b c |" in text  # a bar or a new line would break the table


def test_many_starts_are_the_last_twenty(tmp_path):
    run = begun(tmp_path, 23)
    assert write_card(run, FACTS, step=0)
    text = section((run.folder / "README.md").read_text(), "Starts")
    assert "The last 20 of 23" in text and "| 3 |" not in text and "| 4 |" in text and "| 23 |" in text


def test_without_matplotlib_the_curves_are_a_table(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    run = begun(tmp_path)
    with_curves(run)
    facts = CardFacts(unit="clips")
    assert write_card(run, facts, step=2000)
    curves = section((run.folder / "README.md").read_text(), "Curves").splitlines()
    assert curves[0] == "| step | loss | lr | clips/s |" and len([line for line in curves if line]) == 2 + 12
    assert curves[2].startswith("| 50 | 6.9500 |") and curves[13] == "| 2,000 | 5.0000 | 1.000e-03 | 4,000.0000 |"
    assert not (run.folder / "curves.png").exists()


def test_plots_are_drawn_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(card, "draw_curves", lambda curves, path, unit: drawn.append(path) or path.write_text("x") or True)
    run = begun(tmp_path)
    with_curves(run)
    for final in (False, False, True):
        assert write_card(run, FACTS, step=1, final=final)
    assert len(drawn) == 2
    monkeypatch.setattr(card, "PLOT_SECONDS", 0.0)
    write_card(run, FACTS, step=1)
    assert len(drawn) == 3


def test_a_card_that_cannot_be_written_is_said_once_and_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    run = begun(tmp_path)
    assert write_card(run, FACTS, step=7)
    before = (run.folder / "README.md").read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomic", full)
    assert not write_card(run, FACTS, step=8) and not write_card(run, FACTS, step=9)
    assert capsys.readouterr().out.count("No space left") == 1
    assert (run.folder / "README.md").read_text() == before


def test_curves_are_read_thinned_and_smoothed_without_moving(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 1, "val/a/acc1": 3.0, "val/x": float("nan")}, {"other": 1},
            {"step": 2, "train/loss": float("inf")}, {"step": 2, "perf/x": 1.0}]
    files.append_jsonl(path, rows)
    with open(path, "a") as file:
        file.write('{"step": 3, "train/lo')  # cut by a kill
    found = read_curves(path)
    assert found.steps == [1, 2] and found.points("train/loss") == [(1, 2.0)]
    assert found.evaluation == {"val/a/acc1": [(1, 3.0)]}
    assert read_curves(tmp_path / "none").steps == []
    line = [(step, 2.0 * step) for step in range(1, 1001)]
    assert [value for _, value in smoothed(line)] == pytest.approx([value for _, value in line])  # stays where it is
    assert len(binned(line, 100)) == 100 and binned(line, 100)[-1] == (1000, pytest.approx(1991))
    assert json.loads(path.read_text().splitlines()[0])["step"] == 1  # only read


def test_plots_are_drawn_for_any_curve(tmp_path):
    rows = [{"step": step, "train/loss": 1e6 if step == 70 else 1.0} for step in range(1, 200)]  # no rates, a spike
    assert draw_curves(Curves(rows), tmp_path / "a.png", "images") and Image.open(tmp_path / "a.png").format == "PNG"
    bad = [{"step": 1, "train/loss": float("nan")}, {"step": 2, "train/loss": float("nan")}]
    assert draw_curves(Curves(bad), tmp_path / "b.png", "images")
    assert not draw_curves(Curves(bad[:1]), tmp_path / "c.png", "images")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
