"""Writing: every picture once, bytes unchanged or lossless, same input same shards, whole or not at all."""

import csv
import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from little_shards import image_bytes, read_shards
from PIL import Image

from data_pipelines import made_up
from data_pipelines.index import open_source
from data_pipelines.made_up import ensure_made_up, fractal, parse_spec
from data_pipelines.settings import SourceSettings
from data_pipelines.write import write_shards
from tubelet.cli import main as door
from tubelet.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """Class folders bird (7 pictures), cat (5), dog (0 < n = 9): {class: {stem: bytes}}."""
    rng = np.random.RandomState(0)
    found = {}
    for name, count in (("cat", 5), ("bird", 7), ("dog", 9)):
        for number in range(count):
            kind = ("jpg", "png", "jpeg")[number % 3]
            path = tmp_path / "in" / name / f"sub{number % 2}" / f"{name}.v1 {number}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = image_bytes(rng, "png" if kind == "png" else "jpg")
            path.write_bytes(data)
            found.setdefault(name, []).append(data)
    (tmp_path / "in" / "cat" / "notes.txt").write_text("no picture")
    return found


def tree(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def refused(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        write_shards(*args, **kwargs)
    return str(caught.value)


def samples_of(folder):
    return [row for shard in read_shards(Path(folder)) for row in shard]


def test_class_folders_become_shards_with_every_byte_kept(tmp_path, pictures):
    index = write_shards(str(tmp_path / "in"), tmp_path / "birds", shard_size=8, seed=3)
    assert [(s["name"], s["samples"]) for s in index["shards"]] == [
        ("birds-00000.tar", 8), ("birds-00001.tar", 8), ("birds-00002.tar", 5)]
    rows = []
    for shard in sorted((tmp_path / "birds").glob("*.tar")):  # webdataset is the independent reader
        for sample in wds.WebDataset(str(shard), shardshuffle=False):
            kind = next(kind for kind in ("jpg", "png") if kind in sample)
            rows.append((sample["__key__"], sample[kind], int(sample["cls"])))
    classes = json.loads((tmp_path / "birds" / "classes.json").read_text())
    assert classes == ["bird", "cat", "dog"]
    for label, name in enumerate(classes):
        assert sorted(data for _, data, k in rows if k == label) == sorted(pictures[name])
    keys = [key for key, _, _ in rows]
    assert len(set(keys)) == 21 and keys == sorted(keys) and all("." not in key for key in keys)
    labels = [label for _, _, label in rows]
    assert labels != sorted(labels) and len(set(labels[:8])) == 3  # permuted: no shard of one class
    source = open_source(SourceSettings(shards=str(tmp_path / "birds")))
    assert len(source) == 21 and source.classes == classes and source.label == "cls"
    assert json.loads((tmp_path / "birds" / "_info.json").read_text())["splits"]["train"]["shard_lengths"] == [8, 8, 5]


def test_same_input_gives_the_same_bytes_and_the_seed_matters(tmp_path, pictures):
    for name in ("one", "two"):
        write_shards(str(tmp_path / "in"), tmp_path / name, shard_size=10, name="x", seed=1)
        for path in (tmp_path / "in").rglob("*"):
            os.utime(path, (10, 10))  # times of the input are not in the shards
    write_shards(str(tmp_path / "in"), tmp_path / "other", shard_size=10, name="x", seed=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    other = tree(tmp_path / "other")
    assert other.keys() == tree(tmp_path / "one").keys() and other["x-00000.tar"] != tree(tmp_path / "one")["x-00000.tar"]


def test_tables_and_arrays_are_written_with_their_labels(tmp_path, pictures):
    rows = [(path.relative_to(tmp_path), path.parts[-3]) for path in sorted((tmp_path / "in").rglob("*.jp*g"))]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    numbers = {"bird": 4, "cat": 0, "dog": 11}
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"label": numbers[k], "path": str(p)}) + "\n\n" for p, k in rows))
    write_shards(str(tmp_path / "a.csv"), tmp_path / "a")
    write_shards(str(tmp_path / "b.jsonl"), tmp_path / "b")
    by_name = sorted((data, label) for _, data, label in samples_of(tmp_path / "a"))
    assert by_name == sorted(((tmp_path / p).read_bytes(), ["bird", "cat", "dog"].index(k)) for p, k in rows)
    by_number = sorted((data, label) for _, data, label in samples_of(tmp_path / "b"))
    assert by_number == sorted(((tmp_path / p).read_bytes(), numbers[k]) for p, k in rows)
    assert not (tmp_path / "b" / "classes.json").exists()
    rng = np.random.RandomState(0)
    for shape in ((6, 9, 12, 3), (6, 9, 12)):
        images, labels = rng.randint(0, 256, shape).astype(np.uint8), np.array([5, 0, 1, 2, 3, 4])
        np.savez(tmp_path / "c.npz", images=images, labels=labels)
        write_shards(str(tmp_path / "c.npz"), tmp_path / "c", overwrite=True)
        for _, data, label in samples_of(tmp_path / "c"):
            assert (np.asarray(Image.open(io.BytesIO(data))) == images[labels.tolist().index(label)]).all()


