"""What breaks: each fault by its kind, committed at its time and mended after its seconds."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import redis

from tests.faults.anything.clock import set_offset
from tests.faults.anything.composition import Composition, Fault, Worker
from tests.faults.anything.scene import Scene
from tests.faults.crew import Member
from tests.faults.proxy import Mode
from tests.support.waiting import eventually

KEEPER = "workers.broker.lease_process"
MODES = {
    "cut": Mode.CUT, "delay": Mode.DELAY, "hold": Mode.FREEZE, "half-open": Mode.HALF_OPEN, "silent": Mode.SILENT,
}  # fmt: skip


def keeper_of(member: Member) -> psutil.Process | None:
    """The process beside a worker that keeps its leases."""
    with suppress(psutil.Error):
        for child in psutil.Process(member.pid).children():
            if KEEPER in child.cmdline():
                return child
    return None


class Happenings:
    """Commits the faults of a composition, and starts the workers that come later, from threads of their own.

    ``killed`` are the processes that were killed or frozen; ``flushed`` and ``failed_over`` say when the broker lost
    something (seconds since the epoch): the writes between the two times, or all before.
    """

    def __init__(self, scene: Scene, made: Composition) -> None:
        self.killed: set[int] = set()
        self.lost: list[tuple[float, float]] = []
        self.healed = 0.0
        """When the last of them was mended, seconds since the epoch."""
        self.odd: list[str] = []
        self.keepers: set[int] = set()
        self._scene = scene
        self._made = made
        self._members: dict[int, Member] = {}
        self._broker = threading.Lock()
        self._threads: list[threading.Thread] = []

    def started(self, place: int, member: Member) -> None:
        """The worker at this place of the composition runs as this member."""
        self._members[place] = member

    def begin(self) -> None:
        """From now on they happen."""
        for fault in self._made.faults:
            self._at(fault.at, fault.kind, lambda fault=fault: self._commit(fault))
        for place, worker in enumerate(self._made.workers):
            if worker.at > 0:
                self._at(worker.at, "new worker", lambda place=place, worker=worker: self._join(place, worker))

    def wait(self) -> None:
        """Until all is mended."""
        for thread in self._threads:
            thread.join()

    def _at(self, at: float, name: str, act: Callable[[], None]) -> None:
        def work() -> None:
            self._scene.wait_until(at)
            try:
                act()
            except Exception as error:
                self.odd.append(f"{name}: {type(error).__name__}: {error}")
            self.healed = max(self.healed, time.time())

        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _join(self, place: int, worker: Worker) -> None:
        self.started(place, self._scene.start_worker(worker, wait=True))

    def _commit(self, fault: Fault) -> None:
        if fault.kind in MODES:
            with self._broker:
                self._scene.proxy.set(MODES[fault.kind])
                time.sleep(fault.seconds)
                self._scene.proxy.set(Mode.PASS)
        else:
            _KINDS[fault.kind](self, fault)

    # -- workers ----------------------------------------------------------------------------------------------------

    def _worker(self, fault: Fault) -> Member | None:
        """The member at the fault's place, or the one that has taken it."""
        first = self._members.get(fault.worker)
        crew = self._scene.stage.crew
        return next((one for one in crew.running() if first is not None and one.number == first.number), None)

    def kill(self, fault: Fault) -> None:
        """SIGKILL."""
        if (member := self._worker(fault)) is not None:
            self.killed.add(member.pid)
            member.signal(signal.SIGKILL)

    def kill_both(self, fault: Fault) -> None:
        """SIGKILL of a worker and of the process beside it: as when their machine dies."""
        if (member := self._worker(fault)) is not None:
            keeper = keeper_of(member)
            self.killed.add(member.pid)
            member.signal(signal.SIGSTOP)
            if keeper is not None:
                keeper.kill()
            member.signal(signal.SIGKILL)

    def stop(self, fault: Fault) -> None:
        """SIGTERM: it goes, and a new one comes."""
        if (member := self._worker(fault)) is not None:
            member.signal(signal.SIGTERM)

    def freeze(self, fault: Fault) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        if (member := self._worker(fault)) is not None:
            member.signal(signal.SIGSTOP)
            time.sleep(fault.seconds)
            member.signal(signal.SIGCONT)

    def clock(self, fault: Fault) -> None:
        """A worker's clock steps, and so do those of its successors."""
        set_offset(self._scene.clock_of(self._made.workers[fault.worker]), fault.amount)

    def kill_keeper(self, fault: Fault) -> None:
        """SIGKILL of the process beside a worker."""
        if (member := self._worker(fault)) is not None and (keeper := keeper_of(member)) is not None:
            keeper.kill()

    def freeze_keeper(self, fault: Fault) -> None:
        """SIGSTOP of the process beside a worker, and SIGCONT after a while."""
        if (member := self._worker(fault)) is not None and (keeper := keeper_of(member)) is not None:
            keeper.suspend()
            time.sleep(fault.seconds)
            with suppress(psutil.NoSuchProcess):
                keeper.resume()

    # -- the broker -------------------------------------------------------------------------------------------------

    def broker_killed(self, fault: Fault) -> None:
        """SIGKILL of the broker, which comes back with its append-only file."""
        with self._broker:
            self._scene.stage.kill_broker(fault.seconds)

    def broker_frozen(self, fault: Fault) -> None:
        """SIGSTOP of the broker, and SIGCONT after a while."""
        with self._broker:
            self._scene.stage.broker.send_signal(signal.SIGSTOP)
            time.sleep(fault.seconds)
            self._scene.stage.broker.send_signal(signal.SIGCONT)

    def broker_full(self, fault: Fault) -> None:
        """The broker has no room left for a while."""
        with self._broker:
            self._scene.stage.redis.config_set("maxmemory", 1024 * 1024)
            time.sleep(fault.seconds)
            self._scene.stage.redis.config_set("maxmemory", 0)

    def flush(self, fault: Fault) -> None:
        """Somebody empties the broker."""
        with self._broker:
            self._scene.stage.redis.flushall()
            self.lost.append((0.0, time.time()))

    def failover(self, fault: Fault) -> None:
        """The broker is killed, and another takes its place that has not got the writes of its last seconds."""
        broker = self._scene.stage.broker
        data, copy = self._scene.folder / "broker" / "appendonlydir", self._scene.folder / "replica"
        with self._broker:
            eventually(lambda: _rewritten(self._scene.stage.redis), what="an append-only file that is not rewritten")
            since = time.time()
            shutil.copytree(data, copy)
            time.sleep(min(fault.seconds, 1.0))
            broker.kill()
            shutil.rmtree(data)
            copy.rename(data)
            broker.start()
            self.lost.append((since, time.time()))


def _rewritten(client: redis.Redis) -> bool:
    return not client.info("persistence")["aof_rewrite_in_progress"]


_KINDS: dict[str, Callable[[Happenings, Fault], None]] = {
    "kill": Happenings.kill, "kill both": Happenings.kill_both, "stop": Happenings.stop, "freeze": Happenings.freeze,
    "clock": Happenings.clock, "kill keeper": Happenings.kill_keeper, "freeze keeper": Happenings.freeze_keeper,
    "broker killed": Happenings.broker_killed, "broker frozen": Happenings.broker_frozen,
    "broker full": Happenings.broker_full, "flush": Happenings.flush, "failover": Happenings.failover,
}  # fmt: skip
