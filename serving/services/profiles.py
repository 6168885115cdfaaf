"""ProfileService: shows people what is known of them, and does what they ask for."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict

from features.catalog import Catalog
from features.catalog_names import look_up
from features.controls import FOR_EVER, MAX_CONTROLS, ControlKind, Dial
from features.decayed_counts import DIMENSIONS, HORIZONS
from features.errors import ProfileCorrupt
from features.event_types import EVENT_TYPES
from features.keys import event_type_key
from features.profile import RING, Profile, Purpose
from features.profile_codec import PAST_LOST
from features.subjects import anonymous, known
from penchant.v1 import common_pb2, profile_pb2, profile_pb2_grpc
from serving.engine.engine import Engine, EngineRef
from serving.errors import DataLoss, InvalidArgument
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.controls import BlockControl, DialControl, UserControl
from serving.privacy.rights import SubjectRights
from serving.projection.profile_view import VisitView, view_profile
from serving.services import validation as checks
from serving.stores.log_codec import decode
from serving.stores.profiles import ProfileStore
from serving.stores.user_statements import Consent

SHOWN = 100
"""Events that an answer shows at most."""

PAGE_BYTES = 1 << 20
"""Size above which a page of an export takes nothing more."""

MAX_PURPOSES = 16
"""Purposes that a request may name, some of them twice."""

_PURPOSES = {
    profile_pb2.PURPOSE_PERSONALISE: Purpose.PERSONALISE,
    profile_pb2.PURPOSE_TRAIN: Purpose.TRAIN,
    profile_pb2.PURPOSE_MEASURE: Purpose.MEASURE,
}


_KINDS = {
    profile_pb2.CONTROL_KIND_ITEM: ControlKind.ITEM,
    profile_pb2.CONTROL_KIND_CREATOR: ControlKind.CREATOR,
    profile_pb2.CONTROL_KIND_CATEGORY: ControlKind.CATEGORY,
}


_DIALLED = {Dial.CATEGORY_WEIGHT: ControlKind.CATEGORY, Dial.CREATOR_WEIGHT: ControlKind.CREATOR}
"""What a dial with a name is about."""


class ProfileService(profile_pb2_grpc.ProfileServiceServicer):
    """Does what people may ask for about themselves."""

    def __init__(self, host: EngineRef, people: SubjectRights, certificates: Certificates, store: ProfileStore) -> None:
        self._host, self._people, self._certificates, self._store = host, people, certificates, store

    def GetProfile(
        self, request: profile_pb2.GetProfileRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetProfileResponse:
        """Shows a profile as a person would read it."""
        subject = checks.subject(request.subject, "subject")
        shown = self._shown(subject, SHOWN)
        [consent] = self._people.consents([subject])
        shown.purposes.extend(_named(consent))
        shown.consent_given = bool(consent.set_at)
        return shown

    def GetControls(
        self, request: profile_pb2.GetControlsRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetControlsResponse:
        """Shows how a person wants their answers made."""
        rules, version = self._people.controls(checks.subject(request.subject, "subject"))
        return profile_pb2.GetControlsResponse(hidden=_hidden(rules), dials=_dials(rules), profile_version=version)

    def SetControls(
        self, request: profile_pb2.SetControlsRequest, context: grpc.ServicerContext
    ) -> profile_pb2.SetControlsResponse:
        """Sets how a person wants their answers made; the very next answer obeys."""
        subject = checks.subject(request.subject, "subject")
        turned = [setting for setting in checks.dials(request.dials, "dials") if setting.value]
        of = f"things, {len(turned)} dials beside them" if turned else "things"
        checks.count(request.hidden, "hidden", 0, MAX_CONTROLS - len(turned), of)
        rules = [_rule(control, f"hidden[{place}]") for place, control in enumerate(request.hidden)]
        version, applied = self._people.set_controls(subject, [*rules, *turned])
        matched, unknown = control_matches(rules, turned, self._host.engine.catalog)
        return profile_pb2.SetControlsResponse(
            profile_version=version, applied=applied, matched=matched, unknown=unknown
        )

    def SetConsent(
        self, request: profile_pb2.SetConsentRequest, context: grpc.ServicerContext
    ) -> profile_pb2.SetConsentResponse:
        """Sets what a person's data may be used for; the next answer and the next event obey."""
        subject, allowed = checks.subject(request.subject, "subject"), Purpose(0)
        checks.count(request.purposes, "purposes", 0, MAX_PURPOSES, "purposes")
        for place, purpose in enumerate(request.purposes):
            if purpose not in _PURPOSES:
                known = ", ".join(profile_pb2.Purpose.Name(one) for one in _PURPOSES)
                raise InvalidArgument(f"purposes[{place}]", f"must be one of {known}, got {purpose}")
            allowed |= _PURPOSES[purpose]
        version, applied = self._people.set_consent(subject, allowed)
        return profile_pb2.SetConsentResponse(profile_version=version, applied=applied)

    def ResetLearning(
        self, request: profile_pb2.ResetLearningRequest, context: grpc.ServicerContext
    ) -> profile_pb2.ResetLearningResponse:
        """Empties a person's profile."""
        version, applied = self._people.reset(checks.subject(request.subject, "subject"))
        return profile_pb2.ResetLearningResponse(profile_version=version, applied=applied)

    def UndoEvent(
        self, request: profile_pb2.UndoEventRequest, context: grpc.ServicerContext
    ) -> profile_pb2.UndoEventResponse:
        """Makes one event count no more."""
        subject = checks.subject(request.subject, "subject")
        event_id = checks.identifier(request.event_id, "event_id")
        try:
            version = self._people.undo(subject, event_id, _deadline(context))
        except ProfileCorrupt as error:
            raise DataLoss(f"nothing was undone: {error}") from error
        return profile_pb2.UndoEventResponse(profile_version=version)

    def MergeIdentities(
        self, request: profile_pb2.MergeIdentitiesRequest, context: grpc.ServicerContext
    ) -> profile_pb2.MergeIdentitiesResponse:
        """Moves what a visitor did to the person they turn out to be."""
        visitor = checks.identifier(request.anonymous_id, "anonymous_id")
        merged = self._people.merge(anonymous(visitor), known(checks.identifier(request.user_id, "user_id")))
        return profile_pb2.MergeIdentitiesResponse(
            events=merged.events,
            impressions=merged.impressions,
            refused=merged.refused,
            left_behind=merged.left_behind,
            profile_version=merged.version,
            damaged=merged.damaged,
            rules_left_out=merged.controls_left_out,
        )

    def ExportSubject(
        self, request: profile_pb2.ExportSubjectRequest, context: grpc.ServicerContext
    ) -> profile_pb2.ExportSubjectResponse:
        """Hands out everything that is held about a person, in pages."""
        subject = checks.subject(request.subject, "subject")
        first, after = _place(request.page_token)
        page = profile_pb2.ExportSubjectResponse()
        if not request.page_token:
            page.documents.extend(self._facts(subject))
        size = sum(map(len, page.documents))
        for kind, at, payload in self._people.documents(subject, first, after, _deadline(context)):
            page.documents.append(json.dumps({"kind": kind} | decode(payload), ensure_ascii=False))
            size += len(payload)
            if size > PAGE_BYTES:
                page.next_page_token = f"{kind}:{at}"
                break
        return page

    def EraseSubject(
        self, request: profile_pb2.EraseSubjectRequest, context: grpc.ServicerContext
    ) -> profile_pb2.EraseSubjectResponse:
        """Erases a person from every store; the certificate says when it held, and later when the bytes were gone."""
        certificate = self._people.erase(checks.subject(request.subject, "subject"))
        return profile_pb2.EraseSubjectResponse(
            receipts=_receipts(certificate),
            certificate_id=certificate.certificate_id,
            profile_version=certificate.log_id,
            purge_due_ms=certificate.due_at,
            copies=_copies(certificate),
            remainders=_remainders(certificate),
        )

    def GetErasureCertificate(
        self, request: profile_pb2.GetErasureCertificateRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetErasureCertificateResponse:
        """Shows the certificate of an erasure as it is now."""
        certificate = self._certificates.get(checks.identifier(request.certificate_id, "certificate_id", limit=64))
        return profile_pb2.GetErasureCertificateResponse(
            receipts=_receipts(certificate),
            profile_version=certificate.log_id,
            purge_due_ms=certificate.due_at,
            copies=_copies(certificate),
            remainders=_remainders(certificate),
        )

    def _shown(self, subject: str, limit: int) -> profile_pb2.GetProfileResponse:
        try:
            return _shown(self._store.read(subject), self._host.engine, limit)
        except ProfileCorrupt as error:
            # There is one, and it is not known what is in it.
            return profile_pb2.GetProfileResponse(found=True, damage=str(error))

    def _facts(self, subject: str) -> Iterator[str]:
        """What is held about a person beside events and slates."""
        [consent] = self._people.consents([subject])
        said = {"kind": "consent", "purposes": consent.purposes.names, "given": bool(consent.set_at)}
        rules = self._people.controls(subject)[0]
        wanted = {"hidden": [MessageToDict(one) for one in _hidden(rules)], "dials": MessageToDict(_dials(rules))}
        profile = MessageToDict(self._shown(subject, RING), preserving_proto_field_name=True)
        for document in (said, {"kind": "controls", **wanted}, {"kind": "profile", **profile}):
            yield json.dumps(document, ensure_ascii=False)
        yield json.dumps({"kind": "counts", **self._counts(subject)}, ensure_ascii=False)

    def _counts(self, subject: str) -> dict[str, Any]:
        """The decayed counts, by name where the catalogue and the bundle know it, else by key."""
        try:
            profile = self._store.read(subject)
        except ProfileCorrupt as error:
            return {"damage": str(error)}
        engine, memory = self._host.engine, profile.decayed_counts
        found: dict[str, Any] = {"as_of_ms": memory.newest, "horizons": list(HORIZONS)}
        if profile.lost:
            found["damage"] = PAST_LOST
        types = {event_type_key(name): name for name in EVENT_TYPES} | dict(engine.event_types)
        for dimension in DIMENSIONS:
            part, counts = memory.of(dimension), found.setdefault(dimension, {})
            for key, cell in zip(memory.keys[part].tolist(), memory.at(memory.newest)[part].tolist(), strict=True):
                name = _category(key, engine) if dimension == "category" else types.get(key, "")
                counts[name or f"key {key:016x}"] = cell
        return found


def control_matches(
    rules: Sequence[BlockControl], dials: Sequence[DialControl], catalog: Catalog
) -> tuple[list[profile_pb2.ControlMatch], list[profile_pb2.ControlMatch]]:
    """Returns which controls and dials name something that the catalogue has, and which do not."""
    kinds = {meant: kind for kind, meant in _KINDS.items()}
    named = [(f"hidden[{place}].id", rule.kind, rule.name) for place, rule in enumerate(rules)]
    fields = {dial: (f"dials.{field}", _DIALLED[dial]) for field, dial in checks.NAMED_DIALS.items()}
    named += [(*fields[setting.dial], setting.name) for setting in dials if setting.name]
    by_kind: dict[ControlKind, list[str]] = {}
    for _, kind, name in named:
        by_kind.setdefault(kind, []).append(name)
    likely: dict[tuple[ControlKind, str], str] = {}
    for kind, names in by_kind.items():
        likely |= {(kind, name): meant for name, meant in look_up(catalog, kind.name.lower(), names).items()}
    matched, unknown = list[profile_pb2.ControlMatch](), list[profile_pb2.ControlMatch]()
    for field, kind, name in named:
        meant = likely[kind, name]
        match = profile_pb2.ControlMatch(field=field, kind=kinds[kind], id=name)
        if meant == name:
            matched.append(match)
        else:
            match.did_you_mean = meant
            unknown.append(match)
    return matched, unknown


def _deadline(context: grpc.ServicerContext) -> float:
    """When the caller stops waiting, on the clock of `time.monotonic`, s."""
    left: float | None = context.time_remaining()
    return math.inf if left is None else time.monotonic() + left


def _hidden(rules: Sequence[UserControl]) -> list[profile_pb2.Control]:
    """What is never shown, in the words of the contract."""
    kinds = {meant: kind for kind, meant in _KINDS.items()}
    return [
        profile_pb2.Control(kind=kinds[rule.kind], id=rule.name, until_ms=rule.until)
        for rule in rules
        if isinstance(rule, BlockControl)
    ]


def _dials(rules: Sequence[UserControl]) -> common_pb2.Dials:
    """The dials, in the words of the contract."""
    found = common_pb2.Dials()
    names = {dial: name for name, dial in (checks.WHOLE_DIALS | checks.NAMED_DIALS).items()}
    for one in rules:
        if isinstance(one, DialControl) and one.name:
            getattr(found, names[one.dial])[one.name] = one.value
        elif isinstance(one, DialControl):
            setattr(found, names[one.dial], one.value)
    return found


def _rule(control: profile_pb2.Control, field: str) -> BlockControl:
    """A control, checked.

    Raises:
        InvalidArgument: A field is wrong.
    """
    if control.kind not in _KINDS:
        known = ", ".join(profile_pb2.ControlKind.Name(one) for one in _KINDS)
        raise InvalidArgument(f"{field}.kind", f"must be one of {known}, got {control.kind}")
    name = checks.identifier(control.id, f"{field}.id")
    return BlockControl(
        _KINDS[control.kind], name, checks.whole(control.until_ms, f"{field}.until_ms", 0, FOR_EVER - 1)
    )


def _named(consent: Consent) -> list[profile_pb2.Purpose.ValueType]:
    return [purpose for purpose, meant in _PURPOSES.items() if meant in consent.purposes]


def _receipts(certificate: Certificate) -> list[profile_pb2.ErasureReceipt]:
    return [
        profile_pb2.ErasureReceipt(
            store=receipt.store, entries=receipt.entries, erased_at_ms=receipt.erased_at, purged_at_ms=receipt.purged_at
        )
        for receipt in certificate.receipts
    ]


def _copies(certificate: Certificate) -> list[profile_pb2.ErasureCopy]:
    return [
        profile_pb2.ErasureCopy(
            copy_id=copy.copy_id,
            store=copy.store,
            host=copy.host,
            place=copy.place,
            erased_at_ms=copy.erased_at,
            purged_at_ms=copy.purged_at,
            retired_at_ms=copy.retired_at,
        )
        for copy in certificate.copies
    ]


def _remainders(certificate: Certificate) -> list[profile_pb2.ErasureRemainder]:
    return [
        profile_pb2.ErasureRemainder(
            kind=one.kind, host=one.host, place=one.place, registered_at_ms=one.registered_at, advice=one.advice
        )
        for one in certificate.remainders
    ]


def _place(token: str) -> tuple[str, int]:
    """Where a page of an export begins: the kind, and the log id behind which."""
    found = re.fullmatch(r"(event|impression):([0-9]{1,19})", token or "event:0")
    if not found or int(found[2]) >= 1 << 63:
        raise InvalidArgument("page_token", "must be the next_page_token of the page before, or empty")
    return found[1], int(found[2])


def _shown(profile: Profile, engine: Engine, limit: int) -> profile_pb2.GetProfileResponse:
    """Returns a profile in words."""
    keys = np.unique(profile.records["item"])
    rows = engine.catalog.rows_of_keys(keys).tolist()
    items = {key: engine.catalog.item(row) for key, row in zip(keys.tolist(), rows, strict=True) if row >= 0}
    view = view_profile(profile, items, engine.event_types, limit)
    return profile_pb2.GetProfileResponse(
        found=view.found,
        damage=view.damage,
        profile_version=view.version,
        event_count=view.event_count,
        events=[
            profile_pb2.ProfileEvent(
                item_id=event.item_id,
                title=event.title,
                event_type=event.event_type,
                timestamp_ms=event.timestamp,
                value=event.value,
            )
            for event in view.events
        ],
        categories=[profile_pb2.Affinity(name=name, share=share) for name, share in view.categories],
        seen_only=view.seen_only,
        segment=_category(view.segment, engine),
        visit=_visit(view.visit, engine),
    )


def _visit(visit: VisitView | None, engine: Engine) -> profile_pb2.Visit | None:
    if visit is None:
        return None
    return profile_pb2.Visit(began_ms=visit.began, events=visit.events, category=_category(visit.category, engine))


def _category(key: int, engine: Engine) -> str:
    """The name of a category, "" where no item of the catalogue has it first."""
    rows = np.flatnonzero(engine.catalog.columns.category[: engine.catalog.size] == np.uint64(key))
    return str(engine.catalog.item(int(rows[0]))["categories"][0]) if key and rows.size else ""
