"""The inputs of the models by name: what each column means, and from what window of events it comes."""

from __future__ import annotations

from collections.abc import Sequence

from features.feature_set import Feature, FeatureSet
from features.profile import RING

HALF_LIFE = 20
"""Number of events after which an event weighs half in an affinity."""

_RING = f"newest {RING} events"
ENCODER_FEATURES = FeatureSet(
    (
        Feature("item_vector", "the item's vector, one per event", "newest events"),
        Feature("event_type", "1 + position among the bundle's event types, 0 = unknown", "newest events", "int64"),
    )
)
RANKER_FEATURES = FeatureSet(
    (
        Feature("relevance", "inner product of user and item vector"),
        Feature("popularity", "log1p of the item's events in training", "item"),
        Feature("recent_popularity", "log1p of the item's events in the last days of training", "item"),
        Feature("category_affinity", "share of the events in the item's category, half-life 20 events", _RING),
        Feature("creator_affinity", "share of the events by the item's creator, half-life 20 events", _RING),
        Feature("price", "log1p of the item's price, 0 where unknown", "item"),
        Feature("price_known", "1 where the item has a price", "item"),
        Feature("history_length", "log1p of the number of events remembered", _RING),
        Feature("trained", "1 where the item was in the training data", "item"),
        Feature("duration", "log1p of the item's seconds, 0 where unknown", "item"),
        Feature("duration_known", "1 where the item has a duration", "item"),
        Feature("age", "log1p of the days since the item may be shown, 0 where that was always"),
        Feature("recency", "log1p of the hours since the user's newest event, 0 where there is none"),
        Feature("shown_before", "log1p of the user's events about this very item", _RING),
        Feature("position", "log1p of the place in the slate, 0 when serving: as if it came first"),
        Feature("item_shown", "log1p of how often the item was shown to all users", "item"),
        Feature("creator_shown", "log1p of how often the creator's items were shown to all users", "item"),
        Feature("item_pause", "log1p of the user's events since the last about this very item, or of all", _RING),
        Feature("item_in_visit", "1 where the user's newest visit has an event about this very item", "visit"),
        Feature("category_hour", "log1p of the user's choices in the item's category", "half-life an hour"),
        Feature("category_day", "log1p of the user's choices in the item's category", "half-life a day"),
        Feature("category_month", "log1p of the user's choices in the item's category", "half-life 30 days"),
        Feature("creator_hour", "log1p of the user's choices by the item's creator", "half-life an hour"),
        Feature("creator_day", "log1p of the user's choices by the item's creator", "half-life a day"),
        Feature("creator_month", "log1p of the user's choices by the item's creator", "half-life 30 days"),
        Feature("activity_day", "log1p of the user's events", "half-life a day"),
        Feature("activity_month", "log1p of the user's events", "half-life 30 days"),
        Feature("visit_length", "log1p of the events of the user's visit, 0 where it is over", "visit"),
        Feature("visit_minutes", "log1p of the minutes since it began, 0 where it is over", "visit"),
        Feature("visit_category", "share of the visit's events in the item's category", "visit"),
    )
)
ACTION_FEATURES = FeatureSet(
    (
        Feature("person_rate", "the user's log-odds above the average user's, half-life 40 showings", _RING),
        Feature("person_recent_rate", "the same, half-life 4 showings", _RING),
        Feature("person_category_rate", "log-odds in the item's category above the user's", _RING),
        Feature("person_creator_rate", "log-odds with the item's creator above the user's", _RING),
        Feature("person_item_rate", "log-odds with this very item above the user's", _RING),
        Feature("person_duration_rate", "log-odds among items of like duration above the user's", _RING),
        Feature("item_rate", "the item's log-odds above the average, pulled to its creator's", "item"),
        Feature("creator_rate", "the creator's log-odds above the average, pulled to the category's", "item"),
        Feature("category_rate", "the category's log-odds above the average", "item"),
        Feature("surface_rate", "the surface's log-odds above the average"),
        Feature(
            "person_month_rate", "the user's log-odds above the average user's, by event type", "half-life 30 days"
        ),
    )
)
"""The ranker's inputs for each of a bundle's actions, behind `RANKER_FEATURES`.

The names begin with `person` because they are part of the fingerprint of published bundles."""
FEATURES = FeatureSet((*ENCODER_FEATURES, *RANKER_FEATURES, *ACTION_FEATURES))


def ranker_names(actions: Sequence[str], declared: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names of the ranker's inputs: those of an action are `action/feature`, the declared ones are last."""
    of_actions = (f"{action}/{name}" for name in ACTION_FEATURES.names for action in actions)
    return (*RANKER_FEATURES.names, *of_actions, *declared)


def ranker_width(actions: int, declared: int = 0) -> int:
    """Returns the number of the ranker's inputs."""
    return len(RANKER_FEATURES) + actions * len(ACTION_FEATURES) + declared


def statistics_width(actions: int) -> int:
    """Returns the number of an item's statistics: two counts, and a rate of item, creator and category per action."""
    return 2 + 3 * actions
