"""Checks an ONNX file before ONNX Runtime reads it: it may hold little, and all of it is looked at.

The messages are declared here with the fields that are looked at. A message with others is refused, so nothing that
ONNX Runtime would act on is passed over. Field numbers are those of `onnx.proto`, which never change.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from features.errors import BundleError
from features.operators import NEWEST_OPSET, OPERATORS

_PACKAGE = "penchant.onnx"
_DTYPES = {1: "<f4", 6: "<i4", 7: "<i8", 9: "|b1", 10: "<f2", 11: "<f8"}
_TYPED = {1: "float_data", 6: "int32_data", 7: "int64_data", 9: "int32_data", 11: "double_data"}
_NEWEST_IR = 11
_MOST = 100_000
"""Nodes, tensors or names of a graph."""

# Name, number, type of each field; a type in capitals is a message of these.
_MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "Model": [
        ("ir_version", 1, "int64"), ("producer_name", 2, "string"), ("producer_version", 3, "string"),
        ("domain", 4, "string"), ("model_version", 5, "int64"), ("doc_string", 6, "string"), ("graph", 7, "Graph"),
        ("opset_import", 8, "*Opset"), ("metadata_props", 14, "*Entry"),
    ],
    "Opset": [("domain", 1, "string"), ("version", 2, "int64")],
    "Entry": [("key", 1, "string"), ("value", 2, "string")],
    "Graph": [
        ("node", 1, "*Node"), ("name", 2, "string"), ("initializer", 5, "*Tensor"), ("doc_string", 10, "string"),
        ("input", 11, "*Value"), ("output", 12, "*Value"), ("value_info", 13, "*Value"),
        ("metadata_props", 16, "*Entry"),
    ],
    "Node": [
        ("input", 1, "*string"), ("output", 2, "*string"), ("name", 3, "string"), ("op_type", 4, "string"),
        ("attribute", 5, "*Attribute"), ("doc_string", 6, "string"), ("domain", 7, "string"),
        ("overload", 8, "string"), ("metadata_props", 9, "*Entry"),
    ],
    "Attribute": [
        ("name", 1, "string"), ("f", 2, "float"), ("i", 3, "int64"), ("s", 4, "bytes"), ("t", 5, "Tensor"),
        ("floats", 7, "*float"), ("ints", 8, "*int64"), ("strings", 9, "*bytes"), ("doc_string", 13, "string"),
        ("type", 20, "int32"),
    ],
    "Tensor": [
        ("dims", 1, "*int64"), ("data_type", 2, "int32"), ("float_data", 4, "*float"), ("int32_data", 5, "*int32"),
        ("int64_data", 7, "*int64"), ("name", 8, "string"), ("raw_data", 9, "bytes"), ("double_data", 10, "*double"),
        ("doc_string", 12, "string"), ("metadata_props", 16, "*Entry"),
    ],
    "Value": [("name", 1, "string"), ("type", 2, "Type"), ("doc_string", 3, "string"), ("metadata_props", 4, "*Entry")],
    "Type": [("tensor_type", 1, "TensorType"), ("denotation", 6, "string")],
    "TensorType": [("elem_type", 1, "int32"), ("shape", 2, "Shape")],
    "Shape": [("dim", 1, "*Dim")],
    "Dim": [("dim_value", 1, "int64"), ("dim_param", 2, "string"), ("denotation", 3, "string")],
}  # fmt: skip


def check_graph(content: bytes, path: str) -> None:
    """Refuses a model that is not a plain graph of known operators with whole, finite weights.

    Args:
        content: The file.
        path: Its path, for messages.

    Raises:
        BundleError: It is malformed, or has a part that no export writes.
    """
    model = _MODEL()
    try:
        model.ParseFromString(content)
        _check_model(model)
    except DecodeError as error:
        raise BundleError(f"{path}: no ONNX model ({error}); export the run again") from error
    except ValueError as error:
        raise BundleError(f"{path}: {error}; export the run again") from error


def _check_model(model: Any) -> None:
    _require_known(model, "the model")
    if not 1 <= model.ir_version <= _NEWEST_IR:
        raise ValueError(f"is of ONNX version {model.ir_version}, this version reads up to {_NEWEST_IR}")
    # Without a domain: operators of other domains are code of their own, which this check does not know.
    opsets = {(opset.domain, opset.version) for opset in model.opset_import}
    if len(opsets) != 1 or not all(domain == "" and 1 <= version <= NEWEST_OPSET for domain, version in opsets):
        raise ValueError(f"asks for the operator sets {sorted(opsets)}, allowed is one up to {NEWEST_OPSET}")
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.initializer)]
    for node in graph.node:
        # In the order of the file: a value that a later node computes would be a cycle.
        _check_node(node, set(names))
        names += [name for name in node.output if name]
    if len(set(names)) != len(names) or "" in names or len(names) > _MOST:
        raise ValueError("its graph names a value twice, or not at all, or has too many")
    if not {value.name for value in graph.output} <= set(names):
        raise ValueError("its graph does not compute its output")
    for tensor in graph.initializer:
        _check_tensor(tensor)


def _check_node(node: Any, values: set[str]) -> None:
    operator = node.op_type[:80]
    if node.domain or node.overload or node.op_type not in OPERATORS:
        raise ValueError(f"uses the operator {operator!r} of {node.domain[:80]!r}, which no model of a bundle needs")
    if unknown := [name for name in node.input if name and name not in values]:
        raise ValueError(f"feeds {operator} with {unknown[0][:80]!r}, which nothing before it computes")
    for attribute in node.attribute:
        if not all(map(math.isfinite, (attribute.f, *attribute.floats))):
            raise ValueError(f"gives {operator} an attribute that is not finite")
        if attribute.HasField("t"):
            _check_tensor(attribute.t)


def _check_tensor(tensor: Any) -> None:
    name, dtype = tensor.name[:80], _DTYPES.get(tensor.data_type)
    if dtype is None:
        raise ValueError(f"the tensor {name!r} is of type {tensor.data_type}, which no model of a bundle needs")
    count = math.prod(tensor.dims)
    # In C the product of huge sizes can wrap around to a small number, for which there would be memory.
    if any(not 0 <= size <= _LARGEST for size in tensor.dims) or len(tensor.dims) > _AXES:
        raise ValueError(f"the tensor {name!r} has the shape {list(tensor.dims)[:_AXES]}")
    typed = {field: len(getattr(tensor, field)) for field in set(_TYPED.values())}
    if tensor.HasField("raw_data"):
        size = np.dtype(dtype).itemsize * count
        if len(tensor.raw_data) != size or any(typed.values()):
            raise ValueError(f"the tensor {name!r} has {len(tensor.raw_data)} bytes instead of {size}")
        numbers = np.frombuffer(tensor.raw_data, dtype)
    else:
        field = _TYPED.get(tensor.data_type, "")
        if typed.pop(field, 0) != count or any(typed.values()):
            raise ValueError(f"the tensor {name!r} has other numbers than its shape says")
        numbers = np.array(getattr(tensor, field)) if field else np.empty(0)
    # Infinity is a number that a mask needs; the answers to the golden requests are finite all the same.
    if numbers.dtype.kind == "f" and np.isnan(numbers).any():
        raise ValueError(f"the tensor {name!r} holds NaN")
    if numbers.dtype.kind == "b" and (numbers.view(np.uint8) > 1).any():
        raise ValueError(f"the tensor {name!r} holds a truth value that is neither 0 nor 1")


def _require_known(message: Any, name: str) -> None:
    """Refuses a message that holds a field which is not declared here, however deep."""
    if len(UnknownFieldSet(message)):
        raise ValueError(f"{name} holds field {UnknownFieldSet(message)[0].field_number}, which no export writes")
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if field.is_repeated else (value,):
                _require_known(part, field.name)


def _declared() -> Any:
    # Not taken from the onnx package, which knows fields such as external files that no bundle may have.
    file = descriptor_pb2.FileDescriptorProto(name="penchant/onnx.proto", package=_PACKAGE, syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            added = message.field.add(name=field, number=number, label=label)
            if kind in _MESSAGES:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


_AXES = 8
_LARGEST = 1 << 40
_MODEL = _declared()
