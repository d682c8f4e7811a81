"""Brute-force twin of common.nn.layers.deform_conv: one sample at a time, float64.

Gradients of the offsets are central differences; everything is linear in the other arrays.
"""

import math

import numpy as np

_STEP = 1e-6


def sample(image, y, x):
    """Value (C,) of the image (H, W, C) at a point; cells outside are zero."""
    height, width, channels = image.shape
    value = np.zeros(channels)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return value


def spread(gradient, y, x, value):
    """Adds the gradient with respect to the image of sum(sample * value)."""
    height, width = gradient.shape[:2]
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                gradient[row, column] += (1 - abs(y - row)) * (1 - abs(x - column)) * value


def _taps(offsets, kernel, stride, padding, dilation):
    """Yields (image, output row, output column, kernel row, kernel column, y, x)."""
    batch, height, width = offsets.shape[:3]
    rows, columns = kernel.shape[:2]
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for r in range(rows):
                    for c in range(columns):
                        dy, dx = offsets[b, i, j, 2 * (r * columns + c) :][:2]
                        y = i * stride - padding + r * dilation + float(dy)
                        x = j * stride - padding + c * dilation + float(dx)
                        yield b, i, j, r, c, y, x


def _dense(kernel, groups):
    """Kernel (k, k, C, D) with zeros between the groups."""
    rows, columns, c, d = kernel.shape
    dense = np.zeros((rows, columns, c * groups, d))
    for g in range(groups):
        outputs = slice(g * d // groups, (g + 1) * d // groups)
        dense[:, :, g * c : (g + 1) * c, outputs] = kernel[..., outputs]
    return dense


def deform_conv2d(x, offsets, kernel, mask, stride=1, padding=0, dilation=1, groups=1):
    """Returns the output (B, h, w, D); `mask` None: 1."""
    x, dense = x.astype(np.float64), _dense(kernel, groups)
    output = np.zeros((*offsets.shape[:3], kernel.shape[-1]))
    for b, i, j, r, c, *point in _taps(offsets, kernel, stride, padding, dilation):
        factor = 1.0 if mask is None else mask[b, i, j, r * kernel.shape[1] + c]
        output[b, i, j] += factor * sample(x[b], *point) @ dense[r, c]
    return output


def gradients(x, offsets, kernel, mask, gradient, stride=1, padding=0, dilation=1, groups=1):
    """Returns those of sum(output * gradient) for x, offsets, kernel and mask."""
    x, dense = x.astype(np.float64), _dense(kernel, groups)
    x_grad, offsets_grad = np.zeros(x.shape), np.zeros(offsets.shape)
    dense_grad = np.zeros(dense.shape)
    mask_grad = np.zeros((*offsets.shape[:3], offsets.shape[3] // 2))
    for b, i, j, r, c, py, px in _taps(offsets, kernel, stride, padding, dilation):
        tap = r * kernel.shape[1] + c
        factor = 1.0 if mask is None else mask[b, i, j, tap]
        wanted = dense[r, c] @ gradient[b, i, j]
        value = sample(x[b], py, px)
        mask_grad[b, i, j, tap] = value @ wanted
        dense_grad[r, c] += factor * np.outer(value, gradient[b, i, j])
        spread(x_grad[b], py, px, factor * wanted)
        along_y = sample(x[b], py + _STEP, px) - sample(x[b], py - _STEP, px)
        along_x = sample(x[b], py, px + _STEP) - sample(x[b], py, px - _STEP)
        offsets_grad[b, i, j, 2 * tap] = factor * along_y @ wanted / (2 * _STEP)
        offsets_grad[b, i, j, 2 * tap + 1] = factor * along_x @ wanted / (2 * _STEP)
    kernel_grad = np.zeros(kernel.shape)
    c, d = kernel.shape[2], kernel.shape[3] // groups
    for g in range(groups):
        outputs = slice(g * d, (g + 1) * d)
        kernel_grad[..., outputs] = dense_grad[:, :, g * c : (g + 1) * c, outputs]
    return x_grad, offsets_grad, kernel_grad, mask_grad
