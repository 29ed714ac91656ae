"""`tubelet models [FILTER]`: our names, the papers' names for them, parameters and cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tubelet.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(metavar="[FILTER]", help="part of a name or of a paper's name")] = "",
    cost: Annotated[str, typer.Option(metavar="NAME", help="cost of one model, ours, timm's or a paper's name")] = "",
    img_size: Annotated[int, typer.Option(help="pixels; a position table grows with them")] = 224,
    frames: Annotated[int, typer.Option(help="frames of a clip; 0 = the model's own")] = 0,
) -> None:
    """List the models registered here with their size, or say what one model costs."""
    from tubelet.console import print_table
    from tubelet.models.build import build_meta
    from tubelet.models.cost import activation_bytes, input_shape, macs, num_parameters
    from tubelet.models.names import ALIASES, SIZES, entries, paper_name, resolve_name
    from tubelet.models.settings import ModelSettings

    if cost:
        name = resolve_name(cost)
        clip: dict[str, Any] = {"num_frames": frames} if frames else {}
        model = build_meta(ModelSettings(name=name, img_size=img_size, kwargs=clip))
        body = build_meta(ModelSettings(name=name, img_size=img_size, num_classes=0, kwargs=clip))
        shape, count = input_shape(model, img_size), macs(model, img_size)
        sample = f"one clip of {shape[1]} frames" if len(shape) == 4 else "one picture"
        kept = [f"{activation_bytes(model, img_size) / 2**20:,.1f} MiB in bf16"]
        if hasattr(model, "set_grad_checkpointing"):
            again = activation_bytes(model, img_size, checkpointing=True)
            kept.append(f"{again / 2**20:,.1f} MiB with activation_checkpointing")
        print_table(f"{name} at {img_size} pixels", ["", ""], [
            ["paper", paper_name(name) or "-"],
            ["parameters", f"{num_parameters(model):,} with 1000 classes, {num_parameters(body):,} without classifier"],
            [f"forward, {sample}", f"{count / 1e9:.2f} GMACs (multiply-adds) = {2 * count / 1e9:.2f} GFLOPs (2 per MAC)"],
            ["counted as fvcore does", f"{macs(model, img_size, norms=True) / 1e9:.2f} GMACs (norms too)"],
            ["training", f"{6 * count / 1e9:.1f} GFLOPs (forward and backward)"],
            ["activations kept", ", ".join(kept)]])
        return
    rows = []
    for name in entries():
        if pattern.lower() in f"{name} {paper_name(name)}".lower():
            try:
                model = build_meta(ModelSettings(name=name, img_size=img_size))
            except ConfigError:  # a size that this model's patches do not divide
                rows.append([name, "-", "-", f"not at {img_size} pixels; {paper_name(name)}"])
                continue
            rows.append([name, f"{num_parameters(model) / 1e6:.2f}", f"{macs(model, img_size) / 1e9:.2f}", paper_name(name)])
    if not rows:
        raise ConfigError(f"No model here has {pattern!r} in its name.", "no filter, or `--cost NAME` for any model of timm")
    print_table(f"Models of this project at {img_size} pixels, 1000 classes", ["name", "M params", "GMACs", "paper"], rows)
    sizes = "/P, ".join(f"ViT-{letter}" for letter in SIZES)
    print(f"\nPapers' names stand for timm's: {sizes}/P, {', '.join(ALIASES)}.\n"
          "Any name of timm works too, and model.kwargs change any model (width, depth, patch size, pooling).")
