"""Runs everything once, in minutes: data, training, evaluation, export, service, and the effect of a user's events."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.latency import latency
from benchmarks.report import BenchmarkError
from benchmarks.service import running
from features.tables.dataset import open_dataset
from penchant.client import Client, EventFields, event
from penchant.v1 import ranking_pb2
from serving.projection.rebuild import rebuild
from training.config import load_config
from training.data.datasets import prepare
from training.evaluation.evaluate import evaluate
from training.export.export import export
from training.train import train

PROTOCOL = "leave-one-out"
PAGE = 8
HISTORY = 100
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Story:
    """The demo's choices for a data set.

    Attributes:
        user: The word for a user.
        action: Event type of the events that are sent.
        search: Words searched for, and acted on afterwards by the first user.
        value: Value of the events that are sent, if they have one.
        options: Options of the data set's preparation.
        config: A configuration that comes along, if not the defaults.
        settings: Settings of the training that override the configuration.
    """

    user: str
    action: str
    search: str = ""
    value: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)


STORIES = {
    "movielens-1m": Story("user", "rating", "star wars", 5.0, config=Path("demo")),
    "completejourney": Story("household", "purchase", "baby food", config=Path("groceries")),
    "simulated": Story("user", "purchase", options={"users": 300, "items": 300, "days": 60}, settings={"epochs": 2}),
}


def demo(dataset: str = "movielens-1m", out: Path = Path("build/demo"), source: Path | None = None) -> dict[str, Any]:
    """Goes from raw data to ranked slates and measures their quality and latency.

    Args:
        dataset: A data set with a story: one of `STORIES`.
        out: Directory for the data, the run and the bundle; an older demo there is replaced.
        source: File to read the data set from; None downloads it or takes it from its package.

    Returns:
        `quality` {metric: {mean, low, high}}, `baselines` {name: {metric: value}}, `margins` {baseline: the interval
        {mean, low, high} by which NDCG@10 is above it}, `ahead` (of every baseline, the whole interval above zero);
        `parts` {"repeats", "new", "new_alone": the same four and `targets`} if repeats count; `latency_ms`,
        `same_titles` (titles that occur twice on a page), how far the feeds moved, `phases` {name: seconds}, `seconds`.

    Raises:
        BenchmarkError: There is no story for the data set.
    """
    if dataset not in STORIES:
        raise BenchmarkError(f"no demo for {dataset!r}: choose one of {', '.join(STORIES)}")
    story, screen, clock = STORIES[dataset], Console(), _PhaseClock()
    measured = _learn(dataset, source, story, out, screen, clock)
    with running(out / "bundle", "--state-dir", str(out / "state")) as service:
        cast = _Cast(out / "data", story.search)
        # The data set's history becomes the profiles, so that its users are known from the first request on.
        rebuild(out / "data", service["redis"], service["events_redis"])
        clock.lap("service")
        with Client(service["listen"], timeout_s=TIMEOUT_S) as client:
            moved = _show(client, cast, story, screen)
        speed = _measure_latency(service["listen"], cast.users, screen)
        clock.lap("requests")
        screen.print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in clock.laps.items()))
        _try_it(service, out / "bundle", cast.pair[0], screen)
    return {
        "dataset": dataset,
        **_figures(measured),
        "parts": {name: {"targets": part["targets"], **_figures(part)} for name, part in _parts(measured).items()},
        **{name: speed[name] for name in ("latency_ms", "rate", "errors", "rungs", "degraded")},
        **moved,
        **clock.figures(),
    }


def _measure_latency(target: str, users: list[str], screen: Console) -> dict[str, Any]:
    screen.rule("latency")
    speed = latency(target, users, requests=1000)
    screen.print(f"at {speed['rate']:.0f} requests a second: {speed['latency_ms']} ms, errors {speed['errors']}")
    return speed


class _PhaseClock:
    """Seconds of the phases, from the beginning on."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def figures(self) -> dict[str, Any]:
        """Returns the seconds of each phase, and of all."""
        return {"phases": self.laps, "seconds": round(sum(self.laps.values()), 1)}

    def lap(self, name: str) -> None:
        """Ends a phase."""
        now = time.monotonic()
        self.laps[name], self._since = round(now - self._since, 1), now


