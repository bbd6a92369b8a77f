"""Each claim of docs/security.md names tests that show it, and they are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
TEXT = (TESTS.parent / "docs" / "security.md").read_text()
CLAIMS = TEXT.partition("\n## Claims\n")[2].partition("\n## ")[0]
CELLS = re.findall(r"^\| (.+?) \| (.+?) \|$", CLAIMS, re.MULTILINE)
ROWS = [
    (claim, re.findall(r"`([\w/.]+::\w+)`", shown)) for claim, shown in CELLS if claim != "claim" and claim.strip("-")
]


@cache
def _functions(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_there_are_claims() -> None:
    """The tables are read, all of them."""
    assert len(ROWS) == TEXT.count("::") - sum(len(tests) - 1 for _, tests in ROWS)
    assert len(ROWS) > 20


@pytest.mark.parametrize(("claim", "tests"), ROWS, ids=[claim[:40] for claim, _ in ROWS])
def test_a_claim_has_its_tests(claim: str, tests: list[str]) -> None:
    """Every claim is a sentence, and names tests that exist."""
    assert claim.endswith(".")
    assert tests
    for path, _, function in (test.partition("::") for test in tests):
        assert function in _functions(TESTS / path), f"{path}::{function}"
