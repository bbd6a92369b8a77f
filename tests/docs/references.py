"""What the documents refer to: recorded scenarios as `folder/name`, and tests as `path::function`."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parent.parent
SCENARIOS: Final = TESTS / "conformance" / "scenarios"


def references(text: str) -> list[str]:
    """Return what a text refers to, each once, in order of the alphabet."""
    return sorted(set(re.findall(r"`([\w.-]+/[\w/.-]+(?:::\w+)?)`", text)))


def scenario(reference: str) -> str:
    """Return the text of a recorded scenario."""
    return (SCENARIOS / f"{reference}.scenario").read_text()


@cache
def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def check(reference: str) -> None:
    """See that what is referred to is a recorded scenario or a test function."""
    path, colons, function = reference.partition("::")
    if colons:
        assert function in _functions(TESTS / path)
    else:
        assert scenario(reference).startswith("# judged by ")
