"""The house stays the house: the loop on one screen, short files, a README that speaks of what exists."""

import ast
import re

import pytest
from programs import ROOT

from tubelet.cli import VERBS

PACKAGES = ("tubelet", "data_pipelines", "pretrain", "finetune", "launch")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_the_loop_is_read_on_one_screen_and_nests_nothing():
    (fit,) = [node for node in functions(ROOT / "tubelet/engine/trainer.py") if node.name == "fit"]
    assert fit.end_lineno - fit.lineno + 1 <= 70
    inner = [node for node in ast.walk(fit) if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not fit]
    assert not inner


def test_there_is_one_loop():
    loops = [str(path.relative_to(ROOT)) for path in SOURCES for node in functions(path)
             if ".backward(" in ast.unparse(node) and node.name not in ("backward",)]
    assert loops == ["tubelet/engine/trainer.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_documented_and_finished(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    if not text.strip() or path.name == "__init__.py":
        return
    assert ast.get_docstring(ast.parse(text)), "a module says what it holds"
    assert not re.search(r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b", text)


def test_readme_speaks_of_files_verbs_and_recipes_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in set(re.findall(r"configs/[\w/]+\.yaml", text)):
        assert (ROOT / path).exists(), path
    for verb in set(re.findall(r"^    tubelet (\w+)", text, re.M)):
        assert verb in VERBS, verb
    for target in set(re.findall(r"`?make ([\w-]+)", text)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    tree = text.split("```")[1]
    for folder in ("models/", "objectives/", "engine/", "program/", "data_pipelines/", "pretrain/", "finetune/", "launch/"):
        assert folder in tree


def test_every_setting_has_a_help_text_and_a_resume_class():
    from finetune.settings import FinetuneSettings
    from tubelet.config import _settings_in, known_fields

    for key, info in known_fields(FinetuneSettings):
        assert info.description, f"{key} has no docstring"
        if not _settings_in(info.annotation):
            assert (info.json_schema_extra or {}).get("resume"), f"{key} has no resume class"
