"""Controls: blocks, mutes and dials by which a user shapes their own answers, as the log and the profile store them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from features import controls
from features.controls import CONTROL, ControlKind, Dial
from features.keys import item_key

_SHARED_ARM, _ATTRIBUTE = "ARM", "ATTRIBUTE"


@dataclass(frozen=True, slots=True)
class BlockControl:
    """A block, or with an end a mute: what the user does not want to be shown.

    Attributes:
        kind: ControlKind of what is blocked.
        name: External id of the item or the creator, or the name of the category.
        until: End of the block, ms; 0 for none.
    """

    kind: ControlKind
    name: str
    until: int = 0


@dataclass(frozen=True, slots=True)
class DialControl:
    """A dial, and how far the user has turned it.

    Attributes:
        dial: The dial.
        name: External id of the creator, or name of the category that it is about; "" for a dial about all items.
        value: How far it is turned.
    """

    dial: Dial
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class SharedArm:
    """The arm of experiments that an anonymous user shares with the user they were merged into.

    Attributes:
        seed: That user's `experiments.seed_of`.
    """

    seed: int


@dataclass(frozen=True, slots=True)
class UserAttribute:
    """An attribute that the product told of its user.

    Attributes:
        name: Its name.
        text: Its value.
    """

    name: str
    text: str


UserControl = BlockControl | DialControl
"""A control that a user sets."""

StoredControl = UserControl | UserAttribute | SharedArm
"""A control as it is stored: attributes and a shared arm are stored with the controls, though no user sets them."""


def parse_controls(words: bytes) -> list[StoredControl]:
    """Returns the controls that the log holds of a user, from what `to_log` returned."""
    return [_parse_control(*control) for control in json.loads(words)]


def to_log(stored: Sequence[StoredControl]) -> bytes:
    """Returns controls as the log holds them: by name, so that they can be shown to the user."""
    return json.dumps([_to_words(control) for control in stored], ensure_ascii=False).encode()


def to_profile(stored: Sequence[StoredControl]) -> bytes:
    """Returns controls as a profile holds them: by key, so that filters need not hash names."""
    blocks = [
        (item_key(control.name), control.until, control.kind) for control in stored if isinstance(control, BlockControl)
    ]
    dials = [
        (control.dial, item_key(control.name), control.value) for control in stored if isinstance(control, DialControl)
    ]
    # A shared arm takes the form of a control too, so that one list holds all of a user.
    arms = [controls.arm_control(control.seed) for control in stored if isinstance(control, SharedArm)]
    attributes = controls.attribute_controls(
        {control.name: control.text for control in stored if isinstance(control, UserAttribute)}
    )
    return controls.encode(
        np.concatenate([np.array(blocks, CONTROL), controls.dial_controls(dials), attributes, *arms])
    )


def join_controls(user: Sequence[UserControl], anonymous: Sequence[UserControl], now_ms: int) -> list[UserControl]:
    """Returns the controls of a known and of an anonymous user as those of one user.

    Blocks that have ended are left out. Of two ends of one block the later holds, of two settings of one dial the known
    user's. The known user's controls come first, and of either user's the blocks before the dials: where not all have
    room, the last are left out.
    """
    ends: dict[tuple[ControlKind, str], int] = {}
    for control in (*user, *anonymous):
        # A block without an end counts as the latest of all.
        if isinstance(control, BlockControl) and not 0 < control.until <= now_ms:
            target = (control.kind, control.name)
            ends[target] = max(ends.get(target, 0), control.until or controls.FOR_EVER)
    blocks = [BlockControl(*target, 0 if end == controls.FOR_EVER else end) for target, end in ends.items()]
    # The known user's come last, so that theirs hold.
    dials = {_target(control): control for control in (*anonymous, *user) if isinstance(control, DialControl)}
    user_targets = {_target(control) for control in user}
    return sorted(
        [*blocks, *dials.values()],
        key=lambda control: (_target(control) not in user_targets, isinstance(control, DialControl)),
    )


def _target(control: UserControl) -> tuple[int, str]:
    """Returns what two controls have in common if they are about the same; kinds and dials share no number."""
    return (control.kind if isinstance(control, BlockControl) else control.dial), control.name


def _parse_control(kind: str, name: str, value: Any) -> StoredControl:
    if kind == _SHARED_ARM:
        return SharedArm(int(value))
    if kind == _ATTRIBUTE:
        return UserAttribute(name, value)
    if kind in ControlKind.__members__:
        return BlockControl(ControlKind[kind], name, value)
    return DialControl(Dial[kind], name, value)


def _to_words(control: StoredControl) -> list[Any]:
    if isinstance(control, SharedArm):
        return [_SHARED_ARM, "", control.seed]
    if isinstance(control, UserAttribute):
        return [_ATTRIBUTE, control.name, control.text]
    if isinstance(control, BlockControl):
        return [control.kind.name, control.name, control.until]
    return [control.dial.name, control.name, control.value]
