"""Settings: where they come from, which wins, and what is refused."""

from __future__ import annotations

import pytest

from features.errors import SettingsError
from features.profile import Purpose
from serving.config import ServeConfig
from serving.errors import ConfigError


def load(**settings) -> ServeConfig:
    return ServeConfig.load(**{"bundle": "b", **settings})


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path, monkeypatch):
    file = tmp_path / "serve.yaml"
    file.write_text("threads: 2\nworkers: 2\npartitions: 2\n")
    monkeypatch.setenv("PENCHANT_THREADS", "3")
    monkeypatch.setenv("PENCHANT_WORKERS", "3")
    found = ServeConfig.load(file, bundle="b", threads=4, workers=None)
    assert (found.threads, found.workers, found.partitions, found.port) == (4, 3, 2, 50051)


def test_a_single_setting_wins_over_the_environment_and_an_option_over_it(monkeypatch):
    monkeypatch.setenv("PENCHANT_THREADS", "3")
    config = ServeConfig.load(
        None, ["threads=4", "workers=5", "token=123", "retention_days={view_item: 3}"], bundle="b", workers=6
    )
    assert (config.threads, config.workers, config.secret()) == (4, 6, "123")
    assert config.retention_days == {"view_item": 3.0}
    with pytest.raises(SettingsError, match="did you mean 'workers'"):
        ServeConfig.load(None, ["worker=3"], bundle="b")
    with pytest.raises(SettingsError, match="write KEY=VALUE"):
        ServeConfig.load(None, ["threads"], bundle="b")


def test_an_unknown_setting_names_the_nearest(tmp_path):
    with pytest.raises(SettingsError, match="did you mean 'workers'"):
        load(worker=3)
    file = tmp_path / "serve.yaml"
    file.write_text("holdout_shar: 0.5\n")
    with pytest.raises(SettingsError, match="did you mean 'holdout_share'"):
        ServeConfig.load(file, bundle="b")


def test_a_near_miss_in_the_environment_is_told_and_what_is_not_ours_is_left(monkeypatch, caplog):
    for name, value in (("DATA", "/data"), ("TRAIN_THREADS", "3"), ("WAREHOUSE_PORT", "tcp://10.0.0.1:80")):
        monkeypatch.setenv(f"PENCHANT_{name}", value)
    load()
    assert not caplog.records
    monkeypatch.setenv("PENCHANT_WORKRES", "3")
    assert load().workers == 0
    assert "PENCHANT_WORKRES is ignored: there is no such setting; did you mean PENCHANT_WORKERS?" in caplog.text


def test_the_address_of_a_service_called_penchant_metrics_is_no_setting(monkeypatch, caplog):
    monkeypatch.setenv("PENCHANT_METRICS_PORT", "tcp://10.0.0.1:9090")
    assert load().metrics_listen == ""
    assert not caplog.records
    monkeypatch.setenv("PENCHANT_METRICS_LISTEN", "0.0.0.0:9090")
    assert load().metrics_listen == "0.0.0.0:9090"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("METRICS_LISTEN", "9090"),
        ("METRICS_LISTEN", "0.0.0.0:http"),
        ("LOG_FORMAT", "xml"),
        ("ACCESS_LOG", "some"),
        ("WORKERS", ""),
        ("WORKERS", "two"),
        ("LISTEN", "50051"),
        ("DEFAULT_PURPOSES", '["sell"]'),
        ("RETENTION_DAYS", "view_item"),
    ],
)
def test_a_wrong_value_of_a_variable_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(f"PENCHANT_{name}", value)
    with pytest.raises(SettingsError, match=rf"^PENCHANT_{name}: .*sets {name.lower()}") as failure:
        load()
    assert len(str(failure.value).splitlines()) == 1
    # Given at the command line as well, the variable does not count.
    field = {"DEFAULT_PURPOSES": ["train"], "RETENTION_DAYS": {}, "LISTEN": "127.0.0.1:1"}
    field |= {"METRICS_LISTEN": "127.0.0.1:1", "LOG_FORMAT": "json", "ACCESS_LOG": "all"}
    load(**{name.lower(): field.get(name, 3)})


