"""A bundle made ready to answer: verified, parsed, replayed, and one Pipeline per method built from it."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from features import bundle_tables
from features.action_rates import ActionRates
from features.assemble import FEATURES, type_index
from features.bundle import Bundle, open_bundle
from features.bundle_tables import read_neighbors, read_popular, read_vectors, read_vocabulary, read_words
from features.catalog import Catalog
from features.errors import BundleError
from features.event_types import NEGATIVE_EVENT_TYPES
from features.keys import event_type_key, item_key
from features.transforms import ItemInputShapes, item_text, text_tokens
from serving.bundle.bitmap import clear_keys, clear_rows, first_allowed
from serving.bundle.golden import replay
from serving.bundle.model import Device, Model, uses_cuda
from serving.bundle.text_index import LexicalIndex
from serving.bundle.vector_index import Index, can_scan_on
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.engine.warm_up import warm_models, warm_pipelines
from serving.experiments import Holdout
from serving.observability.telemetry import Telemetry
from serving.pipeline.adjusters import Dialled
from serving.pipeline.explainers import Reasons
from serving.pipeline.filters import Blocked, Eligible, Excluded, Seen
from serving.pipeline.hydrators import CatalogProgress, CatalogVersion, Profile, QueryVector, UserVector
from serving.pipeline.runner import Filter, Hydrator, Pipeline, Scorer, Source, Tier
from serving.pipeline.scorers import FeedScorer, Personal, RankScorer, SearchScorer, SimilarScorer
from serving.pipeline.selectors import TopK
from serving.pipeline.side_effects import Impressions, SlateSink
from serving.pipeline.sources import (
    BoostedSource,
    Fresh,
    GivenCandidates,
    ItemNeighbors,
    LexicalSource,
    LiveItems,
    NearestToUser,
    Neighbors,
    NeighborsOfSeeds,
    Popular,
    PopularBeside,
    PopularInSegment,
    SemanticSource,
    SimilarToSeeds,
)
from serving.stores.profiles import ProfileStore

_FRESH = 50
CHOICES = ("add_to_cart", "purchase", "like", "rating")
"""Event types by which a person has chosen an item, whatever a bundle was trained on."""
_CANDIDATES = 500
_ROOM = 4 << 30
_ROOM_PER_BYTE = 32
"""Addresses that opening a bundle may take, and more of them for each byte of it: an item becomes Python objects."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One bundle, ready to answer; a request takes the reference once, so no answer mixes two.

    Attributes:
        bundle: The verified bundle.
        model: Its models.
        catalog: Its items, with what was put since.
        lexical: Their words, searchable.
        shapes: How items and words are fed to the encoders.
        pipelines: The stages of each method: "recommend", "search", "rank", "similar".
        event_types: Event type key -> name, of the types the bundle knows.
    """

    bundle: Bundle
    model: Model
    catalog: Catalog
    lexical: LexicalIndex
    shapes: ItemInputShapes
    pipelines: Mapping[str, Pipeline]
    event_types: Mapping[int, str]

    @property
    def bundle_id(self) -> str:
        """Name of the bundle."""
        return self.bundle.bundle_id

    @property
    def surfaces(self) -> list[str]:
        """Names of the surfaces that the ranker was trained on."""
        return list(self.bundle.model.surface_rates)

    @property
    def actions(self) -> list[str]:
        """Names of the ranker's actions."""
        return self.bundle.model.action_names


class EngineRef:
    """Holds the engine in use."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What an engine finds in the process that it runs in.

    Attributes:
        config: The settings.
        store: The profiles.
        progress: How far the catalogue's changes were followed.
        telemetry: Where measurements go.
        impressions: Where slates go, None where they are not logged.
        turns: What the calls of this process take, to be given up while one waits.
    """

    config: ServeConfig
    store: ProfileStore
    progress: CatalogProgress
    telemetry: Telemetry
    impressions: SlateSink | None = None
    turns: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(1))


