"""binderfs_fuse.uapi has all of uapi/*.h, and its codecs agree with C."""

from pathlib import Path

import pytest

from binderfs_fuse import uapi
from binderfs_fuse._uapi import ffi
from tests.uapi import headers

CODECS = {name: value for name, value in vars(uapi).items() if isinstance(value, uapi.Codec)}


@pytest.mark.parametrize("header", headers.OURS)
def test_every_constant_is_there_with_its_value(header: str, tmp_path: Path) -> None:
    """A name in a header is a name in Python, with the value that a C program sees."""
    names = headers.constants(header)
    expected = headers.evaluate([f'"{headers.UAPI / header}"'], names, tmp_path)

    assert expected == {name: getattr(uapi, name) for name in names}


@pytest.mark.parametrize("header", headers.OURS)
def test_every_structure_has_a_codec(header: str) -> None:
    """A structure in a header has a codec of its name and size."""
    expected = {name: ffi.sizeof(f"struct {name}") for name in headers.structures(header)}

    assert expected == {name: getattr(uapi, name).size for name in expected}


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_reads_and_writes_what_c_does(name: str) -> None:
    """Each field, told apart by its value, is found by C where the codec put it, and the other way round."""
    codec = CODECS[name]
    values = tuple(bytes([65 + i]) * 256 if field == "name" else i + 1 for i, field in enumerate(codec.fields))
    packed = bytearray(codec.pack(*values))
    structure = ffi.cast(f"struct {codec.name} *", ffi.from_buffer(packed))

    found = []
    for path in codec.fields:
        value = structure
        for step in path.split("."):
            value = getattr(value, step)
        found.append(bytes(ffi.buffer(value)) if path == "name" else value)

    assert values == tuple(found)
    assert values == codec.unpack(packed)
    assert values == codec.unpack_from(b"...." + packed, 4)
    assert list(codec.offsets) == list(codec.fields)


def test_a_union_s_member_must_be_named() -> None:
    """A codec does not guess which member of a union is meant."""
    with pytest.raises(ValueError, match=r"flat_binder_object: which one of \['binder', 'handle'\]\?"):
        uapi.codec("flat_binder_object")


def test_a_frame_is_a_command_and_its_payload() -> None:
    """The payload follows the command without a gap, although it is then not aligned."""
    frame = uapi.framed(uapi.binder_ptr_cookie)
    packed = frame.pack(uapi.BR_INCREFS, 0x1122334455667788, 2)

    assert 4 + uapi.binder_ptr_cookie.size == len(packed)
    assert ("command", "ptr", "cookie") == frame.fields
    assert {"command": 0, "ptr": 4, "cookie": 12} == frame.offsets
    assert (uapi.BR_INCREFS, 0x1122334455667788, 2) == frame.unpack(packed)


def test_the_size_of_an_argument_is_in_its_number() -> None:
    """The sizes of payloads need no table."""
    assert uapi.binder_write_read.size == uapi.ioctl_size(uapi.BINDER_WRITE_READ)
    assert uapi.binder_handle_cookie.size == uapi.ioctl_size(uapi.BC_REQUEST_DEATH_NOTIFICATION)
    assert 0 == uapi.ioctl_size(uapi.BR_NOOP)


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(uapi.BC_NAMES, "BC_"), (uapi.BR_NAMES, "BR_"), (uapi.TYPE_NAMES, "BINDER_TYPE_")],
)
def test_numbers_have_their_names_back(names: dict[int, str], prefix: str) -> None:
    """A table of names holds exactly the header's constants of its prefix."""
    expected = {getattr(uapi, name): name for name in headers.constants("binder.h") if name.startswith(prefix)}

    assert expected == names


def test_ioctls_have_their_names_back() -> None:
    """The table of ioctls holds those of the device and of the control file, and no other constant."""
    expected = {
        name
        for header in ("binder.h", "binderfs.h")
        for name in headers.constants(header)
        if name.startswith("BINDER_") and getattr(uapi, name) >> 30
        if not name.startswith("BINDER_TYPE_")
    }

    assert expected == set(uapi.IOCTL_NAMES.values())


def test_fuse_opcodes_and_notifications_have_their_names_back() -> None:
    """Both tables begin and end where the header's runs do, and nothing has got between."""
    opcodes, notifications = list(uapi.OPCODE_NAMES), list(uapi.NOTIFY_NAMES)

    assert (uapi.FUSE_LOOKUP, uapi.FUSE_COPY_FILE_RANGE_64) == (opcodes[0], opcodes[-1])
    assert sorted(opcodes) == opcodes
    assert list(range(uapi.FUSE_NOTIFY_POLL, uapi.FUSE_NOTIFY_PRUNE + 1)) == notifications
