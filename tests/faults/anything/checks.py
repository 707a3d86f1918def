"""What must always hold, one function each: what does not is an anomaly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.faults.anything.book import Entry, is_error
from tests.faults.anything.draw import LOSES_LEASES
from tests.faults.anything.truth import REVOKED, SENDERS, Truth
from tests.faults.ledger import Execution

CAUSES = {
    "BrokerUnavailable": {
        "cut", "delay", "hold", "half-open", "silent", "broker killed", "broker frozen", "failover", "broker full",
    },
    "BrokerFull": {"broker full"},
    "NoEngineAvailable": {
        "kill", "kill both", "freeze", "stop", "flush", "failover", "broker killed", "broker frozen", "cut", "hold",
        "half-open", "silent", "delay", "broker full",
    },
}  # fmt: skip
"""By what a submit is refused for a while, and which faults make that true."""

ENOUGH = 3
"""Anomalies of one kind that are told of one by one."""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something that ought never to be: which check has found it, and what."""

    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}"


def of_requests(truth: Truth) -> Iterator[Anomaly]:
    """Each accepted id ends once, in time, with the right answer or an error that is true; whoever waits is told."""
    for entry in truth.book.entries.values():
        if entry.accepted is not None:
            yield from _ending(truth, entry)
        elif entry.refused is not None:
            yield from _refusal(truth, entry)
        else:
            yield Anomaly("no word", f"{_named(entry)} was neither accepted nor refused")
        yield from _telling(truth, entry)


def _named(entry: Entry) -> str:
    ask = entry.ask
    return f"{ask.id} ({entry.caller.how}, {ask.kind} {ask.word}{' ' + ask.odd if ask.odd else ''})"


def _ending(truth: Truth, entry: Entry) -> Iterator[Anomaly]:
    records = truth.records.get(truth.book.record_id(entry), [])
    if not records:
        if not truth.may_be_lost(entry):
            yield Anomaly("lost", f"{_named(entry)} has no end")
        return
    submitted_again = entry.caller.how == "again" and is_error(records[0].answer)
    if len(records) > 1 and not submitted_again and not truth.may_be_forgotten(entry, records[0].at):
        yield Anomaly("doubled", f"{_named(entry)}: {[record.answer[:40] for record in records]}")
    ended = records[0]
    if (why := truth.untrue(entry, ended)) is not None and not (entry.members and truth.may_be_lost(entry)):
        yield Anomaly("wrong end", f"{_named(entry)} ended with {ended.answer[:60]!r}: {why}")
    if (late := ended.at - truth.in_time(entry)) > 0 and not truth.may_be_lost(entry):
        after = ended.at - entry.began
        yield Anomaly("late", f"{_named(entry)} ended {after:.1f} s after it was sent, {late:.1f} s too late")
    countdown = entry.caller.countdown
    if countdown is not None and not is_error(ended.answer) and ended.at < entry.began + countdown - 0.1:
        yield Anomaly("early", f"{_named(entry)} ended {ended.at - entry.began:.2f} s after it was sent")


def _refusal(truth: Truth, entry: Entry) -> Iterator[Anomaly]:
    name = f"!{entry.refused}"
    if entry.ask.odd:
        away = entry.unsure and truth.made.faults
        if name not in SENDERS | {"!UnicodeEncodeError"} and not away:
            yield Anomaly("refused wrongly", f"{_named(entry)}: {entry.refused}")
    elif not entry.unsure or not truth.made.faults:
        yield Anomaly("refused wrongly", f"{_named(entry)}: {entry.refused}")


def _telling(truth: Truth, entry: Entry) -> Iterator[Anomaly]:
    ended = truth.ended(entry)
    if ended is None or entry.accepted is None:
        return
    if not entry.told and entry.awaited and not truth.may_be_forgotten(entry, ended.at):
        yield Anomaly("not told", f"{_named(entry)} ended with {ended.answer[:40]!r}, and whoever waits is not told")
    for end, _ in entry.told:
        same = end == ended.answer or {end, ended.answer} <= REVOKED
        if not same and not truth.may_be_forgotten(entry, ended.at):
            yield Anomaly("told otherwise", f"{_named(entry)} ended with {ended.answer[:40]!r}, told was {end[:40]!r}")
    if not truth.made.faults and entry.told and entry.caller.how in ("client", "asyncio"):
        late = entry.told[0][1] - max(ended.at, entry.accepted, entry.waited_from) - truth.patience
        waited = _ended_before(truth, entry)
        if late > 0 and entry.told[0][1] - waited > truth.patience:
            yield Anomaly("told late", f"{_named(entry)} was told {late + truth.patience:.1f} s after its end")


