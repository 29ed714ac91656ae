"""State dicts as the papers' authors name and shape them, and back: `official_state_dict` and `load_official`.

Models that know their authors' layout (methods `official_state_dict()` and `load_official(state)`) are asked. Known
here, as torch tensors with the shapes of the JAX arrays: ViT and hybrids (google-research/vision_transformer and
big_vision), TokenLearner (scenic), BiT ResNets (big_transfer). For every other model timm's names are the official ones.

Written: vision_transformer's numbering of layers for ViTs, big_vision's for those with MAP head, scenic's for
TokenLearner. All three, their prefixes and stacked (scanned) blocks are read, and so is a state dict with timm's names.
Reading a file: weights.read_weights.

Legend: N tokens, D width, h heads, d head width, O I channels out and in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tubelet.errors import CheckpointError, Problems
from tubelet.models.token_learner import TokenLearnerV10, TokenLearnerViT
from tubelet.models.weights import Report, Row, load_weights

Layout = Literal["vision_transformer", "big_vision", "scenic"]
State = dict[str, torch.Tensor]


class Rule(NamedTuple):
    """One of our tensors and what it is called, and how it lies, in the authors' files."""

    name: str
    keys: tuple[str, ...]
    """More than one when ours holds several projections on top of each other."""
    kind: Literal["same", "conv", "dense", "heads", "out"] = "same"
    """conv: [O, I, h, w] <-> [h, w, I, O]. dense: [O, I] <-> [I, O]. heads: [h * d, D] <-> [D, h, d] and, for biases,
    [h * d] <-> [h, d], once per key. out: [D, h * d] <-> [h, d, D]."""
    heads: int = 0


def official_state_dict(model: nn.Module, layout: Layout | None = None) -> State:
    """The model's weights under the authors' names and in their shapes (copies, in the model's types).

    `layout` is for ViTs and the like only; None takes the one that the model's family was published in.
    """
    if hasattr(model, "official_state_dict"):
        return model.official_state_dict()  # type: ignore[operator]
    own, rules = model.state_dict(), _rules(model)
    if rules is None:
        return {name: tensor.detach().clone() for name, tensor in own.items()}
    layout = layout or _published_layout(model)
    found: State = {}
    for rule in rules:
        for key, part in zip(rule.keys, _split(rule, own[rule.name])):
            found[_in_layout(key, layout)] = part.detach().clone(memory_format=torch.contiguous_format)
    return found


def load_official(model: nn.Module, state: Mapping[str, torch.Tensor], **options: Any) -> Report:
    """Load weights in the authors' naming and shapes: the inverse of `official_state_dict`.

    Returns the table of what was done; `options` are those of `weights.load_weights` (method, head, ...), which resizes
    position tables and replaces classifiers. Raises `CheckpointError` that lists all that does not fit; nothing has
    been changed then.
    """
    if hasattr(model, "load_official"):
        report = model.load_official(state)  # type: ignore[operator]
        return report if isinstance(report, Report) else Report([Row(key, "loaded", "") for key in state])
    options.setdefault("allow_new", (r"\.num_batches_tracked$",))  # a counter, which no output depends on
    return load_weights(model, state, **options)


def is_jax_layout(state: Mapping[str, Any]) -> bool:
    """Whether these names are those of a flattened JAX tree (slashes between levels)."""
    return any("/" in key for key in state)


def from_jax(model: nn.Module, state: Mapping[str, torch.Tensor], report: Report) -> State:
    """Weights with JAX names and shapes -> timm's names and shapes, as far as this model has them.

    What is left out is added to `report`; what does not fit this model's tree is one `CheckpointError`.
    """
    rules = _rules(model)
    if rules is None:
        raise CheckpointError(f"These weights are named as the JAX code of ViT, TokenLearner or BiT names them "
                              f"(`{next(iter(state))}`), a layout that {_architecture(model)} does not have.",
                              "a model of those families (with class_token, fc_norm and the like as they have them)")
    given = _canonical(state, report)
    if any(key.startswith("pre_logits/") for key in given):  # the classifier stands on this layer
        for key in [key for key in given if key.startswith(("pre_logits/", "head/"))]:
            report.rows.append(Row(key, "dropped", f"{list(given.pop(key).shape)}, the representation layer and what stands "
                                                   "on it are not built here"))
    _fit_class_row(model, given, report)
    problems, found, depths = Problems(CheckpointError, "These weights do not fit the model:"), {}, _depths(given, rules)
    if depths:
        problems.add(f"The weights have {depths[0]} blocks, the model has {depths[1]}.", f"model.kwargs.depth={depths[0]}")
    for rule in rules:
        parts = [given.pop(key, None) for key in rule.keys]
        held = [part for part in parts if part is not None]
        if len(held) == len(parts):
            _join(rule, held, found, problems)
        elif held:
            absent = [key for key, part in zip(rule.keys, parts) if part is None]
            problems.add(f"`{absent[0]}` is not in the weights, but `{rule.keys[0].rpartition('/')[0]}` is.",
                         "copy the file again; it may be cut short")
    problems.raise_if_any()
    return found | given  # what no rule took is unexpected, and said so by load_weights


