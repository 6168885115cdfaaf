"""The import rules that import-linter cannot say; `make check` runs this file, and pyproject.toml holds the others.

    python tests/architecture_rules.py [ROOT]

Prints one line per violation, `FILE:LINE: Rule N: what to do`, and ends with status 1 if there is any.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("penchant", "cli", "features", "training", "serving", "benchmarks")
GENERATED = ("_pb2.py", "_pb2_grpc.py")
LIGHT = {
    "typer",
    "cli",
    "cli.options",
    "features.errors",
    "features.limits",
    "penchant.streams",
}  # what the command line may import besides the standard library
SHARED = {"features", "numpy", "pyarrow", "numba"}  # what training and serving may have in common
SETTINGS = {"pydantic", "yaml"}  # what their settings are made of
ON_A_GPU = ("serving.bundle.device_scan", "serving.bundle.device_kernels")
"""Modules of serving that need torch or Triton; the others import them when a GPU is asked for, not before."""
FORBIDDEN_IN_SERVING = ("torch", "onnx", "onnxscript", "safetensors", "training")

_TEXT_MODES = ("r", "w", "a", "x", "r+", "w+", "a+")

Violation = tuple[str, int, str]


def rule_1(path: str, tree: ast.Module) -> Iterator[Violation]:
    """Shared code of training and serving needs numpy, pyarrow and numba only."""
    if not path.startswith("features/"):
        return
    for node in ast.walk(tree):
        for name in _imported(node):
            top = name.partition(".")[0]
            allowed = SHARED | SETTINGS if path == "features/settings.py" else SHARED
            if top not in allowed and top not in sys.stdlib_module_names:
                yield path, node.lineno, f"Rule 1: features needs numpy, pyarrow and numba only, not {top}"


def rule_2(root: Path) -> Iterator[Violation]:
    """Nothing that serving imports, however deep, imports torch or training: import all of serving and look."""
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((root / "serving").rglob("*.py"))
    ]
    modules = [module for module in modules if module not in ON_A_GPU]
    probe = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    bad = [name for name in {FORBIDDEN_IN_SERVING!r} if name in sys.modules]\n"
        "    if bad:\n"
        "        print(name, *bad)\n"
        "        break\n"
    )
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", probe]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        yield "serving", 0, f"Rule 2: serving cannot be imported: {(run.stderr.splitlines() or ['?'])[-1]}"
    elif run.stdout:
        module, *bad = run.stdout.split()
        yield module, 0, f"Rule 2: importing this loads {', '.join(bad)}; serving does without"


def rule_5(path: str, tree: ast.Module) -> Iterator[Violation]:
    """The command line imports a command's module when that command runs."""
    if not path.startswith("cli/"):
        return
    for node in _at_import(tree.body):
        for name in _imported(node):
            if name not in LIGHT and name.partition(".")[0] not in sys.stdlib_module_names:
                yield path, node.lineno, f"Rule 5: import {name} inside the command that needs it"


def rule_6(path: str, tree: ast.Module) -> Iterator[Violation]:
    """A package's file holds its docstring only, and nothing happens at import."""
    if ast.get_docstring(tree) is None:
        yield path, 1, "Rule 6: say in a docstring what this module is for"
    if path.endswith("/__init__.py") and path != "penchant/__init__.py":
        for node in tree.body[1:]:
            yield path, node.lineno, "Rule 6: an __init__.py holds a docstring and nothing else"
    for node in _at_import(tree.body):
        if isinstance(node, ast.For | ast.While | ast.With) or _is_action(node):
            yield path, node.lineno, "Rule 6: nothing happens at import; move this into a function"


def rule_7(path: str, tree: ast.Module) -> Iterator[Violation]:
    """Text in files is UTF-8, whatever the locale of the machine would have it be."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = ast.unparse(node.func).split(".")[-1]
        modes = [one.value for one in node.args if isinstance(one, ast.Constant) and one.value in _TEXT_MODES]
        if name in ("read_text", "write_text") or (name in ("open", "fdopen") and modes) or _is_builtin_open(node):
            yield path, node.lineno, 'Rule 7: say encoding="utf-8", for the locale of a machine may be another'


def rule_8(path: str, tree: ast.Module) -> Iterator[Violation]:
    """Numba's own decorators fail where no cache can be written."""
    if path == "features/jit.py":
        return
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", ()):
            if ast.unparse(decorator).partition("(")[0].split(".")[-1] in ("jit", "njit", "vectorize", "guvectorize"):
                yield path, decorator.lineno, "Rule 8: decorate with features.jit.kernel, which needs no cache folder"


def no_hidden_imports(path: str, tree: ast.Module) -> Iterator[Violation]:
    """Imports are statements, so that every rule sees them; the lazy names of `penchant` alone are not."""
    if path == "penchant/__init__.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield path, node.lineno, "Rule 5: write an import statement, so that the import rules see it"


RULES = (rule_1, rule_5, rule_6, rule_7, rule_8, no_hidden_imports)


def violations(root: Path) -> Iterator[Violation]:
    """Every violation below `root`: file, line (0 = the whole file), what to do."""
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            if not path.endswith(GENERATED):
                tree = ast.parse(file.read_text(encoding="utf-8"), filename=path)
                for rule in RULES:
                    yield from rule(path, tree)
    yield from rule_2(root)


def _at_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            guard = ast.unparse(node.test)
            if "TYPE_CHECKING" not in guard and "__name__" not in guard:
                yield from _at_import(node.body)
            yield from _at_import(node.orelse)
        elif isinstance(node, ast.Try):
            handlers = [one for handler in node.handlers for one in handler.body]
            yield from _at_import([*node.body, *handlers, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.ClassDef):
            yield from _at_import(node.body)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


def _is_builtin_open(node: ast.Call) -> bool:
    """A call of `open` itself, in a mode that is not said to be binary."""
    if not (isinstance(node.func, ast.Name) and node.func.id == "open"):
        return False
    return not any(isinstance(one, ast.Constant) and "b" in str(one.value) for one in node.args[1:])


def _is_action(node: ast.stmt) -> bool:
    """A call whose result is not used is there for its effect; adding a command to the command line is harmless."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return not (isinstance(node.value.func, ast.Attribute) and node.value.func.attr == "add_typer")


def main(root: Path) -> int:
    """Prints the violations; returns 1 if there is any."""
    found = list(violations(root))
    for path, line, what in found:
        print(f"{path}:{line}: {what}")
    print(f"architecture rules: {len(found)} violations")
    return min(len(found), 1)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent))
