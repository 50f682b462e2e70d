"""docs/faults.md names tests that exist, for every case."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| .* \| (.*) \|$", re.MULTILINE)


def test_every_case_names_tests_that_exist() -> None:
    rows = ROW.findall((ROOT / "docs" / "faults.md").read_text())
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for number, cell in rows:
        named = re.findall(r"`([^`]+)::(\w+)`", cell)
        assert named, f"case {number} names no test"
        for path, function in named:
            tree = ast.parse((ROOT / path).read_text())
            found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in found, f"case {number}: {path} has no {function}"
