"""Variables of services called `penchant-...` stop nothing; what is meant for us and is wrong is told."""

from __future__ import annotations

import logging
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from features.environment import variables
from serving.config import ServeConfig
from training.config import TrainConfig

FIELDS = [*ServeConfig.model_fields, "metrics_port"]
"""The settings, and one whose name ends as the variables of services do."""

SETTINGS = {"PENCHANT_": FIELDS, "PENCHANT_TRAIN_": TrainConfig.model_fields}

names = st.lists(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), max_size=3)
ours = st.sampled_from([name.replace("_", "-") for fields in SETTINGS.values() for name in fields]).map(lambda n: [n])
ports = st.lists(
    st.tuples(
        st.integers(1, 65535),
        st.sampled_from(["TCP", "UDP", "SCTP"]),
        st.from_regex(r"[a-z][a-z0-9-]{0,9}[a-z]", fullmatch=True),
    ),
    min_size=1,
    max_size=3,
)


def of_a_service(name: str, host: str, open_ports: list[tuple[int, str, str]]) -> dict[str, str]:
    """The variables that Kubernetes makes (`GetServiceEnvVars` of the kubelet)."""
    upper = name.upper().replace("-", "_")
    first, kind, _ = open_ports[0]
    made = {f"{upper}_SERVICE_HOST": host, f"{upper}_SERVICE_PORT": str(first)}
    made[f"{upper}_PORT"] = f"{kind.lower()}://{host}:{first}"
    for port, protocol, label in open_ports:
        made[f"{upper}_SERVICE_PORT_{label.upper().replace('-', '_')}"] = str(port)
        link = f"{upper}_PORT_{port}_{protocol}"
        made[link] = f"{protocol.lower()}://{host}:{port}"
        made |= {f"{link}_PROTO": protocol.lower(), f"{link}_PORT": str(port), f"{link}_ADDR": host}
    return made


@settings(max_examples=50)
@given(st.one_of(names, ours), st.sampled_from(["10.0.0.1", "[fd00::1]"]), ports)
def test_no_service_of_kubernetes_sets_anything(parts, host, open_ports):
    environment = of_a_service("-".join(["penchant", *parts]), host, open_ports)
    for prefix, fields in SETTINGS.items():
        assert variables(prefix, fields, environment) == {}


def test_one_that_has_the_name_of_a_setting_is_told_in_one_line(caplog):
    environment = of_a_service("penchant-metrics", "10.0.0.1", [(9090, "TCP", "http")])
    with caplog.at_level(logging.WARNING):
        variables("PENCHANT_", FIELDS, environment)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("PENCHANT_METRICS_PORT=tcp://10.0.0.1:9090 is ignored")
    assert "enableServiceLinks: false" in line


def test_what_is_ours_is_found_in_capitals_and_not(caplog):
    environment = {"PENCHANT_METRICS_PORT": "9090", "penchant_workers": "2", "PENCHANT_WORKERS": "3", "HOME": "/x"}
    found = variables("PENCHANT_", FIELDS, environment)
    assert {name: tuple(one) for name, one in found.items()} == {
        "metrics_port": ("PENCHANT_METRICS_PORT", "9090"),
        "workers": ("PENCHANT_WORKERS", "3"),
    }
    assert not caplog.records


def test_what_looks_like_a_setting_names_the_nearest(caplog):
    # The name ends as those of services do, and the value does not.
    environment = {"PENCHANT_WORKRES": "3", "PENCHANT_METRIC_PORT": "9090", "PENCHANT_DATA": "/d", "PENCHANT_X": "1"}
    with caplog.at_level(logging.WARNING):
        assert variables("PENCHANT_", FIELDS, environment, ("DATA",)) == {}
    told = [re.findall(r"PENCHANT_\w+", record.getMessage()) for record in caplog.records]
    assert sorted(told) == [
        ["PENCHANT_METRIC_PORT", "PENCHANT_METRICS_PORT"],
        ["PENCHANT_WORKRES", "PENCHANT_WORKERS"],
    ]
