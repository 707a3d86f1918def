"""The processes that hold one model, as the worker sees them: started together, listened to, and dying together.

Each rank has a socket pair to the worker. The leader (rank 0) takes batches and gives answers over it; the others only
say over it why they end. Each follower has another pair to the leader. A process that dies closes its sockets whatever
killed it, so that the end of a stream is the news of a death: it comes at once, also while others hang in a collective
operation.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from shared.errors import EngineDied, EngineError, EngineLoadError, FleetError
from shared.python_path import python_path
from workers.engines.common.processes import error_from_json
from workers.engines.deepspeed.wire import Channel

logger = logging.getLogger(__name__)

LOAD_SECONDS = 1800.0
"""Longest that loading may take: weights come from a disk or a hub, which shows no progress."""
GRACE_SECONDS = 0.15
"""After a rank's end, how long is waited for news of the others: the first that is heard of is not always the cause."""
TAIL_LINES = 6
PEER_LOST = 71
"""Exit status of a rank that ends because another one, or the worker, is gone."""


class _Rank:
    """One process of the group."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel, label: str) -> None:
        self.process = process
        self.channel = channel
        self.fatal: FleetError | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._label = label
        self._reader = threading.Thread(target=self._read, name=label, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Put what the process prints into the worker's log, and remember the end of it."""
        stream = self.process.stdout
        if stream is None:
            return
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                if line:
                    self._tail.append(line)
                    logger.info("%s: %s", self._label, line)

    def said(self) -> str:
        """The last lines it printed."""
        self._reader.join(GRACE_SECONDS)
        return " | ".join(self._tail)


