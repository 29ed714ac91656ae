"""What both programs do: from settings to a trainer. The order matters and is the order of the functions here.

Everything that can be refused is refused before a process group exists; then the folder is claimed, the beginning
decided, and data, model and engine are built for it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_pipelines.evaluation import EvalLoader
from data_pipelines.loader import TrainLoader, compare_fingerprints
from tubelet import dist
from tubelet.config import Loaded
from tubelet.engine.build import build_engine
from tubelet.engine.checkpoint.folder import choose, published
from tubelet.engine.checkpoint.format import read_manifest
from tubelet.engine.checkpoint.place import check_writable, home
from tubelet.engine.guard import apply_jumps
from tubelet.engine.keeper import finish_going_back, target_of
from tubelet.engine.optim import check_optimizer
from tubelet.engine.phases import Phases
from tubelet.engine.schedule import check_schedule
from tubelet.engine.signals import StopFlag, Stopped
from tubelet.engine.trackers import check as check_trackers
from tubelet.engine.trainer import Beginning, Trainer, TrainState
from tubelet.errors import BEGUN, EXIT_ERROR, OWN, CheckpointError, ConfigError, DataError, Problems, RunError
from tubelet.models.build import build_model, hub_config, model_cfg, set_picture_cfg
from tubelet.models.cost import flops_per_sample_training, input_shape
from tubelet.objectives.classification import Classification
from tubelet.program.settings import P, ProgramSettings, micro_batch_of
from tubelet.program.weights import begin_from_weights
from tubelet.redact import redact, redacted
from tubelet.runs import Run, check_changes


def train(loaded: Loaded[P], world: dist.World, stop: StopFlag) -> dict[str, float]:
    """Train as the settings say; returns the last evaluation. All ranks call it. Raises `Stopped` on a signal."""
    settings, phases = loaded.settings, Phases()
    micro_batch_size = check(settings, world)
    said = redact(loaded.as_yaml())  # URLs of shards may be signed; what is printed and saved is read by others
    run = Run(settings.run)
    try:
        device = dist.start(world, settings.timeout_seconds, settings.start_timeout_seconds,
                            save_timeout_seconds=settings.save_timeout_seconds,
                            eval_timeout_seconds=settings.eval_timeout_seconds)
    except Exception as error:
        setattr(error, OWN, True)
        raise
    quiet()
    try:
        if settings.deterministic:
            make_deterministic()
        stop.raise_if_asked(together=True)  # before this start is written down as an attempt
        dist.together(lambda: run.begin(world.size, said, lambda: checkpoints_elsewhere(settings, run))
                      if world.speaks else None)
        run.number = dist.broadcast(run.attempt.number if run.attempt else 0)
        if world.speaks:
            print(f"# {run.folder}, attempt {run.number}, {world.size} process(es) on "
                  f"{device.type}, micro batch {micro_batch_size} x "
                  f"{settings.global_batch_size // (micro_batch_size * world.size)} x {world.size} = global batch "
                  f"{settings.global_batch_size}\n{said}", flush=True)
        if told := impatient(settings, world):
            print(f"warning: {told}" if world.speaks else "", end="\n" if world.speaks else "", flush=True)
        dist.together(lambda: check_writable(target_of(settings, run)) if world.speaks else None)
        beginning, manifest = decide_beginning(settings, run, micro_batch_size)
        data = build_data(settings, world, micro_batch_size, beginning, manifest, run)
        model = dist.together(lambda: build_model(settings.model, seed=settings.seed))
        source = manifest.get("model_cfg")
        if beginning.kind == "weights":
            source = begin_from_weights(model, settings.init, settings.model, settings.seed, speaks=world.speaks)
        for warning in set_picture_cfg(model, settings.model, source):
            print(f"warning: {warning}" if world.speaks else "", end="\n" if world.speaks else "", flush=True)
        cfg = {**model_cfg(model), "interpolation": evaluated_with(settings.data.augment.interpolation)}
        data.set_picture(cfg)
        shape = check_clips(input_shape(model, settings.model.img_size), settings.data.clip.frames)
        flops = flops_per_sample_training(model, settings.model.img_size)
        hub = {**hub_config(model, settings.model), "pretrained_cfg": cfg}
        engine = build_engine(model, settings, world=world, device=device, micro_batch_size=micro_batch_size)
        stop.raise_if_asked(together=True)
        objective = Classification(settings.objective, settings.model.num_classes, cfg["mean"], cfg["std"])
        trainer = Trainer(
            settings, run=run, phases=phases, stop=stop, world=world, engine=engine, objective=objective, loader=data.train,
            eval_loaders=data.val, micro_batch_size=micro_batch_size, total_steps=data.total_steps, beginning=beginning,
            flops_per_sample=flops, input_shape=shape,
            manifest={"config": redacted(settings.model_dump(mode="json")), "model_cfg": cfg, "hub_config": hub,
                      "micro_batch_size": micro_batch_size,
                      "data": {"fingerprint": data.train.fingerprint, "recorded": data.train.recorded_state()}})
        return trainer.fit()
    except Exception as error:
        setattr(error, BEGUN, run.number)
        if world.speaks and run.attempt is not None and not isinstance(error, Stopped):
            told = dist.explain(error) or error
            run.end("failed", getattr(told, "exit_code", EXIT_ERROR), error=redact(f"{type(told).__name__}: {told}")[:2000])
        raise


def check(settings: ProgramSettings, world: dist.World) -> int:
    """What can be known before a process group exists, reported together. Returns the micro-batch size."""
    problems = Problems(ConfigError)
    micro = 0
    for action in (lambda: micro_batch_of(settings, world.size),
                   lambda: check_schedule(settings.schedule, settings.total_steps, settings.optimizer.lr),
                   lambda: check_optimizer(settings), lambda: check_trackers(settings.log)):
        try:
            micro = action() or micro
        except ConfigError as error:
            problems.items.append(error)
    data, learns = settings.data, f"`objective.name` {settings.objective.name} learns from one label a sample"
    if data.token_labels:
        problems.add(f"`data.token_labels` is {data.token_labels}, but {learns}: the maps would be read for nothing.",
                     "data.token_labels=null")
    if data.augment.mixtoken_alpha:
        problems.add(f"`data.augment.mixtoken_alpha` is {data.augment.mixtoken_alpha:g}, but {learns}, and no tokens would "
                     "be mixed.", "data.augment.mixtoken_alpha=0, and data.augment.cutmix_alpha=1 to mix pixels")
    if settings.checkpoint.best and not data.val:
        problems.add("`checkpoint.best` keeps the checkpoint that evaluates best, but `data.val` names nothing.",
                     "checkpoint.best=null, or validation data")
    problems.raise_if_any()
    return micro


def impatient(settings: ProgramSettings, world: dist.World) -> str:
    """A sentence when ranks that wait for one with a stuck loader would leave before it says so and all save, else ""."""
    data = settings.data
    limits = {"data.worker_timeout_seconds": data.worker_patience if data.workers else 0.0,
              "data.io_timeout_seconds": data.io_timeout_seconds}
    late = {name: seconds for name, seconds in limits.items() if seconds >= settings.timeout_seconds}
    if world.size == 1 or not late:
        return ""
    said = " and ".join(f"{name}={seconds:g}" for name, seconds in late.items())
    return (f"{said} is not below timeout_seconds={settings.timeout_seconds:g}: when storage or a loader hangs on one rank, "
            f"the others leave first and nothing is saved. Try: timeout_seconds={max(late.values()) * 1.25:g}")


def check_clips(shape: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The model's input shape, (3, H, W) or (3, T, H, W), when the clips of the data are what it takes."""
    wanted = shape[1] if len(shape) == 4 else 1
    if wanted != frames or (len(shape) == 4 and frames == 1):
        what = f"clips of {wanted} frames" if len(shape) == 4 else "pictures"
        raise ConfigError(f"The model takes {what}, `data.clip.frames` is {frames}.",
                          f"data.clip.frames={wanted}" + (f", or model.kwargs.num_frames={frames}" if len(shape) == 4 else
                                                          ", or a video model (`tubelet models`)"))
    return shape


