"""What a person said: blocks, mutes and dials as bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.controls import (
    CONTROL,
    DIAL,
    ControlKind,
    Dial,
    blocked_keys,
    decode,
    dial_controls,
    dials,
    encode,
    no_controls,
)
from features.errors import ProfileCorrupt

KEYS = st.integers(0, 2**64 - 1)


def test_a_dial_has_the_room_of_a_rule():
    assert CONTROL.itemsize == DIAL.itemsize == 17
    assert not {int(kind) for kind in ControlKind} & {int(dial) for dial in Dial}


@given(
    st.lists(st.tuples(KEYS, st.integers(0, 1 << 62), st.sampled_from(ControlKind))),
    st.dictionaries(st.tuples(st.sampled_from(Dial), KEYS), st.floats(-1, 1)),
)
def test_they_come_back_and_neither_is_taken_for_the_other(hidden, turned):
    rules = np.concatenate(
        [np.array(hidden, CONTROL), dial_controls((*about, value) for about, value in turned.items())]
    )
    again = decode(encode(rules))
    assert again.tobytes() == rules.tobytes()
    assert dials(again) == turned
    for kind in ControlKind:
        assert blocked_keys(again, kind, 5).tolist() == [
            k for k, until, of in hidden if of is kind and not 0 < until <= 5
        ]


def test_a_dial_of_a_newer_version_is_left_alone():
    rules = np.concatenate([dial_controls([(Dial.NOVELTY, 0, 1.0)]), np.array([(7, 0, max(Dial) + 1)], CONTROL)])
    assert dials(rules) == {(Dial.NOVELTY, 0): 1.0}
    assert dials(no_controls()) == {}


def test_a_flipped_bit_is_seen():
    stored = bytearray(encode(dial_controls([(Dial.DIVERSITY, 0, 0.5)])))
    stored[9] ^= 1
    with pytest.raises(ProfileCorrupt):
        decode(bytes(stored))
