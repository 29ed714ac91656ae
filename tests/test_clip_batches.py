"""Clips go the way of pictures: the same order, substitutes, repeats, mixing, evaluation and resume, from videos to batches.

The reference decodes every frame of a video with PyAV, in one plain loop, and picks frames a stride apart.
"""

import io

import av
import numpy as np
import pytest
import torch
from little_shards import image_bytes, write_tar
from little_videos import make_video, number_in, numbered
from PIL import Image
from programs import digests, losses, run
from test_loader import CLASSES, LANES, SEED, SIZE, G, Reference, global_batches, same, settings

from data_pipelines.augment import TrainTransform, generator, sample_seed
from data_pipelines.evaluation import EvalLoader
from data_pipelines.mix import draw_mix
from data_pipelines.reader import Reader
from data_pipelines.settings import ClipSettings, DataSettings, SourceSettings
from pretrain.settings import PretrainSettings
from tubelet.dist import World
from tubelet.errors import ConfigError, DataError, RunError
from tubelet.objectives.classification import Classification
from tubelet.objectives.settings import ObjectiveSettings
from tubelet.program.train import check_clips
from tubelet.runs import check_changes

T, STRIDE = 4, 3
CLIP = {"frames": T, "stride": STRIDE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """11 videos of 6 to 26 frames in two shards, one of them cut short, and a picture."""
    root, rng = tmp_path_factory.mktemp("clips"), np.random.RandomState(0)
    for shard, numbers in enumerate([range(7), range(7, 12)]):
        members = []
        for number in numbers:
            data = make_video(range(40 * number, 40 * number + 6 + 2 * number), gop=5)
            members.append((f"v{number:03d}.cls", str(number % CLASSES).encode()))
            if number == 5:
                members.append((f"v{number:03d}.jpg", image_bytes(rng, size=(48, 80))))
            else:
                members.append((f"v{number:03d}.mp4", data[:300] if number == 2 else data))
        write_tar(root / f"shard-{shard:04d}.tar", members)
    return root


def all_frames(data):
    if data.startswith(b"\xff\xd8"):
        return [np.array(Image.open(io.BytesIO(data)).convert("RGB"))]
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in sorted(file.decode(video=0), key=lambda frame: frame.pts)]


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def window(count, x):
    """Frames of a clip: every start that fits is equally likely, and what a short video lacks is its last frame."""
    start = int(generator(sample_seed(SEED, x, 3)).random_sample() * max(count - (T - 1) * STRIDE, 0))
    return [min(start + i * STRIDE, count - 1) for i in range(T)]


def test_batches_of_clips_are_those_of_a_plain_loop_for_any_ranks_workers_and_repeats(folder):
    for repeats in (1, 2):
        data = settings({"main": folder}, clip=CLIP, repeats=repeats)
        reference, transform, substituted = Reference({"main": folder}, {"main": sum(LANES.values())}, repeats), None, 0
        transform = TrainTransform(data.augment, SIZE)
        expected = []
        for number in range(2):
            ids, pixels, labels = range(number * G, (number + 1) * G), [], []
            for x in ids:
                name, _, _, key, content, label = reference.sample(x)
                attempt = 0
                while key == "v002":
                    substituted += not attempt
                    _, _, key, content, label = reference.spare(x, name, attempt)
                    attempt += 1
                frames = all_frames(content)
                clip = np.stack([frames[i] for i in window(len(frames), x)])
                one = [transform(frame, sample_seed(SEED, x)).numpy() for frame in clip]  # frame by frame, as pictures
                pixels.append(np.stack(one, 1))
                labels.append(label)
            expected.append((list(ids), np.stack(pixels), np.array(labels)))
        assert substituted and expected[0][1].shape == (G, 3, T, SIZE, SIZE)
        for ranks, m, workers in ((1, 24, 0), (2, 4, 2), (4, 2, 1)):
            found, rows = global_batches(data.model_copy(update={"workers": workers}), 0, 2, ranks, m)
            for one, other in zip(found, expected):
                same(one, other)
            assert len(rows) == substituted and all("v002" in row["key"] for row in rows)


def test_the_frames_of_a_clip_are_the_ones_that_its_video_carries_there(tmp_path):
    """No transform in between: numbers written into frames come out of the batch in the window's order."""
    write_tar(tmp_path / "s" / "a.tar", [("v.cls", b"0"), ("v.mp4", make_video(range(100, 160), gop=24))])
    data = settings({"main": tmp_path / "s"}, clip=CLIP, augment={"crop": "none", "hflip": 0})
    (ids, pixels, _), = global_batches(data, 0, 1, img_size=(48, 80))[0]
    starts = set()
    for x, clip in zip(ids, pixels):
        numbers = [number_in(frame.transpose(1, 2, 0)) - 100 for frame in clip.transpose(1, 0, 2, 3)]
        assert numbers == window(60, x)
        starts.add(numbers[0])
    assert len(starts) > 10


