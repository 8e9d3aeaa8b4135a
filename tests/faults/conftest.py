"""One service of real processes for all tests of this folder, healed before each, and its books checked after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.faults.cluster import Cluster
from tests.faults.load import Sent, codes
from tests.service.redis_server import MISSING, find_binary


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if find_binary() is None:
        pytest.skip(MISSING)
    cluster = Cluster(tmp_path_factory.mktemp("faults"), append_only=True)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """With one front, two workers, and nothing to do."""
    running.heal()
    return running


@dataclass
class Books:
    """What was counted before; `check` compares what was added since with what the clients saw."""

    cluster: Cluster
    answers: Counter[str]
    answered: int
    redelivered: int
    dead: int

    def check(self, those: list[Sent], *, front: bool = True, store: bool = True) -> None:
        """That nothing is left over, and that service and clients counted the same.

        `front`: it is the same one as before. `store`: it kept its counts. Jobs that nobody waited for count nowhere.
        """
        self.cluster.settle()
        seen = codes(those)
        if front:
            told = self.cluster.front.metrics().answers() - self.answers
            told.pop("client_gone", 0)
            # Who hung up may have come too early to be seen, or too late to go without an answer.
            gone = seen.pop("hung_up", 0)
            extra = (told - seen).total()
            assert extra <= gone, f"the front counted {dict(told)}, the clients {dict(seen)} and {gone} hung up"
            assert not seen - told, f"the clients have {dict(seen - told)} more than the front counted: {dict(told)}"
        if store:
            by_workers = [sent for sent in those if sent.code in ("ok", "internal", "poison")]
            answered = self.cluster.count("answered") - self.answered
            # The store can have taken a photo and been lost before it could say so: that one is captioned for nobody.
            unsaid = sum(sent.code == "unavailable" for sent in those)
            extra = answered - len(by_workers)
            assert 0 <= extra <= unsaid, (
                f"the store counted {answered} answers, the clients {len(by_workers)}: {abs(extra)} were given "
                + ("twice, or for nobody" if extra > 0 else "and the store knows nothing of it")
            )

    @property
    def new_redelivered(self) -> int:
        return self.cluster.count("redelivered") - self.redelivered

    @property
    def new_dead(self) -> int:
        return self.cluster.count("dead") - self.dead


@pytest.fixture
def books(cluster: Cluster) -> Books:
    counts = (cluster.count(name) for name in ("answered", "redelivered", "dead"))
    return Books(cluster, cluster.front.metrics().answers(), *counts)
