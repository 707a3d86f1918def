"""What the fake engine tells a listener, and who gives models their listener. ``told.py`` is for the other engines."""

from __future__ import annotations

import pytest

from shared.contract import EngineName, Kind
from shared.settings import ModelSpec, Settings
from tests.contract.told import check_broken_listener, check_progress, generate, listening
from workers.engines.base import EngineOutput
from workers.engines.fake import CHUNKS, FakeEngine
from workers.models.manager import ModelManager


def settings_of(**fake: float) -> Settings:
    """Settings with two fake models, of which one fits the memory."""
    catalog = {name: {"path": "-", "kinds": [*Kind], "engines": ["fake"]} for name in "ab"}
    models = {"catalog": catalog, "max_cached": 1}
    return Settings.model_validate({"optimization": {"fake": fake}, "models": models})


@pytest.mark.parametrize(("latency", "times"), [(0.0, 1), (8.0, CHUNKS)])
def test_the_fake_engine_tells_of_its_progress(latency: float, times: int) -> None:
    """All members of the batch together, in chunks where it takes time, and before any is answered."""
    model = FakeEngine(settings_of(latency_ms=latency)).load(ModelSpec(name="m", path="-"))
    requests = [generate("hello"), generate("!bad"), generate("!fail")]

    with listening(model) as heard:
        model.infer(requests, heard.emit)

    assert len(heard.calls) == times
    for made in heard.calls:
        assert [(new.request_id, list(new.token_ids)) for new in made] == [(request.id, []) for request in requests]
    answer = heard.outcomes[0]
    assert isinstance(answer, EngineOutput)
    assert answer.outputs["token_ids"] == []
    assert (answer.prefill_ms, answer.prefill_ms + answer.decode_ms) == (latency / CHUNKS, latency)
    assert heard.calls_at_end == dict.fromkeys(range(3), times)


def test_a_fake_that_embeds_and_one_whose_listener_fails() -> None:
    """As every engine's."""
    engine = FakeEngine(settings_of())
    model = engine.load(ModelSpec(name="m", path="-", kinds=(Kind.GENERATE, Kind.EMBED)))

    check_progress(model, Kind.EMBED)
    check_broken_listener(model)


def test_every_model_of_a_manager_has_its_listener() -> None:
    """One that is loaded afterwards, and those that are in memory when the listener is set or taken away."""
    settings = settings_of()
    manager = ModelManager(FakeEngine(settings), settings)
    heard: list[str] = []
    before = manager.get("a")
    assert before.telling is None

    manager.on_tokens = lambda made: heard.extend(new.request_id for new in made)
    before.infer([request := generate("x")], lambda index, outcome: None)
    after = manager.get("b")
    after.infer([other := generate("y")], lambda index, outcome: None)
    manager.on_tokens = None
    after.infer([generate("z")], lambda index, outcome: None)

    assert heard == [request.id, other.id]
    assert manager.engine.name is EngineName.FAKE