def evaluated_with(interpolation: str) -> str:
    """The filter of evaluation, for the `pretrained_cfg`; training may choose one by sample."""
    return "bicubic" if interpolation == "random" else interpolation


def quiet() -> None:
    """Libraries' warnings that say nothing to a user and come once a step and rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.|timm\.|deepspeed\.")


def make_deterministic() -> None:
    """Deterministic kernels; slower on GPUs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def checkpoints_elsewhere(settings: ProgramSettings, run: Run) -> str:
    """`checkpoint.dir` when it already holds checkpoints, else ""."""
    given = settings.checkpoint.dir
    return given if given and published(target_of(settings, run)) else ""


def decide_beginning(settings: ProgramSettings, run: Run, micro_batch_size: int) -> tuple[Beginning, dict[str, Any]]:
    """Where this start begins, and the manifest it continues from ({} if none). All ranks call it. In this order:

    1 the run's own newest checkpoint that verifies; 2 `init.from_run`; 3 `init.weights`; 4 from scratch.
    """
    target = target_of(settings, run)
    undone = finish_going_back(run, target)
    folder, notes = choose(target)
    notes = [*undone, *notes]
    if folder is not None:
        manifest = read_manifest(folder)
        writer = manifest["config"]["run"]["name"]
        if settings.checkpoint.dir and writer != settings.run.name:
            raise RunError(f"checkpoint.dir={settings.checkpoint.dir} holds checkpoints of run `{writer}`, not of "
                           f"`{settings.run.name}`.", "a checkpoint.dir of this run's own; or init.from_run= to fork it")
        changed = check_changes(type(settings), manifest["config"], redacted(settings.model_dump(mode="json")),
                                str(run.folder))
        notes = [*notes, *(f"changed since the checkpoint: {item}" for item in changed)]
        if changed and run.attempt:
            run.event("settings_changed", changes=[str(item) for item in changed])
        if manifest["micro_batch_size"] != micro_batch_size:
            notes.append(f"micro batch {manifest['micro_batch_size']} -> {micro_batch_size}: the samples are the same; "
                         "drop-path draws and the groups of BatchNorm are others from here on")
        state = dist.broadcast(apply_jumps(run.folder, TrainState(**manifest["state"])))
        if any(item.key.startswith(("objective.", "data.")) for item in changed):
            state.recent_losses = []  # they do not say what the loss is usually like from here on
        if state.seen != manifest["state"]["seen"]:
            notes = [*notes, f"the run had gone back to this checkpoint: it goes on at sample {state.seen}"]
        return Beginning("resume", folder, state, notes), manifest
    if dist.broadcast(bool(published(target))):
        raise CheckpointError(f"No checkpoint in {target} verifies:\n    " + "\n    ".join(notes),
                              f"`tubelet ckpt verify {target}`; or run.overwrite=true to begin anew (it is kept)")
    if settings.init.from_run:
        other = home(settings.init.from_run)
        folder, notes = choose(other.parent if other.name.startswith("step-") else other,
                                          only=other if other.name.startswith("step-") else None)
        if folder is None:
            raise CheckpointError(f"init.from_run={other}: no checkpoint there verifies. " + " ".join(notes),
                                  f"`tubelet ckpt verify {other}`")
        manifest = read_manifest(folder)
        # what was best there lies there: this run has its own best, by its own evaluations; and its losses may be others
        state = replace(TrainState(**manifest["state"]), best={}, evaluated_step=-1, recent_losses=[], skipping_from=-1)
        return Beginning("fork", folder, state, notes), manifest
    return Beginning("weights" if settings.init.weights else "scratch", notes=notes), {}


