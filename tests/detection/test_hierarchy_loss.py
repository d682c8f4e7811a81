"""The class hierarchy in the loss of sigmoid classifiers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.io.errors import UserError
from common.tables.hierarchy import ancestor_lists
from detection.classifiers import ClassTargets, make_classifier
from detection.settings import read_run
from tests import tiny
from tests.oracles import class_losses as oracle

LABELS = ("person", "man", "boy", "car")
TREE = {
    "LabelName": "/root",
    "Subcategory": [
        {
            "LabelName": "person",
            "Subcategory": [{"LabelName": "man", "Subcategory": [{"LabelName": "boy"}]}],
        },
        {"LabelName": "car"},
    ],
}
ANCESTORS = ((), (0,), (0, 1), ())


def hierarchical_config(kind="sigmoid"):
    config = tiny.get_config()
    config.model.box_head.class_agnostic = True
    config.model.box_head.classifier.update(kind=kind, hierarchy=True)
    return config


def classifier_of(kind):
    settings = read_run(hierarchical_config(kind)).model.box_head.classifier
    return make_classifier(settings, len(LABELS), None, ANCESTORS)


def value_and_gradient(classifier, logits, labels, known=None):
    keys = jax.random.split(jax.random.key(0), len(labels))
    targets = ClassTargets(labels, labels >= 0, keys, jax.random.key(1), known)

    def loss(logits):
        return classifier.loss(logits, targets, {}, None)[0].sum()

    return jax.value_and_grad(loss)(logits)


def test_ancestors_are_positives_and_descendants_have_no_loss():
    assert ancestor_lists(TREE, LABELS) == ANCESTORS
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 9, 4)).astype(np.float32)
    labels = rng.integers(0, 5, (2, 9))
    value, gradient = value_and_gradient(classifier_of("sigmoid"), logits, labels)
    rows = logits.reshape(-1, 4), labels.ravel(), ANCESTORS
    expected, expected_gradient = oracle.hierarchical(*rows)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient.reshape(-1, 4), expected_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[labels == 1][:, 1:3] == 0).all()  # a person may be a man
    flat = dataclasses.replace(classifier_of("sigmoid"), ancestors=())
    assert value_and_gradient(flat, logits, labels)[0] != value


@pytest.mark.parametrize("kind", ["sigmoid", "eql", "federated"])
def test_an_ancestor_that_is_unknown_has_no_loss(kind):
    classifier = classifier_of(kind)
    labels, known = np.array([[2]]), np.array([[False, True, True, True]])
    logits = classifier.mask_unknown(jnp.zeros((1, 1, 4)), known)
    value, gradient = value_and_gradient(classifier, logits, labels, known)
    assert np.isfinite(value) and gradient[0, 0, 0] == 0
    assert gradient[0, 0, 1] < 0 and gradient[0, 0, 2] == 0


@pytest.mark.parametrize("kind", ["softmax", "softmax_eql", "eqlv2", "seesaw"])
def test_classifiers_of_one_class_a_region_are_refused_by_name(kind):
    with pytest.raises(UserError, match=f"classifier.hierarchy: found True.*{kind!r}") as error:
        read_run(hierarchical_config(kind))
    assert "\n" not in str(error.value)


def test_boxes_and_masks_of_ancestors_have_to_be_those_of_all_classes():
    config = hierarchical_config()
    config.model.box_head.class_agnostic = False
    with pytest.raises(UserError, match="class_agnostic: found False, expected True"):
        read_run(config)
    config = hierarchical_config()
    config.data.mask_size = 16
    config.model.mask_head.kind = "class_specific"
    with pytest.raises(UserError, match="mask_head.kind: found 'class_specific'"):
        read_run(config)