class RankGroup:
    """The processes of one model. Used by one thread at a time, but for :meth:`notify`."""

    def __init__(self, name: str, world: int, plan: Mapping[str, Any], timeout: float) -> None:
        """Start ``world`` processes and give each the ``plan``; ``timeout`` is the longest silence, in seconds."""
        self.name = name
        self._timeout = timeout
        self._dead: FleetError | None = None
        self._ranks: list[_Rank] = []
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        pairs = [socket.socketpair() for _ in range(world)]
        links = [socket.socketpair() for _ in range(world - 1)]
        try:
            for rank, (ours, theirs) in enumerate(pairs):
                # The leader has the one end of every link, a follower the other end of its own.
                mine = [theirs, *([a for a, _ in links] if rank == 0 else [links[rank - 1][1]])]
                process = _start(rank, world, [end.fileno() for end in mine])
                self._ranks.append(_Rank(process, Channel(ours), f"deepspeed rank {rank} of {world} ({name})"))
                self._selector.register(ours, selectors.EVENT_READ, rank)
                ours.settimeout(timeout)
        except BaseException:
            self.close()
            raise
        finally:
            for end in [theirs for _, theirs in pairs] + [end for link in links for end in link]:
                end.close()
        for member in self._ranks:
            with suppress(OSError):  # its death is noticed when something is awaited from the group
                member.channel.send(plan)

    @property
    def alive(self) -> bool:
        """Whether all processes are running."""
        return self._dead is None and all(rank.process.poll() is None for rank in self._ranks)

    @property
    def pids(self) -> list[int]:
        """The process ids, by rank."""
        return [rank.process.pid for rank in self._ranks]

    def loaded(self) -> dict[str, Any]:
        """Wait until the model is in memory and return the leader's account of it.

        Raises :class:`EngineLoadError`, or what a rank says is wrong.
        """
        try:
            return self.receive(LOAD_SECONDS)
        except EngineDied as error:
            raise EngineLoadError(f"cannot load {self.name!r}: {error}") from error

    def send(self, message: Mapping[str, Any]) -> None:
        """Give the leader a message; raise :class:`EngineDied` where the group is dead."""
        if self._dead is not None:
            raise self._dead
        if not self.alive:
            raise self._end(self._first_dead())
        try:
            with self._sending:
                self._ranks[0].channel.send(message)
        except TimeoutError:
            raise self._hung(self._timeout) from None
        except OSError:
            raise self._end(0) from None

    def notify(self, message: Mapping[str, Any]) -> None:
        """Give the leader a message amid a batch, on any thread. Whether the group is dead shows elsewhere."""
        with self._sending, suppress(OSError):
            self._ranks[0].channel.send(message)

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The leader's next message.

        When a rank dies, or none is heard of for ``timeout`` seconds, all are killed and :class:`EngineDied` is raised
        (:class:`~shared.errors.EngineOutOfMemory` or another error where that is what the rank ended with).
        """
        if self._dead is not None:
            raise self._dead
        longest = self._timeout if timeout is None else timeout
        while True:
            events = self._selector.select(longest)
            if not events:
                raise self._hung(longest)
            for rank in sorted(key.data for key, _ in events):
                message: dict[str, Any]
                try:
                    message, _ = self._ranks[rank].channel.receive()
                except (EOFError, OSError) as error:
                    if isinstance(error, TimeoutError):
                        raise self._hung(longest) from None
                    raise self._end(rank) from None
                if "fatal" in message:
                    self._ranks[rank].fatal = error_from_json(message["fatal"])
                    raise self._end(rank)
                return message

    def close(self) -> None:
        """Kill every process and wait for its end."""
        if self._dead is None:
            self._dead = EngineDied(f"the deepspeed engine's processes for {self.name!r} were stopped")
        self._kill()

    # --- the end --------------------------------------------------------------------------------------------------

    def _first_dead(self) -> int:
        return next((place for place, rank in enumerate(self._ranks) if rank.process.poll() is not None), 0)

    def _hung(self, seconds: float) -> FleetError:
        self._kill()
        self._dead = EngineDied(
            f"the deepspeed engine's processes for {self.name!r} showed no progress for {seconds:g} s and were killed"
        )
        logger.error("%s", self._dead)
        return self._dead

    def _end(self, first: int) -> FleetError:
        """Kill what is left, and say which rank was the cause and of what it died."""
        self._listen(first)
        codes = [rank.process.poll() for rank in self._ranks]
        self._kill()
        self._dead = self._verdict(first, codes)
        if isinstance(self._dead, EngineDied):
            logger.error("%s", self._dead)
        return self._dead

    def _listen(self, first: int) -> None:
        """Wait a moment for the others' last words and exit codes: a death breaks its peers' connections too."""
        until = time.monotonic() + GRACE_SECONDS
        with suppress(subprocess.TimeoutExpired):
            self._ranks[first].process.wait(GRACE_SECONDS)
        while (left := until - time.monotonic()) > 0 and self._selector.get_map():
            for key, _ in self._selector.select(left):
                member = self._ranks[key.data]
                try:
                    message, _ = member.channel.receive()
                except (EOFError, OSError):
                    self._selector.unregister(key.fileobj)
                    with suppress(subprocess.TimeoutExpired):
                        member.process.wait(max(0.0, until - time.monotonic()))
                    continue
                if "fatal" in message:
                    member.fatal = error_from_json(message["fatal"])

    def _verdict(self, first: int, codes: Sequence[int | None]) -> FleetError:
        of = f"of {len(self._ranks)} of the deepspeed engine for {self.name!r}"
        # A library that finds its peer gone may abort: that is a consequence, and what killed the peer the cause.
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0 and code != -signal.SIGABRT]
        if killed:
            rank = first if first in killed else killed[0]
            return EngineDied(f"rank {rank} {of} {_ending(codes[rank])}{self._last(rank)}")
        said = [rank for rank, member in enumerate(self._ranks) if member.fatal is not None]
        said.sort(key=lambda rank: (type(self._ranks[rank].fatal) is EngineError, rank != first))
        if said:
            fatal = self._ranks[said[0]].fatal
            if fatal is not None and type(fatal) is not EngineError:
                return fatal
            return EngineDied(f"rank {said[0]} {of} failed: {fatal}")
        own = [rank for rank, code in enumerate(codes) if code not in (None, PEER_LOST)]
        rank = first if first in own or not own else own[0]
        return EngineDied(f"rank {rank} {of} {_ending(codes[rank])}{self._last(rank)}")

    def _last(self, rank: int) -> str:
        said = self._ranks[rank].said()
        return f"; it printed last: {said}" if said else ""

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.channel.close()
        self._selector.close()


def _start(rank: int, world: int, descriptors: list[int]) -> subprocess.Popen[bytes]:
    threads = max(1, len(os.sched_getaffinity(0)) // world) if hasattr(os, "sched_getaffinity") else 1
    environ = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
    }
    # A session of its own: a Ctrl-C at the worker's terminal is the worker's to handle.
    return subprocess.Popen(
        [sys.executable, "-m", "workers.engines.deepspeed.rank", str(os.getpid()), *map(str, descriptors)],
        env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        pass_fds=descriptors, start_new_session=True,
    )  # fmt: skip


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit status {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