def _learn(
    dataset: str, source: Path | None, story: Story, out: Path, screen: Console, clock: _PhaseClock
) -> dict[str, Any]:
    """Prepares the data, trains, evaluates and exports; returns the evaluation."""
    # Also the state: an older demo's profiles would belong to other users.
    for name in ("data", "run", "bundle", "state"):
        shutil.rmtree(out / name, ignore_errors=True)
    screen.rule("data")
    facts = prepare(dataset, source, out / "data", **story.options)
    screen.print(f"{facts['users']:,} users, {facts['items']:,} items, {facts['events']:,} events; {facts['notes']}")
    clock.lap("data")
    screen.rule("training")
    trained = train(out / "data", out / "run", load_config(story.config, {"protocol": PROTOCOL, **story.settings}))
    screen.print(f"{trained['epochs']} epochs, {trained['tokens_per_second']:,.0f} events a second")
    clock.lap("training")
    measured: dict[str, Any] = evaluate([out / "run"], PROTOCOL)
    clock.lap("evaluation")
    parts = _parts(measured)
    target = "item" if parts else "new item"
    screen.rule(f"quality: the last {target} of each of {measured['targets']:,} users, found among all items")
    _judge(measured, "", screen)
    for name, part in parts.items():
        _judge(part, f"{name}: {part['targets']:,} items {_PARTS[name]}", screen)
    screen.rule("export")
    exported = export(out / "run", out / "bundle")
    for name, gate in exported["gates"].items():
        screen.print(f"gate {name}: {gate['value']:.3g} (limit {gate['limit']:g}) passed")
    clock.lap("export")
    return measured


_PARTS = {
    "repeats": "repeat an item of their user",
    "new": "are new to their user, on the same page",
    "new_alone": "are new to their user, among the items new to them",
}


