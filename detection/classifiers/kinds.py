"""The classifiers by `config.model.box_head.classifier.kind`."""

from detection.classifiers.eqlv2 import EQLv2
from detection.classifiers.interface import RoIClassifier
from detection.classifiers.seesaw import Seesaw
from detection.classifiers.sigmoid import EQL, Federated, Sigmoid
from detection.classifiers.softmax import Softmax, SoftmaxEQL

KINDS: dict[str, type[RoIClassifier]] = {
    "softmax": Softmax,
    "softmax_eql": SoftmaxEQL,
    "sigmoid": Sigmoid,
    "eql": EQL,
    "federated": Federated,
    "eqlv2": EQLv2,
    "seesaw": Seesaw,
}
