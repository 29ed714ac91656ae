"""Which models there are: the papers' sizes, our registered names, the papers' names for them. No torch, no timm here.

Papers: ViT (Dosovitskiy et al. 2020, table 1; Ti and S from "How to train your ViT?", 2021), "Scaling Vision
Transformers" (Zhai et al. 2021, table 2: s, g, G), TokenLearner (Ryoo et al. 2021, tables 1-4).
Not here: what the names build (vit.py, token_learner.py) and timm's own names, which all work too.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tubelet.errors import ConfigError, nearest
from tubelet.models import lv_vit_names, uniformer_names, vivit_names


class Size(NamedTuple):
    """One row of the papers' size tables."""

    word: str
    """timm's word for it. The scaling paper's lower-case "s" has none there; here it is "xsmall"."""
    width: int
    depth: int
    mlp: int
    heads: int


SIZES = {
    #             word        width depth  mlp  heads
    "s":  Size("xsmall",        256,  6, 1024,  8),
    "Ti": Size("tiny",          192, 12,  768,  3),
    "S":  Size("small",         384, 12, 1536,  6),
    "B":  Size("base",          768, 12, 3072, 12),
    "L":  Size("large",        1024, 24, 4096, 16),
    "H":  Size("huge",         1280, 32, 5120, 16),
    "g":  Size("giant",        1408, 40, 6144, 16),
    "G":  Size("gigantic",     1664, 48, 8192, 16),
}  # fmt: skip

# Plain ViTs that timm does not have (class token, token pooling; `vit.HEADS` says how to get GAP or a MAP head).
PLAIN = (("s", 16), ("s", 28), ("B", 28), ("L", 10), ("L", 8))


class TokenLearnerRow(NamedTuple):
    """One TokenLearner ViT of the papers' tables."""

    size: str
    patch: int
    num_tokens: int
    at: int
    depth: int
    fuser: bool
    img_size: int
    """Pixels at which the paper gives its cost."""
    gmacs: float | None
    """Published "GFLOPS", which are multiply-adds in 1e9; None where the paper gives none."""
    paper: str


# "S-TL at l (24+11)" in the paper = S tokens after l blocks, 35 blocks in all. Each row is registered with the v1.1
# module and, with `_v10`, with the one that the paper's tables were made with.
TOKEN_LEARNERS = (
    #               size   P   S  at depth fuser  px  GMACs
    TokenLearnerRow("S",  32,  8,  6, 12, False, 384,   1.9, "table 1: TokenLearner S/32"),
    TokenLearnerRow("S",  32,  8, 11, 22, False, 384,   3.3, "table 1: TokenLearner S/32 (22)"),
    TokenLearnerRow("B",  32,  8, 10, 20, False, 384,  11.5, "table 1: TokenLearner B/32 (20)"),
    TokenLearnerRow("B",  16,  8,  6, 12, False, 384,  28.3, "tables 1, 4: TokenLearner B/16"),
    TokenLearnerRow("B",  16, 16,  6, 12, False, 384,  28.7, "table 4: 16-TokenLearner B/16"),
    TokenLearnerRow("B",  16,  8, 10, 21, False, 384,  47.1, "table 1: TokenLearner B/16 (21)"),
    TokenLearnerRow("B",  16, 16, 10, 21, False, 384,  47.7, "table 1: 16-TokenLearner B/16 (21)"),
    TokenLearnerRow("B",  16,  8,  6, 12, True,  384,  28.5, "table 4: TokenLearner B/16 with TokenFuser"),
    TokenLearnerRow("B",  16, 16,  6, 12, True,  384,  29.1, "table 4: 16-TokenLearner B/16 with TokenFuser"),
    TokenLearnerRow("B",  16, 16,  9, 12, False, 224,  13.6, "released ImageNet-1k config; figure 4 at 0.75"),
    TokenLearnerRow("L",  16, 16, 12, 24, False, 512, 184.6, "tables 4, 5: 16-TokenLearner L/16"),
    TokenLearnerRow("L",  16, 16, 12, 35, False, 512, 186.8, "table 2: 16-TokenLearner L/16 (24+11)"),
    TokenLearnerRow("L",  16,  8, 18, 24, False, 512, 273.2, "table 4: 8-TokenLearner L/16"),
    TokenLearnerRow("L",  16,  8, 18, 30, False, 512, 274.2, "table 2: 8-TokenLearner L/16 (24+6)"),
    TokenLearnerRow("L",  16, 16, 12, 24, True,  512, 187.1, "table 4: 16-TokenLearner L/16 with TokenFuser"),
    TokenLearnerRow("L",  16,  8, 18, 24, True,  512, 273.8, "table 4: 8-TokenLearner L/16 with TokenFuser"),
    TokenLearnerRow("L",  14, 16, 18, 35, False, 512, 361.6, "table 2: 16-TokenLearner L/14 (24+11)"),
    TokenLearnerRow("L",  10, 16, 18, 35, False, 512, 849.0, "tables 3, 4: 16-TokenLearner L/10 (24+11)"),
    TokenLearnerRow("L",  10, 16, 18, 35, True,  512, 856.9, "table 4: 16-TokenLearner L/10 (24+11) with TokenFuser"),
    TokenLearnerRow("L",   8, 16, 18, 35, False, 512,  None, "table 3: 16-TokenLearner L/8 (24+11)"),
    TokenLearnerRow("Ti", 16,  8,  6, 12, False, 224,  None, "not in the paper; for trying things out"),
)  # fmt: skip

