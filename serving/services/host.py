"""What the services ask of the process they run in: the bundle that answers right now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from features.catalog import Catalog
from serving.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Loaded:
    """One bundle, ready to answer; a request takes the reference once, so no answer mixes two.

    Attributes:
        bundle_id: Name of the bundle.
        catalog: Its items, with what was put since.
        pipelines: The stages of each method: "recommend", "search", "rank", "similar".
        actions: Names of the ranker's actions.
        event_types: Event type key -> name, of the types the bundle knows.
    """

    bundle_id: str
    catalog: Catalog
    pipelines: Mapping[str, Pipeline]
    actions: tuple[str, ...]
    event_types: Mapping[int, str]


class Host:
    """Holds the bundle in use."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
