"""Losses and user encoders of other installed packages, found by the name of an entry point.

    [project.entry-points."penchant.losses"]
    sharp = "my_package:sharp_loss"

    [project.entry-points."penchant.encoders"]
    mean = "my_package:MeanEncoder"

`--set loss=sharp` and `--set encoder=mean` then train with them. A loss is a function with the arguments of
`training.models.losses.softmax_loss`; an encoder is a class that is made from an `EncoderShape`, with the methods
`forward` and `last` of `training.models.encoders.UserEncoder`. Both are tried on a few numbers before a training
begins, so that a shape or a type that does not fit is not found after hours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from features.errors import SettingsError
from training.config import TrainConfig
from training.models.encoders import EncoderShape, UserEncoder
from training.models.losses import softmax_loss

LOSSES, ENCODERS = "penchant.losses", "penchant.encoders"
"""Groups of entry points."""
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
"""Users `[T, D]`, items `[N, D]`, targets int64 `[T]`, correction `[N]` or None, chunk; see `softmax_loss`."""
_OWN: Mapping[str, Mapping[str, Any]] = {LOSSES: {"softmax": softmax_loss}, ENCODERS: {"transformer": UserEncoder}}
_SETTINGS = {LOSSES: "loss", ENCODERS: "encoder"}
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Extension:
    """A loss or an encoder by its name.

    Attributes:
        value: The function or the class.
        distribution: The package that it comes from, "" for Penchant's own.
        version: Its version.
    """

    value: Any
    distribution: str = ""
    version: str = ""


def require_extensions(config: TrainConfig) -> None:
    """Finds and tries the loss and the encoder of a training before anything is read.

    Raises:
        SettingsError: See `find`; or one breaks its contract.
    """
    loss_of(config)
    if find(ENCODERS, config.encoder).distribution:
        # Another one than the training's, which would draw other first weights.
        with torch.random.fork_rng(devices=[]):
            encoder_of(config, shape_of(config, 1))


def shape_of(config: TrainConfig, event_types: int) -> EncoderShape:
    """Returns the sizes of the user encoder."""
    return EncoderShape(
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        feed_forward=config.feed_forward,
        max_length=config.max_length,
        types=event_types,
        dropout=config.dropout,
        ordered=config.ordered,
    )


def loss_of(config: TrainConfig) -> Loss:
    """Returns the loss that the setting `loss` names.

    Raises:
        SettingsError: See `find`; or it breaks the contract.
    """
    extension = find(LOSSES, config.loss)
    if extension.distribution:
        with torch.random.fork_rng(devices=[]):
            _try_loss(config.loss, extension.value)
    return cast("Loss", extension.value)


def encoder_of(config: TrainConfig, shape: EncoderShape) -> UserEncoder:
    """Builds the user encoder that the setting `encoder` names.

    Raises:
        SettingsError: See `find`; or it breaks the contract.
    """
    extension = find(ENCODERS, config.encoder)
    if not extension.distribution:
        return cast("UserEncoder", extension.value(shape))
    try:
        encoder = extension.value(shape)
    except (TypeError, ValueError) as error:
        raise _broken("encoder", config.encoder, f"cannot be made from an EncoderShape ({error})") from error
    with torch.random.fork_rng(devices=[]):
        _try_encoder(config.encoder, encoder, shape)
    return cast("UserEncoder", encoder)


def extensions_of(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Returns what a run's result says of foreign losses and encoders: by setting their name and distribution."""
    used = {
        setting: (name, find(group, name))
        for group, setting in _SETTINGS.items()
        if (name := getattr(config, setting)) not in _OWN[group]
    }
    return {
        setting: {"name": name, "distribution": extension.distribution, "version": extension.version}
        for setting, (name, extension) in used.items()
    }


