"""Describes the features that models read: their names, their order and the fingerprint that a bundle is checked by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Feature:
    """One number a model reads.

    Attributes:
        name: Unique in its set, lower case with underscores.
        meaning: One sentence for a reader, with the unit.
        window: The events or the item that it is computed from: ``request``, ``newest 256 events``, ``item``.
        dtype: The numpy name of its type.
        version: Raised when the computation changes under the same name.
    """

    name: str
    meaning: str
    window: str = "request"
    dtype: str = "float32"
    version: int = 1


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """An ordered set of features; position = column in the model's input.

    Raises:
        ValueError: Two features share a name.
    """

    features: tuple[Feature, ...]

    def __post_init__(self) -> None:
        """Refuse a set in which a name would mean two columns."""
        if len(set(self.names)) != len(self.features):
            raise ValueError(f"feature names must be unique, got {list(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the order of columns."""
        return tuple(feature.name for feature in self.features)

    def __len__(self) -> int:
        """Count the columns."""
        return len(self.features)

    def __iter__(self) -> Iterator[Feature]:
        """Iterate in column order."""
        return iter(self.features)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of everything that changes a model's input: order, names, types, windows and versions.

        The meaning is left out: better words for the same number do not make a bundle incompatible.
        """
        columns = [[f.name, f.dtype, f.window, f.version] for f in self.features]
        return hashlib.sha256(json.dumps(columns, separators=(",", ":")).encode()).hexdigest()
