"""Versions of everything that must be equal on all hosts, and whether the code itself is."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tubelet
from tubelet import runs
from tubelet.engine.card import version
from tubelet.program.doctor.findings import Finding, Status, equal, some
from tubelet.program.doctor.nodes import Node, known

OURS = ("tubelet", "data_pipelines", "pretrain", "finetune", "launch")
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "accelerate", "numpy", "pillow", "av",
            "safetensors", "pydantic", "fsspec")
DECIDING = {"python", "tubelet", "torch", "cuda", "nccl", "timm", "deepspeed", "webdataset"}
"""Another version of these may change results, the order of samples or what travels between ranks; of others it warns."""


def look() -> dict[str, Any]:
    """Versions, commit and hashes of the sources on this host. Imports torch."""
    import torch

    root = Path(tubelet.__file__).resolve().parent.parent
    found = {"python": platform.python_version(), "tubelet": tubelet.__version__,
             **{name: version(name) for name in PACKAGES}, "torch": torch.__version__,
             "cuda": torch.version.cuda or "none", "nccl": _nccl(), "kernel": platform.release()}
    return {"versions": {name: value or "not installed" for name, value in found.items()},
            "commit": runs._git("rev-parse", "HEAD").strip()[:12], "dirty": bool(runs._git("status", "--porcelain").strip()),
            "sources": source_hashes(root), "foreign": foreign_packages(root), "root": str(root)}


def _nccl() -> str:
    try:
        from torch.cuda import nccl

        return ".".join(str(part) for part in nccl.version())
    except Exception:  # a build of torch without NCCL has none to ask; it says so in several ways
        return "none"


def source_hashes(root: Path) -> dict[str, str]:
    """{path below the root: first 12 digits of its SHA-256} of the project's Python files."""
    paths = sorted(path for name in OURS for path in (root / name).rglob("*.py"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}


def foreign_packages(root: Path) -> dict[str, str]:
    """{package: where it comes from} of the five names that an import would take from somebody else: `launch` and
    `finetune` are names that other distributions have too."""
    found = {}
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if not any(Path(place).resolve() == root / name for place in places):
            found[name] = places[0] if places else (spec.origin or "?" if spec else "nowhere")
    return found


def judge(nodes: Sequence[Node]) -> list[Finding]:
    """Versions equal, the same commit, the same files, our own packages."""
    facts = known(nodes, "versions")
    found: list[Finding] = []
    names = dict.fromkeys(name for mine in facts.values() for name in mine["versions"])
    same: dict[str, str] = {}
    for name in names:
        values = {label: mine["versions"].get(name, "not installed") for label, mine in facts.items()}
        status: Status = "fail" if name in DECIDING else "warn"
        one = equal("versions", name, values, status=status, hint=f"install the same {name} on all hosts, or use one shared "
                    "environment or container image")
        if one.status == "ok":
            same[name] = one.value
        else:
            found.append(one)
    said = ", ".join(f"{name} {version}" for name, version in same.items() if name in DECIDING - {"tubelet"})
    found.insert(0, Finding("versions", "packages", "ok", said or "none is equal", "equal on all hosts", details=dict(same)))
    return [*found, *_code(facts), *_imports(facts)]


def _code(facts: dict[str, Any]) -> list[Finding]:
    labels = list(facts)
    first = facts[labels[0]]
    hint = "one shared checkout, or the same commit on every host (git fetch, git status)"
    commit = equal("versions", "commit", {label: f"{mine['commit'] or 'no git'}{' + changes' if mine['dirty'] else ''}"
                                          for label, mine in facts.items()}, hint=hint, status="warn")
    differing: dict[str, list[str]] = {}
    for label in labels:
        mine = facts[label]["sources"]
        files = sorted(path for path in {*mine, *first["sources"]} if mine.get(path) != first["sources"].get(path))
        if files:
            differing[label] = files
    rule = "the project's files are equal on all hosts"
    if differing:
        label, files = next(iter(differing.items()))
        sources = Finding("versions", "sources", "fail", f"{len(files)} file(s) on {some(list(differing))} differ from "
                          f"{labels[0]}: {some(files)}", rule, hint, list(differing), dict(differing))
    else:
        sources = Finding("versions", "sources", "ok", f"{len(first['sources'])} files are equal", rule)
    return [commit, sources]


def _imports(facts: dict[str, Any]) -> list[Finding]:
    bad = {label: mine["foreign"] for label, mine in facts.items() if mine["foreign"]}
    rule = f"{', '.join(OURS)} are imported from one checkout"
    if not bad:
        roots = dict.fromkeys(mine["root"] for mine in facts.values())
        return [Finding("versions", "imports", "ok", f"from {some(list(roots))}", rule)]
    label, foreign = next(iter(bad.items()))
    said = ", ".join(f"{name} from {place}" for name, place in foreign.items())
    return [Finding("versions", "imports", "fail", f"{said} on {some(list(bad))}, not from {facts[label]['root']}", rule,
                    "start in the root of the checkout, or uninstall the other distribution of that name", list(bad), bad)]
