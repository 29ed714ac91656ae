"""Resampling of position tables against numpy, timm and the identities that must hold."""

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from tubelet.errors import TubeletError
from tubelet.models.position import resample_pos_embed

METHODS = ("bicubic_antialias", "bilinear_align_corners")


def zoom_linear(grid: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """[H, W, D] -> [h, w, D], separable and linear with the corners kept: scipy.ndimage.zoom(order=1) by hand."""
    for axis, count in enumerate(new):
        old = grid.shape[axis]
        at = np.linspace(0, old - 1, count) if count > 1 else np.zeros(1)
        low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        high = np.minimum(low + 1, old - 1)
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, high, axis) * share
    return grid


GRIDS = [((14, 14), (24, 24)), ((14, 14), (32, 32)), ((16, 16), (37, 37)), ((7, 7), (12, 12)), ((5, 9), (8, 6)),
         ((24, 24), (14, 14)), ((4, 4), (2, 8))]


@pytest.mark.parametrize("old, new", GRIDS)
def test_aligned_corners_equal_a_separable_linear_zoom(old, new):
    table = torch.randn(1, 1 + old[0] * old[1], 6)
    found = resample_pos_embed(table, old, new, 1, "bilinear_align_corners")
    expected = zoom_linear(table[0, 1:].double().numpy().reshape(*old, 6), new)
    np.testing.assert_allclose(found[0, 1:].numpy().reshape(*new, 6), expected, atol=1e-5)
    corners = table[0, 1:].reshape(*old, 6)[::old[0] - 1, ::old[1] - 1]
    torch.testing.assert_close(found[0, 1:].reshape(*new, 6)[::new[0] - 1, ::new[1] - 1], corners, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old, new", GRIDS)
def test_bicubic_antialias_is_timms(old, new):
    table = torch.randn(1, 2 + old[0] * old[1], 6)
    expected = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=2)
    assert torch.equal(resample_pos_embed(table, old, new, 2), expected)


@pytest.mark.parametrize("method", METHODS)
def test_prefix_constants_and_equal_grids_are_left_alone(method):
    for dtype in (torch.float32, torch.bfloat16):
        table = torch.randn(1, 3 + 16, 8).to(dtype)
        found = resample_pos_embed(table, (4, 4), (6, 5), 3, method)
        assert found.shape == (1, 3 + 30, 8) and found.dtype == dtype
        assert torch.equal(found[:, :3], table[:, :3])
        assert torch.equal(resample_pos_embed(table, (4, 4), (4, 4), 3, method), table)
    constant = torch.full((1, 16, 2), 0.7)
    torch.testing.assert_close(resample_pos_embed(constant, (2, 8), (8, 2), 0, method), constant)


def test_equal_counts_of_another_shape_are_resampled():
    """2 x 8 and 4 x 4 have 16 patches both; taking one for the other would scramble the picture without a word."""
    table = torch.arange(16.0).reshape(1, 16, 1)
    assert not torch.equal(resample_pos_embed(table, (2, 8), (4, 4)), table)


def test_a_table_that_is_no_such_grid_is_refused():
    with pytest.raises(TubeletError, match="not a grid of 14 x 14"):
        resample_pos_embed(torch.zeros(1, 196, 8), (14, 14), (24, 24), num_prefix=1)
    with pytest.raises(TubeletError, match="nearest"):
        resample_pos_embed(torch.zeros(1, 4, 8), (2, 2), (3, 3), method="nearest")
