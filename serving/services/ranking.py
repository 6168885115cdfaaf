"""RankingService: feeds, searches, re-rankings and similar items; each is a `Request` through its `Pipeline`."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.clock import now_ms
from features.declarations import zone_of
from features.keys import item_key
from penchant.v1 import common_pb2, ranking_pb2, ranking_pb2_grpc
from serving.concurrency import ConcurrencyLimit
from serving.engine.engine import Engine, EngineRef
from serving.errors import InvalidArgument
from serving.experiments import Assignment, Holdout
from serving.pipeline.hydrators import WAIT_SHARE
from serving.pipeline.request import Request, Unknown
from serving.pipeline.results import Reason, Slate
from serving.services import validation as checks
from serving.services.items import item_fields, shown_items
from serving.services.page import page_bytes, warm_page
from serving.stores.catalog_log import CatalogProgress

MAX_PAGE = 100
MAX_EXCLUDED = 10_000
MAX_CANDIDATES = 5_000
MAX_SEEDS = 100

_NO_ROWS = np.empty(0, np.int32)

_RUNGS = {
    "popular": common_pb2.RUNG_POPULAR,
    "segment": common_pb2.RUNG_SEGMENT,
    "item_to_item": common_pb2.RUNG_ITEM_TO_ITEM,
    "sequence": common_pb2.RUNG_SEQUENCE,
}


class RankingService(ranking_pb2_grpc.RankingServiceServicer):
    """Ranks feeds, search results and other engines' hits."""

    def __init__(
        self,
        engine_ref: EngineRef,
        holdout: Holdout,
        default_deadline_s: float,
        progress: CatalogProgress,
        limit: ConcurrencyLimit,
    ) -> None:
        """Takes the engine, how arms are drawn, how far the catalogue was followed, and the limit of rankings."""
        self._engine_ref, self._holdout, self._default_deadline_s = engine_ref, holdout, default_deadline_s
        self._progress, self._limit = progress, limit
        warm_page()

    def Recommend(
        self, request: ranking_pb2.RecommendRequest, context: grpc.ServicerContext
    ) -> ranking_pb2.RecommendResponse:
        """Retrieves and ranks a feed for a user."""
        engine = self._engine_ref.engine
        feed, missing, fields = self._request(
            "recommend", request.options, engine.catalog, context, subject_required=True
        )
        return ranking_pb2.RecommendResponse(slate=_slate(feed, missing, fields, engine))

    def Search(self, request: ranking_pb2.SearchRequest, context: grpc.ServicerContext) -> ranking_pb2.SearchResponse:
        """Finds items for a query and orders them for this user."""
        engine = self._engine_ref.engine
        base, missing, fields = self._request("search", request.options, engine.catalog, context)
        search = replace(base, text=checks.text(request.query, "query", required=True))
        return ranking_pb2.SearchResponse(slate=_slate(search, missing, fields, engine))

    def Rank(self, request: ranking_pb2.RankRequest, context: grpc.ServicerContext) -> ranking_pb2.RankResponse:
        """Re-ranks the caller's candidates; of a repeated id, the first place counts.

        An id that the catalogue does not have keeps the place that the caller gave it, unless it is excluded.
        """
        engine = self._engine_ref.engine
        base, missing, fields = self._request("rank", request.options, engine.catalog, context)
        ids = checks.identifiers(request.candidates.item_ids, "candidates.item_ids", 1, MAX_CANDIDATES)
        upstream = checks.finite(request.candidates.upstream_scores, "candidates.upstream_scores")
        checks.same_length(upstream, ids, "candidates.upstream_scores", "candidates.item_ids")
        text, weight = checks.text(request.query, "query"), base.upstream_weight
        if request.HasField("upstream_weight"):
            weight = checks.number(request.upstream_weight, "upstream_weight", 0.0)
        checks.weighted(upstream, weight, "upstream_weight", "candidates.upstream_scores")
        rows = _rows(engine.catalog, ids, missing)
        _, first = np.unique(rows, return_index=True)
        # `unique` sorts by row; the order of the caller is restored, as it decides ties.
        first = np.sort(first[rows[first] >= 0])
        ranked = replace(
            base,
            text=text,
            rows=rows[first],
            upstream=upstream[first] if upstream.size else None,
            upstream_weight=weight,
            unknown=_unknown(ids, rows, upstream, first),
        )
        return ranking_pb2.RankResponse(slate=_slate(ranked, missing, fields, engine))

    def SimilarItems(
        self, request: ranking_pb2.SimilarItemsRequest, context: grpc.ServicerContext
    ) -> ranking_pb2.SimilarItemsResponse:
        """Finds items like one or several seeds."""
        engine = self._engine_ref.engine
        base, missing, fields = self._request("similar", request.options, engine.catalog, context)
        rows = _rows(engine.catalog, checks.identifiers(request.seed_item_ids, "seed_item_ids", 1, MAX_SEEDS), missing)
        similar = replace(base, seeds=np.unique(rows[rows >= 0]))
        return ranking_pb2.SimilarItemsResponse(slate=_slate(similar, missing, fields, engine))

    def _request(
        self,
        method: str,
        options: ranking_pb2.RankingOptions,
        catalog: Catalog,
        context: grpc.ServicerContext,
        *,
        subject_required: bool = False,
    ) -> tuple[Request, dict[str, None], Sequence[str]]:
        """Returns the request of the options, the ids that the catalogue does not have, in order, and `fields`."""
        _check_names(options)
        subject = checks.subject(options.subject, "options.subject", required=subject_required)
        page_size = checks.whole(options.page_size, "options.page_size", 1, MAX_PAGE)
        excluded = checks.identifiers(options.exclude_item_ids, "options.exclude_item_ids", 0, MAX_EXCLUDED)
        begun = time.monotonic()
        deadline = begun + seconds_left(context, self._default_deadline_s)
        self._await_catalog(options.min_catalog_version, deadline)
        missing: dict[str, None] = {}
        rows = _rows(catalog, excluded, missing)
        request = Request(
            request_id=options.request_id or uuid.uuid4().hex,
            subject=subject,
            # The server's clock alone decides which items are available.
            now_ms=now_ms(),
            deadline=deadline,
            page_size=page_size,
            begun=begun,
            method=method,
            surface=options.surface,
            session_id=options.session_id,
            context=_context(options.context),
            exclude=rows[rows >= 0],
            # Candidates that the catalogue does not have are excluded by id, because they have no row.
            exclude_unknown=frozenset(missing),
            personalize=options.personalization != ranking_pb2.PERSONALIZATION_DISABLED,
            dials={
                (dial.dial, item_key(dial.name)): dial.value for dial in checks.dials(options.dials, "options.dials")
            },
            explain=options.explain,
            assignment=self._holdout.assign(subject),
            min_profile_version=options.min_profile_version,
            min_catalog_version=options.min_catalog_version,
        )
        return request, missing, item_fields(options.fields, "options.fields") if options.fields else ()

    def _await_catalog(self, version: int, deadline: float) -> None:
        """Waits for the version of the catalogue that the caller wants to see, for a share of the time left."""
        # Before any id is looked up: one that this version puts would count as unknown and, though excluded, be shown.
        if version > self._progress.version:
            # Another call works meanwhile, as nothing here needs a core.
            with self._limit.released():
                self._progress.wait(version, (deadline - time.monotonic()) * WAIT_SHARE)


