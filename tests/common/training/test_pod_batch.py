"""A plan is that of the run: of the batch that the config has."""

import re

import pytest

from common.training.pod.batch import images_of_device


@pytest.mark.parametrize(
    ("batch_size", "devices", "asked", "images", "note"),
    [
        (1024, 256, None, 4, ""),
        (1024, 512, None, 2, ""),
        (64, 64, None, 1, ""),
        (1024, 256, 4, 4, ""),
        (1024, 256, 2, 2, "batch of 512, 2 a device; config.data.batch_size is 1024"),
        (64, 512, None, 2, "batch of 1024, 2 a device; .* is 64, which 512 devices cannot"),
        (96, 64, None, 2, "is 96, which 64 devices cannot share evenly"),
        (64, 512, 1, 1, "batch of 512, 1 a device; config.data.batch_size is 64"),
    ],
)
def test_a_device_has_its_share_of_the_configs_batch(batch_size, devices, asked, images, note):
    found, said = images_of_device(batch_size, devices, asked)
    assert found == images
    assert re.search(note, said) if note else said == ""
