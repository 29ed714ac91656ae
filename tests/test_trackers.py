"""What is shown of a run: curves without overlap, pictures, histograms, W&B, and none of it ever stops training."""

import io
import os
import pty
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT
from ranks import run_ranks

from tubelet import files
from tubelet.engine import trackers
from tubelet.engine.console import Console
from tubelet.engine.histograms import BINS, Histogram, of_weights
from tubelet.engine.metrics import Meter, resident_bytes
from tubelet.engine.protocol import Flat, Slot
from tubelet.engine.settings import LogSettings
from tubelet.engine.sheet import draw
from tubelet.engine.trackers import Trackers
from tubelet.errors import ConfigError


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "histograms": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes, purge_orphaned_data=True).Reload()


def curve(folder):
    return [(event.step, event.value) for event in events(folder).Scalars("train/loss")]


def opened(folder, step=0, **settings):
    return Trackers(folder, LogSettings(**settings), step=step, enabled=True, name="r", config={})


@pytest.mark.parametrize("back_to", [0, 3])
def test_after_a_kill_or_a_rollback_no_curve_overlaps(tmp_path, back_to):
    killed = opened(tmp_path)
    for step in range(1, 8):
        killed.write(step, {"train/loss": step})
    killed.close()
    resumed = opened(tmp_path, back_to)
    for step in range(back_to + 1, 10):
        resumed.write(step, {"train/loss": 10 * step})
    resumed.rewind(6)
    resumed.write(7, {"train/loss": np.float32(700)})
    resumed.close()
    expected = [*((s, s) for s in range(1, back_to + 1)), *((s, 10 * s) for s in range(back_to + 1, 7)), (7, 700)]
    assert curve(tmp_path) == expected
    assert [(row["step"], row["train/loss"]) for row in files.read_jsonl(tmp_path / "metrics.jsonl")] == expected


def test_other_ranks_write_nothing_and_tensorboard_can_be_off(tmp_path):
    silent = Trackers(tmp_path, LogSettings(wandb={"no": 1}), step=0, enabled=False, name="r", config={})
    silent.write(1, {"train/loss": 1.0})
    silent.images(1, "inputs", torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    silent.histograms(1, {"a": torch.zeros(3)})
    silent.text(1, "a", "b")
    silent.rewind(0), silent.flush(), silent.close()
    assert not list(tmp_path.iterdir())
    off = opened(tmp_path, tensorboard=False)
    off.write(1, {"train/loss": 1.0})
    off.rewind(0)
    off.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def colors(count):
    """[count, 3] different uint8 colours."""
    return torch.tensor([[10 + 6 * i, 250 - 6 * i, (40 * i) % 256] for i in range(count)], dtype=torch.uint8)


def found_colors(sheet, columns):
    """Colours of the tiles of a sheet, by a look at the middle of each; tiles are `side` apart."""
    side = (sheet.shape[1] - 4) / columns
    rows = round((sheet.shape[0] - 4) / side)
    return [tuple(sheet[int(4 + (y + 0.4) * side), int(4 + (x + 0.4) * side)]) for y in range(rows) for x in range(columns)]


@pytest.mark.parametrize("size", [16, 512])  # 512: too large for a sheet, so tiles are made smaller
def test_a_sheet_of_pictures_holds_every_sample_in_order_up_to_32(size):
    wanted = colors(40)
    pixels = wanted[:, :, None, None].expand(40, 3, size, size)
    sheet = draw(pixels)
    assert sheet.dtype == np.uint8 and sheet.shape[1] <= 1604
    assert found_colors(sheet, 6) == [tuple(color.tolist()) for color in wanted[:32]] + [(24, 24, 24)] * 4
    assert draw(pixels[:1]).shape == (size + 8, size + 8, 3)


def test_a_clip_is_a_row_of_its_frames_evenly_chosen():
    wanted = colors(2 * 15).view(2, 15, 3)
    sheet = draw(wanted.permute(0, 2, 1)[..., None, None].expand(2, 3, 15, 16, 16))
    chosen = [0, 2, 4, 6, 8, 10, 12, 14]
    assert found_colors(sheet, 8) == [tuple(wanted[n, t].tolist()) for n in range(2) for t in chosen]


def test_pictures_are_a_file_and_the_same_in_tensorboard(tmp_path):
    sinks = opened(tmp_path)
    pixels = torch.randint(0, 256, (3, 3, 20, 12), dtype=torch.uint8)
    sinks.images(12, "inputs", pixels)
    sinks.images(12, "maps/../block 3", pixels[:1])
    sinks.close()
    saved = np.asarray(Image.open(tmp_path / "inputs" / "step-00000012.png"))
    (shown,) = events(tmp_path).Images("inputs")
    assert shown.step == 12
    assert np.array_equal(saved, np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))))
    assert np.array_equal(saved[4:24, 4:16], pixels[0].permute(1, 2, 0).numpy())
    inside = [str(path.relative_to(tmp_path)) for path in (tmp_path / "images").rglob("*.png")]
    assert inside == ["images/maps/-/block-3/step-00000012.png"]


