"""A long-tailed set in LVIS form out of COCO files with masks, to try long-tail losses on.

    python -m scripts.make_long_tail --train=instances_train.json \\
        --validation=instances_val.json --output=long_tail [--rare=10] [--common=100] [--seed=0]
    python -m scripts.prepare_data lvis --source='long_tail/lvis_*.json' --images=photos \\
        --ignore=long_tail/ignore.json --output=DIR

Of the classes, in turn, a third keeps all its training photos, a third is thinned to at most
--common of them and a third to at most --rare; validation files keep all photos and objects, in
LVIS form. What is taken out of the training photos goes to ignore.json: prepared with --ignore,
nothing there is background. The same files, limits and seed give the same sets.
"""

import collections
from pathlib import Path

from absl import flags

from common.convert.long_tail import write_long_tail
from common.io.commands import run_main
from common.io.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("train", None, "COCO file of the training photos.", required=True)
    flags.DEFINE_list("validation", None, "COCO file or files of other photos.", required=True)
    flags.DEFINE_string("output", None, "Folder for the LVIS files.", required=True)
    flags.DEFINE_integer("rare", 10, "Most training photos of a rare class.", lower_bound=1)
    flags.DEFINE_integer("common", 100, "Most of a common class.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Another one keeps other photos.", lower_bound=0)


def main() -> None:
    args = flags.FLAGS
    if args.rare >= args.common:
        raise UserError(f"--common: found {args.common}, expected more than --rare={args.rare}")
    output = Path(args.output)
    validation = [Path(path) for path in args.validation]
    limits = (args.rare, args.common)
    thinned = write_long_tail(Path(args.train), validation, output, limits, args.seed)
    groups = collections.Counter(thinned.frequency.values())
    names = {"f": "frequent", "c": "common", "r": "rare"}
    for letter, name in names.items():
        counts = [len(thinned.kept[c]) for c, g in thinned.frequency.items() if g == letter]
        span = f"{min(counts)} to {max(counts)} training photos each" if counts else ""
        print(f"{name}: {groups[letter]} classes {span}".rstrip())
    print(
        f"python -m scripts.prepare_data lvis --source='{output}/lvis_*.json' --images=DIR "
        f"--ignore={output}/ignore.json --output=DIR"
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
