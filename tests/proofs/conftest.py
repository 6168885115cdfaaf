"""The proofs use the servers of the tests of the stores."""

from tests.serving.conftest import events_redis, events_server, profiles_redis, profiles_server, state_dir

__all__ = ["events_redis", "events_server", "profiles_redis", "profiles_server", "state_dir"]
