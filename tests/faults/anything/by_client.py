"""Callers with our own clients: one by one, awaited, mapped, by a file, before a fork, and with an id once more."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from producer import AsyncClient, Client
from producer.batch.run import AnswerFile, BatchOptions, run_batch
from producer.client.aio import AsyncHandle
from producer.client.handle import Handle
from producer.client.records import Outcome
from shared import errors
from shared.errors import BadRequest, BrokerUnavailable, FleetError, NoEngineAvailable, Overloaded
from shared.settings_loader import load_settings
from tests.faults.anything.book import end_of
from tests.faults.anything.clock import CLOCK, be_wrong, now
from tests.faults.anything.composition import Ask, Caller
from tests.faults.anything.scene import Scene
from tests.support.forked import Forked

SLEEP = 0.05
CONFLICT = getattr(errors, "IdConflict", None)


def submitting(scene: Scene, caller: Caller) -> None:
    """Submits at once or one by one, cancels some, and waits for all."""
    with Client(settings=scene.settings(caller), on_outage=caller.on_outage) as client:
        handles: dict[str, Handle] = {}
        for asks in [[ask] for ask in caller.asks] if caller.pace else [list(caller.asks)]:
            handles |= _submit(scene, caller, client, asks)
            time.sleep(caller.pace)
        scene.book.sent_in_order([ask for ask in caller.asks if ask.id in handles])
        if caller.cancels:
            time.sleep(caller.cancel_after)
            for ask in caller.asks[: caller.cancels]:
                if ask.id in handles:
                    _cancel(scene, ask.id, handles[ask.id].cancel)
        scene.book.waiting(handles)
        for request_id, handle in handles.items():
            with suppress(TimeoutError):
                scene.book.told(request_id, _outcome(scene, handle))


def _outcome(scene: Scene, handle: Handle) -> Outcome:
    while True:
        try:
            return handle.outcome(scene.slice)
        except TimeoutError:
            if scene.patience() <= 0:
                raise


def _cancel(scene: Scene, request_id: str, cancel: Callable[[], bool]) -> None:
    scene.book.cancelling(request_id)
    for _ in scene.tries():
        try:
            scene.book.cancelled(request_id, cancel())
            return
        except BrokerUnavailable:
            time.sleep(SLEEP)


def _submit(scene: Scene, caller: Caller, client: Client, asks: Sequence[Ask]) -> dict[str, Handle]:
    """The handles of what was accepted. What passes is waited for; of several, a bad one is found by submitting all."""
    for ask in asks:
        scene.book.sending(ask, caller)
    for _ in scene.tries():
        left = None
        if caller.timeout is not None:
            left = max(0.01, scene.book.entries[asks[0].id].began + caller.timeout - time.time())
        try:
            handles = client.submit_many([ask.request() for ask in asks], timeout=left)
        except (Overloaded, NoEngineAvailable, BrokerUnavailable) as error:
            scene.book.hindered(asks, error)
            time.sleep(min(getattr(error, "retry_after", SLEEP), 0.5))
            if isinstance(error, Overloaded) and len(asks) > 1:
                half = len(asks) // 2
                first = _submit(scene, caller, client, asks[:half])
                return first | _submit(scene, caller, client, asks[half:])
        except FleetError as error:
            if len(asks) > 1:
                found: dict[str, Handle] = {}
                for ask in asks:
                    found |= _submit(scene, caller, client, [ask])
                return found
            scene.book.refused(asks[0], error)
            return {}
        else:
            scene.book.accepted(asks)
            return {ask.id: handle for ask, handle in zip(asks, handles, strict=True)}
    for ask in asks:
        scene.book.refused(ask, TimeoutError(), unsure=True)
    return {}


def awaiting(scene: Scene, caller: Caller) -> None:
    """The same for asyncio, each request a task of its own."""

    async def one(client: AsyncClient, ask: Ask) -> None:
        scene.book.sending(ask, caller)
        handle = None
        for _ in scene.tries():
            try:
                handle = await client.submit(ask.request(), timeout=caller.timeout)
                break
            except (Overloaded, NoEngineAvailable, BrokerUnavailable) as error:
                scene.book.hindered([ask], error)
                await asyncio.sleep(min(getattr(error, "retry_after", SLEEP), 0.5))
            except FleetError as error:
                scene.book.refused(ask, error)
                return
        if handle is None:
            scene.book.refused(ask, TimeoutError(), unsure=True)
            return
        scene.book.accepted([ask])
        if ask in caller.asks[: caller.cancels]:
            await asyncio.sleep(caller.cancel_after)
            scene.book.cancelling(ask.id)
            with suppress(BrokerUnavailable):
                scene.book.cancelled(ask.id, await handle.cancel())
        scene.book.waiting([ask.id])
        with suppress(TimeoutError):
            scene.book.told(ask.id, await _outcome_async(scene, handle))

    async def every() -> None:
        async with AsyncClient(settings=scene.settings(caller), on_outage=caller.on_outage) as client:
            if not caller.pace:
                await asyncio.gather(*(one(client, ask) for ask in caller.asks))
                return
            tasks = []
            for ask in caller.asks:
                tasks.append(asyncio.create_task(one(client, ask)))
                await asyncio.sleep(caller.pace)
            await asyncio.gather(*tasks)

    asyncio.run(every())


async def _outcome_async(scene: Scene, handle: AsyncHandle) -> Outcome:
    while True:
        try:
            return await handle.outcome(scene.slice)
        except TimeoutError:
            if scene.patience() <= 0:
                raise


def mapping(scene: Scene, caller: Caller) -> None:
    """Maps all of them."""
    with Client(settings=scene.settings(caller), on_outage=caller.on_outage) as client:
        outcomes = client.map(_sent(scene, caller), window=caller.window, errors="yield", timeout=caller.timeout)
        for ask, outcome in zip(caller.asks, outcomes, strict=True):
            _mapped(scene, ask, outcome)
    scene.book.sent_in_order(caller.asks)


def mapping_async(scene: Scene, caller: Caller) -> None:
    """The same for asyncio."""

    async def every() -> None:
        async with AsyncClient(settings=scene.settings(caller), on_outage=caller.on_outage) as client:
            asks = iter(caller.asks)
            requests = _sent(scene, caller)
            async for outcome in client.map(requests, window=caller.window, errors="yield", timeout=caller.timeout):
                _mapped(scene, next(asks), outcome)

    asyncio.run(every())


def _sent(scene: Scene, caller: Caller) -> Any:
    for ask in caller.asks:
        scene.book.sending(ask, caller)
        yield ask.request()


def _mapped(scene: Scene, ask: Ask, outcome: Any) -> None:
    """A map tells of a refusal in the place of the answer."""
    refused = isinstance(outcome, BadRequest) and ask.odd
    if refused or isinstance(outcome, NoEngineAvailable | BrokerUnavailable):
        scene.book.refused(ask, outcome, unsure=True)
        return
    scene.book.accepted([ask])
    scene.book.told(ask.id, outcome)


def batch(scene: Scene, caller: Caller) -> None:
    """Runs a file whose lines have no ids of their own, and goes on where the broker was lost."""
    lines = b"".join(_line(ask) for ask in caller.asks)
    path = scene.folder / f"{caller.asks[0].id}.jsonl"
    options = BatchOptions(window=caller.window, timeout=caller.timeout)
    for ask in caller.asks:
        scene.book.sending(ask, caller)
    with Client(settings=scene.settings(caller), on_outage=caller.on_outage) as client:
        for _ in scene.tries():
            output = AnswerFile(path)
            try:
                run_batch(client, io.BytesIO(lines), output, options, lambda *_: None)
                break
            except (BrokerUnavailable, NoEngineAvailable) as error:
                scene.book.hindered(caller.asks[:1], error)
                time.sleep(SLEEP)
            finally:
                output.close()
    scene.read_answers(path, caller.asks)


def _line(ask: Ask) -> bytes:
    return json.dumps({name: value for name, value in ask.request().items() if name != "id"}).encode() + b"\n"


def again(scene: Scene, caller: Caller) -> None:
    """Submits each id twice, by two clients, the second time while it is under way or when it has its answer."""
    with Client(settings=scene.settings(caller)) as one, Client(settings=scene.settings(caller)) as other:
        first = _submit(scene, caller, one, caller.asks)
        if caller.pace:
            for request_id, handle in list(first.items())[::2]:
                with suppress(TimeoutError):
                    scene.book.told(request_id, _outcome(scene, handle))
        second = _submit(scene, caller, other, [ask for ask in caller.asks if ask.id in first])
        for request_id, handle in [*first.items(), *second.items()]:
            with suppress(TimeoutError):
                scene.book.told(request_id, _outcome(scene, handle))


def conflict(scene: Scene, caller: Caller) -> None:
    """Submits each id once more with another content: that is refused, and changes nothing."""
    with Client(settings=scene.settings(caller)) as one, Client(settings=scene.settings(caller)) as other:
        handles = _submit(scene, caller, one, caller.asks)
        for request_id in handles:
            ask = next(ask for ask in caller.asks if ask.id == request_id)
            different = {**ask.request(), "kind": "generate", "inputs": {"prompt": f"something else {request_id}"}}
            for _ in scene.tries():
                try:
                    handle = other.submit(different)
                except (Overloaded, NoEngineAvailable, BrokerUnavailable):
                    time.sleep(SLEEP)
                except FleetError as error:
                    if CONFLICT is None or not isinstance(error, CONFLICT):
                        scene.book.trouble(f"conflict: {request_id} with another content: {type(error).__name__}")
                    break
                else:
                    with suppress(TimeoutError):
                        end = end_of(_outcome(scene, handle))
                        scene.book.trouble(f"conflict: {request_id} with another content was taken, told {end[:40]!r}")
                    break
        for request_id, handle in handles.items():
            with suppress(TimeoutError):
                scene.book.told(request_id, _outcome(scene, handle))


def forked(scene: Scene, caller: Caller) -> None:
    """A process makes a client and uses it, forks, and its child uses it too."""
    for ask in caller.asks:
        scene.book.sending(ask, caller)
    path = scene.folder / f"{caller.asks[0].id}.told"
    requests = [ask.request() for ask in caller.asks]
    process = Forked(use_around_a_fork, requests, scene.environ(caller), path, caller.timeout)
    try:
        process.wait(scene.patience())
    except Exception:
        process.kill()
        scene.book.trouble("forked: a client that was made before a fork and used after it did not come to an end")
    scene.read_told(path, caller.asks)


def use_around_a_fork(
    requests: list[dict[str, Any]], environ: dict[str, str], path: Path, timeout: float | None
) -> None:
    """Answer the first request before the fork, the others in the child; lines of id, end and time go to the file."""
    if CLOCK in environ:
        be_wrong(Path(environ[CLOCK]))
    client = Client(settings=load_settings(Path(environ["MUAI_CONFIG"]), environ))
    _use(client, requests[:1], path, timeout)
    child = os.fork()
    if child == 0:
        _use(client, requests[1:], path, timeout)
        os._exit(0)
    os.waitpid(child, 0)
    os._exit(0)


def _use(client: Client, requests: list[dict[str, Any]], path: Path, timeout: float | None) -> None:
    for request in requests:
        end = ""
        for _ in range(200):
            try:
                end = end_of(client.submit(request, timeout=timeout).outcome(20))
                break
            except (Overloaded, NoEngineAvailable, BrokerUnavailable):
                time.sleep(SLEEP)
            except TimeoutError:
                return
            except FleetError as error:
                end = f"?{type(error).__name__}"
                break
        with path.open("a") as out:
            out.write(json.dumps([request["id"], end, now()]) + "\n")
