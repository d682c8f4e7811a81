import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.io.errors import UserError
from common.io.settings import read_settings
from common.nn.backbones.hrnet import Layout
from common.nn.layers.canvas import mirror
from segmentation.inference import probabilities
from segmentation.losses import pixel_losses
from segmentation.models.segmenter import Head, Segmenter, build
from segmentation.settings import ModelSettings
from tests.oracles import segmentation as oracle
from tests.oracles.variables import random_values

TINY = Layout(4, (1, 0, 0), 1)  # stages 3 and 4 are their transitions alone
SIZE = (32, 64)


def batch(seed=0, count=2):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, *SIZE, 3)).astype(np.uint8),
        "image_size": np.array([[32, 64], [20, 50]], np.float32)[:count],
        "image_valid": np.ones(count, bool),
        "classes": np.arange(count, dtype=np.int32),
        "mask": rng.integers(0, 2, (count, *SIZE)).astype(np.uint8),
    }


@pytest.fixture(scope="module")
def network():
    """A tiny segmenter with group norm and its variables."""
    model = Segmenter(1, "hrnet_w18", layout=TINY, norm="group")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch(), train=True))
    variables = random_values(shapes)
    train = jax.jit(lambda b: model.apply(variables, b, train=True))
    predict = jax.jit(lambda b: model.apply(variables, b, train=False)["logits"])
    return model, variables, train, predict


@pytest.mark.parametrize("num_classes", [1, 3])
def test_head_is_that_of_the_paper(num_classes):
    """Mixing before enlarging, and the difference of logits, change no probability."""
    rng = np.random.default_rng(num_classes)
    sizes = [(8, 12, 3), (4, 6, 6), (2, 3, 12), (1, 2, 24)]
    branches = [rng.normal(size=(2, *s)).astype(np.float32) for s in sizes]
    module = Head(num_classes, "frozen", None, jnp.float32)
    classes = np.array([num_classes - 1, 0], np.int32)
    variables = module.init(jax.random.key(0), branches, classes, False)
    variables = jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape) - 0.7, variables)
    variables["batch_stats"]["norm"]["var"] += 0.5
    variables["params"]["mix"]["kernel"] -= 0.3
    found = jax.jit(module.apply, static_argnums=3)(variables, branches, classes, False)
    for i, class_ in enumerate(classes):
        expected = oracle.head(
            [b[i] for b in branches],
            variables["params"],
            variables["batch_stats"],
            class_,
            (32, 48),
        )
        enlarged = oracle.bilinear(np.asarray(found[i], np.float64)[..., None], (32, 48))[..., 0]
        np.testing.assert_allclose(1 / (1 + np.exp(-enlarged)), expected, atol=2e-5)
        assert 0.01 < expected.std()


def test_loss_is_softmax_cross_entropy_over_known_pixels(network):
    _, _, train, predict = network
    inputs = batch()
    out = train(inputs)
    logits = np.asarray(predict(inputs), np.float64)
    known = np.zeros((2, *SIZE), bool)
    known[0], known[1, :20, :50] = True, True
    two = np.stack([np.zeros_like(logits), logits], -1)
    log_softmax = two - np.log(np.exp(two).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_softmax, inputs["mask"][..., None].astype(int), -1)[..., 0]
    assert float(out["losses"]["mask"]) == pytest.approx(-picked[known].mean(), rel=1e-4)
    right = (logits > 0) == (inputs["mask"] != 0)
    assert float(out["monitor"]["pixel_accuracy"]) == pytest.approx(right[known].mean(), rel=1e-5)


def test_what_is_no_content_or_unknown_does_not_count(network):
    _, _, train, _ = network
    inputs = batch()
    other = jax.tree.map(np.copy, inputs)
    other["image"][1, 20:], other["image"][1, :, 50:] = 77, 77
    other["mask"][1, 20:], other["mask"][1, :, 50:] = 1, 0
    same = train(other)["losses"]["mask"]
    assert float(same) == float(train(inputs)["losses"]["mask"])
    # An empty slot and unknown pixels: as if the other crop were alone.
    alone = train({**inputs, "image_valid": np.array([True, False])})
    unknown = np.ones((2, *SIZE), bool)
    unknown[1] = False
    unknown = train({**inputs, "mask_valid": unknown})
    assert float(alone["losses"]["mask"]) == float(unknown["losses"]["mask"])
    assert float(alone["losses"]["mask"]) != float(same)


def test_mirrored_crops_are_turned_back(network):
    model, variables, _, _ = network
    inputs = {k: v for k, v in batch().items() if k != "mask"}
    run = jax.jit(lambda b: probabilities(model, variables, b, True))
    plain, turned = run(inputs)
    mirrored = {**inputs, "image": np.array(mirror(inputs["image"], inputs["image_size"][:, 1]))}
    other_plain, other_turned = run(mirrored)
    assert (mirrored["image"][1, :, :50] == inputs["image"][1, :, :50][:, ::-1]).all()
    np.testing.assert_allclose(turned[1, :20, :50], other_plain[1, :20, :50][:, ::-1], atol=1e-5)
    np.testing.assert_allclose(plain[1, :20, :50], other_turned[1, :20, :50][:, ::-1], atol=1e-5)
    assert np.abs(plain - turned).max() > 0.01


def test_pixel_figures_of_an_easy_case():
    logits = jnp.array([[[5.0, -5.0], [5.0, 5.0]]])
    truth = jnp.array([[[1, 1], [0, 1]]], jnp.uint8)
    known = jnp.array([[[True, True], [True, False]]])
    found = {k: float(v[0]) for k, v in pixel_losses(logits, truth, known).items()}
    low, high = np.log1p(np.exp(-5)), np.log1p(np.exp(5))
    assert found["loss"] == pytest.approx(low + 2 * high, rel=1e-5)
    assert (found["pixels"], found["correct"]) == (3, 1)
    assert (found["intersection"], found["union"]) == (1, 3)


def test_settings_choose_the_network():
    settings = read_settings(
        ModelSettings,
        dict(
            pretrained="",
            backbone="hrnet_w18",
            class_specific=True,
            upsampling="nearest",
            norm="sync",
            remat=True,
            dtype="bfloat16",
            layout=dict(width=4, modules=(1, 0, 0), blocks=1),
        ),
    )
    model = build(settings, 5, None)
    assert (model.num_classes, model.layout) == (5, TINY)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch(), train=True))
    assert shapes["params"]["head"]["logits"]["kernel"].shape == (1, 1, 60, 10)


def test_any_trunk_with_four_taps_will_do():
    model = Segmenter(1, "resnet10", norm="group")
    run = jax.jit(lambda key, inputs: model.init_with_output(key, inputs, train=False)[0])
    logits = run(jax.random.key(0), batch())["logits"]
    assert logits.shape == batch()["mask"].shape and np.isfinite(logits).all()
    with pytest.raises(UserError, match="backbone: found 'nothing', expected one of"):
        Segmenter(1, "nothing").init(jax.random.key(0), batch(), train=True)
