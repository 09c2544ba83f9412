"""The project's pages as tests read them: blocks with their markers, links, anchors, commands.

A marker is a comment in the line before a block. `<!-- name -->` begins a script, `<!-- name, goes on -->` is more of it, and
`<!-- name output -->` is what it has printed since its last output. `<!-- not run: why -->` says that a block is only read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))

RUN_BY_THEMSELVES = {"docs/where.md": "test_where.py", "docs/extending/": "test_recipes.py"}
"""Pages whose blocks go on with one another without markers -> the test that runs them."""

_MARKER = re.compile(r"<!-- (.+) -->")
_FENCE = re.compile(r"\s*```(\w*)")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: it stands on.
        line: of its fence, from 1.
        marker: what the comment before it says; empty without one.
        language: after the fence.
        text: between the fences.
    """

    page: Path
    line: int
    marker: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}, line {self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in their order."""
    lines, blocks, begun = page.read_text(encoding="utf-8").splitlines(), [], None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and begun is None:
            begun, language = number, fence.group(1)
        elif fence:
            marker = _MARKER.fullmatch(lines[begun - 1].strip()) if begun else None
            text = "".join(f"{one}\n" for one in lines[begun + 1 : number])
            blocks.append(Block(page, begun + 1, marker.group(1) if marker else "", language, text))
            begun = None
    assert begun is None, f"{name_of(page)}: the block in line {begun} has no end"
    return blocks


def every_block() -> list[Block]:
    """Those of all pages but the ones that run by themselves."""
    own = tuple(RUN_BY_THEMSELVES)
    return [block for page in PAGES if not name_of(page).startswith(own) for block in blocks_of(page)]


def block(marker: str) -> str:
    """The text of the one block with this marker, on whatever page it is."""
    (found,) = (each for each in every_block() if each.marker == marker)
    return found.text


def prose_of(page: Path) -> str:
    """A page without its blocks; what is between backticks stays."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def words_of(*pages: Path) -> str:
    """All that pages say, in one line: quotes are found however they are wrapped."""
    return " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)


def spans_of_code(page: Path) -> list[str]:
    """What stands between backticks in a page's prose, in one line each."""
    return [" ".join(found.split()) for found in _CODE.findall(prose_of(page))]


def links_of(page: Path) -> list[str]:
    """Targets of all links and pictures, as they are written."""
    return _LINK.findall(_CODE.sub("``", prose_of(page)))


def anchors_of(page: Path) -> set[str]:
    """What `#...` may follow a page's name, as GitHub makes it of headings."""
    anchors: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose_of(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = anchors.get(slug, 0)
        anchors[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def table_under(page: Path, marker: str) -> list[list[str]]:
    """Cells of the table that follows `<!-- marker -->`, a list per row, without its head."""
    after = page.read_text(encoding="utf-8").split(f"<!-- {marker} -->\n", 1)[1]
    rows = [line for line in after.split("\n\n", 1)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]
