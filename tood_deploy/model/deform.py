"""Sample maps between cells: TOOD's box alignment and deformable convolution (DCNv2).

Maps and read positions in cells in, sampled maps out; plain torch, differentiable, four gathers a
sample. Knows neither head nor backbone.

A sample is the bilinear mean of its four neighbours. Neighbours outside the map count as zero, so
that a sample fades to zero within one cell beyond the border (reference/SPEC.md sections 1 and 2).
Positions are never normalised to -1..1, as `grid_sample` wants them: that would cost precision.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def bilinear_corners(
    y: Tensor, x: Tensor, size_hw: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the four neighbours of every read position.

    Args:
        y, x: read positions in cells, of one shape.
        size_hw: rows and columns of the map that is read.

    Yields:
        Four times, in the shape of the positions: the neighbour's index into the flattened map
        (int64, clamped into it), and its weight, zero outside the map.
    """
    height, width = size_hw
    y0, x0 = y.floor(), x.floor()
    fy, fx = y - y0, x - x0
    for row, weight_y in ((y0, 1 - fy), (y0 + 1, fy)):
        for column, weight_x in ((x0, 1 - fx), (x0 + 1, fx)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            # Clamped after the cast, so that not even NaN can read outside the map.
            index = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            yield index, weight_y * weight_x * inside


def align_boxes(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Align boxes as TOOD does: read each of their four coordinates from a place of its own.

    Args:
        boxes: (B, 4, H, W) xyxy, in any one frame.
        offsets: (B, 8, H, W) in cells; channels 2c and 2c+1 are dy and dx of coordinate c.

    Returns:
        (B, 4, H, W): coordinate c at (i, j) is read at (i + dy, j + dx).
    """
    batch, _, height, width = boxes.shape
    dy, dx = offsets.reshape(batch, 4, 2, height, width).unbind(2)
    y = dy + torch.arange(height, device=boxes.device, dtype=boxes.dtype)[:, None]
    x = dx + torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    flat = boxes.flatten(2)
    aligned = torch.zeros_like(flat)
    for index, weight in bilinear_corners(y, x, (height, width)):
        aligned = aligned + flat.gather(2, index.flatten(2)) * weight.flatten(2)
    return aligned.reshape(batch, 4, height, width)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with taps that read at offset places: deformable convolution, version 2 or 1.

    Args:
        x: (B, C, H, W).
        offset: (B, 2*G*T, H', W') in cells: dy and dx of each of the kernel's T taps in row-major
            order, for each of G offset groups, which split C evenly and consecutively.
        mask: (B, G*T, H', W') factors of the samples; None for version 1, which has none.
        weight: (C', C / groups, kernel rows, kernel columns).
        stride, padding, groups: as of an ordinary convolution.

    Returns:
        (B, C', H', W').
    """
    out_channels, _, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    samples = sample_taps(x, offset, mask, (kernel_h, kernel_w), stride=stride, padding=padding)
    out = _contract(samples, weight, groups).reshape(x.shape[0], out_h, out_w, out_channels)
    return out.permute(0, 3, 1, 2).contiguous()


def sample_taps(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_hw: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 1,
) -> Tensor:
    """Return what the T taps of a deformable kernel read, (B*H'*W', T, C).

    Args:
        x, offset, mask: as `deform_conv2d` takes them.
        kernel_hw: rows and columns of the kernel.
        stride, padding: as of an ordinary convolution.
    """
    batch, channels, height, width = x.shape
    taps = kernel_hw[0] * kernel_hw[1]
    offset_groups = offset.shape[1] // (2 * taps)
    out_h, out_w = offset.shape[2:]
    # Positions are ordered (B, H', W', T, G), so that each reads one row of C / G channels that
    # lie side by side in memory.
    dy, dx = (
        offset.reshape(batch, offset_groups, taps, 2, out_h, out_w)
        .permute(3, 0, 4, 5, 2, 1)
        .unbind(0)
    )
    factor = (
        None
        if mask is None
        else mask.reshape(batch, offset_groups, taps, out_h, out_w).permute(0, 3, 4, 2, 1)
    )
    tap_y, tap_x = _tap_positions((out_h, out_w), kernel_hw, stride, padding, x)
    rows = x.permute(0, 2, 3, 1).reshape(
        batch * height * width * offset_groups, channels // offset_groups
    )
    image = torch.arange(batch, device=x.device).reshape(batch, 1, 1, 1, 1) * (height * width)
    group = torch.arange(offset_groups, device=x.device)
    samples: Tensor | None = None
    for index, share in bilinear_corners(tap_y + dy, tap_x + dx, (height, width)):
        index = (image + index) * offset_groups + group
        read = rows.index_select(0, index.reshape(-1))
        read = read * (share if factor is None else share * factor).reshape(-1, 1)
        samples = read if samples is None else samples + read
    assert samples is not None
    return samples.to(x.dtype).reshape(batch * out_h * out_w, taps, channels)


def _tap_positions(
    out_hw: tuple[int, int], kernel_hw: tuple[int, int], stride: int, padding: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return where each tap reads without an offset.

    Args:
        out_hw: rows and columns H', W' of the output.
        kernel_hw: rows and columns of the kernel, which has T taps.
        stride, padding: of the convolution, in cells.
        like: the features, whose device and, from float32 on, type the positions have. bf16 would
            step by whole cells from 128 on.

    Returns:
        y (H', 1, T, 1) and x (1, W', T, 1), in cells.
    """
    # Not torch.promote_types: PyTorch's tracer would keep that as a call in the program.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def cells(count: int) -> Tensor:
        return torch.arange(count, device=like.device, dtype=dtype)

    tap_y = cells(kernel_hw[0]).repeat_interleave(kernel_hw[1])
    tap_x = cells(kernel_hw[1]).repeat(kernel_hw[0])
    y = (cells(out_hw[0]) * stride - padding)[:, None, None, None] + tap_y[:, None]
    x = (cells(out_hw[1]) * stride - padding)[:, None, None] + tap_x[:, None]
    return y, x


def _contract(samples: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Sum samples over taps and channels with the weights of a convolution.

    Args:
        samples: (N, T, C) of N output cells, T taps and C channels.
        weight: (C', C / groups, kernel rows, kernel columns).
        groups: of the convolution.

    Returns:
        (N, C').
    """
    count, taps, channels = samples.shape
    out_channels = weight.shape[0]
    if groups == 1:
        columns = samples.reshape(count, taps * channels)
        kernel = weight.flatten(2).permute(2, 1, 0).reshape(taps * channels, out_channels)
        return columns @ kernel
    width = channels // groups
    columns = samples.reshape(count, taps, groups, width).permute(2, 0, 1, 3)
    columns = columns.reshape(groups, count, taps * width)
    kernel = weight.reshape(groups, out_channels // groups, width, taps).permute(0, 3, 2, 1)
    kernel = kernel.reshape(groups, taps * width, -1)
    return torch.bmm(columns, kernel).transpose(0, 1).reshape(count, out_channels)


class DeformConv2d(nn.Module):
    """A DCNv2 layer with its own offset convolution, in mmcv's state-dict layout. Has no bias.

    The offset convolution gives three blocks of G*T channels: the first two are the offsets, the
    third, through a sigmoid, is the mask (reference/SPEC.md section 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        offset_groups: int = 1,
    ) -> None:
        """Build it, with random weights and offsets of zero.

        Args:
            in_channels, out_channels: C and C'.
            kernel_size: rows and columns of the kernel.
            stride, padding, groups: as of an ordinary convolution.
            offset_groups: G, groups of input channels that share offsets.
        """
        super().__init__()
        self.stride, self.padding, self.groups = stride, padding, groups
        self.offset_groups = offset_groups
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size)
        )
        self.conv_offset = nn.Conv2d(
            in_channels, 3 * offset_groups * kernel_size**2, kernel_size, stride, padding
        )
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.init_offsets()

    def init_offsets(self) -> None:
        """Make it an ordinary convolution at half strength: offsets 0, mask 0.5."""
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def offset_and_mask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return offsets (B, 2*G*T, H', W') and mask (B, G*T, H', W') for x (B, C, H, W)."""
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return torch.cat((first, second), dim=1), mask.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', H', W') for x (B, C, H, W)."""
        offset, mask = self.offset_and_mask(x)
        return deform_conv2d(
            x,
            offset,
            mask,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )


class OffsetConv2d(nn.Module):
    """A DCNv1 layer whose offsets come from elsewhere. Has neither bias nor mask."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, padding: int = 0
    ) -> None:
        """Build it, with random weights.

        Args:
            in_channels, out_channels: C and C'.
            kernel_size: rows and columns of the kernel.
            padding: as of an ordinary convolution.
        """
        super().__init__()
        self.padding = padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Return (B, C', H', W').

        Args:
            x: (B, C, H, W).
            offset: (B, 2*T, H', W') dy and dx in cells of each of the T taps, in row-major order.
        """
        return deform_conv2d(x, offset, None, self.weight, padding=self.padding)