# --------------------------------------------------------------------------------------------- who is called what


def _architecture(model: nn.Module) -> str:
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _published_layout(model: nn.Module) -> Layout:
    if isinstance(model, TokenLearnerViT):
        return "scenic"
    return "big_vision" if getattr(model, "attn_pool", None) is not None else "vision_transformer"


def _rules(model: nn.Module) -> list[Rule] | None:
    """A rule for every tensor of the model, or None when its official names are timm's."""
    if isinstance(model, VisionTransformer) and not _architecture(model).startswith("deit"):  # DeiT's authors wrote torch
        rules = [*_vit_rules(model)]
    elif isinstance(model, ResNetV2) and _architecture(model).endswith("_bit"):
        rules = [*_bit_rules(model)]
    else:
        return None
    return rules if {rule.name for rule in rules} == set(model.state_dict()) else None


def _norm(name: str, key: str, scale: str = "scale", bias: str = "bias") -> Iterator[Rule]:
    yield Rule(f"{name}.weight", (f"{key}/{scale}",))
    yield Rule(f"{name}.bias", (f"{key}/{bias}",))


def _layer(name: str, key: str, kind: Literal["conv", "dense"] = "dense") -> Iterator[Rule]:
    yield Rule(f"{name}.weight", (f"{key}/kernel",), kind)
    yield Rule(f"{name}.bias", (f"{key}/bias",))


def _attention(name: str, key: str, heads: int, fused: dict[str, tuple[str, ...]]) -> Iterator[Rule]:
    for ours, theirs in fused.items():
        for leaf, official in (("weight", "kernel"), ("bias", "bias")):
            yield Rule(f"{name}.{ours}.{leaf}", tuple(f"{key}/{part}/{official}" for part in theirs), "heads", heads)
    yield Rule(f"{name}.proj.weight", (f"{key}/out/kernel",), "out", heads)
    yield Rule(f"{name}.proj.bias", (f"{key}/out/bias",))


def _vit_rules(model: Any) -> Iterator[Rule]:
    """In vision_transformer's numbering; `_in_layout` renumbers."""
    if hasattr(model.patch_embed, "backbone"):
        yield from _hybrid_rules(model.patch_embed.backbone)
    yield from _layer("patch_embed.proj", "embedding", "conv")
    if model.cls_token is not None:
        yield Rule("cls_token", ("cls",))
    yield Rule("pos_embed", ("Transformer/posembed_input/pos_embedding",))
    for number, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{number}", f"Transformer/encoderblock_{number}"
        yield from _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        yield from _attention(f"{ours}.attn", f"{theirs}/MultiHeadDotProductAttention_1", block.attn.num_heads,
                              {"qkv": ("query", "key", "value")})
        yield from _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2")
        for layer in (0, 1):
            yield from _layer(f"{ours}.mlp.fc{layer + 1}", f"{theirs}/MlpBlock_3/Dense_{layer}")
    if isinstance(model, TokenLearnerViT):
        yield from _token_rules(model)
    yield from _norm("norm", "Transformer/encoder_norm")
    if model.attn_pool is not None:
        yield Rule("attn_pool.latent", ("MAPHead_0/probe",))
        yield from _attention("attn_pool", "MAPHead_0/MultiHeadDotProductAttention_0", model.attn_pool.num_heads,
                              {"q": ("query",), "kv": ("key", "value")})
        yield from _norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for layer in (0, 1):
            yield from _layer(f"attn_pool.mlp.fc{layer + 1}", f"MAPHead_0/MlpBlock_0/Dense_{layer}")
    if isinstance(model.head, nn.Linear):
        yield from _layer("head", "head")