def test_of_numbered_pictures_only_the_frames_of_the_clips_are_read(tmp_path, monkeypatch):
    pictures = [jpeg(numbered(n)) for n in range(60)]
    members = [(f"v.{100 + 2 * n:04d}.jpg", data) for n, data in enumerate(pictures)]  # every second number is missing
    write_tar(tmp_path / "s" / "a.tar", [*members, ("v.cls", b"1")])
    read, asked = Reader.read_many, []
    monkeypatch.setattr(Reader, "read_many", lambda self, requests: asked.append(requests) or read(self, requests))
    data = settings({"main": tmp_path / "s"}, clip=CLIP, repeats=2, augment={"crop": "none", "hflip": 0})
    (ids, pixels, _), = global_batches(data, 0, 1, img_size=(48, 80))[0]
    wanted = [window(60, x) for x in ids]
    assert [[number_in(frame.transpose(1, 2, 0)) for frame in clip.transpose(1, 0, 2, 3)] for clip in pixels] == wanted
    distinct = [{*a, *b} for a, b in zip(wanted[::2], wanted[1::2])]  # of both repeats, each once; and the label
    assert sum(map(len, asked)) == sum(map(len, distinct)) + len(distinct)
    assert sum(size for requests in asked for _, _, size in requests) == sum(
        len(pictures[i]) for chosen in distinct for i in chosen) + len(distinct)
    asked.clear()
    (batch,) = evaluated(tmp_path / "s", ClipSettings(frames=T, stride=2, unit="seconds", test_clips=2), batch_size=2)
    assert batch["valid"].all() and sum(map(len, asked)) <= 2 * T + 1  # a second a number: between two the earlier one
    short = settings({"main": tmp_path / "s"}, clip={**CLIP, "stride": 30, "short": "refuse"})
    with pytest.raises(DataError, match="60 frames are shorter than a clip of 91 frames"):
        global_batches(short, 0, 1)


def test_mixed_clips_mix_all_frames_with_one_box_and_a_video_gives_pictures_to_image_models(folder):
    plain = global_batches(settings({"main": folder}, clip=CLIP), 0, 1)[0][0]
    cut = global_batches(settings({"main": folder}, clip=CLIP, augment={"cutmix_alpha": 1.0}), 0, 1)[0][0]
    changed = (plain[1] != cut[1]).any(axis=1)  # [m, T, h, w]
    assert changed.any() and cut[2].shape == (G, CLASSES)
    for x, sample in zip(plain[0], changed):
        plan = draw_mix(DataSettings(train=["x"], augment={"cutmix_alpha": 1.0}).augment, SEED, x & ~1, SIZE, SIZE)
        top, left, bottom, right = plan.box
        outside = np.ones((SIZE, SIZE), bool)
        outside[top:bottom, left:right] = False
        assert not sample[:, outside].any()
        assert sample[:, ~outside].mean() > 0.5 or outside.all() or (cut[2][x] > 0).sum() < 2  # in every frame alike
    one = global_batches(settings({"main": folder}), 0, 1)[0][0]
    assert one[1].shape == (G, 3, SIZE, SIZE)


def evaluated(folder, clip, ranks=1, batch_size=12, **options):
    data = DataSettings(train=[str(folder)], clip=clip, workers=0, index_dir=str(folder.parent / "index"), **options)
    source = SourceSettings(name="val", shards=str(folder))
    return [batch for rank in range(ranks) for batch in
            EvalLoader(source, data, img_size=SIZE, num_classes=CLASSES, batch_size=batch_size, world=World(rank, ranks))]


