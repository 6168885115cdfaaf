"""The shape of the code and the words of its prose: measured, printed, and with `--check` held to limits.

    python tests/shape.py [ROOT] [--room PATH] [--check]

Prints a table with a row per package, then one line per finding, `FILE:LINE: KIND: ...`. `--room serving/stores` counts
only what lies below that path. `--check` ends with status 1 if a limit is passed; the last lines name those that are.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("penchant", "cli", "features", "training", "serving", "benchmarks")
GENERATED = "penchant/v1/"

FILE_LINES = (400, 500)
"""Lines of a file: 90th percentile and maximum."""
FUNCTION_LINES = (40, 60)
"""Lines of a function, docstring and signature included: 99th percentile and maximum."""
CLASS_LINES = 250
RUN_LINES = 20
"""Lines of `Pipeline.run`, which names the steps of a request and does none of them."""
PRONOUN_SHARE = 0.01
COMMENT_SHARE = 0.04

PRONOUNS = frozenset(
    """
    anything asked both done everybody everything found given gone got had held here it known made meant mine nobody
    nothing one ones other others ours own rest said same seen some somebody something such taken theirs them there
    these thing things those told what where which who whom whose why
    """.split()  # noqa: SIM905 - a list would take a line for each word
)
"""Names of variables that say nothing about what they hold."""

QUESTION = re.compile(r"(what|who|whom|whose|whoever|whatever|whether|where|wherever|why|how)\b", re.IGNORECASE)
"""First words that no docstring has: a function's begins with a verb, an attribute's or a type's with a noun."""

FORBIDDEN = re.compile(
    r"\b(anew|anybody|asker|beside|everybody|kin|mend|mended|mending|mends|nobody|pasts|people|peoples|person|persons"
    r"|somebody|teller|turns|vacant|visitor|visitors|whoever|(?:is|are|was|were|be) away|call(?:ed|s)? back)\b",
    re.IGNORECASE,
)
"""Words that docs/glossary.md replaces: a user is a "user", and so on."""

BUNDLE_ROOMS = ("features/bundle", "serving/bundle/")
REDIS_ROOMS = ("serving/stores/", "serving/redis/", "benchmarks/")
"""Rooms that speak to a Redis in its own commands; the benchmarks do to measure the ceiling."""
COMMANDS = frozenset(
    """
    APPEND BGREWRITEAOF BGSAVE CLIENT CLUSTER COMMAND CONFIG COPY DBSIZE DECR DEL DUMP ECHO EVAL EVALSHA EXISTS EXPIRE
    FLUSHALL FLUSHDB FUNCTION GET GETDEL GETRANGE GETSET HDEL HEXISTS HGET HGETALL HINCRBY HKEYS HLEN HMGET HMSET HSCAN
    HSET HSETNX HVALS INCR INCRBY INFO KEYS LLEN LPOP LPUSH LRANGE MEMORY MGET MSET MULTI OBJECT PERSIST PEXPIRE PING
    PSETEX PTTL PUBLISH RENAME RESTORE ROLE RPOP RPUSH SADD SCAN SCARD SCRIPT SET SETEX SETNX SETRANGE SISMEMBER
    SMEMBERS SREM SSCAN STRLEN SUBSCRIBE TIME TTL TYPE UNLINK WAIT WAITAOF XACK XADD XAUTOCLAIM XCLAIM XDEL XGROUP XINFO
    XLEN XPENDING XRANGE XREAD XREADGROUP XREVRANGE XSETID XTRIM ZADD ZCARD ZRANGE ZREM ZSCORE
    """.split()  # noqa: SIM905 - a list would take a line for each word
)

_CODE_SPAN = re.compile(r"`[^`]*`|\]\([^)]*\)")
_PRAGMA = re.compile(r"#\s*(type:|noqa|pyright:|pragma|fmt:|!)")
_NO_CODE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """A place in a file, the kind of thing found there, and its text."""

    path: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.text}"


