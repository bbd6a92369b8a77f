"""The fixtures that mount, for this folder."""

from tests.mounts import mount_binderfs, mounted

__all__ = ["mount_binderfs", "mounted"]
