"""What ``make up`` decides before it starts anything."""

from __future__ import annotations

import socket

from demo.up import free_port_from
from shared.embedded import free_port


def test_a_second_fleet_beside_the_first_takes_the_next_free_port() -> None:
    """A monitor whose port is taken would end, and the fleet with it."""
    first = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()

        assert free_port_from(first) > first

    assert free_port_from(first) == first
