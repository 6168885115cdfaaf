"""A device is in one arm of the holdout before and after a login: the anonymous id takes the arm of the user."""

from __future__ import annotations

import json

import pytest

from features.controls import ControlKind, Dial, arm_seed
from features.profile import EVERY_PURPOSE, Purpose
from serving.experiments import SEEDS, Assignment, Holdout, seed_of
from serving.privacy.certificates import Certificates
from serving.privacy.controls import BlockControl, DialControl
from serving.privacy.marks import marks_of_log
from serving.privacy.rights import SubjectRights
from tests.serving.logged import event, logged, slate

DEVICE, USER = "a:tab", "u:ann"


@pytest.fixture
def people(log, store):
    return SubjectRights(log, store, Certificates(log))


def arm_of(store, subject=DEVICE):
    """The seed that a stored profile shares."""
    return arm_seed(store.read(subject).controls)


def test_a_merge_puts_the_device_into_the_arm_of_the_user(people, log, store):
    assert arm_of(store) is None
    log.append(logged(event("tab", "i1", anonymous=True)))
    log.append_impressions(
        [
            slate(DEVICE, "r1", [1], assignment=Assignment("holdout", bucket=3)),
            slate(USER, "r2", [1], assignment=Assignment("treatment")),
        ]
    )
    assert people.merge(DEVICE, USER).events == 1
    assert arm_of(store) == seed_of(USER) < SEEDS
    assert arm_of(store, USER) is None
    for salt in ("s", "t"):
        assert Holdout(0.5, salt).drawn(seed_of(USER)) == Holdout(0.5, salt).assign(USER)
    assert people.controls(DEVICE) == ([], 0)  # nothing that the user has set
    # What was shown before keeps its arm, and can be told from what was shown in that of the user.
    held = [json.loads(text) for kind, _, text in people.documents(USER) if kind == "impression"]
    found = {one["request_id"]: one for one in held}
    assert [(found[name]["arm"], found[name].get("merged")) for name in ("r1", "r2")] == [
        ("holdout", True),
        ("treatment", None),
    ]
    people.merge(DEVICE, "u:bob")
    assert arm_of(store) == seed_of("u:bob")


def test_it_outlives_what_the_device_says_and_the_loss_of_the_profiles(people, log, store, profiles_redis):
    people.merge(DEVICE, USER)
    rules = [BlockControl(ControlKind.ITEM, "i1"), DialControl(Dial.NOVELTY, "", 0.5)]
    people.set_controls(DEVICE, rules)
    assert people.controls(DEVICE)[0] == rules
    assert arm_of(store) == seed_of(USER)
    people.set_controls(DEVICE, [])
    assert arm_of(store) == seed_of(USER)
    people.reset(DEVICE)
    people.set_consent(DEVICE, Purpose.MEASURE)
    assert arm_of(store) == seed_of(USER)  # their answers are measured
    people.set_consent(DEVICE, EVERY_PURPOSE)
    profiles_redis.flushall()
    assert arm_of(store) is None
    store.mark_many(list(marks_of_log(log)))
    assert arm_of(store) == seed_of(USER)


def test_it_goes_with_an_erasure_and_with_the_consent_to_be_measured(people, store):
    people.merge(DEVICE, USER)
    people.erase(DEVICE)
    assert arm_of(store) is None
    people.merge(DEVICE, USER)
    people.set_consent(DEVICE, Purpose(0))
    assert arm_of(store) is None
    people.set_consent(USER, Purpose(0))
    people.merge(DEVICE, USER)
    assert arm_of(store) is None
