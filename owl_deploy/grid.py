"""A table of text: the same cells on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from owl_deploy.formatting import escaped


@dataclass(frozen=True)
class Heading:
    """Of a column: figures stand to the right, words to the left and on one line."""

    title: str
    is_text: bool = False


@dataclass(frozen=True)
class Grid:
    """Cells by section, row and column; a terminal shows a rule between sections."""

    headings: Sequence[Heading]
    sections: Sequence[Sequence[Sequence[str]]]

    def on_terminal(self, title: str = "") -> Table:
        """For rich to print."""
        shown = Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold") if title else None, title_justify="left")
        for heading in self.headings:
            justify: JustifyMethod = "left" if heading.is_text else "right"
            shown.add_column(Text(heading.title), justify=justify, no_wrap=heading.is_text, overflow="fold")
        for section in self.sections:
            for cells in section:
                shown.add_row(*map(Text, cells))
            shown.add_section()
        return shown

    def in_markdown(self) -> str:
        """The lines of a table, the last without a line break; a line break in a cell is a space."""
        lines = [
            [heading.title for heading in self.headings],
            [":--" if heading.is_text else "--:" for heading in self.headings],
            *([escaped(" ".join(cell.split())) for cell in cells] for section in self.sections for cells in section),
        ]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