def _check_names(options: ranking_pb2.RankingOptions) -> None:
    checks.identifier(options.request_id, "options.request_id", required=False)
    checks.identifier(options.session_id, "options.session_id", required=False)
    checks.identifier(options.surface, "options.surface", required=False, limit=64)
    if options.personalization not in ranking_pb2.Personalization.values():
        names = ", ".join(ranking_pb2.Personalization.keys())
        raise InvalidArgument("options.personalization", f"must be one of {names}, got {options.personalization}")


def _context(message: common_pb2.RequestContext) -> dict[str, Any]:
    """Returns the context of a request by column of the impressions, without the fields that are not set."""
    context: dict[str, Any] = {
        name: checks.identifier(getattr(message, name), f"options.context.{name}", required=False, limit=64)
        for name in ("device", "channel", "locale")
    }
    zone = checks.identifier(message.time_zone, "options.context.time_zone", required=False, limit=64)
    if zone and zone_of(zone) is None:
        raise InvalidArgument("options.context.time_zone", f"{zone!r} is no IANA name, such as Europe/Vienna")
    context["time_zone"] = zone
    context["asked_at"] = checks.timestamp(message.timestamp_ms, "options.context.timestamp_ms")
    context["attributes"] = checks.attributes(message.attributes, "options.context.attributes")
    return {name: value for name, value in context.items() if value}


def seconds_left(context: grpc.ServicerContext, default: float) -> float:
    """Returns the time until the caller's deadline; the default if it set none."""
    left = context.time_remaining()
    return default if left > 1e6 else left  # gRPC gives a call without a deadline some centuries


