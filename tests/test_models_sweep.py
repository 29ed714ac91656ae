"""Every registered model, found by its name: registering a model enrols it here.

Full size on the meta device: counts, multiply-adds, names and shapes of tensors. Cut to two blocks a stage on the CPU:
answers, gradients, recomputation, bf16, the authors' layout, the compiler. Names that differ in size alone are cut to
the same model, so each structure runs once; the slow suite runs every name, up to the size of B at full depth.

`python tests/test_models_sweep.py` writes the layouts anew, for a change of names or shapes that is meant.
"""

import copy
import hashlib
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from sinfill import sinfill, sinin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tubelet.models
from tubelet.models.build import _arguments_of, build_meta
from tubelet.models.cost import input_shape, macs, num_parameters
from tubelet.models.names import entries
from tubelet.models.settings import ModelSettings

LAYOUTS = Path(__file__).with_name("model_layouts.json")

# What a factory is given to be small, as far as it has the argument. A family that needs more has a row below.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "temporal_depth": 2,
         "num_tokens": 3, "num_frames": 4, "num_classes": 5}
SMALL_BY_FACTORY = {
    "create_token_learner_vit": {"depth": 4},  # two blocks before the TokenLearner, two behind
    "create_uniformer": {"img_size": 64, "depths": (2, 2, 2, 2), "dims": (16, 32, 32, 48), "head_dim": 16},
    "create_super_vit": {"img_size": 56, "patch_size": 4, "depth": 4, "drop_at": (1, 2)},
    "create_vivit": {"num_tokens": 0},
    "create_hybrid": {"img_size": 64, "patch_size": 0, "layers": (1, 1)},
    "create_bit": {"layers": (1, 1), "width_factor": 1, "stem_chs": 32, "channels": (128, 128)},
}
ONLY_SIZE = ("size", "patch_size", "num_tokens", "at", "depth", "depths", "dims", "head_dim", "embed_dim", "num_heads",
             "mlp_ratio", "layers", "width_factor")  # what a name may differ in without being another structure

NAMES = list(entries())
STRUCTURES = list({(entry.function, repr({k: v for k, v in entry.kwargs.items() if k not in ONLY_SIZE})): name
                   for name, entry in reversed(entries().items())}.values())[::-1]
FAMILIES = list({entries()[name].function: name for name in reversed(STRUCTURES)}.values())[::-1]


def cut(name, **changes):
    """The model of that name, small, on the CPU, its official tensors filled by formula."""
    entry, known = entries()[name], _arguments_of(name) or set()
    own = {**SMALL_BY_FACTORY.get(entry.function, {}), **changes}
    small = {**{key: value for key, value in SMALL.items() if key in known}, **own}
    return fill(timm.create_model(name, **{key: value for key, value in small.items() if value}))


def fill(model):
    tubelet.models.load_official(model, sinfill(tubelet.models.official_state_dict(model)))
    return model


def answers(model, pixels):
    """All tensors that the model answers with, in training; a SuperViT is asked at each of its sizes."""
    calls = [{}, *({"size": size, "keep": 0.5} for size in getattr(model, "sizes", ()))]
    return [leaf for call in calls for leaf in tree_leaves(model(pixels, **call)) if isinstance(leaf, torch.Tensor)]


def training(model):
    """BatchNorm as in evaluation, because it takes the gradient of a bias before it away."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def pixels_for(model, batch=2):
    return sinin(batch, *input_shape(model))


# ------------------------------------------------------------------------------------------------ full size, no memory


def layout(model):
    """(parameters, hash of all names and shapes of the state dict and of its official form)."""
    lines = [f"{key} {list(tensor.shape)}" for state in (model.state_dict(), tubelet.models.official_state_dict(model))
             for key, tensor in sorted(state.items())]
    return [num_parameters(model), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]]


def counted(model):
    """Multiply-adds of dense layers, convolutions and fused attention, from the shapes that pass through them."""
    total = 0

    def layer(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:
            total += output.numel() * module.weight[0].numel()

    def attention(query, key, value, **_):
        nonlocal total
        total += query.numel() * key.shape[-2] + query.shape[:-1].numel() * key.shape[-2] * value.shape[-1]
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    handles = [module.register_forward_hook(layer) for module in model.modules()
               if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", attention):
        model.eval()(torch.empty(1, *input_shape(model), device="meta"))
    for handle in handles:
        handle.remove()
    return total


def meta(name):
    cfg = timm.get_pretrained_cfg(name)
    return build_meta(ModelSettings(name=name, img_size=cfg.input_size[-1], num_classes=1000))


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_layout_stay_what_they_are(name):
    model = meta(name)
    known = json.loads(LAYOUTS.read_text())
    assert name in known, f"a new model: run `python {Path(__file__).name}` in tests/ and commit {LAYOUTS.name}"
    assert known[name] == layout(model), "names or shapes of tensors changed: older checkpoints do not load"


@pytest.mark.parametrize("name", STRUCTURES)
def test_multiply_adds_are_those_of_the_layers_and_a_little_more(name):
    model = meta(name)
    found, expected = macs(model), counted(model)
    assert expected <= found <= 1.02 * expected  # learned tokens and ranks are products outside of any layer


# ----------------------------------------------------------------------------------------------- cut, on the CPU


@pytest.mark.parametrize("name", STRUCTURES)
def test_trains_recomputes_and_comes_back(name):
    model = training(cut(name))
    pixels, gradients = pixels_for(model), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        outputs = answers(model, pixels)
        assert all(output.isfinite().all() for output in outputs)
        sum((output * sinin(*output.shape)).sum() for output in outputs).backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{key} gets no gradient"
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    model.set_grad_checkpointing(False)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        expected = model(pixels)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(pixels[:1])
        assert macs(model) == counter.get_total_flops() // 2
        other = cut(name).eval()
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
        tubelet.models.load_official(other, tubelet.models.official_state_dict(model))
        state = other.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "num_batches" not in key)
        torch.testing.assert_close(other(pixels), expected)  # memory lies otherwise, so sums may round otherwise
        low = copy.deepcopy(model).bfloat16()(pixels.bfloat16())
    assert low.isfinite().all() and low.dtype == torch.bfloat16


def compiled_equals_eager(name, backend="aot_eager"):
    model = cut(name).eval()
    pixels = pixels_for(model)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(pixels), model(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles(name):
    compiled_equals_eager(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_inductor_answers_the_same(name):  # a cold build takes up to a minute and wants a C++ compiler
    compiled_equals_eager(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_name_compiles(name):
    compiled_equals_eager(name)


def whole(name):
    """Whether the suite has memory for this model: not above the size of B."""
    return not re.search("large|huge|giant|medium", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if whole(name)])
def test_at_full_depth_answers_are_finite_and_every_parameter_learns(name):
    short = {"num_frames": 8} if "num_frames" in (_arguments_of(name) or ()) else {}
    model = training(fill(timm.create_model(name, **short)))
    outputs = answers(model, pixels_for(model, 1))
    assert all(output.isfinite().all() for output in outputs)
    sum((output * sinin(*output.shape)).sum() for output in outputs).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(layout(meta(name)))}" for name in NAMES]
    LAYOUTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{LAYOUTS.name}: {len(lines)} models")
