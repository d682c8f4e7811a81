"""Answers --help and a wrong command line before a command's imports, which take many seconds.

Importing JAX, TensorFlow and a model takes ten seconds and more on a small machine, and Python
imports all of it before the first line of a command runs. So the packages with commands
(`detection`, `segmentation`, `ensemble`, `scripts`) call `answer` when they are imported, which is
the first thing that `python -m PACKAGE.COMMAND` does. It runs of the command's source only what
defines its flags: the calls of its last lines, before `run_main`, the functions and
constants that these use, and the imports that those use. A command line that is right leaves
no trace; the command then parses it as if nothing had been before.
"""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from common.io.command_line import asks_for_help, help_text, parse_flags
from common.io.errors import UserError

# Before anything imports TensorFlow, which would report its build options at every start, or XLA,
# which takes compilations of more than two minutes for errors (`common.training.compiling` tells
# of them). 3 keeps what ends a process; what a user sets counts.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


_DEFINERS = ("common", "detection", "segmentation", "ensemble", "scripts", "ml_collections")


def answer(package: str) -> None:
    """Ends the process with help or one line of error, where the command line asks for it.

    Args:
      package: that is being imported; nothing happens unless one of its modules was started by
        `python -m`.
    """
    module = _started_module()
    if module is None or not module.startswith(package + "."):
        return
    path = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    definitions = flag_definitions(tree)
    if definitions is None:
        return
    own = define(definitions, module, path)
    if asks_for_help(sys.argv[1:]):
        print(help_text(module, ast.get_docstring(tree) or "", own))
        sys.exit(0)
    try:
        parse_flags([str(path), *sys.argv[1:]], may_wait=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        if name in own or name.startswith("config."):  # a field that the command line sets
            delattr(flags.FLAGS, name)


def define(definitions: ast.Module, module: str, path: Path) -> set[str]:
    """Defines the flags of a command; returns their names, without those of libraries."""
    before = set(flags.FLAGS)
    exec(compile(definitions, str(path), "exec"), {"__name__": module, "__file__": str(path)})
    definer = flags.FLAGS.find_module_defining_flag
    new = set(flags.FLAGS) - before
    return {name for name in new if str(definer(name)).split(".")[0] in _DEFINERS}


def _started_module() -> str | None:
    """The module of `python -m MODULE`, while its packages are being imported."""
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return None
    return sys.orig_argv[sys.orig_argv.index("-m") + 1]


def flag_definitions(tree: ast.Module) -> ast.Module | None:
    """The part of a command's source that defines its flags; None of a module without any.

    Args:
      tree: of a module whose last statement calls `run_main(...)`, after other calls.
    """
    last = tree.body[-1]
    if not (isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"):
        return None
    calls = [statement for statement in last.body if not _calls_run_main(statement)]
    if len(calls) == len(last.body):
        return None
    needed = {name for call in calls for name in _names(call)}
    chosen: dict[int, ast.stmt] = {}
    while True:
        found = len(needed)
        for place, statement in enumerate(tree.body[:-1]):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                bound = {
                    alias: alias.asname or alias.name.split(".")[0] for alias in statement.names
                }
                if aliases := [alias for alias in statement.names if bound[alias] in needed]:
                    chosen[place] = ast.copy_location(_with_names(statement, aliases), statement)
            elif needed & set(_bound(statement)):
                chosen[place] = statement
                needed.update(_names(statement))
        if len(needed) == found:
            break
    body = [*(chosen[place] for place in sorted(chosen)), *calls]
    return ast.fix_missing_locations(ast.Module(body, type_ignores=[]))


def _with_names(statement: ast.Import | ast.ImportFrom, aliases: list[ast.alias]) -> ast.stmt:
    if isinstance(statement, ast.Import):
        return ast.Import(aliases)
    return ast.ImportFrom(statement.module, aliases, statement.level)


def _calls_run_main(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "run_main" for node in ast.walk(statement))


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement at the top of a module gives a value."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets: list[Any] = getattr(statement, "targets", None) or [statement.target]  # type: ignore[union-attr]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _names(statement: ast.stmt) -> set[str]:
    """Names that a statement reads; annotations are left out, which nothing here needs."""
    parts: list[ast.AST] = [statement]
    if isinstance(statement, ast.FunctionDef):
        parts = [*statement.body, *statement.args.defaults, *statement.decorator_list]
        statement.returns, statement.args = None, _unannotated(statement.args)
    elif isinstance(statement, ast.AnnAssign):
        parts = [statement.value] if statement.value else []
    return {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}


def _unannotated(arguments: ast.arguments) -> ast.arguments:
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return arguments
