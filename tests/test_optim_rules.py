"""The update rules: several learning rates in one flat against one group for each, and each optimizer against its paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tubelet.dist import World
from tubelet.engine.optim import build_optimizer, check_optimizer, parameter_groups, set_learning_rate
from tubelet.engine.optim_flat import Adafactor, Lamb, stretches
from tubelet.engine.protocol import Flat, Slot
from tubelet.engine.settings import EngineSettings, OptimizerSettings
from tubelet.errors import ConfigError

CPU = torch.device("cpu")
SCALES = {"a": 0.25, "b": 0.25, "c": 0.5, "d": 1.0}
SIZES = {"a": 5, "b": 13, "c": 40, "d": 7}


class OneGroup:
    """An engine whose four parameters lie in one flat, with padding between and after them."""

    def __init__(self, name):
        torch.manual_seed(0)
        place, slots = 0, []
        for key, size in SIZES.items():
            slots.append(Slot(key, 0, size, place))
            place += size + 3
        self.master = torch.randn(place)
        self.key = nn.Parameter(self.master)
        self.flat = Flat(self.key.detach(), self.key, 0, slots)
        groups = [{"params": [self.key], "param_names": list(SIZES), "lr_scales": list(SCALES.values()), "name": "wd0.1",
                   "weight_decay": 0.1}]
        self.optimizer = build_optimizer(groups, OptimizerSettings(name=name, lr=1), CPU)

    def flats(self):
        return [self.flat]


def test_stretches_cover_the_flat_and_join_equal_scales():
    flat = OneGroup("sgd").flat
    assert stretches(flat, SCALES) == [(0, 24, 0.25), (24, 67, 0.5), (67, 77, 1.0)]
    assert stretches(flat, dict.fromkeys(SCALES, 1.0)) == [(0, 77, 1.0)]
    assert stretches(Flat(torch.zeros(4), torch.zeros(4), 0), SCALES) == []  # a rank that holds padding only


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_scales_in_one_flat_give_the_bits_of_a_group_for_each(name):
    """torch's and timm's optimizers with one group a parameter, and one step count for all of the flat."""
    from timm.optim import SGDW
    from timm.optim import Lion as TimmLion

    engine = OneGroup(name)
    pieces = {slot.name: nn.Parameter(engine.master[slot.offset : slot.offset + slot.length].clone())
              for slot in engine.flat.slots}
    groups = [{"params": [piece], "weight_decay": 0.1} for piece in pieces.values()]
    apart = {"adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8),
             "sgd": lambda: SGDW(groups, lr=1, momentum=0.9), "lion": lambda: TimmLion(groups, betas=(0.9, 0.999))}[name]()
    for step in range(5):
        lr = 0.01 * (step + 1)
        engine.key.grad = torch.randn(engine.key.numel())
        for group, slot in zip(apart.param_groups, engine.flat.slots):
            pieces[slot.name].grad = engine.key.grad[slot.offset : slot.offset + slot.length].clone()
            group["lr"] = lr * SCALES[slot.name]
        set_learning_rate(engine, lr)
        engine.optimizer.step()
        apart.step()
    state = engine.optimizer.state[engine.key]
    for slot in engine.flat.slots:
        place, piece = slice(slot.offset, slot.offset + slot.length), pieces[slot.name]
        assert torch.equal(engine.key.detach()[place], piece.detach()), slot.name
        for kind, value in apart.state[piece].items():
            assert kind == "step" or torch.equal(state[kind][place], value), f"{kind} of {slot.name}"
    assert float(state.get("step", 5)) == 5 and all(value.numel() in (1, engine.key.numel()) for value in state.values())


def test_a_step_before_the_places_are_known_is_our_mistake():
    engine = OneGroup("adamw")
    engine.key.grad = torch.ones_like(engine.key)
    with pytest.raises(AssertionError, match="bind"):
        engine.optimizer.step()


# ----------------------------------------------------------------------------------------- the rules, in float64


def given(shape, steps=4, seed=0):
    """A weight and gradients of several steps, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), [torch.randn(shape, generator=generator) for _ in range(steps)]


