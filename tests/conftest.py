"""Settings that every tier shares."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Ranks meet on this machine, whose own name need not resolve to an address.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# A busy machine is not a failure: no limit on the time of one example. The same examples in every run, so that a failure stays one.
settings.register_profile("r1z", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("r1z")
