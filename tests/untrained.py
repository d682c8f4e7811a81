"""Work directories of models with random weights: what inference needs, without a training."""

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

import segmentation.batch_fields
import segmentation.settings
from common.data.dataset import Dataset
from common.data.model_classes import write_model_classes
from common.training.checkpoint import Checkpoints
from common.training.step import init_variables
from detection.batch_fields import init_shapes
from detection.models.faster_rcnn import build
from detection.settings import read_run
from segmentation.models import segmenter


def write_run(workdir: Path, config: ConfigDict, dataset: Dataset, spread: float = 0.02) -> Path:
    """A run at step 1; `spread`: standard deviation of the classifier's weights."""
    settings = read_run(config)
    model = build(settings.model, dataset.num_classes)
    variables = jax.jit(lambda: init_variables(model, 0, init_shapes(settings.data)))()
    kernel = variables["params"]["box_head"]["classifier"]["kernel"]
    random = np.random.default_rng(0).normal(0, spread, kernel.shape)
    variables["params"]["box_head"]["classifier"]["kernel"] = random.astype(np.float32)
    return _write(workdir, settings.to_dict(), dataset, variables)


def write_segmenter(workdir: Path, config: ConfigDict, dataset: Dataset) -> Path:
    """A segmenter's run at step 1."""
    settings = segmentation.settings.read_run(config)
    model = segmenter.build(settings.model, dataset.num_classes, None)
    shapes = segmentation.batch_fields.init_shapes()
    variables = jax.jit(lambda: init_variables(model, 0, shapes))()
    return _write(workdir, settings.to_dict(), dataset, variables)


def _write(workdir: Path, config: dict, dataset: Dataset, variables: dict) -> Path:
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    write_model_classes(workdir, dataset.class_labels, dataset.class_names, dataset.hierarchy)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, variables, {}, wait=True)
        checkpoints.close()
    return workdir
