"""The pipelines of a bundle: which stages each method has, in which order.

This is the place to add a source, a filter, a scorer or an adjuster: write the stage in its file of `serving.pipeline`,
and name it here; `docs/architecture.md` has the other steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from features.action_rates import ActionRates
from features.assemble import type_index
from features.bundle import Bundle
from features.bundle_tables import read_popular
from features.catalog import Catalog
from features.event_types import NEGATIVE_EVENT_TYPES
from features.keys import event_type_key, item_key
from features.linear import LinearTerm
from serving.bundle.model import Model
from serving.bundle.tables import BundleTables
from serving.bundle.vector_index import Index
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.experiments import Holdout
from serving.observability.telemetry import Telemetry
from serving.pipeline.adjusters import DialAdjuster
from serving.pipeline.explainers import SlateExplainer
from serving.pipeline.filters import BlockedFilter, EligibilityFilter, ExcludedFilter, SeenFilter
from serving.pipeline.hydrators import (
    CatalogVersionHydrator,
    ProfileHydrator,
    ProfileReader,
    QueryVectorHydrator,
    UserVectorHydrator,
)
from serving.pipeline.runner import Pipeline
from serving.pipeline.scorers import FeedScorer, PersonalRanker, RankScorer, SearchScorer, SimilarScorer
from serving.pipeline.selectors import TopKSelector
from serving.pipeline.side_effects import ImpressionSideEffect, SlateSink
from serving.pipeline.sources import (
    BoostedSource,
    FreshSource,
    ItemToItemSource,
    LexicalSource,
    LiveItems,
    PopularExtraSource,
    PopularSource,
    SeedNeighborsSource,
    SeedVectorSource,
    SegmentSource,
    SemanticSource,
    UpstreamSource,
    UserVectorSource,
)
from serving.pipeline.stages import Filter, Hydrator, Scorer, Source, Tier
from serving.stores.catalog_log import CatalogProgress

CHOICES = ("add_to_cart", "purchase", "like", "rating")
"""Event types by which a user has chosen an item, whatever a bundle was trained on."""

_FRESH = 50
_CANDIDATES = 500


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The parts of the process that an engine runs in.

    Attributes:
        config: The settings.
        store: Where profiles are read.
        progress: How far the catalogue's changes were followed.
        telemetry: The receiver of measurements.
        impressions: The receiver of slates, None where they are not logged.
        limit: The limit of calls worked on at once, whose slot a call releases while it waits.
    """

    config: ServeConfig
    store: ProfileReader
    progress: CatalogProgress
    telemetry: Telemetry
    impressions: SlateSink | None = None
    limit: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(1))