@dataclass
class Shape:
    """The measures of a set of files."""

    files: list[int] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    run: int = 0
    local_names: int = 0
    pronouns: int = 0
    code: int = 0
    comments: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Shape) -> None:
        """Adds the measures of more files."""
        for name in ("files", "functions", "classes", "findings"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("run", "local_names", "pronouns", "code", "comments"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def pronoun_share(self) -> float:
        """The pronoun-like names' share of the local ones."""
        return self.pronouns / max(self.local_names, 1)

    @property
    def comment_share(self) -> float:
        """Lines with a comment per line of code."""
        return self.comments / max(self.code, 1)

    def count(self, kind: str) -> int:
        """Returns the number of findings of a kind."""
        return sum(finding.kind == kind for finding in self.findings)


def percentile(values: Sequence[int], share: float) -> int:
    """Returns the smallest value that at least `share` of the values do not exceed; 0 if there are none."""
    return sorted(values)[max(-(-len(values) * round(share * 100) // 100) - 1, 0)] if values else 0


def measure(path: str, text: str) -> Shape:
    """Returns the measures of one Python file."""
    tree = ast.parse(text, filename=path)
    shape = Shape(files=[text.count("\n")])
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            _measure_function(path, node, shape)
        elif isinstance(node, ast.ClassDef):
            lines = node.end_lineno - node.lineno + 1
            shape.classes.append(lines)
            if lines > CLASS_LINES:
                shape.findings.append(Finding(path, node.lineno, "class", f"{node.name} has {lines} lines"))
    if shape.files[0] > FILE_LINES[1]:
        shape.findings.append(Finding(path, 1, "file", f"{shape.files[0]} lines"))
    shape.code, shape.comments = _count_lines(tree, text)
    shape.findings += [*_prose(path, tree, text), *_calls(path, tree)]
    return shape


def _measure_function(path: str, node: _Function, shape: Shape) -> None:
    lines = node.end_lineno - node.lineno + 1
    shape.functions.append(lines)
    if lines > FUNCTION_LINES[1]:
        shape.findings.append(Finding(path, node.lineno, "function", f"{node.name} has {lines} lines"))
    elif lines > FUNCTION_LINES[0]:
        shape.findings.append(Finding(path, node.lineno, "long function", f"{node.name} has {lines} lines"))
    local_names = _local_names(node)
    shape.local_names += len(local_names)
    for name, line in local_names.items():
        # Python's own name for the right-hand side of a comparison.
        if name in PRONOUNS and not (name == "other" and node.name.startswith("__")):
            shape.pronouns += 1
            shape.findings.append(Finding(path, line, "pronoun", f"{name} in {node.name}"))


def _local_names(function: _Function) -> dict[str, int]:
    """Returns the parameters and variables of a function, without those of functions inside it."""
    names: dict[str, int] = {}
    pending: list[ast.AST] = [*ast.iter_child_nodes(function)]
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            names.setdefault(node.arg, node.lineno)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != "_":
            names.setdefault(node.id, node.lineno)
        if not isinstance(node, _Function | ast.ClassDef):
            pending.extend(ast.iter_child_nodes(node))
    return names


def _count_lines(tree: ast.Module, text: str) -> tuple[int, int]:
    """Returns the lines of code, without blanks, comments and docstrings, and the lines with a comment."""
    docstrings = {line for node in _docstrings(tree) for line in range(node.lineno, node.end_lineno + 1)}
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not _PRAGMA.match(token.string):
            comments.add(token.start[0])
        elif token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings), len(comments)


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    """Yields the string statements: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node


def _prose(path: str, tree: ast.Module, text: str) -> Iterator[Finding]:
    """Yields the forbidden words and openings of docstrings, comments and texts."""
    for docstring in _docstrings(tree):
        words = docstring.value.value.lstrip()
        if QUESTION.match(words):
            yield Finding(path, docstring.lineno, "docstring", words.splitlines()[0])
    for node in ast.walk(tree):
        # A string with a space in it is read by a user or an operator; one without is a name or a key.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield from forbidden(path, node.value, node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from forbidden(path, token.string, token.start[0])


def forbidden(path: str, text: str, first: int = 1) -> Iterator[Finding]:
    """Yields the forbidden words of a text whose first line is number `first`; code spans and links may have them."""
    for line, words in enumerate(text.splitlines(), first):
        for match in FORBIDDEN.finditer(_CODE_SPAN.sub("", words)):
            yield Finding(path, line, "word", f"{match[0]!r} in: {words.strip()[:100]}")


def _calls(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Yields the Redis commands and the untyped parts of a manifest outside their rooms."""
    for node in ast.walk(tree):
        if not path.startswith(REDIS_ROOMS) and (command := _command(node)):
            yield Finding(path, node.lineno, "redis", f"{command} belongs into serving/stores")
        if not path.startswith(BUNDLE_ROOMS) and isinstance(node, ast.Subscript):
            source = ast.unparse(node)
            if re.match(r"(\w+\.)*_?bundle\.model\[", source):
                yield Finding(path, node.lineno, "manifest", f"{source} has a typed field of the bundle's model")


def _command(node: ast.AST) -> str:
    """Returns the Redis command that a tuple or a call begins with, after the client if it is given; "" if none."""
    if isinstance(node, ast.Tuple | ast.List):
        candidates: Sequence[ast.expr] = node.elts[:1] if len(node.elts) > 1 else ()
    else:
        candidates = node.args[:2] if isinstance(node, ast.Call) else ()
    for candidate in candidates:
        if isinstance(candidate, ast.Constant) and isinstance(candidate.value, str | bytes):
            text = candidate.value if isinstance(candidate.value, str) else candidate.value.decode("latin-1")
            if text.partition(" ")[0] in COMMANDS:
                return text
    return ""


def prose_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the path and text of each file of prose: pages of docs/ (not the records of decisions), protos, Lua."""
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    # The glossary names the words in order to replace them.
    pages = [page for page in pages if page.exists() and page.name != "glossary.md"]
    for page in pages:
        yield page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
    for pattern, mark in (("protos/**/*.proto", "//"), ("serving/**/*.lua", "--")):
        for file in sorted(root.glob(pattern)):
            # Lines without a comment stay as empty ones, so that the numbers of lines hold.
            lines = [line.partition(mark)[2] for line in file.read_text(encoding="utf-8").splitlines()]
            yield file.relative_to(root).as_posix(), "\n".join(lines)


def _twice(classes: Iterable[tuple[str, str, int]]) -> Iterator[Finding]:
    """Yields each place of a class whose name another class has."""
    places: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, path, line in classes:
        places[name].append((path, line))
    for name, where in places.items():
        if len(where) > 1:
            for path, line in where:
                yield Finding(path, line, "twice", f"{name}, in {', '.join(sorted(path for path, _ in where))}")


def survey(root: Path, room: str = "") -> dict[str, Shape]:
    """Returns the shape of each package below `root`, and under "all" that of everything, with prose of other files."""
    shapes = {package: Shape() for package in PACKAGES}
    classes: list[tuple[str, str, int]] = []
    for package, shape in shapes.items():
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            if path.startswith(GENERATED):
                continue
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text, filename=path)
            classes += [(node.name, path, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
            if path == "serving/pipeline/runner.py":
                shape.run = _run_lines(tree)
            if path.startswith(room):
                shape.add(measure(path, text))
    for finding in _twice(classes):
        if finding.path.startswith(room):
            shapes[finding.path.partition("/")[0]].findings.append(finding)
    total = Shape()
    for shape in shapes.values():
        total.add(shape)
    for path, text in prose_files(root):
        if path.startswith(room):
            total.findings += forbidden(path, text)
    return {**shapes, "all": total}


def _run_lines(tree: ast.Module) -> int:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Pipeline":
            for method in node.body:
                if isinstance(method, _Function) and method.name == "run":
                    return method.end_lineno - method.lineno + 1
    return 0


def passed_limits(shape: Shape) -> Iterator[str]:
    """Yields a line for each limit that the shape of everything passes."""
    limits = [
        ("90 % of files have at most that many lines", percentile(shape.files, 0.9), FILE_LINES[0]),
        ("lines of the longest file", max(shape.files, default=0), FILE_LINES[1]),
        ("99 % of functions have at most that many lines", percentile(shape.functions, 0.99), FUNCTION_LINES[0]),
        ("lines of the longest function", max(shape.functions, default=0), FUNCTION_LINES[1]),
        ("lines of the longest class", max(shape.classes, default=0), CLASS_LINES),
        ("lines of Pipeline.run", shape.run, RUN_LINES),
        ("class names that occur twice", shape.count("twice"), 0),
        ("docstrings that begin with a question word", shape.count("docstring"), 0),
        ("words that docs/glossary.md replaces", shape.count("word"), 0),
        ("Redis commands outside serving/stores and serving/redis", shape.count("redis"), 0),
        ("untyped parts of a manifest outside the bundle's rooms", shape.count("manifest"), 0),
    ]
    yield from (f"limit passed: {name}: {value}, limit {limit}" for name, value, limit in limits if value > limit)
    if shape.pronoun_share > PRONOUN_SHARE:
        yield f"limit passed: pronoun-like locals: {shape.pronoun_share:.1%}, limit {PRONOUN_SHARE:.0%}"
    if shape.comment_share < COMMENT_SHARE:
        yield f"limit passed: comments: {shape.comment_share:.1%} of the lines of code, at least {COMMENT_SHARE:.0%}"


def table(shapes: dict[str, Shape]) -> Iterator[str]:
    """Yields the rows of the table of measures."""
    yield f"{'':10} files  file p50/p90/max  function p50/p99/max  class max  run  pronouns  comments  findings"
    for name, shape in shapes.items():
        if not shape.files:
            continue
        file = "/".join(str(percentile(shape.files, share)) for share in (0.5, 0.9, 1))
        function = "/".join(str(percentile(shape.functions, share)) for share in (0.5, 0.99, 1))
        yield (
            f"{name:10} {len(shape.files):5}  {file:>16}  {function:>20}  {max(shape.classes, default=0):9}  "
            f"{shape.run or '':3}  {shape.pronoun_share:8.1%}  {shape.comment_share:8.1%}  {len(shape.findings):8}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the shape; with `--check`, returns 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--room", default="", help="count only what lies below this path, such as serving/stores")
    parser.add_argument("--check", action="store_true", help="print findings only where a limit is passed, and fail")
    options = parser.parse_args(arguments)
    shapes = survey(options.root, options.room)
    everything = shapes["all"]
    limits = list(passed_limits(everything))
    kinds = Counter(finding.kind for finding in everything.findings)
    if not options.check:
        print("\n".join(table(shapes)))
        print(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    if limits or not options.check:
        print(*sorted(everything.findings, key=lambda finding: (finding.kind, *finding[:2])), sep="\n")
    print(*limits, sep="\n", end="\n" if limits else "")
    print(f"shape: {len(limits)} limits passed")
    return 1 if options.check and limits else 0


if __name__ == "__main__":
    raise SystemExit(main())
