"""The least that a message through a broker can take: a process that passes each on from one list to another."""

from __future__ import annotations

import os

import redis

PING, PONG = "bench:ping", "bench:pong"


def main() -> None:
    """Pass messages on for ever."""
    client = redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)
    while True:
        _, message = client.blpop([PING])
        client.rpush(PONG, message)


if __name__ == "__main__":
    main()