def test_views_of_evaluation_are_clips_by_crops_of_every_video_once_and_their_logits_are_averaged(folder):
    clip = ClipSettings(frames=T, stride=2, test_clips=2, test_crops=3)
    batches = evaluated(folder, clip, ranks=2)
    assert all(batch["views"] == 6 and len(batch["ids"]) == 2 and len(batch["pixels"]) == 12 for batch in batches)
    ids = [x for batch in batches for x, valid in zip(batch["ids"].tolist(), batch["valid"].tolist()) if valid]
    assert sorted(ids) == [x for x in range(12) if x != 2] and sum(len(batch["bad"]) for batch in batches) == 1
    single = {x: pixels for batch in evaluated(folder, ClipSettings(frames=T, stride=2))
              for x, pixels in zip(batch["ids"].tolist(), batch["pixels"])}
    first = next(batch for batch in batches if 11 in batch["ids"].tolist())
    views = first["pixels"].view(2, 6, 3, T, SIZE, SIZE)[first["ids"].tolist().index(11)]
    assert len({view.numpy().tobytes() for view in views}) == 6
    # the middle crop of the middle clip lies between the two clips: the centre crop is the second of each three
    assert single[11].shape == views[1].shape

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.float().mean((1, 2, 3, 4)) * k % 7 for k in range(1, CLASSES + 1)], 1)

    model, batch = Model(), {key: value for key, value in batches[0].items() if key != "bad"}
    logits = model((batch["pixels"].double() / 255 - 0.5) / 0.5)
    for average, means in (("logits", logits.view(2, 6, -1).mean(1)),
                           ("probabilities", logits.view(2, 6, -1).softmax(-1).mean(1).log())):
        objective = Classification(ObjectiveSettings(average=average), CLASSES, [0.5] * 3, [0.5] * 3)
        found = objective.evaluate(model, batch)
        rows = [i for i in range(2) if batch["valid"][i]]
        right = sum(int(means[i].argmax() == batch["labels"][i]) for i in rows)
        loss = sum(float(torch.nn.functional.cross_entropy(means[i:i + 1], batch["labels"][i:i + 1])) for i in rows)
        assert float(found["acc1"]) == right and float(found["count"]) == len(rows)
        assert abs(float(found["loss"]) - loss) < 1e-4
    sigmoid = Classification(ObjectiveSettings(name="sigmoid", average="probabilities"), CLASSES, [0.5] * 3, [0.5] * 3)
    wanted = torch.logit(logits.view(2, 6, -1).double().sigmoid().mean(1))
    assert torch.allclose(sigmoid.averaged(logits.double(), 6), wanted, atol=1e-9)


IMAGE = """\
run: {{name: image, dir: {dir}}}
model: {{name: uniformer_small, img_size: 32, num_classes: 5,
        kwargs: {{depths: [1, 1, 1, 1], dims: [16, 16, 32, 32], head_dim: 16}}}}
data: {{train: "made-up:photos?n=32&size=40&classes=5", workers: 0}}
total_steps: 2
global_batch_size: 8
precision: amp
optimizer: {{name: adamw, lr: 1.0e-3}}
"""
VIDEO = """\
run: {{name: video, dir: {dir}}}
init: {{weights: {dir}/image, inflate: average}}
model: {{name: uniformer_video_small, img_size: 32, num_classes: 4,
        kwargs: {{depths: [1, 1, 1, 1], dims: [16, 16, 32, 32], head_dim: 16, num_frames: 4}}}}
data:
  train: "made-up:videos?n=20&size=40&frames=12&classes=4"
  val: "made-up:videos?n=6&size=40&frames=12&classes=4&seed=1"
  clip: {{frames: 4, stride: 2, test_clips: 2}}
  repeats: 2
  workers: 1
total_steps: 6
global_batch_size: 8
micro_batch_size: 4
precision: amp
optimizer: {{name: adamw, lr: 1.0e-3}}
save_every: 2
log_every: 1
digest: true
"""


def test_a_video_model_begins_with_an_image_models_weights_trains_on_clips_and_resumes_exactly(tmp_path):
    (tmp_path / "image.yaml").write_text(IMAGE.format(dir=tmp_path))
    (tmp_path / "video.yaml").write_text(VIDEO.format(dir=tmp_path))
    run("pretrain", tmp_path / "image.yaml")
    output = run("finetune", tmp_path / "video.yaml", "total_steps=3")
    assert "16 x 3 x 4 x 4 -> 16 x 3 x 3 x 4 x 4, average" in output  # what was done with a kernel
    output = run("finetune", tmp_path / "video.yaml", "data.workers=0")
    assert "val/acc1@2x1" in output
    halves = digests(tmp_path / "video"), losses(tmp_path / "video")
    run("finetune", tmp_path / "video.yaml", "run.name=whole", "data.workers=2")
    assert digests(tmp_path / "whole") == halves[0] and list(halves[0]) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "whole").keys() == halves[1].keys()


def test_a_model_of_clips_and_data_of_pictures_do_not_go_together_and_another_decoder_is_another_run():
    for shape, frames, hint in (((3, 4, 32, 32), 2, "data.clip.frames=4, or model.kwargs.num_frames=2"),
                                ((3, 4, 32, 32), 1, "data.clip.frames=4"), ((3, 32, 32), 8, "data.clip.frames=1")):
        with pytest.raises(ConfigError, match=hint):
            check_clips(shape, frames)
    assert check_clips((3, 4, 32, 32), 4) == (3, 4, 32, 32) and check_clips((3, 32, 32), 1) == (3, 32, 32)
    old, new = ({"data": {"video_decoder": name}} for name in ("pyav", "torchcodec"))
    with pytest.raises(RunError, match="data.video_decoder"):
        check_changes(PretrainSettings, old, new, "runs/x")