# Hybrids and BiT ResNets of the papers that timm has no name for: blocks a stage, size of the ViT or width factor.
HYBRIDS = {"vit_base_r50_s32_224": ("B", (3, 4, 6, 3), "R50+ViT-B/32"),
           "vit_large_r50_s16_224": ("L", (3, 4, 9), "R50+ViT-L/16")}
BITS = {"resnetv2_50x2_bit": (2, (3, 4, 6, 3), "BiT-R50x2"), "resnetv2_152x1_bit": (1, (3, 8, 36, 3), "BiT-R152x1"),
        "resnetv2_200x3_bit": (3, (3, 24, 36, 3), "BiT-R200x3")}

# Names of the papers that follow no pattern -> timm.
ALIASES = {
    **{paper: name for name, (_, _, paper) in (HYBRIDS | BITS).items()},
    "R+ViT-Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+ViT-S/32": "vit_small_r26_s32_224",
    "R26+ViT-B/32": "vit_base_r26_s32_224",
    "R50+ViT-B/16": "vit_base_r50_s16_224",
    "R50+ViT-L/32": "vit_large_r50_s32_224",
    **lv_vit_names.ALIASES,
    **uniformer_names.ALIASES,
    **vivit_names.ALIASES,
    **{f"BiT-{x}": f"resnetv2_{x[1:]}_bit" for x in ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")},
}

_PAPER_NAME = re.compile(r"(?:vit-)?([a-z]{1,2})/(\d+)", re.IGNORECASE)
_TOKEN_LEARNER_NAME = re.compile(
    r"vit_(?P<word>[a-z]+)_patch(?P<patch>\d+)_tokenlearner(?P<tokens>\d+)(?:_at(?P<at>\d+))?(?:_d(?P<depth>\d+))?"
    r"(?P<v10>_v10)?(?P<fuser>_fuser)?_224")


def token_learner_name(row: TokenLearnerRow, version: str = "1.1") -> str:
    """`vit_{size}_patch{P}_tokenlearner{S}[_at{K}][_d{L}][_v10][_fuser]_224`; K is left out when it is half of L
    (rounded down), L when it is the size's own."""
    size = SIZES[row.size]
    parts = [f"vit_{size.word}_patch{row.patch}_tokenlearner{row.num_tokens}",
             f"at{row.at}" if row.at != row.depth // 2 else "",
             f"d{row.depth}" if row.depth != size.depth else "",
             "v10" if version == "1.0" else "", "fuser" if row.fuser else "", "224"]
    return "_".join(part for part in parts if part)


class Entry(NamedTuple):
    """What a registered name builds: `getattr(import_module(module), function)(**kwargs)`."""

    module: str
    function: str
    kwargs: dict[str, Any]
    paper: str
    cfg: Mapping[str, Any] = MappingProxyType({})
    """What the model's `pretrained_cfg` has of its own."""


@functools.cache
def entries() -> dict[str, Entry]:
    """Every name registered here, in the order of the tables."""
    found: dict[str, Entry] = {}
    for letter, patch in PLAIN:
        size = SIZES[letter]
        found[f"vit_{size.word}_patch{patch}_224"] = Entry(
            "tubelet.models.vit", "create_vit", {"size": letter, "patch_size": patch}, f"ViT-{letter}/{patch}")
    for row in TOKEN_LEARNERS:
        for version in ("1.1", "1.0"):
            kwargs = {"size": row.size, "patch_size": row.patch, "num_tokens": row.num_tokens, "at": row.at,
                      "depth": row.depth, "version": version, "fuser": row.fuser}
            found[token_learner_name(row, version)] = Entry(
                "tubelet.models.token_learner", "create_token_learner_vit", kwargs, row.paper)
    for name, (size, layers, paper) in HYBRIDS.items():
        found[name] = Entry("tubelet.models.hybrid", "create_hybrid", {"size": size, "layers": layers}, paper,
                            {"first_conv": "patch_embed.backbone.stem.conv"})
    for name, (width, layers, paper) in BITS.items():
        found[name] = Entry("tubelet.models.hybrid", "create_bit", {"width_factor": width, "layers": layers}, paper,
                            {"first_conv": "stem.conv", "classifier": "head.fc", "fixed_input_size": False,
                             "interpolation": "bilinear", "crop_pct": 0.875, "pool_size": (7, 7)})
    found |= {name: Entry(*row) for name, row in lv_vit_names.rows().items()}
    found |= {name: Entry(*row) for name, row in uniformer_names.rows().items()}
    found |= {name: Entry(*row) for name, row in vivit_names.rows().items()}
    return found


def _entry_point(name: str, entry: Entry) -> Callable[..., Any]:
    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        build = getattr(importlib.import_module(entry.module), entry.function)
        if "at" in entry.kwargs and "depth" in kwargs:  # another depth keeps the TokenLearner at its share of the blocks
            kwargs.setdefault("at", entry.kwargs["at"] * kwargs["depth"] // entry.kwargs["depth"])
        return build(name, pretrained=pretrained, **{**entry.kwargs, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = entry.paper
    return create


default_cfgs: dict[str, Any] = {}  # timm's `register_model` reads it from the module of the entry point


def register() -> None:
    """Register our names with timm, once; names that timm has itself by now are left to it."""
    from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
    from timm.models import generate_default_cfgs, is_model, register_model

    cfg = {"url": "", "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "crop_pct": 0.9,
           "interpolation": "bicubic", "mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD,
           "first_conv": "patch_embed.proj", "classifier": "head"}
    for name, entry in entries().items():
        if not is_model(name):
            default_cfgs.update(generate_default_cfgs({name: {**cfg, **entry.cfg}}))
            globals()[name] = register_model(_entry_point(name, entry))  # where timm expects an entry point to be


def paper_name(name: str) -> str:
    """The papers' short name of a registered or timm model ("ViT-L/16"), "" when it has none."""
    if name in entries():
        return entries()[name].paper
    match = re.fullmatch(r"vit_([a-z]+)_patch(\d+)_\d+", name)
    letter = next((key for key, size in SIZES.items() if match and size.word == match[1]), None)
    return f"ViT-{letter}/{match[2]}" if match and letter else ""


def resolve_name(name: str) -> str:
    """A paper's name ("ViT-L/16", "L/8", "R50+ViT-B/16"), ours or timm's (with or without tag) -> the name timm knows.

    "s" and "S", "g" and "G" are different models in the scaling paper and here; other letters are read in any case.
    Raises `ConfigError` with the nearest known names.
    """
    if name in entries():
        return name
    known = name
    if name in ALIASES:
        known = ALIASES[name]
    elif match := _PAPER_NAME.fullmatch(name):
        letter = next((key for key in SIZES if key == match[1]),
                      next((key for key in SIZES if key.lower() == match[1].lower()), None))
        if letter is not None:
            known = f"vit_{SIZES[letter].word}_patch{match[2]}_224"
    if known in entries():
        return known
    import timm

    if timm.is_model(known.split(".")[0]):
        return known
    raise ConfigError(f"`model.name` = {name!r} is not a model.", _how_to_get(name, known, timm.list_models()))


def _how_to_get(name: str, known: str, timm_names: list[str]) -> str:
    wanted = _TOKEN_LEARNER_NAME.fullmatch(known)
    size = next((size for size in SIZES.values() if wanted and size.word == wanted["word"]), None)
    if wanted and size:
        depth = int(wanted["depth"] or size.depth)
        kwargs = {"patch_size": int(wanted["patch"]), "num_tokens": int(wanted["tokens"]), "depth": depth,
                  "at": int(wanted["at"] or depth // 2), "version": "1.0" if wanted["v10"] else "1.1",
                  "fuser": bool(wanted["fuser"])}
        base = nearest(known, [key for key in entries() if key.startswith(f"vit_{size.word}_") and "tokenl" in key])
        if base:
            return f"model.name={base[0]} model.kwargs={kwargs!r}; `tubelet models tokenlearner` lists those with a name"
    if known != name:  # a paper's size with a patch size nobody published
        stem = known.split("_patch")[0]
        patches = sorted({key for key in (*entries(), *timm_names) if re.fullmatch(rf"{stem}_patch\d+_224", key)},
                         key=lambda key: int(key.split("_patch")[1].split("_")[0]))
        if patches:
            patch = known.split("_patch")[1].split("_")[0]
            return f"one of {', '.join(patches)}, or one of them with model.kwargs={{patch_size: {patch}}}"
    papers = [f"ViT-{letter}/{patch}" for letter in SIZES for patch in (8, 14, 16, 28, 32)]
    close = nearest(name, [*ALIASES, *entries(), *timm_names, *papers], 3)
    return f"{' or '.join(close)}; " * bool(close) + "`tubelet models` lists ours, `timm.list_models()` all"
