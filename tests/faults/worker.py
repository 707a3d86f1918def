"""A worker process of the suite: ``celery -A workers worker`` whose fake engine commits faults on purpose.

What an engine runs is noted in a file outside the system, one line a request: id, engine, process, time. A prompt that
begins with one of these words misbehaves while it runs:

``!die``         kills its worker
``!hold 10``     holds the interpreter's lock for so many seconds, as a C call may
``!sleep 10``    takes so many seconds
``!hop``         fails on the fake engine, so that the request goes on to the next

The queue ``pytorch`` is served by a second fake engine, to which requests may go on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from shared.contract import EngineName, InferenceRequest
from shared.errors import EngineError
from shared.settings import ModelSpec
from tests.faults.anything.clock import CLOCK, be_wrong
from tests.support.forked import be_worker
from workers import engines
from workers.engines.base import Emit, EngineOutput
from workers.engines.fake import FakeEngine, FakeModel

EXECUTIONS = "FAULTS_EXECUTIONS"
"""The environment variable that names the file in which executions are noted."""

FIRST_MS = "FAULTS_FIRST_MS"
"""The one that says how much longer the first batch of a model takes, in ms."""

_DEEDS = {
    "!die": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "!hold": lambda seconds: ctypes.PyDLL(None).usleep(int(float(seconds) * 1e6)),
    "!sleep": lambda seconds: time.sleep(float(seconds)),
}


class FaultyModel(FakeModel):
    """Notes what it runs, and does what prompts tell it to."""

    engine = EngineName.FAKE
    warm = False

    def infer(self, requests: Sequence[InferenceRequest], emit: Emit) -> None:
        """Answer every member that does not say otherwise."""
        self._note(requests)
        if not self.warm:
            self.warm = True
            time.sleep(float(os.environ.get(FIRST_MS, "0")) / 1000)
        for request in requests:
            word, _, rest = (request.inputs.prompt or "").partition(" ")
            if word in _DEEDS:
                _DEEDS[word](rest.partition(" ")[0])

        def told(index: int, result: EngineOutput | Exception) -> None:
            hops = self.engine is EngineName.FAKE and (requests[index].inputs.prompt or "").startswith("!hop")
            emit(index, EngineError("the fake engine was told to fail") if hops else result)

        super().infer(requests, told)

    def _note(self, requests: Sequence[InferenceRequest]) -> None:
        now, size = f"{self.engine} {os.getpid()} {time.time():.4f}", len(requests)
        lines = "".join(f"{request.id} {now} {size}\n" for request in requests)
        note = os.open(os.environ[EXECUTIONS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(note, lines.encode())
        os.close(note)


class StandInModel(FaultyModel):
    """The same on the other queue."""

    engine = EngineName.PYTORCH


class FaultyEngine(FakeEngine):
    """Loads models that commit faults."""

    def load(self, spec: ModelSpec) -> FaultyModel:
        """A model that notes what it runs."""
        return FaultyModel(spec, self.settings.optimization.fake)


class StandInEngine(FakeEngine):
    """Serves the queue of the PyTorch engine without one."""

    name = EngineName.PYTORCH

    def load(self, spec: ModelSpec) -> StandInModel:
        """A model that notes what it runs."""
        return StandInModel(spec, self.settings.optimization.fake)


def run(arguments: Sequence[str], environ: dict[str, str], log: Path) -> None:
    """Be such a worker until the end of this process."""
    engines._CLASSES[EngineName.FAKE] = f"{__name__}:{FaultyEngine.__name__}"
    engines._CLASSES[EngineName.PYTORCH] = f"{__name__}:{StandInEngine.__name__}"
    if CLOCK in environ:
        be_wrong(Path(environ[CLOCK]))
    be_worker(["-l", "info", *arguments], environ, log)
