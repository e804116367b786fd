"""For all tests: no example of Hypothesis fails by the clock, which says how busy a machine is; what spares time."""

import gc
import os

from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

os.fsync = lambda descriptor: None  # no test outlives the machine, and a process that is killed loses nothing it wrote
gc.disable()  # while the tests are imported: a fifth of that time went into looking for garbage that is not there


def pytest_collection_finish() -> None:
    gc.enable()