def _rows(catalog: Catalog, ids: Sequence[str], missing: dict[str, None]) -> npt.NDArray[np.int32]:
    """Returns the row of each id; ids without one have row -1 and are added to `missing`."""
    if not ids:
        return _NO_ROWS
    rows = catalog.rows(ids)
    for at in np.flatnonzero(rows < 0).tolist():
        missing[ids[at]] = None
    return rows


def _unknown(
    ids: Sequence[str], rows: npt.NDArray[np.int32], upstream: npt.NDArray[np.float32], with_row: npt.NDArray[np.intp]
) -> tuple[Unknown, ...]:
    """Returns the candidates without a row, each once, in the caller's order: by its scores, else that of the list.

    Args:
        ids: The candidates.
        rows: Their rows, -1 for those that the catalogue does not have; int32 [n].
        upstream: Their scores; float32 [n] or [0].
        with_row: Positions of the candidates with a row, each once; intp [k].
    """
    without_row = np.flatnonzero(rows < 0)
    if not without_row.size:
        return ()
    _, first = np.unique([ids[at] for at in without_row.tolist()], return_index=True)
    without_row = without_row[np.sort(first)]
    positions = np.sort(np.concatenate([with_row, without_row]))
    order = positions[np.argsort(-upstream[positions], kind="stable")] if upstream.size else positions
    # Its place on the page is the number of ranked candidates above it in the caller's order.
    above = np.cumsum(rows[order] >= 0).tolist()
    scores = upstream.tolist() if upstream.size else [math.nan] * len(ids)
    places = zip(order.tolist(), above, strict=True)
    return tuple(Unknown(ids[at], place, scores[at]) for at, place in places if rows[at] < 0)


def _slate(request: Request, missing: dict[str, None], fields: Sequence[str], engine: Engine) -> ranking_pb2.Slate:
    """Runs a request and returns the slate as the contract has it, with the named fields of its items."""
    slate = engine.pipelines[request.method].run(request)
    profile = slate.user.profile
    message = ranking_pb2.Slate(
        request_id=request.request_id,
        rung=_RUNGS[slate.rung],
        experiment=_experiment(slate.user.assignment),
        bundle_id=engine.bundle_id,
        profile_version=profile.version if profile else 0,
        catalog_version=slate.user.catalog_version,
        degraded=[
            common_pb2.Degradation(part=common_pb2.Part.Value(f"PART_{part}"), reason=reason)
            for part, reason in slate.degraded
        ],
        dropped=slate.dropped,
        missing_item_ids=missing,
        stage_timings=[ranking_pb2.StageTiming(stage=name, microseconds=spent) for name, spent in slate.timings],
        action_names=engine.actions,
        profile_found=bool(profile and profile.count),
        consent_withheld=slate.user.withheld,
    )
    _add_items(message, slate, engine.catalog, fields)
    return message


def _experiment(assignment: Assignment) -> common_pb2.Experiment | None:
    if not assignment.arm:
        return None
    return common_pb2.Experiment(arm=assignment.arm, holdout=assignment.holdout, bucket=assignment.bucket)


def _add_items(message: ranking_pb2.Slate, slate: Slate, catalog: Catalog, fields: Sequence[str]) -> None:
    """Adds the items of a page to its message, with the named fields of each."""
    candidates = slate.candidates
    # A source that has not proposed an item has no score for it.
    proposed = np.isfinite(candidates.scores).T
    ids = catalog.ids(slate.rows)
    page = page_bytes(ids, slate.scores, slate.propensities, slate.probabilities, candidates.names, proposed)
    message.MergeFromString(page)
    for ranked, reasons in zip(message.items, slate.reasons, strict=False):
        ranked.reasons.extend(_reason(reason, catalog) for reason in reasons)
    if fields:
        for ranked, item in zip(message.items, shown_items(catalog, slate.rows, fields), strict=True):
            ranked.item.CopyFrom(item)
    for unknown in slate.unknown:
        kept = ranking_pb2.RankedItem(item_id=unknown.item_id, score=math.nan, propensity=1.0)
        message.items.insert(unknown.place, kept)


def _reason(reason: Reason, catalog: Catalog) -> ranking_pb2.Reason:
    item_id = catalog.ids([reason.row])[0] if reason.row >= 0 else ""
    return ranking_pb2.Reason(kind=reason.kind, item_id=item_id, text=reason.text, weight=reason.weight)
