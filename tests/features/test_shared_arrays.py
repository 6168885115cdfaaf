"""Sealed memory: what was written is read, by other processes too, and no process changes it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from features.shared_arrays import ArrayWriter, NotSealed, SharedArrays, shared

ARRAYS = {
    "rows": np.arange(10, dtype=np.int32),
    "vectors": np.arange(12, dtype=np.float32).reshape(4, 3),
    "flags": np.array([True, False, True]),
    "none": np.zeros((0, 3), np.float32),
    "keys": np.full(5000, 2**64 - 1, np.uint64),
}


def fill(writer: ArrayWriter) -> None:
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(writer.add(name, array, room=7), array)
    writer.note(average=1.5)


def test_what_was_written_is_read_with_its_room():
    with shared(fill) as arrays:
        assert arrays.facts == {"average": 1.5}
        reads = [(array, read(name)) for name, array in ARRAYS.items() for read in (arrays.read, arrays.writable)]
    for array, read in reads:
        assert read.dtype == array.dtype
        assert read.shape == (len(array) + 7, *array.shape[1:])
        np.testing.assert_array_equal(read[: len(array)], array)
        assert not read[len(array) :].any()


def test_a_write_reaches_no_other_reader():
    with shared(fill) as arrays:
        changed, other = arrays.writable("vectors"), arrays.writable("vectors")
        changed[:] = -1
        np.testing.assert_array_equal(other[:4], ARRAYS["vectors"])
        np.testing.assert_array_equal(arrays.read("vectors")[:4], ARRAYS["vectors"])
        with pytest.raises(ValueError, match="read-only"):
            arrays.read("rows")[0] = 1


CHILD = """
import sys
from features.shared_arrays import SharedArrays
arrays = SharedArrays(int(sys.argv[1]))
arrays.writable("rows")[:] = 5
print(int(arrays.read("rows").sum()), arrays.facts["average"])
"""


def test_a_child_reads_the_same_and_nobody_writes():
    writer = ArrayWriter()
    try:
        fill(writer)
        writer.seal()
        command = [sys.executable, "-c", CHILD, str(writer.handle)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, pass_fds=[writer.handle])
        assert run.stdout.split() == ["45", "1.5"]
        for change in (lambda: os.pwrite(writer.handle, b"x", 0), lambda: os.ftruncate(writer.handle, 10)):
            with pytest.raises(PermissionError):
                change()
        assert SharedArrays(writer.handle).read("rows")[:10].sum() == 45
    finally:
        os.close(writer.handle)


def test_memory_that_is_not_sealed_or_of_another_kind_is_refused(tmp_path):
    writer = ArrayWriter()
    fill(writer)
    with pytest.raises(NotSealed, match="not sealed"):
        SharedArrays(writer.handle)
    with (tmp_path / "file").open("wb") as file, pytest.raises(NotSealed, match="not sealed"):
        SharedArrays(file.fileno())
    os.close(writer.handle)
    empty = ArrayWriter()
    empty._end, empty._entries = 0, {}
    empty.seal()
    assert SharedArrays(empty.handle).facts == {}
    os.close(empty.handle)


def test_pieces_that_are_not_the_array_are_refused():
    writer = ArrayWriter()
    with pytest.raises(ValueError, match="8 bytes are not those of <i4"):
        writer.stream("rows", np.int32, (3,), [bytes(8)])
    os.close(writer.handle)


READER = """
import sys
from features.shared_arrays import SharedArrays

def own() -> int:
    [line] = [line for line in open("/proc/self/smaps_rollup") if line.startswith("Pss_Anon:")]
    return int(line.split()[1]) * 1024

before = own()
array = SharedArrays(int(sys.argv[1])).writable("large")
total = float(array.sum())
read = own() - before
array[: array.size // 8] = 1
print(read, own() - before)
"""


def test_reading_costs_a_process_nothing_and_writing_what_is_written():
    writer, size = ArrayWriter(), 32 << 20
    try:
        writer.add("large", np.zeros(size // 4, np.float32) + 2)
        writer.seal()
        command = [sys.executable, "-c", READER, str(writer.handle)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, pass_fds=[writer.handle])
    finally:
        os.close(writer.handle)
    read, written = map(int, run.stdout.split())
    assert read < size / 16
    assert size / 8 <= written < size / 4