def _ended_before(truth: Truth, entry: Entry) -> float:
    """When the last of those had ended for which its caller waits first."""
    place = entry.caller.asks.index(entry.ask)
    before = [truth.book.entries.get(ask.id) for ask in entry.caller.asks[: place + 1]]
    ends = [ended.at for one in before if one is not None and (ended := truth.ended(one)) is not None]
    return max(ends, default=0.0)


def of_refusals(truth: Truth) -> Iterator[Anomaly]:
    """What holds a submit up is said, and is true."""
    kinds = {fault.kind for fault in truth.made.faults}
    for name, count in Counter(hindrance.error for hindrance in truth.book.hindrances).items():
        if name in CAUSES and not kinds & CAUSES[name] and not (name == "NoEngineAvailable" and truth.deaths):
            yield Anomaly("hindered", f"{count} x {name}, and nothing is broken that would say so")
        if name == "QuotaExceeded" and not any("requests_per_second" in rule for rule in truth.made.tenants.values()):
            yield Anomaly("hindered", f"{count} x {name} without a quota")
        if name == "QueueFull" and truth.made.queue_capacity > 1000:
            yield Anomaly("hindered", f"{count} x {name} with room for {truth.made.queue_capacity}")


def of_order(truth: Truth, executions: Sequence[Execution]) -> Iterator[Anomaly]:
    """Where one worker runs one request at a time, each sender's run in the order in which they were sent."""
    if truth.made.style != "orderly":
        return
    place = {run.id.rpartition("/")[2]: number for number, run in reversed(list(enumerate(executions)))}
    for sent in truth.book.order:
        by_priority: dict[str, list[str]] = defaultdict(list)
        for request_id in sent:
            if request_id in place:
                by_priority[truth.book.entries[request_id].ask.priority].append(request_id)
        for priority, ids in by_priority.items():
            ran = sorted(ids, key=place.__getitem__)
            if ran != ids:
                how = truth.book.entries[ids[0]].caller
                delayed = "" if how.countdown is None else f" with a countdown of {how.countdown:g} s"
                yield Anomaly("order", f"{how.how}{delayed}, {priority}: sent {ids[:6]}, run {ran[:6]}")


def of_limits(truth: Truth, executions: Sequence[Execution], in_flight: dict[str, int]) -> Iterator[Anomaly]:
    """Batches and tenants keep within their limits; what nothing disturbs runs once."""
    made = truth.made
    most = max(worker.batch for worker in made.workers)
    if (largest := max((run.batch for run in executions), default=0)) > most:
        yield Anomaly("batch size", f"{largest} ran together; {most} may")
    if not made.faults and not truth.deaths:
        places = sum(worker.batch * len(set(worker.queues.split(",")) - {"control"}) for worker in made.workers)
        for tenant, count in in_flight.items():
            rule = made.tenants.get(tenant, made.tenants.get("*", {}))
            share = rule.get("in_flight_share")
            if share is not None and count > max(1, int(share * places)):
                yield Anomaly("in flight", f"{tenant} had {count} of {places} places; its share is {share:g}")
    if not {fault.kind for fault in made.faults} & LOSES_LEASES and not any(ask.word for ask in made.asks()):
        by_worker = {(run.id, run.engine, run.pid) for run in executions}  # a large one runs in parts, on one
        again = [one for one, count in Counter((name, engine) for name, engine, _ in by_worker).items() if count > 1]
        if again:
            yield Anomaly("run again", f"{len(again)} requests, though nothing broke: {again[:4]}")


def of_events(truth: Truth, last: dict[str, list[str]]) -> Iterator[Anomaly]:
    """Whoever listens to Celery's events hears of each request's end once, and rightly."""
    names = {"task-succeeded": "SUCCESS", "task-failed": "FAILURE", "task-revoked": "REVOKED"}
    for entry in truth.book.entries.values():
        ended = truth.ended(entry)
        heard = last.get(truth.book.record_id(entry), [])
        if ended is None or entry.caller.how in ("again", "celery again"):
            continue
        if not heard and (entry.after or entry.members) and is_error(ended.answer):
            continue  # no worker had it
        end = ended.answer
        wanted = "REVOKED" if end in REVOKED else "FAILURE" if is_error(end) else "SUCCESS"
        if [names[one] for one in heard] != [wanted]:
            yield Anomaly("events", f"{_named(entry)} ended with {end[:40]!r}; heard was {heard}")


def few(found: list[Anomaly]) -> list[Anomaly]:
    """The same, shorter: of many of a kind the first ones, and how many there are."""
    kinds = defaultdict(list)
    for anomaly in found:
        kinds[anomaly.check].append(anomaly)
    short = []
    for check, all_of_it in kinds.items():
        short += all_of_it[:ENOUGH]
        if len(all_of_it) > ENOUGH:
            short.append(Anomaly(check, f"... {len(all_of_it)} in all"))
    return short
