"""Every kind of detector builds from its config, and every part of it is trained."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from common.io.errors import UserError
from common.nn.backbones import make_backbone
from common.training.distributed import DATA_AXIS
from common.training.step import init_variables, variable_shapes
from configs.detection import lvis_winner, pod512, pod512_elaborate, winners
from detection.batch_fields import init_shapes
from detection.models.faster_rcnn import build
from detection.settings import RunSettings, read_run
from tests import tiny
from tests.detection.test_faster_rcnn import make_batch

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "detection").glob("*.py"))
TWO_STAGES = dict(
    iou=(0.5, 0.6),
    stds=((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1)),
    loss_weights=(1.0, 0.5),
    score_weights=(1.0, 1.0),
    average="probability",
    box_stage=-1,
)
VARIANTS = {
    "decoupling head": dict(fpn_norm="sync", box_head=dict(kind="decoupling")),
    "class-agnostic on NAS-FPN": dict(
        neck="nas_fpn", nas_fpn=dict(repeats=1, norm="sync"), box_head=dict(class_agnostic=True)
    ),
}


def variant(**fields) -> RunSettings:
    config = tiny.get_config()
    config.model.update(fields)
    return read_run(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient_and_detections_come_out(name):
    settings = variant(**VARIANTS[name]).model
    # All anchors are sampled: photos this small have no RoIs on the coarser pyramid levels, whose
    # gradient comes from the proposal network alone.
    loss = dataclasses.replace(settings.rpn.loss, num_samples=2048)
    settings = dataclasses.replace(settings, rpn=dataclasses.replace(settings.rpn, loss=loss))
    model = build(settings, 3)
    variables = jax.jit(lambda: init_variables(model, 0, tiny.init_shapes()))()
    batch = make_batch(4)  # the coarsest levels are single cells, whose norms need several images

    @jax.jit
    def gradients(params):
        def loss(params):
            losses = tiny.losses(model, {**variables, "params": params}, batch)
            return sum(losses.values()), losses

        return jax.grad(loss, has_aux=True)(params)

    grads, terms = gradients(variables["params"])
    assert all(np.isfinite(value) and value >= 0 for value in terms.values()), terms
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name
    found = jax.jit(lambda v: model.apply(v, batch, train=False))(variables)
    assert found["boxes"].shape == (4, 20, 4) and found["valid"].any()


def test_cascade_on_a_decoupled_backbone_has_a_loss_of_each_branch_and_stage():
    model = build(variant(split_after="c3", stages=TWO_STAGES).model, 3)
    shapes = variable_shapes(model, tiny.init_shapes())
    assert {"backbone", "backbone_class", "backbone_box", "neck_class", "neck_box"} < set(
        shapes["params"]
    )
    assert "stage2" in shapes["params"]["backbone"]
    assert set(shapes["params"]["backbone_box"]) == {"stage3", "stage4"}
    expected = {
        f"{name}_{branch}_stage{stage}"
        for name in ("box_class", "box_regression")
        for branch in (1, 2)
        for stage in (1, 2)
    }
    losses = jax.eval_shape(lambda v: tiny.losses(model, v, make_batch(2)), shapes)
    assert set(losses) == {"rpn_class", "rpn_box"} | expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_a_model_of_500_classes(path):
    if path.stem == "__init__":
        pytest.skip("no config")
    module = __import__(f"configs.detection.{path.stem}", fromlist=["get_config"])
    settings = read_run(module.get_config())
    model = build(settings.model, 500, DATA_AXIS)
    shapes = variable_shapes(model, init_shapes(settings.data))
    if settings.model.refines:
        assert "rpn_head" not in shapes["params"]
        assert set(shapes["params"]["box_head3"]) == {"fc1", "fc2", "regressor"}
        return
    assert shapes["params"]["rpn_head"]["objectness"]["kernel"].shape[-1] == len(
        settings.model.anchors.scales
    ) * len(settings.model.anchors.ratios)


def test_the_winning_ensemble_has_28_models():
    configs = [winners.get_config(str(number)) for number in range(1, 29)]
    assert [config.name for config in configs] == [f"winner{n}" for n in range(1, 29)]
    assert all(config.model.box_head.kind == "decoupling" for config in configs)
    assert [n for n, c in enumerate(configs, start=1) if c.model.split_after] == [25, 26, 27, 28]
    assert {len(config.model.stages.iou) for config in configs} == {1, 4}
    for config in configs:
        make_backbone(config.model.backbone, deform=tuple(config.model.deform))
    full = [c.data.sampler == "full_class_batch" for c in configs]
    assert full == [c.data.elaborate.scale == "crop" for c in configs] == [False] * 16 + [True] * 12
    with pytest.raises(ValueError, match="found model 29, expected 1 to 28"):
        winners.get_config("29")


def test_the_elaborate_pod_runs_the_program_of_the_plain_one():
    """So what is compiled and planned for pod512 holds for it."""
    plain, elaborate = pod512.get_config().to_dict(), pod512_elaborate.get_config().to_dict()
    assert elaborate["data"].pop("elaborate") != plain["data"].pop("elaborate")
    del plain["name"], elaborate["name"]
    assert plain == elaborate


def test_the_winning_ensemble_has_13_experts():
    configs = [winners.get_config(f"e{number}") for number in range(1, 14)]
    assert [config.name for config in configs] == [f"expert{n}" for n in range(1, 14)]
    for config in configs:
        make_backbone(config.model.backbone, deform=tuple(config.model.deform))
    with pytest.raises(ValueError, match="found model 14, expected e1 to e13"):
        winners.get_config("e14")


def test_the_trainings_of_the_lvis_table_are_of_two_deformable_backbones():
    for name in lvis_winner.TRAININGS:
        config = lvis_winner.get_config(f"{name}:OI" if name.endswith("se154_openimages") else name)
        settings = read_run(config)
        assert settings.name == name
        assert settings.model.backbone == ("senet154" if "se154" in name else "resnext101_64x4d")
        assert settings.model.deform == (1, 1, 1)
        assert settings.model.has_masks == (name != "openimages_x101")
        assert settings.model.norm == ("sync" if settings.model.has_masks else "frozen")
        own, *others = settings.data.sources or ("",)
        assert [source.dir for source in others] == (["OI"] if own else [])
    with pytest.raises(ValueError, match="expected one of coco_x101, lvis_x101"):
        lvis_winner.get_config("r50")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(fpn_norm="layer"), r"fpn_norm: found 'layer', expected one of 'none'"),
        (dict(neck="pan"), r"config.model.neck: found 'pan', expected one of 'fpn', 'nas_fpn'"),
        (dict(split_after="c4"), "config.model.split_after: found 'c4'"),
        (dict(box_head=dict(kind="mask")), "config.model.box_head.kind: found 'mask'"),
        (dict(ignore_ioa=-0.1), "config.model.ignore_ioa: found -0.1, expected a number from 0 to"),
        (
            dict(detections=dict(max_detections=0)),
            "detections.max_detections: found 0, expected at",
        ),
        (dict(rpn=dict(loss=dict(negative_iou=0.9))), "negative_iou: found 0.9, expected at most"),
    ],
)
def test_unknown_choices_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        variant(**fields)