def _parts(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # Cold targets are left out: a demo is about what a model has learned.
    parts: dict[str, dict[str, Any]] = measured.get("parts", {})
    return {name: part for name, part in parts.items() if name in _PARTS}


def _figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of an evaluation, or of a part of one, as the demo reports them."""
    margins = {name: row["ndcg@10"] for name, row in measured["paired"].items()}
    return {
        "quality": measured["metrics"],
        "baselines": measured["baselines"],
        "margins": margins,
        "ahead": all(margin["low"] > 0 for margin in margins.values()),
    }


def _judge(measured: dict[str, Any], title: str, screen: Console) -> None:
    """Prints model and baselines, and in one line whether their difference is significant."""
    table = Table("", "ndcg@10", "hit@10", "penchant's lead", title=title, title_justify="left")
    margins = _figures(measured)["margins"]
    for name, row in measured["baselines"].items():
        table.add_row(name, f"{row['ndcg@10']:.3f}", f"{row['hit@10']:.3f}", _interval(margins[name]))
    metrics = measured["metrics"]
    table.add_row("penchant", _interval(metrics["ndcg@10"]), f"{metrics['hit@10']['mean']:.3f}", "", style="bold")
    screen.print(table)
    behind = [f"{name}: {_interval(margin)}" for name, margin in margins.items() if margin["high"] < 0]
    undecided = [
        f"{name}: {_interval(margin)}" for name, margin in margins.items() if margin["low"] <= 0 <= margin["high"]
    ]
    if behind:
        screen.print(f"penchant is BEHIND {'; '.join(behind)}.")
    if undecided:
        screen.print(f"penchant is NOT surely ahead of {'; '.join(undecided)}.")
    if not behind and not undecided:
        screen.print("penchant is ahead of every baseline, the 95 % interval of each difference above zero.")


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _show(client: Client, cast: _Cast, story: Story, screen: Console) -> dict[str, Any]:
    """Shows two feeds and a search, sends events of the first user, and shows how far the feeds moved."""
    first, second = cast.pair
    screen.rule("two feeds and a search")
    before = {user: client.recommend(user_id=user, page_size=PAGE, explain=True) for user in cast.pair}
    for user, slate in before.items():
        screen.print(cast.table(slate, f"for {story.user} {user}"))
    query = story.search or cast.title(before[second].items[0].item_id)
    matching = client.search(query, user_id=first, page_size=PAGE, explain=True)
    screen.print(cast.table(matching, f"search “{query}” by {story.user} {first}"))

    screen.rule("events, and the very next slate")
    # Search also finds by meaning; events about items that bear the words make the effect plain to a reader.
    touched = cast.named(_ids(matching), query)[:5]
    values: EventFields = {} if story.value is None else {"value": story.value}
    statuses = client.ingest([event(first, item, story.action, **values) for item in touched])
    screen.print(f"{story.user} {first}, {story.action}: {'; '.join(map(cast.title, touched))}")
    version = max(status.profile_version for status in statuses)
    # The first user's feed must hold the events; the second one's must not move, so it names no version.
    after = {
        first: client.recommend(user_id=first, page_size=PAGE, explain=True, min_profile_version=version),
        second: client.recommend(user_id=second, page_size=PAGE, explain=True),
    }
    screen.print(cast.table(after[first], f"for {story.user} {first}, right after"))

    was, now = _ids(before[first]), _ids(after[first])
    moved = {
        "new_items": len(set(now) - set(was)),
        # A choice is not recommended again, so these places are no sign of taste.
        "left_because_seen": len((set(was) & set(touched)) - set(now)),
        "other_unchanged": _ids(before[second]) == _ids(after[second]),
        "same_titles": sum(map(cast.same_titles, (*before.values(), matching, *after.values()))),
    }
    screen.print(f"{moved['new_items']} of {PAGE} items are new; {moved['left_because_seen']} had to leave as seen.")
    screen.print(f"{story.user} {second}'s feed is {'unchanged' if moved['other_unchanged'] else 'CHANGED'}.")
    if moved["same_titles"]:
        screen.print(f"{moved['same_titles']} titles occur TWICE on a page.")
    return moved


def _ids(slate: ranking_pb2.Slate) -> list[str]:
    return [item.item_id for item in slate.items]


class _Cast:
    """The users and items of a data set, in words for the screen.

    Attributes:
        users: All users.
        pair: Two users with a long history; the first one's matches nothing of the search, so that events change it.
    """

    def __init__(self, data: Path, search: str) -> None:
        dataset = open_dataset(data)
        ids, titles = dataset.items["item_id"].to_pylist(), dataset.items["title"].to_pylist()
        self._titles = {str(item): str(title or item) for item, title in zip(ids, titles, strict=True)}
        user_ids, item_ids = dataset.events["user_id"].to_pylist(), dataset.events["item_id"].to_pylist()
        counts = Counter(map(str, user_ids))
        matching = {item for item, title in self._titles.items() if search and search in title.lower()}
        taught = {str(user) for user, item in zip(user_ids, item_ids, strict=True) if item in matching}
        self.users = sorted(counts)
        long = [user for user in self.users if counts[user] >= HISTORY]
        first = next((user for user in long if user not in taught), None)
        second = next((user for user in long if user != first), None)
        if first is None or second is None:
            raise BenchmarkError(f"{data}: the demo needs two users with {HISTORY} events each")
        self.pair = (first, second)

    def title(self, item_id: str) -> str:
        """Returns the title of an item, or its id if it has none."""
        return self._titles.get(item_id, item_id)

    def named(self, item_ids: list[str], query: str) -> list[str]:
        """Returns the items whose title contains a query, in their order; all if none does."""
        matching = [item for item in item_ids if query.lower() in self.title(item).lower()]
        return matching or item_ids

    def same_titles(self, slate: ranking_pb2.Slate) -> int:
        """Returns the number of items of a slate whose title an item above them has."""
        titles = [self.title(item.item_id) for item in slate.items]
        return len(titles) - len(set(titles))

    def table(self, slate: ranking_pb2.Slate, title: str) -> Table:
        """Returns a slate as a table."""
        table = Table("item", "score", "because", title=title, title_justify="left")
        for item in slate.items:
            reasons = "; ".join(reason.text for reason in item.reasons)
            table.add_row(self.title(item.item_id), f"{item.score:.2f}", reasons)
        return table


def _try_it(service: dict[str, Any], bundle: Path, user: str, screen: Console) -> None:
    body = json.dumps({"options": {"subject": {"userId": user}, "pageSize": 3, "explain": True}})
    url = f"http://{service['listen']}/penchant.v1.RankingService/Recommend"
    screen.print(f"To try it yourself, while it runs (or again after `penchant serve {bundle}`):")
    screen.print(f"  buf curl --http2-prior-knowledge --protocol grpc -d '{body}' {url}", soft_wrap=True, markup=False)
    # A script has no terminal, and would wait for ever.
    if sys.stdin.isatty():
        screen.input("The service runs until you press Enter. ")
