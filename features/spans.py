"""The spans of the log that a warehouse covers: log ids from one to another, without a hole if it is whole.

    spans.json    {"events": {"3": [[0, 1902], [2711, 3020]]}, "impressions": {...}}

The ids of a span are those that the log delivered, whether or not they left a row. A writer says after which id of the
log it begins; if the spans do not end there, another warehouse has taken the entries between.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from features.errors import TablesError

SPANS = "spans.json"
"""Name of the file."""


class Hole(NamedTuple):
    """A part of a stream that a warehouse lacks.

    Attributes:
        stream: "events" or "impressions".
        partition: The partition.
        after: Log id after which it begins.
        until: Log id that it ends with.
    """

    stream: str
    partition: int
    after: int
    until: int


@dataclass(slots=True)
class Spans:
    """The spans by stream and partition, each after one log id and up to another, in order and apart."""

    by_stream: dict[str, dict[int, list[tuple[int, int]]]] = field(default_factory=dict)

    def add(self, stream: str, partition: int, after: int | None, until: int) -> None:
        """Adds a span that was written.

        Args:
            stream: "events" or "impressions".
            partition: The partition.
            after: Last log id delivered before, to this or another warehouse; None if the log does not know.
            until: Last log id that was written.
        """
        spans = self.by_stream.setdefault(stream, {}).setdefault(partition, [])
        if after is None:
            after = spans[-1][1] if spans else until
        elif not spans:
            spans.append((0, 0))  # the entries before went elsewhere, which shows as a hole
        # Merged, so that the file grows by the number of holes and not by the number of writes.
        merged: list[tuple[int, int]] = []
        for span in sorted([*spans, (min(after, until), until)]):
            if merged and span[0] <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], span[1])
            else:
                merged.append(span)
        spans[:] = merged

    def holes(self) -> Iterator[Hole]:
        """Yields the holes between the spans."""
        for stream, partitions in sorted(self.by_stream.items()):
            for partition, spans in sorted(partitions.items()):
                for (_, after), (until, _) in pairwise(spans):
                    yield Hole(stream, partition, after, until)

    def to_json(self) -> str:
        """Returns the spans as JSON, the same text for the same spans."""
        document = {
            stream: {str(partition): spans for partition, spans in sorted(partitions.items())}
            for stream, partitions in sorted(self.by_stream.items())
        }
        return json.dumps(document)


def read_spans(folder: Path) -> Spans:
    """Returns the spans that a warehouse covers, none if it never wrote any.

    Raises:
        TablesError: The file is damaged.
    """
    path = folder / SPANS
    try:
        document = json.loads(path.read_bytes())
        return Spans({stream: _spans(partitions) for stream, partitions in document.items()})
    except FileNotFoundError:
        return Spans()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TablesError(f"{path} cannot be read ({error}): put it back from a copy, or remove it") from error


def _spans(partitions: dict[str, list[list[int]]]) -> dict[int, list[tuple[int, int]]]:
    return {
        int(partition): [(int(after), int(until)) for after, until in spans] for partition, spans in partitions.items()
    }
