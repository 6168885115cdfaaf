"""What a warehouse covers of the log: for each stream the log ids from one to another, without a hole if it is whole.

    spans.json    {"events": {"3": [[0, 1902], [2711, 3020]]}, "impressions": {...}}

The ids of a span are those that the log delivered, whether or not they left a row. A writer says behind which id of the
log it begins; if that is not where the spans end, another warehouse has taken what lies between.
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
    """What a warehouse lacks of a stream.

    Attributes:
        stream: "events" or "impressions".
        partition: The partition.
        after: Log id behind which it begins.
        until: Log id that it ends with.
    """

    stream: str
    partition: int
    after: int
    until: int


@dataclass(slots=True)
class Spans:
    """The spans by stream and partition, each behind one log id and up to another, in order and apart."""

    by_stream: dict[str, dict[int, list[tuple[int, int]]]] = field(default_factory=dict)

    def add(self, stream: str, partition: int, after: int | None, until: int) -> None:
        """Adds what was written.

        Args:
            stream: "events" or "impressions".
            partition: The partition.
            after: Log id that the log had given out before, whoever wrote that; None where the log does not know.
            until: Last log id that was written.
        """
        own = self.by_stream.setdefault(stream, {}).setdefault(partition, [])
        if after is None:
            after = own[-1][1] if own else until
        elif not own:
            own.append((0, 0))  # what came before went elsewhere
        merged: list[tuple[int, int]] = []
        for span in sorted([*own, (min(after, until), until)]):
            if merged and span[0] <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], span[1])
            else:
                merged.append(span)
        own[:] = merged

    def holes(self) -> Iterator[Hole]:
        """What lies between the spans."""
        for stream, partitions in sorted(self.by_stream.items()):
            for partition, own in sorted(partitions.items()):
                for (_, after), (until, _) in pairwise(own):
                    yield Hole(stream, partition, after, until)

    def to_json(self) -> str:
        """The spans as JSON, the same for the same spans."""
        named = {
            stream: {str(partition): own for partition, own in sorted(partitions.items())}
            for stream, partitions in sorted(self.by_stream.items())
        }
        return json.dumps(named)


def read_spans(folder: Path) -> Spans:
    """Returns what a warehouse covers, nothing for one that never said.

    Raises:
        TablesError: The file is damaged.
    """
    path = folder / SPANS
    try:
        said = json.loads(path.read_bytes())
        return Spans(
            {
                stream: {int(partition): [(int(a), int(b)) for a, b in own] for partition, own in partitions.items()}
                for stream, partitions in said.items()
            }
        )
    except FileNotFoundError:
        return Spans()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TablesError(f"{path} cannot be read ({error}): put it back from a copy, or remove it") from error
