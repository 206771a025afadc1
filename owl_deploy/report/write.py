"""`report.md` and the files beside it: everything a reader needs to judge a benchmark and to run it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from owl_deploy.benchmarking.rows import RESULTS, Row, read_rows, write_rows
from owl_deploy.errors import UserError
from owl_deploy.files import disk_errors, locked, write_text
from owl_deploy.formatting import escaped
from owl_deploy.report.conditions import conditions, method
from owl_deploy.report.findings import findings
from owl_deploy.report.page.render import page
from owl_deploy.report.pareto import front_text, points_of
from owl_deploy.report.plots import plot_pareto, plot_speedup
from owl_deploy.report.series import by_workload, model_names
from owl_deploy.report.tables import markdown_table, write_csv
from owl_deploy.report.templates import template
from owl_deploy.report.verdict import verdict_on

REPORT = "report.md"
PAGE = "report.html"
CSV = "results.csv"
PLOT = "speedup.png"
PARETO_PLOT = "pareto.png"


def write_report(rows: Sequence[Row], out: Path, *, command: str) -> Path:
    """Write the report into the directory `out`, made if need be; its files are replaced if they are there.

    Args:
        command: the command line that measured the rows, or that put them together.

    Returns:
        The path of `report.md`. Beside it: `report.html`, `results.jsonl`, `results.csv`, `speedup.png` and,
        where perplexity was measured, `pareto.png`.

    Raises:
        UserError: there are no rows, or `out` cannot be written.
    """
    if not rows:
        raise UserError(f"{out}: nothing was measured, so there is nothing to report")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_rows(out / RESULTS, rows)
    write_csv(rows, out / CSV)
    plot_speedup(rows, out / PLOT)
    fronts = _fronts(rows)
    if fronts:
        plot_pareto(rows, out / PARETO_PLOT)
    write_text(out / PAGE, page(rows, command=command, csv=CSV, results=RESULTS))
    write_text(out / REPORT, _markdown(rows, fronts, command))
    return out / REPORT


def renew_report(out: Path, *, command: str) -> Path:
    """Write the report of all rows that `bench` has left in the directory `out`; see `write_report`."""
    with locked(out):
        return write_report(read_rows(out / RESULTS), out, command=command)


def _fronts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each workload's name and Pareto front in words, where both its axes were measured."""
    fronts = [(name, front_text(points_of(here))) for name, here in by_workload(rows).items()]
    return [(name, front) for name, front in fronts if front]


def _markdown(rows: Sequence[Row], fronts: Sequence[tuple[str, str]], command: str) -> str:
    return template("report.md.j2", escaped=escaped).render(
        model=model_names(rows),
        parts=[
            (name, [*verdict_on(here), *findings(here)], markdown_table(here))
            for name, here in by_workload(rows).items()
        ],
        fronts=fronts,
        method=method(rows),
        conditions=conditions(rows),
        command=command,
        has_deepsparse=any(row.engine == "deepsparse" for row in rows),
        plot=PLOT,
        pareto_plot=PARETO_PLOT,
        page=PAGE,
        csv=CSV,
        results=RESULTS,
    )