@dataclass
class Data:
    """The loaders of a run."""

    train: TrainLoader
    val: list[EvalLoader]
    total_steps: int

    def set_picture(self, cfg: dict[str, Any]) -> None:
        """What is known only once the weights are: the crop of evaluation, and the colours that augmentation fills with."""
        for loader in self.val:
            loader.crop_pct = cfg.get("crop_pct") or 0.875
        self.train.set_colors(cfg["mean"], cfg["std"])


def begin_order_anew(beginning: Beginning, run: Run, why: list[str]) -> None:
    """`data.restart_order`: the run goes on with the first sample of the data it is given now. All ranks call it."""
    assert beginning.state is not None
    state, before = beginning.state, beginning.state.seen
    state.seen, state.recent_losses = 0, []
    beginning.notes = [*beginning.notes, f"data.restart_order=true: the order of samples begins anew at step {state.step} "
                       f"(the checkpoint stood at sample {before}); later starts go on from where this one gets to"]
    if run.attempt:
        run.event("data_restarted", step=state.step, samples=before, changes=why)


def build_data(settings: ProgramSettings, world: dist.World, micro_batch_size: int, beginning: Beginning,
               manifest: dict[str, Any], run: Run) -> Data:
    """Loaders that continue the checkpoint's order. Raises `RunError` when the data is not the checkpoint's."""
    model = settings.model
    saved = manifest.get("data", {})
    device_type = "cuda" if torch.cuda.is_available() else "cpu"

    def build(recorded: dict[str, Any] | None) -> TrainLoader:
        return dist.together(lambda: TrainLoader(
            settings.data, seed=settings.seed, img_size=model.img_size, num_classes=model.num_classes,
            global_batch_size=settings.global_batch_size, micro_batch_size=micro_batch_size, world=world, recorded=recorded,
            device_type=device_type))

    again = settings.data.restart_order and bool(saved)  # asked for; a launcher repeats the word at every start
    try:
        loader = build(saved.get("recorded"))
    except DataError:  # other sources than were recorded
        if not again:
            raise
        loader = build(None)
    if beginning.state and saved:
        found = compare_fingerprints(saved["fingerprint"], loader.fingerprint)
        if found and not again:
            raise RunError("The training data is not the checkpoint's, so its samples cannot be continued in order:\n    "
                           + "\n    ".join(found), "restore the data; or data.restart_order=true to start its order anew")
        if again and (found or beginning.kind == "fork"):  # else an earlier start has begun the new order
            loader = build(None)
            begin_order_anew(beginning, run, found)
    loader.set_ledger(run.folder, seen=beginning.state.seen if beginning.state else 0)
    val = [dist.together(lambda source=source: EvalLoader(
        source, settings.data, img_size=model.img_size, num_classes=model.num_classes, batch_size=micro_batch_size,
        world=world, device_type=device_type)) for source in settings.data.val]
    steps = settings.total_steps or max(1, round((settings.epochs or 0) * loader.size / settings.global_batch_size))
    check_schedule(settings.schedule, steps, settings.optimizer.lr)
    if beginning.state and beginning.state.step > steps:
        raise RunError(f"This run is to end at step {steps}, but {beginning.folder} stands at step {beginning.state.step}.",
                       f"total_steps={beginning.state.step} or more; or another run with init.from_run= an earlier one")
    if world.speaks and loader.size < settings.global_batch_size:
        print(f"note: the data set has {loader.size} samples, fewer than global_batch_size {settings.global_batch_size}: "
              "a batch holds some samples more than once", flush=True)
    return Data(loader, val, steps)
