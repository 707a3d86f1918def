r"""Names of queues and keys: the whole layout of the broker in one place.

Queues are kombu's own Redis lists, so that stock Celery producers and workers can use them. Everything that is ours is
under ``muai:``.

======================================  ========================================================================
``<queue>``, ``<queue>\x06\x16<step>``     lists of waiting messages; step 3, 6 or 9, the bare name is step 0
``muai:lane:<list>:<tenant>``           list: a tenant's messages, beside the shared list of their queue and step
``muai:lane:<list>:<tenant>@<worker>``  list: those of them that one worker should have
``muai:lanes:<list>``                   zset tenant -> its turn; in it while its lanes hold messages
``muai:lanes:<list>:<tenant>``          hash worker -> since when what it should have waits for it, ms
``muai:queue:<queue>``                  hash: bytes, messages in lanes, rate of claims, turns (see ``lua/lists.lua``)
``muai:inflight``                       hash tenant -> leases of messages from its lanes
``muai:rate:<tenant>``                  hash: what the tenant may submit at once, and when that was reckoned
``muai:lease:index``                    zset lease id -> expiry, ms since the epoch
``muai:lease:messages``                 hash lease id -> list the message came from, newline, message
``muai:lease:next``                     counter that lease ids begin with
``celery-task-meta-<id>``               Celery's result of a request
``muai:reply:<client>``                 stream of results for one client
``muai:dead``                           stream of dead letters
``muai:seal``                           the secret with which workers seal what they write, and when it was made
``muai:cancelled``                      zset result key -> time of cancellation, ms
``muai:delayed``                        hash request id -> the lease under which it waits for its time
``muai:deadlines``                      zset request id, newline, list -> its deadline, ms; until it has ended
``muai:looked``                         hash list -> the last message that was looked at for a deadline; for 10 minutes
``muai:released``                       hash list -> the delayed message that came back to it last; for 10 minutes
``muai:sweeping``                       the worker that watches for all what is due next, for less than a second
``muai:workers:seen``                   zset worker id -> last announcement, ms
``muai:workers:info``                   hash worker id -> what the worker announces, JSON
``muai:workers:more``                   the same, what readers of 0.1.0 do not know and would refuse
``muai:workers:digests``                hash worker id -> digest of what it announces, but for what passes
``muai:workers:changed``                zset worker id -> when it came, changed or went, ms; for two minutes
``muai:underway``                       zset request id -> when it was submitted, ms; until it has ended
``muai:contents``                       hash request id -> digest of what it asks, while it is under way
``muai:doubted``                        hash request id -> list and message of what was submitted while it was under way
``muai:doubting``                       the worker that looks for these
``muai:running:<id>``                   the lease under which a message of another sender runs
``muai:parity:<digest>``                what PyTorch answers to the parity gate's questions, JSON
``muai:gpu:leases``                     zset GPU uuid -> expiry of its lease, ms since the epoch
``muai:gpu:holders``                    hash GPU uuid -> fence of its lease, newline, who holds it (JSON)
``muai:gpu:marked``                     zset GPU uuid -> time until which nobody may lease it, ms since the epoch
``muai:gpu:marks``                      hash GPU uuid -> why it is marked
======================================  ========================================================================
"""

from __future__ import annotations

from typing import Final

from shared.contract import DEFAULT_TENANT, EngineName

CONTROL_QUEUE: Final = "control"
PRIORITY_SEPARATOR: Final = "\x06\x16"
PRIORITY_STEPS: Final = (0, 3, 6, 9)
_STEPS: Final = tuple(max(step for step in PRIORITY_STEPS if step <= priority) for priority in range(10))

LANE_PREFIX: Final = "muai:lane:"

LEASE_INDEX: Final = "muai:lease:index"
LEASE_MESSAGES: Final = "muai:lease:messages"
LEASE_COUNTER: Final = "muai:lease:next"
IN_FLIGHT: Final = "muai:inflight"
DEAD_LETTERS: Final = "muai:dead"
SEAL: Final = "muai:seal"
UNDER_WAY: Final = "muai:underway"
CONTENTS: Final = "muai:contents"
DOUBTED: Final = "muai:doubted"
DOUBTING: Final = "muai:doubting"
CANCELLED: Final = "muai:cancelled"
DELAYED: Final = "muai:delayed"
DEADLINES: Final = "muai:deadlines"
LOOKED: Final = "muai:looked"
RELEASED: Final = "muai:released"
SWEEPING: Final = "muai:sweeping"
WORKERS_SEEN: Final = "muai:workers:seen"
WORKERS_INFO: Final = "muai:workers:info"
WORKERS_MORE: Final = "muai:workers:more"
WORKERS_DIGESTS: Final = "muai:workers:digests"
WORKERS_CHANGED: Final = "muai:workers:changed"

GPU_LEASES: Final = "muai:gpu:leases"
GPU_HOLDERS: Final = "muai:gpu:holders"
GPU_MARKED: Final = "muai:gpu:marked"
GPU_MARKS: Final = "muai:gpu:marks"

REPLY_PREFIX: Final = "muai:reply:"
LONGEST_KEY: Final = 512

DELAYED_PREFIX: Final = "eta:"
"""Leases with this prefix are nobody's: they are messages that wait for their time."""


def queue_of(engine: EngineName) -> str:
    """The queue an engine's workers consume from."""
    return str(engine)


def list_of(queue: str, priority: int, tenant: str = DEFAULT_TENANT, affinity: str = "") -> str:
    """The Redis list for a queue, a priority from 0 (first) to 9, as kombu names it, a tenant and an affinity.

    ``affinity`` names the worker that should have what is on it; empty: any.
    """
    step = _STEPS[min(max(priority, 0), len(_STEPS) - 1)]
    shared = f"{queue}{PRIORITY_SEPARATOR}{step}" if step else queue
    whose = "" if tenant == DEFAULT_TENANT else tenant
    lane = f"{whose}@{affinity}" if affinity else whose
    return f"{LANE_PREFIX}{shared}:{lane}" if lane else shared


def lists_of(queue: str) -> list[str]:
    """The shared lists of a queue, the most urgent first."""
    return [list_of(queue, step) for step in PRIORITY_STEPS]


def lanes_of(queue: str) -> list[str]:
    """Which tenants have messages in lanes of a queue: a zset for each of its shared lists."""
    return [f"muai:lanes:{name}" for name in lists_of(queue)]


def queue_state(queue: str) -> str:
    """What is known of a queue."""
    return f"muai:queue:{queue}"


def queue_of_list(name: str) -> str:
    """The queue a Redis list belongs to."""
    shared = name.removeprefix(LANE_PREFIX).partition(":")[0] if name.startswith(LANE_PREFIX) else name
    return shared.partition(PRIORITY_SEPARATOR)[0]


def result_key(request_id: str) -> str:
    """Where Celery's Redis result backend keeps a result."""
    return f"celery-task-meta-{request_id}"


def reply_stream(client_id: str) -> str:
    """The stream a client reads its results from."""
    return f"{REPLY_PREFIX}{client_id}"


CANCELLED_SECONDS = 7 * 24 * 3600
"""How long a cancellation is kept of a request that nobody has claimed."""


PARITY_SECONDS = 30 * 24 * 3600
"""How long reference answers are kept."""


def parity_key(digest: str) -> str:
    """What PyTorch answers to the fixed questions, for a model with this digest."""
    return f"muai:parity:{digest}"
