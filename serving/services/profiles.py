"""ProfileService: shows users their data, and carries out their controls, consent and rights."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from features.controls import MAX_CONTROLS
from features.errors import ProfileCorrupt
from features.profile import RING
from features.subjects import anonymous, known
from penchant.v1 import profile_pb2, profile_pb2_grpc
from serving.engine.engine import EngineRef
from serving.errors import DataLoss, InvalidArgument
from serving.privacy.certificates import Certificates
from serving.privacy.rights import SubjectRights
from serving.services import validation as checks
from serving.services.control_messages import (
    block_control,
    control_matches,
    dials_message,
    hidden_message,
    purpose_numbers,
    purposes_of,
)
from serving.services.profile_messages import (
    copy_messages,
    counts_document,
    profile_message,
    receipt_messages,
    remainder_messages,
)
from serving.stores.log_codec import decode
from serving.stores.profiles import ProfileStore

SHOWN = 100
"""Most events of a profile that is shown."""

PAGE_BYTES = 1 << 20
"""Size above which a page of an export is complete."""

MAX_PURPOSES = 16
"""Purposes that a request may name, some of them twice."""


class ProfileService(profile_pb2_grpc.ProfileServiceServicer):
    """Carries out the requests of users about their own data."""

    def __init__(
        self, engine_ref: EngineRef, rights: SubjectRights, certificates: Certificates, store: ProfileStore
    ) -> None:
        self._engine_ref, self._rights, self._certificates, self._store = engine_ref, rights, certificates, store

    def GetProfile(
        self, request: profile_pb2.GetProfileRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetProfileResponse:
        """Shows a profile in words that its user can read."""
        subject = checks.subject(request.subject, "subject")
        response = self._profile(subject, SHOWN)
        [consent] = self._rights.consents([subject])
        response.purposes.extend(purpose_numbers(consent.purposes))
        response.consent_given = bool(consent.set_at)
        return response

    def GetControls(
        self, request: profile_pb2.GetControlsRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetControlsResponse:
        """Shows the controls of a user."""
        subject = checks.subject(request.subject, "subject")
        controls, version = self._rights.controls(subject)
        hidden, dials = hidden_message(controls), dials_message(controls)
        attributes = self._rights.attributes(subject)
        return profile_pb2.GetControlsResponse(
            hidden=hidden, dials=dials, profile_version=version, attributes=attributes
        )

    def SetAttributes(
        self, request: profile_pb2.SetAttributesRequest, context: grpc.ServicerContext
    ) -> profile_pb2.SetAttributesResponse:
        """Sets the attributes of a user; the very next answer reads them."""
        subject = checks.subject(request.subject, "subject")
        attributes = checks.attributes(request.attributes, "attributes")
        version, applied = self._rights.set_attributes(subject, attributes)
        return profile_pb2.SetAttributesResponse(profile_version=version, applied=applied)

    def SetControls(
        self, request: profile_pb2.SetControlsRequest, context: grpc.ServicerContext
    ) -> profile_pb2.SetControlsResponse:
        """Sets the controls of a user; the very next answer obeys."""
        subject = checks.subject(request.subject, "subject")
        dials = [dial for dial in checks.dials(request.dials, "dials") if dial.value]
        # Blocks, mutes and dials share one limit: all of them are in the header of the profile.
        of = f"controls, as there are {len(dials)} dials" if dials else "controls"
        checks.count(request.hidden, "hidden", 0, MAX_CONTROLS - len(dials), of)
        blocks = [block_control(control, f"hidden[{place}]") for place, control in enumerate(request.hidden)]
        version, applied = self._rights.set_controls(subject, [*blocks, *dials])
        matched, unknown = control_matches(blocks, dials, self._engine_ref.engine.catalog)
        return profile_pb2.SetControlsResponse(
            profile_version=version, applied=applied, matched=matched, unknown=unknown
        )

    def SetConsent(
        self, request: profile_pb2.SetConsentRequest, context: grpc.ServicerContext
    ) -> profile_pb2.SetConsentResponse:
        """Sets the purposes that a user allows; the next answer and the next event obey."""
        subject = checks.subject(request.subject, "subject")
        checks.count(request.purposes, "purposes", 0, MAX_PURPOSES, "purposes")
        version, applied = self._rights.set_consent(subject, purposes_of(request.purposes))
        return profile_pb2.SetConsentResponse(profile_version=version, applied=applied)

    def ResetLearning(
        self, request: profile_pb2.ResetLearningRequest, context: grpc.ServicerContext
    ) -> profile_pb2.ResetLearningResponse:
        """Empties a user's profile."""
        version, applied = self._rights.reset(checks.subject(request.subject, "subject"))
        return profile_pb2.ResetLearningResponse(profile_version=version, applied=applied)

    def UndoEvent(
        self, request: profile_pb2.UndoEventRequest, context: grpc.ServicerContext
    ) -> profile_pb2.UndoEventResponse:
        """Removes one event from a profile, as if it had not happened."""
        subject = checks.subject(request.subject, "subject")
        event_id = checks.identifier(request.event_id, "event_id")
        try:
            version = self._rights.undo(subject, event_id, _deadline(context))
        except ProfileCorrupt as error:
            raise DataLoss(f"nothing was undone: {error}") from error
        return profile_pb2.UndoEventResponse(profile_version=version)

    def MergeIdentities(
        self, request: profile_pb2.MergeIdentitiesRequest, context: grpc.ServicerContext
    ) -> profile_pb2.MergeIdentitiesResponse:
        """Moves the events and slates of an anonymous user to a known one."""
        source = anonymous(checks.identifier(request.anonymous_id, "anonymous_id"))
        merged = self._rights.merge(source, known(checks.identifier(request.user_id, "user_id")))
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
        """Exports all data about a user, in pages."""
        subject = checks.subject(request.subject, "subject")
        first_kind, after = _page_start(request.page_token)
        page = profile_pb2.ExportSubjectResponse()
        if not request.page_token:
            page.documents.extend(self._facts(subject))
        size = sum(map(len, page.documents))
        for kind, log_id, payload in self._rights.documents(subject, first_kind, after, _deadline(context)):
            page.documents.append(json.dumps({"kind": kind} | decode(payload), ensure_ascii=False))
            size += len(payload)
            # Checked after the document: a page has at least one, however large.
            if size > PAGE_BYTES:
                page.next_page_token = f"{kind}:{log_id}"
                break
        return page

    def EraseSubject(
        self, request: profile_pb2.EraseSubjectRequest, context: grpc.ServicerContext
    ) -> profile_pb2.EraseSubjectResponse:
        """Erases a user from every store; the certificate tells when it held, and later when the bytes were gone."""
        certificate = self._rights.erase(checks.subject(request.subject, "subject"))
        return profile_pb2.EraseSubjectResponse(
            receipts=receipt_messages(certificate),
            certificate_id=certificate.certificate_id,
            profile_version=certificate.log_id,
            purge_due_ms=certificate.due_at,
            copies=copy_messages(certificate),
            remainders=remainder_messages(certificate),
        )

    def GetErasureCertificate(
        self, request: profile_pb2.GetErasureCertificateRequest, context: grpc.ServicerContext
    ) -> profile_pb2.GetErasureCertificateResponse:
        """Shows the current state of the certificate of an erasure."""
        certificate = self._certificates.get(checks.identifier(request.certificate_id, "certificate_id", limit=64))
        return profile_pb2.GetErasureCertificateResponse(
            receipts=receipt_messages(certificate),
            profile_version=certificate.log_id,
            purge_due_ms=certificate.due_at,
            copies=copy_messages(certificate),
            remainders=remainder_messages(certificate),
        )

    def _profile(self, subject: str, limit: int) -> profile_pb2.GetProfileResponse:
        try:
            return profile_message(self._store.read(subject), self._engine_ref.engine, limit)
        except ProfileCorrupt as error:
            # The profile exists, but its content is unknown.
            return profile_pb2.GetProfileResponse(found=True, damage=str(error))

    def _facts(self, subject: str) -> Iterator[str]:
        """Yields the documents of an export that are neither events nor slates."""
        [consent] = self._rights.consents([subject])
        yield _document("consent", purposes=consent.purposes.names, given=bool(consent.set_at))
        controls, _ = self._rights.controls(subject)
        hidden = [MessageToDict(control) for control in hidden_message(controls)]
        yield _document("controls", hidden=hidden, dials=MessageToDict(dials_message(controls)))
        yield _document("attributes", attributes=self._rights.attributes(subject))
        profile = MessageToDict(self._profile(subject, RING), preserving_proto_field_name=True)
        yield _document("profile", **profile)
        try:
            counts = counts_document(self._store.read(subject), self._engine_ref.engine)
        except ProfileCorrupt as error:
            counts = {"damage": str(error)}
        yield _document("counts", **counts)


def _document(kind: str, **fields: Any) -> str:
    return json.dumps({"kind": kind, **fields}, ensure_ascii=False)


def _deadline(context: grpc.ServicerContext) -> float:
    """Returns the caller's deadline, on the clock of `time.monotonic`, in seconds."""
    left_s: float | None = context.time_remaining()
    return math.inf if left_s is None else time.monotonic() + left_s


def _page_start(token: str) -> tuple[str, int]:
    """Returns the kind of the first document of a page, and the log id that it comes after.

    Raises:
        InvalidArgument: The token is of no page.
    """
    match = re.fullmatch(r"(event|impression):([0-9]{1,19})", token or "event:0")
    if not match or int(match[2]) >= 1 << 63:
        raise InvalidArgument("page_token", "must be the next_page_token of the page before, or empty")
    return match[1], int(match[2])
