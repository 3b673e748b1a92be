"""Settings of the unit tier."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # megatron-core 0.16 imports a module of its own that it has deprecated.
    config.addinivalue_line("filterwarnings", "ignore:The 'megatron.core.transformer.custom_layers:DeprecationWarning")
