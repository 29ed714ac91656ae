"""Bytes of one rank: what stays between steps, and the peak inside of one. What DeepSpeed 0.19.8 and our engines allocate.

Legend: P trained elements, W ranks, m micro-batch, n micro-batches a step, e bytes of a parameter while training (bf16 2,
fp32 and amp 4), B elements of a bucket, k moments of the optimizer.

Between steps (tests/test_plan_memory.py counts the tensors of real engines):

=========== ========================== ==================================== =============================================
part        plain                      ZeRO 1 and 2                         ZeRO 3
=========== ========================== ==================================== =============================================
weights     4 P                        e P, each group padded to 2 W        e times each parameter's ceil(n / W), and e
                                                                            times the small ones that stay whole (W > 1)
masters     the weights                4 P / W, a copy also in fp32         4 P / W, a copy also in fp32
moments     4 k P                      4 k P / W                            4 k P / W
average     4 P                        4 P / W                              4 P / W
gradients   4 P (DDP's, at W = 1 too)  none: freed by the step              a flat buffer of e P / W (4 P / W when they are
                                                                            added up in fp32)
buckets     none                       none: made by every backward pass    B, one for each type that is sent
=========== ========================== ==================================== =============================================

Inside a step two moments count: the last forward pass, when all activations are there, and the update. The figures for that
were read in DeepSpeed's sources and not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tubelet.engine.settings import EngineSettings
from tubelet.engine.zero.deepspeed_config import derive
from tubelet.program.plan.facts import Facts, Weight

FP32 = 4
SCRATCH = 2 * FP32
"""Bytes of temporary results for each element that an optimizer which is not fused steps on (an estimate)."""


@dataclass(frozen=True)
class Way:
    """One way to run: engine, precision, ranks."""

    engine: str
    stage: int
    precision: str
    """fp32, amp or bf16."""
    world: int
    accumulation: int = 1
    gpu: bool = True

    @property
    def name(self) -> str:
        return "plain" if self.engine == "plain" else f"ZeRO-{self.stage}"


@dataclass(frozen=True)
class State:
    """Bytes of one rank between two steps, after the first."""

    weights: int
    masters: int
    moments: int
    average: int
    gradients: int
    buckets: int
    buffers: int

    @property
    def total(self) -> int:
        return (self.weights + self.masters + self.moments + self.average + self.gradients + self.buckets
                + self.buffers)


@dataclass(frozen=True)
class Inside:
    """Bytes that come and go in a step, activations apart."""

    forward: int
    """Beside all activations: gradients of earlier micro-batches, buckets, gathered parameters, copies in bf16."""
    backward: int
    """When the last backward pass is over and all activations are gone."""
    update: int

    def above(self, activations: int) -> int:
        """The largest of the three moments."""
        return max(self.forward + activations, self.backward, self.update)


class Memory:
    """The memory of one way to run a model with these settings."""

    def __init__(self, facts: Facts, settings: EngineSettings, way: Way):
        self.facts, self.settings, self.way = facts, settings, way
        self.element = 2 if way.precision == "bf16" else FP32
        wide = settings.zero.grad_accum_dtype == "fp32"
        self.sum_element = FP32 if wide else self.element
        self.zero = self._derived() if way.engine == "zero" else {}

    def _derived(self) -> dict[str, Any]:
        """The section `zero_optimization` that DeepSpeed would be given."""
        way = self.way
        settings = self.settings.model_copy(update={"zero": self.settings.zero.model_copy(update={"stage": way.stage})})
        return derive(settings, way.precision, world_size=way.world, micro_batch_size=1, accumulation=way.accumulation,
                      numel=self.facts.trained_elements, largest_block=self.facts.largest_block,
                      gpu=way.gpu)["zero_optimization"]

    # ------------------------------------------------------------------------------------------- places

    def flats(self) -> list[int]:
        """Elements of this rank's flat tensors, padding included (at stage 3 a parameter group may be several)."""
        if self.way.engine == "plain":
            return [item.numel for item in self.facts.trained]
        if self.way.stage < 3:
            return [self.aligned(group) // self.way.world for group in self.facts.groups]
        return [size for group in self.facts.groups for size in self._sub_groups(group)]

    def aligned(self, group: list[Weight]) -> int:
        """Elements of a group's whole flat tensor at stages 1 and 2."""
        multiple = 2 * self.way.world
        return -(-sum(item.numel for item in group) // multiple) * multiple

    def piece(self, item: Weight) -> int:
        """Elements of a parameter on a rank at stage 3."""
        return -(-item.numel // self.way.world)

    def _sub_groups(self, group: list[Weight]) -> list[int]:
        sizes, current, limit = [], 0, self.zero["sub_group_size"]
        if sum(map(self.piece, group)) <= limit:
            return [sum(map(self.piece, group))]
        for item in group:
            current += self.piece(item)
            if current >= limit:
                sizes.append(current)
                current = 0
        return sizes + [current] * bool(current)

    def persistent(self) -> int:
        """Elements of the parameters that stage 3 keeps whole on every rank."""
        if self.way.stage < 3 or self.way.world == 1:
            return 0
        threshold = self.zero["stage3_param_persistence_threshold"]
        return sum(item.numel for item in (*self.facts.trained, *self.facts.frozen) if item.numel <= threshold)

    # ------------------------------------------------------------------------------------------- between steps

    def state(self) -> State:
        """What stays; see the table above."""
        facts, way, element = self.facts, self.way, self.element
        elements = sum(self.flats())
        frozen = sum(item.numel for item in facts.frozen)
        average = FP32 * elements if self.settings.ema else 0
        moments = sum(kind.nbytes for kind in self.moment_kinds())
        if way.engine == "plain":
            return State(FP32 * (elements + frozen), 0, moments, average, FP32 * elements, 0, facts.buffer_bytes)
        if way.stage < 3:
            whole = sum(map(self.aligned, facts.groups)) + frozen
            return State(element * whole, FP32 * elements, moments, average, 0, 0, facts.buffer_bytes)
        frozen = sum(map(self.piece, facts.frozen))
        return State(element * (elements + frozen + self.persistent()), FP32 * elements, moments, average,
                     self.sum_element * elements, self._bucket(), facts.buffer_bytes)

    def moment_kinds(self) -> list[Moment]:
        """The optimizer's state tensors of this rank."""
        return self._moments(self.facts.trained, sum(self.flats()))

    def _moments(self, items: list[Weight], elements: int) -> list[Moment]:
        """Those of flat tensors that hold these parameters in so many elements, padding included."""
        name = self.settings.optimizer.name
        if name in ("adamw", "adam", "lamb"):
            return [Moment("exp_avg", FP32 * elements), Moment("exp_avg_sq", FP32 * elements)]
        if name == "lion":
            return [Moment("exp_avg", FP32 * elements)]
        if name == "sgd":  # timm keeps none without momentum, but for layer-wise rates, which begin it all the same
            kept = self.settings.optimizer.momentum or self.settings.optimizer.layer_decay < 1
            return [Moment("momentum_buffer", FP32 * elements)] if kept else []
        return [Moment("exp_avg", 2 * elements), Moment("exp_avg_sq", sum(map(_factored, items)))]

    def _types(self) -> list[int]:
        """Bytes of an element of each bucket: of the types that gradients are sent in."""
        if self.way.precision != "amp":
            return [self.element]
        return sorted({2 if item.low else FP32 for item in self.facts.trained})

    def _bucket(self) -> int:
        return sum(self._types()) * self.zero["reduce_bucket_size"]

    # ------------------------------------------------------------------------------------------- inside a step

    def inside(self) -> Inside:
        """What comes and goes beside activations."""
        casts = 0
        if self.way.precision == "amp":  # the graph keeps the copies until the backward pass has used them
            casts = 2 * sum(item.numel for item in (*self.facts.trained, *self.facts.frozen) if item.low)
        if self.way.engine == "plain":
            return self._inside_plain(casts)
        return self._inside_sharded(casts) if self.way.stage == 3 else self._inside_cut(casts)

    @property
    def _scratch(self) -> int:
        return 0 if self.way.gpu and self.settings.optimizer.name in ("adamw", "adam") else SCRATCH

    def _inside_plain(self, casts: int) -> Inside:
        """The gradients are DDP's buckets, which are there at all times."""
        largest = max((item.numel for item in self.facts.trained), default=0)
        step = self.facts.trained_elements if self.settings.optimizer.name == "lamb" else largest
        return Inside(casts, 0, self._scratch * step)

    def _inside_cut(self, casts: int) -> Inside:
        """Stages 1 and 2. Stage 1 keeps all gradients until the last micro-batch; stage 2 sends those of every one."""
        element, overlap, several = self.element, bool(self.zero["overlap_comm"]), self.way.accumulation > 1
        buckets = (1 + overlap) * element * len(self._types()) * self.zero["reduce_bucket_size"]
        at_once = overlap or self.way.stage == 2  # sent while the backward pass goes on, else when it is over
        sending = self._sending() + element * self.facts.largest_block if at_once else 0
        parts = self.flats()
        whole = element * self.facts.trained_elements
        mine = self.sum_element * sum(parts)
        copied = self.sum_element + FP32 * (self.sum_element != FP32)  # flattened, then widened
        if self.way.stage == 1:
            held, end = (whole if several else 0), (mine if overlap else whole + mine)
        elif self.sum_element != element:  # added up in fp32 in one place
            held, end, copied = (mine if several else 0), mine, 0
        else:
            held, end = (mine if several else 0), mine * (1 + several)
        largest = max(parts, default=0)
        block = element * self.facts.largest_block
        return Inside(held + buckets + (sending or block) + casts, end + buckets + sending,
                      mine + largest * max(copied, (FP32 if copied else 0) + self._scratch))

    def _sending(self) -> int:
        """What stages 1 and 2 copy to send a bucket: a piece for each rank's part, flattened into one tensor again; of fp32
        buckets that are sent in bf16 another one in that."""
        if self.way.world == 1:
            return 0  # one piece is not copied
        elements = min(self.zero["reduce_bucket_size"], self.facts.trained_elements)
        return elements * max(self.element + (kind if kind < self.element else 0) for kind in self._types())

    def _inside_sharded(self, casts: int) -> Inside:
        zero, element = self.zero, self.element
        everything = sum(item.numel for item in (*self.facts.trained, *self.facts.frozen)) - self.persistent()
        gathered = 0 if self.way.world == 1 else element * min(everything, zero["stage3_max_live_parameters"])
        sending = max(self._types()) * min(zero["reduce_bucket_size"], self.facts.trained_elements)
        block = element * self.facts.largest_block
        copied = self.sum_element + FP32 * (self.sum_element != FP32)
        largest = max(self.flats(), default=0)
        return Inside(gathered + sending + block + casts, gathered + sending + block,
                      largest * max(copied, FP32 + self._scratch))

    # ------------------------------------------------------------------------------------------- a checkpoint

    def written_bytes(self) -> list[int]:
        """Bytes of the tensors in one checkpoint by the rank that writes them (headers and JSON apart).

        Under ZeRO every rank writes what it holds. In the plain engine, where all hold everything, tensor i is written by
        rank i mod W (`layout.Whole`), so few large tensors are not shared evenly. Rank 0 writes what is not trained too.
        """
        world = self.way.world
        if self.way.engine == "plain":
            written = [0] * world
            for number, item in enumerate(self.facts.trained):
                written[number % world] += self._saved_of([item], item.numel)
        else:
            written = [self._saved_of(self.facts.trained, sum(self.flats()))] * world
        written[0] += FP32 * sum(item.numel for item in self.facts.frozen) + self.facts.saved_buffer_bytes
        return written

    def _saved_of(self, items: list[Weight], elements: int) -> int:
        """Masters, moments and average of flat tensors with so many elements."""
        flats = FP32 * elements * (2 if self.settings.ema else 1)
        return flats + sum(kind.nbytes for kind in self._moments(items, elements))


@dataclass(frozen=True)
class Moment:
    """One kind of optimizer state on a rank."""

    name: str
    nbytes: int


def _factored(item: Weight) -> int:
    """Bytes of Adafactor's second moment: a row and a column where both axes have 32 elements, else all."""
    order = sorted(range(len(item.shape)), key=lambda axis: (item.shape[axis], axis))
    if len(order) < 2 or item.shape[order[-2]] < 32:
        return FP32 * item.numel
    return FP32 * (item.numel // item.shape[order[-1]] + item.numel // item.shape[order[-2]])
