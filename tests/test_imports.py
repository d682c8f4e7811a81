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


def test_products_do_not_import_one_another():
    """They meet in the detections table on disk; `common` imports none of them."""
    products = ("detection", "segmentation", "ensemble")
    wrong = []
    for package in ("common", *products):
        foreign = [p for p in products if p != package]
        for path in (ROOT / package).rglob("*.py"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].split(".")[0] in foreign:
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert wrong == []
