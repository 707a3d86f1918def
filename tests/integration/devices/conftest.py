"""A machine with stand-in GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.devices.nvml.standin import StandIn, build, compiler


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled stand-in."""
    pytest.importorskip("pynvml", reason='nvidia-ml-py is not installed: pip install "muai-fleet[gpu]"')
    if compiler() is None:
        pytest.skip("there is no C compiler for the stand-in NVML library")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> Callable[[int], StandIn]:
    """Makes a machine with so many GPUs: ``machine(4)``."""
    return lambda count: StandIn(nvml_library, tmp_path / "nvml.state", count)
