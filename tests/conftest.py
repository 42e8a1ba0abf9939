"""What all tests share: properties are checked without a deadline, for a busy machine takes as long as it takes."""

import contextlib

with contextlib.suppress(ImportError):  # environments of engines and GPUs do without
    from hypothesis import HealthCheck, settings

    settings.register_profile("swarm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("swarm")
