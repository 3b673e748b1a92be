"""Settings that every tier shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine is not a failure: no limit on the time of one example. The same examples in every run, so that a failure stays one.
settings.register_profile("r1z", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("r1z")
