"""What follows ``-o``: the kernel's options for binderfs, this package's own, and those that any mount takes.

`TABLE` is the list; a wrong value or an unknown name is said in the kernel's words.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from binderfs_fuse.command.program import absolute
from binderfs_fuse.fuse.mounting import MountError
from binderfs_fuse.fuse.settings import LEAST_MEMORY, MAX_DEVICES, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# <sys/mount.h>
_FLAGS: Final = {
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
# fmt: off
_WITHOUT_EFFECT: Final = frozenset((
    "defaults", "async", "atime", "diratime", "norelatime", "nostrictatime", "nolazytime", "silent", "loud",
    "sync", "dirsync", "mand", "nomand", "iversion", "noiversion", "symfollow", "nosymfollow",
    "dev", "nodev", "suid", "nosuid", "exec", "noexec", "default_permissions",
    "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup",
    "nofail", "_netdev",
))
# fmt: on
# A remount is given what the mount table says.
_VALUES_WITHOUT_EFFECT: Final = frozenset(["user_id", "group_id", "comment"])


class OptionError(MountError):
    """An option that mount(2) would answer with EINVAL."""


@dataclass(frozen=True, slots=True)
class Options:
    """What ``-o`` said.

    `flags` are MS_ bits for mount(2); `log` is a file's name, ``syslog``, or None where nothing was said; `given` names
    the options that were, of those that are this package's or the kernel's for binderfs.
    """

    settings: Settings = field(default_factory=Settings)
    allow_other: bool = False
    flags: int = 0
    log: str | None = None
    log_level: int = logging.WARNING
    remount: bool = False
    given: frozenset[str] = frozenset()


def base_options(*, stats: bool) -> Options:
    """Return what holds for this user where nothing is said; `stats` is what mount.py and the kernel differ in."""
    return Options(Settings(stats=stats), allow_other=os.geteuid() == 0)


def _bad(name: str, reason: str) -> OptionError:
    return OptionError(f"Bad value for '{name}': {reason}")


def _u32(name: str, value: str, most: int = (1 << 32) - 1) -> int:
    """Read a number as the kernel's fsparam_u32 does: 0x or 0 in front make it hexadecimal or octal; a plus may be."""
    wrong = _bad(name, f"it is a number up to {most}")
    # The kernel lets numbers end with a newline, as they do when somebody writes them to a file.
    value = value.removesuffix("\n")
    if not re.fullmatch(r"\+?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", value):
        raise wrong
    digits = value.removeprefix("+")
    octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
    number = int(digits, 8 if octal else 0)
    if number > most:
        raise wrong
    return number


def _maximum(options: Options, value: str) -> Options:
    return _set(options, maximum=_u32("max", value, MAX_DEVICES))


def _stats(options: Options, value: str) -> Options:
    return _set(options, stats=_choice("stats", value, ("global", "unset")) == "global")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise _bad(name, f"it is one of {', '.join(choices)}")
    return value


def _region(options: Options, value: str) -> Options:
    return _set(options, region=_choice("region", value, ("auto", "passthrough", "pagecache")))


def _priority(options: Options, value: str) -> Options:
    return _set(options, priority=_choice("priority", value, ("kernel", "android")))


def _mode(options: Options, value: str) -> Options:
    if not re.fullmatch("0?[0-7]{3}", value):
        raise _bad("mode", "it is three octal digits, such as 0666")
    return _set(options, mode=int(value, 8))


# The one above is nobody's at all, and says in system calls that there is none.
_MOST_ID: Final = (1 << 32) - 2


def _uid(options: Options, value: str) -> Options:
    if value.isdecimal():
        return _set(options, uid=_u32("uid", value.lstrip("0") or "0", _MOST_ID))
    try:
        return _set(options, uid=pwd.getpwnam(value).pw_uid)
    except KeyError:
        raise _bad("uid", f"there is no user {value!r}") from None


def _gid(options: Options, value: str) -> Options:
    if value.isdecimal():
        return _set(options, gid=_u32("gid", value.lstrip("0") or "0", _MOST_ID))
    try:
        return _set(options, gid=grp.getgrnam(value).gr_gid)
    except KeyError:
        raise _bad("gid", f"there is no group {value!r}") from None


_NOT_DEVICES: Final = (b".", b"..", b"binder-control", b"features", b"binder_logs")


def _devices(options: Options, value: str) -> Options:
    names = tuple(os.fsencode(name) for name in value.split(":"))
    if len(set(names)) < len(names):
        raise _bad("devices", "a name is there twice")
    for name in names:
        if not 0 < len(name) <= 255 or b"/" in name or name in _NOT_DEVICES:
            raise _bad("devices", f"{os.fsdecode(name)!r} cannot be a device's name")
    return _set(options, devices=names)


def _secctx(options: Options, value: str) -> Options:
    if not value:
        raise _bad("secctx", "it is empty")
    return _set(options, secctx=os.fsencode(value))


def _log(options: Options, value: str) -> Options:
    if not value:
        raise _bad("log", "it is empty")
    return replace(options, log=value if value == "syslog" else str(absolute(Path(value))))


def _log_level(options: Options, value: str) -> Options:
    level = _choice("log_level", value, ("debug", "info", "warning", "error"))
    return replace(options, log_level=logging.getLevelNamesMapping()[level.upper()])


_UNITS: Final = {"": 0, "k": 10, "m": 20, "g": 30}


