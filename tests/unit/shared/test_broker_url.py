"""What the broker's URL may be, in the spellings of Celery and of the client library."""

# ruff: noqa: S106  # the passwords of tests

import pytest

from shared.broker import connect
from shared.broker_url import BrokerUrl, read_url
from shared.errors import ConfigurationError
from shared.settings import FleetSettings


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("redis://h", BrokerUrl("redis", 0, (("h", 6379),))),
        ("redis:///3", BrokerUrl("redis", 3, (("localhost", 6379),))),
        ("rediss://u:p%40w@h:1/2", BrokerUrl("rediss", 2, (("h", 1),), user="u", password="p@w")),
        ("redis://:p@[::1]:5?db=4", BrokerUrl("redis", 4, (("::1", 5),), password="p")),
        ("redis://h?client_name=x", BrokerUrl("redis", 0, (("h", 6379),), options={"client_name": "x"})),
        ("unix:///run/redis.sock?db=2", BrokerUrl("unix", 2, path="/run/redis.sock")),
        ("unix://u:p@/run/redis.sock", BrokerUrl("unix", 0, path="/run/redis.sock", user="u", password="p")),
        ("redis+socket:///run/x.sock?virtual_host=/3", BrokerUrl("redis+socket", 3, path="/run/x.sock")),
        (
            "sentinel://:p@a:1,b,[::1]:2/5?master_name=m&sentinel_password=s&min_other_sentinels=1",
            BrokerUrl(
                "sentinel", 5, (("a", 1), ("b", 26379), ("::1", 2)), password="p", master="m", sentinel_password="s",
                min_other_sentinels=1,
            ),
        ),
        (
            "sentinel://:p@a:1/2;sentinel://:p@b:2/2?master_name=m",
            BrokerUrl("sentinel", 2, (("a", 1), ("b", 2)), password="p", master="m"),
        ),
        (
            "sentinel://a;sentinel://b/7?master_name=m&sentinel_username=u",
            BrokerUrl("sentinel", 7, (("a", 26379), ("b", 26379)), master="m", sentinel_user="u"),
        ),
    ],
)  # fmt: skip
def test_a_url_says_where_the_broker_is(url, read):
    """Host, socket or sentinels, with the database and who asks."""
    assert read_url(url) == read


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://h/abc", "the database is a number, 0 or more"),
        ("redis://h/-1", "the database is a number, 0 or more"),
        ("redis://h/0/1", "the database is a number, 0 or more"),
        ("unix:///s?db=x", "the database is a number, 0 or more"),
        ("redis://h/1?db=2", "it names two databases"),
        ("redis://h:port/0", "a port is a number from 1 to 65535"),
        ("redis://h:65536/0", "a port is a number from 1 to 65535"),
        ("sentinel://a:1,b:x?master_name=m", "a port is a number from 1 to 65535"),
        ("unix://", "a socket is named by its whole path"),
        ("unix://run/redis.sock", "a socket is named by its whole path"),
        ("sentinel://a", "sentinels are to be told whom to name: add ?master_name=NAME"),
        ("sentinel://a?master_name=m&nope=1", "nope is not known; sentinels have master_name"),
        ("sentinel://a?master_name=m&min_other_sentinels=x", "min_other_sentinels is a number"),
        ("redis://:pa/ss@h", "as a URL; allowed: redis://"),
        ("redis://:pa?ss@h", "as a URL; allowed: redis://"),
        ("redis://:pa#ss@h", "as a URL; allowed: redis://"),
        ("redis://[::1/0", "as a URL; allowed: redis://"),
        ("redis://h?nope=1", "options that the client library does not know"),
        ("redis://h?socket_timeout=soon", "with values that it cannot read: socket_timeout"),
    ],
)
def test_what_is_wrong_is_one_line(url, problem):
    """It names the setting, and never shows the password."""
    with pytest.raises(ConfigurationError) as error:
        connect(FleetSettings(redis_url=url))

    assert error.value.message.startswith("fleet.redis_url: '")
    assert problem in error.value.message
    assert "\n" not in error.value.message
    assert "ss" not in error.value.message.replace("password", "").replace("rediss", "")


@pytest.mark.parametrize(
    ("url", "local"),
    [("redis://localhost", True), ("unix:///s", True), ("redis://h", False), ("sentinel://h?master_name=m", False)],
)
def test_what_leaves_the_machine_is_known(url, local):
    """A socket and the loopback do not."""
    assert read_url(url).is_local is local
