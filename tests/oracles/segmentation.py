"""Twins of the segmenter's head, of pasting and of voting, written as their definitions read."""

import numpy as np


def bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, c) resized to (H, W, c) with half-pixel centres, pixel by pixel."""
    height, width = x.shape[:2]
    out = np.zeros((*size, *x.shape[2:]))
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
            u = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            y0, u0 = int(y), int(u)
            y1, u1 = min(y0 + 1, height - 1), min(u0 + 1, width - 1)
            top = x[y0, u0] * (1 - (u - u0)) + x[y0, u1] * (u - u0)
            low = x[y1, u0] * (1 - (u - u0)) + x[y1, u1] * (u - u0)
            out[row, column] = top * (1 - (y - y0)) + low * (y - y0)
    return out


def head(branches, params, stats, class_: int, size: tuple[int, int]) -> np.ndarray:
    """Foreground probability (H, W) of one crop; `branches` (h_i, w_i, c_i), finest first."""
    finest = branches[0].shape[:2]
    x = np.concatenate([bilinear(b, finest) for b in branches], axis=-1)
    x = x @ params["mix"]["kernel"][0, 0] + params["mix"]["bias"]
    x = (x - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    x = np.maximum(x * params["norm"]["scale"] + params["norm"]["bias"], 0)
    columns = slice(2 * class_, 2 * class_ + 2)
    logits = x @ params["logits"]["kernel"][0, 0][:, columns] + params["logits"]["bias"][columns]
    logits = bilinear(logits, size)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers[..., 1] / powers.sum(-1)


def paste(values: np.ndarray, window, photo_size) -> np.ndarray:
    """(h, w) brought to the whole photo, NaN where the pixel's centre is outside of the box."""
    out = np.full(photo_size, np.nan)
    xmin, ymin, xmax, ymax = window
    height, width = values.shape
    for row in range(photo_size[0]):
        for column in range(photo_size[1]):
            x, y = column + 0.5, row + 0.5
            if not (xmin <= x < xmax and ymin <= y < ymax):
                continue
            v = min(max((y - ymin) / (ymax - ymin) * height - 0.5, 0), height - 1)
            u = min(max((x - xmin) / (xmax - xmin) * width - 0.5, 0), width - 1)
            v0, u0 = int(v), int(u)
            v1, u1 = min(v0 + 1, height - 1), min(u0 + 1, width - 1)
            top = values[v0, u0] * (1 - (u - u0)) + values[v0, u1] * (u - u0)
            low = values[v1, u0] * (1 - (u - u0)) + values[v1, u1] * (u - u0)
            out[row, column] = top * (1 - (v - v0)) + low * (v - v0)
    return out


def paste_float32(maps: np.ndarray, content: tuple[int, int], window, pixels) -> np.ndarray:
    """Probabilities (V, H, W) at all pixels top, left, bottom, right, rows first, in float32.

    `maps` (V, Y, X) are whole numbers, 65535 is 1; the content is at their top left.
    """
    top, left, bottom, right = (int(side) for side in pixels)
    xmin, ymin, xmax, ymax = (float(side) for side in window)
    values = maps[:, : content[0], : content[1]].astype(np.float32)
    for axis, start, stop, low, high in (
        (1, top, bottom, ymin, ymax),
        (2, left, right, xmin, xmax),
    ):
        cells = values.shape[axis]
        places = (np.arange(start, stop) + 0.5 - low) * (cells / max(high - low, 1e-9)) - 0.5
        places = np.clip(places, 0, cells - 1)
        first = places.astype(int)
        share = (places - first).astype(np.float32).reshape((-1, 1) if axis == 1 else -1)
        before = np.take(values, first, axis)
        after = np.take(values, np.minimum(first + 1, cells - 1), axis)
        values = before + (after - before) * share
    return values * np.float32(1 / 65535)


def majority(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Pixel by pixel: most voters win, a draw goes to the mean."""
    voters, height, width = probabilities.shape
    out = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            opinions = probabilities[:, row, column]
            yes = sum(p > threshold for p in opinions)
            if yes * 2 == voters:
                out[row, column] = opinions.mean() >= threshold
            else:
                out[row, column] = yes * 2 > voters
    return out
