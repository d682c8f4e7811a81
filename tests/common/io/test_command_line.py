"""What a user can type wrong on a command line is one line; --help and errors come at once."""

import ast
import json
import subprocess
import sys
import threading
import time

import pytest
from absl import flags

from common.io import command_line, run_flags
from common.io.early_answers import flag_definitions
from common.io.errors import UserError
from tests.commands import ROOT

CONFIG = "configs/detection/r50.py"
IMPORTS = """
import ast, importlib, pathlib, sys
from absl import flags
from common.io.early_answers import define, flag_definitions
for name in sys.argv[1:]:
    tree = flag_definitions(ast.parse(pathlib.Path(name).read_text()))
    own = define(tree, name.replace("/", ".").removesuffix(".py"), pathlib.Path(name))
    assert own, name
    for flag in own:
        delattr(flags.FLAGS, flag)
    define_again = compile(tree, name, "exec")  # as the command itself does
    exec(define_again, {"__name__": "__main__"})
    for flag in own:
        delattr(flags.FLAGS, flag)
    heavy = {"jax", "flax", "tensorflow", "torch", "orbax"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


@pytest.fixture
def parse(monkeypatch):
    """Parses the command line of a command with --config and --workdir."""
    # Other tests of this process may have defined flags of commands that they run in it.
    parsed = flags.FLAGS.is_parsed()
    others = {
        name: flags.FLAGS[name]
        for name in flags.FLAGS
        if (flags.FLAGS.find_module_defining_flag(name) or "scripts").startswith("scripts")
    }
    for name in others:
        delattr(flags.FLAGS, name)
    before = set(flags.FLAGS)

    def forget() -> None:
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)

    def parse(*arguments: str, watches: bool = False, may_wait: bool = True, **required: bool):
        forget()
        run_flags.define_flags(**required)
        if watches:
            run_flags.define_watch_flags()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])  # read by ml_collections, too
        return flags.FLAGS, command_line.parse_flags(["command", *arguments], may_wait=may_wait)

    yield parse
    forget()
    for name, flag in others.items():
        flags.FLAGS[name] = flag
    if parsed:
        flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config=configs/detection/r51.py"], ["no such file", "mean configs/detection/r50.py?"]),
        (["--config=configs"], ["configs is a folder"]),
        (["--config=README.md"], ["expected a Python file"]),
        ([f"--config={CONFIG}:abc"], ["argument 'abc' refused", "ValueError"]),
        ([f"--config={CONFIG}", "--config.data.canvs=3"], ["--config.data.canvs", "mean canvas?"]),
        ([f"--config={CONFIG}", "--config.seed.x=3"], ["config.seed is a value"]),
        ([f"--config={CONFIG}", "--config.data.batch_size=abc"], ["batch_size=abc", "'abc'"]),
        (["--config.data.dir=x"], ["--config: missing", "data.dir"]),
        (["--confg=x"], ["--confg: no such flag", "mean --config?"]),
        (["--config"], ["--config"]),
        (["--workdir=w"], ["--config: missing"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(parse, monkeypatch, arguments, parts):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def get_config(:\n", ["no valid Python", "line 1"]),
        ("x = 1\n", ["no function get_config"]),
        ("import nowhere\n", ["ModuleNotFoundError", "nowhere"]),
    ],
)
def test_a_config_file_that_does_not_run_is_said_in_one_line(parse, tmp_path, source, parts):
    (tmp_path / "config.py").write_text(source)
    with pytest.raises(UserError) as error:
        parse(f"--config={tmp_path / 'config.py'}", "--workdir=w")
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_the_last_value_of_a_field_counts(parse):
    values, rest = parse(
        f"--config={ROOT / CONFIG}",
        "--workdir=w",
        "--config.data.canvas=(64,64)",
        "--config.seed=1",
        "--config.data.canvas=(32,48)",
    )
    assert values.config.data.canvas == (32, 48) and values.config.seed == 1
    assert rest == ["command"]


def test_without_config_that_of_the_work_directory_is_taken(parse, tmp_path):
    config = {"seed": 3, "data": {"canvas": [64, 96], "sources": [{"dir": "a"}]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values, _ = parse(f"--workdir={tmp_path}", "--config.seed=4", config_required=False)
    assert values.config.data.canvas == (64, 96) and values.config.seed == 4
    for text, message in (("{", "no valid JSON"), ("[" * 100_000, "nested"), ("[1]", "found list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
            parse(f"--workdir={tmp_path}", config_required=False)
    config = {"task": "detection", "seed": 5, "data": {"canvas": [64, 96]}}  # of another version
    (tmp_path / "config.json").write_text(json.dumps(config))
    values, _ = parse(f"--workdir={tmp_path}", config_required=False)
    assert (values.config.seed, values.config.data.canvas) == (5, (64, 96))
    assert values.config.data.flip is True and values.config.model.backbone == "resnet50"
    values, _ = parse("--workdir=nowhere", config_required=False)
    assert values.config is None


def test_a_watcher_waits_for_the_config_of_its_training(parse, tmp_path):
    run = tmp_path / "run"
    arguments = (f"--workdir={run}", "--config.data.dir=dataset", "--poll_seconds=0.01", "--watch")
    options = dict(watches=True, config_required=False)

    def begin_training() -> None:
        run.mkdir()
        (run / "new").write_text(json.dumps({"data": {"dir": "elsewhere", "canvas": [64, 96]}}))
        (run / "new").rename(run / "config.json")

    # What is wrong with its flags is said at once; a field, when there is a config.
    _, rest = parse(*arguments, may_wait=False, **options)
    assert rest == ["command"]
    with pytest.raises(UserError, match="--splt: no such flag"):
        parse(*arguments, "--splt=x", **options)
    with pytest.raises(UserError, match=r"run/config\.json: no such file within 0\.02 s"):
        parse(*arguments, "--timeout=0.02", **options)
    with pytest.raises(UserError, match="--config: missing"):
        parse(*arguments[:-1], **options)
    training = threading.Timer(0.2, begin_training)
    training.start()
    values, _ = parse(*arguments, **options)
    training.join()
    assert (values.config.data.dir, values.config.data.canvas) == ("dataset", (64, 96))
    with pytest.raises(UserError, match=r"--config\.data\.dr: no such field"):
        parse(*arguments, "--config.data.dr=x", **options)


@pytest.mark.parametrize(
    ("arguments", "drops"),
    [
        ([], (9, 11)),
        (["--config.optimizer.num_epochs=26"], (18, 22)),
        (["--config.optimizer.num_epochs=6.5"], (4.5, 5.5)),
        (["--config.optimizer.num_epochs=26", "--config.optimizer.decay_epochs=(20,)"], (20,)),
    ],
)
def test_learning_rate_drops_follow_the_number_of_epochs(parse, arguments, drops):
    parse(f"--config={ROOT / CONFIG}", "--workdir=w", *arguments)
    assert run_flags.training_config().optimizer.decay_epochs == drops


def test_flags_are_found_in_the_source_of_a_command():
    tree = flag_definitions(
        ast.parse(
            "import heavy, os\nfrom light import NAMES, OTHER\nLIMIT = 3\nUNUSED = heavy.x\n"
            "def define_flags() -> heavy.Type:\n    more()\n    DEFINE('a', NAMES, LIMIT)\n"
            "def more():\n    DEFINE(os.sep)\n"
            "def main():\n    heavy.run()\n"
            "if __name__ == '__main__':\n    define_flags()\n    run_main(main)\n"
        )
    )
    source = ast.unparse(tree)
    assert "import os" in source and "LIMIT = 3" in source and source.endswith("define_flags()")
    assert "heavy" not in source and "OTHER" not in source and "run_main" not in source
    assert flag_definitions(ast.parse("x = 1")) is None


def test_flags_of_all_commands_are_defined_without_heavy_imports():
    commands = [
        str(path.relative_to(ROOT))
        for package in ("detection", "segmentation", "ensemble", "scripts")
        for path in sorted((ROOT / package).rglob("*.py"))
        if "    run_main(main" in path.read_text()
    ]
    assert len(commands) > 40
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *commands], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["detection.train", "--help"], 0, "--workdir\n      Directory of the run. (required)"),
        (["scripts.score", "--help"], 0, "--[no]expand_predictions"),
        (["segmentation.evaluate", "--confi=x"], 1, "error: --confi: no such flag"),
        (["ensemble.merge", "--config=nowhere.py"], 1, "error: --config=nowhere.py: nowhere.py is"),
    ],
)
def test_help_and_errors_come_before_the_imports(arguments, status, text):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == status
    assert time.perf_counter() - start < 10  # imports alone take longer on a busy machine
