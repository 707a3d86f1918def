"""A process that looks at GPUs when it is told to: one JSON command a line on its input, one answer a line back.

``["detect", <CUDA_VISIBLE_DEVICES or null>]`` and ``["read", [<uuid>, ...]]``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from workers.devices.nvml import NvmlHealth, detect


def main() -> None:
    """Answer until the input ends."""
    watched: dict[tuple[str, ...], NvmlHealth] = {}
    for line in sys.stdin:
        command, argument = json.loads(line)
        answer: Any
        if command == "detect":
            answer = asdict(detect(argument))
        else:
            health = watched.setdefault(tuple(argument), NvmlHealth(tuple(argument)))
            answer = [asdict(reading) for reading in health.read()]
        print(json.dumps(answer), flush=True)
    for health in watched.values():
        health.close()


if __name__ == "__main__":
    main()
