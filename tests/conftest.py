"""What all tests share: properties are checked without a deadline, for a busy machine takes as long as it takes.

No test asks the real hub: nothing listens at its address here, unless a test says where its own hub is.
Modules of tests and of torch, half a million objects, are no garbage: the collector leaves them alone.
"""

import contextlib
import gc
import os

with contextlib.suppress(ImportError):  # environments of engines and GPUs do without
    from hypothesis import HealthCheck, settings

    settings.register_profile("swarm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("swarm")

os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
