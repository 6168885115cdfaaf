"""The settings of the service: one frozen object, printed once at start.

`features.settings` says where values come from; the variables are `PENCHANT_*`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    SecretStr,
    model_validator,
)

from features.limits import cores
from features.profile import EVERY_PURPOSE, Purpose
from features.settings import load_settings
from features.subjects import PARTITIONS
from serving.errors import ConfigError
from serving.folder_identity import local_folder
from serving.log_retention import LogRetention

PREFIX = "PENCHANT_"
_FOREIGN = ("DATA", "TRAIN_")
"""Beginnings of variables that belong to tests and training, after the prefix."""
# Not a setting of its own: `drain_delay_s` replaces it.
_DRAIN_DELAY_S = 5.0
"""Kubernetes needs a second or two to remove an endpoint everywhere, balancers that probe every few seconds more."""

MOST_SURFACES = 64
"""Most surfaces with labels of their own."""


def _checked_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected HOST:PORT with a port of 0 to 65535")
    return address


def _checked_folder(place: Any) -> Any:
    try:
        return local_folder(place) if isinstance(place, str | Path) else place
    except ConfigError as error:
        raise ValueError(str(error)) from None


_Address = Annotated[str, AfterValidator(_checked_address)]
_OptionalAddress = Annotated[str, AfterValidator(lambda address: address and _checked_address(address))]
_Folder = Annotated[Path | None, BeforeValidator(_checked_folder)]
_Purposes = Annotated[tuple[str, ...], AfterValidator(lambda purposes: Purpose.of(purposes).names)]


class ServeConfig(BaseModel):
    """Every setting of `penchant serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path = Field(description="Directory of the bundle to serve.")
    listen: _Address = Field("127.0.0.1:50051", description="HOST:PORT to listen on; port 0 picks a free one.")
    workers: int = Field(0, ge=0, le=256, description="Worker processes; 0 means one per core.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where the models run and the index is searched; auto takes a GPU for what can run there, cuda "
        "requires one for both.",
    )

    # Where the stores are.
    redis: str = Field("embedded", description='URL of the Redis that holds profiles, or "embedded".')
    events_redis: str = Field("", description="URL of the Redis that holds the event log; empty means as `redis`.")
    redis_timeout_ms: int = Field(50, ge=1, description="Longest wait for a profile; the answer goes out without.")
    unsafe_redis: bool = Field(False, description="Accept a Redis whose settings may lose acknowledged data.")
    state_dir: Path = Field(Path("penchant-state"), description="Directory where embedded Redis keeps its data.")
    partitions: int = Field(
        PARTITIONS, ge=1, le=4096, description="Partitions of a new event log; one that exists keeps its own number."
    )

    # Retention of the data of users.
    default_purposes: _Purposes = Field(
        EVERY_PURPOSE.names, description="Purposes that users allow until they set their consent; the default is all."
    )
    retention_days: dict[str, PositiveFloat] = Field(
        {}, description="Days after which events of a type are left out of rebuilt profiles."
    )
    refused_in_ids: str = Field(
        "\0{}",
        description="Characters that no id of an event may hold: signs of a cut string or of a template that was not "
        "filled in. Empty where ids do hold them.",
    )
    user_cap: int = Field(
        100_000, ge=1, description="Events and slates of one user that the log holds; more events are refused."
    )
    evict_after_days: float = Field(
        0.0,
        ge=0,
        description="Days without an event after which a profile is evicted; it is restored from the warehouse when "
        "its user returns; 0 is never. Only where the warehouse holds every event that profiles were made of.",
    )
    log_hours: PositiveFloat | None = Field(
        None,
        description="Hours that an event stays in the log's memory once every reader has it, and in which it can be "
        "undone or moved by a merge; None is 24, and 168 where no warehouse reads the log.",
    )
    slate_log_hours: PositiveFloat | None = Field(
        None,
        description="Hours that a slate stays in the log's memory once every reader has it, at most `log_hours`; None "
        "is 2, and 168 where no warehouse reads the log.",
    )
    retry_hours: float = Field(
        24.0,
        gt=0,
        le=7 * 24,
        description="Age in hours up to which an event is taken. For so long, and no less than `log_hours`, an event "
        "that is sent again is recognised, which takes about 100 bytes of the log's memory an event.",
    )
    purge_hours: float = Field(
        24.0, gt=0, description="Longest time between an erasure and the removal of its bytes from the disks, in hours."
    )

    erasure_ledger: Path | None = Field(
        None, description="File that records erasures, to keep apart from backups; None: in `state_dir`."
    )

    # Other processes of the service, and the warehouse.
    projector: bool = Field(True, description="Run the projector here; else run `penchant projector`.")
    warehouse: bool = Field(True, description="Write the log to Parquet here; else run `penchant warehouse`.")
    warehouse_dir: _Folder = Field(
        None,
        description="Directory of the Parquet, a path or file:// URL; None means `warehouse` in `state_dir`. Where "
        "several hosts serve one event log, give all of them the same folder, on a mount that each reaches.",
    )
    warehouse_flush_s: float = Field(30.0, gt=0, description="Longest time until an event is in Parquet, in seconds.")
    warehouse_days: PositiveFloat | None = Field(
        None, description="Days after which the Parquet of a day is deleted; None keeps it for ever."
    )

    # Authentication of callers.
    token: SecretStr | None = Field(None, description="Secret that calls carry as `authorization: Bearer ...`.")
    token_file: Path | None = Field(None, description="File that holds the token.")
    tls_certificate: Path | None = Field(None, description="PEM certificate chain of the server.")
    tls_key: Path | None = Field(None, description="PEM private key of the server.")
    tls_client_ca: Path | None = Field(None, description="PEM roots that client certificates must come from.")
    insecure: bool = Field(False, description="Allow a public address without TLS and token.")

    # How much at once, and how a stop goes.
    threads: int = Field(2, ge=1, le=256, description="Rankings that a worker computes at once; others wait.")
    max_concurrent: int = Field(
        32, ge=1, le=1024, description="Calls of a worker, in progress or waiting; more are refused."
    )
    max_message_bytes: int = Field(4 << 20, ge=1 << 16, description="Largest message accepted, in bytes.")
    default_deadline_ms: int = Field(1000, ge=1, description="Deadline of a call that sets none, in milliseconds.")
    drain_s: float = Field(10.0, ge=0, description="Time that calls in progress get to finish at a stop, in seconds.")
    drain_delay_s: float | None = Field(
        None,
        ge=0,
        description="Time that a stop waits, not ready and still serving, until balancers send calls elsewhere, in "
        "seconds; None is 5, and 0 where `listen` is a loopback address.",
    )
    max_connection_age_s: float = Field(
        120.0,
        ge=0,
        description="Age at which the service asks a client to reconnect, 10 % more or less, in seconds, so that "
        "connections spread over workers and instances; 0 is never.",
    )
    max_connection_age_grace_s: float = Field(
        3600.0, gt=0, description="Time that calls in progress on such a connection get to finish, in seconds."
    )
    share_port: bool = Field(
        False, description="Listen on an address that another instance holds, to take over when it stops."
    )

    # Behaviour of the pipelines.
    candidates: int = Field(0, ge=0, le=5000, description="Candidates a source proposes; 0 as many as in evaluation.")
    user_vectors: int = Field(
        32_768, ge=0, description="User vectors that a worker keeps; a user without new events is not encoded again."
    )
    fresh_days: float = Field(14.0, ge=0, description="Age up to which a live item counts as fresh, in days.")
    search_personal: float = Field(
        0.25, ge=0, le=1, description="Most that a user's taste moves a search score of 0 to 1."
    )
    holdout_share: float = Field(0.0, ge=0, le=1, description="Share of users who get the unpersonalised answer.")
    holdout_salt: str = Field("holdout-1", description="Salt of the hash that picks them; change it to draw others.")

    # What is logged and measured.
    impressions: bool = Field(True, description="Write every live slate to the impression log.")
    impression_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of users whose slates are logged, all of theirs or none, drawn by a hash of the user; "
        "evaluation corrects for it by the column `weight`.",
    )
    impression_queue: int = Field(10_000, ge=1, description="Slates that may wait for the log; more are dropped.")
    log_features: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of slates that are logged with the features that models read; 0 is off.",
    )
    metrics_listen: _OptionalAddress = Field(
        "",
        description="HOST:PORT of the metrics of all processes, for Prometheus; port 0 picks a free one; empty is off.",
    )
    metrics_surfaces: tuple[str, ...] = Field(
        (),
        max_length=MOST_SURFACES,
        description='Surfaces with labels of their own in metrics and logs, all others being "other"; empty means '
        "those that the ranker was trained on.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of the log's lines on standard error.")
    access_log: Literal["off", "errors", "all"] = Field(
        "errors",
        description="Requests with a line in the log: none, those that fail (one line a minute for each method and "
        "code), or all.",
    )
    reflection: bool = Field(True, description="Serve gRPC reflection.")
    health_listen: _OptionalAddress = Field(
        "", description="HOST:PORT of /healthz and /readyz over HTTP; port 0 picks a free one, empty is off."
    )
    strict_readiness: bool = Field(False, description="Count as ready only while nothing is degraded.")

    @classmethod
    def load(cls, file: Path | None = None, assignments: Iterable[str] = (), **options: Any) -> Self:
        """Returns the settings from a file, `KEY=VALUE` assignments and options; options that are None are not given.

        Raises:
            SettingsError: A key is unknown or a value is not allowed.
        """
        return load_settings(cls, PREFIX, file, assignments, options, foreign=_FOREIGN)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_consistent(self)
        return self

    @property
    def default_consent(self) -> Purpose:
        """The purposes that users allow until they set their consent."""
        return Purpose.of(self.default_purposes)

    @property
    def log_retention(self) -> LogRetention:
        """The time for which the log keeps entries that every reader has."""
        return LogRetention.of(self.log_hours, self.slate_log_hours, self.warehouse)

    @property
    def host(self) -> str:
        """Host part of `listen`."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port part of `listen`."""
        return int(self.listen.rpartition(":")[2])

    @property
    def delay_s(self) -> float:
        """Time between "not ready" and draining, the default resolved, in seconds."""
        # No balancer is in front of a loopback address, so a stop there need not wait for one.
        if self.drain_delay_s is not None:
            return self.drain_delay_s
        return 0.0 if _is_loopback(self.host) else _DRAIN_DELAY_S

    @property
    def worker_count(self) -> int:
        """Number of worker processes, the default resolved."""
        return self.workers or cores()

    @property
    def warehouse_path(self) -> Path:
        """Directory of the Parquet, the default resolved."""
        return self.warehouse_dir or self.state_dir / "warehouse"

    @property
    def ledger_path(self) -> Path:
        """File that records erasures, the default resolved."""
        return self.erasure_ledger or self.state_dir / "erasures.jsonl"

    def secret(self) -> str:
        """Returns the token, from the setting or its file; empty if calls need none.

        Raises:
            ConfigError: The file cannot be read, or is empty.
        """
        # A file is read at every start, so a rotated token needs no change of settings.
        if self.token_file:
            try:
                secret = self.token_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError(f"token_file: cannot read {self.token_file} ({error.strerror})") from None
            if not secret:
                raise ConfigError(f"token_file: {self.token_file} is empty; put the token in it")
            return secret
        return self.token.get_secret_value() if self.token else ""

    def printable(self) -> dict[str, Any]:
        """Returns the settings that differ from the defaults as JSON values, without the secret."""
        return self.model_dump(mode="json", exclude={"token"}, exclude_defaults=True)


def _require_consistent(config: ServeConfig) -> None:
    """Refuses settings that do not go together; raises ValueError."""
    # Refused at the start: at run time each of these would show late, or never.
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise ValueError("tls_certificate and tls_key belong together: give both or none")
    if config.tls_client_ca and not config.tls_certificate:
        raise ValueError("tls_client_ca needs tls_certificate and tls_key")
    if config.evict_after_days and not (config.warehouse or config.warehouse_dir):
        raise ValueError("evict_after_days needs the warehouse to restore profiles: set warehouse or warehouse_dir")
    if config.evict_after_days and not config.default_consent & (Purpose.TRAIN | Purpose.MEASURE):
        raise ValueError("evict_after_days needs users in the warehouse: set default_purposes to train or measure")
    if not (
        _is_loopback(config.host) or config.insecure or (config.tls_certificate and (config.token or config.token_file))
    ):
        raise ValueError(
            f"listen: {config.listen} is not a loopback address: give tls_certificate, tls_key and a token, or set "
            "insecure"
        )


def _is_loopback(host: str) -> bool:
    # A name other than this one is not resolved: it may mean another address tomorrow.
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
