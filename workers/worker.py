"""The worker process: what signals mean to it, and how it ends."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
from functools import partial
from typing import Any

import click
from billiard.common import REMAP_SIGTERM
from celery import platforms, signals
from celery.apps.worker import Worker, safe_say
from celery.platforms import EX_FAILURE, EX_OK, EX_USAGE
from celery.utils.log import in_sighandler
from celery.utils.text import str_to_list
from celery.worker import state

from shared.errors import ConfigurationError
from workers.fleet import Fleet
from workers.hooks.usage import check_options
from workers.process.queues import check_names

logger = logging.getLogger(__name__)

LAST_RESORT_SECONDS = 10.0
"""How long after the grace the process is ended from outside the interpreter, whatever it hangs in."""


class WrongUsage(click.ClickException):
    """The command line cannot be obeyed: its program says why in one line, and ends."""

    exit_code = EX_USAGE


class FleetWorker(Worker):
    """Celery's worker, with one way to stop whatever it is doing: loading, connecting, running, without a broker.

    SIGTERM and SIGINT: claim no more, give back what waits, and let what runs end within the grace. A second one of
    either hurries: what runs is given back now. SIGQUIT hurries from the start. ``worker_soft_shutdown_timeout`` has no
    part in it: the grace is ``monitoring.server.graceful_shutdown_timeout``.
    """

    exitcode: int | None = None
    _asked = False

    @property
    def fleet(self) -> Fleet:
        """The fleet of this worker's app."""
        fleet: Fleet = self.app.fleet
        return fleet

    def on_before_init(self, **options: Any) -> None:
        """Refuse options whose effect would be another, and warn of those that have none."""
        try:
            warnings = check_options(options)
        except ConfigurationError as error:
            raise WrongUsage(error.message) from None
        super().on_before_init(**options)
        for warning in warnings:
            click.echo(f"Warning: {warning}", err=True)

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """Choose the queues of the command line; one that does not exist ends the worker with a line that says so."""
        named = [*(str_to_list(include) or ()), *(str_to_list(exclude) or ())]
        try:
            check_names(named, self.app.amqp.queues)
        except ConfigurationError as error:
            raise WrongUsage(error.message) from None
        super().setup_queues(include, exclude)

    def install_platform_tweaks(self, worker: Any) -> None:
        """Celery's signals, and over them what SIGTERM, SIGINT and SIGQUIT mean here."""
        super().install_platform_tweaks(worker)
        for name, exitcode, hurry in (
            ("SIGTERM", EX_OK, REMAP_SIGTERM == "SIGQUIT"),
            ("SIGINT", EX_FAILURE, False),
            ("SIGQUIT", EX_FAILURE, True),
        ):
            platforms.signals[name] = partial(self._signalled, os.getpid(), name, exitcode, hurry)

    def _signalled(self, pid: int, name: str, exitcode: int, hurry: bool, *_: Any) -> None:
        if os.getpid() != pid:  # a child that was forked, and has no handlers of its own yet
            return
        with in_sighandler():
            hurry = hurry or self._asked
            self._end_within(0.0 if hurry else self.fleet.grace)
            if state.should_stop is None:
                state.should_stop = exitcode
            safe_say(f"worker: {name}: {'giving back what runs' if hurry else 'finishing what runs'}", sys.__stdout__)
            signals.worker_shutting_down.send(
                sender=self.hostname, sig=name, how="Cold" if hurry else "Warm", exitcode=exitcode
            )

    def _end_within(self, seconds: float) -> None:
        """Be gone after ``seconds`` and a little; asked again, the earlier end counts. Fit for a signal handler."""
        self._asked = True
        left = self.fleet.stopping.within(seconds)
        faulthandler.dump_traceback_later(left + LAST_RESORT_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)

    def start(self) -> None:
        """Run until the worker is stopped."""
        super().start()
        if not self.fleet.stopping.idle:
            # The interpreter would wait for the engine's thread, or unload libraries under its feet.
            logger.warning("an engine is still busy; the process ends without it")
            atexit._run_exitfuncs()
            os._exit(self.exitcode or EX_OK)

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Give back and finish what is here, then say goodbye as Celery does, where the broker can hear it."""
        self._stop_fleet(self.fleet.grace)
        if self.fleet.stopping.heard:
            super().stop(in_sighandler, exitcode)
        else:
            self.exitcode = self.exitcode if exitcode is None else exitcode
            self._send_worker_shutdown()

    def terminate(self, in_sighandler: bool = False) -> None:
        """The same in a hurry: Celery cannot go on."""
        self._stop_fleet(0.0)
        self.exitcode = EX_FAILURE if self.exitcode is None else self.exitcode
        if self.fleet.stopping.heard:
            super().terminate(in_sighandler)

    def _stop_fleet(self, seconds: float) -> None:
        if not self._asked:
            self._end_within(seconds)
        self.fleet.stopping.run()
