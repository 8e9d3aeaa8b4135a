"""The whole of docker-compose.yml but for Grafana, as processes, after some seconds of every kind of traffic."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import traffic
from tests.deploy.compose import Compose, load, loopback_is_wide
from tests.service.redis_server import find_binary

SECRETS = {"REDIS_PASSWORD": "a-password-of-the-test"}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    if not loopback_is_wide():
        pytest.skip("only one loopback address here: two Redis servers cannot both have port 6379")
    for name, there in (("redis-server", find_binary()), ("prometheus", shutil.which("prometheus"))):
        if not there:
            pytest.skip(f"no {name} here: apt-get install {name}")
    services = load("docker-compose.yml", environment=SECRETS)
    del services["grafana"]  # in no package of Debian or PyPI
    folder: Path = tmp_path_factory.mktemp("compose")
    with Compose(folder, services) as compose:
        compose.start(*services)
        for name in services:
            compose.wait_healthy(name)
        traffic.everything(compose)
        yield compose
