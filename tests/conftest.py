"""Settings that all tests share."""

from hypothesis import settings

from tests.servers import s3, s3_port

__all__ = ["s3", "s3_port"]

# A shared machine has no deadline that a test on disk could keep; and CI repeats what failed.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("project")
