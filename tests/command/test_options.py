"""What ``-o`` may say. That the kernel's options mean what they mean there was asked of the real binderfs."""

import logging
from pathlib import Path

import pytest

from binderfs_fuse.command.options import TABLE, OptionError, Options, parse, parse_data, split
from binderfs_fuse.fuse.settings import MAX_DEVICES, Settings


def _settings(text: str) -> object:
    return parse([text], Options()).settings


@pytest.mark.parametrize(
    ("text", "number"),
    [("max=3", 3), ("max=0x10", 16), ("max=010", 8), ("max=+7", 7), ("max=0", 0), ("max=1048576", MAX_DEVICES)],
)
def test_max_is_a_number_in_any_of_the_kernels_notations(text: str, number: int) -> None:
    """Decimal, hexadecimal and octal are told apart by what is in front, up to as many minors as there are."""
    assert number == parse([text], Options()).settings.maximum


@pytest.mark.parametrize("text", ["max=", "max=4x", "max= 4", "max=-1", "max=08", "max=1048577", "max=99999999999"])
def test_a_bad_max_is_said_in_the_kernels_words(text: str) -> None:
    """What mount(2) answers EINVAL is an error that reads as the kernel log's."""
    with pytest.raises(OptionError, match=r"^Bad value for 'max': it is a number up to 1048576$"):
        parse([text], Options())


def test_the_last_of_two_values_holds() -> None:
    """An option may be repeated, within a list and over lists."""
    assert 6 == parse(["max=4,max=5", "max=6"], Options()).settings.maximum


@pytest.mark.parametrize(("text", "stats"), [("stats=global", True), ("stats=unset", False)])
def test_stats_decides_on_the_logs(text: str, stats: bool) -> None:
    """There are logs with global, and none with unset."""
    assert stats is parse([text], Options()).settings.stats


@pytest.mark.parametrize(
    "text",
    [
        "max",
        "stats",
        "stats=",
        "stats=GLOBAL",
        "region=ram",
        "priority=high",
        "log_level=loud",
        "secctx=",
        "log=",
        "mode=9",
        "mode=1",
    ],
)
def test_a_bad_value_names_its_option(text: str) -> None:
    """Every option that takes a value says which it is when that is wrong."""
    with pytest.raises(OptionError, match=f"^Bad value for '{text.partition('=')[0]}'"):
        parse([text], Options())


@pytest.mark.parametrize("text", ["foo", "foo=1", "rw=1", "context=u:object_r:x:s0", "MAX=3"])
def test_an_unknown_name_is_said_in_the_kernels_words(text: str) -> None:
    """A misspelt option is not passed over."""
    with pytest.raises(OptionError, match=f"^Unknown parameter '{text.partition('=')[0]}'$"):
        parse([text], Options())


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "defaults,nosuid",
        "sync,dirsync,mand,iversion,nosymfollow",
        "nomand,async,nousers",
        "x-systemd.automount,_netdev",
        "user_id=0,group_id=0",
    ],
)
def test_what_any_mount_may_be_told_changes_nothing(text: str) -> None:
    """Options of mount(8), of fstab and of the mount table are accepted."""
    assert Options() == parse([text], Options())


def test_flags_go_to_mount() -> None:
    """Flags of mount(2) that mean something here are passed on, by their bits in <sys/mount.h>."""
    assert 1 << 10 | 1 << 24 == parse(["noatime,strictatime"], Options()).flags


def test_ro_is_the_servers_to_keep() -> None:
    """A read-only mount would keep clients from opening devices to write, so that it is not the kernel's business."""
    options = parse(["ro"], Options())

    assert options.settings.read_only
    assert 0 == options.flags


def test_the_server_can_be_confined() -> None:
    """The server filters its system calls where it can, unless it is told whether to."""
    assert Options().settings.seccomp is None
    assert parse(["seccomp"], Options()).settings.seccomp is True
    assert parse(["seccomp,noseccomp"], Options()).settings.seccomp is False


def test_the_devices_attributes() -> None:
    """Mode is octal; users and groups go by number or by name."""
    settings = parse(["mode=0666,uid=1000,gid=root"], Options()).settings

    assert (0o666, 1000, 0) == (settings.mode, settings.uid, settings.gid)


