"""Weights from somewhere into a model, with a table of what happened to every tensor and an error for what cannot be
explained. Reading (`read_weights`) and loading (`load_weights`) are apart: our own sharded checkpoints are put together
by the caller.

What is explained: equal names and shapes; a position table of another grid (resampled in 2-D); a classifier for other
classes (a new zero one); a class token that this model does not have. Anything else is listed in one error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tubelet import safe_io
from tubelet.console import print_table
from tubelet.errors import CheckpointError, Problems, nearest
from tubelet.models.position import ResizeMethod, resample_patch_kernel, resample_pos_embed
from tubelet.models.vit import init_head

Action = Literal["loaded", "resized", "new", "dropped"]
State = dict[str, torch.Tensor]
Note = Callable[[str, str], None]
"""Called by a model's `adapt_weights` for each tensor that it resized: name, what was done."""


@dataclass(frozen=True)
class Row:
    """What happened to one tensor."""

    name: str
    action: Action
    detail: str


@dataclass
class Report:
    """What happened to every tensor of the model and of the source."""

    rows: list[Row] = field(default_factory=list)

    def names(self, action: Action) -> list[str]:
        return [row.name for row in self.rows if row.action == action]

    def folded(self) -> list[tuple[str, int, Action, str]]:
        """(name, count, action, detail) with layer numbers folded into `*`; what is out of the ordinary comes first."""
        groups: dict[tuple[str, Action, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((_fold(row.name), row.action, row.detail), []).append(row.name)
        found: list[tuple[str, int, Action, str]] = []
        for (fold, action, detail), names in groups.items():
            found.append((names[0] if len(names) == 1 else fold, len(names), action, detail))
        return sorted(found, key=lambda row: row[2] == "loaded")

    def show(self, title: str) -> None:
        """Print the table."""
        counts = ", ".join(f"{len(self.names(action))} {action}" for action in ("loaded", "resized", "new", "dropped"))
        print_table(f"{title}: {counts}", ["tensor", "", "", ""],
                    [[name, f"x{count}" if count > 1 else "", action, detail]
                     for name, count, action, detail in self.folded()])


def _fold(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


# ------------------------------------------------------------------------------------------------------- loading


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], *, source: Mapping[str, Any] | None = None,
                 method: ResizeMethod = "bicubic_antialias", head: Literal["auto", "replace", "keep"] = "auto",
                 head_bias: float = 0.0, key_map: Callable[[str], str | None] | None = None,
                 allow_new: Iterable[str] = (), allow_dropped: Iterable[str] = (),
                 patch_kernel: Literal["refuse", "resample"] = "refuse") -> Report:
    """Copy `state` into `model` (in place, in the model's types) and say what was done with every tensor.

    `source` is the cfg of the weights; its `input_size` tells the grid of a position table that is not square. A
    classifier is replaced by a zero one (bias `head_bias`) when asked, when the source has none, or, unless
    head="keep", when it has other classes. `key_map` renames source tensors first (None drops one). Names that match
    one of the regular expressions `allow_new` may be missing from the source, those of `allow_dropped` from the model.
    `patch_kernel="resample"` takes patches of another size (FlexiViT's pseudo-inverse resize, 2212.08013).

    Nothing is changed when a `CheckpointError` is raised; it lists every tensor that cannot be explained.
    """
    from tubelet.models.official import from_jax, is_jax_layout  # it stands on this module

    report, problems = Report(), Problems(CheckpointError, "These weights do not fit the model:")
    if hasattr(model, "check_source"):  # for what no tensor's shape shows, such as the width of heads
        model.check_source(state, source or {})  # type: ignore[operator]
    if is_jax_layout(state):
        state = from_jax(model, state, report)
    given, wanted = _renamed(state, key_map, report), model.state_dict()
    if hasattr(model, "adapt_weights"):  # models with tables of their own make them from the source's
        given = model.adapt_weights(  # type: ignore[operator]
            given, method, lambda name, detail: report.rows.append(Row(name, "resized", detail)))
    elif not isinstance(model, VisionTransformer):
        given = _fit_bias_tables(model, given, report)
    if patch_kernel == "resample":
        given = _fit_patch_kernel(given, wanted, report)
    fitted: State = {}
    heads = _head_names(model)
    replace = _replaces_head(given, wanted, heads, head)
    _drop_class_token(model, given, source or {}, report)
    for name in [*given]:
        if name.rpartition(".")[0] in heads and (replace or name not in wanted):
            report.rows.append(Row(name, "dropped", f"{_shape(given.pop(name))}, " + (
                "another classifier" if replace else "the model has no classifier")))
    for name in [*given]:
        if name == "pos_embed" and name in wanted and name not in {row.name for row in report.rows}:
            fitted[name] = _position_table(model, given, source or {}, method, report)
        elif name in wanted and given[name].shape == wanted[name].shape:
            fitted[name] = given[name]
            if name not in {row.name for row in report.rows}:
                report.rows.append(Row(name, "loaded", _shape(given[name])))
    for name in wanted:
        if name in fitted:
            continue
        if replace and name.rpartition(".")[0] in heads:
            report.rows.append(Row(name, "new", f"{_shape(wanted[name])}, " + (
                "zero" if name.endswith("weight") else f"{head_bias:g}")))
        elif name not in given and any(re.search(pattern, name) for pattern in allow_new):
            report.rows.append(Row(name, "new", f"{_shape(wanted[name])}, as the model was made"))
    for name in [*given]:
        if name not in wanted and any(re.search(pattern, name) for pattern in allow_dropped):
            report.rows.append(Row(name, "dropped", _shape(given.pop(name))))
    _find_problems(given, wanted, fitted, {row.name for row in report.rows if row.action == "new"}, heads, problems)
    problems.raise_if_any()
    with torch.no_grad():
        for name, tensor in fitted.items():
            wanted[name].copy_(tensor)  # state_dict() shares memory with the model
        if replace:
            init_head(model, "zero", head_bias)
    return report


def _fit_bias_tables(model: nn.Module, given: State, report: Report) -> State:
    """Relative-position tables of another window (Swin and its kin), resampled as timm does; others as they are.

    A table is [(2 h - 1)(2 w - 1), heads] for a window of h x w positions.
    """
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    given = dict(given)
    for name, table in given.items():
        owner, _, leaf = name.rpartition(".")
        own = model.state_dict().get(name)
        if leaf != "relative_position_bias_table" or own is None or own.shape == table.shape:
            continue
        window: Any = model.get_submodule(owner).window_size
        if table.shape[1] == own.shape[1]:  # other numbers of heads are an error of their own
            given[name] = resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=tuple(own.shape))
            report.rows.append(Row(name, "resized", f"{_shape(table)} -> {_shape(own)}, window {window[0]} x {window[1]}"))
    return given


