"""Deformable convolution, tap by tap."""

import math

import numpy as np


def deform_conv2d(x, offsets, kernel, mask, stride, padding, dilation, groups):
    """`common.nn.deform_conv.deform_conv2d` in float64 loops; int arguments."""
    side, _, per_group, features = kernel.shape
    batch, height, width, _ = x.shape
    out_height, out_width = offsets.shape[1:3]
    out = np.zeros((batch, out_height, out_width, features))
    share = features // groups
    for b, i, j, u, v in np.ndindex(batch, out_height, out_width, side, side):
        tap = u * side + v
        y = i * stride - padding + u * dilation + float(offsets[b, i, j, 2 * tap])
        z = j * stride - padding + v * dilation + float(offsets[b, i, j, 2 * tap + 1])
        value = _sample(x[b].astype(np.float64), y, z)
        if mask is not None:
            value = value * float(mask[b, i, j, tap])
        for g in range(groups):
            part = value[g * per_group : (g + 1) * per_group]
            columns = slice(g * share, (g + 1) * share)
            out[b, i, j, columns] += part @ kernel[u, v, :, columns].astype(np.float64)
    return out


def _sample(feature, y, x):
    """Bilinear value; cells outside the map are zero."""
    height, width, channels = feature.shape
    top, left = math.floor(y), math.floor(x)
    value = np.zeros(channels)
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                value += row_weight * weight * feature[row, column]
    return value
