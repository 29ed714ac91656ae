"""Files of strangers cannot run code here: pickle is read in one place only, and there in its safe form."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tubelet", "data_pipelines", "pretrain", "finetune", "launch")
FORBIDDEN = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("pickle", "load"), ("pickle", "loads"),
             ("yaml", "load"), ("yaml", "unsafe_load"), ("os", "system"), ("os", "popen"), ("torch.jit", "load")}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr, node


def test_only_safe_io_unpickles_and_no_shell_is_spawned():
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for owner, name, node in calls(ast.parse(path.read_text())):
                shell = any(word.arg == "shell" and getattr(word.value, "value", False) for word in node.keywords)
                if shell or ((owner, name) in FORBIDDEN and path.name != "safe_io.py"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {owner}.{name}")
    assert not found, found


def test_safe_io_itself_never_unpickles_freely():
    tree = ast.parse((ROOT / "tubelet" / "safe_io.py").read_text())
    words = {f"{owner}.{name}": {word.arg: getattr(word.value, "value", None) for word in node.keywords}
             for owner, name, node in calls(tree)}
    assert words["torch.load"]["weights_only"] is True and words["np.load"]["allow_pickle"] is False
    assert "pickle.load" not in words and "pickle.loads" not in words
