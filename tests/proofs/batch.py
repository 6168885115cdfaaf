"""A batch answers as the service does: the same items, scores, rung and arm for the same user at the same version.

Users are given lives by the roads of the service: events, blocks, dials, consent that is withdrawn, anonymous ids that
are merged into them, or nothing at all. The service answers each, `penchant recommend` answers all of them with the
settings file of the service, both at one moment of the clock, and what the warehouse holds of the batch must be what
its file says.

    python -m tests.proofs.batch --users 1000

prints one line of JSON. `control` is the number of users for whom a batch that ignores the holdout answers otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from features.bundle import open_bundle
from penchant.client import Client, event
from penchant.v1 import common_pb2, event_pb2
from serving.config import ServeConfig
from serving.experiments import Holdout
from serving.jobs.batch import recommend
from serving.redis.embedded import RedisServer
from tests.fixtures import PATIENCE_S
from tests.serving.faults import wait_until
from tests.serving.inside import inside
from tests.world import publish_world

PAGE = 8
SETTINGS: dict[str, Any] = {
    "holdout_share": 0.2,
    "holdout_salt": "proof",
    "default_purposes": ["personalise", "measure", "train"],
    "log_features": 0.5,
    "warehouse_flush_s": 0.1,
    "redis_timeout_ms": 10_000,  # a busy machine is no fault
}
PARTITIONS = 5
"""Of the log: not the usual number, and not in the settings file."""

Answer = tuple[list[str], list[float], str, str, int]
"""Items, scores, rung, arm and profile version."""


class Users:
    """Users with something of everything."""

    def __init__(self, count: int, bundle: Path) -> None:
        """Draws them."""
        items = open_bundle(bundle).read("items.arrow")
        table = pa.ipc.open_file(pa.BufferReader(items)).read_all()
        self._items = table.column("item_id").to_pylist()
        self._categories = [(listed or [""])[0] for listed in table.column("categories").to_pylist()]
        self.names = [f"user-{number}" for number in range(count)]
        self.merged = {f"device-{number}": self.names[number] for number in range(0, count, 4)}
        self.anonymous = [f"visitor-{number}" for number in range(count // 20)]
        self._rng = np.random.default_rng(1)

    @property
    def ids(self) -> list[str]:
        """All of them, as the tables name them."""
        return [*self.names, *(f"a:{name}" for name in (*self.merged, *self.anonymous))]

    def live(self, client: Client) -> None:
        """Lets all of it happen; every tenth user stays unknown."""
        events = [self._event(name) for name in self.names for _ in range(self._lives(name))]
        events += [self._event(name, anonymous=True) for name in (*self.merged, *self.anonymous) for _ in range(2)]
        for start in range(0, len(events), 1000):
            statuses = client.ingest(events[start : start + 1000])
            assert all(status.code == 0 for status in statuses)
        _answer(client, self.names[0])  # compiles, for which writes have no patience
        for number, name in enumerate(self.names):
            if number % 5 == 1:
                client.set_controls([("category", self._category(), 0)], name, timeout_s=PATIENCE_S)
            if number % 5 == 2:
                dials = common_pb2.Dials(novelty=0.5, categories={self._category(): 1.0})
                client.set_controls([], name, dials=dials, timeout_s=PATIENCE_S)
        for device, name in self.merged.items():
            client.merge_identities(device, name, timeout_s=PATIENCE_S)
        for number, name in enumerate(self.names):
            if number % 7 == 3:
                client.set_consent(["measure"] if number % 2 else [], name, timeout_s=PATIENCE_S)
        after = [self._event(name, anonymous=True) for name in self.merged]
        assert all(status.code == 0 for status in client.ingest(after))

    def _lives(self, name: str) -> int:
        return 0 if name.endswith("9") else int(self._rng.integers(1, 8))

    def _category(self) -> str:
        return str(self._rng.choice(self._categories))

    def _event(self, name: str, anonymous: bool = False) -> event_pb2.Event:
        kind = str(self._rng.choice(["view_item", "like"]))
        made = event(name, str(self._rng.choice(self._items)), kind)
        if anonymous:
            made.subject.CopyFrom(common_pb2.Subject(anonymous_id=name))
        return made


def named(name: str) -> dict[str, str]:
    """The id of a user as the client takes it."""
    return {"anonymous_id": name[2:]} if name.startswith("a:") else {"user_id": name}


@contextlib.contextmanager
def one_moment() -> Iterator[None]:
    """Service and batch take the same time for now: features decay with every millisecond."""
    now = time.time()
    clock = SimpleNamespace(time=lambda: now, monotonic=time.monotonic)
    with mock.patch("serving.services.ranking.time", clock), mock.patch("serving.jobs.batch.time", clock):
        yield


def compare(bundle: Path, redis: str, events_redis: str, folder: Path, users: int, **settings: Any) -> dict[str, Any]:
    """Lives, asks, compares.

    Args:
        bundle: What serves.
        redis: An empty Redis for profiles.
        events_redis: An empty Redis for events.
        folder: An empty directory.
        users: Number of users with an account.
        settings: In place of those of `SETTINGS`.

    Returns:
        `users`, `held_out`, `personal`, `slates` of the batch in the warehouse and `not_logged` ones, `differences`
        (descriptions), `control`, `merged_arms` (devices whose own arm would be another than their user's), `redrawn`
        (users whom another salt puts into another arm).
    """
    settings = SETTINGS | settings
    file, listed, out = folder / "serve.yaml", folder / "users.txt", folder / "out.parquet"
    file.write_text(yaml.safe_dump({**settings, "redis": redis, "events_redis": events_redis}))
    everybody = Users(users, bundle)
    listed.write_text("\n".join(everybody.ids))
    config = ServeConfig.load(file, bundle=bundle, state_dir=folder / "state")
    warehouse = folder / "warehouse"
    state = {"state_dir": str(folder / "state"), "partitions": PARTITIONS}
    with inside(bundle, redis, events_redis, warehouse, **settings, **state) as service, service.client() as client:
        everybody.live(client)
        with one_moment():
            answers = {name: _answer(client, name) for name in everybody.ids}
            facts = recommend(config, listed, out, PAGE, channel="email")
            batch = pq.read_table(out).to_pylist()
            careless = folder / "careless.parquet"
            recommend(config.model_copy(update={"holdout_share": 0.0}), listed, careless, PAGE, log=False)
        differences = _differences(answers, batch)
        control = _differences(answers, pq.read_table(careless).to_pylist())
        if facts["logged"] + facts["not_logged"] != len(batch):
            differences.append(f"of {len(batch)} slates {facts['logged']} are logged, {facts['not_logged']} may not be")
        differences += _in_the_warehouse(warehouse, batch, facts["logged"])
        own = Holdout(settings["holdout_share"], settings["holdout_salt"])
        merged = [(f"a:{device}", name) for device, name in everybody.merged.items()]
        differences += _split_arms(answers, merged)
    # Another process and another salt: the device follows its user all the same.
    again = settings | {"holdout_salt": "another"}
    with inside(bundle, redis, events_redis, **again, **state) as service, service.client() as client:
        later = {name: _answer(client, name) for pair in merged for name in pair}
        differences += _split_arms(later, merged)
    return {
        "users": len(batch),
        "held_out": facts["held_out"],
        "personal": facts["personal"],
        "not_logged": facts["not_logged"],
        "slates": facts["logged"],
        "differences": differences,
        "control": len(control),
        "merged_arms": sum(own.assign(device).arm != own.assign(f"u:{name}").arm for device, name in merged),
        "redrawn": sum(later[name][3] != answers[name][3] for _, name in merged),
    }


def _answer(client: Client, name: str) -> Answer:
    slate = client.recommend(**named(name), page_size=PAGE)
    assert not slate.degraded, slate.degraded
    items = [item.item_id for item in slate.items]
    rung = common_pb2.Rung.Name(slate.rung).removeprefix("RUNG_").lower()
    return items, [item.score for item in slate.items], rung, slate.experiment.arm, slate.profile_version


def _differences(answers: dict[str, Answer], batch: Sequence[dict[str, Any]]) -> list[str]:
    """The users whom batch and service answer otherwise."""
    found = [] if [row["user_id"] for row in batch] == list(answers) else ["the batch is of other users"]
    for row in batch:
        own = row["item_ids"], row["scores"], row["rung"], row["arm"], row["profile_version"]
        if own != answers[row["user_id"]]:
            found.append(f"{row['user_id']}: the service says {answers[row['user_id']]}, the batch {own}")
    return found


def _split_arms(answers: dict[str, Answer], merged: Sequence[tuple[str, str]]) -> list[str]:
    """The devices that are in another arm than their user."""
    return [f"{device} and {name} are in two arms" for device, name in merged if answers[device][3] != answers[name][3]]


def _in_the_warehouse(warehouse: Path, batch: Sequence[dict[str, Any]], logged: int) -> list[str]:
    """Returns the differences of the Parquet from the file of the batch."""

    def slates() -> list[dict[str, Any]]:
        columns = ["request_id", "user_id", "item_ids", "arm", "rung", "method", "channel", "page_size"]
        found = [pq.ParquetFile(file).read(columns).to_pylist() for file in warehouse.glob("impressions/**/p*.parquet")]
        return [row for rows in found for row in rows if row["channel"] == "email"]

    wait_until(lambda: len(slates()) >= logged)
    rows, there = {row["request_id"]: row for row in batch}, slates()
    found = [] if len({row["request_id"] for row in there}) == len(there) == logged else [f"{len(there)} of {logged}"]
    for slate in there:
        row = rows[slate["request_id"]]
        own = {name: row[name] for name in ("request_id", "user_id", "item_ids", "arm", "rung")}
        if slate != own | {"method": "recommend", "channel": "email", "page_size": PAGE}:
            found.append(f"the warehouse says {slate}, the file {own}")
    return found


def main() -> None:
    """The proof at full size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--bundle", type=Path, help="A bundle, by default one of a small made world.")
    asked = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = asked.bundle or publish_world(folder / "bundle")
        with RedisServer(folder / "r", "profiles") as profiles, RedisServer(folder / "r", "events") as events:
            (folder / "made").mkdir()
            facts = compare(bundle, profiles.url, events.url, folder / "made", asked.users)
    for difference in facts["differences"]:
        print(difference, file=sys.stderr)
    failed = bool(facts["differences"]) or not facts["control"]
    facts |= {"differences": len(facts["differences"]), "seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps(facts))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
