"""The quick version of `tests.proofs.bundles`, and what a service and its workers make of hostile bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper

from features.bundle import TABLES, open_bundle
from features.catalog_columns import CatalogColumns
from features.errors import BundleError
from features.shared_arrays import ArrayWriter
from features.transforms import text_tokens
from serving.bundle.tables import read_tables, write_tables
from serving.engine.preparation import prepared
from serving.engine.vetting import vet
from tests.proofs.bundle_mutations import seal_again

COUNT = int(os.environ.get("BUNDLES", "60"))


def test_changed_bundles_are_refused_by_name_or_are_sound():
    command = [sys.executable, "-m", "tests.proofs.bundles", "--count", str(COUNT), "--control", "40"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["failures"] == 0
    assert figures["refused"] > 0.7 * COUNT
    assert figures["control"]["failures"] > 0


@pytest.fixture
def bundle(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path / "bundle")
    return tmp_path / "bundle"


def filled(bundle: Path) -> int:
    """The shared tables of a bundle; the caller closes the handle."""
    opened, writer = open_bundle(bundle), ArrayWriter()
    write_tables(opened, writer)
    writer.seal()
    return writer.handle


def test_what_is_shared_is_sealed_and_what_is_served_is_what_was_hashed(bundle):
    opened, handle = open_bundle(bundle), filled(bundle)
    try:
        shared, alone = read_tables(opened, handle), read_tables(opened)
        rows = np.arange(alone.catalog.size)
        for change in (lambda: os.pwrite(handle, b"x", 100), lambda: os.ftruncate(handle, 10)):
            with pytest.raises(PermissionError):
                change()
        # In place, and to nothing at all: a mapped file would answer with this, or end the process.
        for name in TABLES:
            with (bundle / name).open("r+b") as file:
                file.write(bytes(min(3000, (bundle / name).stat().st_size)))
                file.truncate(100)
        again = read_tables(opened, handle)
        for tables in (shared, again):
            assert tables.catalog.ids(rows) == alone.catalog.ids(rows)
            assert tables.catalog.rows(alone.catalog.ids(rows)).tolist() == rows.tolist()
            assert [tables.catalog.item(row) for row in rows] == [alone.catalog.item(row) for row in rows]
            for name in CatalogColumns.__slots__:
                np.testing.assert_array_equal(*(getattr(each.catalog.columns, name) for each in (tables, alone)))
            np.testing.assert_array_equal(tables.index, alone.index)
        with pytest.raises(BundleError, match="instead of"):
            read_tables(opened)
    finally:
        os.close(handle)


def test_live_changes_of_a_worker_reach_no_other(bundle):
    opened, handle = open_bundle(bundle), filled(bundle)
    try:
        changed, other = read_tables(opened, handle), read_tables(opened, handle)
    finally:
        os.close(handle)
    before = other.catalog.eligible_bitmap(10**12).copy()
    changed.catalog.set_available(0, False)
    vector = np.ones((1, opened.model.dim), np.float32)
    changed.catalog.put([{"item_id": "new", "title": "unheard word"}], vector, 1)
    changed.lexical.put([changed.catalog.base_size], [text_tokens("unheard word")])
    assert changed.catalog.size == other.catalog.size + 1
    assert not changed.catalog.eligible(np.array([0]), 10**12)[0]
    np.testing.assert_array_equal(other.catalog.eligible_bitmap(10**12), before)
    assert not other.catalog.columns.vectors[other.catalog.size :].any()
    assert other.lexical.search(text_tokens("unheard"), 5)[0].size == 0
    assert changed.lexical.search(text_tokens("unheard"), 5)[0].tolist() == [changed.catalog.base_size]


def test_a_bundle_whose_items_are_in_several_pieces_still_opens(bundle):
    before = read_tables(open_bundle(bundle)).catalog
    with pa.OSFile(str(bundle / "items.arrow"), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    with pa.OSFile(str(bundle / "items.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    seal_again(bundle)
    after = read_tables(open_bundle(bundle)).catalog
    rows = list(range(before.size))
    assert after.records_now(rows) == before.records_now(rows)
    assert [after.item(row) for row in rows] == [before.item(row) for row in rows]
    for name in CatalogColumns.__slots__:
        np.testing.assert_array_equal(getattr(after.columns, name), getattr(before.columns, name))


def test_memory_that_is_not_sealed_or_of_another_bundle_is_refused(bundle, tmp_path):
    opened, writer = open_bundle(bundle), ArrayWriter()
    write_tables(opened, writer)
    with pytest.raises(BundleError, match="not sealed"):
        read_tables(opened, writer.handle)
    os.close(writer.handle)
    other = ArrayWriter()
    write_tables(opened, other)
    other.note(bundle_id="other")
    other.seal()
    with pytest.raises(BundleError, match="of another bundle"):
        read_tables(opened, other.handle)
    os.close(other.handle)


def test_a_file_that_changed_since_is_refused_while_it_is_read(bundle):
    opened = open_bundle(bundle, later=TABLES)
    for name in TABLES:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=f"{name}: changed while"):
            read_tables(opened)
        (bundle / name).write_bytes(content)


def test_the_process_that_reads_the_tables_names_the_file_that_ends_it(bundle, tmp_path, monkeypatch):
    opened, never = open_bundle(bundle), threading.Event()
    with prepared(opened, never) as handle:
        assert read_tables(opened, handle).catalog.size
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(DEADLY.format(name="vectors.npy", times=2))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fault'}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(BundleError, match=r"vectors\.npy: ends the process \(SIGSEGV\)"), prepared(opened, never):
        pass
    stopped = threading.Event()
    stopped.set()
    with prepared(opened, stopped) as handle:
        assert handle is None


DEADLY = """
import os, signal, sys
opened = 0

