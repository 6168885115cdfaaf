"""Calls a Penchant service from Python: typed arguments in, the contract's messages out.

    with Client("localhost:50051") as client:
        client.ingest([event("ann", "i42", "view_item")])
        slate = client.recommend(user_id="ann", page_size=10)

A call that finds the service unreachable is tried again until its time is over, always with the same request and event
ids, so that a retry never counts twice. A client may be shared by threads. It asks for the health of the service now
and then, to learn which worker each of its connections has reached.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Unpack

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from penchant.calls import FIRST_PAUSE_S, UNREACHABLE, ServiceCalls
from penchant.event_feed import EventFeed, add_ids
from penchant.requests import EventFields as EventFields
from penchant.requests import Options as Options
from penchant.requests import event as event
from penchant.requests import item_patch as item_patch
from penchant.requests import ranking_options
from penchant.v1 import catalog_pb2, common_pb2, event_pb2, profile_pb2, ranking_pb2

Meaning = TypeVar("Meaning")
# A write is answered once it is on disk, which takes longer than an answer to a request.
_WRITE_S = 5.0

_PURPOSES = {
    "personalise": profile_pb2.PURPOSE_PERSONALISE,
    "train": profile_pb2.PURPOSE_TRAIN,
    "measure": profile_pb2.PURPOSE_MEASURE,
}
_KINDS = {
    "item": profile_pb2.CONTROL_KIND_ITEM,
    "creator": profile_pb2.CONTROL_KIND_CREATOR,
    "category": profile_pb2.CONTROL_KIND_CATEGORY,
}


def violations(error: grpc.RpcError) -> dict[str, str]:
    """Returns what is wrong with a request that was refused as INVALID_ARGUMENT: field path -> what would be right."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    corrections: dict[str, str] = {}
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            corrections.update({violation.field: violation.description for violation in request.field_violations})
    return corrections


