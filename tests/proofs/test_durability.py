"""The proofs of durability in short, and their controls; `make prove-durability` makes them at full size."""

from __future__ import annotations

import numpy as np
import pytest

from features.records import make_records
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore
from tests.proofs.kills import HASTY_SINK, compare, held, kills, logged
from tests.proofs.lost_replies import lost_replies
from tests.proofs.power_loss import CannotMountError, power_loss

NOTHING = {"log": 0, "profile": 0, "parquet": 0}


@pytest.mark.timeout(900)
def test_kills_of_everything_lose_and_double_nothing():
    said = kills(rate=300.0, pause_s=1.0, victims=["worker", "sink", "projector", "events", "profiles", "service"])
    assert sum(said["kills"].values()) == 6
    assert said["acknowledged"] == said["sent"] > 0
    assert (said["lost"], said["doubled"]) == (NOTHING, NOTHING)


@pytest.mark.timeout(900)
def test_kills_of_a_sink_that_acknowledges_first_lose_some():
    """The control: what is acknowledged before it is written goes with the process."""
    said = kills(rate=300.0, pause_s=1.0, victims=["sink"] * 3, sink=HASTY_SINK)
    assert said["lost"]["parquet"] > 0
    assert (said["lost"]["log"], said["doubled"]) == (0, NOTHING)


class TestTheJudge:
    """Lost and doubled events are counted, in each store."""

    @pytest.fixture
    def life(self, events_redis, profiles_redis):
        log, store = EventLog(events_redis, 4), ProfileStore(profiles_redis, 4)
        records = [make_records(number + 1, 0, 0, 4_000_000_000_000, np.nan, 1).tobytes() for number in range(20)]
        events = [LoggedEvent(f"u:{n % 3}", f"e{n}", record, b"{}") for n, record in enumerate(records)]
        done = log.append(events)
        for one, said in zip(events, done, strict=True):
            store.apply(one.subject, [(said.log_id, said.record)])
        ledger = {one.event_id: said.log_id for one, said in zip(events, done, strict=True)}
        return log, store, ledger

    def test_all_is_well(self, life):
        log, store, ledger = life
        assert held(compare(ledger, logged(log), store, list(ledger.items())))

    def test_lost_and_doubled_rows_of_parquet(self, life):
        log, store, ledger = life
        rows = list(ledger.items())
        said = compare(ledger, logged(log), store, [*rows[1:], rows[4]])
        assert (said["lost"]["parquet"], said["doubled"]["parquet"]) == (1, 1)
        assert not held(said)

    def test_lost_and_doubled_events_of_the_log(self, life):
        log, store, ledger = life
        entries = logged(log)
        entries["u:0"].append(entries["u:0"].pop(0))
        assert compare(ledger, entries, store, [])["lost"]["profile"] == 1  # another order is another fold
        [first, *_] = entries["u:1"]
        entries["u:1"] = [*entries["u:1"][1:], entries["u:1"][-1]]
        said = compare(ledger, entries, store, [])
        assert (said["lost"]["log"], said["doubled"]["log"]) == (1, 1)
        assert first.event_id in ledger

    def test_an_event_that_a_profile_lacks_or_has_twice(self, life):
        log, store, ledger = life
        more = make_records(99, 0, 0, 4_000_000_000_000, np.nan, 1).tobytes()
        store.apply("u:0", [(max(ledger.values()) + 1, more)])
        store.erase("u:1", max(ledger.values()))
        said = compare(ledger, logged(log), store, list(ledger.items()))
        assert said["doubled"]["profile"] == 1
        assert said["lost"]["profile"] == 7


def test_lost_replies_double_nothing_but_for_a_bare_xadd():
    said = lost_replies(60, bare=5)
    assert said["lost_replies"] == {"log": 60, "profile": 60}
    assert said["answered_as_duplicates"] == 60
    assert (said["missing"], said["doubled"]) == ({"log": 0, "profile": 0}, {"log": 0, "profile": 0})
    assert said["applied_again"] == 0
    assert said["control"] == {"xadd": 5, "lost": 5, "doubled": 5}


@pytest.mark.timeout(900)
def test_power_losses_lose_nothing_but_without_fsync():
    try:
        said = power_loss(3)
        control = power_loss(2, fsync="no")
    except CannotMountError as error:
        pytest.skip(str(error))
    assert said["acknowledged"] > 0
    assert (said["lost"], said["doubled"]) == (0, 0)
    assert control["lost"] > 0
