"""Speed under load: the controller against simulated queues, and the choice of a speed for one job."""

from __future__ import annotations

import random
import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from model.exits import TIERS, SpeedRow, SpeedTable, UnknownSpeedError
from service.broker.base import Delivery
from service.jobs import Answer, Job, Priority
from service.speed_control import LoadLevel, choose_speed
from tests.service.fakes import SPEEDS
from tests.service.running import until
from tests.service.worker.fakes import Stage, StepFake, text

TARGET = 0.15
TICK = 0.001  # seconds
POLL = 0.25  # that a worker waits for photos before it asks again
AHEAD = 8  # photos in a worker's hands


@dataclass
class Seen:
    """What went on in a simulated service."""

    waits: list[tuple[float, float]] = field(default_factory=list)  # when a photo was taken, and how long it had waited
    levels: list[tuple[float, float]] = field(default_factory=list)  # of the first worker, ten times a second
    waiting: list[tuple[float, int]] = field(default_factory=list)

    def level(self, begin: float, end: float) -> list[float]:
        return [level for at, level in self.levels if begin <= at < end]

    def wait(self, begin: float, end: float) -> float:
        return statistics.mean(wait for at, wait in self.waits if begin <= at < end)


@dataclass
class Service:
    """Workers that look at a photo and word it, one after the other; only the words take less time at a higher speed.

    As in a worker, a photo's speed is chosen when it is taken, with up to `AHEAD` others still before it.
    """

    workers: int = 1
    look: float = 0.010  # seconds
    words: float = 0.030  # at the speed asked for
    most: float = 3.0  # times that speed
    target: float = TARGET

    def run(self, load: float, seconds: float, rest: float = 0.0, *, chance: int | None = None) -> Seen:
        """`load` times what it can do at the speed asked for, then nothing for `rest`. `chance`: seed of arrivals that
        come by chance; None: evenly."""
        seen, queue = Seen(), deque[float]()
        levels = [LoadLevel(self.target) for _ in range(self.workers)]
        hands = [deque[float]() for _ in levels]  # speeds
        busy, asked = [0.0] * self.workers, [0.0] * self.workers  # until when, and since when it has waited
        dice = random.Random(chance or 0)
        rate = load * self.workers / (self.look + self.words)
        arrival = 0.0
        for tick in range(round((seconds + rest) / TICK)):
            now = tick * TICK
            while arrival <= min(now, seconds):
                queue.append(arrival)
                arrival += 1 / rate if chance is None else dice.expovariate(rate)
            for number in dice.sample(range(self.workers), self.workers):
                if busy[number] <= now and hands[number]:
                    busy[number] = max(busy[number], now - TICK) + self.look + self.words / hands[number].popleft()
                room = AHEAD - len(hands[number])
                if not room:
                    asked[number] = now
                elif queue or now >= asked[number] + POLL:
                    waited = [now - queue.popleft() for _ in range(min(room, len(queue)))]
                    level = levels[number].update(now, waited)
                    asked[number] = now
                    seen.waits += [(now, wait) for wait in waited]
                    hands[number] += [1.0 + round(level, 1) * (self.most - 1.0)] * len(waited)
            if tick % 100 == 0:
                seen.levels.append((now, levels[0].level))
                seen.waiting.append((now, len(queue)))
        return seen


@pytest.mark.parametrize("most", [2.0, 3.0, 6.0])
@pytest.mark.parametrize("workers", [1, 4])
def test_it_settles_where_the_target_is_kept(workers: int, most: float) -> None:
    seen = Service(workers, most=most).run(1.3, 60)
    settled = seen.level(20, 60)
    assert statistics.pstdev(settled) < 0.05
    assert max(settled) - min(settled) < 0.2
    # The level follows from the load alone: a photo may take 40 / 1.3 ms, and its look takes 10 of them.
    needed = (0.030 / ((0.040 / 1.3) - 0.010) - 1.0) / (most - 1.0)
    assert statistics.mean(settled) == pytest.approx(needed, abs=0.05)
    assert seen.wait(20, 60) == pytest.approx(TARGET, rel=0.2)
    assert max(wait for _, wait in seen.waits) < 5 * TARGET  # until it has found the level


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [1, 4])
def test_arrivals_by_chance_do_not_make_it_swing(workers: int, seed: int) -> None:
    """The waits go up and down by themselves then: at 1.3 times what it could, a second brings five photos more or
    less. The level must not follow each."""
    seen = Service(workers).run(1.3, 90, chance=seed + 1)
    settled = seen.level(20, 90)
    assert statistics.pstdev(settled) < 0.2
    steps = [abs(b - a) for a, b in pairwise(settled)]
    assert max(steps) < 0.15  # in a tenth of a second
    assert 0.3 * TARGET < seen.wait(20, 90) < 2 * TARGET


@pytest.mark.parametrize("workers", [1, 4])
def test_it_returns_to_rest_within_seconds(workers: int) -> None:
    seen = Service(workers).run(1.3, 30, rest=10, chance=7)
    assert statistics.mean(seen.level(20, 30)) > 0.1
    assert set(seen.level(34, 40)) == {0.0}