@pytest.mark.parametrize("option", ["uid", "gid"])
def test_a_number_that_is_no_users(option: str) -> None:
    """The last one there is says, in system calls, that there is none."""
    assert 4294967294 == getattr(parse([f"{option}=4294967294"], Options()).settings, option)
    with pytest.raises(OptionError, match=f"^Bad value for '{option}': it is a number up to 4294967294$"):
        parse([f"{option}=4294967295"], Options())


@pytest.mark.parametrize(("option", "what"), [("uid", "user"), ("gid", "group")])
def test_nobodys_name_is_said_to_be_that(option: str, what: str) -> None:
    """A user or group that does not exist is an error, by its name."""
    with pytest.raises(OptionError, match=f"^Bad value for '{option}': there is no {what} 'no-such-name'$"):
        parse([f"{option}=no-such-name"], Options())


def test_the_first_devices_can_be_named() -> None:
    """Names are separated by colons."""
    assert (b"binder", b"b2") == parse(["devices=binder:b2"], Options()).settings.devices


@pytest.mark.parametrize("names", ["", "a::b", "a:a", "a/b", "..", "binder-control", "features", "n" * 256])
def test_what_cannot_be_a_devices_name(names: str) -> None:
    """A name that is empty, taken, too long or no file's name is refused before anything is mounted."""
    with pytest.raises(OptionError, match=r"^Bad value for 'devices'"):
        parse([f"devices={names}"], Options())


def test_a_label_may_have_commas_in_quotes() -> None:
    """Quotes keep a value together, as in mount(8); security labels need that."""
    assert b"u:r:a:s0:c1,c2" == parse(['max=3,secctx="u:r:a:s0:c1,c2",ro'], Options()).settings.secctx


def test_split_keeps_quoted_commas_only() -> None:
    """Empty options between commas go, and so do the quotes."""
    assert ["a=1,2", "b", "c"] == split('a="1,2",,b,c')


def test_where_to_log_is_no_matter_of_the_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is named as seen from where the command is run, since the server runs in /."""
    monkeypatch.chdir(tmp_path)
    options = parse(["log=server.log,log_level=debug"], Options())

    assert str(tmp_path / "server.log") == options.log
    assert logging.DEBUG == options.log_level
    assert "syslog" == parse(["log=syslog"], Options()).log


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("256M", 256 << 20), ("2g", 2 << 30), ("4096k", 4 << 20)]
)
def test_memory_is_a_number_of_bytes(text: str, size: int) -> None:
    """With a unit in one letter, of either case, or without."""
    assert size == parse([f"memory={text}"], Options()).settings.memory


@pytest.mark.parametrize("text", ["", "0", "1023k", "-1", "1.5G", "12T", "010M", "9" * 13, "\u0661M"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    """It is refused, as is what is too little for anything."""
    with pytest.raises(OptionError, match="Bad value for 'memory'"):
        parse([f"memory={text}"], Options())


def test_limits_go_by_their_names() -> None:
    """Each limit of memory can be set, and no other."""
    assert {"threads": 5, "opens": 16} == parse(["limit_threads=5,limit_opens=0x10"], Options()).settings.limits
    with pytest.raises(OptionError, match=r"^Unknown parameter 'limit_luck'$"):
        parse(["limit_luck=1"], Options())
    with pytest.raises(OptionError, match=r"^Unknown parameter 'limit_lanes'$"):
        parse(["limit_lanes=1"], Options())
    with pytest.raises(OptionError, match=r"^Bad value for 'limit_opens': it is a number up to 4294967295$"):
        parse(["limit_opens=many"], Options())


def test_what_was_given_is_remembered() -> None:
    """A remount changes only what it is told to."""
    assert {"max", "ro"} == parse(["remount,max=4,rw,noatime"], Options()).given
    assert {"allow_other", "seccomp", "limit_opens"} == parse(["noallow_other,seccomp,limit_opens=3"], Options()).given


def test_the_kernel_is_told_what_it_knows() -> None:
    """The data of mount(2) can say nothing that is this package's own; test_run.py asks the real driver for more."""
    options, source = parse_data("max=5\n,stats=global,ro,sync,source=x,lazytime", Options(Settings(stats=False)))

    assert (5, True, True) == (options.settings.maximum, options.settings.stats, options.settings.read_only)
    assert (1 << 25, "x") == (options.flags, source)
    for name in TABLE.keys() - {"max", "stats"} | {"allow_other", "seccomp", "limit_opens", "remount", "source", "x-y"}:
        with pytest.raises(OptionError, match=f"^Unknown parameter '{name}'$"):
            parse_data(f"{name}=1", Options(), "source")
