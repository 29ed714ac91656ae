"""The UniFormers of the papers: one literal table, and the names it registers. No torch here.

Paper: Li et al., ICLR 2022 (video) and TPAMI 2023 (image, dense prediction). The figure labels stage 3 with 256; every
released model has 320. The head width stands in no tensor's shape, so weights of another one load and answer wrongly:
it is part of the table, of every state dict's metadata and of the checks in uniformer.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_WIDTHS = (64, 128, 320, 512)
_LARGE = (128, 192, 448, 640)


class UniFormerRow(NamedTuple):
    """One released UniFormer."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    head_dim: int
    kwargs: dict[str, Any]
    """Further arguments of `uniformer.UniFormer` (or, with `light`, of `uniformer_light.UniFormerLight`)."""
    paper: str


_LIGHT = {"light": True, "mlp_ratio": 3.0, "stem": "overlapped_first"}
_LABELED = {"aux_head": True}
_VIDEO = {"ndim": 3}

UNIFORMERS = {
    #                                        depths         widths             head  further
    "uniformer_xxs":           UniFormerRow((2, 5,  8, 2), (56, 112, 224, 448), 28, _LIGHT, "UniFormer-XXS"),
    "uniformer_xs":            UniFormerRow((3, 5,  9, 3), (64, 128, 256, 512), 32, _LIGHT, "UniFormer-XS"),
    "uniformer_small":         UniFormerRow((3, 4,  8, 3), _WIDTHS, 64, {}, "UniFormer-S"),
    "uniformer_small_plus":    UniFormerRow((3, 5,  9, 3), _WIDTHS, 32, {"stem": "overlapped"}, "UniFormer-S dagger"),
    "uniformer_small_plus_dim64":
                               UniFormerRow((3, 5,  9, 3), _WIDTHS, 64, {"stem": "overlapped"},
                                            "UniFormer-S dagger, heads of 64"),
    "uniformer_base":          UniFormerRow((5, 8, 20, 7), _WIDTHS, 64, {}, "UniFormer-B"),
    "uniformer_base_ls":       UniFormerRow((5, 8, 20, 7), _WIDTHS, 64, {"layer_scale": "global"},
                                            "UniFormer-B, layer scale in the global blocks"),
    "uniformer_small_tl":      UniFormerRow((3, 4,  8, 3), _WIDTHS, 32, _LABELED, "UniFormer-S, token labeling"),
    "uniformer_small_dim64_tl": UniFormerRow((3, 4, 8, 3), _WIDTHS, 64, _LABELED,
                                             "UniFormer-S, token labeling, heads of 64"),
    "uniformer_small_plus_tl": UniFormerRow((3, 5,  9, 3), _WIDTHS, 32, {**_LABELED, "stem": "overlapped"},
                                            "UniFormer-S dagger, token labeling"),
    "uniformer_base_tl":       UniFormerRow((5, 8, 20, 7), _WIDTHS, 32, _LABELED, "UniFormer-B, token labeling"),
    "uniformer_large_ls_tl":   UniFormerRow((5, 10, 24, 7), _LARGE, 64, {**_LABELED, "layer_scale": "all"},
                                            "UniFormer-L, token labeling, layer scale"),
    "uniformer_video_small":   UniFormerRow((3, 4,  8, 3), _WIDTHS, 64, _VIDEO, "UniFormer-S (video)"),
    "uniformer_video_base":    UniFormerRow((5, 8, 20, 7), _WIDTHS, 64, _VIDEO, "UniFormer-B (video)"),
}  # fmt: skip


def uniformer_kwargs(name: str) -> dict[str, Any]:
    """Keyword arguments of `uniformer.create_uniformer` for one row."""
    row = UNIFORMERS[name]
    return {"depths": row.depths, "dims": row.dims, "head_dim": row.head_dim, **row.kwargs}


def uniformer_cfg(name: str) -> dict[str, Any]:
    """What timm's cfg says beside the defaults of names.py: pixels as the authors evaluate them, and the classifiers.

    The token-labeled runs took mean and std from timm, which changed them to 0.5 in version 0.4.12, the one that the
    authors' image code pins; with released weights that are short of their accuracy, try ImageNet's.
    """
    row = UNIFORMERS[name]
    cfg: dict[str, Any] = {"fixed_input_size": False, "first_conv": "patch_embed1.proj", "crop_pct": 0.875,
                           "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    if row.kwargs.get("stem"):
        cfg["first_conv"] = "patch_embed1.proj.0"
    if row.kwargs.get("aux_head"):
        cfg |= {"classifier": ("head", "aux_head"), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    if row.kwargs.get("light"):
        cfg["classifier"] = ("head", "head_cls")
    if row.kwargs.get("ndim") == 3:
        cfg |= {"num_classes": 400, "crop_pct": 1.0, "interpolation": "bilinear",
                "mean": (0.45,) * 3, "std": (0.225,) * 3}
    return cfg


ALIASES = {row.paper: name for name, row in UNIFORMERS.items()
           if name in ("uniformer_xxs", "uniformer_xs", "uniformer_small", "uniformer_small_plus", "uniformer_base")} | {
           "UniFormer-L": "uniformer_large_ls_tl"}


def rows() -> dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]]:
    """Name -> the fields of its `names.Entry`."""
    return {name: ("tubelet.models.uniformer", "create_uniformer", uniformer_kwargs(name), row.paper, uniformer_cfg(name))
            for name, row in UNIFORMERS.items()}
