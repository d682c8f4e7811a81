"""What README.md and docs/ tell people to type exists: files, modules, flags, links."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
# Flags that absl and ml_collections give to every command.
COMMON_FLAGS = {"config", "help", "helpfull", "verbosity"}

BLOCKS = re.findall(r"^(?:```|~~~)\w*\n(.*?)^(?:```|~~~)", TEXT, re.DOTALL | re.MULTILINE)
INDENTED = re.findall(r"(?:^    .*\n)+", TEXT, re.MULTILINE)
COMMANDS = [
    re.sub(r"\s*\\\n\s*", " ", line).strip()
    for block in [*BLOCKS, *INDENTED]
    for line in re.split(r"(?<!\\)\n", block)
]
PYTHON_COMMANDS = sorted({c for c in COMMANDS if re.match(r"(\w+=\S+ )*python -m [\w.]+", c)})


def module_path(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None


@functools.cache
def parsed(path: Path) -> tuple[frozenset[str], frozenset[Path]]:
    """Names in flags.DEFINE_...() of a file, and the files of this project that it imports."""
    names, files = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            first = node.args[0] if node.args else None
            if node.func.attr.startswith("DEFINE_") and isinstance(first, ast.Constant):
                names.add(first.value)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files |= {ROOT / (module.replace(".", "/") + ".py") for module in modules}
    return frozenset(names), frozenset(file for file in files if file.exists())


def defined_flags(path: Path) -> set[str]:
    """Flags of a module and of all modules of this project behind it."""
    names, seen, pending = set(), set(), {path}
    while pending:
        file = pending.pop()
        seen.add(file)
        found, imported = parsed(file)
        names |= found
        pending |= imported - seen
    return names


def test_the_pages_show_commands():
    assert len(PYTHON_COMMANDS) >= 5


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_python_commands_name_modules_and_flags_that_exist(command):
    module = re.search(r"python -m ([\w.]+)", command)[1]
    path = module_path(module)
    assert path is not None, f"no module {module}"
    known = defined_flags(path) | COMMON_FLAGS if ROOT in path.parents else None
    for flag in re.findall(r"\s--(?:no)?([A-Za-z_]\w*)", command):
        assert known is None or flag in known, f"{module} has no flag --{flag}: {command}"


# The argument of of_workdir is a work directory, which has to be there.
CONFIGS = sorted(
    set(re.findall(r"--config=(configs/[\w/.]+\.py)", TEXT)) - {"configs/of_workdir.py"}
)


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_and_overridden_fields_exist(config):
    spec = importlib.util.spec_from_file_location("config", ROOT / config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
    for command in COMMANDS:
        if config not in command:
            continue
        for field in re.findall(r"--config\.([\w.]+)=", command):
            value = values
            for key in field.split("."):
                assert key in value, f"{config} has no field {field}: {command}"
                value = value[key]


def mentioned_files() -> list[str]:
    """Files and folders in `code` that name a path inside this repository."""
    tops = {path.name for path in ROOT.iterdir()}
    return sorted(
        {
            word.rstrip("/")
            for word in re.findall(r"`([^`\n]+)`", TEXT)
            if re.fullmatch(r"[\w./-]+", word) and "/" in word and word.split("/")[0] in tops
        }
    )


@pytest.mark.parametrize("name", mentioned_files())
def test_named_files_exist(name):
    if name.split("/")[0] == "quickstart_output":
        pytest.skip("made by scripts/quickstart")
    assert (ROOT / name).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


SCRIPTS = {
    w for c in COMMANDS for w in c.split()[:1] if re.fullmatch(r"(scripts|\.ci)/\w[\w./]*", w)
}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_to_run_are_executable(script):
    assert (ROOT / script).stat().st_mode & 0o100


def test_pictures_stay_small():
    for path in (ROOT / "docs").rglob("*.*"):
        assert path.stat().st_size < 300_000, path


ZOO = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "config",
    [
        path
        for path in sorted((ROOT / "configs").glob("*ion/*.py"))
        if path.stem not in ("__init__", "base")
    ],
    ids=lambda path: path.stem,
)
def test_the_zoo_lists_every_config(config):
    assert f"`{config.stem}`" in ZOO
