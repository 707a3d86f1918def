"""Where workers serve different weights under one name: it is said, and by choice only the newest serve."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from shared.errors import EngineOutage
from shared.registry import WorkerInfo
from shared.weights import differences, newer
from workers.models.manager import ModelManager

logger = logging.getLogger(__name__)


class NewestWeights:
    """Compares what this worker has loaded with what the others have. With ``only`` the outdated are not served."""

    def __init__(self, *, only: bool) -> None:
        self._only = only
        self._said: dict[str, str] = {}

    def compare(self, managers: Iterable[ModelManager], workers: Sequence[WorkerInfo]) -> bool:
        """Look at what live workers announce; whether what this worker serves has changed."""
        managers = list(managers)
        mine = {name for models in managers for name in models.weights()}
        found = {name: text for name, text in differences(workers).items() if name in mine}
        for name, text in found.items():
            if self._said.get(name) != text:
                logger.warning("different weights are served under the name %r: %s", name, text)
        self._said = found
        if not self._only:
            return False
        changed = [models.outdate(self._outdated(models, workers)) for models in managers]
        return any(changed)

    @staticmethod
    def _outdated(models: ModelManager, workers: Sequence[WorkerInfo]) -> dict[str, EngineOutage]:
        weights = models.weights()
        return {
            name: EngineOutage(
                f"this worker has loaded {weights[name].digest} as {name!r}, and others serve the newer "
                f"{newest.digest} (models.newest_only): restart it with those files"
            )
            for name, newest in newer(weights, workers).items()
        }
