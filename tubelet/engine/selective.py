"""What selective recomputation keeps of a block: results of matrix products, convolutions and fused attention.

The idea is that of `torch.utils.checkpoint.create_selective_checkpoint_contexts`, which is used where blocks are compiled.
Uncompiled, torch's form (2.15) keeps the very tensor that the block goes on with. A block that changes it in place then
finds the changed one in its recomputation, and changes it once more. torch notices by the tensor's version, but not through
`_unsafe_view`, which a matrix product of three dimensions ends with: gradients are silently wrong. This is all it takes:

    def block(x):           # x [B, N, D], w [D, D], b [D]
        y = x @ w
        y += b              # wrong as soon as b is not zero; y.relu_() is wrong as well
        return y.sin()      # something whose backward pass needs y
    checkpoint(block, x, use_reentrant=False,
               context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.aten.mm.default]))

DeepSpeed does just that at stage 3: it replaces `torch.nn.functional.linear`, for the whole process, by a function that adds
the bias in place. So what is kept here is copied when somebody is about to change it, and not before: the copy takes the
place of a tensor that the forward pass need not hold any longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default: 3,
    _aten._scaled_dot_product_efficient_attention.default: 5,
    _aten._scaled_dot_product_cudnn_attention.default: 5,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
}
"""Fused attention and the place of `dropout_p` among its arguments."""


def keep_also(attention: Any, dropout_place: int) -> None:
    """Take this operation for fused attention too: one that stands for it where memory is counted and nothing computed."""
    _ATTENTION[attention] = dropout_place


def is_kept(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether the result of this call is kept from the forward pass."""
    if operation not in _ATTENTION:
        return operation in _PRODUCTS
    # Dropout inside of attention draws random numbers: not drawing them again would shift all that come behind.
    place = _ATTENTION[operation]
    return kwargs.get("dropout_p", args[place] if len(args) > place else 0.0) == 0


def compiled_contexts() -> tuple[Any, Any]:
    """Contexts of the forward pass and of the recomputation, in the form that the compiler knows. It has no changes in
    place: it rewrites them before it decides what to keep."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def contexts() -> tuple[Keep, GiveBack]:
    """Contexts of the forward pass and of the recomputation, for blocks that are not compiled."""
    kept: deque[_Kept] = deque()
    return Keep(kept), GiveBack(kept)


class _Kept:
    """The result of one call: a tensor or a tuple of them, none with a gradient's history."""

    def __init__(self, operation: Any, result: Any):
        self.operation = operation
        # without `detach` the graph would hold the result and the result the graph
        self.result = tree_map(lambda value: value.detach() if isinstance(value, torch.Tensor) else value, result)

    def places(self) -> Iterator[int]:
        """Addresses of its storages, which nothing else can have while they are kept."""
        for value in tree_iter(self.result):
            if isinstance(value, torch.Tensor):
                yield value.untyped_storage()._cdata

    def copy(self) -> None:
        self.result = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, self.result)


class Keep(TorchDispatchMode):
    """The forward pass: keep results, in the order of the calls."""

    def __init__(self, kept: deque[_Kept]):
        super().__init__()
        self.kept = kept
        self.at: dict[int, _Kept] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation._schema.is_mutable:
            self._make_way(operation, args, kwargs)
        result = operation(*args, **kwargs)
        if is_kept(operation, args, kwargs):
            self.kept.append(_Kept(operation, result))
            self.at.update(dict.fromkeys(self.kept[-1].places(), self.kept[-1]))
        return result

    def _make_way(self, operation: Any, args: Any, kwargs: Any) -> None:
        """What is kept is copied where this call is about to write."""
        for number, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tree_iter(given):
                self._copy(tensor)

    def returned(self, results: Any) -> Any:
        """`results` of the block itself. Who gets them may change them as well, when this context is left already."""
        for tensor in tree_iter(results):
            self._copy(tensor)
        return results

    def _copy(self, value: Any) -> None:
        """What is kept in the storage of this value, if anything, is a copy from now on."""
        if isinstance(value, torch.Tensor):
            found = self.at.pop(value.untyped_storage()._cdata, None)
            if found is not None:
                found.copy()

    def __exit__(self, *exc: Any) -> None:
        self.at.clear()
        super().__exit__(*exc)


class GiveBack(TorchDispatchMode):
    """The recomputation: what was kept instead of computing it again. Each result is given once, so it may be changed."""

    def __init__(self, kept: deque[_Kept]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_kept(operation, args, kwargs):
            return operation(*args, **kwargs)
        if not self.kept:
            raise RuntimeError(f"{operation} is computed again, but its result was given back already: the backward pass "
                               "of a selectively recomputed block ran twice, or the block took another path this time.")
        kept = self.kept.popleft()
        assert kept.operation is operation, f"{operation} where the forward pass had {kept.operation}"
        return kept.result
