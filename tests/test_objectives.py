"""The classification objective against hand-written sums in float64."""

import math

import pytest
import torch
from torch import nn

from tubelet.objectives.classification import Classification
from tubelet.objectives.settings import ObjectiveSettings

MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)


class Constant(nn.Module):
    """Gives the same logits whatever it sees, and keeps what it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits))

    def forward(self, pixels):
        self.seen = pixels
        return self.logits


def objective(name="softmax", classes=4, **kwargs) -> Classification:
    return Classification(ObjectiveSettings(name=name, **kwargs), classes, MEAN, STD)


def pixels(count, *shape):
    return torch.randint(0, 256, (count, 3, *(shape or (2, 2))), dtype=torch.uint8)


def by_hand(logits, targets, name):
    """Loss of one sample from lists of floats."""
    if name == "softmax":
        total = math.fsum(math.exp(x) for x in logits)
        return -math.fsum(t * (x - math.log(total)) for x, t in zip(logits, targets))
    return -math.fsum(t * math.log(1 / (1 + math.exp(-x))) + (1 - t) * math.log(1 / (1 + math.exp(x)))
                      for x, t in zip(logits, targets))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_loss_is_the_mean_over_samples_written_out(name, smoothing, soft):
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.rand(5, 4).softmax(-1) if soft else torch.tensor([0, 3, 2, 2, 1])
    targets = labels.double() if soft else torch.eye(4, dtype=torch.float64)[labels]
    targets = targets * (1 - smoothing) + smoothing / 4
    expected = sum(by_hand(x, t, name) for x, t in zip(logits.tolist(), targets.tolist())) / 5
    model = Constant(logits)
    output = objective(name, label_smoothing=smoothing)(model, {"pixels": pixels(5), "labels": labels})
    assert output["loss"].item() == pytest.approx(expected, rel=1e-7)
    hard = targets.argmax(-1)
    assert output["accuracy"].item() == pytest.approx((logits.argmax(-1) == hard).double().mean().item())
    output["loss"].backward()
    assert model.logits.grad.abs().max() > 0


def test_sigmoid_loss_at_bias_minus_ten_is_the_published_start():
    for classes, expected in [(21_843, 10.9917), (1000, 10.0000454 + 999 * 4.54e-5)]:
        model = Constant(torch.full((2, classes), -10.0))
        loss = objective("sigmoid", classes)(model, {"pixels": pixels(2), "labels": torch.tensor([0, 5])})["loss"]
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert loss.dtype == torch.float32


def test_pixels_are_normalised_per_channel_in_the_models_type():
    for shape in ((4, 6), (3, 4, 6)):  # images, and clips [B, 3, T, H, W]
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model, seen = Constant(torch.zeros(2, 4, dtype=dtype)), pixels(2, *shape)
            loss = objective()(model, {"pixels": seen, "labels": torch.tensor([0, 1])})["loss"]
            assert model.seen.dtype == dtype and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            for channel in range(3):
                value = (seen[1, channel].double() / 255 - MEAN[channel]) / STD[channel]
                rtol = 8e-3 if dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(model.seen[1, channel].double(), value, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_evaluation_sums_over_valid_samples_only(name):
    logits = torch.randn(8, 7, dtype=torch.float64)
    logits[6:] = float("nan")  # padding may hold anything
    labels = torch.tensor([3, 0, 6, 1, 2, 2, -1, 99])
    valid = torch.arange(8) < 6
    found = objective(name, 7, label_smoothing=0.3).evaluate(
        Constant(logits), {"pixels": pixels(8), "labels": labels, "valid": valid})
    eye = torch.eye(7)
    expected = sum(by_hand(logits[i].tolist(), eye[labels[i]].tolist(), name) for i in range(6))
    ranks = [int((logits[i] > logits[i, labels[i]]).sum()) for i in range(6)]
    assert {key: value.dtype for key, value in found.items()} == dict.fromkeys(found, torch.float64)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-9)  # of the labels themselves, not smoothed
    assert (found["acc1"], found["acc5"], found["count"]) == (
        sum(rank == 0 for rank in ranks), sum(rank < 5 for rank in ranks), 6)


def test_fewer_than_five_classes_and_ties_count():
    found = objective(classes=3).evaluate(Constant(torch.zeros(3, 3)), {"pixels": pixels(3), "labels": torch.arange(3)})
    assert (found["acc1"], found["acc5"], found["count"]) == (1, 3, 3)
