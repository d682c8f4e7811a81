"""Converts the weights of a torch network: a backbone, or a whole detector.

    python -m scripts.convert_weights --input=resnet50.pth --backbone=resnet50 \\
        --output=resnet50.safetensors
    python -m scripts.convert_weights --input=fasterrcnn.pth --detector --output=converted
    python -m scripts.convert_weights --workdir=RUN --to=torchvision --output=x.safetensors

Reads timm and torchvision state dicts of ResNets and ResNeXts; timm's `legacy_seresnet*`,
`legacy_seresnext*`, `legacy_senet154`, `hrnet_w*` (also of the authors' repositories),
`nasnetalarge` and `tf_efficientnet_*`, and those of the efficientnet-pytorch packages;
`.safetensors`, `.pth`, `.pt`, or a wheel that holds one such file. Torch is not needed, and nothing
in a pickle is executed. Prints every tensor that has no place in the backbone (the classifier) and
every one that the backbone misses. Weights of the HRNet segmentation repository keep their head:
`segmentation.train` takes the file, and that of a backbone, as --config.model.pretrained.

With --detector the output is a work directory, as a training leaves it: evaluation, export and
`--config.init_from` take it (docs/guides/other_detectors.md). Its labels are COCO's, or those of
--classes. With --to=torchvision a run's detector gets torchvision's names.
"""

from pathlib import Path

from absl import flags

from common.data.dataset import read_classes
from common.io.commands import run_main
from common.io.errors import UserError
from common.nn.backbones import BACKBONES
from common.nn.backbones.hrnet import HRNETS
from common.nn.weights.backbone_weights import (
    convert_state_dict,
    read_state_dict,
    save_backbone_weights,
)
from configs.of_workdir import get_config as config_of_workdir
from detection.fine_tuning import trained_in
from detection.foreign.conversion import class_names, convert_detector
from detection.foreign.converted_run import write_workdir
from detection.foreign.family import Options
from detection.foreign.to_torchvision import save_state, to_torchvision
from detection.settings import read_run
from segmentation.pretrained import convert_segmenter, is_segmenter


def define_flags() -> None:
    flags.DEFINE_string("input", None, "state dict: .safetensors, .pth, .pt, .pkl or .whl")
    flags.DEFINE_string("backbone", None, "the network that the weights are of, such as resnet50")
    flags.DEFINE_bool("detector", False, "the weights are of a whole two-stage detector")
    flags.DEFINE_string("output", None, "file to write, .safetensors; with --detector a folder")
    flags.DEFINE_string("classes", None, "with --detector: CSV file label,name; default: COCO's 80")
    styles = ["pytorch", "caffe"]
    text = "with --detector: strides in 3x3, or in 1x1 and pixels of standard deviation 1"
    flags.DEFINE_enum("style", None, styles, text)
    flags.DEFINE_float("norm_epsilon", None, "with --detector: of the backbone's frozen norms")
    flags.DEFINE_enum("to", None, ["torchvision"], "names to give to a run's detector")
    flags.DEFINE_string("workdir", None, "with --to: work directory of the run")


def main() -> None:
    args = flags.FLAGS
    chosen = [bool(args.backbone), args.detector, args.to is not None]
    if sum(chosen) != 1:
        raise UserError(
            f"flags: found {sum(chosen)} of --backbone=NAME, --detector and --to=NAME, expected one"
        )
    source = "workdir" if args.to else "input"
    if not args[source].value:
        raise UserError(f"--{source}: missing")
    if args.to:
        convert_back()
    elif args.detector:
        convert_whole()
    else:
        convert_backbone()


def convert_backbone() -> None:
    args = flags.FLAGS
    backbone = args.backbone
    if backbone not in BACKBONES:
        raise UserError(f"--backbone: found {backbone!r}, expected one of {', '.join(BACKBONES)}")
    state = read_state_dict(args.input)
    segmenter = backbone in HRNETS and is_segmenter(state)
    convert = convert_segmenter if segmenter else convert_state_dict
    weights, report = convert(state, backbone)
    print(f"{args.input} -> {backbone}")
    print(report)
    if report.missing:
        raise UserError(
            f"{args.input}: found no value for {len(report.missing)} tensors "
            f"of {backbone}, first {report.missing[0]!r}; expected all; nothing "
            "was written"
        )
    save_backbone_weights(args.output, weights, backbone, Path(args.input).name)
    print(f"wrote {sum(value.size for value in weights.values()):,} values to {args.output}")


def convert_whole() -> None:
    args = flags.FLAGS
    given = None if args.classes is None else read_classes(args.classes)[0]
    options = Options(args.style, args.norm_epsilon, None if given is None else len(given))
    state = read_state_dict(args.input)
    try:
        converted = convert_detector(state, options)
    except UserError as error:
        raise UserError(f"{args.input}: {error}; nothing was written") from error
    foreign, model = converted.foreign, converted.settings.model
    print(f"{args.input} -> {foreign.family}: {model.backbone}, {foreign.num_classes} classes")
    for note in foreign.notes:
        print(f"note: {note}")
    print(converted.report)
    write_workdir(args.output, converted, class_names(foreign, given), Path(args.input).name)
    print(f"wrote the work directory {args.output}")


def convert_back() -> None:
    args = flags.FLAGS
    trained = trained_in(args.workdir)
    settings = read_run(config_of_workdir(args.workdir))
    state, notes = to_torchvision(settings, len(trained.labels), trained.weights)
    for note in notes:
        print(f"note: {note}")
    save_state(args.output, state)
    print(f"wrote {len(state)} tensors of {len(trained.labels)} classes to {args.output}")


if __name__ == "__main__":
    define_flags()
    flags.mark_flag_as_required("output")
    run_main(main)
