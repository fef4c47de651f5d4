"""Settings that all tests share."""

from hypothesis import settings

# A shared machine has no deadline that a test on disk could keep; and CI repeats what failed.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("project")