def test_wrong_input_is_named_and_nothing_is_left(tmp_path, pictures):
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "dog" / "zero.jpg").write_bytes(b"")
    text = refused(str(tmp_path / "in"), tmp_path / "out")
    assert "in/empty holds no picture" in text and "zero.jpg is empty" in text and "2. " in text
    (tmp_path / "t.csv").write_text("path,label\nin/none.jpg,1\nin/dog/zero.jpg,-2\nt.csv,3\n")
    text = refused(str(tmp_path / "t.csv"), tmp_path / "out")
    assert all(part in text for part in ("none.jpg does not exist", "label is -2", "not a picture", "zero.jpg is empty"))
    (tmp_path / "t.csv").write_text("file,class\nx,1\n")
    assert "`path`" in refused(str(tmp_path / "t.csv"), tmp_path / "out")
    np.savez(tmp_path / "f.npz", images=np.zeros((2, 3, 8, 8), np.float32), labels=np.array([0.5, 1]))
    text = refused(str(tmp_path / "f.npz"), tmp_path / "out")
    assert "float32 [2, 3, 8, 8]" in text and "`labels` is float64" in text
    np.savez(tmp_path / "o.npz", images=np.array([{}], dtype=object), labels=np.array([1]))
    assert "not a plain .npz" in refused(str(tmp_path / "o.npz"), tmp_path / "out")
    assert "one of in" in refused(str(tmp_path / "inn"), tmp_path / "out")
    assert "no class folders" in refused(str(tmp_path / "in" / "cat" / "sub0"), tmp_path / "out")
    assert "`--shard-size` is 0" in refused("made-up:photos", tmp_path / "out", shard_size=0)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_is_replaced_only_when_asked_and_only_if_it_is_shards(tmp_path, monkeypatch):
    write_shards("made-up:photos?n=20&size=16", tmp_path / "out", shard_size=10)
    before = tree(tmp_path / "out")
    assert "--overwrite" in refused("made-up:photos?n=4&size=16", tmp_path / "out")
    monkeypatch.setattr("data_pipelines.pieces.write_index", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space")))
    assert "cannot be written: No space" in refused("made-up:photos?n=4&size=16", tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert tree(tmp_path / "out") == before and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (tmp_path / "out" / "thesis.doc").write_text("precious")
    assert "thesis.doc" in refused("made-up:photos?n=4&size=16", tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "thesis.doc").unlink()
    write_shards("made-up:photos?n=4&size=16", tmp_path / "out", overwrite=True)
    assert len(samples_of(tmp_path / "out")) == 4 and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_made_up_sets_are_formulas_of_seed_and_number(tmp_path):
    """Literals (sums of a few pictures); classes differ in shape, not in mean colour; digits split without overlap."""
    assert [int(fractal(0, number, number % 3, 32).sum()) for number in range(4)] == FRACTAL_SUMS
    assert not (fractal(0, 0, 0, 32) == fractal(1, 0, 0, 32)).all()
    few = made_up.made_up("made-up:fractals?n=12&classes=4&size=24&seed=5")
    assert few.labels.tolist() == [0, 1, 2, 3] * 3 and few.sample(5)[1] == few.sample(5)[1]
    shapes = [[np.array(made_up.fractal(0, k + 40 * j, k, 48)) for j in range(6)] for k in range(6)]
    occupied = np.array([[(p != p[0, 0]).any(2).mean() for p in row] for row in shapes])
    assert occupied.min() > 0.04 and occupied.max() < 0.9  # neither dust nor a full square
    from sklearn.datasets import load_digits

    digits = load_digits()
    found = {}
    for split in ("train", "test"):
        part = made_up.made_up(f"made-up:digits?split={split}&size=8")
        found[split] = [(np.asarray(Image.open(io.BytesIO(part.sample(i)[1]))).tobytes(), int(part.labels[i]))
                        for i in range(len(part.labels))]
        counts = np.bincount(part.labels)
        assert counts.max() - counts.min() <= (3 if split == "test" else 8)
    everything = [((image * 255 / 16).round().astype(np.uint8).tobytes(), int(label))
                  for image, label in zip(digits.images, digits.target)]
    assert sorted(found["train"] + found["test"]) == sorted(everything) and len(found["test"]) == 359
    for spec, said in {"made-up:fractal": "made-up:fractals", "made-up:photos?n=0": "`n` is 0",
                       "made-up:photos?sizes=3&n=x": "no option `sizes`",
                       "made-up:digits?split=val": "train or test"}.items():
        with pytest.raises(DataError, match=said):
            parse_spec(spec)


FRACTAL_SUMS = [209770, 270455, 122820, 130787]


def test_missing_scikit_learn_is_said_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    assert "pip install tubelet[demo]" in refused("made-up:digits", tmp_path / "out")


def test_made_up_data_in_a_config_is_written_once_by_many(tmp_path):
    spec = "made-up:photos?n=30&size=16&classes=3"
    found = []
    threads = [threading.Thread(target=lambda: found.append(ensure_made_up(spec, tmp_path / "c"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and all(paths == found[0] for paths in found) and len(os.listdir(tmp_path / "c")) == 1
    before = {path: os.stat(path).st_mtime_ns for path in found[0]}
    assert ensure_made_up("made-up:photos?classes=3&size=16&n=30", tmp_path / "c") == found[0]  # another wording
    assert {path: os.stat(path).st_mtime_ns for path in found[0]} == before
    source = open_source(SourceSettings(shards=[spec, "made-up:photos?n=8&size=16&seed=9"]), index_dir=str(tmp_path / "d"))
    assert len(source) == 38 and source.counts.tolist() == [8, 8, 8, 6, 8]
    labels = [label for shard in found[0][:1] for _, _, label in read_shards(Path(shard).parent)[0]]
    assert set(labels) <= {0, 1, 2}


def test_the_command_line_writes(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["tubelet", "data", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            door()
        return done.value.code, capsys.readouterr()

    code, said = run("write", "made-up:digits?split=test&size=8", tmp_path / "digits", "--shard-size", 200)
    assert code == 0 and "359 samples in 2 shard(s)" in said.out
    assert list(json.loads((tmp_path / "digits/_info.json").read_text())["splits"]) == ["test"]
    code, said = run("write", "made-up:digits", tmp_path / "digits")
    assert code == 1 and said.err.startswith("error: ") and "--overwrite" in said.err and "Traceback" not in said.err
    code, said = run("info", tmp_path / "digits")
    assert code == 0 and "359" in said.out and "10 (0, 1, 2" in said.out
    shutil.rmtree(tmp_path / "digits")
    code, said = run("info", tmp_path / "digits")
    assert code == 1 and "does not exist" in said.err