def _token_rules(model: TokenLearnerViT) -> Iterator[Rule]:
    for number, learner in enumerate(model.token_learners):
        old = isinstance(learner, TokenLearnerV10)
        ours, theirs = f"token_learners.{number}", f"Transformer/TokenLearnerModule{'' if old else 'V11'}_{number}"
        yield from _norm(f"{ours}.norm", f"{theirs}/LayerNorm_0")
        if old:
            for layer in range(4):
                yield Rule(f"{ours}.attention.{2 * layer}.weight", (f"{theirs}/Conv_{layer}/kernel",), "conv")
        else:
            for layer in (0, 1):
                yield from _layer(f"{ours}.mlp.fc{layer + 1}", f"{theirs}/token_masking/Dense_{layer}")
    for number in range(len(model.token_fusers)):
        ours, theirs = f"token_fusers.{number}", f"Transformer/TokenFuser_{number}"
        yield from _norm(f"{ours}.norm1", f"{theirs}/fuser_mix_norm1")
        yield from _layer(f"{ours}.mix", f"{theirs}/Dense_0")
        yield from _norm(f"{ours}.norm2", f"{theirs}/fuser_mix_norm2")
        yield from _norm(f"{ours}.norm", f"{theirs}/LayerNorm_0")
        for layer in (0, 1):
            yield from _layer(f"{ours}.mlp.fc{layer + 1}", f"{theirs}/token_masking/Dense_{layer}")


def _hybrid_rules(backbone: Any) -> Iterator[Rule]:
    stem = "patch_embed.backbone" + (".stem" if hasattr(backbone, "stem") else "")  # R+ViT-Ti/16 has the stem alone
    yield Rule(f"{stem}.conv.weight", ("conv_root/kernel",), "conv")
    yield from _norm(f"{stem}.norm", "gn_root")
    for i, stage in enumerate(getattr(backbone, "stages", ())):
        for j, block in enumerate(stage.blocks):
            ours, theirs = f"patch_embed.backbone.stages.{i}.blocks.{j}", f"block{i + 1}/unit{j + 1}"
            for layer in (1, 2, 3):
                yield Rule(f"{ours}.conv{layer}.weight", (f"{theirs}/conv{layer}/kernel",), "conv")
                yield from _norm(f"{ours}.norm{layer}", f"{theirs}/gn{layer}")
            if block.downsample is not None:
                yield Rule(f"{ours}.downsample.conv.weight", (f"{theirs}/conv_proj/kernel",), "conv")
                yield from _norm(f"{ours}.downsample.norm", f"{theirs}/gn_proj")


def _bit_rules(model: Any) -> Iterator[Rule]:
    conv = "standardized_conv2d/kernel"
    yield Rule("stem.conv.weight", (f"resnet/root_block/{conv}",), "conv")
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            ours, theirs = f"stages.{i}.blocks.{j}", f"resnet/block{i + 1}/unit{j + 1:02d}"
            for layer, letter in enumerate("abc", 1):
                yield Rule(f"{ours}.conv{layer}.weight", (f"{theirs}/{letter}/{conv}",), "conv")
                yield from _norm(f"{ours}.norm{layer}", f"{theirs}/{letter}/group_norm", "gamma", "beta")
            if block.downsample is not None:
                yield Rule(f"{ours}.downsample.conv.weight", (f"{theirs}/a/proj/{conv}",), "conv")
    yield from _norm("norm", "resnet/group_norm", "gamma", "beta")
    if isinstance(model.head.fc, nn.Conv2d):
        yield from _layer("head.fc", "resnet/head/conv2d", "conv")


# ------------------------------------------------------------------------------------------------ numbering, shapes


_POS = "Transformer/posembed_input/pos_embedding"
_RENUMBER = (("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"), ("LayerNorm_2", "LayerNorm_1"),
             ("MlpBlock_3", "MlpBlock_0"))


def _in_layout(key: str, layout: Layout) -> str:
    if layout == "vision_transformer":
        return key
    if key.startswith("Transformer/encoderblock_"):
        for theirs, other in _RENUMBER:
            key = key.replace(theirs, other)
    if layout == "big_vision":
        return "pos_embedding" if key == _POS else key
    return re.sub(r"^head/", "output_projection/", key)


