"""How loss and perplexity went with the tokens: a table and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from owl_deploy.files import write_text
from owl_deploy.plotting import COLOURS, save_figure
from owl_deploy.recovery.train import StepRecord


def write_curve(log: Sequence[StepRecord], path: Path) -> None:
    """A CSV file with a line for each step."""
    text = io.StringIO()
    rows = csv.DictWriter(text, list(StepRecord.model_fields), lineterminator="\n")
    rows.writeheader()
    rows.writerows(step.model_dump() for step in log)
    write_text(path, text.getvalue())


def plot_curve(log: Sequence[StepRecord], before: float, title: str, path: Path) -> None:
    """A PNG file: perplexity on held-out windows, from `before` on, over the loss of each step."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    of_loss = figure.subplots()
    of_loss.plot([step.tokens for step in log], [step.loss for step in log], color="#c9d6e8", label="loss")
    of_loss.set_xlabel("tokens")
    of_loss.set_ylabel("loss")
    of_perplexity = of_loss.twinx()
    measured = [(0, before), *((step.tokens, step.perplexity) for step in log if step.perplexity is not None)]
    tokens, perplexities = zip(*measured, strict=True)
    of_perplexity.plot(tokens, perplexities, marker="o", color=COLOURS[0], label="perplexity")
    of_perplexity.set_ylabel("perplexity on held-out text")
    of_perplexity.set_title(title)
    handles = [*of_perplexity.lines, *of_loss.lines]
    of_perplexity.legend(handles, [str(line.get_label()) for line in handles], loc="best")
    save_figure(figure, path)
