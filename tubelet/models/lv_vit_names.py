"""LV-ViT and SuperViT: the papers' sizes and our names for them. No torch here.

Papers: LV-ViT (Jiang et al. 2021, table 1 of the released code), SuperViT (Lin et al. 2022, on DeiT-S and LV-ViT-S).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row of LV-ViT's size table; the MLP is three times as wide as the model everywhere."""

    width: int
    depth: int
    heads: int
    stem: int
    """Channels of the convolutions before the patches."""
    skip_lam: float
    """Residual branches are divided by this."""
    crop_pct: float
    paper: str


LV_VITS = {
    #                    width depth heads stem skip crop
    "lvvit_tiny":   Row(  240,  12,    4,   64,  1, 0.9, "LV-ViT-T"),
    "lvvit_small":  Row(  384,  16,    6,   64,  2, 0.9, "LV-ViT-S"),
    "lvvit_medium": Row(  512,  20,    8,   64,  2, 1.0, "LV-ViT-M"),
    "lvvit_large":  Row(  768,  24,   12,  128,  3, 1.0, "LV-ViT-L"),
}  # fmt: skip
SUPER_VITS = {"supervit_deit_small": "SuperViT-DeiT-S", "supervit_lvvit_small": "SuperViT-LV-ViT-S"}
ALIASES = {**{row.paper: name for name, row in LV_VITS.items()}, **{paper: name for name, paper in SUPER_VITS.items()}}

# ImageNet's own numbers, which these were trained with: (0.5, 0.5, 0.5) is for the ViT papers' weights.
_PICTURES: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def lv_vit_kwargs(row: Row) -> dict[str, Any]:
    """Keyword arguments of `lv_vit.LVViT` for one row."""
    return {"embed_dim": row.width, "depth": row.depth, "num_heads": row.heads, "mlp_ratio": 3.0, "qkv_bias": False,
            "stem": row.stem, "skip_lam": row.skip_lam}


def rows() -> dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]]:
    """name -> (module, function, keyword arguments, the paper's name, what the cfg has of its own)."""
    cfg = {**_PICTURES, "first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head")}
    found = {}
    for name, row in LV_VITS.items():
        found[name] = ("tubelet.models.lv_vit", "create_lv_vit", lv_vit_kwargs(row), row.paper,
                       {**cfg, "crop_pct": row.crop_pct})
    deit = {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0, "qkv_bias": True, "stem": 0, "skip_lam": 1,
            "aux_head": False, "norm_eps": 1e-6}
    lv_vit = {**lv_vit_kwargs(LV_VITS["lvvit_small"]), "aux_weight": 0.25, "norm_eps": 1e-5}
    for (name, paper), kwargs, own in zip(SUPER_VITS.items(), (deit, lv_vit), ({**_PICTURES, "crop_pct": 0.875}, cfg)):
        found[name] = ("tubelet.models.super_vit", "create_super_vit", kwargs, paper, own)
    return found
