"""Whatever picture is sent, it is captioned or refused, soon, and the service is as well as before.

A failure names the mutant's seed: `tests.fuzz.mutants.mutant(seed).data` is the picture again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import httpx
import pytest

from tests.fuzz.mutants import FORMS, RECIPES, Mutant, mutant, originals, request
from tests.fuzz.server import URL, Server, problem_fault, what_is_wrong

QUICK, LONG = 200, 5_000
# A picture of this server's largest size takes a twentieth of a second to decode and to shrink; the rest is for a busy
# machine. Without any bound, a bomb would take the service's own time limit, which is answered with 504.
SECONDS = 2.5
# Once the first round was over, less than 1 MB was seen in six more. To keep a byte for every tenth pixel that is
# decoded is 5 MB in the three rounds that are measured.
TOLERANCE_MB = 4.0


def test_a_seed_makes_the_same_mutant_again() -> None:
    for seed in range(len(RECIPES)):
        assert mutant(seed) == mutant(seed)
    assert len({mutant(seed).data for seed in range(QUICK)}) > 0.9 * QUICK


def test_the_originals_are_all_captioned(server: Server) -> None:
    """Else their mutants would show nothing."""
    for name, data in originals():
        assert send(server, data, "raw").status_code == 200, name


def test_the_mutants_reach_every_kind_of_answer(server: Server) -> None:
    """Were all of them refused by their first bytes, the decoders would never be fuzzed."""
    answers = [send(server, mutant(seed).data, "raw") for seed in range(QUICK)]
    codes = Counter("ok" if answer.status_code == 200 else answer.json()["code"] for answer in answers)
    assert set(codes) == {"ok", "not_an_image", "undecodable_image", "too_many_pixels", "image_too_small"}, codes
    assert codes["ok"] > QUICK / 10, codes
    assert codes["undecodable_image"] > QUICK / 10, codes


def test_mutants(server: Server) -> None:
    fuzz(server, [mutant(seed) for seed in range(QUICK)], rounds=3)


@pytest.mark.long
def test_thousands_of_mutants(server: Server) -> None:
    fuzz(server, [mutant(seed) for seed in range(QUICK, QUICK + LONG)], rounds=3)


@pytest.mark.parametrize(
    "broken",
    [
        httpx.Response(500, json={"code": "internal"}),
        httpx.Response(503, json={"code": "overloaded"}),
        httpx.Response(422, text="no"),
        httpx.Response(422, json={"detail": []}, headers={"Content-Type": "application/problem+json"}),
        httpx.Response(200, json={"caption": ""}),
    ],
)
def test_answers_that_are_not_promised_are_found(broken: httpx.Response) -> None:
    assert what_is_wrong(broken)
    assert broken.status_code == 200 or problem_fault(broken.status_code, dict(broken.headers), broken.content)


def fuzz(server: Server, mutants: Sequence[Mutant], rounds: int) -> None:
    """Sends all of them in all forms, then again for `rounds` rounds in which memory must not grow."""
    faults: list[str] = []
    for each in mutants:
        faults += faults_of(server, each)
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])
    # The round above was the warm-up: every decoder is loaded, and the heap has had its largest pictures.
    megabytes = [server.megabytes()]
    for _ in range(rounds):
        for each in mutants:
            send(server, each.data, "raw")
        megabytes.append(server.megabytes())
    assert megabytes[-1] - megabytes[0] < TOLERANCE_MB, f"resident memory after each round, MB: {megabytes}"


def faults_of(server: Server, each: Mutant) -> list[str]:
    """What is wrong with the answers to one mutant, sent in every form."""
    faults, verdicts = [], {}
    for form in FORMS:
        begin = time.monotonic()
        try:
            answer = send(server, each.data, form)
        except httpx.HTTPError as error:
            faults.append(f"{each} as {form}: no answer: {error!r}")
            if server.process.poll() is not None:
                faults.append(f"the service died of it: {server.said()}")
                return faults
            continue
        seconds = time.monotonic() - begin
        if seconds > SECONDS:
            faults.append(f"{each} as {form}: took {seconds:.1f} s")
        if fault := what_is_wrong(answer):
            faults.append(f"{each} as {form}: {fault}")
        verdicts[form] = answer.json().get("code", answer.json().get("caption"))
    if len(set(verdicts.values())) > 1:
        faults.append(f"{each}: the forms disagree: {verdicts}")
    return faults


def send(server: Server, data: bytes, form: str) -> httpx.Response:
    body, headers = request(data, form)
    return server.client.post(URL, content=body, headers=headers)
