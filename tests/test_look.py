"""info, preview and bench show what is there: against tarfile, PIL, the transform itself, and stages slowed on purpose."""

import io
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
from little_shards import read_shards, write_shards
from PIL import Image

from data_pipelines import bench as bench_room
from data_pipelines import samples
from data_pipelines.augment import TrainTransform, sample_seed
from data_pipelines.decode import decode_image
from data_pipelines.index import ShardInfo, SourceIndex, open_source
from data_pipelines.info import describe
from data_pipelines.preview import GAP, preview
from data_pipelines.recipe import parse_target, read_recipe
from data_pipelines.samples import Source
from data_pipelines.settings import SourceSettings
from tubelet.cli import main as door
from tubelet.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["tubelet", "data", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        door()
    return done.value.code, capsys.readouterr().out


def test_info_agrees_with_tarfile_and_pil(tmp_path, monkeypatch, capsys):
    folder = write_shards(tmp_path / "set", [9, 4, 0, 7], classes=4)
    samples = [sample for shard in read_shards(folder) for sample in shard]
    code, out = run(monkeypatch, capsys, "info", folder, "--classes", "--json")
    found = json.loads(out)
    assert code == 0 and found["samples"] == 20 and found["samples_per_shard"][0] == 0
    sizes = [len(data) + len(str(label)) for _, data, label in samples]
    assert found["sample_bytes"] == [round(float(q), 3) for q in np.percentile(sizes, (0, 5, 50, 95, 100))]
    widths = [Image.open(io.BytesIO(data)).width for _, data, _ in samples]
    assert found["media"]["width"] == [round(float(q), 3) for q in np.percentile(widths, (0, 5, 50, 95, 100))]
    counts = Counter(label for _, _, label in samples)
    assert {int(k): n for k, n in found["classes"].items()} == counts
    assert found["entropy"] == pytest.approx(-sum(n / 20 * math.log2(n / 20) for n in counts.values()))
    assert found["members"] == {"cls": 20, "jpg": 16, "png": 4}
    code, out = run(monkeypatch, capsys, "info", folder, "--classes")
    assert code == 0 and "jpg (80.0%)" in out and "4 classes" in out
    code, out = run(monkeypatch, capsys, "info", folder, "--classes", "--label", "json:a")
    assert code == 0 and "no `json` member" in out  # not only that labels are lacking: why


def test_info_on_a_hundred_thousand_shards_reads_few_indexes(tmp_path, monkeypatch):
    one = open_source(SourceSettings(shards=str(write_shards(tmp_path / "set", [3]))))
    table, read = one.table(0), []
    index = SourceIndex("main", [ShardInfo(f"{i}.tar", f"/none/{i}.tar", 100, 3, "", "") for i in range(100_000)])
    monkeypatch.setattr(index, "table", lambda shard: read.append(shard) or table)
    begun = time.process_time()
    found = describe(Source(SourceSettings(shards="x"), index), probe=0)
    assert (found.shards, found.samples, len(read)) == (100_000, 300_000, 200)
    assert read[0] == 0 and read[-1] == 99_999 and time.process_time() - begun < 5


def test_preview_shows_what_the_model_will_see(tmp_path, monkeypatch, capsys):
    folder = write_shards(tmp_path / "set", [8, 8], damage={3})
    recipe = read_recipe(parse_target([str(folder), "model.img_size=40", "data.augment.hflip=1", "seed=5"]))
    tiles = preview(recipe, tmp_path / "a.png", count=16)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    bytes_of = {key: (data, label) for shard in read_shards(folder) for key, data, label in shard}
    tile = tiles[0] if not tiles[0].bad else tiles[1]
    slot, (data, label) = tiles.index(tile), bytes_of[tile.key]
    expected = TrainTransform(recipe.data.augment, 40)(decode_image(data), sample_seed(5, tile.x)).numpy()
    expected = expected.transpose(1, 2, 0).repeat(3, axis=0).repeat(3, axis=1)  # small pictures are enlarged
    left = GAP + slot * (122 + GAP)
    assert tile.label == str(label) and (sheet[GAP:GAP + 120, left:left + 120] == expected).all()
    assert [t.key for t in tiles if t.bad] == ["s00003"] and sorted(t.x for t in tiles) == list(range(16))
    preview(recipe, tmp_path / "b.png", count=16)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    config = tmp_path / "run.yaml"
    config.write_text("run: {name: x}\nmodel: {name: vit, img_size: 32, num_classes: 7}\ndata: {train: /nowhere, "
                      "augment: {mixup_alpha: 0.8}}\nglobal_batch_size: 8\n")
    code, out = run(monkeypatch, capsys, "preview", folder, "--config", config, "--out", tmp_path / "c.png", "--count", 5,
                    "--original", "--seed", 1, "data.augment.crop=resize")
    assert code == 0 and "6 samples from number 0 on" in out  # pairs that are mixed stay together
    assert Image.open(tmp_path / "c.png").width > 6 * 192
    mixed = preview(read_recipe(parse_target([str(folder)], str(config))), tmp_path / "d.png", count=16)
    assert any("% " in tile.label and " + " in tile.label for tile in mixed)


def test_a_word_is_shards_a_recipe_or_an_override(tmp_path):
    target = parse_target(["made-up:photos?n=8&size=16", "https://h/x.tar?token=a=b", "data.workers=0"])
    assert target.shards == ["made-up:photos?n=8&size=16", "https://h/x.tar?token=a=b"]
    assert target.overrides == ["data.workers=0"]
    with pytest.raises(ConfigError, match="Neither shards nor a config"):
        parse_target(["data.workers=0"])
    with pytest.raises(ConfigError, match="augment.hflop"):
        read_recipe(parse_target(["x.tar", "data.augment.hflop=1"]))


def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_bench_finds_the_stage_that_was_slowed(tmp_path, monkeypatch, capsys):
    folder = write_shards(tmp_path / "set", [12, 12])
    words = [str(folder), "global_batch_size=8", "model.img_size=24", "data.workers=0"]
    recipe = read_recipe(parse_target(words))
    real = samples.open_media
    with monkeypatch.context() as patch:
        patch.setattr(samples, "open_media", lambda *args: burn(0.02) or real(*args))
        slow = bench_room.bench(recipe, batches=2, need=100.0)
    assert slow.slowest == "decode" and slow.samples == 16 and slow.bad == 0
    assert 20 <= slow.cpu_ms("decode") < 28 and 33 < slow.per_core < 50
    said = bench_room.verdict(slow)
    assert any("a GPU that needs 100 samples/s: 2." in line and "data.workers=3" in line for line in said)
    from data_pipelines.reader import Reader

    read = Reader.read_many
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read_many", lambda self, requests: time.sleep(0.03 * len(requests)) or read(self, requests))
        waits = bench_room.bench(recipe, batches=1, need=1000.0)
    assert waits.slowest == "fetch" and waits.wall_ms("fetch") > 55 and waits.cpu_ms("fetch") < 5
    assert waits.per_worker < 20 < waits.per_core
    assert any(line.startswith("fetch limits") for line in bench_room.verdict(waits))
    code, out = run(monkeypatch, capsys, "bench", *words, "--workers", 1, "--batches", 1, "--need", 5)
    assert code == 0 and "decode" in out and "loader with 1 worker(s)" in out and "a GPU that needs 5 samples/s" in out


def test_videos_are_looked_at_like_pictures(tmp_path):
    """Verify decodes their first, middle and last frame, info says size and rate, a clip is a row of frames."""
    from little_shards import write_tar

    from data_pipelines.made_up import encode_mp4, moving
    from data_pipelines.preview import _frames
    from data_pipelines.verify import verify

    clips = [moving(0, i, i % 3, 3, 32, 20) for i in range(4)]
    films = [encode_mp4(clip, fps=10, gop=5) for clip in clips]
    films[2] = films[2][:len(films[2]) // 2]
    write_tar(tmp_path / "set/x.tar", [(f"{i}.{kind}", data) for i, film in enumerate(films)
                                       for kind, data in (("mp4", film), ("cls", b"1"))])
    assert verify(str(tmp_path / "set")).num_problems == 0
    (problem,) = verify(str(tmp_path / "set"), decode=True).shards[0].problems
    assert problem.startswith("sample 2: ")
    settings = SourceSettings(shards=str(tmp_path / "set"))
    media = describe(Source(settings, open_source(settings))).media
    assert media["failed"] == 1 and media["frames"] == [20] * 5 and media["fps"] == [10] * 5
    assert media["seconds"] == [2] * 5 and media["width"] == [32] * 5
    row = _frames(clips[0].transpose(3, 0, 1, 2))
    assert len(row) == 8 and (row[0][::3, ::3] == clips[0][0]).all() and (row[-1][::3, ::3] == clips[0][-1]).all()
