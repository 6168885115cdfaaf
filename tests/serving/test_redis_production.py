"""Redis as in production: a user that may do what the docs say and no more, and a connection by TLS."""

from __future__ import annotations

import contextlib
import re
import select
import shutil
import ssl
import subprocess
from pathlib import Path

import numpy as np
import pytest
import redis

from features.profile import Purpose
from features.records import make_records
from serving.errors import ProfileStoreUnavailable
from serving.privacy.certificates import Certificates
from serving.privacy.marks import marks_of_log
from serving.privacy.purge import Purger
from serving.privacy.rights import SubjectRights
from serving.projection.projector import Projector
from serving.redis.client import Client, connect
from serving.redis.embedded import RedisServer
from serving.redis.safety import require_safe
from serving.stores.catalog_log import CatalogLog, Change
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent, LoggedImpression
from serving.stores.profiles import ProfileStore
from serving.stores.restore_requests import RestoreRequests
from tests.serving.faults import Proxy

DOCS = Path(__file__).parents[2] / "docs" / "redis.md"
FUTURE = 4_000_000_000_000


def event(number: int) -> LoggedEvent:
    record = make_records(number + 1, 0, 0, FUTURE, np.nan, 1).tobytes()
    return LoggedEvent("u:ann", f"e{number}", record, b'{"user_id": "ann", "anonymous": false}')


def work(profiles: Client, events: Client, partitions: int = 2) -> None:
    """Something of everything that the service does with its servers."""
    require_safe(events, "events")
    require_safe(profiles, "profiles")
    log, store = EventLog(events, partitions), ProfileStore(profiles, partitions)
    certificates = Certificates(log)
    people = SubjectRights(log, store, certificates)
    log.open()
    store.open()
    log.append([event(number) for number in range(70)])
    log.append_impressions([LoggedImpression("u:ann", FUTURE, b'{"timestamp": 1}')])
    RestoreRequests(log).add({"u:ann": 1, "u:bob": 1})
    assert sorted(RestoreRequests(log).take()) == ["u:ann", "u:bob"]
    assert RestoreRequests(log).take() == []
    projector = Projector(log, store, settle_s=0, compact_after=20)
    projector.open()
    while projector.step():
        pass
    projector.step()
    for partition in range(partitions):
        log.trim(partition)
    projector.close()
    assert store.read("u:ann").count == 70
    people.undo("u:ann", "e3")
    people.set_consent("u:ann", Purpose(7))
    assert list(marks_of_log(log))
    people.reset("u:ann")
    assert len(list(people.documents("u:ann"))) == 70
    people.erase("u:ann")
    assert Purger(certificates, events, profiles, 1.0).purge() == 1
    catalog = CatalogLog(events)
    assert catalog.put([Change("delete", "i1")]) == 1


def user_of_the_docs(password: str) -> list[str]:
    (rules,) = re.findall(r"^user penchant (.*)$", DOCS.read_text(), re.MULTILINE)
    assert "PASSWORD" in rules
    return rules.replace("PASSWORD", password).split()


def test_the_user_of_the_docs_may_do_all_that_is_needed_and_no_more(tmp_path):
    with contextlib.ExitStack() as stack:
        clients = []
        for role in ("profiles", "events"):
            server = stack.enter_context(RedisServer(tmp_path, role))
            with connect(server.url, 5) as admin:
                admin.execute_command("ACL", "SETUSER", "penchant", *user_of_the_docs("secret"))
            url = server.url.replace("unix://", "unix://penchant:secret@")
            clients.append(stack.enter_context(connect(url, 5)))
        work(*clients)
        for words in (["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "SET", "save", ""], ["GET", "another:key"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                clients[0].execute_command(*words)


def test_tls(tmp_path):
    certificate, key = _certificate(tmp_path)
    with RedisServer(tmp_path, "profiles") as server, _tls(server, certificate, key) as front:
        url = f"rediss://localhost:{front.port}/0"
        with connect(f"{url}?ssl_ca_certs={certificate}", 5) as client:
            store = ProfileStore(client, 2)
            store.apply("u:ann", [(5, event(1).record)])
            for _ in range(3):
                assert store.read("u:ann").count == 1
        with connect(url, 5) as stranger, pytest.raises(ProfileStoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            ProfileStore(stranger, 2).read("u:ann")


def test_tickets_of_tls_are_no_unread_replies(tmp_path):
    certificate, key = _certificate(tmp_path)
    with (
        RedisServer(tmp_path, "profiles") as server,
        _tls(server, certificate, key) as front,
        connect(f"rediss://localhost:{front.port}/0?ssl_ca_certs={certificate}", 5) as client,
    ):
        connection = client.connection_pool.make_connection()
        connection.connect()
        ready, _, _ = select.select([connection._sock], [], [], 5)
        assert ready
        assert redis.SSLConnection.can_read(connection)  # the control: what redis-py itself says of tickets
        assert not connection.can_read()
        connection.send_command("PING")
        assert connection.read_response() == b"PONG"
        assert not connection.can_read()
        connection.send_command("PING")
        assert connection.can_read(5)
        connection.disconnect()


def _certificate(folder: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    assert openssl, "this test makes a certificate with openssl"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def _tls(server: RedisServer, certificate: Path, key: Path) -> Proxy:
    """A port that speaks TLS before a server that does not: the embedded one is built without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return Proxy(server, context)
