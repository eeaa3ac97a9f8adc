"""README.md files of the repository, and their parts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "scripts", "squisher_mergekit", "tests")
READMES = [ROOT / "README.md", *sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("README.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: file and line of its fence.
        language: word behind the opening fence.
        text: lines between the fences.
        not_run: reason in the comment on the line before the fence, or an empty string.
    """

    place: str
    language: str
    text: str
    not_run: str = ""


def named(file: Path) -> str:
    """Return the path of a README.md for the messages of tests."""
    return str(file.relative_to(ROOT))


def blocks(text: str, name: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown text, in order."""
    lines = text.splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("```") and opened is None:
            opened = number
        elif line.rstrip() == "```" and opened is not None:
            reason = NOT_RUN.fullmatch(lines[opened - 1].strip()) if opened else None
            content = "\n".join(lines[opened + 1 : number]) + "\n"
            yield Block(f"{name}:{opened + 1}", lines[opened][3:].strip(), content, reason[1] if reason else "")
            opened = None
    assert opened is None, f"{name}:{opened}: the fence is never closed"


def without_code(text: str) -> str:
    """Return a Markdown text without fenced blocks and without lines indented by four spaces."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings by the rules of GitHub."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", without_code(text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = next(n for n in range(100) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def links(text: str) -> list[str]:
    """Return the targets of links and pictures outside of code."""
    prose = re.sub(r"`[^`]*`", "", without_code(text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)
