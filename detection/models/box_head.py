"""Box heads: classify each RoI and regress its box.

Shape legend
  B  images
  R  RoIs per image (sampled ones in training, proposals in inference)
  F  the first RoIs of each image, whose boxes are regressed; in inference F = R
  N  RoIs of all images, D their features; S S C those of a pooled RoI
  K  classes
  L  class logits of a RoI, see `detection.classifiers`
  k  boxes regressed per RoI: K (one a class) or 1 (class-agnostic)
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.nn.layers.conv import Conv
from common.nn.layers.norm import Norm
from detection.classifiers import RoIClassifier
from detection.models.settings import HeadConvSettings
from detection.structures import HeadOutput, Pool

DENSE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
CLASSIFIER_INIT = nn.initializers.normal(0.01)
REGRESSOR_INIT = nn.initializers.normal(0.001)


def dense_layers(
    x: Float[Array, "N D"], width: int, dtype: jnp.dtype, prefix: str = "", count: int = 2
) -> Array:
    """Fully connected layers with ReLU, made in the scope of the calling module."""
    for number in range(1, count + 1):
        name = f"{prefix}fc{number}"
        x = nn.relu(nn.Dense(width, dtype=dtype, kernel_init=DENSE_INIT, name=name)(x))
    return x


def conv_layers(
    x: Float[Array, "N S S C"],
    convs: HeadConvSettings,
    train: bool,
    axis_name: str | None,
    dtype: jnp.dtype,
) -> Float[Array, "N S S D"]:
    """3x3 convolutions with norm and ReLU, made in the scope of the calling module."""
    plain = convs.norm == "none"
    for number in range(1, convs.count + 1):
        conv = Conv(convs.width, 3, use_bias=plain, dtype=dtype, name=f"conv{number}")
        x = conv(x)
        if not plain:
            norm = Norm(convs.norm, axis_name=axis_name, dtype=dtype, name=f"norm{number}")
            x = norm(x, train)
        x = nn.relu(x)
    return x


def classify(
    x: Float[Array, "N D"], num_images: int, classifier: RoIClassifier, dtype: jnp.dtype
) -> Float[Array, "B R L"]:
    """Layer `classifier`, made in the scope of the calling module."""
    dense = nn.Dense(
        classifier.num_logits,
        dtype=dtype,
        kernel_init=CLASSIFIER_INIT,
        bias_init=nn.initializers.constant(classifier.start_bias),
        name="classifier",
    )
    return dense(x).reshape(num_images, -1, classifier.num_logits).astype(jnp.float32)


def regress(
    x: Float[Array, "N D"], num_images: int, num_classes: int, dtype: jnp.dtype
) -> Float[Array, "B F k 4"]:
    """Layer `regressor`, made in the scope of the calling module; class-agnostic: 1 class."""
    dense = nn.Dense(4 * num_classes, dtype=dtype, kernel_init=REGRESSOR_INIT, name="regressor")
    return dense(x).reshape(num_images, -1, num_classes, 4).astype(jnp.float32)


class TwoFCHead(nn.Module):
    """The plain ("sibling") head: class and box from the same two fully connected layers.

    Attributes:
      classifier: what its class logits are.
      width: of the fully connected layers.
      class_agnostic: one box a RoI instead of one a class.
      dtype: of convolutions and matmuls.
      num_fcs: fully connected layers, where there are not two.
      convs: convolutions before them; None: there are none.
      axis_name: device axis over which their norm averages.
    """

    classifier: RoIClassifier
    width: int = 1024
    class_agnostic: bool = False
    dtype: jnp.dtype = jnp.float32
    num_fcs: int = 2
    convs: HeadConvSettings | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        pool: Pool,
        boxes: Float[Array, "B R 4"],
        train: bool,
        num_regressed: int | None = None,
    ) -> HeadOutput:
        """Logits of all RoIs, deltas of the first `num_regressed` of each image (None: of all)."""
        num_images, num_rois = boxes.shape[:2]
        num_regressed = num_regressed or num_rois
        # One (B * R, features) matrix: rank-3 dense layers are slower on CPU.
        x = pool(boxes)
        if self.convs is not None:
            x = x.reshape(num_images * num_rois, *x.shape[2:])
            x = conv_layers(x, self.convs, train, self.axis_name, self.dtype)
        x = x.reshape(num_images * num_rois, -1)
        x = dense_layers(x, self.width, self.dtype, count=self.num_fcs)
        logits = classify(x, num_images, self.classifier, self.dtype)
        x = x.reshape(num_images, num_rois, -1)[:, :num_regressed].reshape(-1, self.width)
        num_deltas = 1 if self.class_agnostic else self.classifier.num_classes
        deltas = regress(x, num_images, num_deltas, self.dtype)
        return HeadOutput(logits, deltas, boxes[:, :num_regressed])


class RegressorHead(nn.Module):
    """Box only, the same for all classes, from two fully connected layers."""

    width: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        pool: Pool,
        boxes: Float[Array, "B R 4"],
        train: bool,
        num_regressed: int | None = None,
    ) -> HeadOutput:
        """Deltas of the first `num_regressed` RoIs of each image (None: of all)."""
        boxes = boxes[:, :num_regressed]
        num_images, num_rois = boxes.shape[:2]
        x = pool(boxes).reshape(num_images * num_rois, -1)
        x = dense_layers(x, self.width, self.dtype)
        return HeadOutput(None, regress(x, num_images, 1, self.dtype), boxes)
