"""How large the cases are: for an accelerator, or so small that a CPU tries all in a minute."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all cases.

    Attributes:
      dry: of the dry run: some cases leave out what takes minutes on a CPU.
      patience: factor of the seconds that cases may take; CPUs are slow and busy.
      repeats: turns in which calls are timed.
      seconds: that the timed calls of each side take together, about.
      matrix: side of the matrix products that measure the peak rate.
      canvas: height, width of the detectors' images, as padded.
      photo: height, width of what torchvision is given for it, which pads by itself.
      batches: images of a step of the plain detector.
      variant_batch: of the other detectors, of compiled torch, and of the profile.
      classes: of the detectors, without background.
      model: changes of `config.model` of our detectors.
      torch_threads: of torch.
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
    patience: float
    repeats: int
    seconds: float
    matrix: int
    canvas: tuple[int, int]
    photo: tuple[int, int]
    batches: tuple[int, ...]
    variant_batch: int
    classes: int
    model: tuple[tuple[str, Any], ...]
    torch_threads: int
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
    patience=1.0,
    repeats=7,
    seconds=1.0,
    matrix=8192,
    canvas=(800, 1344),
    photo=(800, 1333),
    batches=(8, 16, 2),
    variant_batch=8,
    classes=500,
    model=(),
    torch_threads=2,
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
    patience=10.0,
    repeats=1,
    seconds=0.02,
    matrix=128,
    canvas=(64, 96),
    photo=(64, 96),
    batches=(1,),
    variant_batch=1,
    classes=5,
    model=(
        ("backbone", "resnet10"),
        ("fpn_channels", 16),
        ("box_head.width", 32),
        ("mask_head.width", 8),
        ("mask_head.num_convs", 1),
        ("mask_head.pool_size", 4),
        ("box_head.sample.num_samples", 16),
        ("rpn.train_proposals.pre_nms", 50),
        ("rpn.train_proposals.post_nms", 50),
        ("rpn.test_proposals.pre_nms", 50),
        ("rpn.test_proposals.post_nms", 50),
        ("detections.max_candidates", 64),
        ("detections.max_detections", 20),
    ),
    torch_threads=1,
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
