"""uapi/*.h as C."""

import subprocess

import pytest

from tests.uapi import headers


@pytest.mark.parametrize("header", headers.OURS)
def test_a_header_stands_alone(header: str) -> None:
    """Each header can be included first and twice, in standard C, with every warning on."""
    source = f'#include "{headers.UAPI / header}"\n' * 2
    subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c", "-"],
        input=source,
        text=True,
        check=True,
    )