def _memory(options: Options, value: str) -> Options:
    found = re.fullmatch(r"([1-9][0-9]{0,11})([kmg]?)", value.lower())
    size = int(found[1]) << _UNITS[found[2]] if found is not None else 0
    if size < LEAST_MEMORY:
        raise _bad("memory", "it is a number of bytes, such as 256M, and at least 1M")
    return _set(options, memory=size)


def _set(options: Options, **values: object) -> Options:
    return replace(options, settings=replace(options.settings, **values))  # type: ignore[arg-type]


def _limit(options: Options, name: str, value: str) -> Options:
    # Here, since the engine takes longer to import than all else that a command needs.
    from binderfs_fuse.limits import Limits  # noqa: PLC0415

    if name.removeprefix(LIMIT) not in (limit.name for limit in fields(Limits)):
        raise OptionError(f"Unknown parameter '{name}'")
    number = _u32(name, value)
    if not number:
        raise _bad(name, "it is at least 1")
    return _set(options, limits={**options.settings.limits, name.removeprefix(LIMIT): number})


def unchangeable(options: Options) -> dict[str, str]:
    """Say what was chosen that a remount cannot change, by the names of options."""
    settings = options.settings
    return {
        "devices": ":".join(map(os.fsdecode, settings.devices)),
        "mode": f"{settings.mode:04o}",
        "uid": str(os.geteuid() if settings.uid is None else settings.uid),
        "gid": str(os.getegid() if settings.gid is None else settings.gid),
        "region": settings.region,
        "secctx": os.fsdecode(settings.secctx),
        "priority": settings.priority,
        "seccomp": str(settings.seccomp is not False),
        "memory": str(settings.memory),
        "allow_other": str(options.allow_other),
        "log": str(options.log),
        "log_level": logging.getLevelName(options.log_level).lower(),
        **{LIMIT + name: str(value) for name, value in settings.limits.items()},
    }


LIMIT: Final = "limit_"
"""What the options begin with that set a `binderfs_fuse.limits.Limits`."""

TABLE: Final[dict[str, Callable[[Options, str], Options]]] = {
    "max": _maximum,
    "stats": _stats,
    "region": _region,
    "priority": _priority,
    "secctx": _secctx,
    "mode": _mode,
    "uid": _uid,
    "gid": _gid,
    "devices": _devices,
    "log": _log,
    "log_level": _log_level,
    "memory": _memory,
}
"""The options that take a value. They are described in docs/guide.md."""


def split(text: str) -> list[str]:
    """Split at commas, but for those inside double quotes, as mount(8) does; the quotes go."""
    parts = re.findall(r'(?:"[^"]*"|[^,])+', text)
    return [part.replace('"', "") for part in parts]


def parse(texts: Iterable[str], base: Options) -> Options:
    """Read option lists, each like ``max=8,stats=global``, over what holds without them. Raises `OptionError`."""
    options = base
    given = set()
    for option in (option for text in texts for option in split(text)):
        name, equals, value = option.partition("=")
        if name in TABLE:
            if not equals:
                raise _bad(name, "it has none")
            options = TABLE[name](options, value)
            given.add(name)
        elif equals and name.startswith(LIMIT):
            options = _limit(options, name, value)
            given.add(name)
        elif equals and name not in _VALUES_WITHOUT_EFFECT and not name.startswith("x-"):
            raise OptionError(f"Unknown parameter '{name}'")
        elif name in ("allow_other", "noallow_other"):
            options = replace(options, allow_other=name == "allow_other")
            given.add("allow_other")
        elif name in ("ro", "rw"):
            options = _set(options, read_only=name == "ro")
            given.add("ro")
        elif name in ("seccomp", "noseccomp"):
            options = _set(options, seccomp=name == "seccomp")
            given.add("seccomp")
        elif name == "remount":
            options = replace(options, remount=True)
        elif name in _FLAGS:
            options = replace(options, flags=options.flags | _FLAGS[name])
        elif not equals and name not in _WITHOUT_EFFECT and not name.startswith("x-"):
            raise OptionError(f"Unknown parameter '{name}'")
    return replace(options, given=frozenset(given))


# What the kernel itself takes for any type, with whatever for a value. There is nothing to write here, or to lock.
_KERNELS_WITHOUT_EFFECT: Final = frozenset(("sync", "async", "dirsync", "mand", "nomand"))


# What the mount table says of a mount of ours, which mount(8) repeats when it remounts.
OF_THE_TABLE: Final = frozenset(("user_id", "group_id", "default_permissions", "allow_other"))


def parse_data(
    data: str, base: Options, source: str | None = None, ignored: frozenset[str] = frozenset()
) -> tuple[Options, str | None]:
    """Read the data of mount(2) as the kernel does for its binderfs: it knows of nothing that is this package's own.

    Who calls mount(2) must not choose what the server does as its own user, such as where it logs to. Returns also the
    source, which the data may say where the call does not. Names that are `ignored` have no effect. Raises
    `OptionError`.
    """
    options = base
    for option in data.split(","):
        name, equals, value = option.partition("=")
        if not name or name in ignored:
            continue
        if name in ("ro", "rw"):
            options = _set(options, read_only=name == "ro")
        elif name in ("lazytime", "nolazytime"):
            lazy = _FLAGS["lazytime"]
            options = replace(options, flags=options.flags | lazy if name == "lazytime" else options.flags & ~lazy)
        elif name == "max" and equals:
            options = _maximum(options, value)
        elif option == "stats=global":
            options = _set(options, stats=True)
        elif name == "source" and equals and source is None:
            source = value
        elif name not in _KERNELS_WITHOUT_EFFECT:
            raise OptionError(f"Unknown parameter '{name}'")
    return options, source
