"""Classifiers of box heads: value and gradient equal brute force, states, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from common.data.frequencies import ClassFrequencies
from common.io.errors import UserError
from common.training.checkpoint import Checkpoints
from common.training.step import init_state, make_predict_step, make_train_step
from detection.classifiers import ClassTargets, make_classifier
from detection.classifiers.interface import MASKED
from detection.models.faster_rcnn import build
from detection.settings import read_run
from tests import tiny
from tests.detection.test_faster_rcnn import make_batch
from tests.oracles import class_losses as oracle

K = 7
KINDS = ("softmax", "softmax_eql", "sigmoid", "eql", "federated", "eqlv2", "seesaw")
RARE = (True, False, True, False, True, False, False)
FREQUENCIES = ClassFrequencies((1, 50, 0, 60, 3, 70, 80), (0.001, 0.5, 0.0, 0.6, 0.0017, 0.7, 0.8))


def settings(kind, **changes):
    config = tiny.get_config()
    config.model.box_head.classifier.kind = kind
    config.model.update(changes)
    return read_run(config).model


def classifier_of(kind, num_classes=K, frequencies=FREQUENCIES):
    classifier = make_classifier(settings(kind).box_head.classifier, num_classes, frequencies)
    return dataclasses.replace(classifier, num_drawn=5) if kind == "federated" else classifier


def random_case(kind, seed=0, shape=(2, 6)):
    """A classifier, logits that reach from sure to wrong, and targets with uncounted RoIs."""
    rng = np.random.default_rng(seed)
    classifier = classifier_of(kind)
    logits = rng.normal(0, 3, (*shape, classifier.num_logits)).astype(np.float32)
    labels = rng.integers(0, K + 1, shape) * (rng.random(shape) < 0.6)
    counted = rng.random(shape) < 0.8
    keys = jax.random.split(jax.random.key(seed), shape[0])
    return classifier, logits, ClassTargets(labels, counted, keys, jax.random.key(seed + 1))


def found(classifier, logits, targets, state):
    """Sum of the loss over the counted RoIs, its gradient there, and the state afterwards."""

    @jax.jit
    def total(logits, labels, counted, known, state):
        now = targets._replace(labels=labels, counted=counted, known=known)
        values, after = classifier.loss(logits, now, state, None)
        return jnp.where(counted, values, 0).sum(), after

    (value, after), gradient = jax.value_and_grad(total, has_aux=True)(
        logits, targets.labels, targets.counted, targets.known, state
    )
    return value, np.asarray(gradient)[targets.counted], after


def expected(kind, classifier, logits, targets, state):
    """The same by brute force."""
    logits, labels = logits[targets.counted].astype(np.float64), targets.labels[targets.counted]
    if kind == "softmax":
        return *oracle.softmax_eql(logits, labels, np.zeros((len(labels), K), bool)), {}
    if kind == "softmax_eql":
        draws = [jax.random.bernoulli(key, 0.95, (6, K)) for key in targets.keys]
        draws = np.stack(draws)[targets.counted] & np.array(RARE)
        return *oracle.softmax_eql(logits, labels, draws), {}
    if kind == "sigmoid":
        return *oracle.sigmoids(logits, labels, lambda *_: 1.0), {}
    if kind == "eql":
        return *oracle.eql(logits, labels, RARE), {}
    if kind == "federated":
        chosen = np.asarray(classifier.chosen(targets, None))
        return *oracle.sigmoids(logits, labels, lambda roi, class_, _: chosen[class_]), {}
    if kind == "eqlv2":
        value, gradient, up, down = oracle.eqlv2(logits, labels, *state.values())
        return value, gradient, dict(zip(state, (up, down), strict=True))
    value, gradient, counts = oracle.seesaw(logits, labels, state["counts"])
    return value, gradient, {"counts": counts}


@pytest.mark.parametrize("kind", KINDS)
def test_value_gradient_and_state_equal_brute_force(kind):
    for seed in range(3):
        classifier, logits, targets = random_case(kind, seed)
        rng = np.random.default_rng(seed + 10)
        state = {
            name: np.where(rng.random(K) < 0.3, 0, rng.uniform(0, 40, K)).astype(np.float32)
            for name in classifier.start_state()
        }
        value, gradient, after = found(classifier, logits, targets, state)
        want_value, want_gradient, want_after = expected(kind, classifier, logits, targets, state)
        np.testing.assert_allclose(value, want_value, rtol=1e-5)
        np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=2e-6)
        assert after.keys() == want_after.keys()
        for name in after:
            np.testing.assert_allclose(after[name], want_after[name], rtol=1e-5)


def test_rare_classes_are_those_strictly_below_the_threshold():
    config = tiny.get_config().model.box_head.classifier
    config.update(kind="eql")
    config.eql.threshold = 0.0017
    rare = make_classifier(settings("eql").box_head.classifier, K, FREQUENCIES).rare
    assert rare == RARE
    exact = ClassFrequencies(FREQUENCIES.images, (0.00177, *FREQUENCIES.shares[1:]))
    assert classifier_of("eql", frequencies=exact).rare == (False, *RARE[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_best_classes(kind):
    classifier, logits, _ = random_case(kind, shape=(2, 50))
    scores = np.asarray(classifier.probabilities(logits))
    assert scores.shape == (2, 50, K + 1) and (scores >= 0).all() and (scores <= 1).all()
    assert classifier.has_background == bool(scores[..., 0].any())
    if kind.startswith("softmax") or kind == "seesaw":
        np.testing.assert_allclose(scores.sum(axis=-1), 1, rtol=1e-5)
    best = np.asarray(classifier.best_class(logits))
    np.testing.assert_array_equal(best, scores[..., 1:].argmax(axis=-1))
    prediction = np.asarray(classifier.prediction(logits))
    np.testing.assert_array_equal(prediction, scores.argmax(axis=-1))
    if classifier.has_background:
        assert 0 < (prediction == 0).mean() < 1


def test_scores_by_hand():
    seesaw = classifier_of("seesaw", 2).probabilities(np.log([0.25, 0.75, 0.4, 0.6]))
    np.testing.assert_allclose(seesaw, [0.25, 0.3, 0.45], rtol=1e-5)
    odds = np.log([0.2 / 0.8, 0.5 / 0.5, 0.9 / 0.1])
    np.testing.assert_allclose(
        classifier_of("eqlv2", 2).probabilities(odds), [0.2, 0.4, 0.72], rtol=1e-5
    )
    np.testing.assert_allclose(classifier_of("eql", 3).probabilities(odds), [0, 0.2, 0.5, 0.9])


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_classes_get_no_gradient_no_score_and_keep_no_memory(kind):
    classifier, logits, targets = random_case(kind, 3)
    known = np.ones((2, K), bool)
    known[0, [1, 4]] = False
    targets.labels[0][np.isin(targets.labels[0], [2, 5])] = 1
    masked = classifier.mask_unknown(logits, known)
    lead = classifier.num_leading
    assert (masked[0][:, [lead + 1, lead + 4]] == MASKED).all()
    scores = np.asarray(classifier.probabilities(masked))
    assert (scores[0][:, [2, 5]] == 0).all() and np.isfinite(scores).all()
    targets.counted[:] = True
    targets = targets._replace(known=known)
    value, gradient, _ = found(classifier, np.asarray(masked), targets, classifier.start_state())
    assert np.isfinite(value) and np.isfinite(gradient).all()
    first = gradient.reshape(2, 6, -1)[0]
    assert (first[:, [lead + 1, lead + 4]] == 0).all() and first[:, lead + 3].any()
    if kind in ("eqlv2", "seesaw"):
        # Background of that image may be an unknown object: it is no background for certain.
        background = targets.labels[0] == 0
        assert background.any() and (first[background][:, :lead] == 0).all()
        assert first[~background][:, :lead].all()


def test_federated_draws_annotated_classes_and_the_rest_by_their_weight():
    classifier = make_classifier(
        settings("federated").box_head.classifier,
        400,
        ClassFrequencies((0,) * 100 + (1,) * 200 + (100,) * 100, (0.0,) * 400),
    )
    labels = np.array([[0, 5, 5, 301]])
    targets = ClassTargets(labels, labels != 301, jax.random.split(jax.random.key(0), 1), None)
    chosen = jax.jit(
        jax.vmap(lambda key: classifier.chosen(targets._replace(shared_key=key), None))
    )(jax.random.split(jax.random.key(0), 400))
    chosen = np.asarray(chosen)
    assert (chosen.sum(axis=1) == 50).all()
    assert chosen[:, 4].all()  # annotated, though no photo was counted
    assert not np.delete(chosen[:, :100], 4, axis=1).any()
    # 49 draws without replacement: of 100 classes ten times as likely as the 200 others.
    rng = np.random.default_rng(0)
    weights = np.array([1.0] * 200 + [10.0] * 100)
    draws = [
        np.sum(rng.choice(300, 49, replace=False, p=weights / weights.sum()) >= 200)
        for _ in range(400)
    ]
    assert abs(chosen[:, 300:].sum(axis=1).mean() - np.mean(draws)) < 0.6
    many = np.arange(1, 81)[None]
    targets = ClassTargets(many, many > 0, targets.keys, jax.random.key(0))
    assert np.flatnonzero(classifier.chosen(targets, None)).tolist() == list(range(80))


def test_federated_takes_verified_classes_of_an_image_as_negatives_of_its_regions():
    classifier, logits, targets = random_case("federated")
    classifier = type(classifier)(K, 0.001, (0.0,) * K, 1)
    targets.labels[:] = 0
    verified = np.zeros((2, K), bool)
    verified[1, 3] = True
    values, _ = classifier.loss(logits, targets._replace(verified=verified), {}, None)
    assert (values[0] == 0).all()
    np.testing.assert_allclose(values[1], np.logaddexp(0, logits[1][:, 3]), rtol=1e-5)


def make_step(kind, count, batch, **changes):
    """A model of three classes, its first state and its step on some devices."""
    model = build(settings(kind, **changes), 3, "data", ClassFrequencies((1, 9, 9), (1e-3, 1, 1)))
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
    tx = optax.sgd(0.05)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    state = jax.jit(lambda: init_state(model, tx, 0, shapes))()
    return model, mesh, state, jax.jit(make_train_step(model, tx, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eqlv2", "seesaw", "federated"])
def test_four_devices_remember_what_one_remembers(kind):
    batch, results = make_batch(4), []
    for count in (1, 4):
        _, _, state, step = make_step(kind, count, batch)
        assert not any(np.any(x) for x in jax.tree.leaves(state.loss_state))
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append(jax.device_get((state.loss_state, state.params, metrics)))
    one, four = results
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), *results)
    assert bool(one[0]) == (kind != "federated")
    assert all(np.any(x) for x in jax.tree.leaves(one[0]))
    assert four[0].keys() == one[0].keys()


@pytest.mark.slow
def test_every_head_has_its_own_memory_which_checkpoints_keep_and_inference_needs_not(tmp_path):
    model, mesh, state, step = make_step(
        "eqlv2",
        1,
        make_batch(2),
        split_after="c3",
        box_head=dict(kind="decoupling"),
        stages=dict(
            iou=(0.5, 0.6),
            stds=((0.1, 0.1, 0.2, 0.2),) * 2,
            loss_weights=(1.0, 0.5),
            score_weights=(1.0, 1.0),
        ),
    )
    assert sorted(state.loss_state) == sorted(
        f"{name}_{branch}_stage{stage}"
        for name in ("box_class", "sibling_box_class")
        for branch in (1, 2)
        for stage in (1, 2)
    )
    state, metrics = step(state, make_batch(2))
    sums = [np.asarray(x["negative_gradient"]).tolist() for x in state.loss_state.values()]
    assert len({tuple(values) for values in sums}) == 8
    assert np.isfinite(metrics["loss"])
    found = jax.jit(make_predict_step(model, mesh))(state.variables, make_batch(2))
    assert np.isfinite(found["scores"]).all()

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {}, wait=True)
    restored, _ = checkpoints.restore(1, jax.eval_shape(lambda: state))
    checkpoints.close()
    again, expected = (jax.device_get(step(x, make_batch(2))[0]) for x in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_what_has_no_background_score_cannot_drop_background():
    for kind in ("sigmoid", "eql", "federated"):
        with pytest.raises(UserError, match=f"drop_background_rois: found True.*kind '{kind}'"):
            settings(kind, drop_background_rois=True)
    for kind in ("softmax", "eqlv2", "seesaw"):
        assert settings(kind, drop_background_rois=True).drop_background_rois
    with pytest.raises(UserError, match="classifier.kind: found 'eql', expected 'softmax'"):
        config = tiny.get_config("refine")
        config.model.box_head.classifier.kind = "eql"
        read_run(config)
    config = tiny.get_config()
    config.model.box_head.classifier.eql.threshold = 1.77
    with pytest.raises(UserError, match=r"classifier.eql.threshold: found 1.77, expected a share"):
        read_run(config)
