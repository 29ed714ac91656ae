"""ViViT's weights under the names and in the shapes of the authors' code (google-research/scenic), and back.

As torch tensors, levels of the JAX tree joined by slashes: kernels are [t, h, w, I, O], [I, O] and [D, h, d]. Model 2's
two encoders are `SpatialTransformer` and `TemporalTransformer` there. Not here: what the blocks' parts are called in
detail, which ViT, TokenLearner and ViViT share (official.py).

Legend: D width, h heads, d head width, I O channels in and out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tubelet.errors import CheckpointError, Problems
from tubelet.models.official import Rule, State, _attention, _join, _layer, _norm, _split, _token_rules
from tubelet.models.weights import Report, load_weights

_KERNEL = "patch_embed.proj.weight"


def official_state_dict(model: Any) -> State:
    """The weights of a ViViT as copies, in the model's types."""
    own, found = model.state_dict(), {}
    for rule in _rules(model):
        parts = [_kernel_out(model, own[_KERNEL])] if rule.name == _KERNEL else _split(rule, own[rule.name])
        for key, part in zip(rule.keys, parts):
            found[key] = part.detach().clone(memory_format=torch.contiguous_format)
    return found


def load_official(model: Any, state: Mapping[str, torch.Tensor]) -> Report:
    """The inverse; raises `CheckpointError` that lists what does not fit, and has changed nothing then."""
    prefix = next((p for p in ("optimizer/target/", "opt/target/", "params/") if f"{p}embedding/kernel" in state), "")
    given = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    problems, found = Problems(CheckpointError, "These weights do not fit the model:"), {}
    for rule in _rules(model):
        parts = [given.pop(key, None) for key in rule.keys]
        held = [part for part in parts if part is not None]
        if held and len(held) < len(parts):
            absent = next(key for key, part in zip(rule.keys, parts) if part is None)
            problems.add(f"`{absent}` is not in the weights, but others of its layer are.", "the whole file")
        elif held and rule.name == _KERNEL:
            _kernel_in(model, held[0], found, problems)
        elif held:
            _join(rule, held, found, problems)
    if not found:
        return load_weights(model, given, head="keep")  # our own names
    if given:
        names = ", ".join(f"`{key}` {list(tensor.shape)}" for key, tensor in [*given.items()][:8])
        problems.add(f"{len(given)} tensors of the weights are not in the model, e.g. {names}.",
                     "a model of the same factorisation, depth and TokenLearner (model.kwargs)")
    problems.raise_if_any()
    return load_weights(model, found, head="keep")


def _kernel_out(model: Any, kernel: torch.Tensor) -> torch.Tensor:
    kernel = kernel.permute(2, 3, 4, 1, 0)
    return kernel[0] if model.patch_embed.frames is not None else kernel  # sampled frames meet a 2-D convolution there


def _kernel_in(model: Any, kernel: torch.Tensor, found: State, problems: Problems) -> None:
    wanted = 4 if model.patch_embed.frames is not None else 5
    if kernel.ndim != wanted:
        problems.add(f"`embedding/kernel` has {kernel.ndim} dimensions, this model's has {wanted}: one embeds tubelets, the "
                     "other sampled frames.", "model.kwargs.sample_frames=0, or the number of frames that was sampled")
        return
    found[_KERNEL] = (kernel.unsqueeze(0) if wanted == 4 else kernel).permute(4, 3, 0, 1, 2)


def _rules(model: Any) -> Iterator[Rule]:
    spatial, temporal = "Transformer", ""
    if model.factorisation == "encoder":
        spatial, temporal = "SpatialTransformer", "TemporalTransformer"
    yield Rule(_KERNEL, ("embedding/kernel",))
    yield Rule("patch_embed.proj.bias", ("embedding/bias",))
    if model.cls_token is not None:
        yield Rule("cls_token", (f"cls_{spatial}" if temporal else "cls",))
    yield Rule("pos_embed", (f"{spatial}/posembed_input/pos_embedding",))
    for number, block in enumerate(model.blocks):
        yield from _block_rules(f"blocks.{number}", f"{spatial}/encoderblock_{number}", block)
    yield from _norm("norm", f"{spatial}/encoder_norm")
    for rule in _token_rules(model):
        yield rule._replace(keys=tuple(key.replace("Transformer/", f"{spatial}/", 1) for key in rule.keys))
    if len(model.temporal_blocks):
        if model.temporal_cls_token is not None:
            yield Rule("temporal_cls_token", (f"cls_{temporal}",))
        yield Rule("temporal_pos_embed", (f"{temporal}/posembed_input/pos_embedding",))
        for number, block in enumerate(model.temporal_blocks):
            yield from _block_rules(f"temporal_blocks.{number}", f"{temporal}/encoderblock_{number}", block)
        yield from _norm("temporal_norm", f"{temporal}/encoder_norm")
    if model.num_classes:
        yield from _layer("head", "output_projection")


def _block_rules(ours: str, theirs: str, block: Any) -> Iterator[Rule]:
    two = hasattr(block, "temporal_attn")
    heads, fused = block.attn.num_heads, {"qkv": ("query", "key", "value")}
    yield from _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_{'space' if two else 0}")
    yield from _attention(f"{ours}.attn", f"{theirs}/MultiHeadDotProductAttention_{'space' if two else 0}", heads, fused)
    if two:
        yield from _norm(f"{ours}.temporal_norm1", f"{theirs}/LayerNorm_time")
        yield from _attention(f"{ours}.temporal_attn", f"{theirs}/MultiHeadDotProductAttention_time", heads, fused)
    yield from _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_{'mlp' if two else 1}")
    for layer in (0, 1):
        yield from _layer(f"{ours}.mlp.fc{layer + 1}", f"{theirs}/MlpBlock{'' if two else '_0'}/Dense_{layer}")
