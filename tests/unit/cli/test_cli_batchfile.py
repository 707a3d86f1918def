"""The lines of batch files: what they become, how they are recognised again, and torn answer files."""

import io

import orjson
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from producer.batch.files import Answered, Answers, Line, answer, new_run, read_lines, scan
from shared.contract import EngineName, InferenceRequest, InferenceResult, Kind
from shared.errors import BadRequest, EngineError, PayloadTooLarge

RUN = "0123abcd"
RESULT = InferenceResult(outputs={"text": "é"}, engine_used=EngineName.FAKE, latency_ms=1.5, batch_size=2)


def lines_of(text: str | bytes, run: str = RUN, **options) -> list[Line]:
    """The lines that an input file becomes."""
    data = text if isinstance(text, bytes) else text.encode()
    return list(read_lines(io.BytesIO(data), run, **{"model": "m", **options}))


def answers_file(count: int, *, failed: tuple[int, ...] = (), run: str = RUN) -> bytes:
    """An answer file for ``count`` lines, some of them failed."""
    text = "".join(f'{{"prompt": "p{number}"}}\n' for number in range(1, count + 1))
    return b"".join(
        answer(line, EngineError("no") if line.number in failed else RESULT, run) for line in lines_of(text, run)
    )


# --- input --------------------------------------------------------------------------------------------------------