def _fit_patch_kernel(given: State, wanted: Mapping[str, torch.Tensor], report: Report) -> State:
    name = "patch_embed.proj.weight"
    theirs, ours = given.get(name), wanted.get(name)
    if theirs is None or ours is None or theirs.ndim != 4 or ours.ndim != 4:
        return given
    if theirs.shape == ours.shape or theirs.shape[:2] != ours.shape[:2]:
        return given
    report.rows.append(Row(name, "resized", f"{_shape(theirs)} -> {_shape(ours)}, pseudo-inverse"))
    return {**given, name: resample_patch_kernel(theirs, (ours.shape[2], ours.shape[3]))}


def _renamed(state: Mapping[str, torch.Tensor], key_map: Callable[[str], str | None] | None, report: Report) -> State:
    """The source's tensors under this project's names: wrappers' prefixes stripped, then `key_map`."""
    given = dict(state)
    while prefix := next((p for p in ("module.", "model.", "_orig_mod.") if given and all(
            name.startswith(p) for name in given)), ""):
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    if key_map is None:
        return given
    renamed: State = {}
    for name, tensor in given.items():
        new = key_map(name)
        if new is None:
            report.rows.append(Row(name, "dropped", f"{_shape(tensor)}, by the key map"))
        else:
            renamed[new] = tensor
    return renamed


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of the classifier(s)."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _replaces_head(given: State, wanted: Mapping[str, torch.Tensor], heads: tuple[str, ...], head: str) -> bool:
    own = [name for name in wanted if name.rpartition(".")[0] in heads]
    if head == "keep" or not own:
        return False
    return head == "replace" or any(name not in given or given[name].shape != wanted[name].shape for name in own)


