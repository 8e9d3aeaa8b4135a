"""Finds the blocks of code in a page of Markdown, and the comments that say why one is not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL, PYTHON = ("sh", "bash", "console"), ("python",)
OTHER = ("json", "text", "toml", "yaml", "ini")  # to read, not to run
_MARK = re.compile(r"<!-- not run: (.*?) -->", re.DOTALL)
_FENCE = re.compile(r"( *)```(\w*)\s*$")


@dataclass(frozen=True)
class Block:
    """One block."""

    page: str
    line: int  # of its first line, from 1
    language: str  # as the fence says; "" where it says nothing, "indented" where there is no fence
    text: str
    reason: str | None  # why it is not run; None where it must be

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of a page, in order: fenced ones, and those indented by four spaces after an empty line."""
    lines = path.read_text().splitlines()
    page = path.relative_to(ROOT).as_posix()
    number = 0
    while number < len(lines):
        begin = number
        fence = _FENCE.match(lines[number])
        if fence:
            number += 1
            while number < len(lines) and lines[number].strip() != "```":
                number += 1
            inside = [line.removeprefix(fence[1]) for line in lines[begin + 1 : number]]
            yield Block(page, begin + 1, fence[2], "\n".join(inside) + "\n", _reason(lines, begin))
            number += 1
        elif _is_indented(lines, number):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = "\n".join(line[4:] for line in lines[begin:number]).rstrip() + "\n"
            yield Block(page, begin + 1, "indented", text, _reason(lines, begin))
        else:
            number += 1


def _is_indented(lines: list[str], number: int) -> bool:
    """Whether a block begins here: four spaces, after an empty line that does not end an item of a list."""
    if not lines[number].startswith("    ") or not lines[number].strip() or (number and lines[number - 1].strip()):
        return False
    before = [line for line in lines[:number] if line.strip()]
    return not (before and re.match(r"\s*([-*]|\d+\.) ", before[-1]))


def _reason(lines: list[str], begin: int) -> str | None:
    """Why the block that begins at `begin` is not run: what the comment right before it says."""
    end = begin
    while end and not lines[end - 1].strip():
        end -= 1
    if not end or not lines[end - 1].rstrip().endswith("-->"):
        return None
    start = end - 1
    while start and "<!--" not in lines[start]:
        start -= 1
    found = _MARK.fullmatch("\n".join(lines[start:end]).strip())
    return " ".join(found[1].split()) if found else None
