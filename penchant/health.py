"""The health check of the image: `python -m penchant.health` ends with 0 if the service of this machine serves.

The service is found by the variables that set it up: PENCHANT_LISTEN and PENCHANT_TLS_CERTIFICATE, which has to name
localhost as well. A service that wants certificates of its clients (PENCHANT_TLS_CLIENT_CA) is only asked to accept a
connection, because the check has none.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_LISTEN = "127.0.0.1:50051"
_EVERYWHERE = ("0.0.0.0", "::", "")
_TIMEOUT_S = 4.0


def check(environment: Mapping[str, str], timeout_s: float = _TIMEOUT_S) -> str:
    """Returns what is wrong with the service that these variables set up; "" if it serves."""
    host, _, port = environment.get("PENCHANT_LISTEN", _LISTEN).rpartition(":")
    certificate = environment.get("PENCHANT_TLS_CERTIFICATE")
    host = host.strip("[]")
    if host in _EVERYWHERE or certificate:
        host = "localhost"
    try:
        if environment.get("PENCHANT_TLS_CLIENT_CA"):
            # The handshake would fail without a certificate of a client, but the port accepts.
            socket.create_connection((host, int(port)), timeout_s).close()
            return ""
        return _ask(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", certificate, timeout_s)
    except (OSError, ValueError) as error:
        return str(error)


def _ask(target: str, certificate: str | None, timeout_s: float) -> str:
    options = [("grpc.enable_http_proxy", 0)]  # what is checked is on this machine, whatever its name
    if certificate:
        credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
        channel = grpc.secure_channel(target, credentials, options=options)
    else:
        channel = grpc.insecure_channel(target, options=options)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if answer.status == health_pb2.HealthCheckResponse.SERVING else f"{target}: {name}"


if __name__ == "__main__":
    wrong = check(os.environ)
    if wrong:
        print(wrong, file=sys.stderr)
    raise SystemExit(1 if wrong else 0)
