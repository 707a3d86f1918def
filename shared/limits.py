"""What a worker allows itself and others: sizes, times, numbers. One value, which can be replaced while it runs.

At start it is what the settings say. Whoever needs a limit reads it from :class:`LimitsInForce` each time, so there is
one place where it changes, and the registry shows what is in force.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import ValidationError

from shared.contract import explain
from shared.errors import ConfigurationError
from shared.settings import (
    BatcherSettings,
    BreakerSettings,
    Positive,
    PositiveSeconds,
    RetrySettings,
    Section,
    Settings,
    TenantSettings,
)


class Limits(Section):
    """The limits of a worker. Names, units and bounds are those of the settings."""

    batcher: BatcherSettings = BatcherSettings()
    retry: RetrySettings = RetrySettings()
    breaker: BreakerSettings = BreakerSettings()
    fallback_on_error: bool = True
    max_cached: Positive = 3
    max_deliveries: Positive = 3
    starvation_limit: Positive = 10
    rescue_after_seconds: PositiveSeconds = 30.0
    max_payload_bytes: Positive = 4 * 1024 * 1024
    max_result_bytes: Positive = 16 * 1024 * 1024
    tenants: dict[str, TenantSettings] = {}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The limits that the configuration sets."""
        optimization, fleet = settings.optimization, settings.fleet
        return cls(
            batcher=optimization.batcher,
            retry=optimization.retry,
            breaker=optimization.breaker,
            fallback_on_error=optimization.fallback_on_error,
            max_cached=settings.models.max_cached,
            max_deliveries=fleet.max_deliveries,
            starvation_limit=fleet.starvation_limit,
            rescue_after_seconds=fleet.rescue_after_seconds,
            max_payload_bytes=fleet.max_payload_bytes,
            max_result_bytes=fleet.max_result_bytes,
            tenants=fleet.tenants,
        )


class LimitsInForce:
    """Holds the limits that count now. From any thread."""

    def __init__(self, limits: Limits) -> None:
        self._now = limits

    @property
    def now(self) -> Limits:
        """The limits at this moment. They are to be asked for each time."""
        return self._now

    def replace(self, **changes: Any) -> Limits:
        """Change some limits, given by name; a section is given as what changes in it. Returns what is in force now.

        Raises :class:`ConfigurationError`, and changes nothing, where one is unknown or out of bounds.
        """
        data = self._now.model_dump()
        for name, value in changes.items():
            within = isinstance(value, dict) and isinstance(data.get(name), dict) and name != "tenants"
            data[name] = {**data[name], **value} if within else value
        try:
            self._now = Limits.model_validate(data)
        except ValidationError as error:
            raise ConfigurationError(f"the limits cannot be changed: {explain(error)}") from None
        return self._now
