"""Kill a run over and over, at chosen and at random instants, and look from outside at what is left each time.

One process (`Nursery`) imports everything once and then forks the ranks of each life of a run, so that a life costs about
a second: the real trainer, engines, checkpoints and choice of the beginning on a small model and data in memory. Within
a life one rank kills itself at the n-th file operation of a save or pruning, at a named point of `tubelet.faults` (of the
rank, or of the process that writes for it), or all are killed at a random time; sometimes the other ranks live on for a
moment, as they do under a launcher, and clean up after the one that died. Lives change between 1 and 2 ranks and between
engines. What is looked at after each death is read here with `hashlib` alone, not with the code under test.

    python tests/kills.py FOLDER KILLS [SEED]     # prints a row of JSON at the end
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import importlib
import itertools
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

STEPS, SAVE_EVERY, KEEP_LAST, G, M = 30, 2, 2, 4, 2
SHAPES = [(1, "zero", 1), (2, "zero", 3), (2, "plain", 1), (2, "zero", 1), (1, "plain", 1), (1, "zero", 3), (2, "zero", 2)]
COMMIT = ("save.begin", "save.manifest", "save.commit", "save.published", "prune.manifest", "prune.files")
POINTS = {(False, 0): (*COMMIT, "save.shard", "save.index"), (False, 1): ("save.shard",),
          (True, 0): (*COMMIT, "stage.copy", "save.handed"), (True, 1): ("stage.copy", "save.handed")}
"""What (asynchronous, rank) passes by itself; the process that writes for it passes the others."""
OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
LIFE_SECONDS = 90
PRELOADED = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "accelerate", "torch.utils.tensorboard",
             "tubelet.engine.plain", "tubelet.engine.zero.engine", "tubelet.program.train", "pretrain.settings",
             "little_run")
"""What a life would import, a second or more each: DeepSpeed's Muon takes the whole of inductor with it."""

# ------------------------------------------------------------------------------------------------ from outside


