"""Rows in, one HTML page out: tables and charts are drawn here, the page's script only sorts, filters and explains.

The page loads nothing, and its content security policy says so to the browser: it runs the one script and the one
style sheet whose hashes it names, whatever a model's name or an engine's error text contains.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup, escape

from owl_deploy.benchmarking.rows import SCHEMA_VERSION, Row
from owl_deploy.formatting import number, percent, size
from owl_deploy.paper.speedups import PAPER_SETTING
from owl_deploy.plotting import COLOURS
from owl_deploy.report.charts import pareto_chart, speedup_chart, styles
from owl_deploy.report.conditions import conditions, method
from owl_deploy.report.findings import findings
from owl_deploy.report.page.drawing import HALF, WIDE, Drawing, Strip, drawing, indices, marker_path, strip
from owl_deploy.report.page.memory import MemoryFigures, memory_figures
from owl_deploy.report.pareto import front_text, points_of
from owl_deploy.report.series import Series, by_series, by_workload, model_names, sparsity_label
from owl_deploy.report.tables import CSV_FIELDS, Column, footnotes, shown_columns, split_cell, value_at
from owl_deploy.report.templates import template
from owl_deploy.report.text import Verdict, ratio, verdict
from owl_deploy.report.verdict import verdict_on

_BOLD = re.compile(r"\*\*(.+?)\*\*")
_VERDICTS: dict[Verdict, str] = {"faster": "▲", "slower": "▼", "no different": "≈"}


@dataclass(frozen=True)
class SpeedupCell:
    """A row's speed-up over its own dense model; `symbol` and `verdict` say whether rounds agree that it is one.

    Attributes:
        note: its bundle, where the engine has several of this sparsity.
    """

    text: str
    note: str
    symbol: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Panel:
    """What is shown of one workload.

    Attributes:
        name: what tells it from the others; empty where it is alone.
        columns: the series that have sparse rows.
        findings: on this workload.
        table: sparsity, the cells of each column, and the paper's speed-up.
        front: the Pareto front in words.
    """

    name: str
    findings: list[str]
    columns: list[str]
    table: list[tuple[str, list[list[SpeedupCell]], str]]
    speedups: list[Drawing]
    pareto: Drawing | None
    front: str


@dataclass(frozen=True)
class Entry:
    """What the tables, and a section of its own, show of a row.

    Attributes:
        series: the name it is drawn under, among the rows of its workload.
        name: the same among all rows.
        label: its sparsity.
        cells: of the table of all rows: text in one or two parts, and what to sort by.
        figures: every field that is filled, by name.
    """

    row: Row
    id: str
    series: str
    name: str
    label: str
    cells: list[tuple[list[str], str]]
    memory: MemoryFigures | None
    strip: Strip | None
    figures: list[tuple[str, str]]


def page(rows: Sequence[Row], *, command: str, csv: str, results: str) -> str:
    """The text of `report.html`.

    Args:
        command: the command line that made the report.
        csv, results: the files beside it.
    """
    assets = files("owl_deploy.report") / "page"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    drawn_as = styles(rows)
    template_of_page = template("page/page.html.j2", emphasised=_emphasised, number=number, size=size, percent=percent)
    return template_of_page.render(
        model=model_names(rows),
        machines=sorted({row.machine.cpu for row in rows}),
        style=Markup(style),
        style_hash=_sha256(style),
        script=Markup(script),
        script_hash=_sha256(script),
        data=_embedded(rows),
        legend=[(name, drawn_as[name], marker_path(drawn_as[name])) for name in drawn_as],
        colours=COLOURS,
        style_of=drawn_as,
        marker_path=marker_path,
        index=indices(drawn_as),
        panels=[_panel(name, here) for name, here in by_workload(rows).items()],
        paper_setting=PAPER_SETTING,
        columns=shown_columns(rows),
        entries=_entries(rows),
        footnotes=footnotes(rows),
        method=method(rows),
        conditions=conditions(rows),
        command=command,
        csv=csv,
        results=results,
        has_deepsparse=any(row.engine == "deepsparse" for row in rows),
        version=SCHEMA_VERSION,
    )


def _emphasised(text: str) -> Markup:
    """`**` as bold; all else as it is written."""
    return Markup(_BOLD.sub(r"<strong>\1</strong>", str(escape(text))))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(rows: Sequence[Row]) -> Markup:
    """The rows as JSON that cannot end the script element it stands in, nor open another."""
    lines = ",\n".join(row.model_dump_json() for row in rows)
    for character in "<>&\u2028\u2029":
        lines = lines.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'{{"schema_version": {SCHEMA_VERSION}, "rows": [\n{lines}\n]}}')


def _panel(name: str, rows: Sequence[Row]) -> Panel:
    pareto = pareto_chart(rows)
    compared = [one for one in by_series(rows) if any(not row.is_dense for row in one.rows)]
    charts = (speedup_chart(rows, "speedup_same_engine"), speedup_chart(rows, "speedup_fastest_dense"))
    return Panel(
        name=name,
        findings=[*verdict_on(rows), *findings(rows)],
        columns=[one.name for one in compared],
        table=_speedups(compared),
        speedups=[drawing(chart, HALF) for chart in charts if chart is not None],
        pareto=drawing(pareto, WIDE) if pareto else None,
        front=front_text(points_of(rows)),
    )


def _speedups(compared: Sequence[Series]) -> list[tuple[str, list[list[SpeedupCell]], str]]:
    """Every sparsity's speed-ups, engine by engine."""
    rows = sorted((row for one in compared for row in one.rows), key=lambda row: row.sparsity_achieved)
    papers: dict[str, float | None] = {}
    for row in rows:
        papers.setdefault(sparsity_label(row), row.paper_speedup)
    return [
        (
            label,
            [[_speedup_cell(one, row) for row in one.rows if sparsity_label(row) == label] for one in compared],
            ratio(paper),
        )
        for label, paper in papers.items()
    ]


