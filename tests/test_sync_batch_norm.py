"""BatchNorm over all ranks: W ranks with B samples each train as one rank with W * B samples."""

import numpy as np
import pytest
import timm
import torch
from ranks import run_ranks
from torch import nn

from tubelet.engine.batch_norm import SummedBatchNorm, average_statistics, synchronise_batch_norm
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError

LR = 0.1


def tiny():
    import tubelet.models.build  # noqa: F401 - registers the names

    torch.manual_seed(0)
    model = timm.create_model("uniformer_small", img_size=64, depths=(2, 1, 1, 1), dims=(16, 32, 32, 48), head_dim=16,
                              num_classes=5)
    for part in model.modules():  # statistics that are not where they start
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return model


def samples(step, first, count):
    return torch.stack([torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(100 * step + number)) * (1 + number)
                        for number in range(first, first + count)])


def train(world, device, cases):
    """{case: (losses, gradient norms, weights and statistics)} of 3 steps."""
    from tubelet import dist
    from tubelet.engine.build import build_engine

    results = {}
    for engine_name, stage, recompute in cases:
        module = tiny()
        names = list(module.state_dict()), [name for name, _ in module.named_parameters()]
        settings = EngineSettings(global_batch_size=4, engine=engine_name, precision="fp32", clip_grad=None,
                                  sync_batch_norm=True, optimizer={"name": "sgd", "lr": LR, "momentum": 0.0},
                                  activation_checkpointing=recompute and {"mode": recompute}, zero={"stage": stage})
        engine = build_engine(module, settings, world=world, device=device, micro_batch_size=4 // world.size)
        assert (list(module.state_dict()), [name for name, _ in module.named_parameters()]) == names
        losses, norms = [], []
        for step in range(3):
            x = samples(step, world.rank * (4 // world.size), 4 // world.size)
            loss = engine.model(x).square().mean()
            losses.append(loss.item())
            engine.backward(loss)
            norms.append(float(engine.step(LR).grad_norm))
        statistics = [buffer.double().sum().item() for name, buffer in module.named_buffers()]
        assert dist.gather(statistics) == [statistics] * world.size, "ranks hold different statistics"
        before = [buffer.clone() for buffer in module.buffers()]
        average_statistics(module)
        assert all(torch.equal(a, b) for a, b in zip(before, module.buffers())), "averaging equal numbers changed them"
        state = {name: value.numpy() for name, value in engine.full_state_dict() if value is not None}
        results[engine_name, stage, recompute] = np.mean(dist.gather(losses), axis=0), norms, state
        engine.close()
    return results


def by_hand():
    """The reference: torch's own BatchNorm, one process, all samples in one batch."""
    module, losses, norms = tiny(), [], []
    for step in range(3):
        loss = module(samples(step, 0, 4)).square().mean()
        losses.append(loss.item())
        loss.backward()
        norms.append(float(nn.utils.get_total_norm([param.grad for param in module.parameters()])))
        with torch.no_grad():
            for param in module.parameters():
                param -= LR * param.grad
                param.grad = None
    return losses, norms, {name: value.numpy() for name, value in module.state_dict().items()}


def test_two_ranks_train_as_one_with_twice_the_batch(one_thread):
    cases = [("plain", 1, None), ("plain", 1, "full"), ("zero", 1, None), ("zero", 2, "selective"), ("zero", 3, "selective")]
    expected_losses, expected_norms, expected = by_hand()
    for case, (losses, norms, state) in run_ranks(train, 2, cases)[0].items():
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, err_msg=str(case))
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-4, err_msg=str(case))
        assert state.keys() == expected.keys()
        for name, value in state.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-5, err_msg=f"{case} {name}")
    counts = {int(value) for name, value in expected.items() if name.endswith("num_batches_tracked")}
    assert counts == {3}, "the model has BatchNorm, which recomputation must not count twice"


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d(6), (5, 6)), (nn.BatchNorm2d(6, momentum=None), (5, 6, 3, 4)),
                                              (nn.BatchNorm3d(6, affine=False), (2, 6, 3, 4, 2))])
def test_one_rank_alone_computes_torchs_batch_norm(layer, shape):
    """Outputs, gradients and running statistics, in fp64, far from zero mean; then the same in evaluation."""
    holder = nn.Sequential(layer).double()
    twin = nn.Sequential(type(layer)(6, momentum=layer.momentum, affine=layer.affine)).double()
    twin.load_state_dict(holder.state_dict())
    synchronise_batch_norm(holder, torch.device("cpu"))
    assert isinstance(holder[0], SummedBatchNorm)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1000).requires_grad_()
        target = torch.randn(shape, generator=generator, dtype=torch.float64)
        pairs = []
        for model in (holder, twin):
            y = model(x)
            pairs.append((y, *torch.autograd.grad((y * target).sum(), [x, *model.parameters()])))
        for found, expected in zip(*pairs):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for found, expected in zip(holder.buffers(), twin.buffers()):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(holder.eval()(x), twin.eval()(x))


def test_timms_layers_with_an_activation_keep_it():
    model = timm.create_model("efficientnet_b0", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    expected, names = model(x), list(model.state_dict())
    synchronise_batch_norm(model, torch.device("cpu"))
    assert sum(isinstance(part, SummedBatchNorm) for part in model.modules()) == 49
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)


def test_what_does_not_go_with_it_is_refused():
    from tubelet.engine.build import check_combination

    def problems(module, **more):
        given = EngineSettings(global_batch_size=4, sync_batch_norm=True, precision="fp32",
                               optimizer={"name": "sgd", "lr": LR}, **more)
        return [str(problem) for problem in check_combination(given, module, torch.device("cpu"))]

    (refused,) = problems(nn.Linear(2, 2))
    assert "Linear has no BatchNorm" in refused and "sync_batch_norm=false" in refused
    (refused,) = problems(tiny(), compile={"backend": "eager"})
    assert "compile" in refused and issubclass(ConfigError, Exception)
    assert problems(tiny()) == []
