"""What README and docs tell people to type is run, or says why not; and then its commands and options exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from service.cli import app
from tests.docs.blocks import OTHER, PAGES, PYTHON, ROOT, SHELL, Block, blocks
from tests.docs.reader import HOST, furnish, run, serving

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.reason is None and block.language not in OTHER]
SECONDS = 60


def names(chosen: list[Block]) -> list[str]:
    return [block.name for block in chosen]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a service with the bundle that ships, in a process of its own."""
    with serving("deecap serve", furnish(tmp_path_factory.mktemp("service"))) as host:
        yield host


@pytest.mark.parametrize("block", RUN, ids=names(RUN))
def test_what_is_told_is_run(block: Block, service: str, tmp_path: Path) -> None:
    text = block.text.replace(HOST, service)
    shell = block.language in SHELL or block.language == "indented"
    assert shell or block.language in PYTHON, (
        f"{block.name}: what is to be done with {block.language or 'no language'}?"
    )
    if block.language == "console":
        text = "".join(line[2:] + "\n" for line in text.splitlines() if line.startswith("$ "))
    done = run(text, furnish(tmp_path), SECONDS, python=not shell)
    assert done.returncode == 0, f"{block.name}: {done.stdout}{done.stderr}"
    assert done.stdout.strip(), f"{block.name}: it says nothing"
    assert "problems/" not in done.stdout


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=lambda block: block.name)
def test_json_is_json(block: Block) -> None:
    assert json.loads(block.text)


def test_a_block_that_is_not_run_says_why() -> None:
    assert [block.name for block in BLOCKS if block.reason is not None and len(block.reason) < 10] == []
    assert len(RUN) > 5


def commands() -> dict[str, click.Command]:
    """Every command of `deecap` by its name, those of groups as "group name" and the group alone too."""
    found: dict[str, click.Command] = {}

    def add(prefix: str, command: click.Command) -> None:
        found[prefix] = command
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                add(f"{prefix} {name}".strip(), inner)

    add("", typer.main.get_command(app))
    return found


@pytest.mark.parametrize("block", [block for block in BLOCKS if "deecap " in block.text], ids=lambda block: block.name)
def test_commands_and_options_exist(block: Block) -> None:
    known = commands()
    for line in block.text.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:[A-Z_]+=\S+ +)*deecap +(.*)", line)
        if found is None:
            continue
        words = shlex.split(found[1], comments=True)
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, f"{block.name}: deecap {name}"
        options = {option for parameter in known[name].params for option in parameter.opts + parameter.secondary_opts}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= options | {"--help"}, f"{block.name}: deecap {name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = {
        target
        for block in BLOCKS
        if block.language in (*SHELL, "indented")
        for target in re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)
    }
    assert told <= targets
    assert told
