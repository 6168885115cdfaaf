"""A bundle that another hand changed is refused by name, or answers as sound bundles do: it never ends a process.

    python -m tests.proofs.bundles --count 2000 --seed 1

Each mutated bundle is opened in a process of its own as a worker of `penchant serve` opens it, with a limit of time,
and asked by every method where it is accepted. Most have hashes and id recomputed. What may be accepted:

- without new hashes, a bundle whose files are the original's to the byte and whose manifest says the same of all that
  is served: its answers are equal bit for bit;
- with new hashes, another bundle: its id is another one, an oracle that shares no code with the checks finds every
  number in its range, and its golden requests are answered as they say.

The control opens the same mutations with the checks switched off, and must find failures. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from features import bundle as bundles
from features.errors import PenchantError
from serving.config import ServeConfig
from serving.engine.engine import Engine, open_engine
from serving.engine.pipelines import Dependencies
from serving.errors import ServingError
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request
from serving.redis.client import connect
from serving.stores.catalog_log import CatalogProgress
from serving.stores.profiles import ProfileStore
from tests.proofs.bundle_mutations import MUTATIONS, seal_again
from tests.proofs.bundle_oracle import faults
from tests.world import publish_world

LIMIT_S = 60.0
"""Longest that a bundle may take; a sound one takes some tenths of a second."""


def digest(engine: Engine) -> str:
    """Asks for everything that reads what a bundle holds, by every method; a hash of all answers."""
    hasher = hashlib.sha256()

    def take(*answers: Any) -> None:
        for answer in answers:
            hasher.update(answer.tobytes() if isinstance(answer, np.ndarray) else repr(answer).encode())

    catalog, model, rows = engine.catalog, engine.model, np.arange(engine.catalog.size, dtype=np.int32)
    take(catalog.ids(rows), [catalog.item(int(row)) for row in rows], catalog.eligible_bitmap(10**12))
    take(*(getattr(catalog.columns, name) for name in catalog.columns.__slots__))
    for length in (1, model.max_length):
        past = rows[np.arange(length) % rows.size]
        vector = model.encode_user(catalog.columns.vectors[past], np.ones(length, np.int64))
        take(vector)
    for method, pipeline in engine.pipelines.items():
        for at, text in enumerate(("western tale", "red shoes", "story")):
            fields: dict[str, Any] = {"method": method, "text": text, "seeds": rows[at : at + 3]}
            if method == "rank":
                fields |= {"rows": rows[::-1][:20], "upstream": np.full(min(20, rows.size), math.nan, np.float32)}
            slate = pipeline.run(Request(f"{method}{at}", "u:ann", 10**12, time.monotonic() + 1000, 10, **fields))
            take(catalog.ids(slate.rows), slate.scores)
    take(engine.actions, sorted(engine.event_types.items()))
    return hasher.hexdigest()


def opened(path: Path) -> dict[str, Any]:
    """Opens a bundle as a worker does, and asks it."""
    config = ServeConfig(bundle=path, state_dir=path.parent / "state", device="cpu")
    with connect("unix:///nowhere/redis.sock") as client:
        around = Dependencies(config, ProfileStore(client), CatalogProgress(), Telemetry())
        try:
            engine = open_engine(path, around)
        except (PenchantError, ServingError) as error:
            return {"outcome": "refused", "reason": str(error)}
        return {"outcome": "accepted", "digest": digest(engine), "bundle_id": engine.bundle_id}


def in_child(work: Callable[[], dict[str, Any]], answer: Path) -> dict[str, Any]:
    """Does some work in a fork of this process, which has loaded all that it takes; what becomes of it."""
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the proof looks for
            result = {"outcome": "trace", "reason": f"{error!r:.300} {traceback.format_exc()[-600:]}"}
        answer.write_text(json.dumps(result))
        os._exit(0)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - begun
        if done:
            break
        if seconds > LIMIT_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"outcome": "hang", "reason": f"more than {LIMIT_S} s", "seconds": seconds}
        time.sleep(0.002)
    if status:
        return {"outcome": "crash", "reason": f"status {os.waitstatus_to_exitcode(status)}", "seconds": seconds}
    return {**json.loads(answer.read_text()), "seconds": seconds}


class Proof:
    """Sound bundles, and what becomes of mutations of them."""

    def __init__(self, folder: Path, sound: list[Path]) -> None:
        self.folder, self.sound = folder, sound
        self.outcomes: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.failures: list[str] = []
        self.seconds: list[float] = []
        self._answers = {path: in_child(lambda path=path: opened(path), folder / "answer") for path in sound}
        for path, answer in self._answers.items():
            assert answer["outcome"] == "accepted", answer
            assert not faults(path), faults(path)

    def run(self, count: int, seed: int) -> None:
        """Tries mutations number 0 to `count` of a seed."""
        for number in range(count):
            self.try_one(number, seed)

    def try_one(self, number: int, seed: int) -> None:
        """Makes one mutation, opens it and judges what became of it."""
        rng = np.random.default_rng([seed, number])
        sound = self.sound[number % len(self.sound)]
        mutation = MUTATIONS[(number // len(self.sound)) % len(MUTATIONS)]
        again = bool(rng.random() < 0.6)
        place = self.folder / "mutant"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        path = place / "bundle"
        shutil.copytree(sound, path)
        name = mutation(path, rng)
        if again:
            seal_again(path)
        result = in_child(lambda: opened(path), self.folder / "answer")
        self.seconds.append(result["seconds"])
        wrong = self._judge(path, sound, again, result)
        self.outcomes[wrong.split(":")[0] if wrong else result["outcome"]] += 1
        if result["outcome"] == "accepted" and not wrong:
            self.accepted[name] += 1
        if wrong:
            label = "new hashes" if again else "old hashes"
            self.failures.append(f"{number} {mutation.__name__} {name} ({label}): {wrong}")

    def _judge(self, path: Path, sound: Path, again: bool, result: dict[str, Any]) -> str:
        """Says what is wrong with what became of a mutation, "" where nothing is."""
        if result["outcome"] in ("crash", "trace", "hang"):
            return f"{result['outcome']}: {result['reason']}"
        if result["outcome"] == "refused":
            named = str(path) in result["reason"] or "index.faiss" in result["reason"]
            return "" if named and "Traceback" not in result["reason"] else f"unnamed: {result['reason'][:300]}"
        same = all(
            (path / name).is_file() and (path / name).read_bytes() == (sound / name).read_bytes()
            for name in bundles.FILES
        )
        original = self._answers[sound]
        if result["bundle_id"] == original["bundle_id"]:
            return "" if same and result["digest"] == original["digest"] else "accepted: as the original, and is not"
        if not again:
            return "accepted: another bundle, though no hash was recomputed"
        oracle = in_child(lambda: {"outcome": "judged", "faults": faults(path)}, self.folder / "answer")
        found = oracle.get("faults", [f"the oracle cannot read it ({oracle['outcome']}: {oracle.get('reason')})"])
        return f"accepted: {found[0]}" if found else ""


def unchecked() -> list[Any]:
    """The controls: each check replaced by what was there without it."""

    def mapped(content: Any, types: Any, required: Any) -> pa.Table:
        return pa.ipc.open_file(pa.py_buffer(content)).read_all()

    from features import manifest
    from serving.bundle import index_file
    from serving.bundle.model import Model

    def unread(data: bytes) -> index_file.IndexFacts:
        dim, count = np.frombuffer(data, "<i4", 1, 4)[0], np.frombuffer(data, "<i8", 1, 8)[0]
        return index_file.IndexFacts(int(count), int(dim), None, 0)

    return [
        mock.patch("features.bundle.read_table", mapped),
        mock.patch("features.vocabulary.read_table", mapped),
        mock.patch("features.vocabulary._check", return_value=None),
        mock.patch("features.bundle_tables._check_rows", return_value=None),
        mock.patch("serving.bundle.model.check_graph", return_value=None),
        mock.patch.object(Model, "probe", return_value=None),
        mock.patch("serving.bundle.vector_index.check_index", unread),
        mock.patch.object(manifest, "_check_document", return_value=None),
    ]


def control(folder: Path, sound: list[Path], count: int, seed: int) -> Proof:
    """The same mutations with the checks of content switched off; hashes are still compared."""
    patches = unchecked()
    for patch in patches:
        patch.start()
    try:
        proof = Proof(folder, sound)
        proof.run(count, seed)
    finally:
        for patch in patches:
            patch.stop()
    return proof


def warm(path: Path) -> None:
    """Loads and compiles in this process what its forks take, so that each is quick."""
    opened(path)


def main() -> int:
    """Runs the proof and its control."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=2000, help="number of mutated bundles")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutations")
    parser.add_argument("--control", type=int, default=200, help="number of them that the control opens")
    parser.add_argument("--exported", action="store_true", help="mutate a bundle of `penchant export` as well")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        sound = [publish_world(folder / "small" / "bundle")]
        if arguments.exported:
            # Exported by a process of its own: one that has loaded torch has threads, and is not to be forked.
            code = "import shutil, sys; from tests.untrained import untrained_bundle as made; "
            code += "shutil.copytree(made(), sys.argv[1])"
            subprocess.run([sys.executable, "-c", code, str(folder / "exported")], check=True)
            sound.append(folder / "exported")
        warm(sound[0])
        proof = Proof(folder, sound)
        proof.run(arguments.count, arguments.seed)
        without = control(folder, sound, arguments.control, arguments.seed)
    for failure in proof.failures[:20]:
        print(failure, file=sys.stderr)
    accepted = proof.outcomes["accepted"]
    said = {
        "count": arguments.count,
        "seed": arguments.seed,
        "refused": proof.outcomes["refused"],
        "accepted_and_sound": accepted,
        "failures": len(proof.failures),
        "outcomes": dict(proof.outcomes),
        "accepted": dict(sorted(proof.accepted.items())),
        "slowest_seconds": round(max(proof.seconds, default=0.0), 2),
        "median_seconds": round(float(np.median(proof.seconds or [0.0])), 3),
        "control": {"count": arguments.control, "failures": len(without.failures), "outcomes": dict(without.outcomes)},
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(said))
    return int(bool(proof.failures) or (arguments.control > 0 and not without.failures))


if __name__ == "__main__":
    raise SystemExit(main())
