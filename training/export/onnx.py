"""Exports torch modules as ONNX graphs in single files, and measures their parity."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as _onnxruntime
import torch
from torch import Tensor, nn

from features.errors import ExportError
from features.operators import NEWEST_OPSET, OPERATORS

# Typed Any because the package has no stubs.
onnxruntime: Any = _onnxruntime

OPSET = NEWEST_OPSET
"""The first with one operator for attention."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Graph:
    """A module to export.

    Attributes:
        name: The file's name without `.onnx`.
        module: The module; its arguments are named as the graph's inputs.
        output: Name of its only output.
        axes: Input name -> one entry per axis: a name where the size is free, the size where it is fixed.
        answer: The same for the output.
        cases: Inputs to compare on; every free axis at its smallest and largest, and one with at least two of each.
    """

    name: str
    module: nn.Module
    output: str
    axes: Mapping[str, Sequence[str | int]]
    answer: Sequence[str | int]
    cases: Sequence[Arrays]


class LastHidden(nn.Module):
    """The user encoder as serving runs it: the prediction after the newest event alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, vectors: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """Maps vectors `[B, L, D]`, types `[B, L]` and lengths `[B]` to `[B, D]`."""
        last: Tensor = self.encoder.last(vectors, types, lengths)  # type: ignore[operator]
        return last


def to_onnx(graph: Graph) -> bytes:
    """Exports a graph as one file without external data.

    Raises:
        ExportError: A free axis became fixed, or the graph breaks the contract with serving.
    """
    # Axes of size 1 would be taken for constants, so the example has at least two of everything.
    example = next(
        case for case in graph.cases if all(min(array.shape) > 1 for name, array in case.items() if _free(graph, name))
    )
    module = copy.deepcopy(graph.module).eval().float().cpu()
    names = list(graph.axes)
    shapes = {
        name: {at: axis for at, axis in enumerate(axes) if isinstance(axis, str)} for name, axes in graph.axes.items()
    }
    with _quiet():
        program = torch.onnx.export(
            module,
            kwargs={name: torch.from_numpy(example[name]) for name in names},
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=[graph.output],
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    _check(graph, model)
    _strip(model)
    data: bytes = model.SerializeToString()
    return data


def parity(graph: Graph, data: bytes) -> float:
    """Measures the difference between torch and ONNX Runtime on the graph's cases.

    Returns:
        The largest difference, relative to the largest number of the output if that is above 1.

    Raises:
        ExportError: An output is not finite.
    """
    session = session_of(data)
    worst = 0.0
    for case in graph.cases:
        with torch.inference_mode():
            expected = graph.module(**{name: torch.from_numpy(array) for name, array in case.items()}).float().numpy()
        output = session.run(None, dict(case))[0]
        if not (np.isfinite(expected).all() and np.isfinite(output).all()):
            sizes = {name: list(array.shape) for name, array in case.items()}
            raise ExportError(f"{graph.name}: answers NaN or infinity at {sizes}; the training went wrong, train again")
        if output.size:
            worst = max(worst, float(np.abs(output - expected).max() / max(1.0, np.abs(expected).max())))
    return worst


def session_of(data: bytes) -> Any:
    """Opens an ONNX Runtime session on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _free(graph: Graph, name: str) -> bool:
    return any(isinstance(axis, str) for axis in graph.axes[name])


def _check(graph: Graph, model: Any) -> None:
    """Compares the exported graph with its promise: torch may fix an axis without a warning."""
    exported = {value.name: _dims(value) for value in (*model.graph.input, *model.graph.output)}
    promised = {**{name: list(axes) for name, axes in graph.axes.items()}, graph.output: list(graph.answer)}
    if exported != promised:
        raise ExportError(f"{graph.name}: exported as {exported}, promised as {promised}")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", 0) != OPSET:
        raise ExportError(f"{graph.name}: exported for the operator sets {versions}, promised {OPSET}")
    unknown = sorted({node.op_type for node in model.graph.node} - OPERATORS)
    if unknown:
        raise ExportError(f"{graph.name}: uses {unknown}, which serving refuses; see features/operators.py")
    outside = [tensor.name for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL]
    if outside:
        raise ExportError(f"{graph.name}: {outside} lie outside the file")


def _strip(model: Any) -> None:
    """Removes the exporter's notes: they name paths of this machine, so equal models would differ in their bytes."""
    for part in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]


def _dims(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes, which are about torch's internals and not about the model."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
