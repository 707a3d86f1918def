"""What is shown of values that hold secrets."""

import pytest

from shared.masking import looks_secret, masked, masked_url


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("hf_token", True),
        ("HF-TOKEN", True),
        ("api_key", True),
        ("redis_password", True),
        ("max_batch_tokens", False),
        ("key", False),
        ("author", False),
    ],
)
def test_names_of_secrets(name, secret):
    """A name counts as secret by its words, not by letters it happens to hold."""
    assert looks_secret(name) is secret


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:pw@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:p@s/s@h/0", "rediss://me:***@h/0"),
        ("redis://h/0?password=pw&db=1", "redis://h/0?password=***&db=1"),
        ("unix:///run/r.sock?password=pw", "unix:///run/r.sock?password=***"),
        ("redis:/me:pw@h", "***@h"),
    ],
)
def test_passwords_in_urls(url, shown):
    """The password goes, the rest of the URL stays; a mistyped URL hides more rather than less."""
    assert masked_url(url) == shown


def test_secrets_in_trees():
    """Mappings and lists are masked inside, by their own names."""
    tree = {
        "options": {"vllm": {"hf_token": "x", "seed": 1, "urls": ["redis://:pw@h"]}},
        "webhook_url": "https://hooks.example/T0/B0/x",
        "token": None,
    }

    assert masked(tree) == {
        "options": {"vllm": {"hf_token": "***", "seed": 1, "urls": ["redis://:***@h"]}},
        "webhook_url": "https://hooks.example/***",
        "token": None,
    }