class Client(ServiceCalls):
    """A client of one service.

    Args:
        target: `HOST:PORT`, or any gRPC target.
        token: Secret of the service, if it wants one.
        channels: Connections to hold, each to another worker if there are as many; calls take them in turn.
        timeout_s: Time a call may take, retries included, unless the call says otherwise.
        root_certificates: PEM roots to trust; with them, the connection is TLS.
        batch: Rankings give way to interactive ones of other clients: where there is too much, these are refused first.
    """

    def recommend(self, **options: Unpack[Options]) -> ranking_pb2.Slate:
        """Returns a feed for a user."""
        request = ranking_pb2.RecommendRequest(options=ranking_options(options, "recommend"))
        return self._call(lambda stubs: stubs.ranking.Recommend, request, options.get("timeout_s")).slate

    def search(self, query: str, **options: Unpack[Options]) -> ranking_pb2.Slate:
        """Returns items for a query, ordered for the user if the options name one."""
        request = ranking_pb2.SearchRequest(options=ranking_options(options, "search"), query=query)
        return self._call(lambda stubs: stubs.ranking.Search, request, options.get("timeout_s")).slate

    def rank(
        self,
        item_ids: Sequence[str],
        upstream_scores: Sequence[float] = (),
        *,
        query: str = "",
        upstream_weight: float | None = None,
        **options: Unpack[Options],
    ) -> ranking_pb2.Slate:
        """Returns the caller's candidates in the user's order; `page_size` defaults to all of them, at most 100."""
        # A caller that sends candidates wants all of them back in order, not the 20 of a feed.
        options.setdefault("page_size", max(min(len(item_ids), 100), 1))
        request = ranking_pb2.RankRequest(
            options=ranking_options(options, "rank"),
            candidates=ranking_pb2.Candidates(item_ids=item_ids, upstream_scores=upstream_scores),
            query=query,
            upstream_weight=upstream_weight,
        )
        return self._call(lambda stubs: stubs.ranking.Rank, request, options.get("timeout_s")).slate

    def similar_items(self, seed_item_ids: Sequence[str], **options: Unpack[Options]) -> ranking_pb2.Slate:
        """Returns items like one or several seeds."""
        request = ranking_pb2.SimilarItemsRequest(
            options=ranking_options(options, "similar_items"), seed_item_ids=seed_item_ids
        )
        return self._call(lambda stubs: stubs.ranking.SimilarItems, request, options.get("timeout_s")).slate

    def ingest(
        self, events: Iterable[event_pb2.Event], *, timeout_s: float | None = None
    ) -> Sequence[event_pb2.EventStatus]:
        """Appends events durably; one status each. Events without an id get one.

        Unless the call says otherwise it may take five seconds: a thousand events are on disk when it ends.
        """
        request = event_pb2.IngestRequest(events=events)
        add_ids(request.events)
        patience = max(self._timeout_s, _WRITE_S) if timeout_s is None else timeout_s
        return self._call(lambda stubs: stubs.events.Ingest, request, patience).statuses

    def ingest_stream(
        self, events: Iterable[event_pb2.Event], *, batch: int = 500, timeout_s: float = 30.0
    ) -> Iterator[event_pb2.EventStatus]:
        """Appends any number of events durably, as fast as the service takes them; one status each, in their order.

        A stream that breaks is opened again, and batches without an answer are sent again with the same ids.

        Args:
            events: Events to append; read no faster than they are sent. Events without an id get one.
            batch: Events that are sent, and answered, together; at most 1,000, and fewer if they are large.
            timeout_s: Longest time without an answer.

        Raises:
            grpc.RpcError: No answer came within that time, or the service refuses a batch as a whole.
        """
        feed = EventFeed(events, batch)
        pause, answered_at = FIRST_PAUSE_S, time.monotonic()
        while True:
            connection = self._connections.take()
            call = connection.stubs.events.IngestStream(feed.requests(), timeout=timeout_s, metadata=self._metadata)
            try:
                for response in call:
                    feed.answered()
                    pause = FIRST_PAUSE_S
                    yield from response.statuses
                    answered_at = time.monotonic()  # the time that the caller took is not the service's
                return
            except grpc.RpcError as error:
                feed.raise_its_error()
                # A stream lives no longer than its deadline; one that got answers is only continued.
                retry = error.code() in (*UNREACHABLE, grpc.StatusCode.DEADLINE_EXCEEDED) or _has_room_later(error)
                if not retry or time.monotonic() - answered_at >= timeout_s:
                    raise
            finally:
                call.cancel()  # type: ignore[no-untyped-call]
                self._connections.done(connection)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 1.0)

    def get_profile(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float | None = None
    ) -> profile_pb2.GetProfileResponse:
        """Returns what is known of a user, as they would read it."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.GetProfileRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.GetProfile, request, timeout_s)

    def erase(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float | None = None
    ) -> profile_pb2.EraseSubjectResponse:
        """Erases a user; the certificate has one receipt per store."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.EraseSubjectRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.EraseSubject, request, timeout_s or 5.0)

    def get_erasure_certificate(
        self, certificate_id: str, *, timeout_s: float = 5.0
    ) -> profile_pb2.GetErasureCertificateResponse:
        """Returns the certificate of an erasure as it is now: the dates come as the bytes leave the disks."""
        request = profile_pb2.GetErasureCertificateRequest(certificate_id=certificate_id)
        return self._call(lambda stubs: stubs.profiles.GetErasureCertificate, request, timeout_s)

    def set_consent(
        self, purposes: Iterable[str], user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.SetConsentResponse:
        """Sets what a user's data may be used for: any of "personalise", "train", "measure", or nothing.

        Raises:
            ValueError: A purpose is none of these.
        """
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        allowed = [_named(purpose, _PURPOSES) for purpose in purposes]
        request = profile_pb2.SetConsentRequest(subject=subject, purposes=allowed)
        return self._call(lambda stubs: stubs.profiles.SetConsent, request, timeout_s)

    def set_controls(
        self,
        hidden: Iterable[tuple[str, str, int]],
        user_id: str = "",
        *,
        dials: common_pb2.Dials | None = None,
        anonymous_id: str = "",
        timeout_s: float = 5.0,
    ) -> profile_pb2.SetControlsResponse:
        """Sets the controls of a user, in place of all that were set before.

        Args:
            hidden: Blocks and mutes: "item", "creator" or "category", its id or name, and its end, ms; 0 is never.
            user_id: The user.
            dials: Their dials, for example `Dials(novelty=0.5, categories={"Horror": -1})`.
            anonymous_id: Or the anonymous user.
            timeout_s: Longest wait.

        Raises:
            ValueError: A kind is none of these.
        """
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        controls = [
            profile_pb2.Control(kind=_named(kind, _KINDS), id=name, until_ms=until) for kind, name, until in hidden
        ]
        request = profile_pb2.SetControlsRequest(subject=subject, hidden=controls, dials=dials)
        return self._call(lambda stubs: stubs.profiles.SetControls, request, timeout_s)

    def set_attributes(
        self, attributes: Mapping[str, str], user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.SetAttributesResponse:
        """Sets the attributes of a user, in place of all that were set before; `{}` removes them."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.SetAttributesRequest(subject=subject, attributes=attributes)
        return self._call(lambda stubs: stubs.profiles.SetAttributes, request, timeout_s)

    def get_controls(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.GetControlsResponse:
        """Returns the controls of a user."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.GetControlsRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.GetControls, request, timeout_s)

    def reset_learning(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.ResetLearningResponse:
        """Empties a user's profile."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.ResetLearningRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.ResetLearning, request, timeout_s)

    def undo_event(
        self, event_id: str, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.UndoEventResponse:
        """Takes one event of a user back, so that it counts no more."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.UndoEventRequest(subject=subject, event_id=event_id)
        return self._call(lambda stubs: stubs.profiles.UndoEvent, request, timeout_s)

    def merge_identities(
        self, anonymous_id: str, user_id: str, *, timeout_s: float = 10.0
    ) -> profile_pb2.MergeIdentitiesResponse:
        """Moves the events of an anonymous user to the user that they have logged in as."""
        request = profile_pb2.MergeIdentitiesRequest(anonymous_id=anonymous_id, user_id=user_id)
        return self._call(lambda stubs: stubs.profiles.MergeIdentities, request, timeout_s)

    def export_subject(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 10.0
    ) -> Iterator[dict[str, Any]]:
        """Yields every document that is held about a user; `kind` names its sort. `timeout_s` is per page."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.ExportSubjectRequest(subject=subject)
        while True:
            page = self._call(lambda stubs: stubs.profiles.ExportSubject, request, timeout_s)
            yield from map(json.loads, page.documents)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def put_items(self, items: Iterable[catalog_pb2.Item], *, timeout_s: float = 5.0) -> catalog_pb2.PutItemsResponse:
        """Puts whole items: new ones, or in place of others, which lose every field that is not given again."""
        request = catalog_pb2.PutItemsRequest(items=items)
        return self._call(lambda stubs: stubs.catalog.PutItems, request, timeout_s)

    def patch_items(
        self, patches: Iterable[catalog_pb2.ItemPatch], *, timeout_s: float = 5.0
    ) -> catalog_pb2.PatchItemsResponse:
        """Changes single fields of items and leaves the others as they are; `item_patch` makes a patch."""
        request = catalog_pb2.PatchItemsRequest(patches=patches)
        return self._call(lambda stubs: stubs.catalog.PatchItems, request, timeout_s)

    def get_items(
        self, item_ids: Iterable[str], *, min_catalog_version: int = 0, timeout_s: float = 5.0
    ) -> catalog_pb2.GetItemsResponse:
        """Returns items as the catalogue has them now, with its version; ids that it does not have are named."""
        request = catalog_pb2.GetItemsRequest(item_ids=item_ids, min_catalog_version=min_catalog_version)
        return self._call(lambda stubs: stubs.catalog.GetItems, request, timeout_s)

    def set_availability(
        self, changes: Iterable[catalog_pb2.Availability], *, timeout_s: float = 5.0
    ) -> catalog_pb2.SetAvailabilityResponse:
        """Sets whether and when items may be shown."""
        request = catalog_pb2.SetAvailabilityRequest(changes=changes)
        return self._call(lambda stubs: stubs.catalog.SetAvailability, request, timeout_s)

    def delete_items(self, item_ids: Iterable[str], *, timeout_s: float = 5.0) -> catalog_pb2.DeleteItemsResponse:
        """Deletes items: they are never shown again."""
        request = catalog_pb2.DeleteItemsRequest(item_ids=item_ids)
        return self._call(lambda stubs: stubs.catalog.DeleteItems, request, timeout_s)


def _named(name: str, meanings: Mapping[str, Meaning]) -> Meaning:
    if name not in meanings:
        raise ValueError(f"{name!r} is none of {', '.join(meanings)}")
    return meanings[name]


def _has_room_later(error: grpc.RpcError) -> bool:
    """Returns True if the service is full for now."""
    # A message that is too large for it is refused with the same code, but without a time to try again.
    hints = error.trailing_metadata() or ()
    full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return full and any(hint.key == "grpc-retry-pushback-ms" for hint in hints)