def run_steps(make, weight, grads, lr=0.1):
    """Weights after each step, and the state."""
    param = nn.Parameter(weight.clone())
    optimizer, found = make([param]), []
    for grad in grads:
        param.grad = grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        found.append(param.detach().clone())
    return found, optimizer.state[param]


def built(name, decay, **settings):
    def make(params):
        groups = [{"params": params, "param_names": ["w"], "lr_scales": [1.0], "weight_decay": decay}]
        return build_optimizer(groups, OptimizerSettings(name=name, lr=1, **settings), CPU)
    return make


def expected_weights(name, weight, grads, lr=0.1, decay=0.01):
    w, found = weight.double(), []
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate((grad.double() for grad in grads), 1):
        if name == "sgd":  # heavy ball
            m = 0.9 * m + g
            w = w - lr * decay * w - lr * m
        elif name == "lion":  # arXiv 2302.06675, algorithm 2
            w = w - lr * (torch.sign(0.9 * m + 0.1 * g) + decay * w)
            m = 0.99 * m + 0.01 * g
        elif name in ("adamw", "adam"):  # arXiv 1711.05101, algorithm 2
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            w = w - lr * decay * w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-6)
        else:  # LAMB, arXiv 1904.00962v5, algorithm 2
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + decay * w
            ratio = w.norm() / update.norm() if decay and w.norm() > 0 else 1.0
            w = w - lr * ratio * update
        found.append(w)
    return found


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "lamb"])
@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_each_optimizer_follows_the_rule_of_its_paper(name, decay):
    weight, grads = given((7, 5))
    settings = {} if name == "sgd" else {"betas": (0.9, 0.99), "eps": 1e-6}
    found, _ = run_steps(built(name, decay, **settings), weight, grads)
    for mine, rule in zip(found, expected_weights(name, weight, grads, decay=decay)):
        torch.testing.assert_close(mine.double(), rule, rtol=2e-6, atol=1e-6)


def test_lamb_equals_timms_and_leaves_a_zero_weight_unscaled():
    from timm.optim import Lamb as TimmLamb

    for weight, grads in (given((9, 4)), (torch.zeros(9, 4), given((9, 4))[1]), given((6,))):
        ours, _ = run_steps(lambda params: Lamb(params, lr=1, weight_decay=0.05), weight, grads)
        theirs, _ = run_steps(lambda params: TimmLamb(params, lr=1, weight_decay=0.05, max_grad_norm=None), weight, grads)
        for mine, its in zip(ours, theirs):
            torch.testing.assert_close(mine, its, rtol=2e-6, atol=1e-6)


def adafactor_rule(weight, grads, lr=0.1, decay=0.03):
    """big_vision (optax.scale_by_factored_rms and an EMA stored in bf16), float64 apart from what is stored; the axes are
    written out for the shapes of the test: 48 is the largest, 33 the second."""
    w, found = weight.double(), []
    stored = torch.zeros_like(weight, dtype=torch.bfloat16)
    factored = sorted(weight.shape)[-2:] == [33, 48]
    large, small = (weight.shape.index(48), weight.shape.index(33)) if factored else (0, 0)
    row = col = v = 0.0
    for t, g in enumerate(grad.double() for grad in grads):
        beta = min(0.999, 1 - (t + 1) ** -0.8)
        square = g**2 + 1e-30
        if factored:
            row = beta * row + (1 - beta) * square.mean(large, keepdim=True)
            col = beta * col + (1 - beta) * square.mean(small, keepdim=True)
            u = g * (row / row.mean(small, keepdim=True)) ** -0.5 * col**-0.5
        else:
            v = beta * v + (1 - beta) * square
            u = g / v.sqrt()
        m = 0.9 * stored.double() + 0.1 * u
        stored = m.float().to(torch.bfloat16)
        w = w - lr * (m + decay * w)
        found.append(w)
    return found