def _canonical(state: Mapping[str, torch.Tensor], report: Report) -> State:
    """Any of the three layouts, with any of their prefixes, stacked or not -> vision_transformer's numbering."""
    prefix = next((p for p in ("opt/target/", "optimizer/target/", "params/img/", "params/", "img/")
                   if f"{p}embedding/kernel" in state), "")
    found: State = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            report.rows.append(Row(name, "dropped", f"not under {prefix}, so no weight of this model"))
            continue
        key = re.sub(r"^output_projection/", "head/", name.removeprefix(prefix))
        key = _POS if key == "pos_embedding" else key
        if key.startswith("Transformer/encoderblock"):
            for theirs, other in _RENUMBER:
                key = key.replace(other, theirs)
        if key.startswith("Transformer/encoderblock/"):  # scanned: all blocks in one array, block by block
            rest = key.removeprefix("Transformer/encoderblock/")
            found |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(tensor)}
        else:
            found[key] = tensor
    return found


def _fit_class_row(model: nn.Module, given: State, report: Report) -> None:
    """Newer big_vision checkpoints add positions to the patches only; the older ones (and timm) to the class token too.
    Both say the same once the class token's row is zero, or added to the token."""
    table, token = given.get(_POS), given.get("cls")
    if table is None or token is None or getattr(model, "cls_token", None) is None:
        return
    table = table.reshape(1, *table.shape[-2:]) if table.ndim == 2 else table
    square = [math.isqrt(count) ** 2 == count for count in (table.shape[1], table.shape[1] - 1)]
    if getattr(model, "no_embed_class", False) and square == [False, True]:
        given["cls"], given[_POS] = token + table[:, :1].to(token.dtype), table[:, 1:]
        report.rows.append(Row("pos_embed[0]", "dropped", "added to the class token instead, which comes to the same"))
    elif not getattr(model, "no_embed_class", False) and square == [True, False]:
        given[_POS] = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
        report.rows.append(Row("pos_embed[0]", "new", "zero: these weights add no position to the class token"))


def _depths(given: State, rules: list[Rule]) -> tuple[int, int] | None:
    """Blocks of the weights and of the model, when they differ."""
    pattern = re.compile(r"Transformer/encoderblock_(\d+)/")
    counts = [len({match[1] for key in keys if (match := pattern.match(key))})
              for keys in (given, [key for rule in rules for key in rule.keys])]
    return (counts[0], counts[1]) if counts[0] and counts[0] != counts[1] else None


def _split(rule: Rule, tensor: torch.Tensor) -> list[torch.Tensor]:
    if rule.kind == "conv":
        return [tensor.permute(2, 3, 1, 0)]
    if rule.kind == "dense":
        return [tensor.T]
    if rule.kind == "out":
        return [tensor.T.unflatten(0, (rule.heads, -1))]
    if rule.kind == "heads":
        parts = tensor.chunk(len(rule.keys))
        return [(part.T.unflatten(1, (rule.heads, -1)) if part.ndim == 2 else part.unflatten(0, (rule.heads, -1)))
                for part in parts]
    return [tensor]


def _join(rule: Rule, parts: list[torch.Tensor], found: State, problems: Problems) -> None:
    wanted = {"conv": 4, "dense": 2, "out": 3, "heads": 3 if rule.name.endswith("weight") else 2}.get(rule.kind)
    for key, part in zip(rule.keys, parts):
        if wanted and part.ndim != wanted:
            problems.add(f"`{key}` has shape {list(part.shape)}; it must have {wanted} dimensions.",
                         "the authors' own file, unchanged")
            return
        heads = part.shape[{"heads": -2, "out": 0}[rule.kind]] if rule.heads else 0
        if heads != rule.heads:  # the product may agree; loading it would scramble the heads without a word
            problems.add(f"`{key}` has {heads} heads, the model has {rule.heads}.", f"model.kwargs.num_heads={heads}")
            return
    if rule.kind == "conv":
        found[rule.name] = parts[0].permute(3, 2, 0, 1)
    elif rule.kind == "dense":
        found[rule.name] = parts[0].T
    elif rule.kind == "out":
        found[rule.name] = parts[0].flatten(0, 1).T
    elif rule.kind == "heads":
        found[rule.name] = torch.cat([part.flatten(-2).T if part.ndim == 3 else part.flatten() for part in parts])
    else:  # some files keep a scale as [1, 1, 1, O], and a position table as [N, D]
        part = parts[0]
        if part.ndim == 4 and part.shape[:3] == (1, 1, 1):
            part = part.flatten()
        found[rule.name] = part.unsqueeze(0) if rule.name == "pos_embed" and part.ndim == 2 else part
