"""Every file under configs/ is a run that works: its settings check, and with --tiny it really trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, rows

CONFIGS = sorted(path.relative_to(ROOT) for folder in ("pretrain", "finetune")
                 for path in (ROOT / "configs" / folder).glob("*.yaml"))

# Runs many programs in one process, so that torch is imported once and not once a recipe.
DRIVER = """
import importlib, json, sys
from tubelet import dist
codes = {}
for config in json.loads(sys.argv[1]):
    program = config.split("/")[1]
    words = [config, "--tiny", f"run.dir={sys.argv[2]}"]
    codes[config] = importlib.import_module(f"{program}.__main__").main(words)
    dist.stop()
print("CODES", json.dumps(codes))
"""


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_recipe_begins_with_its_command_its_hardware_and_its_expected_result(config):
    head = [line for line in (ROOT / config).read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert str(config) in head[0] and head[0].startswith("# python -m ")
    assert "ardware" in text and ("not yet run" in text or "prints what it measured" in text)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_recipe_settings_check_without_torch(config):
    program = config.parts[1]
    code = (f"import sys\nfrom {program}.settings import {program.capitalize()}Settings as S\n"
            f"from tubelet.program.settings import load_command, micro_batch_of, parse_command\n"
            f"s = load_command(S, parse_command([{str(config)!r}])).settings\n"
            "print(micro_batch_of(s, 8), 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"


def test_every_recipe_trains_saves_and_evaluates_with_tiny(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps([str(item) for item in CONFIGS]), str(tmp_path)],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=550)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    codes = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("CODES"))[6:])
    assert codes == {str(item): 0 for item in CONFIGS}, output[-6000:]
    for config in CONFIGS:
        folder = tmp_path / f"{_name(config)}-tiny"
        losses = [row["train/loss"] for row in rows(folder / "metrics.jsonl") if "train/loss" in row]
        assert len(losses) == 6 and all(0 < loss < 1e3 for loss in losses), (config, losses)
        saved = [path.parent.name for path in sorted(folder.glob("step-*/manifest.json"))]
        assert saved == ["step-00000003", "step-00000006"]


def _name(config: Path) -> str:
    import yaml

    return yaml.safe_load((ROOT / config).read_text())["run"]["name"]