def open_engine(
    path: Path, around: Dependencies, bundle_id: str = "", sealed: Mapping[str, int] | None = None
) -> Engine:
    """Opens a bundle, replays its golden requests and builds its pipelines.

    Args:
        path: Directory of the bundle.
        around: The process that it is opened in.
        bundle_id: The bundle that has to be there; empty where any will do.
        sealed: Files of it that are in shared memory, see `Bundle.seal`.

    Raises:
        BundleError: The bundle is damaged, contradicts itself, or answers its golden requests wrongly.
        ConfigError: The device asked for is not there.
    """
    bundle = open_bundle(path, bundle_id, sealed)
    fingerprint = bundle.manifest.feature_fingerprint
    if fingerprint != FEATURES.fingerprint():
        raise BundleError(f"{path}: made for other features ({fingerprint[:12]}); export the run with this version")
    with bounded_memory(bundle, around.config.device):
        catalog, lexical = read_items(bundle)
        model = Model(bundle, around.config.device)
        # `cuda` insists on both; `auto` takes for each what is there.
        on_device = model.device == "cuda" and (around.config.device == "cuda" or can_scan_on("cuda"))
        index = Index(bundle.read("index.faiss"), catalog, "cuda" if on_device else "cpu")
        model.probe(bundle.model.shapes, len(bundle.model.event_types))
        replay(bundle, model, catalog, index)
        _warm_up(catalog, lexical)
        pipelines = _Builder(bundle, model, catalog, index, lexical, around).pipelines()
        warm_models(model, bundle.model.shapes, _count(bundle, around.config))
        warm_pipelines(pipelines, catalog, [*bundle.model.event_types, *CHOICES])
        return Engine(
            bundle=bundle,
            model=model,
            catalog=catalog,
            lexical=lexical,
            shapes=bundle.model.shapes,
            pipelines=pipelines,
            event_types={event_type_key(name): name for name in bundle.model.event_types},
        )


@contextmanager
def bounded_memory(bundle: Bundle, device: Device) -> Iterator[None]:
    """Bounds the memory that reading a bundle and asking its models for the first time may take.

    A few bytes of a model can ask for more than the machine has. A GPU reserves addresses far beyond what it uses, so
    there is no bound where one may be used.

    Raises:
        BundleError: It takes more.
    """
    if uses_cuda(device):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    limit = used + _ROOM + _ROOM_PER_BYTE * bundle.manifest.size
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except MemoryError as error:
        wanted = f"takes more than {limit - used} bytes of memory to open"
        raise BundleError(f"{bundle.path}: {wanted}; export the run again") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Builder:
    """Builds the pipelines of a bundle: which stages each method has, in which order."""

    def __init__(
        self, bundle: Bundle, model: Model, catalog: Catalog, index: Index, lexical: LexicalIndex, around: Dependencies
    ) -> None:
        self._bundle, self._model, self._catalog = bundle, model, catalog
        self._index, self._lexical, self._around = index, lexical, around
        # As many as evaluation ranked, so that what was measured is what is served.
        self._count = _count(bundle, around.config)
        self._tables = read_popular(bundle, len(catalog.vocabulary))
        self._neighbors = Neighbors(*read_neighbors(bundle, len(catalog.vocabulary)))
        self._repeats = bundle.model.repeats
        self._personal = personal(bundle, model, catalog, around.config.log_features if around.impressions else 0.0)
        self._words = QueryVector(model, bundle.model.shapes)
        self._text = SearchScorer(lexical, catalog, around.config.search_personal)

    def pipelines(self) -> Mapping[str, Pipeline]:
        """The pipeline of each method."""
        return {
            "recommend": self._recommend(),
            "search": self._search(),
            "rank": self._rank(),
            "similar": self._similar(),
        }

    def _recommend(self) -> Pipeline:
        catalog, live = self._catalog, LiveItems(self._catalog)
        segments = {name: table for name, table in self._tables.items() if name}
        popular = Popular(*self._tables[""], catalog, live)
        return self._pipeline(
            hydrators=self._person({item_key(name): name for name in segments}),
            tiers=[
                Tier("sequence", [NearestToUser(self._index, self._count)]),
                Tier("item_to_item", [ItemNeighbors(self._neighbors, self._count)]),
                Tier("segment", [PopularInSegment(segments)]),
                Tier("popular", [popular]),
            ],
            extras=[
                Fresh(live, self._around.config.fresh_days, _FRESH),
                BoostedSource(catalog),
                PopularBeside(popular),
            ],
            filters=[Seen(catalog)],
            scorer=FeedScorer(self._personal),
        )

    def _search(self) -> Pipeline:
        return self._pipeline(
            hydrators=[*self._person(), self._words],
            tiers=[Tier("", [LexicalSource(self._lexical, self._count), SemanticSource(self._index, self._count)])],
            scorer=self._text,
        )

    def _rank(self) -> Pipeline:
        return self._pipeline(
            hydrators=[*self._person(), self._words],
            tiers=[Tier("", [GivenCandidates()])],
            scorer=RankScorer(self._personal, self._text),
            keep_order=True,
        )

    def _similar(self) -> Pipeline:
        similar = SimilarToSeeds(self._index, self._catalog, self._count)
        return self._pipeline(
            hydrators=self._person()[:-1],
            tiers=[Tier("", [similar, NeighborsOfSeeds(self._neighbors, self._count)])],
            scorer=SimilarScorer(self._catalog),
        )

    def _person(self, segments: Mapping[int, str] | None = None) -> list[Hydrator]:
        """What finds out about the person; `segments` are those that the pipeline has tables of, key -> name."""
        spec = self._bundle.model
        keys = type_index(spec.event_types)
        # A live event of a type that training never saw counts as well; what is refused stays away in any case.
        told = CHOICES if not self._repeats else ()
        unknown = [name for name in told if name not in spec.event_types]
        names = {*NEGATIVE_EVENT_TYPES, *(() if self._repeats else spec.seen_types), *unknown}
        seen = np.array(sorted(map(event_type_key, names)), np.uint32)
        return [
            CatalogVersion(self._around.progress, self._around.turns),
            Profile(
                self._around.store,
                self._catalog,
                keys,
                seen,
                self._around.turns,
                self._around.config.default_consent,
                segments,
                Holdout(self._around.config.holdout_share, self._around.config.holdout_salt),
            ),
            UserVector(self._model, self._catalog),
        ]

    def _pipeline(
        self,
        *,
        hydrators: Sequence[Hydrator],
        tiers: Sequence[Tier],
        scorer: Scorer,
        extras: Sequence[Source] = (),
        filters: Sequence[Filter] = (),
        keep_order: bool = False,
    ) -> Pipeline:
        """A pipeline with the stages that every method has."""
        writer = self._around.impressions
        return Pipeline(
            hydrators=hydrators,
            tiers=tiers,
            extras=extras,
            eligibility=Eligible(self._catalog),
            filters=[Excluded(self._catalog), Blocked(self._catalog), *filters],
            scorer=scorer,
            adjusters=[Dialled(self._catalog)],
            selector=TopK(self._catalog, keep_order=keep_order),
            explainers=[Reasons(self._catalog)],
            side_effects=[Impressions(writer, self._catalog, self._bundle.bundle_id)] if writer else [],
            recorder=self._around.telemetry,
        )


