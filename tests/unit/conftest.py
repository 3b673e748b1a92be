"""Settings of the unit tier."""

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine, or the first call into torch, says nothing about the property that is tested.
settings.register_profile("unit", settings(deadline=None, suppress_health_check=[HealthCheck.too_slow]))
settings.load_profile("unit")


def pytest_configure(config: pytest.Config) -> None:
    # megatron-core 0.16 imports a module of its own that it has deprecated.
    config.addinivalue_line("filterwarnings", "ignore:The 'megatron.core.transformer.custom_layers:DeprecationWarning")
