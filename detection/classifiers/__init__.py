"""Classifiers of box heads: what their logits mean, and the losses that teach them.

`make_classifier` makes the one of `config.model.box_head.classifier.kind`:

  softmax      over background and classes
  softmax_eql  the same, rare classes dropped from the softmax of other classes' RoIs
  sigmoid      one a class, none for background
  eql          the same, RoIs of other classes are no negatives of rare ones (LVIS 2019 winner)
  federated    the same, only annotated classes and some drawn ones have a loss in a step
  eqlv2        sigmoids for background and classes, weighted by gradient sums
  seesaw       object or not, and a softmax over classes in which rare ones are pushed down less
"""

from common.data.frequencies import ClassFrequencies
from common.tables.hierarchy import Ancestors
from detection.classifiers.eqlv2 import EQLv2
from detection.classifiers.interface import ClassTargets, RoIClassifier
from detection.classifiers.seesaw import Seesaw
from detection.classifiers.settings import RoIClassifierSettings
from detection.classifiers.sigmoid import EQL, Federated, Sigmoid
from detection.classifiers.softmax import Softmax, SoftmaxEQL

__all__ = ["ClassTargets", "RoIClassifier", "make_classifier"]


def make_classifier(
    settings: RoIClassifierSettings,
    num_classes: int,
    frequencies: ClassFrequencies | None = None,
    ancestors: Ancestors | None = None,
) -> RoIClassifier:
    """The classifier of a run.

    Args:
      settings: `config.model.box_head.classifier` as read.
      num_classes: K.
      frequencies: of the classes in the training photos, which some losses ask for; None where
        nothing is trained: then no class counts as rare, and all as equally frequent.
      ancestors: of each class, which losses ask for with `settings.hierarchy`; None where nothing
        is trained.
    """
    prior = settings.prior
    above = (ancestors or ()) if settings.hierarchy else ()
    match settings.kind:
        case "softmax":
            return Softmax(num_classes)
        case "softmax_eql":
            rare = _rare(settings, num_classes, frequencies)
            return SoftmaxEQL(num_classes, rare, settings.eql.gamma)
        case "sigmoid":
            return Sigmoid(num_classes, prior, ancestors=above)
        case "eql":
            rare = _rare(settings, num_classes, frequencies)
            return EQL(num_classes, prior, rare, ancestors=above)
        case "federated":
            images = (1,) * num_classes if frequencies is None else frequencies.images
            weights = tuple(float(count) ** settings.federated.power for count in images)
            drawn = settings.federated.num_classes
            return Federated(num_classes, prior, weights, drawn, ancestors=above)
        case "eqlv2":
            return EQLv2(num_classes, prior, **vars(settings.eqlv2))
        case "seesaw":
            return Seesaw(num_classes, **vars(settings.seesaw))


def _rare(
    settings: RoIClassifierSettings, num_classes: int, frequencies: ClassFrequencies | None
) -> tuple[bool, ...]:
    if frequencies is None:
        return (False,) * num_classes
    return tuple(share < settings.eql.threshold for share in frequencies.shares)