def whole(folder):
    """True when every file that the manifest of a checkpoint names is there, byte for byte."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all((folder / name).stat().st_size == record["bytes"]
                   and hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"]
                   for name, record in files.items())
    except (OSError, ValueError, KeyError):
        return False


def whole_steps(run):
    """Steps of the whole checkpoints of a run, oldest first."""
    return sorted(int(path.name[5:]) for path in run.glob("step-*") if whole(path))


def rows(path):
    """Whole lines of a file that may be being written, or not be there yet."""
    try:
        return Path(path).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []


def damage(run, step, dice):
    """Flip a bit of one file of a checkpoint (not of the manifest: `whole` believes it)."""
    files = (run / f"step-{step:08d}").iterdir()
    path = dice.choice(sorted(path for path in files if path.stat().st_size and path.name != "manifest.json"))
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 4
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- inside a rank


def network():
    import torch
    from torch import nn

    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(48, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))


def watch_files(run, act):
    """Call `act(name of the operation, before or after)` around each file operation on a checkpoint of `run`."""
    def wrapped(module, name):
        real = getattr(module, name)

        def call(path, *rest, **named):
            where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            mine = isinstance(where, str) and where.startswith(f"{run}/") and "step-" in where
            if mine:
                act(name, "before")
            result = real(path, *rest, **named)
            if mine:
                act(name, "after")
            return result

        setattr(module, name, call)

    for name in OPERATIONS:
        wrapped(os, name)


def live(rank, size, engine, stage, port, run_folder, plan, says, asynchronous):
    """The whole life of one rank: what a program does, with the data in memory. Dies where `plan` says."""
    from little_run import Numbers, Objective

    from pretrain.settings import PretrainSettings
    from tubelet import dist, faults, runs
    from tubelet.engine.build import build_engine
    from tubelet.engine.trainer import Trainer
    from tubelet.program.train import decide_beginning

    def say(text):
        os.write(says, f"{text}\n".encode())

    def die(text):
        say(f"dies {rank} {text}")
        os.kill(os.getpid(), signal.SIGKILL)

    counts = Counter()
    if plan["victim"] == rank:
        if plan["kind"] == "operation":
            def act(name, when):
                counts["operation"] += when == plan["when"]
                if counts["operation"] == plan["number"] and when == plan["when"]:
                    die(f"{when} {name} {plan['number']}")

            watch_files(run_folder, act)
        if plan["kind"] == "point":
            def point(name):
                counts[name] += 1
                if name == plan["name"] and counts[name] == plan["number"]:
                    die(f"at {name} {plan['number']}")

            faults.point = point
        if plan["kind"] == "writer":
            os.environ.update(TUBELET_FAULTS=f"{plan['name']}=60", TUBELET_FAULTS_LOG=plan["log"])
    runs._git = lambda *words: ""
    world = dist.World(rank, size, rank, size, "127.0.0.1", port)
    settings = PretrainSettings(
        run={"name": run_folder.name, "dir": str(run_folder.parent)}, model={"name": "vit_tiny_patch16_224"},
        data={"train": ["made-up:photos?n=40&size=8&classes=3"]}, global_batch_size=G, micro_batch_size=M,
        optimizer={"name": "adamw", "lr": 0.02, "weight_decay": 0.05}, schedule={"warmup_steps": 3}, engine=engine,
        zero={"stage": stage}, precision="fp32", clip_grad=None, ema={"decay": 0.8}, total_steps=STEPS,
        save_every=SAVE_EVERY, keep_last=KEEP_LAST, log_every=5, digest=True, log={"tensorboard": False},
        checkpoint={"asynchronous": asynchronous})
    device = dist.start(world, timeout_seconds=60, start_timeout_seconds=60)
    run = runs.Run(settings.run)
    dist.together(lambda: run.begin(size, "kill test\n") if rank == 0 else None)
    beginning, _ = decide_beginning(settings, run, M)
    if rank == 0:
        say(f"begins {beginning.state.step if beginning.state else -1}")
    built = build_engine(network(), settings, world=world, device=device, micro_batch_size=M)
    trainer = Trainer(settings, run=run, world=world, engine=built, objective=Objective(), loader=Numbers(world, M),
                      micro_batch_size=M, total_steps=STEPS, beginning=beginning,
                      manifest={"config": settings.model_dump(mode="json"), "micro_batch_size": M})
    trainer.fit()
    dist.stop()


# --------------------------------------------------------------------------------------------------- the nursery


class Nursery:
    """Forks lives and looks at what they leave. `kills` after `go`: how the lives ended."""

    def __init__(self, folder, seed, asynchronous=(False, True)):
        os.environ.update(DS_ACCELERATOR="cpu", TORCHINDUCTOR_COMPILE_THREADS="1")
        for name in PRELOADED:
            importlib.import_module(name)
        import torch

        from tubelet.engine.checkpoint.load import assemble

        torch.set_num_threads(1)
        self.assemble, self.asynchronous = assemble, asynchronous
        self.folder, self.dice = Path(folder).resolve(), random.Random(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.counts, self.where, self.seconds, self.lives = Counter(), Counter(), [], 0
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: writers of dead ranks are awaited here

    def life(self, run, shape, plan, asynchronous):
        """One life to its end; returns what its ranks said: {"begins": step, "dies": text, "finished": bool}."""
        from tubelet import dist

        size, engine, stage = shape
        hears, says = os.pipe()
        port, log = dist.free_port(), self.folder / f"{run.name}.log"
        begun, children = time.monotonic(), {}
        for rank in range(size):
            child = os.fork()
            if not child:
                self._child(rank, size, engine, stage, port, run, plan, says, log, asynchronous)
            children[child] = rank
        os.close(says)
        try:
            said = self._watch(children, plan, begun, hears)
        finally:
            self._kill(children)
            os.close(hears)
        self.lives += 1
        self.seconds.append(time.monotonic() - begun)
        assert said["ok"], f"life {self.lives} of {run.name} on {shape} with {plan}: {said}\n{log.read_text()[-6000:]}"
        return said

    def _child(self, rank, size, engine, stage, port, run, plan, says, log, asynchronous):
        try:
            from tubelet import dist

            dist.die_with_parent()
            out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            faulthandler.dump_traceback_later(LIFE_SECONDS - 10, exit=False)
            print(f"--- life {self.lives + 1} rank {rank} of {size} {engine}-{stage} {asynchronous=} {plan}", flush=True)
            live(rank, size, engine, stage, port, run, plan, says, asynchronous)
            os.write(says, f"finished {rank}\n".encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)

    def _watch(self, children, plan, begun, hears):
        """Until every rank has ended: by its own plan, by ours, or because it is done."""
        said, text, left = {"begins": None, "dies": None, "ok": True}, b"", dict(children)
        dead_at, alone = None, False
        while left:
            now = time.monotonic()
            if plan["kind"] == "time" and not said["dies"] and now - begun >= plan["seconds"]:
                said["dies"] = "at a random time" if said["begins"] is None else "at a random time of training"
                for child in left:
                    os.kill(child, signal.SIGKILL)
                dead_at = now
            passed = rows(plan["log"]) if plan["kind"] == "writer" and not said["dies"] else []
            if passed:
                pid = int(passed[0].split()[1])
                said["dies"] = f"writer {plan['name']}" if pid not in children else f"at {plan['name']}"
                alone = plan["alone"] and pid not in children
                rank = next(child for child, rank in children.items() if rank == plan["victim"])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid if alone else rank, signal.SIGKILL)
                dead_at = now
            ready, _, _ = select.select([hears], [], [], 0.005)
            if ready:
                text += os.read(hears, 4096)
                *lines, text = text.split(b"\n")
                for line in lines:
                    word, _, rest = line.decode().partition(" ")
                    if word == "begins":
                        said["begins"] = int(rest)
                    if word == "dies":
                        said["dies"], dead_at = rest.partition(" ")[2], now
            for child in list(left):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    del left[child]
                    if status and not said["dies"] and not (os.WIFSIGNALED(status) and self._late(hears, said)):
                        return {**said, "ok": False, "why": f"rank {children[child]} ended with {status}"}
            if dead_at is not None and now - dead_at > plan["linger"]:
                if alone:
                    return {**said, "ok": False, "why": f"ranks {sorted(left.values())} did not notice that the writer died"}
                self._kill(left)
            if now - begun > LIFE_SECONDS:
                return {**said, "ok": False, "why": "hangs"}
        said["finished"] = said["dies"] is None
        return said

    @staticmethod
    def _late(hears, said):
        """A rank's last words may be read after its death was seen."""
        for line in os.read(hears, 4096).decode().splitlines() if select.select([hears], [], [], 0)[0] else []:
            word, _, rest = line.partition(" ")
            if word == "dies":
                said["dies"] = rest.partition(" ")[2]
            if word == "begins":
                said["begins"] = int(rest)
        return bool(said["dies"])

    @staticmethod
    def _kill(children):
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        until = time.monotonic() + 20
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < until:  # ranks, then the writers that lost their parent
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.002)
        children.clear() if isinstance(children, dict) else None

    def plan(self, size, asynchronous):
        """Where the next life ends. Two thirds lie inside a save or pruning."""
        dice = self.dice
        if asynchronous and dice.random() < 0.5:
            return self.writer_plan(size)
        plan = {"victim": dice.randrange(size), "linger": dice.choice([0, 0, 0, 0.05, 0.5])}
        kind = dice.choice(["operation", "operation", "point", "time", "operation", "time"])
        if kind == "operation":
            return plan | {"kind": kind, "when": dice.choice(["before", "after"]), "number": dice.randint(1, 50)}
        if kind == "point":
            name = dice.choice(POINTS[asynchronous, plan["victim"]])
            return plan | {"kind": kind, "name": name, "number": dice.randint(1, 2)}
        return plan | {"kind": "time", "seconds": dice.uniform(0.05, 1.3)}

    def writer_plan(self, size):
        """The process that writes for one rank is in the middle of a file: its rank is killed, or it alone is, which all
        ranks must notice and end with an error by themselves."""
        victim, alone = self.dice.randrange(size), self.dice.random() < 0.5
        name = "save.shard" if victim else self.dice.choice(["save.shard", "save.index"])
        return {"kind": "writer", "victim": victim, "linger": 40 if alone else self.dice.choice([0, 0.5]), "name": name,
                "alone": alone, "log": str(self.folder / f"fault-{self.lives}")}

    def result(self, run):
        """What must not depend on the deaths: final weights and average, digests."""
        step = run / f"step-{STEPS:08d}"
        assert whole(step)
        tensors = {(which, name): value.numpy().tobytes() for which in ("weights", "ema")
                   for name, value in dict(self.assemble(step, which=which)).items()}
        digests = [json.loads(line) for line in (run / "digest.jsonl").read_text().splitlines()]
        return tensors, {row["step"]: row["digest"] for row in digests}

    def undisturbed(self, shape):
        run = self.folder / f"whole-{'-'.join(map(str, shape))}"
        said = self.life(run, shape, {"kind": "none", "victim": -1, "linger": 0}, False)
        assert said["finished"]
        return self.result(run)

    def go(self, kills):
        """Kill until there were `kills`, then let the run end. Returns a report; fails on the first broken promise."""
        expected = self.undisturbed(SHAPES[0])
        shapes = itertools.cycle(SHAPES)
        for number in itertools.count():
            if sum(self.counts.values()) >= kills:
                break
            run, known, finished = self.folder / f"run-{number}", [], False
            while not finished:
                shape = next(shapes)
                rest = sum(self.counts.values()) >= kills
                asynchronous = self.dice.choice(self.asynchronous)
                plan = {"kind": "none", "victim": -1, "linger": 0} if rest else self.plan(shape[0], asynchronous)
                if len(known) > 1 and self.dice.random() < 0.1:
                    damage(run, known[-1], self.dice)
                    assert whole_steps(run) == known[:-1], "the damage was not seen"
                    known = known[:-1]
                    self.where["damaged before"] += 1
                said = self.life(run, shape, plan, asynchronous)
                if said["begins"] is not None:
                    assert said["begins"] == (known[-1] if known else -1), f"began at {said['begins']}, whole are {known}"
                left = whole_steps(run)
                assert not known or (left and left[-1] >= known[-1]), f"whole before: {known}, after {said}: {left}"
                assert len(left) >= min(KEEP_LAST, len(known)), f"whole before: {known}, after {said}: {left}"
                known, finished = left, said["finished"]
                if said["dies"]:
                    inside = not said["dies"].startswith("at a random")
                    self.counts["inside" if inside else "anywhere"] += 1
                    self.where[" ".join(said["dies"].split()[:2]) if inside else said["dies"]] += 1
            tensors, digests = self.result(run)
            assert digests == expected[1], f"digests of {run.name}"
            differing = [name for name, value in expected[0].items() if tensors.get(name) != value]
            assert tensors.keys() == expected[0].keys() and not differing, f"{run.name} ended with other bits: {differing}"
        return {"kills": sum(self.counts.values()), **self.counts, "runs": number, "lives": self.lives,
                "seconds_per_life": round(sum(self.seconds) / len(self.seconds), 2), "where": dict(self.where.most_common())}


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    print(json.dumps(Nursery(sys.argv[1], int((sys.argv + ["0"])[3])).go(int(sys.argv[2]))))
