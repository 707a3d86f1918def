"""Submit inference requests to the fleet."""

from producer.aio import AsyncClient, AsyncHandle
from producer.client import Client
from producer.handle import Handle
from producer.records import RequestStatus
from shared.contract import InferenceRequest, InferenceResult, Kind, Priority, SamplingParams

__all__ = [
    "AsyncClient",
    "AsyncHandle",
    "Client",
    "Handle",
    "InferenceRequest",
    "InferenceResult",
    "Kind",
    "Priority",
    "RequestStatus",
    "SamplingParams",
]
