"""Every module imports beside all others, with nothing but requirements.txt installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "detection", "segmentation", "ensemble", "configs", "scripts")
# Peers that tests compare with: no product code may need them.
OPTIONAL = (
    "torch",
    "torchvision",
    "timm",
    "pycocotools",
    "lvis",
    "ensemble_boxes",
    "numba",
    "libtpu",
)

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
)

IMPORT_ALL = """
import importlib, sys
for name in {optional!r}:
    sys.modules[name] = None  # importing it now raises ImportError
failed = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{{name}}: {{type(error).__name__}}: {{error}}")
print("\\n".join(failed))
sys.exit(bool(failed))
"""


def test_all_modules_import_in_one_process_without_optional_packages():
    code = IMPORT_ALL.format(optional=OPTIONAL, modules=MODULES)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize("package", [p for p in PACKAGES if (ROOT / p).is_dir()])
def test_folders_with_modules_are_packages(package):
    folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
    missing = [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert missing == []


def imports_of(folders, packages, but=()):
    """Lines below `folders`, those of the folders `but` left out, that import one of `packages`."""
    found = []
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if any(path.is_relative_to(ROOT / folder) for folder in but):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if words[:1] in (["from"], ["import"]):
                module = f"{words[1]}."
                if any(module.startswith(f"{package}.") for package in packages):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def test_products_do_not_import_one_another():
    """They meet in the detections table on disk; `common` imports none of them."""
    products = ("detection", "segmentation", "ensemble")
    assert imports_of(["common"], products) == []
    for product in products:
        assert imports_of([product], [other for other in products if other != product]) == []


def test_only_commands_import_the_readers_of_annotations():
    """What `common/convert` shares with others lies below it, in `common/data` and `common/io`."""
    folders = ("common", "detection", "segmentation", "ensemble", "configs")
    assert imports_of(folders, ["common.convert"], but=["common/convert"]) == []