def _drop_class_token(model: nn.Module, given: State, source: Mapping[str, Any], report: Report) -> None:
    """A model that pools without class token has no place for one, nor for its row of the position table."""
    if "cls_token" not in given or "cls_token" in model.state_dict() or not hasattr(model, "num_prefix_tokens"):
        return
    report.rows.append(Row("cls_token", "dropped", f"{_shape(given.pop('cls_token'))}, the model has no class token"))
    table = given.get("pos_embed")
    if table is not None and not _source_grid(table.shape[1], given, source) and _source_grid(
            table.shape[1] - 1, given, source):
        given["pos_embed"] = table[:, 1:]
        report.rows.append(Row("pos_embed[0]", "dropped", "the class token's row of the position table"))


def _position_table(model: nn.Module, given: State, source: Mapping[str, Any], method: ResizeMethod,
                    report: Report) -> torch.Tensor:
    """The source's position table for the model's grid. A table with other prefix rows is left for the error."""
    table, own = given["pos_embed"], model.state_dict()["pos_embed"]
    grid = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", None) or ())
    prefix = own.shape[1] - math.prod(grid) if grid else 0
    old = _source_grid(table.shape[1] - prefix, given, source)
    if len(grid) != 2 or old is None or table.shape[-1] != own.shape[-1] or old == grid:
        if table.shape == own.shape:
            report.rows.append(Row("pos_embed", "loaded", _shape(table)))
        return table
    report.rows.append(Row("pos_embed", "resized", f"{old[0]} x {old[1]} -> {grid[0]} x {grid[1]}, {method}"))
    return resample_pos_embed(table, old, (grid[0], grid[1]), prefix, method)


