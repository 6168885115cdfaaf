"""The shape of the code is measured: each violation, planted in a small tree, is named, and fails the check."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shape

CLEAN = '''"""Adds numbers."""


def add(number: int) -> int:
    """Returns the number plus one."""
    # The caller counts from zero.
    return number + 1
'''
RUNNER = "serving/pipeline/runner.py"
PLANTED = {
    "file": ("features/long.py", '"""Counts."""\n' + "X = 1  # why\n" * 500, "lines of the longest file: 501"),
    "many long files": ("features/long.py", '"""Counts."""\n' + "X = 1  # why\n" * 400, "files have at most"),
    "function": ("cli/main.py", "def long() -> None:\n" + "    print()  # why\n" * 60, "longest function: 61"),
    "many long functions": (
        "cli/main.py",
        "def long() -> None:\n" + "    print()  # why\n" * 40,
        "functions have at most",
    ),
    "class": ("training/run.py", "class Long:\n" + "    x = 1  # why\n" * 250, "lines of the longest class: 251"),
    "run": (
        RUNNER,
        "class Pipeline:\n    def run(self) -> None:\n" + "        print()  # why\n" * 20,
        "Pipeline.run: 21",
    ),
    "pronoun": ("features/a.py", "def add(said: int) -> int:  # why\n    return said\n", "pronoun-like locals: 50.0%"),
    "twice": ("features/a.py", "class One: ...  # why\n\n\nclass One: ...  # why\n", "class names that occur twice: 2"),
    "docstring": ("features/a.py", '"""Whether it is on."""\nX = 1  # why\n', "question word: 1"),
    "comments": ("features/a.py", "X = 1\n" * 100, "comments: 1.0%"),
    "word in a docstring": ("features/a.py", '"""Counts people."""\nX = 1  # why\n', "glossary.md replaces: 1"),
    "word in a comment": ("features/a.py", "X = 1  # for whoever asks\n", "glossary.md replaces: 1"),
    "word in an error": ("features/a.py", "raise OSError('the store is away')  # why\n", "glossary.md replaces: 1"),
    "word in a page": ("docs/page.md", "# A page\n\nA person asks.\n", "glossary.md replaces: 1"),
    "word in a proto": ("protos/penchant/v1/a.proto", "message A {}  // made anew\n", "glossary.md replaces: 1"),
    "word in a script": ("serving/stores/a.lua", "return 1 -- beside it\n", "glossary.md replaces: 1"),
    "redis": ("serving/privacy/rights.py", "client.command('HGET', 'key')  # why\n", "Redis commands outside"),
    "manifest": ("serving/engine/engine.py", "print(self.bundle.model['actions'])  # why\n", "untyped parts"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    plant(tmp_path, "features/clean.py", CLEAN)
    return tmp_path


def plant(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_clean_tree_passes_no_limit(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shape.main([str(tree), "--check"]) == 0
    assert capsys.readouterr().out == "shape: 0 limits passed\n"


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_named_and_fails(planted: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text, limit = PLANTED[planted]
    plant(tree, path, text)
    assert shape.main([str(tree)]) == 0, "without --check the script only prints"
    assert shape.main([str(tree), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    passed = [line for line in lines if line.startswith("limit passed")]
    assert limit in passed[-1]
    if planted in ("run", "comments") or planted.startswith("many"):
        return
    assert any(line.startswith(f"{path}:") for line in lines), "the place is named"


def test_names_in_code_and_links_are_no_prose(tree: Path) -> None:
    plant(tree, "docs/page.md", "See the column `people`, [why](decisions/0006-ranking-inside-a-person.md).\n")
    plant(tree, "features/a.py", "KEYS = {'people': 1}  # the name of a column\n")
    assert shape.survey(tree)["all"].findings == []


def test_a_room_is_measured_alone(tree: Path) -> None:
    plant(tree, "serving/stores/a.py", '"""What it is."""\n')
    plant(tree, "serving/redis/a.py", '"""What it is."""\n')
    serving = shape.survey(tree, "serving/stores")["all"]
    assert len(serving.files) == 1
    assert [finding.path for finding in serving.findings] == ["serving/stores/a.py"]


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.9, 90), (0.99, 99), (1, 100)])
def test_percentile(share: float, value: int) -> None:
    assert shape.percentile(range(1, 101), share) == value
    assert shape.percentile([7], share) == 7
    assert shape.percentile([], share) == 0
