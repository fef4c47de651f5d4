"""Settings that all tests share."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.clusters import end_commands
from tests.servers import s3, s3_port

__all__ = ["s3", "s3_port"]

# A shared machine has no deadline that a test on disk could keep; and CI repeats what failed.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("project")

# The servers of the tests are on loopback, whatever proxy leads out of this machine.
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))


@pytest.fixture(autouse=True)
def _no_command_lives_on() -> Iterator[None]:
    """A test that failed leaves no command that would disturb the others."""
    yield
    end_commands()
