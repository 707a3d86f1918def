"""What of Celery's command line and remote control has no meaning here is refused or warned of."""

from types import SimpleNamespace

import pytest

from shared.errors import ConfigurationError
from workers.hooks import remote
from workers.hooks.usage import check_options

USUAL = {"pool": "solo", "concurrency": 1, "optimization": "default", "prefetch_multiplier": None}


def test_what_is_usual_is_not_spoken_of():
    """The command as it is documented says nothing."""
    assert check_options(USUAL) == []
    assert check_options({}) == []


@pytest.mark.parametrize("pool", ["prefork", "celery.concurrency.thread", "gevent"])
def test_another_pool_is_refused(pool):
    """It would not run the engines, whatever it is."""
    with pytest.raises(ConfigurationError, match="leave -P out"):
        check_options({**USUAL, "pool": pool})


def test_autoscaling_is_refused():
    """It would scale nothing."""
    with pytest.raises(ConfigurationError, match="--autoscale: a worker has no pool"):
        check_options({**USUAL, "autoscale": [4, 1]})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", 8),
        ("prefetch_multiplier", 4),
        ("optimization", "fair"),
        ("max_tasks_per_child", 100),
        ("max_memory_per_child", 1000),
    ],
)
def test_what_has_no_effect_is_warned_of(option, value):
    """With what to set instead."""
    (warning,) = check_options({**USUAL, option: value})

    assert warning.startswith(f"--{option.replace('_', '-')} has no effect: ")


def state(groups: set[str] | None, *, enabled: bool = True) -> SimpleNamespace:
    """What a command is handed."""
    dispatcher = None if groups is None else SimpleNamespace(groups=groups, enabled=enabled)
    return SimpleNamespace(consumer=SimpleNamespace(event_dispatcher=dispatcher))


@pytest.mark.parametrize(
    ("groups", "enable", "disable"),
    [
        (set(), {"ok": "task events already enabled"}, {"ok": "task events disabled"}),
        ({"worker", "task"}, {"ok": "task events already enabled"}, {"ok": "task events disabled"}),
        ({"worker"}, {"ok": "task events enabled"}, {"ok": "task events already disabled"}),
        (None, {"error": "this worker sends no events of any kind"}, {"ok": "task events already disabled"}),
    ],
)
def test_commands_about_events_say_the_truth(groups, enable, disable):
    """For a dispatcher no group means all of them."""
    for command, answer in ((remote._enable_events, enable), (remote._disable_events, disable)):
        asked = state(None if groups is None else set(groups))

        assert command(asked) == answer
        assert remote._sends(asked) is (command is remote._enable_events and groups is not None)


def test_a_pool_is_not_resized():
    """The answer is an error that says what to do."""
    remote.register()
    for name in ("pool_grow", "pool_shrink", "autoscale", "pool_restart"):
        assert "start more workers" in remote.Panel.data[name](state(set()), 2)["error"]
