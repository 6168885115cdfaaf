"""The contents of requests: items and queries, of a bundle or of the service's own answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.load.generator import Generator
from benchmarks.load.traffic import PATHS, RequestMaterial
from benchmarks.report import BenchmarkError
from features.tables.user_ids import read_user_ids
from penchant.v1 import common_pb2, ranking_pb2

_ASKED_USERS = 100
_PAGE = 100
_WORDS = 2
"""Words of a title that make a query."""


def gather(
    generator: Generator,
    users: Path | Sequence[str],
    methods: Collection[str],
    *,
    bundle: Path | None = None,
    queries: Path | None = None,
) -> RequestMaterial:
    """Returns what the methods of a mix need.

    Args:
        generator: Connections to the service.
        users: Ids, or a file of them.
        methods: The methods that are called.
        bundle: The service's bundle, if it lies on this machine: its items and their titles.
        queries: A file with one query a line; without it, the first words of titles are queries.

    Raises:
        BenchmarkError: There are no users, or the bundle cannot be read.
    """
    user_ids = read_user_ids(users) if isinstance(users, Path) else list(users)
    if not user_ids:
        raise BenchmarkError("there is no user to request slates for: name at least one")
    if not set(methods) - {"recommend"}:
        return RequestMaterial(user_ids)
    titles = titles_of(bundle) if bundle else _titles_in_answers(generator, user_ids)
    texts = _lines(queries) if queries else _queries(titles)
    return RequestMaterial(user_ids, list(titles), texts)


def titles_of(bundle: Path) -> dict[str, str]:
    """Returns the titles of a bundle's items, "" where there is none.

    Raises:
        BenchmarkError: It is no bundle.
    """
    try:
        with pa.memory_map(str(bundle / "items.arrow"), "rb") as source:
            table = pa.ipc.open_file(source).read_all().select(["item_id", "title"])
            return {str(item): title or "" for item, title in zip(*table.to_pydict().values(), strict=True)}
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise BenchmarkError(f"{bundle} is no bundle ({error}): give the directory that the service serves") from None


def _titles_in_answers(generator: Generator, users: Sequence[str]) -> dict[str, str]:
    """Returns the titles of the items that the service recommends to some users."""
    titles: dict[str, str] = {}
    for user in users[:_ASKED_USERS]:
        options = ranking_pb2.RankingOptions(
            subject=common_pb2.Subject(user_id=user), page_size=_PAGE, fields=["title"]
        )
        request = ranking_pb2.RecommendRequest(options=options)
        answer = ranking_pb2.RecommendResponse.FromString(
            generator.call(PATHS["recommend"], request.SerializeToString())
        )
        titles |= {item.item_id: item.item.title for item in answer.slate.items}
    return titles


def _queries(titles: Mapping[str, str]) -> list[str]:
    texts = [" ".join(title.split()[:_WORDS]) for title in titles.values() if title.strip()]
    # In an order of their own, so that the first ones are not those of the first items only.
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]
