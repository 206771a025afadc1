"""`roofline.md`, and the files beside it."""

from __future__ import annotations

from pathlib import Path

from owl_deploy.files import disk_errors, write_text
from owl_deploy.report.roofline.plot import plot_roofline
from owl_deploy.report.roofline.tables import markdown
from owl_deploy.roofline.records import Roofline

JSON, MARKDOWN, PLOT = "roofline.json", "roofline.md", "roofline.png"


def write_roofline(roofline: Roofline, out: Path, *, matrices: bool) -> Path:
    """Write the files into the directory `out`, made if need be, over those that are there; the path of roofline.md.

    Raises:
        UserError: `out` cannot be written.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / JSON, roofline.model_dump_json(indent=2) + "\n")
    plot_roofline(roofline, out / PLOT)
    write_text(out / MARKDOWN, markdown(roofline, matrices=matrices, plot=PLOT))
    return out / MARKDOWN
