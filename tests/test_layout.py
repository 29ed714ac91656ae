"""Places of elements by rule: equal to what cutting real arrays gives, small at thousands of ranks, and checkpoints of
format 1 still load."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from checkpoint_parts import Net, SplitEngine, WholeEngine, picture

from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint.index import FlatInfo, GroupInfo, Index
from tubelet.engine.checkpoint.load import Source
from tubelet.engine.layout import Cut, Listed, Pieces, Whole, from_json
from tubelet.engine.protocol import Slot

FORMAT_1 = Path(__file__).parent / "format1"


def random_sizes(generator, count):
    return {f"p{number}": generator.choice([1, 2, 3, 7, 16, 31]) for number in range(count)}


def labelled(sizes):
    """Every element has a number of its own, so that arrays can be cut as DeepSpeed cuts them and looked up again."""
    first = np.cumsum([0, *sizes.values()])
    return {name: np.arange(a, b) for name, a, b in zip(sizes, first, first[1:])}


def cut(generator, ranks, sizes, groups):
    """(layout, flats[rank][flat] as arrays; -1 is padding) of stages 1 and 2, with gaps between parameters as aligned
    offsets leave them."""
    values, arrays, offsets, pieces = labelled(sizes), [], [], []
    for names in groups:
        parts, places = [], []
        for name in names:
            parts.append(np.full(generator.choice([0, 0, 3]), -1))
            places.append(sum(map(len, parts)))
            parts.append(values[name])
        whole = np.concatenate(parts)
        whole = np.pad(whole, (0, -len(whole) % ranks + ranks * generator.choice([0, 2])), constant_values=-1)
        arrays.append(whole.reshape(ranks, -1))
        offsets.append(places)
        pieces.append(arrays[-1].shape[1])
    return Cut(ranks, sizes, groups, offsets, pieces), [[array[rank] for array in arrays] for rank in range(ranks)]


def pieces(generator, ranks, sizes, groups):
    values = labelled(sizes)
    padded = {name: np.pad(value, (0, -len(value) % ranks), constant_values=-1).reshape(ranks, -1)
              for name, value in values.items()}
    return Pieces(ranks, sizes, groups), [[np.concatenate([padded[name][rank] for name in names]) for names in groups]
                                          for rank in range(ranks)]


def whole(generator, ranks, sizes, groups):
    values = labelled(sizes)
    return Whole(ranks, sizes, groups), [[np.concatenate([values[name] for name in names]) for names in groups]] * ranks


@pytest.mark.parametrize("rule", [cut, pieces, whole])
def test_slots_and_pieces_are_where_cutting_real_arrays_puts_the_elements(rule):
    generator = random.Random(5)
    for _ in range(60):
        ranks, sizes = generator.choice([1, 2, 3, 4, 7, 40]), random_sizes(generator, generator.choice([1, 2, 9]))
        names = generator.sample(list(sizes), len(sizes))  # round-robin order is not the model's
        groups = [group for group in (names[::2], names[1::2]) if group]
        layout, flats = rule(generator, ranks, sizes, groups)
        assert layout.problems() == []
        number = {name: i for i, name in enumerate(sizes)}
        layout = from_json(json.loads(json.dumps(layout.to_json(number))), list(sizes), sizes, len(groups))
        values, written = labelled(sizes), {}
        for rank in range(ranks):
            for flat in layout.writes(rank):
                assert written.setdefault((rank, flat), flats[rank][flat]) is flats[rank][flat]
            for flat, array in enumerate(flats[rank]):
                covered = np.full(len(array), -1)
                for slot in layout.slots(rank, flat):
                    assert slot.length > 0
                    covered[slot.offset : slot.offset + slot.length] = (
                        values[slot.name][slot.start : slot.start + slot.length])
                assert (covered == array).all(), "every element, and nothing of the padding"
                assert layout.least(rank, flat) == 1 + max(np.flatnonzero(array >= 0), default=-1)
        assert len(written) == (len(groups) if rule is whole else len(groups) * ranks)
        assert [sorted(layout.members(flat)) for flat in range(layout.num_flats)] == [sorted(group) for group in groups]
        for name, expected in values.items():
            assert name in layout.members(layout.flat_of(name))
            for _ in range(6):
                start = generator.randrange(len(expected))
                length = generator.choice([None, 0, 1, generator.randrange(1, 40)])
                found = [(slot.start, written[rank, flat][slot.offset : slot.offset + slot.length])
                         for rank, flat, slot in layout.pieces(name, start, length)]
                stop = len(expected) if length is None else start + length
                assert (np.concatenate([[], *(part for _, part in found)]) == expected[start:stop]).all()
                assert [place for place, _ in found] == list(np.cumsum([start, *(len(part) for _, part in found)])[:-1])


def test_a_layout_that_contradicts_itself_is_seen_without_walking_the_ranks():
    sizes, many = {"a": 5, "b": 6}, 10**12
    for layout, problem in (
            (Cut(2, sizes, [["a", "b"]], [[0, 4]], [6]), "b: element 0 lies in two places"),
            (Cut(2, sizes, [["a", "b"]], [[0, 5]], [5]), "b: 2 pieces of 5 elements end before it does"),
            (Cut(2, sizes, [["a"]], [[0]], [6]), "b: element 0 lies in no place"),
            (Pieces(many, sizes, [["a"], ["a", "b"]]), "a: element 0 lies in two places"),
            (Pieces(0, sizes, [["a", "b"]]), "0 ranks"),
            (Pieces(many, {**sizes, "c": 0}, [["a", "b", "c"]]), "c: it has no elements and yet a place"),
            (Whole(many, sizes, [["b"]]), "a: element 0 lies in no place"),
            (Listed(sizes, [{0: [Slot("a", 0, 5, 0), Slot("b", 0, 3, 5)]}, {0: [Slot("b", 4, 2, 0)]}], 1),
             "b: element 3 lies in no place"),
            (Listed(sizes, [{0: [Slot("a", 0, 5, 0), Slot("b", 0, 3, 5)]}, {0: [Slot("b", 2, 4, 0)]}], 1),
             "b: element 2 lies in two places"),
            (Listed(sizes, [{0: [Slot("a", 0, 5, 0), Slot("b", 0, 3, 5)]}], 1), "b: 3 of 6 elements have a place")):
        assert layout.problems() == [problem]
    for broken in ({"rule": "spiral", "ranks": 2, "flats": []}, {"rule": "cut", "ranks": -1, "flats": []},
                   {"rule": "pieces", "ranks": 2, "flats": [{"members": [-1]}]}, {"rule": "whole"},
                   {"rule": "cut", "ranks": 2, "flats": [{"members": [0, 1], "offsets": [0], "piece": 9}]},
                   {"rule": "listed", "slots": [{"1000000000000": [[0, 0, 5, 0]]}]}):
        with pytest.raises((ValueError, KeyError, IndexError)):
            from_json(broken, ["a", "b"], sizes, 1)


# ---------------------------------------------------------------------------------------------------- thousands of ranks


@pytest.fixture(scope="module")
def giant():
    """Shapes of ViT-G/14, the largest recipe; no memory is taken."""
    with torch.device("meta"):
        model = timm.create_model("vit_gigantic_patch14_224", num_classes=1000)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def index_of(shapes, layout, groups):
    return Index(shapes=shapes, frozen={}, buffers={}, order=list(shapes), optimizer="AdamW", ema=True,
                 flats=[FlatInfo(flat, ["exp_avg", "exp_avg_sq"], 1234.0) for flat in range(layout.num_flats)],
                 groups=[GroupInfo({"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}, names)
                         for names in groups], layout=layout)


def giant_index(shapes, stage, ranks):
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert sum(sizes.values()) > 1.8e9 and len(sizes) > 500
    groups = [[name for name in shapes if (len(shapes[name]) > 1) == decayed] for decayed in (True, False)]
    if stage == 3:
        return index_of(shapes, Pieces(ranks, sizes, groups), groups)
    offsets = [np.cumsum([0, *(sizes[name] for name in names)])[:-1].tolist() for names in groups]
    size_of_piece = [-(-sum(sizes[name] for name in names) // ranks) for names in groups]
    return index_of(shapes, Cut(ranks, sizes, groups, offsets, size_of_piece), groups)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_index_of_the_largest_recipe_is_small_and_quick_on_4096_ranks(giant, tmp_path, stage):
    begin = time.process_time()
    index = giant_index(giant, stage, 4096)
    assert index.problems() == []
    text = index.to_json()
    built = time.process_time() - begin
    (tmp_path / "index.json").write_text(text)
    begin = time.process_time()
    again = Index.read(tmp_path)
    read = time.process_time() - begin
    print(f"stage {stage}: {len(text)} bytes, built in {built:.3f} s, read in {read:.3f} s")
    assert len(text) < 200_000 and built < 1 and read < 1
    assert again.to_json() == text and again.num_ranks == 4096
    last = again.tensors(4095)
    assert set(last) == {f"{kind}.{flat}" for kind in ("master", "exp_avg", "exp_avg_sq", "ema") for flat in (0, 1)}


@pytest.mark.parametrize(("wrote", "reads"), [((3, 4096), (3, 512)), ((1, 4096), (3, 4096)), ((3, 8), (1, 4096))])
def test_a_rank_reads_only_its_own_elements_however_many_ranks_wrote(giant, wrote, reads):
    index, mine = giant_index(giant, *wrote), giant_index(giant, *reads)
    source, asked = Source.__new__(Source), []

    class Files:
        def slice(self, file, name, start, stop):
            asked.append((file, name, stop - start))
            return torch.empty(1).expand(stop - start)

    source.index, source.reader = index, Files()
    target = torch.empty(1)
    begin = time.process_time()
    for flat in range(2):
        slots = mine.layout.slots(reads[1] // 2, flat)
        for slot in slots:
            for _, values in source.read("master", slot.name, slot.start, slot.length):
                target += values[0] * 0
    took = time.process_time() - begin
    own = sum(slot.length for flat in range(2) for slot in mine.layout.slots(reads[1] // 2, flat))
    assert sum(count for *_, count in asked) == own and 0 < own <= 2.1e9 / reads[1] + 2 * len(giant)
    assert len(asked) <= len(giant) * (2 + wrote[1] / reads[1]) and took < 1, (len(asked), took)


# ---------------------------------------------------------------------------------------------------- format 1


def test_a_checkpoint_of_format_1_loads_word_for_word():
    """Written by the version before format 2: stage 3, two ranks, several sub-groups, EMA, frozen layers, buffers."""
    folder, expected = FORMAT_1 / "step-00000002", json.loads((FORMAT_1 / "expected.json").read_text())
    assert checkpoint.verify(folder) == [] and checkpoint.choose(FORMAT_1) == (folder, [])
    assert json.loads((folder / "index.json").read_text())["format"] == 1
    engine = SplitEngine(Net(9, 3), World(), groups=(("body", 1.0), ("", 2.0)), frozen=["stem"])
    ema = [torch.zeros_like(flat.master) for flat in engine.flats()]
    rows = checkpoint.restore(folder, engine, ema).rows
    assert {row[1] for row in rows} == {"restored"}
    found = picture(engine, ema)
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema", "buffers", "frozen"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in found[kind].items():
            assert (value == np.array(expected[kind][name], dtype=value.dtype)).all(), (kind, name)
    assert found["steps"] == expected["steps"] and set(found["steps"].values()) == {2.0}
    full = dict(checkpoint.assemble(folder, which="weights"))
    assert full["head.weight"].flatten().tolist() == expected["master"]["head.weight"]


# ---------------------------------------------------------------------------------------------------- state of other shapes


def adafactor(groups):
    from timm.optim import AdafactorBigVision

    return AdafactorBigVision(groups, lr=1e-2, momentum=0.9, momentum_dtype=torch.bfloat16, min_dim_size_to_factor=4)


def lamb(groups):
    from timm.optim import Lamb

    return Lamb(groups, lr=1e-2)


@pytest.mark.parametrize("optimizer", [adafactor, lamb])
def test_state_of_whole_parameters_comes_back_bit_for_bit_with_its_types_and_shapes(tmp_path, optimizer):
    """Adafactor's rows, columns and bf16 momentum; LAMB's step, which its group holds. The next step is the same step."""
    wrote = WholeEngine(Net(1), optimizer)
    checkpoint.save(tmp_path, wrote, step=0, ema=None, extra={})
    wrote.train_a_little(1).train_a_little(2)
    folder = checkpoint.save(tmp_path, wrote, step=1, ema=None, extra={})
    assert checkpoint.verify(folder) == []
    reads = WholeEngine(Net(2), optimizer).train_a_little(9)
    rows = {row[0]: row[1:] for row in checkpoint.restore(folder, reads, None).rows}
    assert {status for status, _ in rows.values()} == {"restored"}
    for ours, theirs in zip(reads.flats(), wrote.flats(), strict=True):
        found, expected = reads.optimizer.state[ours.key], wrote.optimizer.state[theirs.key]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value) and found[key].shape == value.shape
    if optimizer is adafactor:
        dtypes = {value.dtype for state in wrote.optimizer.state.values() for value in state.values()}
        assert torch.bfloat16 in dtypes and rows["exp_avg"][1] == "bf16"
        assert rows["exp_avg_sq_r"][1] == "of its own shape"
    wrote.train_a_little(3), reads.train_a_little(3)
    assert all(torch.equal(a.master, b.master) for a, b in zip(wrote.flats(), reads.flats()))

    checkpoint.restore(tmp_path / "step-00000000", reads, None)
    assert not any(reads.optimizer.state.values()), "as before the first step"
    fresh = WholeEngine(Net(1), optimizer)
    fresh.train_a_little(1), reads.train_a_little(1)
    assert all(torch.equal(a.master, b.master) for a, b in zip(fresh.flats(), reads.flats()))


def test_state_of_whole_parameters_starts_anew_where_flats_are_cut(tmp_path):
    folder = checkpoint.save(tmp_path, WholeEngine(Net(1), adafactor).train_a_little(1), step=1, ema=None, extra={})
    cut_up = SplitEngine(Net(2), World(), optimizer=adafactor).train_a_little(4)
    rows = {row[0]: row[1:] for row in checkpoint.restore(folder, cut_up, None).rows}
    assert rows["optimizer state"][0] == "new" and "belongs to whole parameters" in rows["optimizer state"][1]
    assert not any(cut_up.optimizer.state.values())


def test_index_json_with_lies_is_refused(tmp_path):
    from tubelet.errors import CheckpointError

    folder = checkpoint.save(tmp_path, SplitEngine(Net(1), World()).train_a_little(1), step=1, ema=None, extra={})
    good = json.loads((folder / "index.json").read_text())
    assert good["layout"]["rule"] == "cut"
    for change, words in (({"layout": {**good["layout"], "rule": "spiral"}}, "layout rule 'spiral'"),
                          ({"names": [good["names"][0]] * len(good["names"])}, "named twice"),
                          ({"flats": good["flats"] * 2}, "1 flats have a place, 2 are described"),
                          ({"flats": [{**good["flats"][0], "dtypes": {"exp_avg": "load"}}]}, "types"),
                          ({"flats": [{**good["flats"][0], "shaped": {"row": [3]}}]}, "is not one parameter"),
                          ({"order": [*good["order"], "nobody"]}, "nobody: in the order and nowhere else"),
                          ({"groups": []}, "the groups' members are not the trained parameters")):
        (folder / "index.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=words):
            Index.read(folder)
