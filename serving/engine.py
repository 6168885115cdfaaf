"""A bundle made ready to answer: verified, parsed, replayed, and one Pipeline per method built from it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.assemble import FEATURES, statistics_width, type_index
from features.bundle import Bundle, open_bundle
from features.catalog import Catalog
from features.columns import pc
from features.errors import BundleError
from features.outcomes import Outcomes
from features.schema import NEGATIVE_EVENT_TYPES, event_type_key, item_key
from features.transforms import ItemInputShapes, item_text, text_tokens
from features.vocabulary import Vocabulary
from serving.adjusters import Dialled
from serving.bitmap import clear_keys, clear_rows, first_allowed
from serving.config import ServeConfig
from serving.experiments import Holdout
from serving.filters import Blocked, Eligible, Excluded, Seen
from serving.golden import replay
from serving.hydrators import CatalogVersion, Profile, Progress, QueryVector, UserVector
from serving.index import Index
from serving.lexical import LexicalIndex
from serving.model import Model
from serving.pipeline import Filter, Hydrator, Pipeline, Scorer, Source, Tier
from serving.profiles import ProfileStore
from serving.reasons import Reasons
from serving.scorers import FeedScorer, Personal, RankScorer, SearchScorer, SimilarScorer
from serving.selectors import TopK
from serving.side_effects import Impressions, SlateSink
from serving.sources import (
    Fresh,
    GivenCandidates,
    ItemNeighbors,
    LiveItems,
    MatchingMeaning,
    MatchingWords,
    NearestToUser,
    Neighbors,
    NeighborsOfSeeds,
    Popular,
    PopularBeside,
    PopularInSegment,
    SimilarToSeeds,
    Wanted,
)
from serving.telemetry import Telemetry
from serving.turns import Turns
from serving.warm import warm_models, warm_pipelines

_FRESH = 50
CHOICES = ("add_to_cart", "purchase", "like", "rating")
"""Event types by which a person has chosen an item, whatever a bundle was trained on."""
_CANDIDATES = 500


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
    def actions(self) -> list[str]:
        """Names of the ranker's actions."""
        return [action["name"] for action in self.bundle.model["actions"]]


class Host:
    """Holds the engine in use."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine


@dataclass(frozen=True, slots=True)
class Surroundings:
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
    progress: Progress
    telemetry: Telemetry
    impressions: SlateSink | None = None
    turns: Turns = field(default_factory=lambda: Turns(1))


def open_engine(path: Path, around: Surroundings, bundle_id: str = "") -> Engine:
    """Opens a bundle, replays its golden requests and builds its pipelines.

    Args:
        path: Directory of the bundle.
        around: The process that it is opened in.
        bundle_id: The bundle that has to be there; empty where any will do.

    Raises:
        BundleError: The bundle is damaged, contradicts itself, or answers its golden requests wrongly.
        ConfigError: The device asked for is not there.
    """
    bundle = open_bundle(path, bundle_id)
    fingerprint = bundle.manifest["feature_set"]["fingerprint"]
    if fingerprint != FEATURES.fingerprint():
        raise BundleError(f"{path}: made for other features ({fingerprint[:12]}); export the run with this version")
    catalog, lexical = read_items(bundle)
    model, index = Model(bundle, around.config.device), Index(bundle.read("index.faiss"), catalog)
    replay(bundle, model, catalog, index)
    _warm_up(catalog, lexical)
    pipelines = _Builder(bundle, model, catalog, index, lexical, around).pipelines()
    warm_models(model, _shapes(bundle), _count(bundle, around.config))
    warm_pipelines(pipelines, catalog, [*bundle.model["event_types"], *CHOICES])
    return Engine(
        bundle=bundle,
        model=model,
        catalog=catalog,
        lexical=lexical,
        shapes=_shapes(bundle),
        pipelines=pipelines,
        event_types={event_type_key(name): name for name in bundle.model["event_types"]},
    )


class _Builder:
    """Builds the pipelines of a bundle: which stages each method has, in which order."""

    def __init__(
        self, bundle: Bundle, model: Model, catalog: Catalog, index: Index, lexical: LexicalIndex, around: Surroundings
    ) -> None:
        self._bundle, self._model, self._catalog = bundle, model, catalog
        self._index, self._lexical, self._around = index, lexical, around
        # As many as evaluation ranked, so that what was measured is what is served.
        self._count = _count(bundle, around.config)
        self._tables = _popular(bundle, len(catalog.vocabulary))
        self._neighbors = _neighbors(bundle, len(catalog.vocabulary))
        self._repeats = bool(bundle.model["repeats"])
        self._personal = personal(bundle, model, catalog, around.config.log_features if around.impressions else 0.0)
        self._words = QueryVector(model, _shapes(bundle))
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
                Wanted(catalog),
                PopularBeside(popular),
            ],
            filters=[Seen(catalog)],
            scorer=FeedScorer(self._personal),
        )

    def _search(self) -> Pipeline:
        return self._pipeline(
            hydrators=[*self._person(), self._words],
            tiers=[Tier("", [MatchingWords(self._lexical, self._count), MatchingMeaning(self._index, self._count)])],
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
        facts = self._bundle.model
        keys = type_index(facts["event_types"])
        # A live event of a type that training never saw counts as well; what is refused stays away in any case.
        told = CHOICES if not self._repeats else ()
        unknown = [name for name in told if name not in facts["event_types"]]
        names = {*NEGATIVE_EVENT_TYPES, *(() if self._repeats else facts["seen_types"]), *unknown}
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
    facts = bundle.model
    weights, blend = facts["action_weights"], float(facts["blend"])
    return Personal(model, catalog, Outcomes.of(facts), weights, blend, logged)


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
    return config.candidates or int(bundle.manifest["configuration"].get("candidates", _CANDIDATES))


def _shapes(bundle: Bundle) -> ItemInputShapes:
    return ItemInputShapes(**{name: int(bundle.model[name]) for name in ItemInputShapes.__slots__})


def read_items(bundle: Bundle) -> tuple[Catalog, LexicalIndex]:
    """The items of a bundle, and their words."""
    path = bundle.path
    vectors = _array(bundle, "vectors.npy", np.float32, (None, int(bundle.model["dim"])))
    if not np.isfinite(vectors).all():
        raise BundleError(f"{path / 'vectors.npy'}: holds NaN or infinity; train again")
    items, vocabulary = _table(bundle, "items.arrow"), Vocabulary.open(path / "vocabulary.arrow")
    if items.column("item_id").to_pylist() != vocabulary.ids(np.arange(len(vocabulary))):
        raise BundleError(f"{path}: vocabulary.arrow and items.arrow name other items; export the run again")
    _check_statistics(bundle, items)
    offsets = _array(bundle, "token_offsets.npy", np.int64, (len(vocabulary) + 1,))
    try:
        return Catalog(items, vocabulary, vectors), LexicalIndex(
            offsets, _array(bundle, "tokens.npy", np.uint32, (None,))
        )
    except ValueError as error:
        raise BundleError(f"{path}: {error}; export the run again") from error


def _check_statistics(bundle: Bundle, items: pa.Table) -> None:
    """A catalogue has statistics of just the bundle's actions, or none."""
    if "statistics" not in items.column_names:
        return
    wanted = pa.list_(pa.float32(), statistics_width(len(bundle.model["actions"])))
    column = items.column("statistics")
    if not column.type.equals(wanted) or column.null_count or not pc.all(pc.is_finite(pc.list_flatten(column))).as_py():
        raise BundleError(f"{bundle.path / 'items.arrow'}: its statistics fit no action of it; export the run again")


