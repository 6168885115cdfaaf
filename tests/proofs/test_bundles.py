"""The quick version of `tests.proofs.bundles`, and what a service and its workers make of hostile bundles."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from features.bundle import open_bundle
from features.errors import BundleError
from features.vocabulary import Vocabulary
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


def test_what_is_shared_is_sealed_and_what_is_served_is_what_was_hashed(bundle):
    opened = open_bundle(bundle)
    handle = opened.seal("vocabulary.arrow")
    try:
        shared = open_bundle(bundle, sealed={"vocabulary.arrow": handle})
        vocabulary = Vocabulary.read(shared.view("vocabulary.arrow"), "shared")
        alone = Vocabulary.read(opened.view("vocabulary.arrow"), "alone")
        names = vocabulary.ids(np.arange(len(vocabulary)))
        for change in (lambda: os.pwrite(handle, b"x", 100), lambda: os.ftruncate(handle, 10)):
            with pytest.raises(PermissionError):
                change()
        # In place, and to nothing at all: a mapped file would answer with this, or end the process.
        with (bundle / "vocabulary.arrow").open("r+b") as file:
            file.write(bytes(3000))
            file.truncate(100)
        assert vocabulary.ids(np.arange(len(vocabulary))) == alone.ids(np.arange(len(alone))) == names
        assert vocabulary.rows(names).tolist() == list(range(len(names)))
    finally:
        os.close(handle)


def test_memory_that_is_not_sealed_or_holds_other_bytes_is_refused(bundle):
    size = (bundle / "vocabulary.arrow").stat().st_size
    handle = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(handle, size)
    with pytest.raises(BundleError, match="not sealed"):
        open_bundle(bundle, sealed={"vocabulary.arrow": handle}).view("vocabulary.arrow")
    os.close(handle)
    opened = open_bundle(bundle)
    other = opened.seal("vectors.npy")
    with pytest.raises(BundleError, match=r"not sealed|changed while"):
        open_bundle(bundle, sealed={"vocabulary.arrow": other}).view("vocabulary.arrow")
    os.close(other)


DEADLY = """
import os, signal, sys
opened = 0

def watch(event, arguments):
    global opened
    if event == "open" and str(arguments[0]).endswith("query_encoder.onnx"):
        opened += 1
        if opened == 2:  # once it was hashed, it is read to be parsed
            os.kill(os.getpid(), signal.SIGSEGV)

sys.addaudithook(watch)
"""
"""Plants a fault into every Python process that has it on its path: the query encoder ends who parses it."""


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(DEADLY)
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


def test_the_seal_is_of_the_file(bundle):
    opened = open_bundle(bundle)
    handle = opened.seal("index.faiss")
    content = os.pread(handle, 1 << 20, 0)
    os.close(handle)
    assert hashlib.sha256(content).hexdigest() == opened.manifest.files["index.faiss"].sha256
