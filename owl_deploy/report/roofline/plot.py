"""The plot of a roofline: for each flavor the lowest possible time of a token over the one measured."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from owl_deploy.formatting import number, percent
from owl_deploy.plotting import COLOURS, save_figure
from owl_deploy.roofline.records import FlavorFigures, Roofline
from owl_deploy.roofline.traffic import KINDS

# The rest of Okabe and Ito's colours, and greys for what is not read from memory.
_COLOURS = dict(zip(KINDS, COLOURS, strict=True)) | {
    "attention, KV cache": "#F0E442",
    "other operators": "#666666",
    "between operators": "#bbbbbb",
    "not told apart": "#e4e4e4",
}
_VISIBLE = 0.01  # of a bar
_HEIGHT, _GAP = 0.8, 0.7  # of a bar, and between flavors


def plot_roofline(roofline: Roofline, path: Path) -> None:
    """Write a PNG with two bars for each flavor, stacked by kind.

    Raises:
        UserError: `path` cannot be written.
    """
    figure = Figure(figsize=(11, 1.7 + 1.25 * len(roofline.flavors)), layout="constrained")
    axes = figure.subplots()
    places, names = [], []
    for index, flavor in enumerate(roofline.flavors):
        place = index * (2 + _GAP)
        _draw(axes, place, _floors(flavor))
        _draw(axes, place + 1, _measured(flavor))
        from_memory = flavor.memory_floor_ms
        edges = (place - _HEIGHT / 2, place + _HEIGHT / 2)
        axes.plot((from_memory, from_memory), edges, color="black", linewidth=2, label="lowest possible without caches")
        _annotate(axes, place, max(flavor.token.floor_ms, from_memory), f"{number(flavor.token.floor_ms)} ms")
        _annotate(axes, place + 1, sum(_measured(flavor).values()), _reached(flavor))
        places += [place, place + 1]
        names += [f"{flavor.flavor}\nlowest possible", "measured"]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * axes.dataLim.x1)
    axes.set_xlabel("milliseconds per token")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    threads = "1 thread" if roofline.threads == 1 else f"{roofline.threads} threads"
    axes.set_title(f"{roofline.model} at {roofline.sparsity_achieved:.0%} sparsity, {threads}")
    drawn, labels = axes.get_legend_handles_labels()
    handles = dict(zip(labels, drawn, strict=True))  # each once
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


def _floors(flavor: FlavorFigures) -> dict[str, float]:
    return {one.kind: one.floor_ms for one in (*flavor.kinds, flavor.attention, flavor.rest)}


def _measured(flavor: FlavorFigures) -> dict[str, float]:
    """The parts, and what is missing of the whole: all of it, where they are not known."""
    known = (flavor.kinds, [flavor.attention, flavor.rest]) if flavor.parts_ms is not None else ()
    parts = {one.kind: one.measured_ms or 0.0 for group in known for one in group}
    if known:
        parts["between operators"] = flavor.between_ms or 0.0
    missing = (flavor.token.measured_ms or 0.0) - sum(parts.values())
    return parts | ({"not told apart": missing} if missing > _VISIBLE * sum(parts.values()) else {})


def _reached(flavor: FlavorFigures) -> str:
    share = f" ({percent(round(flavor.token.share, 2))} of the bandwidth)" if flavor.token.share else ""
    return f"{number(flavor.token.measured_ms)} ms{share}"


def _draw(axes: Axes, place: float, parts: dict[str, float]) -> None:
    """One bar, stacked."""
    left = 0.0
    for kind, width in parts.items():
        colour = _COLOURS[kind]
        axes.barh(place, width, _HEIGHT, left=left, color=colour, edgecolor="white", linewidth=0.6, label=kind)
        left += width


def _annotate(axes: Axes, place: float, end: float, text: str) -> None:
    axes.annotate(text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