def _speedup_cell(series: Series, row: Row) -> SpeedupCell:
    note = series.label(row).removeprefix(sparsity_label(row)).strip()
    if row.status == "failed":
        return SpeedupCell("failed", note)
    if row.speedup_same_engine is None or row.is_dense:
        return SpeedupCell(ratio(row.speedup_same_engine), note)
    found = verdict(row.speedup_same_engine, row.speedup_same_engine_spread)
    shown = ratio(row.speedup_same_engine, row.speedup_same_engine_spread)
    return SpeedupCell(shown, note, _VERDICTS[found], found)


def _entries(rows: Sequence[Row]) -> list[Entry]:
    series_of = {
        id(row): one.name for here in by_workload(rows).values() for one in by_series(here) for row in one.rows
    }
    columns = shown_columns(rows)
    ordered = [(series, row) for series in by_series(rows) for row in series.rows]
    return [
        Entry(
            row=row,
            id=f"row-{number}",
            series=series_of[id(row)],
            name=series.name,
            label=series.label(row),
            cells=[(split_cell(column.text(series, row)), _sort_value(row, column)) for column in columns],
            memory=memory_figures(row),
            strip=strip(row),
            figures=_figures(row),
        )
        for number, (series, row) in enumerate(ordered, start=1)
    ]


def _sort_value(row: Row, column: Column) -> str:
    value = value_at(row, column.sort_by or column.fields[0])
    return "" if value is None else str(value)


def _figures(row: Row) -> list[tuple[str, str]]:
    """The fields that are filled, by name and unrounded, but for the machine's, which all rows here share or name."""
    shown = []
    for name in CSV_FIELDS:
        value = value_at(row, name)
        if value is None or name.startswith("machine."):
            continue
        shown.append((name, json.dumps(value) if isinstance(value, dict | list | tuple) else _plain(value)))
    return shown


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
