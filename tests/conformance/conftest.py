"""One mount with each kind of region, for all scenarios."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import Mounted, mount_py, needs_mount

# Scenarios that need a security label were recorded where it is this.
_LABEL = "kernel"


@pytest.fixture(scope="session", params=["passthrough", "pagecache"])
def binderfs(request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mounted binderfs to play on, not below pytest's folder: nothing may stay mounted there after a test."""
    if needs_mount.args[0]:
        pytest.skip(needs_mount.kwargs["reason"])
    folder = Path(tempfile.mkdtemp(prefix="conformance-"))
    path = folder / "mount"
    path.mkdir()
    mounted = Mounted(path, folder / "log", request.param)
    done = mount_py(path, "-o", f"log={mounted.log},region={request.param},secctx={_LABEL}")
    if request.param == "passthrough" and "region=passthrough takes" in done.stderr:
        pytest.skip("the kernel has no FUSE passthrough")

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)

    try:
        yield mounted
    finally:
        unmounted = mount_py("-u", path)
        if unmounted.returncode:
            subprocess.run(["umount", "--lazy", path], check=False)
    complaints = mounted.complaints()
    shutil.rmtree(folder)

    assert [] == complaints


@pytest.fixture
def place(binderfs: Mounted) -> Path:
    """Where it is mounted."""
    return binderfs.path
