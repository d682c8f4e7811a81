"""Batches of photos that are turned and cropped, for tests."""

import dataclasses

from common.data import input as inputs
from common.data.plans.plan import train_plan
from common.data.settings import ElaborateSettings
from tests.common.data.factories import data_settings

MASK = 16
CROP = ElaborateSettings(scale="crop", rotate=True, boxes="hull", max_zoom=4.0)


def settings(**changes):
    fields = {
        "canvas": (64, 96),
        "batch_size": 6,
        "mask_size": MASK,
        "sampler": "class_aware",
        "scale_jitter": (1.0, 1.0),
        "elaborate": CROP,
    }
    return data_settings(**(fields | changes))


def read(dataset, num_steps=6, start_step=0, process=(0, 1), **changes):
    data = settings(**changes)
    return list(
        inputs.train_batches(
            dataset,
            train_plan(dataset, data, 3),
            data,
            seed=5,
            start_step=start_step,
            num_steps=num_steps,
            process_index=process[0],
            process_count=process[1],
        )
    )


def changed(**fields):
    return dataclasses.replace(CROP, **fields)
