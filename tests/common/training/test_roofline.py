"""Bounds of operations and sums, and the bound of a published training beside its speed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from common.training.pod import roofline
from common.training.pod.flops import CONVOLUTION, PRODUCT, SORT, Operation, operations
from common.training.pod.places import RATES, Place, find_place

V4 = RATES["v4"]


def test_products_fill_the_matrix_unit_or_wait_for_memory():
    flops = 10**12
    full = roofline.seconds(Operation(PRODUCT, flops, 256, 512, 0), V4)
    assert full == pytest.approx(1 / 275)
    assert roofline.seconds(Operation(CONVOLUTION, flops, 64, 128, 0), V4) == pytest.approx(
        2 * full
    )
    assert roofline.seconds(Operation(PRODUCT, flops, 256, 32, 0), V4) == pytest.approx(4 * full)
    bound = roofline.seconds(Operation(PRODUCT, flops, 256, 256, 10**11), V4)
    assert bound == pytest.approx(100 / 1228)
    assert roofline.seconds(Operation(SORT, 0, 0, 0, 10**9, turns=3), V4) == pytest.approx(3 / 1228)


def test_sums_go_over_links_within_a_slice_and_over_the_network_between():
    size = 10**9
    alone = roofline.all_reduce_seconds(size, Place("v6e", 1, 1))
    assert alone == {}
    one = roofline.all_reduce_seconds(size, find_place("v6e-256"))
    assert one == {"links": pytest.approx(2 * 255 / 256 / 448)}
    two = roofline.all_reduce_seconds(size, find_place("v6e-256x2"))
    # Each of 64 hosts sends a 64th to the other slice.
    assert two == one | {"network": pytest.approx(1 / 64 / 50)}
    gpus = roofline.all_reduce_seconds(size, find_place("h100-8x4"))
    assert gpus == {
        "links": pytest.approx(2 * 7 / 8 / 900),
        "network": pytest.approx(2 * 3 / 4 / 200),
    }


def test_operations_of_one_shape_are_one_and_loops_count_their_turns():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 8), (5, 8, 8))]
    (product, reduction) = roofline.merged(operations(layers, *shapes))
    assert product == Operation(PRODUCT, 5 * 2 * 4 * 8 * 8, 8, 8, 5 * 4 * (32 + 64 + 32))
    assert reduction.bytes == 4 * (32 + 1)


# Images/s of a chip, Mask R-CNN R50 at 832x1344, from MLPerf's logs: v0.7 tpu-v3-1024 and v1.0
# tpu-v4-128.
@pytest.mark.parametrize(("kind", "published"), [("v3", (20, 27)), ("v4", (42, 44))])
def test_published_speeds_are_predicted_within_a_quarter(kind, published):
    """The operations are those of configs/detection/coco_mask_r50.py with 4 images of 800x1344:
    `scripts.plan_pod --slice=v4-128 --images_per_device=4 --num_classes=80 --nocompile --json`.
    """
    rows = json.loads(Path(__file__).with_name("mask_r50_operations.json").read_text())
    where = Place(kind, 64, 1)
    bound = sum(
        roofline.step_seconds([Operation(*row) for row in rows], 177_000_000, where).values()
    )
    least, likely, most = (4 * where.rates.per_chip * r / bound for r in roofline.REACHED)
    assert likely == pytest.approx(sum(published) / 2, rel=0.25)
    assert least < published[0] and published[1] < most