def test_settings_that_do_not_fit_each_other_name_the_variables(monkeypatch):
    monkeypatch.setenv("PENCHANT_LISTEN", "0.0.0.0:50051")
    monkeypatch.setenv("PENCHANT_TLS_CERTIFICATE", "c")
    with pytest.raises(SettingsError, match=r"belong together.* \(set by PENCHANT_TLS_CERTIFICATE\)"):
        load()
    with pytest.raises(SettingsError, match=r"not a loopback address.* \(set by PENCHANT_LISTEN, PENCHANT_TLS_"):
        load(tls_key="k")


def test_a_secret_of_the_environment_is_not_told(monkeypatch):
    monkeypatch.setenv("PENCHANT_TOKEN", "s3cret")
    assert load().secret() == "s3cret"
    monkeypatch.setenv("PENCHANT_WORKERS", "two")
    with pytest.raises(SettingsError) as failure:
        load()
    assert "s3cret" not in str(failure.value)


@pytest.mark.parametrize("text", ['["train"]', "[train]"])
def test_a_list_in_the_environment_is_json_or_yaml(monkeypatch, text):
    monkeypatch.setenv("PENCHANT_DEFAULT_PURPOSES", text)
    assert load().default_consent is Purpose.TRAIN
    monkeypatch.setenv("PENCHANT_DEFAULT_PURPOSES", "train,measure")
    with pytest.raises(SettingsError, match=r"PENCHANT_DEFAULT_PURPOSES.*write a list as"):
        load()


def test_profiles_are_evicted_only_where_they_can_be_restored():
    with pytest.raises(SettingsError, match="evict_after_days needs the warehouse"):
        load(evict_after_days=30, warehouse=False)
    with pytest.raises(SettingsError, match="evict_after_days needs users in the warehouse"):
        load(evict_after_days=30, default_purposes=["personalise"])
    load(evict_after_days=30)
    load(evict_after_days=30, warehouse=False, warehouse_dir="elsewhere")


@pytest.mark.parametrize(
    "settings",
    [
        {"threads": 0},
        {"default_purposes": ["sell"]},
        {"retention_days": {"view_item": 0}},
        {"purge_hours": 0},
        {"holdout_share": 1.5},
        {"device": "tpu"},
        {"redis": 5},
        {"listen": "nowhere"},
        {"listen": "h:99999"},
    ],
)
def test_a_value_that_cannot_be_names_its_setting(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        load(**settings)


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:1", "example.org:1", "*:1"])
def test_an_address_beyond_this_machine_needs_protection(listen, tmp_path):
    with pytest.raises(SettingsError, match="loopback"):
        load(listen=listen)
    with pytest.raises(SettingsError, match="loopback"):
        load(listen=listen, tls_certificate="c", tls_key="k")
    assert load(listen=listen, insecure=True).insecure
    assert load(listen=listen, tls_certificate="c", tls_key="k", token="t").port


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:50051", "127.8.9.1:1"])
def test_this_machine_is_open(listen):
    assert load(listen=listen).port >= 0


def test_workers_are_as_many_as_the_container_grants(monkeypatch):
    monkeypatch.setattr("serving.config.cores", lambda: 3)
    assert load().worker_count == 3
    assert load(workers=5).worker_count == 5


def test_half_a_key_pair_is_refused():
    with pytest.raises(SettingsError, match="belong together"):
        load(tls_certificate="c")


def test_the_token_comes_from_its_file_and_is_never_printed(tmp_path):
    file = tmp_path / "token"
    file.write_text("secret-in-file\n")
    assert load(token_file=file).secret() == "secret-in-file"
    config = load(token="secret-in-hand")
    assert config.secret() == "secret-in-hand"
    assert "secret" not in f"{config.printable()}{config!r}"
    with pytest.raises(ConfigError, match="token_file"):
        load(token_file=tmp_path / "none").secret()


def test_what_people_allow_by_default_comes_from_anywhere(monkeypatch):
    assert load().default_consent == Purpose(7)
    monkeypatch.setenv("PENCHANT_DEFAULT_PURPOSES", '["measure", "train"]')
    assert load().default_consent == Purpose.TRAIN | Purpose.MEASURE