def find(group: str, name: str) -> Extension:
    """Finds a loss or an encoder among Penchant's own and those of installed packages.

    Raises:
        SettingsError: The name is unknown, stands for more than one, or its package cannot be loaded.
    """
    shipped, setting = _OWN[group], _SETTINGS[group]
    points = [point for point in entry_points(group=group) if point.name == name]
    if name in shipped and points:
        raise SettingsError(
            f"{setting}: {name!r} is Penchant's own, and {_source(points[0])} has another of that name: give that one "
            "another name, or uninstall the package"
        )
    if name in shipped:
        return Extension(shipped[name])
    if len(points) > 1:
        raise SettingsError(
            f"{setting}: {' and '.join(map(_source, points))} both have a {setting} named {name!r}: uninstall one"
        )
    if not points:
        names = sorted({*shipped, *(point.name for point in entry_points(group=group))})
        nearest = difflib.get_close_matches(name, names, n=1)
        advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise SettingsError(
            f"{setting}: no {setting} is named {name!r}: known are {', '.join(names)} (entry points of the group "
            f"{group!r} of installed packages){advice}"
        )
    return _loaded(points[0], setting)


def _loaded(point: EntryPoint, setting: str) -> Extension:
    try:
        value = point.load()
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"{setting}: {point.value} of {_source(point)} cannot be loaded ({error}): repair or reinstall the package"
        ) from error
    if not callable(value):
        raise SettingsError(f"{setting}: {point.value} of {_source(point)} is neither a function nor a class")
    name, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
    return Extension(value, name, version)


def _source(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _try_loss(name: str, loss: Loss) -> None:
    """Asks a loss for the mean over three users of five items, with and without a correction."""
    for correction in (None, torch.zeros(5)):
        users, items = (torch.randn(size, 4, requires_grad=True) for size in (3, 5))
        value: Any = loss(users, items, torch.tensor([0, 4, 2]), correction, 2)
        if not isinstance(value, Tensor) or value.shape or not value.is_floating_point() or not value.isfinite():
            raise _broken("loss", name, "has to return a finite scalar")
        value.backward()  # type: ignore[no-untyped-call]
        for label, part in (("users", users), ("items", items)):
            if part.grad is None or not part.grad.isfinite().all():
                raise _broken("loss", name, f"has to have a gradient by {label}")


def _try_encoder(name: str, encoder: Any, shape: EncoderShape) -> None:
    """Asks an encoder for two users, and whether later events change what it says of earlier ones."""
    if not isinstance(encoder, nn.Module) or not callable(getattr(encoder, "last", None)):
        raise _broken("encoder", name, "has to be a torch.nn.Module with the methods forward and last")
    was_training = encoder.training
    encoder.eval()
    width = min(3, shape.max_length)
    vectors, lengths = torch.randn(2, width, shape.dim), torch.tensor([width, 1])
    types = torch.ones(2, width, dtype=torch.int64)
    types[1, 1:], vectors[1, 1:] = 0, 0
    with torch.no_grad():
        newest: Any = encoder.last
        hidden, last = encoder(vectors, types, lengths), newest(vectors, types, lengths)
        _require_shape(name, "forward", hidden, (2, width, shape.dim))
        _require_shape(name, "last", last, (2, shape.dim))
        if (hidden[torch.arange(2), lengths - 1] - last).abs().max() > _TOLERANCE:
            raise _broken("encoder", name, "has to return by last what forward returns at the newest event")
        changed = vectors.clone()
        changed[:, -1] += 1
        if width > 1 and (encoder(changed, types, lengths)[:, :-1] - hidden[:, :-1]).abs().max() > _TOLERANCE:
            raise _broken("encoder", name, "must not look at later events: it would learn to read its targets")
    encoder.train(was_training)


def _require_shape(name: str, method: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != torch.float32:
        returned = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise _broken("encoder", name, f"has to return float32 {list(shape)} by {method}, and returns {returned}")


def _broken(setting: str, name: str, duty: str) -> SettingsError:
    return SettingsError(f"{setting}: {name!r} {duty}; see training.models.extensions")
