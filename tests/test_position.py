"""Resampling of position tables and kernels against numpy, timm and the identities that must hold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from tubelet.errors import TubeletError
from tubelet.models.position import (
    inflate_kernel,
    resample_patch_kernel,
    resample_pos_embed,
    resample_temporal,
    tile_frames,
)

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


def test_time_tables_are_linear_between_the_corners():
    table = torch.randn(1, 1 + 5, 3)
    for frames in (2, 3, 9, 16):
        found = resample_temporal(table, frames, 1)
        at = np.linspace(0, 4, frames)
        expected = np.stack([np.interp(at, np.arange(5), table[0, 1:, d].numpy()) for d in range(3)], -1)
        np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-6)
        assert torch.equal(found[:, :1], table[:, :1])
    nearest = resample_temporal(table, 10, 1, "nearest")
    assert torch.equal(nearest[:, 1:], table[:, 1:].repeat_interleave(2, 1))
    constant = torch.full((1, 4, 2), 0.3)
    torch.testing.assert_close(resample_temporal(constant, 7), torch.full((1, 7, 2), 0.3))
    for wrong in ({"new_frames": 0}, {"new_frames": 4, "num_prefix": 6}, {"new_frames": 4, "method": "cubic"}):
        with pytest.raises(TubeletError):
            resample_temporal(table, **wrong)


def test_tiled_tables_say_the_same_of_every_frame():
    table = torch.randn(1, 2 + 6, 3)
    found = tile_frames(table, 4, 2)
    assert found.shape == (1, 2 + 24, 3) and torch.equal(found[:, :2], table[:, :2])
    assert all(torch.equal(found[:, 2 + 6 * t:8 + 6 * t], table[:, 2:]) for t in range(4))


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("mode", ["central", "average"])
def test_an_inflated_kernel_answers_a_still_clip_as_the_image_kernel_does(mode, frames):
    kernel, image = torch.randn(5, 3, 4, 2), torch.randn(2, 3, 12, 8)
    clip = image.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    found = F.conv3d(clip, inflate_kernel(kernel, frames, mode), stride=(frames, 4, 2))[:, :, 0]
    torch.testing.assert_close(found, F.conv2d(image, kernel, stride=(4, 2)), rtol=0, atol=1e-5)
    if mode == "central":
        moving = torch.randn(2, 3, frames, 12, 8)
        found = F.conv3d(moving, inflate_kernel(kernel, frames), stride=(frames, 4, 2))[:, :, 0]
        torch.testing.assert_close(found, F.conv2d(moving[:, :, frames // 2], kernel, stride=(4, 2)), rtol=0, atol=1e-5)


def test_a_resized_patch_kernel_answers_resized_patches_alike():
    torch.manual_seed(0)
    kernel, patches = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for size in ((16, 16), (12, 10)):
        larger = F.interpolate(patches, size=size, mode="bicubic", antialias=True, align_corners=False)
        found = torch.einsum("bihw,oihw->bo", larger, resample_patch_kernel(kernel, size))
        torch.testing.assert_close(found, torch.einsum("bihw,oihw->bo", patches, kernel), rtol=1e-9, atol=1e-9)
    for size in ((16, 16), (14, 14), (6, 8)):  # timm's own, of the same paper
        expected = resample_patch_embed(kernel.float(), list(size))
        torch.testing.assert_close(resample_patch_kernel(kernel.float(), size), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(resample_patch_kernel(kernel, (8, 8)), kernel)


def test_kernels_that_cannot_be_are_refused_with_their_shape():
    with pytest.raises(TubeletError, match="0 frames"):
        inflate_kernel(torch.zeros(2, 3, 4, 4), 0)
    with pytest.raises(TubeletError, match="2, 3, 4"):
        inflate_kernel(torch.zeros(2, 3, 4), 2)
    with pytest.raises(TubeletError, match="sum"):
        inflate_kernel(torch.zeros(2, 3, 4, 4), 2, "sum")
    with pytest.raises(TubeletError, match="0"):
        resample_patch_kernel(torch.zeros(2, 3, 4, 4), (0, 4))
