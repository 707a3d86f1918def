"""Everything that is checked, in the order in which it is shown. Each check returns what it found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from producer.doctor.broker import check_broker
from producer.doctor.machine import (
    check_conflicts,
    check_disk,
    check_engines,
    check_gpu,
    check_models,
    check_packages,
    check_python,
    gpus,
    version_of,
)
from shared.errors import FleetError
from shared.findings import Finding, Grade
from shared.settings import Settings


def examine(settings: Settings | FleetError) -> Iterator[Finding]:
    """Every check, as it is done. Without valid settings only what does not depend on them is checked."""
    yield check_python(sys.version_info[:3])
    yield from check_packages(version_of)
    yield from check_conflicts(version_of)
    if isinstance(settings, FleetError):
        for line in settings.message.splitlines():
            yield Finding(Grade.FAIL, "configuration", line, "correct it; docs/configuration.md lists the options")
        return
    yield Finding(Grade.OK, "configuration", "valid")
    yield from check_engines(settings, version_of)
    yield check_gpu(settings, gpus())
    yield from check_models(settings)
    yield check_disk(Path(settings.models.cache_dir))
    yield from check_broker(settings)
