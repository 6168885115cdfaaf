"""Calls a Penchant service from Python: typed arguments in, the contract's messages out.

    with Client("localhost:50051") as client:
        client.ingest([event("ann", "i42", "view_item")])
        slate = client.recommend(user_id="ann", page_size=10)

A call that finds the service away is tried again until its time is over, always with the same request and event ids,
so that a retry never counts twice. A client may be shared by threads. It asks for the health of the service now and
then, to learn which worker each of its connections has reached.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from penchant.channels import channel_options
from penchant.connections import Connection, Connections
from penchant.requests import EventFields as EventFields
from penchant.requests import Options as Options
from penchant.requests import event as event
from penchant.requests import item_patch as item_patch
from penchant.requests import ranking_options
from penchant.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    common_pb2,
    event_pb2,
    event_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

Request = TypeVar("Request")
Response = TypeVar("Response")
Meaning = TypeVar("Meaning")
_FIRST_PAUSE_S = 0.005
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

# Half of what a service takes in one message unless it is told otherwise.
_BATCH_BYTES = 2 << 20


# A server that stops cancels the calls that it has not begun.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def violations(error: grpc.RpcError) -> dict[str, str]:
    """What an INVALID_ARGUMENT says: field path -> what would be right."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    found: dict[str, str] = {}
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            found.update({violation.field: violation.description for violation in request.field_violations})
    return found


