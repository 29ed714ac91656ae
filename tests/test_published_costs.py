"""The cost columns that the papers print, within 1 % or their last printed digit; what does not agree is named, with why."""

import pytest

from tubelet.models.build import build_meta
from tubelet.models.cost import macs
from tubelet.models.settings import ModelSettings

MAP = {"class_token": False, "global_pool": "map"}


def vit(name):
    """"G/14" of the scaling paper's table 2: encoder alone, no class token, no pooling head, no classifier."""
    return f"ViT-{name}", {"class_token": False, "global_pool": "avg", "fc_norm": False}, 0


def clip(name, frames, **kwargs):
    return name, {"num_frames": frames, **kwargs}, 400


# (what the paper calls it, (name, arguments, classes), pixels, published value, last printed digit, operations per MAC,
#  whether its counter counts norms)
ROWS = [
    *((f"scaling paper, table 2: {name}", vit(name), size, value, 0.1, 2, False)
      for name, at_224, at_384 in [("s/28", 0.7, 2.0), ("s/16", 2.2, 7.8), ("S/32", 2.3, 6.9), ("Ti/16", 2.5, 9.5),
                                   ("B/32", 8.7, 26.0), ("S/16", 9.2, 31.2), ("B/28", 11.3, 30.5), ("B/16", 35.1, 111.3),
                                   ("L/16", 122.9, 382.8), ("g/14", 533.1, 1596.4), ("G/14", 965.3, 2859.9)]
      for size, value in ((224, at_224), (384, at_384))),
    ("ViViT, table 2: model 1", clip("vivit_base_patch16x2_joint", 32), 224, 455.2, 0.1, 1, False),
    ("ViViT, table 2: model 2", clip("vivit_base_patch16x2_factorised_encoder", 32), 224, 284.4, 0.1, 1, False),
    ("ViViT, table 2: model 3", clip("vivit_base_patch16x2_factorised_attention", 32), 224, 372.3, 0.1, 1, False),
    ("ViViT, table 2: model 4", clip("vivit_base_patch16x2_factorised_dot", 32), 224, 277.1, 0.1, 1, False),
    ("ViViT, table 2: average pool", clip("vivit_base_patch16x2_factorised_encoder", 32, temporal_depth=0), 224, 283.9, 0.1,
     1, False),
    ("ViViT-L/16x2 joint", clip("vivit_large_patch16x2_joint", 32), 224, 1446, 1, 1, False),
    ("ViViT-L/16x2 joint at 320", clip("vivit_large_patch16x2_joint", 32), 320, 3992, 1, 1, False),
    ("ViViT-H/14x2", clip("vivit_huge_patch14x2_joint", 32), 224, 8316, 1, 1, False),
    *((f"UniFormer, table: {name}", (f"uniformer_{name}", {}, 1000), size, value, digit, 1, True)
      for name, size, value, digit in [
          ("small", 224, 3.6, 0.1), ("small_plus", 224, 4.2, 0.1), ("base", 224, 8.3, 0.1), ("base_ls", 224, 8.3, 0.1),
          ("small_tl", 224, 3.6, 0.1), ("small_tl", 384, 11.9, 0.1), ("small_plus_tl", 384, 13.7, 0.1),
          ("base_tl", 384, 27.2, 0.1), ("large_ls_tl", 224, 12.6, 0.1), ("large_ls_tl", 384, 39.2, 0.1),
          ("xxs", 128, 0.43, 0.01), ("xxs", 160, 0.67, 0.01), ("xxs", 192, 0.96, 0.01), ("xxs", 224, 1.3, 0.1),
          ("xs", 192, 1.4, 0.1), ("xs", 224, 2.0, 0.1)]),
    ("UniFormer-S video, 16 frames", clip("uniformer_video_small", 16), 224, 41.8, 0.1, 1, True),
    ("UniFormer-B video, 16 frames", clip("uniformer_video_base", 16), 224, 96.7, 0.1, 1, True),
    ("UniFormer-B video, 32 frames", clip("uniformer_video_base", 32), 224, 259, 1, 1, True),
]

EXCEPTIONS = {
    "scaling paper, table 2: Ti/16": "small width: their count holds softmax and LayerNorm",
    "ViViT-H/14x2": "the TokenLearner paper's 8316 fits neither H/14x2 nor H/16x2 (2786, 3959); ViViT's own figure is 3981",
    "UniFormer, table: large_ls_tl": "the printed 12.6 and 39.2 are wrong, as the author says; 19.8 is right",
}


def disagrees(row):
    title, (name, kwargs, classes), size, value, digit, per_mac, norms = row
    model = build_meta(ModelSettings(name=name, img_size=size, num_classes=classes, kwargs=kwargs))
    found = per_mac * macs(model, size, norms=norms) / 1e9
    agrees = abs(found - value) <= max(0.01 * value, digit)
    return None if agrees else f"{title} at {size}: printed {value}, here {found:.3f}"


def test_published_costs_are_reached_but_for_the_named_exceptions():
    found = {row[0]: text for row in ROWS if (text := disagrees(row))}
    unknown = [text for title, text in found.items() if title not in EXCEPTIONS]
    assert not unknown, unknown
    assert set(found) <= set(EXCEPTIONS)
    needless = set(EXCEPTIONS) - set(found)
    assert not needless, f"these agree and need no exception: {needless}"


def test_the_right_figure_of_uniformer_l_is_reached():
    model = build_meta(ModelSettings(name="uniformer_large_ls_tl"))
    assert macs(model, norms=True) / 1e9 == pytest.approx(19.8, abs=0.05)
