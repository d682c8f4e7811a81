"""The 28 models of the winning ensemble (table 4) and its 13 experts, by number.

    python -m detection.train --config=configs/detection/winners.py:17 --config.data.dir=DIR
        --config.model.pretrained=FILE --workdir=WORK
    python -m scripts.select_experts --base_config=configs/detection/winners.py:e1
        --num_classes=150 --dataset=DIR --metrics=score.json --workdir=RUN --output=EXPERT

Hardware: as the family's file says, 2 images a device.
Schedule: 13 or 26 epochs, as listed below.
Paper:    models 1 to 16 58.596 to 60.5 on the public leaderboard; all 28 with 3 experts 67.2.

The paper says: families ResNet, SENet, ResNeXt, NASNet, NAS-FPN and EfficientNet "with the best
setting and design", 13 or 26 epochs, decoupled backbone for 25 to 28, and that 17 to 28 are trained
without the photos that the auto ensemble is searched on (give them a dataset directory whose
training split leaves those out: `scripts.prepare_data --splits=FILE.json`). It says neither which
model has which number nor which have a Decoupling Head: the list below is a reading, in which all
have one, since it is the best setting of table 2.

"For models trained with 512 accelerators" it has full-class batches and elaborate augmentation
(section 5.3), and does not say which those are; here 17 to 28, as in pod512_elaborate.py. Models 1
to 16 draw classes evenly and flip photos.

Nor does it say which models are weakly supervised (section 5.7): none is here. `detection.train
--config=configs/detection/pod512_weak.py --config.init_from=WORK` makes a baseline so, from a
trained model; its fields `data.sources`, `data.label_steps`, `data.image_labels`, `model.weak` and
`model.loss_weights` do it for any of them.

Experts (sections 5.4 and 7): e1 to e3 for the 150, 27 and 40 classes of lowest AP, whose data sets
`scripts.select_experts` writes; e4 and e5 on COCO, a Mask R-CNN ResNet-152 and a Cascade R-CNN
ResNet-50; e6 to e13 on Objects365, whose models the paper does not tell.
"""

import importlib

import ml_collections

from configs.detection import base

# family's file, epochs, backbone if another one, decoupled heads in the paper's four stages
MODELS = (
    ("x101_dcn_dh", 13, None, False),
    ("x101_dcn_dh", 26, None, False),
    ("se154_dcn_dh", 13, None, False),
    ("se154_dcn_dh", 26, None, False),
    ("x101_dcn_dh", 13, "resnext152_32x8d", False),
    ("x101_dcn_dh", 26, "resnext152_32x8d", False),
    ("x101_dcn_dh", 13, "resnet101", False),
    ("x101_dcn_dh", 13, "resnet152", False),
    ("x101_dcn_dh", 13, "seresnet152", False),
    ("x101_dcn_dh", 13, "seresnext101_32x4d", False),
    ("x101_dcn_dh", 13, None, True),
    ("se154_dcn_dh", 13, None, True),
    ("nasnet", 26, None, False),
    ("r50_nas_fpn", 26, None, False),
    ("efficientnet", 26, None, False),
    ("efficientnet", 26, "efficientnet_b7", False),
    ("x101_dcn_dh", 26, None, False),
    ("x101_dcn_dh", 26, "resnext152_32x8d", False),
    ("se154_dcn_dh", 26, None, False),
    ("se154_dcn_dh", 13, None, True),
    ("x101_dcn_dh", 13, "resnext152_32x8d", True),
    ("nasnet", 26, None, False),
    ("r50_nas_fpn", 26, "resnet101", False),
    ("efficientnet", 26, None, False),
    ("decoupled", 13, None, False),
    ("decoupled", 26, None, False),
    ("decoupled", 13, "resnext152_32x8d", False),
    ("decoupled", 13, "resnet152", False),
)


EXPERTS = (  # family's file, epochs, backbone if another one
    ("se154_dcn_dh", 13, None),
    ("se154_dcn_dh", 13, None),
    ("se154_dcn_dh", 13, None),
    ("coco_mask_r152", 12, None),
    ("coco_cascade_r50", 12, None),
    ("o365_r50", 13, None),
    ("o365_r50", 13, "resnet101"),
    ("o365_r50", 13, "resnet152"),
    ("o365_cascade_r50", 13, None),
    ("o365_cascade_r50", 13, "seresnext101_32x4d"),
    ("o365_x101_dcn", 13, None),
    ("o365_x101_dcn", 13, "resnext152_32x8d"),
    ("o365_x101_dcn", 13, "senet154"),
)
_FULL_CLASS = 17  # the first model of those with full-class batches and elaborate augmentation


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: number of the model, "1" (default) to "28", or of the expert, "e1" to "e13"."""
    kind, models = ("e", EXPERTS) if (arg or "").startswith("e") else ("", MODELS)
    number = int((arg or "1").removeprefix("e"))
    if not 1 <= number <= len(models):
        raise ValueError(
            f"winners.py:{arg}: found model {number}, expected {kind}1 to {kind}{len(models)}"
        )
    family, epochs, backbone, *cascade = models[number - 1]
    config = _family(family).get_config(str(epochs))
    config.name = f"expert{number}" if kind else f"winner{number}"
    if backbone:
        config.model.backbone = backbone
    if any(cascade):
        config.model.stages = base.FOUR_STAGES
    if not kind and number >= _FULL_CLASS:
        config.data.sampler = "full_class_batch"
        config.data.batch_size = 1024
        config.data.elaborate = base.ELABORATE
        config.optimizer.warmup_epochs = 2.0
    return config


def _family(name: str):
    return importlib.import_module(f"configs.detection.{name}")
