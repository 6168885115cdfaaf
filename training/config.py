"""The settings of a training: one frozen object, which the run keeps with its model.

`features.settings` says where values come from; the variables are `PENCHANT_TRAIN_*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.declared import Declared
from features.errors import SettingsError
from features.event_types import NEGATIVE_EVENT_TYPES, PASSIVE_EVENT_TYPES
from features.profile import RING
from features.settings import load_settings
from features.tables.intake import REJECTED_SHARE

PREFIX = "PENCHANT_TRAIN_"
PASSIVE_TYPES = (*PASSIVE_EVENT_TYPES, *NEGATIVE_EVENT_TYPES)
"""Event types in which a user has not chosen an item."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Action(_Frozen):
    """An action of a user on an item that was shown, which the ranker predicts."""

    name: str
    event_type: str
    min_value: float | None = Field(default=None, description="Smallest value of the event that counts; none: any.")
    shown_types: tuple[str, ...] = Field((), description="Event types that show an item, which the action may follow.")
    window_hours: float = Field(24.0, gt=0, description="Hours after an impression within which the action counts.")


class TrainConfig(_Frozen):
    """All settings of `penchant train`."""

    # The split: the events that train, validate and test.
    protocol: Literal["none", "leave-one-out", "temporal"] = Field(
        "none", description="Events held out for `penchant evaluate`; none: all but validation are trained on."
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="Share of all events, the newest, that temporal holds out.")
    test_days: float = Field(0, ge=0, description="Days, the last, that temporal holds out; 0: test_share decides.")
    cold_item_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the items, drawn by the seed, whose events are not trained on; "
        "`evaluate --protocol cold-items` then measures how well content alone places them.",
    )
    validation_users: int = Field(3000, ge=0, description="Users whose newest training event validates the model.")

    # The events: those that a user's history holds, and those that are predicted.
    max_length: int = Field(100, ge=1, le=RING, description="Events of a user that the encoder reads, the newest.")
    target_types: tuple[str, ...] = Field((), description="Event types to predict; empty: all but the passive.")
    seen_types: tuple[str, ...] = Field((), description="Event types that make an item seen; empty: as targets.")
    target_min_value: float | None = Field(
        None,
        description="Smallest value of an event that is predicted and that speaks for its item, as 4 of ratings from 1 "
        "to 5; lower ones stand in histories and make items seen, those without a value count. None: any value.",
    )
    repeats: bool = Field(False, description="Recommend items that a user already had; else only new ones.")
    actions: tuple[Action, ...] = Field((), description="Actions that the ranker predicts; empty: each target type.")
    action_weights: dict[str, float] = Field({}, description="Worth of an action by name; one not named is worth 1.")
    ordered: bool = Field(
        True,
        description="The order of a user's events carries signal; false: the encoder learns from them in random order, "
        "and without times validation and tests hold out random events.",
    )
    recent_days: float = Field(7.0, gt=0, description="Days that count for recent popularity.")

    # The encoders: their sizes, and the parts of an item's content that they read.
    encoder: str = Field(
        "transformer", description="User encoder; the name of an entry point `penchant.encoders` of another package."
    )
    dim: int = Field(64, ge=4, description="Length of the vectors of users, items and queries.")
    layers: int = Field(2, ge=1, description="Transformer blocks of the user encoder.")
    heads: int = Field(2, ge=1, description="Attention heads of a block; divides dim.")
    feed_forward: int = Field(256, ge=1, description="Width of a block's feed-forward part.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Share of the user encoder's activations that are dropped.")
    content: bool = Field(True, description="Learn from the items' content, which places new items.")
    id_dropout: float = Field(0.1, ge=0, lt=1, description="Share of items known by content alone in a step.")
    token_buckets: int = Field(16384, ge=1, description="Buckets that the words of items and queries hash into.")
    max_tokens: int = Field(32, ge=1, description="Words read of an item or a query.")
    category_buckets: int = Field(1024, ge=1, description="Buckets that categories hash into.")
    max_categories: int = Field(8, ge=1, description="Categories read of an item.")
    creator_buckets: int = Field(4096, ge=1, description="Buckets that creators hash into.")

    # The encoders' training.
    loss: str = Field(
        "softmax", description="Loss; the name of an entry point `penchant.losses` of another installed package."
    )
    warm_start: float = Field(
        0.1, ge=0, description="Scale of the initial item vectors, made from co-occurrence; 0: random ones."
    )
    epochs: int = Field(30, ge=1, description="Passes over the events; the learning rate falls to zero over them.")
    patience: int = Field(6, ge=1, description="Validations without improvement after which training stops.")
    validate_every: float = Field(1.0, gt=0, description="Epochs between two validations.")
    batch_tokens: int = Field(4096, ge=16, description="Events of a batch, padding included.")
    learning_rate: float = Field(2e-3, gt=0, description="Highest learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    warmup_steps: int = Field(200, ge=0, description="Steps over which the learning rate rises.")
    clip: float = Field(1.0, gt=0, description="Norm to which gradients are clipped.")
    negatives: int = Field(
        0, ge=0, description="Items a batch shares as negatives; 0: the full softmax up to 20,000 items, else 4,096."
    )
    dense_items: int = Field(
        50_000,
        ge=0,
        description="Items up to which a step with sampled negatives updates all item vectors, else only those that it "
        "uses, by the same rule (AdamW).",
    )
    loss_chunk: int = Field(1024, ge=1, description="Events whose scores for all items are in memory at once.")
    checkpoint_seconds: float = Field(60.0, gt=0, description="Seconds between two checkpoints.")
    start_share: float = Field(
        0.1, gt=0, le=1, description="Share of the time of a full training that one from an earlier run takes."
    )
    start_rate: float = Field(
        0.3, gt=0, le=1, description="Share of the learning rate at which a training from an earlier run begins."
    )
    tensorboard: bool = Field(False, description="Write the learning curve for TensorBoard too, below RUN/tensorboard.")

    # The query encoder and the ranker, trained on the finished encoders.
    query_steps: int = Field(400, ge=0, description="Steps that train the query encoder.")
    ranker_steps: int = Field(400, ge=0, description="Steps that train the ranker; 0: it passes relevance through.")
    ranker_hidden: int = Field(64, ge=1, description="Width of the ranker's hidden layers.")
    ranker_members: int = Field(1, ge=1, description="Networks whose mean is the ranker; each sees its own batches.")
    ranker_bins: int = Field(0, ge=0, description="Quantile bins by which the ranker also reads each feature.")
    ranker_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the ranker's inner activations dropped.")
    ranker_decay: float = Field(0.1, ge=0, description="Weight decay of the ranker.")
    ranker_rate: float = Field(2e-3, gt=0, description="Highest learning rate of the ranker.")
    ranker_epochs: int = Field(12, ge=1, description="Most passes over the impressions; validation chooses how many.")
    ranker_days: float = Field(
        0, ge=0, description="Days of impressions that train the ranker and not the encoders; 0: all, and both."
    )
    methods: tuple[str, ...] = Field(
        ("recommend", "rank"),
        description="Methods whose impressions the ranker learns from, `rank` only without a query; impressions that "
        "name no method count in any case.",
    )
    ranker_validation_days: float = Field(
        0, ge=0, description="Days of impressions, the last but the test, that validate the ranker; 0: the last tenth."
    )
    statistics_hours: float = Field(24.0, gt=0, description="Hours between two snapshots of item statistics.")
    features: tuple[dict[str, Any], ...] = Field(
        (), description="Further inputs of the ranker, each an object: see docs/training.md, Features of your own."
    )
    candidates: int = Field(500, ge=10, description="Items of a user that the ranker scores, the most relevant.")
    neighbors: int = Field(50, ge=1, description="Similar items kept per item.")

    # The quality of the data, the seed and the machine.
    max_rejected_share: float = Field(
        REJECTED_SHARE, ge=0, le=1, description="Share of a table's rows that may be malformed; above it, no training."
    )
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    device: str = Field("auto", description="auto, cpu or cuda; auto is cuda where there is one.")
    threads: int = Field(0, ge=0, description="Threads on a CPU; 0: one per core.")

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        try:
            Declared.of(self.features)
        except ValueError as error:
            raise ValueError(f"features: {error}") from error
        return self

    def resolved_device(self) -> torch.device:
        """Returns the device that `device` means on this machine.

        Raises:
            SettingsError: This machine lacks the device.
        """
        cuda = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if cuda else "cpu")
        if self.device.startswith("cuda") and not cuda:
            raise SettingsError("device is cuda, but this machine offers none: use --device cpu or auto")
        return torch.device(self.device)


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    device: str | None = None,
    seed: int | None = None,
) -> TrainConfig:
    """Returns the configuration of a training.

    Args:
        file: YAML file of settings; the name of one that comes with Penchant (`movielens`) works too.
        overrides: `KEY=VALUE` texts, or a mapping.
        device: Replaces `device` when given.
        seed: Replaces `seed` when given.

    Raises:
        SettingsError: A key is unknown, or a value is not allowed; that of a variable is named by the variable.
    """
    options: dict[str, Any] = {"device": device, "seed": seed}
    assignments: Iterable[str] = ()
    if isinstance(overrides, Mapping):
        options = {**overrides, **{name: value for name, value in options.items() if value is not None}}
    else:
        assignments = overrides
    return load_settings(TrainConfig, PREFIX, _resolved(file) if file else None, assignments, options)


def resolve_config(config: TrainConfig | str | Path | None, settings: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration that a caller in Python means.

    Args:
        config: The settings themselves, or `load_config`'s `file`.
        settings: Values by setting, which win over those of `config`.

    Raises:
        SettingsError: As `load_config`.
    """
    if not isinstance(config, TrainConfig):
        return load_config(None if config is None else Path(config), settings)
    # Checked like any others: `model_copy` would take whatever it is given.
    return load_config(None, {**config.model_dump(), **settings}) if settings else config


def _resolved(file: Path) -> Path:
    """Returns the path of a file of settings; a name that is no file may be one of those that come with Penchant."""
    shipped = Path(__file__).parent / "configs" / f"{file}.yaml"
    return shipped if not file.exists() and shipped.is_file() else file