def test_a_line_becomes_a_request():
    """A bare prompt is completed; a whole request stays what it is."""
    bare, whole = lines_of('{"prompt": "a"}\n{"id": "mine", "model": "x", "kind": "embed", "inputs": {"texts": ["t"]}}')

    assert isinstance(bare.content, InferenceRequest)
    assert (bare.content.model, bare.content.kind, bare.content.inputs.prompt) == ("m", Kind.GENERATE, "a")
    assert bare.content.id == bare.id
    assert isinstance(whole.content, InferenceRequest)
    assert (whole.number, whole.id, whole.content.id, whole.content.model) == (2, "mine", f"{RUN}-mine", "x")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{broken", "the line is not JSON: .* at column"),
        (b"\xff\xfe", "the line is not JSON"),
        (b"[1]", "the line is not a JSON object"),
        (b'"text"', "the line is not a JSON object"),
        (b"{}", "inputs: Field required"),
        (b'{"prompt": ""}', "inputs.prompt is empty"),
        (b'{"prompt": "a", "nope": 1}', "nope: Extra inputs are not permitted"),
        (b'{"prompt": "a", "id": 7}', "id: Input should be a valid string"),
        (b'{"prompt": "a", "id": ""}', "id: String should have at least 1 character"),
        (b"[" * 5000, "the line is not JSON"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(raw, message):
    """Whatever a line holds, it becomes one error, and the lines around it are untouched."""
    before, bad, after = lines_of(b'{"prompt": "a"}\n' + raw + b'\n{"prompt": "b"}\n')

    assert isinstance(before.content, InferenceRequest)
    assert isinstance(after.content, InferenceRequest)
    assert isinstance(bad.content, BadRequest)
    with pytest.raises(BadRequest, match=message):
        raise bad.content
    assert (bad.number, after.number) == (2, 3)


def test_errors_do_not_show_what_the_line_holds():
    """A prompt stays out of the error about it."""
    (line,) = lines_of('{"prompt": "my secret", "kind": "my secret", "x": "my secret"')
    (other,) = lines_of('{"prompt": "my secret", "kind": "my secret"}')

    assert "secret" not in str(line.content)
    assert "secret" not in str(other.content)


def test_blank_lines_are_passed_over_but_counted():
    """Line numbers are the input's own; byte order marks and Windows line ends do not matter."""
    found = lines_of(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')

    assert [(line.number, isinstance(line.content, InferenceRequest)) for line in found] == [(1, True), (4, True)]


def test_a_line_that_is_too_long_is_not_held_in_memory():
    """It becomes an error, and the next line begins where it ends."""
    text = b'{"prompt": "' + b"x" * 5000 + b'"}\n{"prompt": "b"}\n'

    long, short = lines_of(text, limit=100)

    assert isinstance(long.content, PayloadTooLarge)
    assert isinstance(short.content, InferenceRequest)
    assert short.number == 2


@pytest.mark.parametrize("size", [99, 100, 101])
def test_the_limit_counts_the_line_and_its_end(size):
    """A line of exactly the limit is read; one byte more is too long."""
    text = (b'{"prompt": "' + b"x" * 200)[: size - 3] + b'"}\n'

    (line,) = lines_of(text, limit=100)

    assert isinstance(line.content, PayloadTooLarge) == (size > 100)


def test_ids_follow_from_run_number_and_content():
    """The same line of the same run has the same id; anything else another one."""
    text = '{"prompt": "a"}\n{"prompt": "a"}\n'
    first, second = lines_of(text)

    assert [line.id for line in lines_of(text)] == [first.id, second.id]
    assert first.id != second.id
    assert lines_of(text, run=new_run())[0].id != first.id
    assert lines_of(text, model="other")[0].id != first.id
    assert lines_of('{ "prompt":"a" }')[0].id == first.id


# --- answers ------------------------------------------------------------------------------------------------------


def test_an_answer_names_its_line():
    """A result and an error each become one line of JSON."""
    good, bad = lines_of('{"prompt": "a"}\n{"prompt": "b"}\n')

    first, second = orjson.loads(answer(good, RESULT, RUN)), orjson.loads(answer(bad, EngineError("it broke"), RUN))

    assert first["line"] == 1
    assert first["id"] == good.id
    assert first["result"]["outputs"] == {"text": "é"}
    assert first["result"]["engine_used"] == "fake"
    assert second == {"line": 2, "id": bad.id, "error": {"type": "EngineError", "message": "it broke"}}


def test_what_is_answered_is_known_again():
    """A scanned file knows its lines, their errors and its run."""
    content = answers_file(4, failed=(2,))

    found = scan(io.BytesIO(content))

    assert found.answers.count == 4
    assert found.answers.errors == {"EngineError": 1}
    assert found.answers.run == RUN
    assert found.end == len(content)
    text = "".join(f'{{"prompt": "p{number}"}}\n' for number in range(1, 6))
    assert [found.answers.has(line) for line in lines_of(text)] == [True] * 4 + [False]


def test_a_changed_input_is_noticed():
    """An answer to another content is never taken for this line's."""
    found = scan(io.BytesIO(answers_file(2)))

    with pytest.raises(BadRequest, match="line 1 has another content than when it was answered"):
        found.answers.has(lines_of('{"prompt": "changed"}\n')[0])


@pytest.mark.parametrize(
    ("after", "what"),
    [
        ('{"id": "mine", "prompt": "b"}', "another content"),
        ('{"id": "yours", "prompt": "a"}', "another id"),
        ('{"prompt": "a"}', "another id"),
        ('{"id": "yours", "prompt": "b"}', "another id and another content"),
    ],
)
def test_a_line_with_an_id_of_its_own_is_compared_too(after, what):
    """What has changed is said: the id, the content, or both."""
    (line,) = lines_of('{"id": "mine", "prompt": "a"}')
    found = scan(io.BytesIO(answer(line, RESULT, RUN)))

    with pytest.raises(BadRequest, match=f"line 1 has {what} than when it was answered"):
        found.answers.has(lines_of(after)[0])
    assert found.answers.has(lines_of('{"custom_id": "mine", "prompt": "a"}', run=new_run())[0])


def test_lines_with_own_ids_are_known_by_number():
    """0.1.0 wrote no digest of a line with an id of its own: the number decides."""
    (line,) = lines_of('{"id": "mine", "prompt": "a"}')
    found = scan(io.BytesIO(b'{"line": 1, "id": "mine", "result": {}}\n'))

    assert found.answers.has(line)
    assert found.answers.run is None


@pytest.mark.parametrize("name", ["id", "custom_id"])
def test_an_own_id_stands_for_the_line_in_its_run_only(name):
    """Two files whose lines are numbered alike do not get each other's answers; the answer names the line's own id."""
    text = f'{{"{name}": "1", "prompt": "a"}}'
    (line,), (other,) = lines_of(text), lines_of(text, run=new_run())

    assert isinstance(line.content, InferenceRequest)
    assert isinstance(other.content, InferenceRequest)
    assert line.content.id != other.content.id
    written = orjson.loads(answer(line, RESULT, RUN))
    assert (written["id"], written.get("custom_id")) == ("1", "1" if name == "custom_id" else None)


def test_long_own_ids_and_tenants_fit_the_id_of_a_request():
    """A label of any length that an id may have is taken, for a tenant of any name, and those of two lines differ."""
    tenant = "t" * 64
    found = lines_of("".join(f'{{"id": "{"x" * 127}{end}", "prompt": "a", "tenant": "{tenant}"}}\n' for end in "ab"))

    ids = {line.content.id for line in found if isinstance(line.content, InferenceRequest)}
    assert len(ids) == 2
    assert all(len(name) <= 128 and name.startswith(f"{tenant}/{RUN}-") for name in ids)


def test_two_ids_that_differ_are_an_error():
    (line,) = lines_of('{"id": "a", "custom_id": "b", "prompt": "a"}')

    assert isinstance(line.content, BadRequest)
    assert "id and custom_id differ" in line.content.message


def test_errors_are_dropped_to_be_tried_again():
    """What is kept is the answers without the failed ones; these count as open."""
    kept = io.BytesIO()

    found = scan(io.BytesIO(answers_file(3, failed=(1, 3))), drop_errors=True, keep=kept)

    assert [orjson.loads(line)["line"] for line in kept.getvalue().splitlines()] == [2]
    assert found.answers.count == 1
    assert not found.answers.errors


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_file_torn_anywhere_is_its_whole_lines(data):
    """Wherever a crash cut the file, the lines before the cut count and nothing else does."""
    content = answers_file(4, failed=(2,))
    cut = data.draw(st.integers(0, len(content)))

    found = scan(io.BytesIO(content[:cut]))

    starts = [0, *(position + 1 for position, byte in enumerate(content) if byte == 10)]
    whole = sum(end <= cut or end - 1 == cut for end in starts[1:])  # a line may lack just its newline
    assert found.answers.count == whole
    assert found.end == min(starts[whole], cut)
    assert found.unterminated == (cut > 0 and cut < len(content) and content[cut : cut + 1] == b"\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\n", "line 1 is not JSON"),
        (b"[]\n", "line 1 has no line number"),
        (b'{"line": 0, "result": {}}\n', "line 1 has no line number"),
        (b'{"line": true, "result": {}}\n', "line 1 has no line number"),
        (b'{"line": 1}\n', "line 1 has neither a result nor an error"),
        (b'{"prompt": "a"}\n', "line 1 has no line number"),
    ],
)
def test_other_files_are_refused(content, message):
    """A file that is no answer file is never written to."""
    with pytest.raises(BadRequest, match=message):
        scan(io.BytesIO(content))


def test_answers_to_distant_lines_take_little_room():
    """What is remembered of a line is sixteen bytes."""
    answers = Answers()

    answers.note(Answered(1_000_000, "", b"ab" * 8, RUN, None))

    assert answers.count == 1
    assert sum(kept.itemsize * len(kept) for kept in (answers.digests, answers.labels)) == 16_000_000
