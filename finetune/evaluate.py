"""`tubelet evaluate WEIGHTS --data SHARDS`: accuracy and loss of a checkpoint, an export or a timm model on shards.

WEIGHTS is a run, one of its checkpoints, a folder or file of an export, or `timm:NAME`. One process, one device, every
sample exactly once; sizes, mean, std and crop are the weights' own unless said otherwise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tubelet.console import print_table, run_app
from tubelet.errors import ConfigError, Problems

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Still:
    """A model that is only evaluated, as `evaluate` wants it."""

    model: Any
    device: Any

    def eval(self) -> None:
        self.model.eval()

    def train(self) -> None:
        self.model.eval()


@app.command(help=__doc__)
def evaluate(
    weights: Annotated[str, typer.Argument(help="Run, checkpoint, export or timm:NAME.")],
    data: Annotated[str, typer.Option(help="Shards: path or URL with braces, or a folder.")],
    which: Annotated[str, typer.Option(help="auto (the moving average when there is one), weights or ema.")] = "auto",
    img_size: Annotated[int | None, typer.Option(help="Pixels; default: as trained.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 64,
    workers: Annotated[int, typer.Option(help="Loader processes.")] = 1,
    label: Annotated[str, typer.Option(help="Where the label is: cls, txt or json:path.")] = "cls",
    crop: Annotated[str | None, typer.Option(help="center or resize; default: as the run evaluated.")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Clips of a video; default: as the run evaluated.")] = None,
    crops: Annotated[int | None, typer.Option(help="Crops of a clip, 1 or 3; default: as the run evaluated.")] = None,
    stride: Annotated[float | None, typer.Option(help="Frames from one of a clip to the next; default: as trained.")] = None,
) -> None:
    import torch

    from data_pipelines.evaluation import EvalLoader
    from data_pipelines.settings import AugmentSettings, ClipSettings, DataSettings, SourceSettings
    from tubelet import dist
    from tubelet.engine.evaluate import evaluate as measure
    from tubelet.models.build import build_model, model_cfg, set_picture_cfg
    from tubelet.models.cost import input_shape
    from tubelet.models.weights import load_weights
    from tubelet.objectives.classification import Classification
    from tubelet.objectives.settings import ObjectiveSettings
    from tubelet.program.weights import describe

    problems = Problems(ConfigError)
    if which not in ("auto", "weights", "ema"):
        problems.add(f"--which is {which!r}.", "auto, weights or ema")
    if crop not in (None, "center", "resize"):
        problems.add(f"--crop is {crop!r}.", "center or resize")
    if crops not in (None, 1, 3):
        problems.add(f"--crops is {crops}, must be 1 (centre) or 3 (along the longer side).", "--crops 3")
    if stride is not None and stride <= 0:
        problems.add(f"--stride is {stride:g}, must be above 0.", "--stride 4")
    problems.raise_if_any()
    found = describe(weights, which)  # type: ignore[arg-type]
    settings = found.model.model_copy(update={"img_size": img_size} if img_size else {})
    model = build_model(settings, seed=0)
    load_weights(model, found.state, source=found.cfg, head="keep")
    set_picture_cfg(model, settings, found.cfg)
    cfg = model_cfg(model)
    augment = AugmentSettings(**found.augment)
    if crop:
        augment.eval_crop = crop  # type: ignore[assignment] - checked by pydantic
    source = SourceSettings(name="data", shards=data, label=label)
    shape = input_shape(model, settings.img_size)
    frames = shape[1] if len(shape) == 4 else 1
    given = {"test_clips": clips, "test_crops": crops, "stride": stride}
    clip = ClipSettings(**{**found.clip, "frames": frames, **{key: value for key, value in given.items() if value}})
    loader = EvalLoader(source, DataSettings(train=[source], augment=augment, clip=clip, workers=workers),
                        world=dist.World(), img_size=settings.img_size, num_classes=settings.num_classes,
                        batch_size=batch_size)
    loader.crop_pct = cfg.get("crop_pct") or 0.875
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = Classification(ObjectiveSettings(**found.objective), settings.num_classes, cfg["mean"], cfg["std"])
    if not settings.num_classes:
        raise ConfigError(f"{weights} has no classifier (num_classes 0).", "fine-tune it first")
    results = measure(Still(model.to(device), device), objective, loader) or {}  # type: ignore[arg-type]
    print_table(f"{weights} ({found.what}) on {loader.size} samples of {data}", ["measure", "value"],
                [[name, f"{value:.6f}"] for name, value in results.items()])


if __name__ == "__main__":
    sys.exit(run_app(app, None, "evaluate"))