@pytest.mark.parametrize("shape", [(48, 33), (33, 48), (33, 3, 48), (31, 48), (48,), (20, 4, 4)])
def test_adafactor_is_big_visions(shape):
    weight, grads = given(shape)
    found, state = run_steps(built("adafactor", 0.03), weight, grads)
    for mine, rule in zip(found, adafactor_rule(weight, grads)):
        torch.testing.assert_close(mine.double(), rule, rtol=1e-5, atol=3e-5)  # a stored value may round the other way
    first = found[0].double()
    torch.testing.assert_close(first, adafactor_rule(weight, grads)[0], rtol=2e-6, atol=1e-6)
    if sorted(shape)[-2:] != [33, 48]:
        assert state["exp_avg_sq"].shape == shape
        signs = weight.double() * (1 - 0.1 * 0.03) - 0.1 * 0.1 * torch.sign(grads[0]).double()
        torch.testing.assert_close(first, signs, rtol=2e-6, atol=1e-6)  # the first update is a tenth of the sign
    else:
        small, large = sorted(state[kind].numel() for kind in ("exp_avg_sq_r", "exp_avg_sq_c"))
        assert (small, large) == (math.prod(shape) // 48, math.prod(shape) // 33) and "exp_avg_sq" not in state
    assert state["exp_avg"].dtype == torch.bfloat16 and float(state["step"]) == 4


def test_adafactor_keeps_timms_second_moments_and_steps_by_the_momentum_before_it_is_rounded():
    from timm.optim import AdafactorBigVision

    weight, grads = given((64, 40))
    def theirs(**more):
        return lambda params: AdafactorBigVision(params, lr=1, min_dim_size_to_factor=32, **more)
    ours, state = run_steps(lambda params: Adafactor(params, lr=1), weight, grads)
    exact, kept = run_steps(theirs(momentum_dtype=torch.float32), weight, grads)
    rounded, _ = run_steps(theirs(), weight, grads)
    for kind in ("exp_avg_sq_r", "exp_avg_sq_c"):
        torch.testing.assert_close(state[kind], kept[kind], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-7)
    assert (rounded[0] - exact[0]).abs().max() > 10 * (ours[0] - exact[0]).abs().max()


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_optimizers_of_whole_tensors_are_refused_under_zero_with_the_way_out(name):
    from tubelet.engine.build import build_engine

    settings = EngineSettings(global_batch_size=2, optimizer={"name": name, "lr": 1})
    for act in (lambda: check_optimizer(settings),
                lambda: build_engine(nn.Linear(2, 2), settings, world=World(), device=CPU, micro_batch_size=2)):
        with pytest.raises(ConfigError, match=f"(?s)optimizer.name is {name}.*flat pieces.*Try: .*engine=plain"):
            act()
    check_optimizer(settings.model_copy(update={"engine": "plain"}))


def test_layer_decay_reaches_adafactor_and_lamb():
    """The first step of two equal tensors differs by their scales."""
    for name in ("adafactor", "lamb"):
        keys = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
        groups = [{"params": keys, "param_names": ["a", "b"], "lr_scales": [0.5, 1.0], "weight_decay": 0.1}]
        optimizer = build_optimizer(groups, OptimizerSettings(name=name, lr=1), CPU)
        flats = [Flat(key.detach().view(-1), key, 0, [Slot(label, 0, 16, 0)]) for key, label in zip(keys, "ab")]
        engine = SimpleNamespace(optimizer=optimizer, flats=flats.copy)
        for key in keys:
            key.grad = torch.full((4, 4), 0.5)
        set_learning_rate(engine, 0.01)
        optimizer.step()
        torch.testing.assert_close(2 * (1 - keys[0].detach()), 1 - keys[1].detach(), rtol=1e-5, atol=1e-7)


def test_groups_of_a_deep_model_are_two_whatever_the_layer_decay():
    from timm.models.vision_transformer import VisionTransformer

    module = VisionTransformer(img_size=32, embed_dim=16, depth=24, num_heads=2, num_classes=3)
    groups = parameter_groups(module, OptimizerSettings(lr=1, weight_decay=0.1, layer_decay=0.75))
    assert len(groups) == 2 and len({scale for group in groups for scale in group["lr_scales"]}) == 26
