"""Deformable RoI pooling, sample by sample."""

import math

import numpy as np


def deform_roi_align(features, boxes, offsets, strides, output_size, sampling_ratio, mode):
    """`common.deform_roi.deform_roi_align` with aligned=True, in float64 loops."""
    batch, rois = boxes.shape[:2]
    channels = features[0].shape[-1]
    out = np.zeros((batch, rois, output_size, output_size, channels))
    lead = 0.5 if mode == "centre" else 0.0
    for b in range(batch):
        for r in range(rois):
            x1, y1, x2, y2 = (float(v) for v in boxes[b, r])
            width, height = x2 - x1, y2 - y1
            level = math.floor(4 + math.log2(math.sqrt(width * height) / 224) + 1e-6)
            lowest = round(math.log2(strides[0]))
            index = min(max(level - lowest, 0), len(strides) - 1)
            feature, stride = np.asarray(features[index][b], np.float64), strides[index]
            for i in range(output_size):
                for j in range(output_size):
                    dx, dy = (float(v) for v in offsets[b, r, i, j])
                    for p in range(sampling_ratio):
                        for q in range(sampling_ratio):
                            v = (i + (p + lead) / sampling_ratio) / output_size
                            u = (j + (q + lead) / sampling_ratio) / output_size
                            y = (y1 + (v + dy) * height) / stride - 0.5
                            x = (x1 + (u + dx) * width) / stride - 0.5
                            out[b, r, i, j] += _sample(feature, y, x) / sampling_ratio**2
    return out


def _sample(feature, y, x):
    height, width = feature.shape[:2]
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    total = 0.0
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            if row_weight * weight > 0:
                total = total + row_weight * weight * feature[row, column]
    return total