def personal(bundle: Bundle, model: Model, catalog: Catalog, logged: float = 0.0) -> Personal:
    """What a bundle's ranker thinks of rows; `logged` is the share of requests whose features are kept for the log."""
    spec = bundle.model
    return Personal(model, catalog, ActionRates.of_model(spec), spec.action_weights, spec.blend, logged)


def _warm_up(catalog: Catalog, lexical: LexicalIndex) -> None:
    """Compiles what the golden requests do not reach, so that no caller waits for it."""
    rows = np.arange(min(1, catalog.size), dtype=np.int32)
    bitmap = catalog.eligible_bitmap(0).copy()
    first_allowed(rows, bitmap, 1)
    clear_keys(bitmap, catalog.columns.category, np.ones(1, np.uint64))
    clear_rows(bitmap, rows)
    for row in rows.tolist():
        tokens = text_tokens(item_text(catalog.item(row)))
        lexical.search(tokens, 1, catalog.eligible_bitmap(0))
        lexical.score(tokens, rows)


def _count(bundle: Bundle, config: ServeConfig) -> int:
    return config.candidates or bundle.manifest.candidates or _CANDIDATES


def read_items(bundle: Bundle) -> tuple[Catalog, LexicalIndex]:
    """The items of a bundle, and their words.

    Raises:
        BundleError: A table or an array is malformed, or they contradict one another.
    """
    items = bundle_tables.read_items(bundle)
    vocabulary = read_vocabulary(bundle, items)
    vectors = read_vectors(bundle, len(vocabulary))
    return Catalog(items, vocabulary, vectors), LexicalIndex(*read_words(bundle, len(vocabulary)))
