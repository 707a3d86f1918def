"""What follows a request takes over the headers that are neither Celery's nor ours, such as its trace context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def following(step: Mapping[str, Any], further: Mapping[str, str]) -> dict[str, Any]:
    """A step of a canvas, all of whose calls have these headers; those that a call was given count before them."""
    if not further:
        return dict(step)
    inside = dict(step.get("kwargs") or {})
    parts = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body")}.get(step.get("subtask_type") or "")
    if parts:
        inside.update({part: _each(inside[part], further) for part in parts if inside.get(part)})
        return {**step, "kwargs": inside}
    options = step.get("options") or {}
    return {**step, "options": {**options, "headers": {**further, **(options.get("headers") or {})}}}


def _each(steps: Any, further: Mapping[str, str]) -> Any:
    return following(steps, further) if isinstance(steps, Mapping) else [following(step, further) for step in steps]