def test_a_histogram_counts_as_numpy_does_and_leaves_out_what_is_not_finite(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    counts, edges = np.histogram(values.numpy(), bins=BINS)
    dirty = torch.cat([values, torch.tensor([float("nan"), float("inf"), -float("inf")])]).view(17, 59)
    found = Histogram.of(dirty)
    assert np.array_equal(found.counts, counts) and np.allclose(found.edges, edges)
    assert found.num == 1000 and np.isclose(found.squares, (values.double() ** 2).sum())
    assert Histogram.of(torch.full((5,), 2.0)).num == 5
    assert Histogram.of(torch.full((5,), float("nan"))).num == 0
    sinks = opened(tmp_path)
    sinks.histograms(4, {"weights/a": values, "weights/none": torch.zeros(0)})
    sinks.close()
    (shown,) = events(tmp_path).Histograms("weights/a")
    assert shown.step == 4 and shown.histogram_value.num == 1000 and sum(shown.histogram_value.bucket) == 1000
    assert events(tmp_path).Tags()["histograms"] == ["weights/a"]


def test_trouble_with_a_place_is_said_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    sinks = opened(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_jsonl", full)
        sinks.write(1, {"train/loss": 1.0})
        sinks.write(2, {"train/loss": 2.0})
    sinks.write(3, {"train/loss": 3.0})
    assert capsys.readouterr().out.count("No space left") == 1
    monkeypatch.setattr(type(sinks.tensorboard), "add_scalar", full)
    sinks.write(4, {"train/loss": 4.0})
    sinks.write(5, {"train/loss": 5.0})
    sinks.images(5, "inputs", torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    sinks.rewind(5)
    sinks.close()
    assert capsys.readouterr().out.count("warning: TensorBoard") == 1
    assert [row["step"] for row in files.read_jsonl(tmp_path / "metrics.jsonl")] == [3, 4, 5]


# ------------------------------------------------------------------------------------------------------------ W&B


def test_wandb_that_is_not_installed_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers.check(LogSettings())
    with pytest.raises(ConfigError, match=r"(?s)`log.wandb`.*not installed.*Try: pip install 'tubelet\[wandb\]'"):
        trackers.check(LogSettings(wandb={}))


def test_wrong_arguments_of_wandb_are_named_together():
    trackers.check(LogSettings(wandb={"project": "p", "entity": "e", "mode": "offline", "tags": ["a"]}))
    with pytest.raises(ConfigError) as caught:
        trackers.check(LogSettings(wandb={"projet": "p", "resume": "never", "settings": {"api_key": "abc"}}))
    said = str(caught.value)
    assert "log.wandb.project" in said and "`log.wandb.resume` is not for you" in said and "WANDB_API_KEY" in said
    assert "abc" not in said


class FakeRun:
    """What is used of a W&B run."""

    offline, url, dir = False, "https://wandb.example/r", ""

    def __init__(self, step):
        self.step, self.rows, self.finished = step, [], 0

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


def fake_wandb(monkeypatch, outcomes):
    import wandb

    calls = []

    def init(**arguments):
        calls.append(arguments)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(trackers, "check", lambda settings: None)  # it looks at the true signature
    return calls


def test_wandb_gets_one_run_a_folder_and_no_step_twice_after_a_resume(tmp_path, monkeypatch):
    first, second = FakeRun(0), FakeRun(8)
    calls = fake_wandb(monkeypatch, [first, second])
    for step, run in ((0, first), (5, second)):
        sinks = Trackers(tmp_path, LogSettings(wandb={"project": "p"}, tensorboard=False), step=step, enabled=True,
                         name="my run", config={"lr": 1, "url": "https://u:secret@h/x"})
        for now in range(step + 1, step + 8):
            sinks.write(now, {"train/loss": now})
        sinks.write(step + 7, {"val/acc1": 1.0})
        sinks.close()
        sinks.close()
        assert run.finished == 1
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["id"].startswith("my-run-")
    assert all(call["resume"] == "allow" and call["project"] == "p" and call["name"] == "my run" for call in calls)
    assert "secret" not in str(calls)
    assert [step for step, _ in first.rows] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert [step for step, _ in second.rows] == [8, 9, 10, 11, 12, 12]


def test_wandb_without_network_keeps_rows_on_disk_and_without_an_account_is_refused(tmp_path, monkeypatch, capsys):
    from wandb.errors import CommError, UsageError

    run = FakeRun(0)
    calls = fake_wandb(monkeypatch, [CommError("no route to host"), run, UsageError("No API key configured.")])
    sinks = opened(tmp_path, wandb={}, tensorboard=False)
    assert "no route to host" in capsys.readouterr().out and calls[1]["mode"] == "offline"

    def gone(row, step):
        raise BrokenPipeError("its process is gone")

    run.log = gone
    sinks.write(1, {"train/loss": 1.0})
    sinks.write(2, {"train/loss": 2.0})
    sinks.close()
    assert capsys.readouterr().out.count("its process is gone") == 1
    assert len(files.read_jsonl(tmp_path / "metrics.jsonl")) == 2
    with pytest.raises(ConfigError, match="(?s)No API key.*Try: .*WANDB_API_KEY"):
        opened(tmp_path, wandb={}, tensorboard=False)


def log_records(data):
    """Records of a LevelDB log (what a .wandb file is): blocks of 32 KiB, records cut into pieces with 7 bytes in front."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4:position + 6], "little"), data[position + 6]
        record += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb_offline_writes_scalars_pictures_and_histograms(tmp_path, capfd):
    from wandb.proto import wandb_internal_pb2

    sinks = opened(tmp_path, wandb={"mode": "offline", "project": "p"}, tensorboard=False)
    sinks.write(3, {"train/loss": 0.5})
    sinks.images(3, "inputs", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    sinks.histograms(3, {"weights/a": torch.randn(10)})
    sinks.write(4, {"train/loss": 0.25})
    sinks.close()
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    until = time.time() + 20
    while path.stat().st_size < 1000 and time.time() < until:  # W&B's process writes in its own time
        time.sleep(0.05)
    ids, rows = set(), []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    assert ids == {(tmp_path / "wandb-id.txt").read_text().strip()}
    assert [(row["_step"], row["train/loss"]) for row in rows] == [("3", "0.5"), ("4", "0.25")]
    assert rows[0]["inputs._type"] == '"image-file"' and rows[0]["weights/a._type"] == '"histogram"'


# --------------------------------------------------------------------------------------------- meter and console


def test_adding_an_output_to_the_meter_never_reads_it():
    meter = Meter(torch.device("cpu"), types.SimpleNamespace(size=1))
    for _ in range(2):
        meter.add({"loss": torch.zeros((), device="meta"), "logits": torch.zeros(3, device="meta")})
    assert meter.sums["loss"].is_meta and list(meter.sums) == ["loss"] and meter.micro_batches == 2


def test_memory_counts_the_workers_below_the_process():
    before = resident_bytes(os.getpid())
    hold = "data = bytearray(150 << 20); data[::4096] = b'x' * len(data[::4096]); print('ready', flush=True); input()"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"  # a child of a child
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", middle], **pipes) as worker:
        assert worker.stdout.readline() == "ready\n"
        assert 150 << 20 <= resident_bytes(os.getpid()) - before <= 300 << 20
        worker.communicate("\n")
    assert resident_bytes(2**22 + 1) == 0  # no such process


VALUES = {"train/loss": 1.5, "train/lr": 1e-3, "train/grad_norm": 0.5, "perf/samples_per_sec": 128.0, "perf/step_time": 2.0,
          "perf/data_wait_pct": 3.0, "system/rss_gib": 4.0}


def test_a_pipe_gets_plain_lines_with_a_time_left_that_is_honest_after_a_resume(capsys):
    console = Console(total=1000, step=900, enabled=True, title="r", unit="clips")
    console.say("[rank 0] 3 samples")
    console.report(910, VALUES | {"perf/step_time": 60.0})  # compiles: all that is known so far
    console.report(920, VALUES)
    console.rewind(910)
    console.report(930, VALUES | {"perf/step_time": 4.0, "perf/mfu": 0.42, "memory/max_allocated_gib": 71.0})
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[rank 0] 3 samples"
    assert lines[1] == ("step 910/1000  loss 1.5000  lr 1.00e-03  grad norm 0.500  128.0 clips/s  data wait 3%  "
                        "mem 4.0 GiB  eta 01:30:00")
    assert lines[2].endswith("eta 00:02:40")  # 80 steps of 2 s: nothing of the 900 steps before, nor the first interval
    assert "mfu 42.0%" in lines[3] and "mem 71.0 GiB" in lines[3]
    assert lines[3].endswith(f"eta 00:0{70 * 100 // 30 // 60}:{70 * 100 // 30 % 60:02d}")  # 10 steps of 2 s, 20 of 4 s
    Console(total=1, step=0, enabled=False, title="r").report(1, VALUES)
    assert not capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_a_file_no_control_codes(tmp_path):
    code = ("from tubelet.engine.console import Console\n"
            f"console = Console(total=10, step=4, enabled=True, title='my-run')\nconsole.report(5, {VALUES!r})\n"
            "console.say('saved [step 5]')\nconsole.close()\n")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment, check=True, cwd=ROOT)
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 65536):
            drawn += chunk
    except OSError:  # Linux's end of file of a terminal
        pass
    text = drawn.decode()
    assert "\x1b[" in text and "my-run" in text and "5/10" in text and "loss 1.5000" in text and "saved [step 5]" in text
    ours, theirs = pty.openpty()  # errors on a terminal, output into a file
    with open(tmp_path / "log", "wb") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, stderr=theirs, env=environment, check=True, cwd=ROOT)
    os.close(ours), os.close(theirs)
    text = (tmp_path / "log").read_text()
    assert "\x1b" not in text and "\r" not in text and "step 5/10" in text


# ---------------------------------------------------------------------------------------------------------- ranks


class Sharded:
    """An engine's weights: two parameters in flats, as `cut` says which rank holds what."""

    replicated = False

    def __init__(self, world, weights, cut):
        self.world, self.device, self.weights = world, torch.device("cpu"), weights
        self.held = []
        for name, start, end in cut[world.rank]:
            master = torch.full((end - start + 5,), 1e6)  # padding in front and behind, which must not count
            master[3:3 + end - start] = weights[name].flatten()[start:end]
            self.held.append(Flat(master, master, 0, [Slot(name, start, end - start, 3)]))

    def shapes(self):
        return {name: tuple(value.shape) for name, value in self.weights.items()}

    def flats(self):
        return self.held


def on_ranks(world, device):
    weights = {"a": torch.randn(40, 25, generator=torch.Generator().manual_seed(1)),
               "b": torch.rand(30, generator=torch.Generator().manual_seed(2)), "c": torch.full((2,), float("nan"))}
    cut = [[("a", 0, 700)], [("a", 700, 1000), ("b", 0, 30), ("c", 0, 2)]]
    engine = Sharded(world, weights, cut)
    found = of_weights(engine)
    everything = [(name, 0, value.numel()) for name, value in weights.items()]
    engine.replicated, engine.held = True, Sharded(world, weights, [everything] * 2).held
    whole = of_weights(engine)
    meter = Meter(device, world)
    for value in (1.0, 2.0) if world.rank else (3.0,):
        meter.add({"loss": torch.tensor(value)})
    meter.steps, meter.samples, meter.started = 2, 100, meter.started - 10
    meter.data_seconds, meter.other_seconds = 1.0 + world.rank, 5.0
    values = meter.read(2e12, 10.0)
    shown = {name: (value.counts, value.edges, value.total) for name, value in found.items()}
    return shown, {name: (value.counts, value.edges, value.total) for name, value in whole.items()}, values


def test_histograms_of_sharded_weights_are_those_of_the_whole_and_the_meter_sums_over_ranks():
    results = run_ranks(on_ranks, 2)
    weights = {"a": torch.randn(40, 25, generator=torch.Generator().manual_seed(1)),
               "b": torch.rand(30, generator=torch.Generator().manual_seed(2))}
    for sharded, whole, values in results:
        for found in (sharded, whole):
            assert set(found) == {"weights/a", "weights/b"}  # nothing finite in c
            for name, value in weights.items():
                counts, edges = np.histogram(value.numpy(), bins=BINS)
                assert np.array_equal(found[f"weights/{name}"][0], counts)
                assert np.allclose(found[f"weights/{name}"][1], edges)
                assert np.isclose(found[f"weights/{name}"][2], value.double().sum())
        assert values["train/loss"] == 2.0
        assert values["perf/samples_per_sec"] == pytest.approx(20, rel=0.1)
        assert values["perf/step_time"] == pytest.approx(2.5, rel=0.1)
        assert values["perf/data_wait_pct"] == pytest.approx(40, rel=0.1)  # the rank that waited longest
        assert values["perf/mfu"] == pytest.approx(20 / 2 * 2 / 10, rel=0.1)
        assert 0.05 < values["system/rss_gib"] < 8
    assert results[0][2]["system/rss_gib"] == results[1][2]["system/rss_gib"]
