"""Settings of `config.data` for tests."""

import dataclasses
from typing import Any

from common.data.settings import DataSettings, ElaborateSettings, LabelStepSettings

DATA = DataSettings(
    dir="",
    train_split="train",
    eval_split="validation",
    sources=(),
    label_steps=LabelStepSettings(share=0.0, canvas=()),
    sampler="uniform",
    positive_share=0.25,
    repeat_threshold=0.001,
    pools="",
    batch_size=6,
    canvas=(64, 64),
    scales=(),
    pad_multiple=32,
    max_boxes=10,
    max_ignore=8,
    flip=True,
    scale_jitter=(0.8, 1.3),
    elaborate=ElaborateSettings(scale="none", rotate=False, boxes="hull", max_zoom=4.0),
    group_of="ordinary",
    mask_size=0,
    image_labels=False,
    proposals="",
    max_proposals=0,
    on_image_error="fatal",
    num_processes=1,
    num_threads=3,
    prefetch=2,
)


def data_settings(**changes: Any) -> DataSettings:
    """Small batches on a square canvas, but for `changes`."""
    return dataclasses.replace(DATA, **changes)