def _source_grid(count: int, given: State, source: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the source's patches: from its input size and patch kernel, else a square, else unknown."""
    kernel, size = given.get("patch_embed.proj.weight"), source.get("input_size")
    if kernel is not None and kernel.ndim == 4 and size:
        grid = size[-2] // kernel.shape[-2], size[-1] // kernel.shape[-1]
        if grid[0] * grid[1] == count:
            return grid
    root = math.isqrt(max(count, 0))
    return (root, root) if root and root * root == count else None


def _find_problems(given: State, wanted: Mapping[str, torch.Tensor], fitted: State, new: set[str], heads: tuple[str, ...],
                   problems: Problems) -> None:
    missing = _subtrees([name for name in wanted if name not in given and name not in fitted and name not in new], given)
    unexpected = _subtrees([name for name in given if name not in wanted], wanted)
    for fold, names in missing.items():
        close = nearest(fold, [other for other in unexpected if other.count(".") == fold.count(".")])
        if names[0].rpartition(".")[0] in heads:
            hint = "init.head=replace"
        elif close:
            hint = f"is it their {close[0]}? Rename it with a key map"
        elif fold == "cls_token":
            hint = "model.kwargs.class_token=false with global_pool: avg, as the weights were trained"
        else:
            hint = "weights of the same architecture (model.name, model.kwargs)"
        problems.add(f"{_counted(fold, names)} of the model: not in the weights{_depths(fold, given, wanted)}.", hint)
    for fold, names in unexpected.items():
        close = nearest(fold, [other for other in missing if other.count(".") == fold.count(".")])
        problems.add(f"{_counted(fold, names)} of the weights: not in the model{_depths(fold, given, wanted)}.",
                     f"is it our {close[0]}? Rename it with a key map" if close else
                     "a model that has it (model.name, model.kwargs)")
    unfit: dict[tuple[str, str, str], list[str]] = {}
    for name in wanted:
        if name in given and name not in new and fitted.get(name, given[name]).shape != wanted[name].shape:
            unfit.setdefault((_fold(name), _shape(given[name]), _shape(wanted[name])), []).append(name)
    for (fold, theirs, ours), names in unfit.items():
        hint = "init.head=replace" if names[0].rpartition(".")[0] in heads else (
            "weights whose cfg has their input_size, or a model with the same class and register tokens"
            if fold == "pos_embed" else "the width and patch size of the model that the weights come from")
        if fold == "patch_embed.proj.weight" and theirs.split(" x ")[:2] == ours.split(" x ")[:2]:
            hint = "the patch size of the weights, or init.patch_kernel=resample"
        problems.add(f"{_counted(fold, names)}: {theirs} in the weights, {ours} in the model.", hint)


def _depths(fold: str, given: State, wanted: Mapping[str, torch.Tensor]) -> str:
    """" (the weights have 6 blocks, the model 4)" when a numbered list of layers is longer on one side."""
    prefix = fold.split(".*")[0] + "."
    theirs, ours = (len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})
                    for state in (given, wanted))
    if ".*" not in fold or theirs == ours or not theirs or not ours:
        return ""
    return f" (the weights have {theirs} {prefix.rstrip('.').rpartition('.')[2]}, the model {ours})"


def _subtrees(names: list[str], other: Mapping[str, Any]) -> dict[str, list[str]]:
    """`names` grouped under the highest module that `other` has nothing of, layer numbers folded."""
    modules = {".".join(name.split(".")[:depth]) for name in other for depth in range(1, name.count(".") + 2)}
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        depth = next(depth for depth in range(1, len(parts) + 1)
                     if depth == len(parts) or ".".join(parts[:depth]) not in modules)
        top = ".".join(parts[:depth])
        groups.setdefault(_fold(name if depth == len(parts) else f"{top}.*"), []).append(name)
    return groups


def _counted(fold: str, names: list[str]) -> str:
    if len(names) == 1:
        return f"`{names[0]}`"
    return f"`{fold}` ({len(names)} tensors, `{names[0]}` to `{names[-1]}`)"


# ------------------------------------------------------------------------------------------------------- reading


def read_weights(spec: str, *, ema: bool | Literal["auto"] = "auto") -> tuple[State, dict[str, Any]]:
    """(state dict on the CPU, cfg) of `timm:NAME[.tag]`, a `.safetensors` file, a folder with `model.safetensors` (or
    its parts and index) and `config.json`, a `.pth` of tensors, or an `.npz` of the papers' JAX code (ViT, TokenLearner,
    BiT; `load_weights` knows their names).

    The cfg is flat: timm's `pretrained_cfg` keys (architecture, input_size, mean, std, ...), `num_classes` and
    `model_args`; empty when the source has none. `ema`: take the moving average of a `.pth` if it has one ("auto"),
    insist on it (True), or never (False). A download by name is locked by the hub's client, so ranks of one host
    may call this together.
    """
    if spec.startswith("timm:"):
        return _read_timm(spec.removeprefix("timm:"))
    path = Path(spec)
    if path.is_dir():
        return _read_folder(path), _read_cfg(path / "config.json")
    if not path.exists():
        beside = nearest(path.name, [p.name for p in path.parent.iterdir()], 3) if path.parent.is_dir() else []
        raise CheckpointError(f"Weights {spec} do not exist.",
                              " or ".join(str(path.parent / name) for name in beside) or
                              "a run (runs/NAME), a folder with model.safetensors, or timm:NAME")
    if path.suffix == ".safetensors":
        return safe_io.read_safetensors(path), _read_cfg(path.with_name("config.json"))
    if path.suffix in (".pth", ".pt", ".bin", ".tar"):
        return _tensors_of(safe_io.read_pth(path), path, ema), {}
    if path.suffix == ".npz":
        return {name: _tensor_of(array) for name, array in safe_io.read_npz(path).items()}, {}
    raise CheckpointError(f"{spec} is no kind of weights that is read here ({path.suffix or 'no suffix'}).",
                          "a .safetensors, .pth or .npz file, a folder with model.safetensors, or timm:NAME")


