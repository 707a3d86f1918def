"""``muai submit``, ``result`` and ``cancel``: one request."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.cli.exits import Exit, exit_of_answer, say
from producer.cli.inputs import input_of, read_object
from producer.cli.options import Config, RedisUrl, Timeout, settings_of
from producer.cli.show import result_text
from producer.client.client import Client
from producer.client.records import Outcome
from producer.client.shorthand import complete
from shared.contract import EngineName, InferenceRequest, Kind, Priority
from shared.errors import BadRequest, FleetError

ANSWER_GRACE = 2.0
"""Seconds that the news of a passed deadline may take."""


def submit(
    given_input: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT",
            help="The prompt, or the text that the kind takes; - is the input, as is nothing "
            "where it is a pipe or a file.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model's name.", show_default=False)] = None,
    kind: Annotated[Kind | None, typer.Option(help="By default what the input suggests.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt of a generate request; - is the input.", show_default=False)
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text (of embed, classify, ...); repeatable.")] = None,
    message: Annotated[list[str] | None, typer.Option(help="role:content of a chat; repeatable.")] = None,
    query: Annotated[str | None, typer.Option(help="What to rerank the texts by.", show_default=False)] = None,
    source: Annotated[str | None, typer.Option("--json", help="A file with the request; - is the input.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens written.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(show_default=False)] = None,
    engine: Annotated[list[EngineName] | None, typer.Option(help="Engines to try, in order; repeatable.")] = None,
    priority: Annotated[Priority | None, typer.Option(show_default=False)] = None,
    conversation: Annotated[str | None, typer.Option(help="The conversation's id.", show_default=False)] = None,
    timeout: Timeout = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Without waiting, print the request's id.")] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Print the whole result as JSON.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Submit one request and print its answer."""
    given = {
        "model": model, "kind": kind, "prompt": prompt, "texts": text, "query": query, "max_tokens": max_tokens,
        "messages": [_message(one) for one in message] if message else None, "temperature": temperature,
        "top_p": top_p, "top_k": top_k, "stop": stop, "seed": seed, "engine_preference": engine, "priority": priority,
        "conversation_id": conversation,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value not in (None, [])}
    if source is None or given_input is not None:
        options |= input_of(given_input, options)
    data = complete({**read_object(source), **options} if source else options)
    request = InferenceRequest.parse(data)
    with Client(settings=settings_of(config, redis_url)) as client:
        handle = client.submit(request, timeout=timeout)
        if not wait:
            print(handle.id)
            return
        try:
            longest = None if timeout is None else timeout + ANSWER_GRACE
            outcome = handle.outcome(longest, through_outages=client.on_outage != "raise")
        except KeyboardInterrupt:
            say(f"the request goes on; its answer: muai result {handle.id}")
            raise
        _print_outcome(outcome, raw=raw)


def _message(text: str) -> dict[str, str]:
    role, colon, content = text.partition(":")
    if not colon:
        raise BadRequest(f"--message {role[:20]!r}: write it as role:content")
    return {"role": role.strip(), "content": content.lstrip()}


def _print_outcome(outcome: Outcome, *, raw: bool) -> None:
    if isinstance(outcome, FleetError):
        say(outcome.message)
        raise typer.Exit(exit_of_answer(outcome))
    rewritten = outcome.outputs.get("texts")
    if isinstance(rewritten, list) and not raw:
        for text in rewritten:
            print(text)
        return
    print(result_text(outcome, raw=raw))


def result(
    request_id: Annotated[str, typer.Argument(metavar="ID")],
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for it; 0 only looks.")] = 60.0,
    raw: Annotated[bool, typer.Option("--raw", help="Print the whole result as JSON.")] = False,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Print the answer to a request that was submitted before."""
    with Client(settings=settings_of(config, redis_url)) as client:
        try:
            outcome = client.handle(request_id).outcome(timeout, through_outages=False)
        except TimeoutError:
            kept = client.settings.fleet.result_expires_seconds
            raise TimeoutError(
                f"request {request_id} has no result: it is under way, nobody has submitted it, or it ended more "
                f"than {kept} s ago"
            ) from None
        _print_outcome(outcome, raw=raw)


def cancel(
    request_id: Annotated[str, typer.Argument(metavar="ID")], redis_url: RedisUrl = None, config: Config = None
) -> None:
    """Cancel a request."""
    with Client(settings=settings_of(config, redis_url)) as client:
        if not client.cancel(request_id):
            say(f"request {request_id} had ended before")
            raise typer.Exit(Exit.FAILED)
    print(f"cancelled {request_id}")
