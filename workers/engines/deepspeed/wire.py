"""How the processes of a rank group talk: frames of JSON and arrays over a socket. Nothing is unpickled.

A frame is a head of 8 bytes (two unsigned 32-bit numbers: the length of the JSON and the length of what follows it),
the JSON, and the bytes of its arrays one after the other. The JSON's ``arrays`` gives their names, types and shapes.
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from shared.contract import Usage
from shared.errors import EngineError
from workers.engines.base import EngineOutput

Arrays = dict[str, NDArray[Any]]

_HEAD = struct.Struct("!II")
_TYPES = frozenset({"int64", "float32"})


class Channel:
    """One end of a connected socket pair. Sending and receiving may be done by different threads, each by one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """Longest wait for the other side to take or give a part of a frame; ``TimeoutError`` after it."""
        self._socket.settimeout(seconds)

    def send(self, message: Mapping[str, Any], **arrays: NDArray[Any]) -> None:
        """Send a frame; raise ``OSError`` where the other side is gone."""
        heads = [(name, str(array.dtype), array.shape) for name, array in arrays.items()]
        text = orjson.dumps({**message, "arrays": heads} if heads else message)
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
        self._socket.sendall(_HEAD.pack(len(text), len(body)) + text + body)

    def receive(self) -> tuple[dict[str, Any], Arrays]:
        """The next frame; raise ``EOFError`` where the other side is gone."""
        text_size, body_size = _HEAD.unpack(self._exactly(_HEAD.size))
        message = orjson.loads(self._exactly(text_size))
        body = memoryview(self._exactly(body_size))
        arrays: Arrays = {}
        at = 0
        for name, dtype, shape in message.pop("arrays", ()):
            if dtype not in _TYPES:
                raise EngineError(f"an array of type {dtype} in a message between ranks")
            size = math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = np.frombuffer(body[at : at + size], dtype=dtype).reshape(shape)
            at += size
        return message, arrays

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                taken = self._socket.recv_into(view)
            except ConnectionResetError:
                taken = 0
            if not taken:
                raise EOFError("the other side closed the connection")
            view = view[taken:]
        return data


def output_to_json(output: EngineOutput) -> dict[str, Any]:
    """An answer as a message."""
    return {
        "outputs": output.outputs,
        "usage": output.usage.model_dump(),
        "prefill_ms": output.prefill_ms,
        "decode_ms": output.decode_ms,
        "cache_hit": output.cache_hit,
        "metadata": output.metadata,
    }


def output_from_json(data: Mapping[str, Any]) -> EngineOutput:
    """The answer that :func:`output_to_json` was given."""
    return EngineOutput(**{**data, "usage": Usage.model_validate(data["usage"])})
