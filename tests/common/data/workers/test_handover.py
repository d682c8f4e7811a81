"""What other processes get of a loader: files mapped again, large arrays shared, new locks."""

import mmap
import os
import tempfile
import threading

import numpy as np
import pytest

from common.data.photo_errors import PhotoErrors
from common.data.workers import handover
from common.data.workers.sinks import Recorder, replay, take_notes
from common.io.errors import UserError


def given(thing, known=()):
    """The thing, its sinks, and the bytes of its pickle."""
    block, lengths, sinks = handover.pack(thing, known)
    memory = mmap.mmap(block.fd, 0, prot=mmap.PROT_READ)
    return handover.unpack(memory, lengths), sinks, lengths[0]


def _is_mapped(array):
    return isinstance(array.base, np.memmap)


def test_mapped_files_are_mapped_again_also_parts_of_them(tmp_path):
    values = np.arange(300_000, dtype=np.float64).reshape(-1, 3)
    np.save(tmp_path / "values.npy", values)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    (whole, part, thin), _, size = given(
        (mapped, mapped.view(np.ndarray)[70_000:], mapped[5:90, 1])
    )
    assert _is_mapped(whole) and _is_mapped(part) and size < 4000
    np.testing.assert_array_equal(whole, values)
    np.testing.assert_array_equal(part, values[70_000:])
    np.testing.assert_array_equal(thin, values[5:90, 1])


def test_other_large_arrays_are_shared_and_cannot_be_written():
    values = np.arange(100_000)
    with tempfile.TemporaryFile() as file:
        values.tofile(file)
        file.flush()
        unnamed = np.memmap(file, values.dtype, "r")
    (first, again, small), _, size = given((values, unnamed, np.arange(3)))
    assert size < 4000 and not first.flags.writeable
    np.testing.assert_array_equal(first, values)
    np.testing.assert_array_equal(again, values)
    np.testing.assert_array_equal(small, [0, 1, 2])


def test_sinks_stay_and_hear_of_what_was_noted():
    errors, lock = PhotoErrors("skip"), threading.Lock()
    with lock:
        (loader, again, free), sinks, _ = given((errors, errors, lock), [PhotoErrors("fatal")])
    assert isinstance(loader, Recorder) and sinks[1] is errors and not free.locked()
    loader.count()
    again.skip("1.jpg", UserError("broken"))
    notes = take_notes()
    assert take_notes() == [] and errors.skipped == 0
    replay(notes, sinks)
    assert errors.skipped == 1
    with pytest.raises(UserError, match=r"1\.jpg: cannot read the image: broken"):
        replay(notes[1:], [None, PhotoErrors("fatal")])


def test_a_block_is_gone_with_its_last_user():
    block, lengths, _ = handover.pack(np.arange(5000))
    values = handover.unpack(block.memory, lengths)
    fd = block.fd
    del block
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    np.testing.assert_array_equal(values, np.arange(5000))
