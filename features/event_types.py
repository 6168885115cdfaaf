"""The documented event types, in one table: the way each counts, and the names by which it may be meant.

A product may use any other name. Such a type counts as a choice of its item; so a misspelt or guessed name would count
too, but not as intended. `hint` finds these names.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class EventType:
    """A documented event type.

    Attributes:
        name: The name, as events say it.
        counts: The way an event of this type counts, in the words of the documentation.
        chosen: The user chose the item: it is taste, and a model may predict it.
        refused: The user said no: the event stands in the history, the item is not shown again.
        synonyms: Other names that events of this kind are given, as `_folded` leaves them.
    """

    name: str
    counts: str
    chosen: bool = True
    refused: bool = False
    synonyms: str = ""


DOCUMENTED = (
    EventType(
        "view_item_list",
        "the item was only shown, an impression: it is no taste, makes nothing seen and is never predicted",
        chosen=False,
        synonyms="""impression viewimpression shown show display exposure expose seen render serve list listview
        viewlist itemlist listviewed promotionview viewpromotion viewsearchresults
        recommendationshown adimpression imp impr viewable viewport appear""",
    ),
    EventType(
        "select_item",
        "the user chose the item from a list: a click",
        synonyms="click tap select selected press open opened selectcontent selectpromotion clickthrough ctr",
    ),
    EventType(
        "view_item",
        "the user looked at the item itself: its page, a video",
        synonyms="""view itemview pageview detailpageview detailview viewcontent viewdetail viewdetails visit watch look
        viewpage viewed""",
    ),
    EventType(
        "search",
        "the user searched; it has a query, needs no item and leaves nothing in the profile",
        chosen=False,
        synonyms="query find lookup sitesearch",
    ),
    EventType(
        "add_to_cart",
        "the user put the item into the cart: a choice",
        synonyms="cart addcart addedtocart cartadd basket addtobasket addtobag bag added add tocart",
    ),
    EventType(
        "purchase",
        "the user bought the item: a choice",
        synonyms="""buy bought order ordered checkout transaction conversion sale sold purchasecomplete paid pay payment
        ordercompleted ordercomplete orderplaced placeorder""",
    ),
    EventType(
        "like",
        "the user likes the item: a choice",
        synonyms="love loved favorite favorited favourite favourited fav upvote thumbsup thumbup heart",
    ),
    EventType(
        "dislike",
        "the user does not like the item: it is not shown again and is no taste",
        chosen=False,
        refused=True,
        synonyms="downvote thumbsdown thumbdown hate",
    ),
    EventType(
        "hide",
        "the user does not want to see the item: it is not shown again and is no taste",
        chosen=False,
        refused=True,
        synonyms="notinterested dismiss hidden remove block ignore skip",
    ),
    EventType(
        "rating",
        "the user rated the item, by `value`: a choice",
        synonyms="rate rated star stars score review reviewed",
    ),
)

EVENT_TYPES: tuple[str, ...] = tuple(kind.name for kind in DOCUMENTED)
"""The documented names."""

PASSIVE_EVENT_TYPES: tuple[str, ...] = tuple(kind.name for kind in DOCUMENTED if not (kind.chosen or kind.refused))
"""Types in which a user has not chosen an item: never what a model predicts, and they make nothing seen."""

NEGATIVE_EVENT_TYPES: tuple[str, ...] = tuple(kind.name for kind in DOCUMENTED if kind.refused)
"""Types that say no: they stand in a history, but are never what a model should predict."""

_BY_NAME = {kind.name: kind for kind in DOCUMENTED}
_NEAR = 0.85
"""Likeness from which a name counts as a documented one that is misspelt."""
_NOISE = {"event", "events", "item", "items", "product", "products", "user", "article", "video", "content", "song"}
_LONGEST = 64


def hint(name: str, own_types: Collection[str] = ()) -> str:
    """Returns a hint about a name that looks like a documented one and is another; "" if there is nothing to say.

    Args:
        name: The event type.
        own_types: Types that the models know. Of these, only other spellings of documented names and names for showings
            are doubted. A name that is another spelling of one of them is doubted too.
    """
    if name in _BY_NAME:
        return ""
    intended = meaning(name)
    if name in own_types:
        # A type of the product's own, in use: doubted only if it could hardly be meant as it counts.
        doubted = intended in PASSIVE_EVENT_TYPES or (intended and _folded(intended) == _folded(name))
        intended = intended if doubted else ""
    elif not intended:
        intended = next((type_name for type_name in own_types if _folded(type_name) == _folded(name)), "")
    if not intended:
        return ""
    counts = f" ({_BY_NAME[intended].counts})" if intended in _BY_NAME else ""
    return (
        f"event type {name[:_LONGEST]!r} is a type of your own and counts as a choice; "
        f"did you mean {intended!r}{counts}?"
    )


@lru_cache(4096)
def meaning(name: str) -> str:
    """Returns the documented type that a name probably means; "" for a documented name, and for one like none."""
    if name in _BY_NAME:
        return ""
    for form in _forms(name):
        if form in _MEANT:
            return _MEANT[form]
    close = difflib.get_close_matches(_folded(name[:_LONGEST]), _SPELLED, 1, _NEAR)
    return _SPELLED[close[0]] if close else ""


def _forms(name: str) -> Iterator[str]:
    """Yields a name without case, blanks and signs; then without common words around it, and in its other endings."""
    words = _words(name)
    fewer = [word for word in words if word not in _NOISE]
    for selected in (words, fewer) if fewer else (words,):
        whole = "".join(selected)
        yield whole
        for ending, instead in (("s", ""), ("es", ""), ("ed", ""), ("d", ""), ("ing", ""), ("ing", "e"), ("ies", "y")):
            if whole.endswith(ending) and len(whole) - len(ending) > 1:
                yield whole.removesuffix(ending) + instead
        # "clicked_item" and "viewed list": the endings of each word.
        yield "".join(_root(word) for word in selected)


def _root(word: str) -> str:
    for ending in ("ing", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            return word.removesuffix(ending)
    return word


def _words(name: str) -> list[str]:
    """Returns the words of `AddToCart`, `add-to-cart` or ` add to  cart`, in small letters."""
    plain = unicodedata.normalize("NFKC", name)
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", plain)
    return [word.casefold() for word in re.findall(r"[^\W_]+", parted)]


def _folded(name: str) -> str:
    return "".join(_words(name))


_SPELLED = {_folded(kind.name): kind.name for kind in DOCUMENTED}
_MEANT = {word: kind.name for kind in DOCUMENTED for word in kind.synonyms.split()} | _SPELLED