def _tensor_of(array: Any) -> torch.Tensor:
    """numpy has no bfloat16: files that hold it come as two raw bytes a number."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.as_tensor(array)


def _read_timm(name: str) -> tuple[State, dict[str, Any]]:
    import timm

    from tubelet.models.names import resolve_name

    name = resolve_name(name)
    arch = name.split(".")[0]
    tagged = timm.list_pretrained(f"{arch}.*")
    if not (timm.models.is_model_pretrained(name) if "." in name else tagged):
        close = ", ".join(f"timm:{known}" for known in tagged) or "another model; timm.list_pretrained() names them"
        raise CheckpointError(f"timm has no weights called {name}.", close)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds
        known = timm.get_pretrained_cfg(name)
        where = f"model.safetensors of https://huggingface.co/{known.hf_hub_id}" if known and known.hf_hub_id else (
            known.url if known else name)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"The weights timm:{name} could not be fetched ({first:.200}).",
                              f"fetch {where} on a machine with network, and set init.weights to the file") from None
    cfg: dict[str, Any] = {key: value for key, value in dict(model.pretrained_cfg).items()  # type: ignore[arg-type]
                           if value is not None}
    return model.state_dict(), {**cfg, "num_classes": model.num_classes, "model_args": {}}


def _read_folder(folder: Path) -> State:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return safe_io.read_safetensors(whole)
    if not index.exists():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} holds no model.safetensors and no checkpoint that verifies (it holds {held}).",
                              "`tubelet ckpt verify` on a run, or the folder of an export")
    places = safe_io.read_json(index).get("weight_map") or {}
    state: State = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names a part outside its folder: {file}.", "get the export again")
        state |= safe_io.read_safetensors(folder / file)
    if absent := sorted(set(places) - set(state)):
        raise CheckpointError(f"{len(absent)} tensors that {index} lists are not in its parts, e.g. {absent[0]}.",
                              "copy the export again")
    return state


def _read_cfg(path: Path) -> dict[str, Any]:
    """timm's config.json, flat."""
    if not path.exists():
        return {}
    cfg = safe_io.read_json(path)
    return {**{key: value for key, value in cfg.items() if key != "pretrained_cfg"}, **(cfg.get("pretrained_cfg") or {}),
            "model_args": cfg.get("model_args") or {}}


def _tensors_of(content: Any, path: Path, ema: bool | Literal["auto"]) -> State:
    """The state dict inside a `.pth`: the whole content, or what one of the customary keys holds."""
    averages, plain = ("model_ema", "state_dict_ema", "ema"), ("model", "state_dict", "module", "teacher", "params")
    if isinstance(content, dict):
        average = next((key for key in averages if isinstance(content.get(key), dict)), None)
        if ema is True and average is None:
            raise CheckpointError(f"{path} holds no moving average (none of {', '.join(averages)}).", "ema=auto")
        inner = average if average and ema else next((key for key in plain if isinstance(content.get(key), dict)), None)
        if inner:
            return _tensors_of(content[inner], path, False)
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return content
    held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(f"{path} holds no state dict of tensors under a customary key (it holds {held:.300}).",
                          "save the state dict alone, as safetensors")
