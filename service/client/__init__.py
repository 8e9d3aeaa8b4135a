"""The Python client: photos in, typed captions out, with retries that survive a restart of the service.

    from service.client import Client

    with Client("http://127.0.0.1:8000") as client:
        print(client.caption("photo.jpg", speed="fast").caption)

It needs httpx (`pip install '.[client]'` in the project's folder) and no torch.
"""

from service.client.answers import (
    CaptionAnswer,
    Job,
    Model,
    ModelName,
    Region,
    Speed,
    SpeedRow,
    Speeds,
    StreamedWord,
    Tier,
    Timings,
    Word,
)
from service.client.asynchronous import AsyncClient
from service.client.errors import (
    BusyError,
    ClientError,
    DeadlineError,
    ImageRefusedError,
    OptionRefusedError,
    ProblemError,
    QuotaError,
    ServiceFailedError,
    UnauthorizedError,
    UnexpectedAnswerError,
    UnknownJobError,
    UnreachableError,
)
from service.client.images import Image
from service.client.many import Item
from service.client.retrying import Options
from service.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "BusyError",
    "CaptionAnswer",
    "Client",
    "ClientError",
    "DeadlineError",
    "Image",
    "ImageRefusedError",
    "Item",
    "Job",
    "Model",
    "ModelName",
    "OptionRefusedError",
    "Options",
    "ProblemError",
    "QuotaError",
    "Region",
    "ServiceFailedError",
    "Speed",
    "SpeedRow",
    "Speeds",
    "StreamedWord",
    "Tier",
    "Timings",
    "UnauthorizedError",
    "UnexpectedAnswerError",
    "UnknownJobError",
    "UnreachableError",
    "Word",
]
