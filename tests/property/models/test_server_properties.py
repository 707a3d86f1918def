"""A worker keeps its models, and answers what it has begun when it stops: random requests on the fake engine."""

from __future__ import annotations

from collections import Counter, OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contract import InferenceRequest
from shared.settings import Settings
from tests.support.items import whole
from workers.engines.base import EngineOutput, LoadedModel
from workers.engines.fake import FakeEngine
from workers.models.manager import ModelManager
from workers.path.batcher import Batch, FlushReason
from workers.path.runner import BatchDone, BatchRunner, Event, Finished
from workers.requests.inflight import InFlight
from workers.requests.rows import Part

pytestmark = pytest.mark.property
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
NAMES = ("a", "b", "c", "d", "e")


def manager(**models: object) -> tuple[ModelManager, list[tuple[str, str]]]:
    """The models of a fake engine, and what happens to them: each load and unload, by name."""
    catalog = {name: {"path": "fake"} for name in NAMES}
    configured = Settings.model_validate({"models": {"catalog": catalog, **models}})
    made, happened = ModelManager(FakeEngine(configured), configured), list[tuple[str, str]]()
    made.on_event = lambda event: happened.append((event.action, event.model))
    return made, happened


# Feature: advanced-optimization-monitoring, Property 25: a loaded model stays loaded
@EXAMPLES
@given(
    most=st.integers(1, len(NAMES)),
    steps=st.lists(st.tuples(st.sampled_from(["get", "get", "get", "unload"]), st.sampled_from(NAMES)), max_size=40),
)
def test_a_model_is_loaded_once_and_stays_until_it_has_to_go(most: int, steps: list[tuple[str, str]]) -> None:
    """As long as it is not unloaded, and not the one used longest ago where there are too many, it is the same one."""
    models, seen = manager(max_cached=most)
    kept: OrderedDict[str, LoadedModel] = OrderedDict()
    happened: list[tuple[str, str]] = []
    for step, name in steps:
        if step == "unload":
            assert models.unload(name, "asked to") == (name in kept)
            happened += [("unload", name)] if kept.pop(name, None) else []
            continue
        if name not in kept and len(kept) == most:
            happened.append(("unload", kept.popitem(last=False)[0]))
        if name not in kept:
            happened.append(("load", name))
        model = models.get(name)
        assert kept.setdefault(name, model) is model
        kept.move_to_end(name)

        assert {other for other in NAMES if models.find(other)} == kept.keys()
        assert {other for other, served in models.status().items() if served.loaded} == kept.keys()
    assert seen == happened


# Requirements: 8.4
@EXAMPLES
@given(preload=st.lists(st.sampled_from(NAMES), unique=True))
def test_models_that_are_to_be_preloaded_are_there_before_the_first_request(preload: list[str]) -> None:
    """Loaded once, in that order, before the engine says that it is ready."""
    models, seen = manager(max_cached=len(NAMES))
    runner = BatchRunner(models, lambda event: None)

    runner.start(preload)

    assert runner.loaded.wait(60)
    assert seen == [("load", name) for name in preload]
    assert runner.stop(timeout=60)


PROMPTS = st.sampled_from(["one", "two", "!bad", "!fail", "!busy", "!crash"])
BATCHES = st.lists(st.tuples(st.sampled_from(NAMES), st.lists(PROMPTS, min_size=1, max_size=5)), min_size=1, max_size=8)


def batch_of(model: str, prompts: list[str], number: int) -> Batch[Part]:
    """Requests that were taken together."""
    items = []
    for place, prompt in enumerate(prompts):
        item = InFlight(f"{number}-{place}", "fake", {}, {}, "", 1.0)
        item.request = InferenceRequest.parse({"model": model, "inputs": {"prompt": prompt}})
        items.append(item)
    return Batch(model, [whole(item) for item in items], 1, FlushReason.SIZE, 0.0)


# Feature: advanced-optimization-monitoring, Property 28: a worker that stops answers what it has begun
@EXAMPLES
@given(batches=BATCHES, before=st.integers(0, 8))
def test_what_an_engine_was_given_before_the_stop_is_answered(batches, before: int) -> None:
    """Each request once, whatever becomes of the others; then the models are let go and the thread ends."""
    reports: list[Event] = []
    models, _ = manager(max_cached=2)
    runner = BatchRunner(models, reports.append)
    given_to_it = [batch_of(model, prompts, number) for number, (model, prompts) in enumerate(batches)]
    for batch in given_to_it[:before]:
        runner.submit(batch)
    runner.start(preload=[])
    for batch in given_to_it[before:]:
        runner.submit(batch)

    ended = runner.stop(timeout=60)

    assert ended
    finished = [event for event in reports if isinstance(event, Finished)]
    assert Counter(event.item.lease for event in finished) == Counter(
        part.item.lease for batch in given_to_it for part in batch.items
    )
    assert [event.batch for event in reports if isinstance(event, BatchDone)] == given_to_it
    for event in finished:
        assert event.item.request is not None
        prompt = event.item.request.inputs.prompt or ""
        if isinstance(event.outcome, EngineOutput):
            assert event.outcome.outputs["text"] == prompt[::-1]
    assert not any(models.find(name) for name in NAMES)
