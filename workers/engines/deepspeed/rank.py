"""One process of a rank group: ``python -m workers.engines.deepspeed.rank <the worker's pid> <descriptors>``.

All ranks load their part. Then the leader (rank 0) answers batches, and the followers carry out, in the same order, the
operations it sends them. Only the leader samples and decodes text, so that ranks cannot come to differ.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import traceback
from functools import partial
from typing import Any, NoReturn

from shared.errors import EngineError, FleetError
from shared.settings import DeepSpeedSettings, ModelSpec
from workers.engines.common.processes import error_to_json
from workers.engines.deepspeed.group import PEER_LOST
from workers.engines.deepspeed.wire import Channel

WATCH_SECONDS = 1.0


def main(arguments: list[str]) -> None:
    """Load, then serve until the worker or another rank is gone."""
    parent, *descriptors = map(int, arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    threading.Thread(target=_watch, args=(parent, descriptors), name="watch", daemon=True).start()
    worker, *links = [Channel(socket.socket(fileno=descriptor)) for descriptor in descriptors]
    try:
        plan, _ = worker.receive()
        _serve(plan, int(os.environ["RANK"]), worker, links)
    except EOFError:
        os._exit(PEER_LOST)
    except BaseException as error:  # noqa: BLE001 - the worker raises it
        fail(worker, error)


def fail(worker: Channel, error: BaseException) -> NoReturn:
    """Tell the worker why this rank ends, and end it. The others would wait for it in vain."""
    if not isinstance(error, FleetError) or type(error) is EngineError:
        traceback.print_exception(error)
    try:
        worker.send({"fatal": error_to_json(error)})
    finally:
        sys.stderr.flush()
        os._exit(1)


def _watch(parent: int, descriptors: list[int]) -> None:
    """End this process as soon as the worker or a linked rank closes its end: also amid a collective operation.

    A parent's death signal (prctl) would be sent when the *thread* that started this process ends, which may be long
    before the worker does. A process that was forked from the worker keeps the descriptors open, so the parent's id is
    looked at as well.
    """
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, 0)  # hang-ups only: what arrives is for the main thread
    while not poller.poll(WATCH_SECONDS * 1000) and os.getppid() == parent:
        pass
    os._exit(PEER_LOST)


def _serve(plan: dict[str, Any], rank: int, worker: Channel, links: list[Channel]) -> None:
    from workers.engines.deepspeed.load import Loader, join, own_device  # heavy: the watch is on by now
    from workers.engines.deepspeed.shard import Shard
    from workers.engines.deepspeed.stage import Place

    spec = ModelSpec.model_validate(plan["spec"])
    configured = DeepSpeedSettings.model_validate(plan["settings"])
    place = Place(rank, configured.tensor_parallel, configured.pipeline_parallel)
    device = own_device(place)
    join(place, device, links)
    loader = Loader(spec, configured, place, device)
    model = loader.load()
    shard = Shard(model, place)
    if rank:
        links[0].send({"memory_bytes": model.memory_bytes})
        shard.follow(links[0])
    from workers.engines.deepspeed.leader import Leader

    memory = model.memory_bytes + sum(link.receive()[0]["memory_bytes"] for link in links)
    leader = Leader(shard, place, worker, links, partial(fail, worker))
    worker.send(
        {
            "kinds": sorted(leader.kinds),
            "max_context": model.max_context,
            "memory_bytes": memory,
            "notes": loader.notes,
            "metadata": {
                "tensor_parallel": place.tensor,
                "pipeline_parallel": place.pipeline,
                "device": device.type,
                "dtype": str(loader.dtype).removeprefix("torch."),
                "kernel_injection": loader.kernels,
                "zero_offload": configured.zero_offload,
            },
        }
    )
    leader.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
