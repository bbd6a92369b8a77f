"""The compiled parts of the package; all else is in pyproject.toml.

Three modules are C, built by cffi. Two programs are C, too: the server executes them, and they stand beside the module
that starts them. What serves a call is plain Python, which mypyc compiles where it is installed. The same source runs
without that, at a third of the speed (see binderfs_fuse/__init__.py).
"""

import contextlib
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

BUILDERS = ["_uapi_build", "_host_build", "_system_build"]

HOST = Path("binderfs_fuse/host")
PROGRAMS = {
    "keeper": ["keeper.c", "filter.c", "message.c"],
    "injector": ["injector.c", "ptrace.c", "keeper_client.c", "message.c"],
}
"""The sources of each program, by its name; all of them are in `HOST`."""
COMPILE = ["-O2", "-Wall", "-Wextra", "-fPIE", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
LINK = ["-pie", "-Wl,-z,relro,-z,now"]

# For tools/sanitize: where reports go.
REPORTS = os.environ.get("BINDERFS_FUSE_SANITIZED")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What Python is compiled with makes every overflow defined.
SANITIZE = [*SANITIZERS, "-g", "-O1", "-fno-omit-frame-pointer", "-fno-wrapv"]
if REPORTS:
    PROGRAMS = {name: [*sources, "sanitized.c"] for name, sources in PROGRAMS.items()}
    COMPILE = ["-Wall", "-Wextra", "-fPIE", f'-DREPORTS="{REPORTS}"', *SANITIZE]
    LINK = [*LINK, *SANITIZERS]


class BuildPrograms(build_ext):
    """Builds the programs too, for a wheel or in place."""

    def build_extensions(self) -> None:
        """Build the modules, then the programs that are older than their sources."""
        for extension in self.extensions if REPORTS else ():
            extension.extra_compile_args += SANITIZE
            extension.extra_link_args += SANITIZERS
        super().build_extensions()
        for name, sources in PROGRAMS.items():
            paths = [str(HOST / source) for source in sources]
            program = self._built(name)
            if not self.force and not newer_group([*paths, *map(str, HOST.glob("*.h"))], str(program)):
                continue
            # Some sources are a module's too, which is compiled otherwise.
            folder = str(Path(self.build_temp, name))
            objects = self.compiler.compile(paths, output_dir=folder, extra_postargs=COMPILE)
            program.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_executable(
                objects, name, output_dir=str(program.parent), libraries=["pthread"], extra_postargs=LINK
            )

    def copy_extensions_to_source(self) -> None:
        """Put what is built where its source is, the programs too."""
        super().copy_extensions_to_source()
        for built, program in self._programs().items():
            self.copy_file(built, program)

    def get_outputs(self) -> list[str]:
        """Return what is built, with the programs."""
        return [*super().get_outputs(), *([] if self.inplace else self._programs())]

    def get_output_mapping(self) -> dict[str, str]:
        """Return where what is built goes, in the source folder, with the programs."""
        return {**super().get_output_mapping(), **(self._programs() if self.inplace else {})}

    def _programs(self) -> dict[str, str]:
        """Return where programs are built, and where they are in the source folder."""
        return {str(self._built(name)): str(HOST / name) for name in PROGRAMS}

    def _built(self, name: str) -> Path:
        return Path(self.build_lib, HOST, name)


SERVING = []
with contextlib.suppress(ImportError):
    from mypyc.build import mypycify

    if not os.environ.get("BINDERFS_FUSE_UNCOMPILED"):
        engine = sorted(path for path in Path("binderfs_fuse/engine").glob("[a-z]*.py") if path.stem != "invariants")
        names = ("channel.py", "device.py", "inodes.py", "lane.py", "transfer.py", "turns.py")
        plane = [Path("binderfs_fuse/fuse", name) for name in names]
        # Their constants: to compiled code, a name of an uncompiled module is a look-up in a dict, each time.
        wire = Path("binderfs_fuse/uapi.py")
        try:
            SERVING = mypycify(
                [str(path) for path in [wire, *engine, *plane]],
                group_name="binderfs_fuse._serving",
                opt_level="2",
                debug_level="0",
            )
        except SystemExit:
            print("binderfs-fuse: this mypyc cannot compile it; it works without, more slowly", file=sys.stderr)  # noqa: T201

setup(
    cmdclass={"build_ext": BuildPrograms},
    cffi_modules=[f"binderfs_fuse/{builder}.py:ffibuilder" for builder in BUILDERS],
    ext_modules=SERVING,  # type: ignore[arg-type] # mypyc's are setuptools' by another name
)
