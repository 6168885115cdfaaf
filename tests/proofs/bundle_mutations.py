"""Hostile hands on a bundle: each mutation changes one thing of a copy, by a seed."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from features.bundle import FILES, MANIFEST

Rng = np.random.Generator
Mutation = Callable[[Path, Rng], str]
"""Changes the bundle in a directory; returns the name of what it changed, and how."""

_ARRAYS = tuple(name for name in FILES if name.endswith(".npy"))
_TABLES = tuple(name for name in FILES if name.endswith(".arrow"))
_GRAPHS = tuple(name for name in FILES if name.endswith(".onnx"))
_WORDS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 0x7FF8000000000000, 0x7F800000)
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 1e30, 0.5, "", "x", "../../etc/passwd", "/etc/passwd", [], {},
    [None], [[]], {"a": 1}, "\x00", ["a", "a"], -(2**63),
)  # fmt: skip
_DOCUMENTS = (
    b"", b"null", b"[]", b"{", b"{}", b"\xff\xfe", b'{"format": NaN}', b"[" * 200_000, b'{"a":' * 100_000,
    b"9" * 100_000,
    b'{"format": 1, "format": 1}', b'{"format": 1e999}', b'"\\ud800"', b'{"format": true}', b"\xef\xbb\xbf{}",
)  # fmt: skip


def seal_again(bundle: Path) -> None:
    """Recomputes sizes, hashes and the id, as far as the manifest can still be read: so would an attacker."""
    if not (bundle / MANIFEST).is_file():  # a pipe or a device has no end
        return
    try:
        manifest = json.loads((bundle / MANIFEST).read_bytes())
        for name in FILES:
            file = bundle / name
            if file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 28:
                content = file.read_bytes()
                manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        hashes = {name: manifest["files"][name]["sha256"] for name in sorted(manifest["files"])}
        keys = ("model", "configuration", "feature_set", "data_fingerprint", "catalog_version")
        content = {"files": hashes, **{key: manifest.get(key) for key in keys}}
        manifest["bundle_id"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        (bundle / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        return


def flip_bits(bundle: Path, rng: Rng) -> str:
    path = bundle / str(rng.choice((*FILES, MANIFEST)))
    content = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 9))):
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return f"{path.name} bits"


def write_word(bundle: Path, rng: Rng) -> str:
    """Puts a hostile number where an offset, a length or a size may stand: most often near the beginning or end."""
    path = bundle / str(rng.choice(FILES))
    content = bytearray(path.read_bytes())
    size = int(rng.choice((4, 8)))
    near = min(len(content), 1024)
    place = int(rng.choice((rng.integers(near), len(content) - 1 - rng.integers(near), rng.integers(len(content)))))
    place -= place % 4
    word = struct.pack("<q", int(rng.choice(np.array(_WORDS[:8], object))) if rng.random() < 0.8 else _WORDS[-2])
    content[place : place + size] = word[:size]
    path.write_bytes(content[: path.stat().st_size])
    return f"{path.name} word"


def resize(bundle: Path, rng: Rng) -> str:
    path = bundle / str(rng.choice((*FILES, MANIFEST)))
    content = path.read_bytes()
    cut = int(rng.integers(len(content)))
    how = int(rng.integers(4))
    path.write_bytes((content[:cut], b"", content + bytes(cut), content[cut:])[how])
    return f"{path.name} size"


def exchange(bundle: Path, rng: Rng) -> str:
    first, second = (bundle / str(name) for name in rng.choice(FILES, 2, replace=False))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return f"{first.name} exchanged"


def document(bundle: Path, rng: Rng) -> str:
    path = bundle / str(rng.choice((MANIFEST, "golden.json")))
    path.write_bytes(_DOCUMENTS[int(rng.integers(len(_DOCUMENTS)))])
    return f"{path.name} document"


def json_value(bundle: Path, rng: Rng) -> str:
    """Another value, another type, no value, or a key twice, anywhere in a document."""
    path = bundle / str(rng.choice((MANIFEST, MANIFEST, "golden.json")))
    whole = json.loads(path.read_text())
    place, key = _somewhere(whole, rng)
    how = rng.random()
    if how < 0.15:
        del place[key]
    elif how < 0.3:
        place[key] = [copy.deepcopy(place[key])]
    else:
        place[key] = _VALUES[int(rng.integers(len(_VALUES)))]
    text = json.dumps(whole, indent=1, sort_keys=True)
    if how > 0.95:
        text = text.replace("{", '{"format": 1, ', 1)
    elif how > 0.9:
        text = text.replace(": 0", ": NaN", 1).replace(": 1", ": Infinity", 1)
    path.write_text(text)
    return f"{path.name} {key if isinstance(key, str) else 'entry'}"


def _somewhere(document: Any, rng: Rng) -> tuple[Any, Any]:
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            return place, key
        place = place[key]


def node(bundle: Path, rng: Rng) -> str:
    """Something that is no plain file, or a file too many, or too few."""
    path = bundle / str(rng.choice((*FILES, MANIFEST)))
    outside = bundle.parent / "outside"
    how = str(rng.choice(("link", "hard", "pipe", "folder", "zero", "socket", "holes", "gone", "extra", "loop", "tty")))
    if how not in ("hard", "extra"):
        content = path.read_bytes()
        path.unlink()
    if how == "link":
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif how == "hard":
        os.link(path, outside)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how in ("zero", "tty"):
        path.symlink_to("/dev/zero" if how == "zero" else "/dev/tty")
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            folder = os.open(bundle, os.O_RDONLY)
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
    elif how == "holes":
        with path.open("wb") as sink:
            sink.truncate(1 << int(rng.integers(27, 43)))
    elif how == "extra":
        (bundle / str(rng.choice(("weights.bin", ".hidden", "..data", "\udcff")))).write_bytes(b"")
    elif how == "loop":
        path.symlink_to(path.name)
    return f"{path.name} {how}"


def array_header(bundle: Path, rng: Rng) -> str:
    path = bundle / str(rng.choice(_ARRAYS))
    array = np.load(path)
    how, sink = int(rng.integers(7)), io.BytesIO()
    if how == 0:
        np.save(sink, np.array([{"a": 1}], object), allow_pickle=True)
    elif how == 1:
        np.save(sink, array.astype(str(rng.choice(("f8", ">f4", "i8", "u1", "c8", "f2")))))
    elif how == 2:
        np.save(sink, array[:-1])
    elif how == 3:
        np.save(sink, np.asfortranarray(array.reshape(2, -1)) if array.size % 2 == 0 else array[None])
    elif how == 4:
        np.savez(sink, array)
    else:
        np.save(sink, array)
        content = sink.getvalue()
        old = (b"'shape': (", b"'descr': '")[how - 5]
        new = (b"'shape': (9", b"'descr': '<O")[how - 5]
        sink = io.BytesIO(content.replace(old, new, 1))
    path.write_bytes(sink.getvalue())
    return f"{path.name} header {how}"


def array_number(bundle: Path, rng: Rng) -> str:
    """One number that no export writes, among sound ones."""
    path = bundle / str(rng.choice(_ARRAYS))
    array = np.load(path)
    hostile = (np.nan, np.inf, -np.inf) if array.dtype.kind == "f" else (-2, 2**31 - 1, -(2**31), len(array) + 10**6)
    value = hostile[int(rng.integers(len(hostile)))]
    array.flat[int(rng.integers(array.size))] = np.array(value).astype(array.dtype)
    np.save(path, array)
    return f"{path.name} number"


def table(bundle: Path, rng: Rng) -> str:
    """A well-formed Arrow file that says other things than the right one."""
    path = bundle / str(rng.choice(_TABLES))
    whole = pa.ipc.open_file(path.read_bytes()).read_all()
    at = int(rng.integers(whole.num_columns))
    name, column = whole.schema.names[at], whole.column(at)
    how = int(rng.integers(9))
    options = None
    if how == 0:
        whole = whole.set_column(at, name, column.take(pa.array(rng.permutation(len(column)))))
    elif how == 1:
        whole = whole.set_column(at, name, pa.nulls(len(column), column.type))
    elif how == 2:
        whole = whole.set_column(at, name, pa.array([["x"]] * len(column)))
    elif how == 3:
        whole = whole.drop_columns([name])
    elif how == 4:
        whole = whole.append_column(name, column)
    elif how == 5:
        whole = whole.slice(1)
    elif how == 6:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
    elif how == 7:
        whole = whole.set_column(at, name, column.take(pa.array(np.zeros(len(column), np.int64))))
    else:
        number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        bad = pa.array([2**31 - 1 if number else None] * len(column)).cast(column.type, safe=False) if number else None
        whole = whole.set_column(at, name, bad if bad is not None else pa.nulls(len(column)))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema, options=options) as writer:
        writer.write_table(whole)
    return f"{path.name} {name} {how}"


def offset(bundle: Path, rng: Rng) -> str:
    """One offset of a column of text or lists points outside; nothing notices before it is used."""
    path = bundle / str(rng.choice(_TABLES))
    content = bytearray(path.read_bytes())
    whole = pa.ipc.open_file(pa.py_buffer(bytes(content))).read_all()
    names = [field.name for field in whole.schema if pa.types.is_string(field.type) or pa.types.is_list(field.type)]
    name = str(rng.choice(names))
    raw = whole.column(name).chunk(0).buffers()[1].to_pybytes()
    start = bytes(content).find(raw)
    place = start + 4 * int(rng.integers(1, max(2, len(raw) // 4)))
    content[place : place + 4] = struct.pack("<i", int(rng.choice((2**31 - 1, -1, -(2**31), 1 << 24))))
    path.write_bytes(content)
    return f"{path.name} offset"


def graph(bundle: Path, rng: Rng) -> str:
    path = bundle / str(rng.choice(_GRAPHS))
    model = onnx.load_model_from_string(path.read_bytes())
    how = int(rng.integers(10))
    tensors = model.graph.initializer
    tensor = tensors[int(rng.integers(len(tensors)))] if tensors else TensorProto()
    numbers = np.array(numpy_helper.to_array(tensor)) if tensors else np.zeros(1)
    if how == 0:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")
    elif how == 1:
        model.graph.node[int(rng.integers(len(model.graph.node)))].domain = "com.microsoft"
    elif how == 2:
        model.graph.node[int(rng.integers(len(model.graph.node)))].op_type = str(
            rng.choice(("Loop", "RandomNormal", "If", "StringConcat", "Mod", "NonMaxSuppression", "Relu"))
        )
    elif how == 3:
        tensor.dims[:] = [int(rng.choice((2**40, -1, 0, 2**62))), 2]
    elif how == 4:
        del model.graph.node[int(rng.integers(len(model.graph.node)))]
    elif how == 5:
        numbers.flat[0] = np.nan if numbers.dtype.kind == "f" else -(2**62)
    elif how == 6:
        numbers = np.zeros_like(numbers)
    elif how == 7:
        model.functions.add(name="Add", domain="")
    elif how == 8:
        body = model.graph.input[int(rng.integers(len(model.graph.input)))]
        body.type.tensor_type.elem_type = int(rng.choice((TensorProto.DOUBLE, TensorProto.STRING, 99)))
    else:
        model.graph.node.append(helper.make_node("Identity", ["missing"], ["more"]))
    if how in (5, 6) and tensors:
        tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    path.write_bytes(model.SerializeToString())
    return f"{path.name} graph {how}"


def weight(bundle: Path, rng: Rng) -> str:
    """A weight as another training might have given: the golden answers say whether it may be served."""
    path = bundle / str(rng.choice(_GRAPHS))
    model = onnx.load_model_from_string(path.read_bytes())
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    tensor = floats[int(rng.integers(len(floats)))] if floats else None
    if tensor is None:
        return write_word(bundle, rng)
    numbers = np.array(numpy_helper.to_array(tensor))
    numbers.flat[int(rng.integers(numbers.size))] += float(rng.choice((1e-9, 1e-3, 1.0, 1e6)))
    tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    path.write_bytes(model.SerializeToString())
    return f"{path.name} weight"


def index(bundle: Path, rng: Rng) -> str:
    """An index of another kind, of other vectors, or with a header that lies."""
    vectors = np.load(bundle / "vectors.npy")
    count, dim = vectors.shape
    how = int(rng.integers(6))
    made: Any
    if how == 0:
        made = faiss.IndexFlatL2(dim)
    elif how == 1:
        made = faiss.IndexHNSWFlat(dim, 4)
    elif how == 2:
        made = faiss.IndexIDMap(faiss.IndexFlatIP(dim))
    else:
        made = faiss.IndexFlatIP(dim)
    if how == 2:
        made.add_with_ids(vectors, np.arange(count) + 2**40)
    else:
        made.add(np.roll(vectors, 1, axis=0) if how == 3 else vectors[: count - (how == 4)])
    content = bytearray(faiss.serialize_index(made).tobytes())
    if how == 5:
        place = int(rng.choice((4, 8, 16, 24, 32, 33, 37)))
        content[place : place + 4] = struct.pack("<i", int(rng.choice((0, -1, 2**31 - 1, dim + 1))))
    (bundle / "index.faiss").write_bytes(content)
    return f"index.faiss kind {how}"


def in_lists(bundle: Path, rng: Rng) -> str:
    """A number of an index in lists, which has more of them that can lie."""
    vectors = np.load(bundle / "vectors.npy")
    kind = str(rng.choice(("IVF4,Flat", "IVF4,SQ8")))
    made = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    made.train(vectors)
    made.add(vectors)
    made.nprobe = 4
    content = bytearray(faiss.serialize_index(made).tobytes())
    place = int(rng.integers(0, len(content) - 8))
    content[place : place + 8] = struct.pack("<q", int(rng.choice((0, -1, 2**31 - 1, 2**62, 2**33))))
    (bundle / "index.faiss").write_bytes(content)
    return "index.faiss lists"


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, write_word, resize, exchange, document, json_value, json_value, node, array_header, array_number, table,
    offset, graph, graph, weight, index, in_lists,
)  # fmt: skip