def test_from_the_highest_level_too() -> None:
    seen = Service(most=1.2).run(1.3, 60, rest=40)
    assert statistics.mean(seen.level(50, 60)) == 1.0
    emptied = next(at for at, waiting in seen.waiting if at > 60 and not waiting)
    assert set(seen.level(emptied + 5, 100)) == {0.0}


def test_what_no_speed_can_hold_gets_all_there_is() -> None:
    seen = Service(most=1.5).run(2.0, 20)
    assert set(seen.level(5, 20)) == {1.0}


def test_below_what_it_can_do_nothing_is_moved() -> None:
    assert set(Service().run(0.9, 60).level(0, 60)) == {0.0}
    assert statistics.mean(Service().run(0.7, 60, chance=3).level(0, 60)) < 0.01


def test_it_rises_faster_than_it_falls() -> None:
    level = LoadLevel(TARGET)
    for tick in range(200):
        level.update(tick * 0.1, [2 * TARGET])  # as far above the target ...
    assert (risen := level.level) > 0.2
    for tick in range(200, 400):
        level.update(tick * 0.1, [0.0])  # ... as this is below it, though some are taken
    assert 0.0 < risen - level.level < risen + 0.3


@pytest.mark.parametrize("target", [0.02, 1.0])
def test_other_targets_are_kept_too(target: float) -> None:
    seen = Service(target=target).run(1.3, 120)
    assert seen.wait(60, 120) == pytest.approx(target, rel=0.3, abs=0.02)
    assert statistics.pstdev(seen.level(60, 120)) < 0.1


def test_bounds_and_odd_times() -> None:
    level = LoadLevel(TARGET)
    assert level.update(100.0, [1e9]) <= 1.0  # the first time stands for no time at all
    assert level.update(50.0, [1e9]) <= 1.0  # a clock that goes back is none
    for tick in range(1000):
        assert 0.0 <= level.update(200.0 + tick, [1e9]) <= 1.0
    assert level.level == 1.0
    for tick in range(1000):
        assert 0.0 <= level.update(2000.0 + tick, []) <= 1.0
    assert level.level == 0.0


def job(speed: str | float | None = None, tau: float | None = None, **bounds: float) -> Job:
    return Job("id", b"", speed, tau, 1, "interactive", 0.0, **bounds)


def delivered(wait: float, priority: Priority = "interactive", attempt: int = 1) -> Delivery:
    return Delivery(replace(job(), priority=priority), attempt, wait, "")


def test_batch_photos_in_their_turn_change_nothing() -> None:
    """Every eighth place is offered to one, which may have waited for long, or not at all."""
    alone, mixed = LoadLevel(TARGET), LoadLevel(TARGET)
    for tick in range(1, 2000):
        now, wait = tick * 0.04, 0.3 if tick < 500 else 0.16
        other = tick % 8 == 0
        if not other:
            alone.took(now, [delivered(wait)])
        mixed.took(now, [delivered(60.0 * (tick % 16), "batch")] if other else [delivered(wait)])
        assert mixed.level == pytest.approx(alone.level, abs=1e-9)
    assert mixed.level > 0.2
    for tick in range(2000, 2250):
        mixed.took(tick * 0.04, [delivered(60.0, "batch")])
    assert mixed.level == 0.0  # ten seconds later: none but batch photos are left


@pytest.mark.parametrize("nothing", [[], [delivered(9.0, "batch")], [delivered(9.0, attempt=2)]])
def test_waits_that_do_not_tell_of_the_load_move_nothing(nothing: list[Delivery]) -> None:
    level = LoadLevel(TARGET)
    for tick in range(200):
        level.took(tick * 0.1, nothing)
        assert level.level == 0.0


# One job's speed. SPEEDS promises 1 + τ up to 3.5, so `fastest` is 4.5; the tiers are where they should be.


@pytest.mark.parametrize(
    ("wants", "level", "promised"),
    [
        (job(), 0.0, 2.0),
        (job("fast", max_speed=4.0), 0.0, 3.0),
        (job("fast", max_speed=4.0), 0.5, 3.5),
        (job("fast", max_speed=4.0), 1.0, 4.0),
        (job("fast", max_speed=4.0), 0.02, 3.0),  # so little is none
        (job(max_speed=3.0), 1.0, 3.0),
        (job(1.5, max_speed=2.5), 0.2, 1.7),
        (job(1.5, max_speed=99.0), 1.0, 4.5),  # the table ends there
        (job(min_speed=2.5, max_speed=3.5), 0.0, 2.5),  # the default tier, moved into the bounds
        (job(min_speed=2.5, max_speed=3.5), 0.5, 3.0),
        (job(max_speed=1.5), 0.0, 1.5),
        (job(max_speed=1.5), 1.0, 1.5),
        (job("fast", min_speed=1.0, max_speed=3.0), 1.0, 3.0),
        (job("fast", max_speed=2.5), 1.0, 2.5),  # the front's table had another figure for the tier
    ],
)
def test_the_speed_of_a_job_at_a_level(wants: Job, level: float, promised: float) -> None:
    chosen = choose_speed(SPEEDS, wants, level)
    assert chosen.used.promised == pytest.approx(promised)
    assert chosen.used.tau == pytest.approx(promised - 1.0)
    assert (chosen.used.requested, chosen.used.tier) == (chosen.asked.requested, chosen.asked.tier)
    assert chosen.asked == choose_speed(SPEEDS, wants, 0.0).used
    assert chosen.moved == (chosen.used.tau > chosen.asked.tau)