class Client:
    """A connection to one service.

    Args:
        target: `HOST:PORT`, or any gRPC target.
        token: Secret of the service, where it wants one.
        channels: Connections to hold, each to a worker of its own where there are as many; calls go round them.
        timeout_s: Time a call may take, retries included, unless the call says otherwise.
        root_certificates: PEM roots to trust; given, the connection is TLS.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        channels: int = 2,
        timeout_s: float = 0.25,
        root_certificates: bytes | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        opened = partial(_open, target, root_certificates)
        self._connections = Connections(opened, _Stubs, max(channels, 1))

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._connections.close()

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Waits until every connection stands; raises grpc.FutureTimeoutError when the time is over."""
        self._connections.wait_ready(timeout_s)

    def recommend(self, **options: Unpack[Options]) -> ranking_pb2.Slate:
        """A feed for a person."""
        request = ranking_pb2.RecommendRequest(options=ranking_options(options, "recommend"))
        return self._call(lambda stubs: stubs.ranking.Recommend, request, options.get("timeout_s")).slate

    def search(self, query: str, **options: Unpack[Options]) -> ranking_pb2.Slate:
        """Items for a query, ordered for the person where one is named."""
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
        """The caller's candidates, ordered for the person; `page_size` defaults to all of them, at most 100."""
        options.setdefault("page_size", max(min(len(item_ids), 100), 1))
        request = ranking_pb2.RankRequest(
            options=ranking_options(options, "rank"),
            candidates=ranking_pb2.Candidates(item_ids=item_ids, upstream_scores=upstream_scores),
            query=query,
            upstream_weight=upstream_weight,
        )
        return self._call(lambda stubs: stubs.ranking.Rank, request, options.get("timeout_s")).slate

    def similar_items(self, seed_item_ids: Sequence[str], **options: Unpack[Options]) -> ranking_pb2.Slate:
        """Items like one or several seeds."""
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
        for one in request.events:
            one.event_id = one.event_id or uuid.uuid4().hex
        patience = max(self._timeout_s, _WRITE_S) if timeout_s is None else timeout_s
        return self._call(lambda stubs: stubs.events.Ingest, request, patience).statuses

    def ingest_stream(
        self, events: Iterable[event_pb2.Event], *, batch: int = 500, timeout_s: float = 30.0
    ) -> Iterator[event_pb2.EventStatus]:
        """Appends any number of events durably, as fast as the service takes them; one status each, in their order.

        A stream that breaks is opened again, and what it had not answered is sent again with the same ids.

        Args:
            events: What to append; read no faster than it is sent. Events without an id get one.
            batch: Events that are sent, and answered, together; at most 1,000, and fewer where they are large.
            timeout_s: Longest time without an answer.

        Raises:
            grpc.RpcError: No answer came for so long, or the service refuses a batch as a whole.
        """
        feed = _Feed(events, batch)
        pause, said = _FIRST_PAUSE_S, time.monotonic()
        while True:
            connection = self._connections.take()
            call = connection.stubs.events.IngestStream(feed.requests(), timeout=timeout_s, metadata=self._metadata)
            try:
                for response in call:
                    feed.answered()
                    pause = _FIRST_PAUSE_S
                    yield from response.statuses
                    said = time.monotonic()  # the time that the caller took is not the service's
                return
            except grpc.RpcError as error:
                feed.raise_its_error()
                # A stream lives no longer than its deadline; one that got answers is only continued.
                again = error.code() in (*_AWAY, grpc.StatusCode.DEADLINE_EXCEEDED) or _has_room_later(error)
                if not again or time.monotonic() - said >= timeout_s:
                    raise
            finally:
                call.cancel()  # type: ignore[no-untyped-call]
                self._connections.done(connection)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 1.0)

    def get_profile(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float | None = None
    ) -> profile_pb2.GetProfileResponse:
        """What is known of a person, as they would read it."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.GetProfileRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.GetProfile, request, timeout_s)

    def erase(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float | None = None
    ) -> profile_pb2.EraseSubjectResponse:
        """Forgets a person; the certificate has one receipt per store."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.EraseSubjectRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.EraseSubject, request, timeout_s or 5.0)

    def get_erasure_certificate(
        self, certificate_id: str, *, timeout_s: float = 5.0
    ) -> profile_pb2.GetErasureCertificateResponse:
        """The certificate of an erasure as it is now: the dates come as the bytes leave the disks."""
        request = profile_pb2.GetErasureCertificateRequest(certificate_id=certificate_id)
        return self._call(lambda stubs: stubs.profiles.GetErasureCertificate, request, timeout_s)

    def set_consent(
        self, purposes: Iterable[str], user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.SetConsentResponse:
        """Sets what a person's data may be used for: any of "personalise", "train", "measure", or nothing.

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
        """Sets how a person wants their answers made, in place of all that was set before.

        Args:
            hidden: For each thing "item", "creator" or "category", its id or name, and until when, ms; 0 is for ever.
            user_id: The person.
            dials: Their dials, for example `Dials(novelty=0.5, categories={"Horror": -1})`.
            anonymous_id: Or the visitor.
            timeout_s: Longest wait.

        Raises:
            ValueError: A thing is none of these.
        """
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        controls = [
            profile_pb2.Control(kind=_named(kind, _KINDS), id=name, until_ms=until) for kind, name, until in hidden
        ]
        request = profile_pb2.SetControlsRequest(subject=subject, hidden=controls, dials=dials)
        return self._call(lambda stubs: stubs.profiles.SetControls, request, timeout_s)

    def get_controls(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.GetControlsResponse:
        """Shows how a person wants their answers made."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.GetControlsRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.GetControls, request, timeout_s)

    def reset_learning(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.ResetLearningResponse:
        """Empties a person's profile."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.ResetLearningRequest(subject=subject)
        return self._call(lambda stubs: stubs.profiles.ResetLearning, request, timeout_s)

    def undo_event(
        self, event_id: str, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 5.0
    ) -> profile_pb2.UndoEventResponse:
        """Makes one event of a person count no more."""
        subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
        request = profile_pb2.UndoEventRequest(subject=subject, event_id=event_id)
        return self._call(lambda stubs: stubs.profiles.UndoEvent, request, timeout_s)

    def merge_identities(
        self, anonymous_id: str, user_id: str, *, timeout_s: float = 10.0
    ) -> profile_pb2.MergeIdentitiesResponse:
        """Moves what a visitor did to the person they turn out to be."""
        request = profile_pb2.MergeIdentitiesRequest(anonymous_id=anonymous_id, user_id=user_id)
        return self._call(lambda stubs: stubs.profiles.MergeIdentities, request, timeout_s)

    def export_subject(
        self, user_id: str = "", *, anonymous_id: str = "", timeout_s: float = 10.0
    ) -> Iterator[dict[str, Any]]:
        """Everything that is held about a person, one thing at a time; `kind` says of what. `timeout_s` is per page."""
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

    def _call(
        self,
        pick: Callable[[_Stubs], grpc.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        timeout_s: float | None,
    ) -> Response:
        """Calls until an answer, an error that is no absence, or the end of the time; a try takes the next channel.

        A connection that does not stand gets a part of the time only: what it has not begun, another one can do.
        """
        end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        pause = _FIRST_PAUSE_S
        away: grpc.RpcError | None = None
        connection: Connection[_Stubs] | None = None
        while True:
            connection = self._connections.take(connection)
            left = max(end - time.monotonic(), 0.001)
            given = connection.attempt_s(left)
            try:
                return pick(connection.stubs)(request, timeout=given, metadata=self._metadata)
            except grpc.RpcError as error:
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if late and given < left and time.monotonic() < end:
                    self._connections.stuck(connection)
                    continue
                if away and late:
                    # The last try had no time of its own: what kept it from an answer is what the others met.
                    raise away from None
                wait = pause * random.uniform(0.5, 1.5)
                if error.code() not in _AWAY or time.monotonic() + wait >= end:
                    raise
                away = error
            finally:
                self._connections.done(connection)
            time.sleep(wait)
            pause = min(2 * pause, 0.1)


class _Stubs:
    """What is called on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.ranking = ranking_pb2_grpc.RankingServiceStub(channel)
        self.events = event_pb2_grpc.EventServiceStub(channel)
        self.profiles = profile_pb2_grpc.ProfileServiceStub(channel)
        self.catalog = catalog_pb2_grpc.CatalogServiceStub(channel)


class _Feed:
    """The batches of a stream: each is kept until it is answered, so that another stream can go on with it."""

    def __init__(self, events: Iterable[event_pb2.Event], size: int) -> None:
        self._events, self._size = iter(events), size
        self._waiting: deque[event_pb2.IngestStreamRequest] = deque()
        self._done = self._stream = 0
        self._error: BaseException | None = None
        self._lock, self._taking = threading.Lock(), threading.Lock()

    def requests(self) -> Iterator[event_pb2.IngestStreamRequest]:
        """What a new stream sends: what is not answered yet, then what follows; ends when a newer stream begins."""
        with self._lock:
            self._stream += 1
            stream, place = self._stream, self._done
        while (request := self._at(stream, place)) is not None:
            yield request
            place += 1

    def answered(self) -> None:
        """The oldest batch is durable."""
        with self._lock:
            self._waiting.popleft()
            self._done += 1

    def raise_its_error(self) -> None:
        """Raises what the caller's own events raised, which ended the stream."""
        if self._error:
            raise self._error

    def _at(self, stream: int, place: int) -> event_pb2.IngestStreamRequest | None:
        with self._taking:
            with self._lock:
                if stream != self._stream:
                    return None
                at = place - self._done
                if at < len(self._waiting):
                    return self._waiting[at]
            request = event_pb2.IngestStreamRequest()
            try:
                self._fill(request)
            except BaseException as error:
                self._error = error
                raise
            for one in request.events:
                one.event_id = one.event_id or uuid.uuid4().hex
            if not request.events:
                return None
            with self._lock:
                self._waiting.append(request)
            return request

    def _fill(self, request: event_pb2.IngestStreamRequest) -> None:
        """Adds the next events, until it holds as many as a batch may, or as many bytes."""
        size = 0
        for one in itertools.islice(self._events, self._size):
            request.events.append(one)
            size += one.ByteSize()
            if size >= _BATCH_BYTES:
                return


def _named(name: str, known: Mapping[str, Meaning]) -> Meaning:
    if name not in known:
        raise ValueError(f"{name!r} is none of {', '.join(known)}")
    return known[name]


def _has_room_later(error: grpc.RpcError) -> bool:
    """Whether the service is full for now; a message that is too large for it comes without a time to come back."""
    hints = error.trailing_metadata() or ()
    full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return full and any(hint.key == "grpc-retry-pushback-ms" for hint in hints)


def _open(target: str, root_certificates: bytes | None, number: int) -> grpc.Channel:
    options = [
        ("penchant.channel", number),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        # gRPC's own pause of a second before it connects again is longer than a call may take.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 2000),
        *channel_options(target),
    ]
    if root_certificates is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(root_certificates), options=options)
