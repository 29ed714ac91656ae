"""Which ViViTs and TimeSformers have a name, and what their inputs are. No torch, no timm here.

Papers: ViViT (Arnab et al. 2021, tables 2 and 6), TimeSformer (Bertasius et al. 2021, section 4).
Not here: other depths, frames and samplings, which are keyword arguments of any of them.
"""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, dict[str, Any], str, dict[str, Any]]

# Large model 2 has 4 temporal blocks as the paper says "for all experiments"; the released Kinetics configs set 24
# (`temporal_depth=24`), and the paper's GFLOPs lie nearer to those.
VIVITS = (
    #  size patch factorisation  word                   paper
    ("B", 16, "joint",     "joint",               "ViViT-B/16x2, model 1: spatio-temporal attention"),
    ("B", 16, "encoder",   "factorised_encoder",  "ViViT-B/16x2 FE, model 2: factorised encoder"),
    ("B", 16, "attention", "factorised_attention", "ViViT-B/16x2, model 3: factorised self-attention"),
    ("B", 16, "dot",       "factorised_dot",      "ViViT-B/16x2, model 4: factorised dot-product attention"),
    ("L", 16, "joint",     "joint",               "ViViT-L/16x2, model 1: spatio-temporal attention"),
    ("L", 16, "encoder",   "factorised_encoder",  "ViViT-L/16x2 FE, model 2: factorised encoder"),
    ("L", 16, "attention", "factorised_attention", "ViViT-L/16x2, model 3: factorised self-attention"),
    ("L", 16, "dot",       "factorised_dot",      "ViViT-L/16x2, model 4: factorised dot-product attention"),
    ("H", 14, "joint",     "joint",               "ViViT-H/14x2, model 1: spatio-temporal attention"),
)  # fmt: skip
WORDS = {"B": "base", "L": "large", "H": "huge"}

TIMESFORMERS = (
    ("divided", "TimeSformer: divided space-time attention"),
    ("joint", "TimeSformer: joint space-time attention"),
    ("space", "TimeSformer: space-only attention"),
)

# Short names of the papers; ViViT's paper writes model 1 without a word behind the size.
ALIASES = {
    "ViViT-B/16x2": "vivit_base_patch16x2_joint", "ViViT-B/16x2 FE": "vivit_base_patch16x2_factorised_encoder",
    "ViViT-L/16x2": "vivit_large_patch16x2_joint", "ViViT-L/16x2 FE": "vivit_large_patch16x2_factorised_encoder",
    "ViViT-H/14x2": "vivit_huge_patch14x2_joint", "TimeSformer": "timesformer_base_divided",
}


def rows() -> dict[str, Row]:
    """Name -> (module, function, keyword arguments, paper, cfg)."""
    clips = {"num_classes": 400, "fixed_input_size": False, "crop_pct": 0.875, "interpolation": "bilinear"}
    found: dict[str, Row] = {}
    for size, patch, factorisation, word, paper in VIVITS:
        found[f"vivit_{WORDS[size]}_patch{patch}x2_{word}"] = (
            "tubelet.models.vivit", "create_vivit", {"size": size, "patch_size": patch, "factorisation": factorisation},
            paper, {**clips, "input_size": (3, 32, 224, 224)})
    pictures = {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225), "input_size": (3, 8, 224, 224)}
    for attention, paper in TIMESFORMERS:
        found[f"timesformer_base_{attention}"] = (
            "tubelet.models.timesformer", "create_timesformer", {"size": "B", "patch_size": 16, "attention": attention},
            paper, {**clips, **pictures})
    return found
