"""The whole road in minutes: data, training, evaluation, export, service, and what one person's events change."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.latency import latency
from benchmarks.report import BenchmarkError
from benchmarks.service import running
from features.tables import open_dataset
from penchant.client import Client, event
from penchant.v1 import ranking_pb2
from serving.rebuild import rebuild
from training.config import load_config
from training.datasets import prepare
from training.evaluate import evaluate
from training.export import export
from training.train import train

PROTOCOL = "leave-one-out"
PAGE = 8
HISTORY = 100
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Story:
    """What the demo asks of a data set.

    Attributes:
        people: What its people are called, one of them.
        action: Event type of the events that are sent.
        search: Words searched for, and bought afterwards by the first person.
        options: Options of the data set's preparation.
        settings: Settings of the training.
    """

    people: str
    action: str
    search: str
    options: dict[str, Any]
    settings: dict[str, Any]


STORIES = {
    "completejourney": Story("household", "purchase", "baby food", {}, {"epochs": 2, "negatives": 512}),
    "simulated": Story("person", "purchase", "", {"users": 300, "items": 300, "days": 60}, {"epochs": 2}),
}


def demo(dataset: str = "completejourney", out: Path = Path("build/demo")) -> dict[str, Any]:
    """Goes from raw data to ranked answers and measures both.

    Args:
        dataset: A data set with a story: "completejourney" or "simulated".
        out: Directory for the data, the run and the bundle; what is there already is made anew.

    Returns:
        `quality`, `baselines`, `latency_ms`, `seconds`, and how far the feeds moved.

    Raises:
        BenchmarkError: There is no story for the data set.
    """
    if dataset not in STORIES:
        raise BenchmarkError(f"no demo for {dataset!r}: choose one of {', '.join(STORIES)}")
    story, screen, begun = STORIES[dataset], Console(), time.monotonic()
    measured = _learn(dataset, story, out, screen)
    with running(out / "bundle", "--state-dir", str(out / "state")) as service:
        cast = _Cast(out / "data")
        rebuild(out / "data", service["redis"], service["events_redis"])
        with Client(service["listen"], timeout_s=TIMEOUT_S) as client:
            moved = _show(client, cast, story, screen)
        screen.rule("latency")
        speed = latency(service["listen"], cast.people, requests=1000)
        screen.print(f"at {speed['rate']:.0f} requests a second: {speed['latency_ms']} ms, errors {speed['errors']}")
        seconds = round(time.monotonic() - begun, 1)
        _try_it(service, out / "bundle", cast.pair[0], screen)
        if sys.stdin.isatty():
            screen.input("The service runs until you press Enter. ")
    return {
        "dataset": dataset,
        "quality": measured["metrics"],
        "baselines": measured["baselines"],
        "latency_ms": speed["latency_ms"],
        "rate": speed["rate"],
        "errors": speed["errors"],
        "rungs": speed["rungs"],
        **moved,
        "seconds": seconds,
    }


def _learn(dataset: str, story: Story, out: Path, screen: Console) -> dict[str, Any]:
    """Data, training, evaluation, export; the evaluation."""
    for name in ("data", "run", "bundle", "state"):
        shutil.rmtree(out / name, ignore_errors=True)
    screen.rule("data")
    facts = prepare(dataset, None, out / "data", **story.options)
    screen.print(f"{facts['users']:,} people, {facts['items']:,} items, {facts['events']:,} events")
    screen.rule("training")
    trained = train(out / "data", out / "run", load_config(None, {"protocol": PROTOCOL, **story.settings}))
    screen.print(f"{trained['seconds']:.0f} s, {trained['tokens_per_second']:,.0f} events a second")
    screen.rule("quality: the next new item of each person, among all items")
    measured: dict[str, Any] = evaluate([out / "run"], PROTOCOL)
    screen.print(_quality(measured))
    screen.rule("export")
    exported = export(out / "run", out / "bundle")
    for name, gate in exported["gates"].items():
        screen.print(f"gate {name}: {gate['value']:.3g} (limit {gate['limit']:g}) passed")
    return measured


def _quality(measured: dict[str, Any]) -> Table:
    table = Table("", "ndcg@10", "hit@10")
    for name, row in measured["baselines"].items():
        table.add_row(name, f"{row['ndcg@10']:.4f}", f"{row['hit@10']:.4f}")
    ours = (measured["metrics"][name] for name in ("ndcg@10", "hit@10"))
    table.add_row("penchant", *(f"{m['mean']:.4f} ({m['low']:.4f} to {m['high']:.4f})" for m in ours), style="bold")
    return table


def _show(client: Client, cast: _Cast, story: Story, screen: Console) -> dict[str, Any]:
    """Two feeds and a search, some events of the first person, and the feeds again; how far they moved."""
    first, second = cast.pair
    screen.rule("two feeds and a search")
    before = {person: client.recommend(user_id=person, page_size=PAGE, explain=True) for person in cast.pair}
    for person, slate in before.items():
        screen.print(cast.table(slate, f"for {story.people} {person}"))
    query = story.search or cast.title(before[second].items[0].item_id)
    found = client.search(query, user_id=first, page_size=PAGE, explain=True)
    screen.print(cast.table(found, f"search “{query}” by {story.people} {first}"))

    screen.rule("events, and the very next answer")
    touched = [item.item_id for item in found.items[:5]]
    statuses = client.ingest([event(first, item, story.action) for item in touched])
    screen.print(f"{story.people} {first}, {story.action}: {', '.join(map(cast.title, touched))}")
    version = max(status.profile_version for status in statuses)
    after = {
        first: client.recommend(user_id=first, page_size=PAGE, explain=True, min_profile_version=version),
        second: client.recommend(user_id=second, page_size=PAGE, explain=True),
    }
    screen.print(cast.table(after[first], f"for {story.people} {first}, right after"))

    was, now = _ids(before[first]), _ids(after[first])
    moved = {
        "new_items": len(set(now) - set(was)),
        "left_because_seen": len(set(was) & set(touched)),
        "other_unchanged": _ids(before[second]) == _ids(after[second]),
    }
    screen.print(
        f"{moved['new_items']} of {PAGE} items are new; {moved['left_because_seen']} had to leave, being bought."
    )
    screen.print(f"{story.people} {second}'s feed is {'unchanged' if moved['other_unchanged'] else 'CHANGED'}.")
    return moved


def _ids(slate: ranking_pb2.Slate) -> list[str]:
    return [item.item_id for item in slate.items]


class _Cast:
    """The people and items of a data set, for people to read."""

    def __init__(self, data: Path) -> None:
        dataset = open_dataset(data)
        ids, titles = dataset.items["item_id"].to_pylist(), dataset.items["title"].to_pylist()
        self._titles = {item: title or item for item, title in zip(ids, titles, strict=True)}
        counts = Counter(map(str, dataset.events["user_id"].to_pylist()))
        self.people = sorted(counts)
        self.pair = [person for person in self.people if counts[person] >= HISTORY][:2]
        if len(self.pair) < 2:
            raise BenchmarkError(f"{data}: the demo needs two people with {HISTORY} events each")

    def title(self, item_id: str) -> str:
        """The title of an item, or its id where it has none."""
        return str(self._titles.get(item_id, item_id))

    def table(self, slate: ranking_pb2.Slate, title: str) -> Table:
        """A slate as a table."""
        table = Table("item", "score", "because", title=title, title_justify="left")
        for item in slate.items:
            reasons = "; ".join(reason.text for reason in item.reasons)
            table.add_row(self.title(item.item_id), f"{item.score:.2f}", reasons)
        return table


def _try_it(service: dict[str, Any], bundle: Path, person: str, screen: Console) -> None:
    body = json.dumps({"options": {"subject": {"userId": person}, "pageSize": 3, "explain": True}})
    url = f"http://{service['listen']}/penchant.v1.RankingService/Recommend"
    screen.print(f"To ask it yourself, while it runs (or again after `penchant serve {bundle}`):")
    screen.print(f"  buf curl --http2-prior-knowledge --protocol grpc -d '{body}' {url}", soft_wrap=True, markup=False)
