"""`NAME.csv`, `NAME.png` and `NAME.md` of a study, beside its cells."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from owl_deploy.files import write_text
from owl_deploy.formatting import escaped
from owl_deploy.plotting import save_figure
from owl_deploy.records import TextRecord
from owl_deploy.studies.cells import Study, StudyResult
from owl_deploy.studies.tables import csv_text, markdown_table


def write_study(study: Study, result: StudyResult, out: Path) -> Path:
    """Write the files into `out`, over those that are there; the path of NAME.md.

    Raises:
        UserError: `out` cannot be written.
    """
    tables = study.tables(result)
    for table in tables:
        write_text(out / f"{'-'.join(filter(None, (study.name, table.name)))}.csv", csv_text(table))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    study.draw(result, figure)
    figure.suptitle(f"{study.title}: {Path(result.study.model).name}")
    save_figure(figure, out / f"{study.name}.png")
    parts = [
        f"# {study.title}",
        _setting(result),
        f"![{study.title}]({study.name}.png)",
        *(markdown_table(table) for table in tables),
    ]
    report = out / f"{study.name}.md"
    write_text(report, "\n\n".join(parts) + "\n")
    return report


def _setting(result: StudyResult) -> str:
    study = result.study
    parts = [escaped(study.model), f"calibrated on {_windows(study.calibration)}"]
    if study.evaluation is not None:
        parts.append(f"perplexity in torch, fp32, on {_windows(study.evaluation)}")
    if study.tasks is not None:
        counts = ", ".join(f"{count} of {name}" for name, count in study.tasks.examples.items())
        parts.append(f"zero-shot in torch, fp32, with lm-eval {study.tasks.lm_eval_version}: {counts} examples")
    return f"{'; '.join(parts)}. owl-deploy {study.versions['owl-deploy']}, torch {study.versions['torch']}."


def _windows(text: TextRecord) -> str:
    return f"{text.windows} x {text.seqlen} tokens of {escaped(text.source)}"
