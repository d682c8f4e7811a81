"""How large the cases are: for an accelerator, or so small that a CPU tries all in a minute."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all cases.

    Attributes:
      dry: of the dry run: some cases leave out what takes minutes on a CPU.
      seconds: that the timed calls of each side take together, about.
      matrix: side of the matrix products that measure the peak rate.
      canvas: height, width of the detectors' images, as padded.
      photo: height, width of what torchvision is given for it, which pads by itself.
      batches: images of a step of the plain detector.
      variant_batch: of the other detectors, of compiled torch, and of the profile.
      classes: of the detectors, without background.
      backbone: of our detectors.
      small_canvas: of the detectors that are compared with the CPU.
      rois: regions of an image, of the kernels.
      boxes: of an image, of NMS.
      images: of a kernel's call.
      channels: of the kernels' feature maps.
      crops: number of the segmenter's crops, their canvas, and timm's, in multiples of 32.
      layout: fields of a smaller HRNet than `hrnet`; (): the whole.
      hrnet: name of the segmenter's backbone.
      groups, group_size: of the ensemble's operators.
      merged_images, peer_every: of `bench_ensemble`.
      unit_tests: arguments of pytest.
    """

    dry: bool
    seconds: float
    matrix: int
    canvas: tuple[int, int]
    photo: tuple[int, int]
    batches: tuple[int, ...]
    variant_batch: int
    classes: int
    backbone: str
    small_canvas: tuple[int, int]
    rois: int
    boxes: int
    images: int
    channels: int
    crops: tuple[tuple[int, tuple[int, int], tuple[int, int]], ...]
    layout: tuple[tuple[str, Any], ...]
    hrnet: str
    groups: int
    group_size: int
    merged_images: int
    peer_every: int
    unit_tests: tuple[str, ...]


FULL = Sizes(
    dry=False,
    seconds=1.0,
    matrix=8192,
    canvas=(800, 1344),
    photo=(800, 1333),
    batches=(8, 16, 2),
    variant_batch=8,
    classes=500,
    backbone="resnet50",
    small_canvas=(256, 320),
    rois=512,
    boxes=2000,
    images=8,
    channels=256,
    crops=((64, (112, 112), (128, 128)), (16, (256, 608), (256, 608))),
    layout=(),
    hrnet="hrnet_w48",
    groups=4096,
    group_size=64,
    merged_images=2000,
    peer_every=40,
    unit_tests=(
        "tests/common/geometry",
        "tests/common/nn/test_deform_conv.py",
        "tests/ensemble/test_operators.py",
        "tests/detection/test_losses.py",
        "--numprocesses=8",
    ),
)
DRY = Sizes(
    dry=True,
    seconds=0.02,
    matrix=128,
    canvas=(64, 96),
    photo=(64, 96),
    batches=(1,),
    variant_batch=1,
    classes=5,
    backbone="resnet10",
    small_canvas=(64, 64),
    rois=4,
    boxes=20,
    images=2,
    channels=8,
    crops=((2, (32, 32), (32, 32)),),
    layout=(("width", 4), ("modules", (1, 0, 0)), ("blocks", 1)),
    hrnet="hrnet_w18",
    groups=4,
    group_size=4,
    merged_images=4,
    peer_every=0,
    unit_tests=("tests/common/geometry/test_boxes.py",),
)
