"""What the pages take from the rest of the repository: each command's options, recorded tables and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
import typer.cli
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from owl_deploy.cli.app import app

_ROOT = Path(__file__).parents[1]
_OPTIONS = re.compile(r"^\{\{ options of (\w+) \}\}$", re.MULTILINE)
_TABLE = re.compile(r"^\{\{ table of (\S+) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `{{ options of COMMAND }}` by what its `--help` says, `{{ table of FILE }}` by the file's first table."""
    markdown = _OPTIONS.sub(lambda place: _options(place[1]), markdown)
    return _TABLE.sub(lambda place: _first_table(_ROOT / place[1]), markdown)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Let pages show `benchmarks/…/NAME.png` as the repository holds it."""
    for picture in sorted((_ROOT / "benchmarks").rglob("*.png")):
        files.append(File.generated(config, str(picture.relative_to(_ROOT)), abs_src_path=str(picture)))
    return files


def _options(command: str) -> str:
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="owl-deploy")
    text: str = typer.cli.get_docs_for_click(
        obj=group.commands[command], ctx=context, name=command, indent=1, call_prefix="owl-deploy"
    )
    return text


def _first_table(report: Path) -> str:
    rows = report.read_text(encoding="utf-8").partition("\n| ")[2].splitlines()
    return "| " + "\n".join(rows[: next((at for at, row in enumerate(rows) if not row), len(rows))])
