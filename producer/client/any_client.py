"""What the clients for threads and for asyncio are alike: their settings, and a session wherever they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Generic, Literal, NoReturn, TypeVar, get_args

from producer.client.handle import not_pickled
from producer.client.local import Local
from producer.client.submission import HeadersOf
from producer.client.window import Source, Window
from shared.errors import BadRequest, ClientClosed
from shared.settings import OnOutage, Settings

S = TypeVar("S")

Errors = Literal["raise", "yield"]
"""What becomes of the errors of single requests."""


class AnyClient(ABC, Generic[S]):
    """A client whose sessions, one for each place of use, are made when it is first used there."""

    def __init__(
        self,
        redis_url: str | None = None,
        settings: Settings | None = None,
        *,
        on_outage: OnOutage | None = None,
        headers: HeadersOf | None = None,
    ) -> None:
        self.settings = _settings_for(redis_url, settings)
        self.on_outage: OnOutage = on_outage or self.settings.fleet.on_outage
        one_of("on_outage", self.on_outage, get_args(OnOutage))
        self._headers = headers
        self._closed = False
        self._sessions = Local(self._new_session, self._place)
        self._check()

    def __reduce__(self) -> NoReturn:
        not_pickled("a client")

    @property
    def closed(self) -> bool:
        """Whether it was closed: then nothing is to be had of it any more."""
        return self._closed

    @property
    def _session(self) -> S:
        if self._closed:
            raise ClientClosed
        return self._sessions.get()

    def _window(self, source: Source, size: int, timeout: float | None, errors: Errors) -> Window:
        if self._closed:
            raise ClientClosed
        one_of("errors", errors, get_args(Errors))
        return Window(source, size, timeout, patient=self.on_outage != "raise")

    @abstractmethod
    def _check(self) -> None:
        """Say what is wrong with the configuration."""

    @abstractmethod
    def _new_session(self) -> S:
        """The session of this place."""

    @staticmethod
    @abstractmethod
    def _place() -> Hashable:
        """Where this is called."""


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raise :class:`BadRequest` for an argument that is none of those there are."""
    if value not in known:
        raise BadRequest(f"{name} is one of {', '.join(known)}")


def _settings_for(redis_url: str | None, settings: Settings | None) -> Settings:
    """The settings of a client: those that are given or found, with this broker."""
    if settings is None:
        from shared.settings_loader import load_settings

        settings = load_settings()
    if redis_url is None:
        return settings
    return settings.model_copy(update={"fleet": settings.fleet.model_copy(update={"redis_url": redis_url})})