def _table(bundle: Bundle, name: str) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.BufferReader(bundle.read(name))).read_all()
    except pa.ArrowInvalid as error:
        raise BundleError(f"{bundle.path / name}: Arrow cannot read it ({error}); export the run again") from error


def _array(bundle: Bundle, name: str, dtype: Any, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """A numpy file of the bundle, of the promised type and shape (None = any)."""
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(bundle.read(name)), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BundleError(f"{bundle.path / name}: numpy cannot read it ({error}); export the run again") from error
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise BundleError(
            f"{bundle.path / name}: is {array.dtype} {list(array.shape)} instead of {np.dtype(dtype)} {list(shape)} "
            "(None = any); export the run again"
        )
    return array


def _popular(bundle: Bundle, size: int) -> dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """The rows that most people of a segment like, best first, and their scores; everybody is the segment ""."""
    table = _table(bundle, "popular.arrow")
    segments = table.column("segment").combine_chunks().dictionary_encode()
    rows = table.column("row").to_numpy().astype(np.int32)
    scores = table.column("score").to_numpy().astype(np.float32)
    _check_rows(bundle, "popular.arrow", rows, 0, size)
    of = segments.indices.to_numpy()
    order = np.argsort(of, kind="stable")
    parts = np.split(order, np.searchsorted(of[order], np.arange(1, len(segments.dictionary))))
    tables = {"": (rows[:0], scores[:0])}
    for name, part in zip(segments.dictionary.to_pylist(), parts, strict=False):
        tables[str(name)] = rows[part], scores[part]
    return tables


def _neighbors(bundle: Bundle, size: int) -> Neighbors:
    rows = _array(bundle, "neighbors.npy", np.int32, (size, None))
    scores = _array(bundle, "neighbor_scores.npy", np.float32, rows.shape)
    _check_rows(bundle, "neighbors.npy", rows, -1, size)
    return Neighbors(rows, scores)


def _check_rows(bundle: Bundle, name: str, rows: npt.NDArray[np.int32], low: int, size: int) -> None:
    if rows.size and not (rows.min() >= low and rows.max() < size):
        raise BundleError(f"{bundle.path / name}: names rows that the catalogue does not have; export the run again")
