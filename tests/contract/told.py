"""The part of the engine contract that is about a listener: what it is told, in which order, and until when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shared.contract import InferenceRequest, Kind
from shared.errors import Cancelled, FleetError
from workers.engines.base import EngineOutput, LoadedModel, NewTokens


class Heard:
    """A listener that keeps what it is told, and how much of it there was when each request ended."""

    def __init__(self) -> None:
        self.calls: list[list[NewTokens]] = []
        self.outcomes: dict[int, EngineOutput | FleetError] = {}
        self.calls_at_end: dict[int, int] = {}
        self.react: Callable[[NewTokens], None] = lambda new: None

    def __call__(self, made: Sequence[NewTokens]) -> None:
        self.calls.append(list(made))
        for new in made:
            self.react(new)

    def emit(self, index: int, outcome: EngineOutput | FleetError) -> None:
        """Keep an outcome."""
        self.outcomes[index] = outcome
        self.calls_at_end[index] = len(self.calls)

    def tokens(self, request: InferenceRequest, index: int = 0, calls: int | None = None) -> list[int]:
        """What was told of a text of a request, in all calls or in the first ones."""
        return [
            token
            for made in self.calls[:calls]
            for new in made
            if (new.request_id, new.index) == (request.id, index)
            for token in new.token_ids
        ]


@contextmanager
def listening(model: LoadedModel) -> Iterator[Heard]:
    """A listener for as long as this lasts."""
    heard = Heard()
    model.on_tokens = heard
    try:
        yield heard
    finally:
        model.on_tokens = None


def check_tokens(model: LoadedModel) -> None:
    """The tokens told of each request are those it is answered with, the first well before and none after its answer.

    Of different lengths, with a stop string, with an end token, sampled or not; in the company of one that is refused.
    """
    alone = _answers(model, [generate("abc", max_tokens=20, ignore_eos=True)])[0]
    stop = alone.outputs["text"][3:5]
    requests = [
        *(generate(f"prompt {count}", max_tokens=count, ignore_eos=True) for count in (1, 60, 20)),
        generate("abc", max_tokens=20, ignore_eos=True, stop=[stop]),
        *(generate("abc", max_tokens=150, temperature=2.0, seed=seed) for seed in range(6)),
        generate("x" * 5000),
    ]
    silent = _answers(model, requests[:-1])

    with listening(model) as heard:
        model.infer(requests, heard.emit)

    refused = len(requests) - 1
    answers = [heard.outcomes[index] for index in range(refused)]
    assert isinstance(heard.outcomes[refused], FleetError)
    assert [answer.outputs for answer in answers] == [answer.outputs for answer in silent]
    assert answers[3].outputs["text"].endswith(alone.outputs["text"][:3])
    assert any(answer.outputs["finish_reason"] == "stop" for answer in answers[4:]), "none ends by itself"
    for index, request in enumerate(requests[:-1]):
        told = heard.tokens(request, calls=heard.calls_at_end[index])
        assert told == answers[index].outputs["token_ids"] == heard.tokens(request)
    long = [made for made in heard.calls if any(new.request_id == requests[1].id for new in made)]
    assert len(long) >= 2, "a long answer's first tokens are told before it has all"
    assert max(map(len, heard.calls)) >= 3, "a step is told of in one call"
    assert not heard.tokens(requests[refused])
    assert all(answer.prefill_ms > 0 and answer.decode_ms >= 0 for answer in answers)
    assert answers[1].decode_ms > answers[0].decode_ms


def check_texts(model: LoadedModel) -> None:
    """The tokens of each text that is rewritten are told under its place in the request."""
    params = {"max_tokens": 12, "ignore_eos": True}
    inputs = ["abc", "another one", "z"]
    requests = [
        InferenceRequest.parse({"model": "m", "kind": kind, "inputs": {"texts": texts}, "params": params})
        for kind, texts in (("summarize", inputs), ("summarize", "alone"))
    ]

    with listening(model) as heard:
        model.infer(requests, heard.emit)

    for number, request in enumerate(requests):
        answer = heard.outcomes[number]
        assert isinstance(answer, EngineOutput)
        for index, tokens in enumerate(answer.outputs["token_ids"]):
            assert heard.tokens(request, index) == heard.tokens(request, index, heard.calls_at_end[number]) == tokens


def check_progress(model: LoadedModel, kind: Kind) -> None:
    """A long request that writes nothing is told of, without tokens, before it is answered."""
    query = {"query": "q"} if kind is Kind.RERANK else {}
    texts = [f"text {number}" for number in range(150)]
    request = InferenceRequest.parse({"model": "m", "kind": kind, "inputs": {"texts": texts, **query}})

    with listening(model) as heard:
        model.infer([request], heard.emit)

    assert isinstance(heard.outcomes[0], EngineOutput)
    assert heard.calls
    assert {(new.request_id, *new.token_ids) for made in heard.calls for new in made} == {(request.id,)}
    assert heard.calls_at_end[0] == len(heard.calls)


def check_cancelled(model: LoadedModel) -> None:
    """Of a request that is taken out nothing is told after its end; the other goes on."""
    kept, cancelled = (generate("hello", max_tokens=count, ignore_eos=True) for count in (40, 200))

    with listening(model) as heard:
        heard.react = lambda new: model.abort(cancelled.id) if new.request_id == cancelled.id else None
        model.infer([kept, cancelled], heard.emit)

    assert isinstance(heard.outcomes[1], Cancelled)
    assert 0 < len(heard.tokens(cancelled)) < 200
    assert heard.tokens(cancelled) == heard.tokens(cancelled, calls=heard.calls_at_end[1])
    answer = heard.outcomes[0]
    assert isinstance(answer, EngineOutput)
    assert heard.tokens(kept) == answer.outputs["token_ids"]


def check_broken_listener(model: LoadedModel) -> None:
    """A listener that raises is asked once and dropped; the batch is answered as if it had not been there."""
    requests = [generate("hello", max_tokens=10, ignore_eos=True), generate("x", max_tokens=5, ignore_eos=True)]
    silent = _answers(model, requests)

    with listening(model) as heard:

        def fail(new: NewTokens) -> None:
            raise RuntimeError("a listener's own fault")

        heard.react = fail
        model.infer(requests, heard.emit)
        assert model.on_tokens is None

    assert len(heard.calls) == 1
    assert [heard.outcomes[index].outputs for index in (0, 1)] == [answer.outputs for answer in silent]


def generate(prompt: str, **params: object) -> InferenceRequest:
    """A generate request."""
    return InferenceRequest.parse({"model": "m", "inputs": {"prompt": prompt}, "params": params})


def _answers(model: LoadedModel, requests: Sequence[InferenceRequest]) -> list[EngineOutput]:
    heard = Heard()
    model.infer(requests, heard.emit)
    return [heard.outcomes[index] for index in range(len(requests))]
