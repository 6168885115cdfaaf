"""Measures a GPU: whether its answers are those of a CPU, its speed, and its share of the speed of its memory.

    python -m benchmarks.gpu [--data DATA] [--bundle BUNDLE] [--rows N ...] [--device cpu]

Checks come before timings: a timing of wrong answers is none. Without a CUDA device it says "unproved: no CUDA device"
and ends with status 3; `--device cpu --rows 20000 --seconds 2` rehearses every part where there is none. The last line
is the result in JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as _onnxruntime
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.gpu_training import encoding, training
from features.bundle import open_bundle
from features.catalog import Catalog
from features.vocabulary import Vocabulary
from serving.bundle.device_scan import LINES, DeviceScan, Form, ScanResult
from serving.bundle.model import Model
from serving.bundle.vector_index import Index
from training.export.index import build

UNPROVED = 3
"""Exit status if there is no CUDA device."""
ROWS = (10_000_000, 100_000_000)
DIM = 64
K = 100
BATCHES = (1, 8, 64)
FORMS: tuple[Form, ...] = ("float32", "bfloat16")
_CHUNK = 1 << 20
_SAME = 1e-5
_NOW = 1_700_000_000_000

onnxruntime: Any = _onnxruntime


def main(arguments: Sequence[str]) -> int:
    """Runs every part; returns the exit status: 0, 1 if a check failed, or `UNPROVED`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--data", type=Path, help="canonical tables to train on; else drawn in MovieLens's shape")
    parser.add_argument("--bundle", type=Path, help="bundle whose models ONNX Runtime runs on the GPU")
    parser.add_argument("--seconds", type=float, default=15.0, help="longest time of each rate of training")
    parser.add_argument("--epochs", type=int, default=0, help="epochs of the training to quality; 0: as configured")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("unproved: no CUDA device", file=sys.stderr)
        return UNPROVED
    began = time.monotonic()
    device = torch.device(options.device)
    result: dict[str, Any] = {"gpu": circumstances(device), "copy_gb_s": round(copy_rate(device), 1)}
    steps: dict[str, Callable[[], Any]] = {
        "answers": lambda: answers(device),
        "retrieval": lambda: [retrieval(device, rows) for rows in options.rows],
        "models": lambda: models(options.device, options.bundle),
        "encoding": lambda: encoding(device),
        "training": lambda: training(device, options.data, options.seconds, options.epochs),
    }
    for name, step in steps.items():
        started = time.monotonic()
        result[name] = step()
        seconds = time.monotonic() - started
        print(f"{name}, {seconds:.1f} s: {json.dumps(result[name])}", file=sys.stderr, flush=True)
    for scans in result["retrieval"]:
        for timing in scans["timings"]:
            timing["of_copy"] = round(timing["gb_s"] / result["copy_gb_s"], 3)
            timing["scan_of_copy"] = round(timing["scan_gb_s"] / result["copy_gb_s"], 3)
    # In the end, so that a run with faults still prints all its figures.
    result["faults"] = [fault for fault in _faults(result) if fault]
    result["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result))
    return 1 if result["faults"] else 0


def circumstances(device: torch.device) -> dict[str, Any]:
    """Returns the device, its memory and the versions of its software."""
    if device.type != "cuda":
        return {"name": "none, a rehearsal on the CPU", "torch": torch.__version__}
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def copy_rate(device: torch.device) -> float:
    """Returns the bytes read and written a second by a copy within the device's memory, in GB."""
    # Large against every cache, or the speed of a cache would be the limit that searches are compared with.
    size = 1 << (31 if device.type == "cuda" else 24)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2e-9 * size / milliseconds(device, lambda: target.copy_(source)) * 1e3


def milliseconds(device: torch.device, work: Callable[[], Any], rounds: int = 20) -> float:
    """Returns the median time of some work, by the device's own clock."""
    # The first rounds compile kernels and allocate memory.
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        # The device's events do not count the time in which the CPU launches the work.
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            work()
            times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


def answers(device: torch.device, rows: int = 100_000, queries: int = 64) -> dict[str, int]:
    """Compares answers of `Index` on the device with those on the CPU, to the bit, for any share of allowed rows.

    Returns:
        `compared`, `different`, and `control`: the number that differ if the device holds another vector for the best
        row of each query, which must be all (`control_of`).
    """
    rng = np.random.default_rng(3)
    vectors = _vectors(rng, rows)
    ids = [f"i{row}" for row in range(rows)]
    catalog = Catalog(pa.table({"item_id": ids}), Vocabulary.build(ids), vectors)
    data = build(vectors[:rows], _vectors(rng, 20), 0.98, exact_up_to=rows).data
    on_cpu, on_device = Index(data, catalog), _on(device, data, catalog, vectors)
    # Items that are put live are scanned by the CPU and merged: both ways must agree on them too.
    catalog.put([{"item_id": f"new{number}"} for number in range(50)], _vectors(rng, 50), _NOW)
    queried = _vectors(rng, queries)
    compared = different = 0
    for share in (None, 0.5, 0.05, 0.03, 0.001):
        mask = rng.random(catalog.size) < (share or 1.0)
        allowed = None if share is None else np.packbits(mask, bitorder="little")
        for k in (1, 10, K):
            expected, answer = on_cpu.search(queried, k, allowed), on_device.search(queried, k, allowed)
            compared += queries
            different += _different(expected, answer)
    # The control: a comparison that cannot fail proves nothing.
    spoiled = vectors[:rows].copy()
    spoiled[on_cpu.search(queried, 1)[0][:, 0] % rows] = 0
    control = _different(on_cpu.search(queried, K), _on(device, data, catalog, spoiled).search(queried, K))
    return {"compared": compared, "different": different, "control": control, "control_of": queries}


def _on(device: torch.device, data: bytes, catalog: Catalog, vectors: npt.NDArray[np.float32]) -> Index:
    """Returns an index whose device holds `vectors`; scanned in bf16, which rounds and so has more to prove."""
    index = Index(data, catalog, "cpu")
    index._device_scan = DeviceScan(vectors[: catalog.base_size], device, "bfloat16")
    return index


def _different(expected: tuple[Any, Any], answer: tuple[Any, Any]) -> int:
    equal = (expected[0] == answer[0]).all(1) & (expected[1] == answer[1]).all(1)
    return int((~equal).sum())


def _vectors(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    # Vectors of several lengths: with equal ones a wrong norm would not show.
    lengths = np.exp(rng.normal(0, 0.2, (count, 1)))
    vectors: npt.NDArray[np.float32] = (rng.normal(size=(count, DIM)) * lengths).astype(np.float32)
    return vectors


def retrieval(device: torch.device, rows: int) -> dict[str, Any]:
    """Checks searches against all scores in float64 and times them, over random vectors of many lengths.

    Returns:
        `rows`, `checks` [{form, masked, wrong, unproven, apart, same_rows}] and `timings` [{form, batch, ms, scan_ms,
        gb_s, scan_gb_s, queries_per_second, served_ms}]: of the whole search, of its first pass alone, and with queries
        and a bitmap that come from the CPU and rows that go there.
    """
    generator = torch.Generator(device).manual_seed(1)
    vectors = torch.empty(rows, DIM, device=device)
    for part in vectors.split(_CHUNK):  # type: ignore[no-untyped-call]
        part.normal_(generator=generator)
        part *= torch.exp(0.2 * torch.randn(len(part), 1, device=device, generator=generator))
    queries = torch.randn(LINES, DIM, device=device, generator=generator)
    bits = np.random.default_rng(2).integers(0, 256, -(-rows // 8), dtype=np.uint8)
    checks, timings = [], []
    for form in FORMS:
        scan = DeviceScan(vectors, device, form)
        for allowed in (None, bits):
            on_device = scan.bitmap(allowed)
            matches = scan.search(queries[:8], K, on_device)
            differs = _check(vectors, queries[:8], on_device, matches)
            checks.append({"form": form, "masked": allowed is not None, **differs})
        timings += [_timed(scan, queries[:batch], bits) for batch in BATCHES]
        # The memory of two scans of 100 million rows is more than the device has.
        del scan
    return {"rows": rows, "dim": DIM, "k": K, "checks": checks, "timings": timings}


def _timed(scan: DeviceScan, queries: Tensor, bits: npt.NDArray[np.uint8]) -> dict[str, Any]:
    device, on_cpu = scan.device, queries.cpu().numpy()
    whole = milliseconds(device, lambda: scan.search(queries, K))
    first = milliseconds(device, _recorded(device, lambda: scan.first_pass(queries)))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        scan.propose(on_cpu, K, bits)
        times.append((time.perf_counter() - started) * 1e3)
    size = len(scan) * scan.bytes_per_row
    return {
        "form": scan.form,
        "batch": len(queries),
        "ms": round(whole, 4),
        "scan_ms": round(first, 4),
        "gb_s": round(size / whole / 1e6, 1),
        "scan_gb_s": round(size / first / 1e6, 1),
        "queries_per_second": round(len(queries) / whole * 1e3),
        "served_ms": round(float(np.median(times)), 3),
    }


def _recorded(device: torch.device, work: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the work without the time that the CPU takes to launch it, as a search runs it on a GPU."""
    if device.type != "cuda":
        return work
    work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _check(vectors: Tensor, queries: Tensor, bits: Tensor | None, matches: ScanResult) -> dict[str, Any]:
    """Counts the rows that differ from the truth by more than rounding: a right row's true score is among the best."""
    scores, rows = _truth(vectors, queries, bits)
    margin = _SAME * scores.abs().amax(1, keepdim=True)
    true_scores = (vectors[matches.rows].double() * queries.double().unsqueeze(1)).sum(2)
    wrong = (true_scores < scores[:, -1:] - margin).sum() + (matches.rows.sort(1).values.diff(dim=1) == 0).sum()
    if bits is not None:
        wrong = wrong + (~_set(matches.rows, bits)).sum()
    return {
        "wrong": int(wrong),
        "unproven": int((~matches.proven).sum()),
        "apart": float((matches.scores.double() - true_scores).abs().max()),
        "same_rows": float((rows.sort(1).values == matches.rows.sort(1).values).float().mean()),
    }


def _truth(vectors: Tensor, queries: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the best `K` scores in float64 and their rows."""
    # In chunks, because 100 million vectors in float64 do not fit next to the ones in float32.
    scores, rows = [], []
    for at in range(0, len(vectors), _CHUNK):
        part = queries.double() @ vectors[at : at + _CHUNK].double().T
        if bits is not None:
            part[:, ~_set(torch.arange(at, at + part.shape[1], device=bits.device), bits)] = -torch.inf
        best, place = part.topk(min(K, part.shape[1]), 1)
        scores.append(best)
        rows.append(place + at)
    best, place = torch.cat(scores, 1).topk(K, 1)
    return best, torch.cat(rows, 1).gather(1, place)


def _set(rows: Tensor, bits: Tensor) -> Tensor:
    return (bits[rows // 8] >> (rows % 8).to(torch.uint8)) & 1 != 0


def models(device: str, path: Path | None) -> dict[str, Any]:
    """Runs the user encoder and the ranker by ONNX Runtime on the GPU and on the CPU.

    Returns:
        `unproved` and the reason if ONNX Runtime has no CUDA provider, or no bundle is given; else `apart` (the largest
        difference) and `us` (microseconds, on both devices), each {model: figure}.
    """
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return {"unproved": f"onnxruntime {onnxruntime.__version__} has no CUDA provider"}
    if path is None:
        return {"unproved": "no --bundle is given"}
    bundle = open_bundle(path)
    cpu, gpu = Model(bundle, "cpu"), Model(bundle, "cuda" if device == "cuda" else "cpu")
    rng = np.random.default_rng(4)
    items = rng.normal(size=(500, cpu.dim)).astype(np.float32)
    types = np.ones(cpu.max_length, np.int64)
    width = int(cpu._ranker.get_inputs()[2].shape[1])
    features = rng.normal(size=(500, width)).astype(np.float32)
    work: dict[str, Callable[[Model], npt.NDArray[np.float32]]] = {
        "user_encoder": lambda model: model.encode_user(items[: cpu.max_length], types),
        "ranker": lambda model: model.rank(items[0], items, features),
    }
    apart = {name: float(np.abs(ask(cpu) - ask(gpu)).max()) for name, ask in work.items()}
    host = torch.device("cpu")
    by_device = {"cpu": cpu, device: gpu}
    us = {
        f"{name}, {place}": round(1e3 * milliseconds(host, functools.partial(ask, model)), 1)
        for name, ask in work.items()
        for place, model in by_device.items()
    }
    return {"apart": apart, "us": us}


def _faults(result: dict[str, Any]) -> list[str]:
    """Returns the faults of a result."""
    counts = result["answers"]
    faults = [f"{counts['different']} of {counts['compared']} answers differ from the CPU's"] * bool(
        counts["different"]
    )
    if counts["control"] < counts["control_of"]:
        faults.append(f"control: {counts['control']} of {counts['control_of']} spoiled answers were noticed")
    for scans in result["retrieval"]:
        faults += [f"{scans['rows']} rows: {check}" for check in scans["checks"] if check["wrong"] or check["unproven"]]
    if any(apart > 1e-3 for apart in result["models"].get("apart", {}).values()):
        faults.append(f"models on the GPU are {result['models']['apart']} away from the CPU's")
    return [*faults, *result["encoding"]["faults"], *result["training"]["faults"]]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