def watch(event, arguments):
    global opened
    if event == "open" and str(arguments[0]).endswith("{name}"):
        opened += 1
        if opened == {times}:  # once it was looked at or hashed, it is read to be parsed
            os.kill(os.getpid(), signal.SIGSEGV)

sys.addaudithook(watch)
"""
"""Plants a fault into every Python process that has it on its path: a file ends the process that parses it."""


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(DEADLY.format(name="query_encoder.onnx", times=2))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fault'}:{os.environ.get('PYTHONPATH', '')}")


def test_a_file_that_ends_the_process_that_reads_it_is_named_by_the_service(bundle, tmp_path, deadly):
    options = ["--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state"), "--workers", "1"]
    command = [sys.executable, "-c", "from cli.main import main; main()", "serve", str(bundle), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 2
    assert "query_encoder.onnx: ends the process (SIGSEGV) that reads it; export the run again" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_sound_bundle_passes_and_a_malformed_one_is_refused_in_a_process_of_its_own(bundle):
    vet(bundle)
    content = bytearray((bundle / "items.arrow").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (bundle / "items.arrow").write_bytes(content)
    seal_again(bundle)
    with pytest.raises(BundleError, match=r"items\.arrow: Arrow cannot read it"):
        vet(bundle)


@pytest.mark.parametrize("kind", ["float_data", "int64_data"])
def test_weights_that_are_written_as_numbers_are_taken_too(bundle, kind):
    from serving.bundle.graph_file import check_graph

    model = onnx.load_model_from_string((bundle / "query_encoder.onnx").read_bytes())
    dtype = TensorProto.FLOAT if kind == "float_data" else TensorProto.INT64
    model.graph.initializer.append(helper.make_tensor("more", dtype, [2], [1, 2]))
    check_graph(model.SerializeToString(), "model")
    model.graph.initializer[-1].dims[0] = 3
    with pytest.raises(BundleError, match="other numbers than its shape says"):
        check_graph(model.SerializeToString(), "model")