@pytest.mark.parametrize(
    "wants", [job(), job("turbo"), job(1.5), job(tau=0.7), job("fast", min_speed=2.0), job(min_speed=2.5)]
)
@pytest.mark.parametrize("level", [0.3, 1.0])
def test_a_job_that_allows_nothing_is_never_moved(wants: Job, level: float) -> None:
    chosen = choose_speed(SPEEDS, wants, level)
    assert not chosen.moved
    assert chosen == choose_speed(SPEEDS, wants, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_speed_never_goes_beyond_the_bounds_nor_down_with_the_level(seed: int) -> None:
    """On tables as measured: SpeedUps that are not quite where the tiers want them, some equal, some falling."""
    dice = random.Random(seed)
    taus = sorted({0.0, *(round(dice.uniform(0.1, 5.0), 3) for _ in range(8))})
    speeds = [1.0, *(dice.choice([1.0, 1.5, 2.0, 3.0, 4.0]) + dice.random() / 10 for _ in taus[1:])]
    table = SpeedTable(
        tuple(SpeedRow(tau, speed, speed, 50.0, 10.0) for tau, speed in zip(taus, speeds, strict=True)),
        {name: dice.choice(taus) for name in TIERS},
    )
    for _ in range(50):
        asked = dice.choice([*TIERS, dice.uniform(1.0, table.fastest)])
        most = dice.uniform(table.resolve(asked).promised, table.fastest)
        wants = job(asked, max_speed=most)
        used = [choose_speed(table, wants, level / 20).used for level in range(21)]
        assert used[0].tau == table.resolve(asked).tau
        assert all(a.tau <= b.tau for a, b in pairwise(used))
        assert all(each.promised <= most + 1e-6 for each in used)


def test_what_the_table_does_not_offer_is_refused() -> None:
    for wants in (job("warp"), job(9.0, max_speed=99.0), job(min_speed=9.0, max_speed=99.0)):
        with pytest.raises(UnknownSpeedError):
            choose_speed(SPEEDS, wants, 0.0)


# In a worker.


@pytest.mark.anyio
async def test_a_worker_moves_the_jobs_that_allow_it_while_others_wait(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake, look_batch=1, target_wait=0.001)
    fake.step_seconds = 0.01
    jobs = [await stage.submit(number % 100, **({"max_speed": 3.5} if number % 2 else {})) for number in range(60)]
    answers = [await stage.outcome(job) for job in jobs]
    assert all(isinstance(answer, Answer) for answer in answers)
    moved = 0
    for number, answer in enumerate(answers):
        assert isinstance(answer, Answer)
        used = answer.caption.speed
        assert (used.requested, used.tier) == ("balanced", "balanced")
        assert answer.caption.text == text(number, used.tau)
        if answer.asked is None:
            assert used == SPEEDS.resolve()
        else:
            assert number % 2
            assert answer.asked == SPEEDS.resolve()
            assert 2.0 < used.promised <= 3.5
            assert used.promised == pytest.approx(1.0 + used.tau)
            moved += 1
    assert moved > 10
    assert stage.metric("deecap_speed_moved_total") == moved
    assert stage.metric("deecap_words_total", speed="balanced") == 60 * 4  # by what was asked for
    assert stage.metric("deecap_words_total", speed="custom") == 0
    await until(lambda: stage.metric("deecap_load_level") == 0.0, 8)
    rest = await stage.outcome(await stage.submit(1, max_speed=3.5))
    assert isinstance(rest, Answer)
    assert (rest.asked, rest.caption.speed) == (None, SPEEDS.resolve())
    assert worker.ready


@pytest.mark.anyio
async def test_jobs_share_a_caption_where_the_speed_used_is_the_same(stage: Stage, fake: StepFake) -> None:
    worker = await stage.add_worker(fake)
    fake.frozen = True
    worker._load.took = lambda now, deliveries: None
    worker._load.level = 1.0
    moved = await stage.submit(1, speed=2, max_speed=3.0)
    await until(lambda: fake.busy)
    asked = await stage.submit(1, speed="fast")
    await until(lambda: stage.metric("deecap_coalesced_total") == 1)
    fake.frozen = False
    first, second = [await stage.outcome(job) for job in (moved, asked)]
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert first.caption.steps == second.caption.steps
    assert (first.caption.speed.requested, first.caption.speed.tau, first.asked) == (2.0, 2.0, SPEEDS.resolve(2))
    assert (second.caption.speed, second.asked) == (SPEEDS.resolve("fast"), None)
