"""A stage that is torn down whatever a test left held."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.service.worker.fakes import Stage, StepFake


@pytest.fixture
def fake() -> StepFake:
    return StepFake()


@pytest.fixture
async def stage(fake: StepFake, anyio_backend: str) -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.broker.lost = False
    fake.look_gate.set()
    fake.step_gate.set()
    await stage.close()
