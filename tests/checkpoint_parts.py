"""What the tests of checkpoints share: a small engine with a sharded layout of its own, and pictures of an engine's
state that are taken without the checkpoint's index."""

from itertools import accumulate

import numpy as np
import torch
from torch import nn

from tubelet import dist
from tubelet.dist import World
from tubelet.engine.layout import Cut, Whole
from tubelet.engine.protocol import Flat, Slot


class Net(nn.Module):
    """Odd sizes, a one-element parameter, buffers of two types, and parts that one may freeze."""

    def __init__(self, seed, width=7, norm="batch"):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(5, width)
        self.norm = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.body = nn.Linear(width, 11)
        self.gain = nn.Parameter(torch.randn(1))
        self.head = nn.Linear(11, 3)
        self.register_buffer("table", torch.randn(4))
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.norm(self.stem(x)))) * self.gain)


class SplitEngine:
    """The protocol on plain tensors: each group's parameters end to end, cut into one piece a rank. No DeepSpeed."""

    kind, stage, precision, replicated = "zero", 1, "fp32", False

    def __init__(self, module, world, groups=(("", 1e-2),), frozen=(), optimizer=torch.optim.AdamW):
        self.module = self.model = module
        self.world, self.device = world, torch.device("cpu")
        for name, param in module.named_parameters():
            param.requires_grad_(not any(name.startswith(part) for part in frozen))
        self.named = {name: param for name, param in module.named_parameters() if param.requires_grad}
        left = dict(self.named)
        self.members = []
        for prefix, _ in groups:
            self.members.append([name for name in list(left) if name.startswith(prefix) and left.pop(name) is not None])
        self.sizes = [-(-sum(self.named[name].numel() for name in names) // world.size) for names in self.members]
        self._flats = []
        for number, size in enumerate(self.sizes):
            slots = self.layout().slots(world.rank, number)
            master = torch.full((size,), torch.nan)  # what no slot covers must never matter
            for slot in slots:
                whole = self.named[slot.name].detach().flatten()
                master[slot.offset : slot.offset + slot.length] = whole[slot.start : slot.start + slot.length]
            self._flats.append(Flat(master, master, number, slots))
        self.optimizer = optimizer([{"params": [flat.key], "lr": lr} for flat, (_, lr) in zip(self._flats, groups)])

    def flats(self):
        return self._flats

    def layout(self):
        counts = {name: param.numel() for name, param in self.named.items()}
        offsets = [list(accumulate((counts[name] for name in names), initial=0))[:-1] for names in self.members]
        return Cut(self.world.size, counts, self.members, offsets, self.sizes)

    def shapes(self):
        return {name: tuple(param.shape) for name, param in self.named.items()}

    def frozen(self):
        return {name: param.detach().clone() for name, param in self.module.named_parameters() if name not in self.named}

    def load_frozen(self, values):
        for name, value in values.items():
            self.module.get_parameter(name).data.copy_(value)

    def begin_load(self):
        pass

    def refresh(self):
        """Working weights from the pieces of all ranks."""
        for name, value in picture(self)["master"].items():
            self.named[name].data.copy_(torch.from_numpy(value).view(self.named[name].shape))

    def train_a_little(self, seed):
        generator = torch.Generator().manual_seed(seed + 100 * self.world.rank)
        for flat in self._flats:
            flat.key.grad = torch.randn(flat.key.numel(), generator=generator)
        self.optimizer.step()
        self.refresh()
        return self


class WholeEngine:
    """The protocol on whole parameters, as the plain engine has it; the optimizer sees them in their own shapes."""

    kind, stage, precision, replicated = "plain", 0, "fp32", True

    def __init__(self, module, optimizer):
        self.module = self.model = module
        self.world, self.device = World(), torch.device("cpu")
        self.named = dict(module.named_parameters())
        self._flats = [Flat(param.data.view(-1), param, 0, [Slot(name, 0, param.numel(), 0)])
                       for name, param in self.named.items()]
        self.optimizer = optimizer([{"params": [flat.key for flat in self._flats]}])

    def flats(self):
        return self._flats

    def layout(self):
        return Whole(1, {name: param.numel() for name, param in self.named.items()}, [[name] for name in self.named])

    def shapes(self):
        return {name: tuple(param.shape) for name, param in self.named.items()}

    def frozen(self):
        return {}

    def begin_load(self):
        pass

    def refresh(self):
        pass

    def train_a_little(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for flat in self._flats:
            flat.key.grad = torch.randn(flat.key.shape, generator=generator)
        self.optimizer.step()
        return self


def picture(engine, ema=None):
    """{kind: {name: flat array}} of masters, moments and average, put together from all ranks' slots; also
    {"hyper": {name: group}, "steps": {name: step}, "buffers", "frozen"}, and this rank's "shaped" state of whole
    parameters. All ranks call it."""
    pieces, steps, shaped = [], {}, {}
    for number, flat in enumerate(engine.flats()):
        state = engine.optimizer.state.get(flat.key, {})
        tensors = {"master": flat.master} | {k: v for k, v in state.items() if k != "step" and v is not None}
        tensors = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}
        for kind in [kind for kind, value in tensors.items() if value.numel() != flat.master.numel()]:
            shaped[f"{kind} of {flat.slots[0].name}"] = tensors.pop(kind).numpy().copy()
        if ema is not None:
            tensors["ema"] = ema[number]
        for slot in flat.slots:
            steps[slot.name] = float(state["step"]) if "step" in state else None
            pieces += [(kind, slot.name, slot.start, value.detach().reshape(-1)[slot.offset : slot.offset + slot.length]
                        .cpu().numpy().copy()) for kind, value in tensors.items()]
    ids = [id(engine.optimizer.state[flat.key]["step"]) for flat in engine.flats()
           if "step" in engine.optimizer.state.get(flat.key, {})]
    assert len(set(ids)) == len(ids), "two flats share one step tensor"
    whole = {}
    for own in dist.gather(pieces):
        for kind, name, start, values in own:
            size = int(np.prod(engine.shapes()[name]))
            out = whole.setdefault(kind, {}).setdefault(name, np.full(size, np.float32(12345.678)))
            out[start : start + values.size] = values
    if shaped:
        whole["shaped"] = shaped
    members = {}
    for number, flat in enumerate(engine.flats()):
        members |= dict.fromkeys(engine.layout().members(number), flat.group)
    names = {name for name, _ in engine.module.named_parameters()}
    whole["hyper"] = {name: {key: engine.optimizer.param_groups[group][key] for key in ("lr", "weight_decay", "betas",
                             "lr_scale", "momentum") if key in engine.optimizer.param_groups[group]}
                      for name, group in members.items()}
    whole["steps"] = {name: step for own in dist.gather(steps) for name, step in own.items()}
    whole["buffers"] = {name: value.numpy().copy() for name, value in engine.module.state_dict().items()
                        if name not in names}
    whole["frozen"] = {name: value.numpy().copy() for name, value in engine.frozen().items()}
    return whole


def differences(left, right):
    """Names at which two pictures differ in as much as one bit."""
    found = [f"{kind} is in one of them only" for kind in left.keys() ^ right.keys()]
    for kind in left.keys() & right.keys():
        a, b = left[kind], right[kind]
        found += [f"{kind} of {name} is in one of them only" for name in a.keys() ^ b.keys()]
        for name in a.keys() & b.keys():
            if isinstance(a[name], np.ndarray):
                equal = a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()
            else:
                equal = a[name] == b[name] and type(a[name]) is type(b[name])
            found += [] if equal else [f"{kind} of {name}"]
    return found
