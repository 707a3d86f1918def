"""Errors that quote what an engine was given, and the salt that keeps tenants' caches apart."""

from __future__ import annotations

import pytest

from shared.contract import InferenceRequest
from shared.errors import BadRequest, EngineOutOfMemory
from shared.settings import Settings
from workers.engines.common.quotes import WITHHELD, discreet, told, traceback_of
from workers.engines.vllm.salt import cache_salt

PROMPT = "The patient's name is\nErika Mustermann, born in 1964."
REQUEST = InferenceRequest.parse({"model": "m", "inputs": {"prompt": PROMPT}, "params": {"stop": ["\n\nDoctor: "]}})


@pytest.mark.parametrize(
    "text",
    [
        f"cannot encode {PROMPT!r}",
        "unexpected token near 'ERIKA  MUSTERMANN, BORN'",
        "at 22: erika-mustermann_born",
        "stopped at '\\n\\nDoctor: ' and elsewhere: Erika Mustermann, born in",
    ],
)
def test_a_text_that_quotes_the_inputs_is_withheld(text: str) -> None:
    """In other letters, with escapes, or only a part of it: of the error its kind is left."""
    assert told(ValueError(text), [REQUEST]) == f"ValueError: {WITHHELD}"
    found = discreet(EngineOutOfMemory(text), [REQUEST])
    assert type(found) is EngineOutOfMemory
    assert str(found) == f"The engine ran out of memory. ({WITHHELD})"


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "The name is not known", ""])
def test_any_other_text_is_passed_on(text: str) -> None:
    """What an operator needs is not touched: the very same error."""
    error = BadRequest(text)

    assert discreet(error, [REQUEST]) is error
    assert told(ValueError(text), [REQUEST]) == f"ValueError: {text}"


def test_a_short_input_counts_as_a_whole() -> None:
    """A name alone is withheld; a word that is in every other text is not."""
    name, word = (InferenceRequest.parse({"model": "m", "inputs": {"prompt": p}}) for p in ("E. Musterfrau", "size"))

    assert WITHHELD in told(ValueError("no entry for 'E. Musterfrau'"), [name])
    assert WITHHELD not in told(ValueError("the size of tensor a (3)"), [word])


def test_a_traceback_says_where_and_not_what() -> None:
    """The causes' texts count too; the lines of the code are left."""
    try:
        try:
            raise KeyError(PROMPT)
        except KeyError as cause:
            raise RuntimeError("the tokenizer failed") from cause
    except RuntimeError as error:
        text = traceback_of(error, [REQUEST])
        full = traceback_of(error, [])

    assert "Mustermann" in full
    assert "Mustermann" not in text
    assert "test_a_traceback_says_where_and_not_what" in text


def test_each_tenant_has_its_salt() -> None:
    """The same for a tenant everywhere, another for every other and for another key; none where tenants share."""
    plain = Settings()
    keyed = Settings.model_validate({"fleet": {"signing_key": "a key that is long enough"}})
    shared = Settings.model_validate({"optimization": {"cache": {"shared_between_tenants": True}}})

    assert cache_salt("acme", plain) == cache_salt("acme", Settings())
    assert len({cache_salt(tenant, of) for tenant in ("acme", "other") for of in (plain, keyed)}) == 4
    assert cache_salt("default", plain) is None
    assert cache_salt("acme", shared) is None
