"""Submit inference requests to the fleet."""

from producer.client.aio import AsyncClient, AsyncHandle
from producer.client.client import Client
from producer.client.handle import Handle
from producer.client.records import RequestStatus
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