class PipelineBuilder:
    """Builds the pipelines of a bundle."""

    def __init__(
        self,
        bundle: Bundle,
        model: Model,
        tables: BundleTables,
        index: Index,
        dependencies: Dependencies,
    ) -> None:
        catalog, lexical = tables.catalog, tables.lexical
        self._bundle, self._model, self._catalog = bundle, model, catalog
        self._index, self._lexical, self._dependencies = index, lexical, dependencies
        self._config = dependencies.config
        self._count = candidate_count(bundle, self._config)
        self._popular = read_popular(bundle, len(catalog.vocabulary))
        self._neighbors = tables.neighbors
        # Without a log of slates no features are kept for it.
        logged = self._config.log_features if dependencies.impressions else 0.0
        self._personal = personal_ranker(bundle, model, catalog, logged)
        # One for all methods: a user's searches need the vector of the user's feed.
        self._user_vector = UserVectorHydrator(
            model, catalog, LinearTerm(bundle.model.linear, tables.neighbors.weights), self._config.user_vectors
        )
        self._query_vector = QueryVectorHydrator(model, bundle.model.shapes)
        self._search_scorer = SearchScorer(lexical, catalog, self._config.search_personal)

    def pipelines(self) -> Mapping[str, Pipeline]:
        """Returns the pipeline of each method."""
        return {
            "recommend": self._recommend(),
            "search": self._search(),
            "rank": self._rank(),
            "similar": self._similar(),
        }

    def _recommend(self) -> Pipeline:
        catalog, live = self._catalog, LiveItems(self._catalog)
        segments = {name: table for name, table in self._popular.items() if name}
        popular = PopularSource(*self._popular[""], catalog, live)
        return self._pipeline(
            hydrators=self._hydrators({item_key(name): name for name in segments}),
            # The more personal first; each tier serves if those above it cannot fill the page.
            tiers=[
                Tier("sequence", [UserVectorSource(self._index, catalog, self._count)]),
                Tier("item_to_item", [ItemToItemSource(self._neighbors, self._count)]),
                Tier("segment", [SegmentSource(segments)]),
                Tier("popular", [popular]),
            ],
            extras=[
                FreshSource(live, self._config.fresh_days, _FRESH),
                BoostedSource(catalog),
                PopularExtraSource(popular),
            ],
            filters=[SeenFilter(catalog)],
            scorer=FeedScorer(self._personal),
        )

    def _search(self) -> Pipeline:
        lexical, semantic = LexicalSource(self._lexical, self._count), SemanticSource(self._index, self._count)
        return self._pipeline(
            hydrators=[*self._hydrators(), self._query_vector],
            tiers=[Tier("", [lexical, semantic])],
            scorer=self._search_scorer,
        )

    def _rank(self) -> Pipeline:
        return self._pipeline(
            hydrators=[*self._hydrators(), self._query_vector],
            tiers=[Tier("", [UpstreamSource()])],
            scorer=RankScorer(self._personal, self._search_scorer),
            keep_order=True,  # the caller's order is the better answer where scores are equal
        )

    def _similar(self) -> Pipeline:
        similar = SeedVectorSource(self._index, self._catalog, self._count)
        return self._pipeline(
            hydrators=self._hydrators()[:-1],  # nothing of it depends on the user's vector
            tiers=[Tier("", [similar, SeedNeighborsSource(self._neighbors, self._count)])],
            scorer=SimilarScorer(self._catalog),
        )

    def _hydrators(self, segments: Mapping[int, str] | None = None) -> list[Hydrator]:
        """Returns the hydrators of the user; `segments` are those that the pipeline has tables of, key -> name."""
        limit = self._dependencies.limit
        return [
            CatalogVersionHydrator(self._dependencies.progress),
            ProfileHydrator(
                self._dependencies.store,
                self._catalog,
                type_index(self._bundle.model.event_types),
                self._seen_keys(),
                limit,
                self._config.default_consent,
                segments,
                Holdout(self._config.holdout_share, self._config.holdout_salt),
            ),
            self._user_vector,
        ]

    def _seen_keys(self) -> npt.NDArray[np.uint32]:
        """Returns the event types after which an item is not shown again; uint32 [n]."""
        spec = self._bundle.model
        # An item that the user has refused is not shown again, whatever the bundle was trained for.
        names = set(NEGATIVE_EVENT_TYPES)
        if not spec.repeats:
            # A live event of a type that training never saw counts as well.
            names.update(spec.seen_types, (name for name in CHOICES if name not in spec.event_types))
        return np.array(sorted(map(event_type_key, names)), np.uint32)

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
        """Returns a pipeline with the stages that every method has."""
        catalog, sink = self._catalog, self._dependencies.impressions
        origin = self._bundle.bundle_id, self._bundle.manifest.feature_fingerprint
        return Pipeline(
            hydrators=hydrators,
            tiers=tiers,
            extras=extras,
            eligibility=EligibilityFilter(catalog),
            # In this order `dropped` counts: the caller's exclusions first, as the caller knows them.
            filters=[ExcludedFilter(catalog), BlockedFilter(catalog), *filters],
            scorer=scorer,
            adjusters=[DialAdjuster(catalog)],
            selector=TopKSelector(catalog, keep_order=keep_order),
            explainers=[SlateExplainer(catalog)],
            side_effects=[ImpressionSideEffect(sink, catalog, *origin)] if sink else [],
            recorder=self._dependencies.telemetry,
        )


def personal_ranker(bundle: Bundle, model: Model, catalog: Catalog, logged: float = 0.0) -> PersonalRanker:
    """Returns the ranker of a bundle; `logged` is the share of requests whose features are kept for the log."""
    spec = bundle.model
    rates, weights = ActionRates.of_model(spec), spec.action_weights
    return PersonalRanker(model, catalog, rates, weights, spec.blend, logged, spec.declared)


def candidate_count(bundle: Bundle, config: ServeConfig) -> int:
    """Returns the number of candidates of each source.

    By default as many as evaluation ranked, so that the answers that were measured are those that are served.
    """
    return config.candidates or bundle.manifest.candidates or _CANDIDATES
