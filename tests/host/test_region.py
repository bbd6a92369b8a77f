import ctypes
import errno
import gc
import mmap
import os
import resource
import weakref

import pytest

from binderfs_fuse.host.region import SIZE, Kind, Region, has_released, unmap_released

PAGE = mmap.PAGESIZE


@pytest.fixture
def region() -> Region:
    """A region of its own."""
    return Region(7, Kind.PASSTHROUGH)


def test_a_region_begins_with_zeros(region: Region) -> None:
    """Nothing is stored in a new region."""
    assert bytes(SIZE) == region.read(0, SIZE)


@pytest.mark.parametrize("offset", [0, 5, PAGE - 2, SIZE - 4])
def test_what_is_stored_is_there(region: Region, offset: int) -> None:
    """Bytes are found where they were put, and nowhere else."""
    assert region.populate(offset, 4) == 0
    region.store(offset, b"data")

    assert region.read(offset, 4) == b"data"
    assert SIZE - region.read(0, SIZE).count(0) == 4


@pytest.mark.parametrize(("offset", "size"), [(SIZE - 2, 4), (SIZE, 1)])
def test_nothing_is_stored_past_the_end(region: Region, offset: int, size: int) -> None:
    """Bytes that would lie past the end are refused, all of them."""
    with pytest.raises(ValueError, match="length"):
        region.store(offset, b"x" * size)
    assert bytes(2) == region.read(SIZE - 2, 4)


def test_a_copy_goes_straight_in(region: Region) -> None:
    """A task's memory is copied to where it is to be."""
    text = ctypes.create_string_buffer(b"from here")
    region.populate(100, 9)

    assert region.copy_from(os.getpid(), ctypes.addressof(text), 9, 100) == 9
    assert region.read(99, 11) == b"\0from here\0"


def test_a_copy_of_what_is_not_there_copies_nothing(region: Region) -> None:
    """A fault at the first byte leaves the region as it was."""
    assert region.copy_from(os.getpid(), 16, 9, 0) == 0
    assert bytes(9) == region.read(0, 9)


def test_pages_are_present_once_populated(region: Region) -> None:
    """Populating takes the memory of the pages touched, and of no others."""
    assert os.fstat(region.fd).st_blocks == 0

    assert region.populate(PAGE - 1, 2) == 0
    assert 2 * PAGE == 512 * os.fstat(region.fd).st_blocks


def test_a_region_keeps_its_pages_and_its_size(region: Region) -> None:
    """Whoever has the file can neither truncate it, nor punch holes, nor write."""
    for attempt in (
        lambda: os.ftruncate(region.fd, 0),
        lambda: os.ftruncate(region.fd, 2 * SIZE),
        lambda: os.pwrite(region.fd, b"x", 0),
        lambda: mmap.mmap(region.fd, PAGE),
    ):
        with pytest.raises(PermissionError):
            attempt()
    libc = ctypes.CDLL(None, use_errno=True)
    punch_hole = 3
    assert libc.fallocate(region.fd, punch_hole, ctypes.c_long(0), ctypes.c_long(PAGE)) == -1
    assert ctypes.get_errno() == errno.EPERM


def test_others_see_what_is_stored(region: Region) -> None:
    """A mapping of the file shows what was stored before and after."""
    region.populate(0, 8)
    region.store(0, b"one")
    view = mmap.mmap(region.fd, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)

    assert view[:3] == b"one"
    region.store(0, b"two")
    assert view[:3] == b"two"


def test_the_pages_outlive_the_descriptor(region: Region) -> None:
    """The descriptor may be closed, also twice."""
    region.populate(0, 4)
    region.store(0, b"kept")
    fd = region.fd
    region.close_descriptor()
    region.close_descriptor()

    assert region.read(0, 4) == b"kept"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_last_reference_takes_the_mapping_along() -> None:
    """A region that nobody refers to is to be unmapped."""

    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as maps:  # noqa: PTH123
            return maps.read().count("memfd:binder")

    gc.collect()
    unmap_released()
    before = mapped()
    region = Region(7, Kind.PAGE_CACHE)
    region.close_descriptor()
    gone = weakref.ref(region)
    assert before + 1 == mapped()

    del region
    assert gone() is None
    assert has_released()
    unmap_released()
    assert before == mapped()
    assert not has_released()


def test_no_room_for_a_region_is_an_error() -> None:
    """Without a descriptor to be had, a region cannot be made."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Region(7, Kind.PASSTHROUGH)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
