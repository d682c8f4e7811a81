"""Without TensorFlow, only photos behind addresses cannot be read."""

import sys

import pytest

from common.data import images


def test_an_address_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it now raises ImportError
    with pytest.raises(images.ImageError, match="only TensorFlow reads such addresses"):
        images.read_file("gs://bucket/photo.jpg")
