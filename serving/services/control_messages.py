"""Controls and consent: converts them between the contract and the stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from features.catalog import Catalog
from features.catalog_names import look_up
from features.controls import FOR_EVER, ControlKind, Dial
from features.profile import Purpose
from penchant.v1 import common_pb2, profile_pb2
from serving.errors import InvalidArgument
from serving.privacy.controls import BlockControl, DialControl, UserControl
from serving.services import validation as checks

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
_KINDS_IN_CONTRACT = {kind: number for number, kind in _KINDS.items()}

_DIAL_KINDS = {Dial.CATEGORY_WEIGHT: ControlKind.CATEGORY, Dial.CREATOR_WEIGHT: ControlKind.CREATOR}
"""The kind of the name of a dial that has one."""


def purposes_of(numbers: Sequence[profile_pb2.Purpose.ValueType]) -> Purpose:
    """Returns purposes of the contract as a set.

    Raises:
        InvalidArgument: The contract has no such purpose.
    """
    purposes = Purpose(0)
    for place, number in enumerate(numbers):
        if number not in _PURPOSES:
            names = ", ".join(map(profile_pb2.Purpose.Name, _PURPOSES))
            raise InvalidArgument(f"purposes[{place}]", f"must be one of {names}, got {number}")
        purposes |= _PURPOSES[number]
    return purposes


def purpose_numbers(purposes: Purpose) -> list[profile_pb2.Purpose.ValueType]:
    """Returns a set of purposes as the contract has it."""
    return [number for number, purpose in _PURPOSES.items() if purpose in purposes]


def block_control(control: profile_pb2.Control, field: str) -> BlockControl:
    """Returns a control of the contract, checked.

    Raises:
        InvalidArgument: A field is wrong.
    """
    if control.kind not in _KINDS:
        names = ", ".join(map(profile_pb2.ControlKind.Name, _KINDS))
        raise InvalidArgument(f"{field}.kind", f"must be one of {names}, got {control.kind}")
    name = checks.identifier(control.id, f"{field}.id")
    until = checks.whole(control.until_ms, f"{field}.until_ms", 0, FOR_EVER - 1)
    return BlockControl(_KINDS[control.kind], name, until)


def hidden_message(controls: Sequence[UserControl]) -> list[profile_pb2.Control]:
    """Returns the blocks and mutes among controls, as the contract has them."""
    return [
        profile_pb2.Control(kind=_KINDS_IN_CONTRACT[control.kind], id=control.name, until_ms=control.until)
        for control in controls
        if isinstance(control, BlockControl)
    ]


def dials_message(controls: Sequence[UserControl]) -> common_pb2.Dials:
    """Returns the dials among controls, as the contract has them."""
    message = common_pb2.Dials()
    fields = {dial: field for field, dial in (checks.WHOLE_DIALS | checks.NAMED_DIALS).items()}
    for control in controls:
        if isinstance(control, DialControl) and control.name:
            getattr(message, fields[control.dial])[control.name] = control.value
        elif isinstance(control, DialControl):
            setattr(message, fields[control.dial], control.value)
    return message


def control_matches(
    blocks: Sequence[BlockControl], dials: Sequence[DialControl], catalog: Catalog
) -> tuple[list[profile_pb2.ControlMatch], list[profile_pb2.ControlMatch]]:
    """Returns the controls that name something of the catalogue, and those that do not."""
    # Both are stored: the name may be of an item that the catalogue gets tomorrow, or of one that it lost.
    named = [(f"hidden[{place}].id", block.kind, block.name) for place, block in enumerate(blocks)]
    fields = {dial: (f"dials.{field}", _DIAL_KINDS[dial]) for field, dial in checks.NAMED_DIALS.items()}
    named += [(*fields[dial.dial], dial.name) for dial in dials if dial.name]
    nearest = _nearest_names(catalog, named)
    matched, unknown = list[profile_pb2.ControlMatch](), list[profile_pb2.ControlMatch]()
    for field, kind, name in named:
        match = profile_pb2.ControlMatch(field=field, kind=_KINDS_IN_CONTRACT[kind], id=name)
        if nearest[kind, name] == name:
            matched.append(match)
        else:
            match.did_you_mean = nearest[kind, name]
            unknown.append(match)
    return matched, unknown


def _nearest_names(
    catalog: Catalog, named: Sequence[tuple[str, ControlKind, str]]
) -> Mapping[tuple[ControlKind, str], str]:
    """Returns the nearest name of the catalogue for each kind and name: the name itself if the catalogue has it."""
    # All names of a kind together, as each look-up walks the names of the catalogue.
    by_kind: dict[ControlKind, list[str]] = {}
    for _, kind, name in named:
        by_kind.setdefault(kind, []).append(name)
    nearest: dict[tuple[ControlKind, str], str] = {}
    for kind, names in by_kind.items():
        nearest |= {(kind, name): near for name, near in look_up(catalog, kind.name.lower(), names).items()}
    return nearest
