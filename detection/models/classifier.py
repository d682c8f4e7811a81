"""Image classifier on a backbone, for pre-training it.

Shapes: B images, S side of an image, C channels of the pooled taps, K classes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array

from common.nn.backbones import make_backbone, preprocessing
from common.nn.backbones.hrnet import HRNETS
from common.nn.layers.canvas import standardise
from common.nn.parts import sum_over_batch
from detection.losses.shares import share


class Classifier(nn.Module):
    """Backbone, mean over positions, dropout, one dense layer.

    Attributes:
      num_classes: K.
      backbone_name: see `common.nn.backbones`.
      norm, remat, drop_path_rate, dtype, axis_name: as of the backbone.
      dropout_rate: before the dense layer.
      label_smoothing: share of the target spread evenly over all classes.
    """

    num_classes: int
    backbone_name: str
    norm: str = "sync"
    remat: bool = False
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    label_smoothing: float = 0.1
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    def setup(self):
        self.backbone = make_backbone(
            self.backbone_name,
            norm=self.norm,
            remat=self.remat,
            axis_name=self.axis_name,
            drop_path_rate=self.drop_path_rate,
            dtype=self.dtype,
        )
        self.dropout = nn.Dropout(self.dropout_rate)
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

    def __call__(self, batch: Mapping[str, Array], train: bool) -> dict:
        """Losses and accuracy of a training batch, or what of an evaluation batch was right.

        Of photos with verified labels each class is a sigmoid of its own, learnt where it was
        verified as present or absent.

        Args:
          batch: image uint8 (B, S, S, 3), image_valid (B,), and label (B,), or of photos with
            verified labels `labels` (B, K), 1 present, -1 absent, 0 unknown.
          train: also whether statistics are those of the batch.

        Returns:
          in training {'losses': {'classification'}, 'monitor': {'accuracy'}}, this device's share
          of the means over all images; else {'loss': (B,), 'correct': (B,) bool}, both 0 where
          `image_valid` is not, or of photos with verified labels {'scores': (B, K)}.
        """
        logits = self.logits(batch["image"], train)
        if "labels" in batch:
            return self._verified(logits, batch) if train else {"scores": jax.nn.sigmoid(logits)}
        labels, valid = batch["label"], batch["image_valid"]
        smoothing = self.label_smoothing if train else 0.0
        targets = jax.nn.one_hot(labels, self.num_classes) * (1 - smoothing)
        targets += smoothing / self.num_classes
        loss = -jnp.sum(targets * jax.nn.log_softmax(logits), -1) * valid
        correct = (jnp.argmax(logits, -1) == labels) & valid
        if not train:
            return {"loss": loss, "correct": correct}
        count = jnp.maximum(sum_over_batch(valid.sum(), self.axis_name), 1)
        return {
            "losses": {"classification": loss.sum() / count},
            "monitor": {"accuracy": correct.sum() / count},
        }

    def _verified(self, logits: Array, batch: Mapping[str, Array]) -> dict:
        """Sum over the verified classes of an image, mean over images."""
        labels, valid = batch["labels"], batch["image_valid"]
        present = labels > 0
        verified = (labels != 0) & valid[:, None]
        targets = present * (1 - self.label_smoothing) + self.label_smoothing / 2
        terms = optax.sigmoid_binary_cross_entropy(logits, targets)
        right = ((logits > 0) == present).astype(jnp.float32)
        return {
            "losses": {"classification": share(terms, verified, valid.sum(), self.axis_name)},
            "monitor": {"accuracy": share(right, verified, verified.sum(), self.axis_name)},
        }

    def logits(self, images: Array, train: bool) -> Array:
        """(B, K) float32 of uint8 images."""
        x = standardise(images, *preprocessing(self.backbone_name), self.dtype)
        taps = self.backbone(x, train)
        # HRNet's taps are siblings: with the last one alone, parts of it would never be trained.
        names = sorted(taps) if self.backbone_name in HRNETS else ["c5"]
        pooled = [jnp.mean(taps[name], (1, 2), dtype=jnp.float32) for name in names]
        pooled = self.dropout(jnp.concatenate(pooled, -1), deterministic=not train)
        return self.head(pooled)
