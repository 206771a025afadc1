"""A roofline in words: a table per flavor, on a terminal and in Markdown, and what is to be said about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from owl_deploy.formatting import MISSING, escaped, number, percent
from owl_deploy.grid import Grid, Heading
from owl_deploy.roofline.records import Figures, FlavorFigures, KindFigures, Roofline

Cells = tuple[str, ...]

_STEADY = 0.1  # of a token, that its parts may differ by

_FIGURES = ("MB/token", "floor ms", "measured ms", "GB/s", "share of bandwidth")
_KIND_COLUMNS = ("kind", "matrices", "format", *_FIGURES)
_MATRIX_COLUMNS = ("matrix", "kind", "rows x columns", "format", *_FIGURES)
_ENGINE_COLUMNS = ("engine", "KV cache", "bits a weight in linears", *_FIGURES)
_TEXT_COLUMNS = {"kind", "matrix", "format", "rows x columns", "set read", "engine", "KV cache"}


def terminal_tables(roofline: Roofline, *, matrices: bool) -> RenderableType:
    """The bandwidth, a table for each flavor, and notes; with `matrices` also a line for every matrix."""
    parts: list[RenderableType] = [_grid(*_bandwidth_table(roofline)).on_terminal("read bandwidth, GB/s")]
    parts.append(_grid(_ENGINE_COLUMNS, [_engine_rows(roofline)]).on_terminal("engines"))
    for flavor in roofline.flavors:
        parts.append(_grid(_KIND_COLUMNS, _sections(flavor)).on_terminal(_title(flavor, roofline)))
        if matrices:
            parts.append(_grid(_MATRIX_COLUMNS, [_each(flavor)]).on_terminal(f"{flavor.flavor}: every matrix"))
    parts += [Text(note) for note in notes(roofline)]
    return Group(*parts)


def markdown(roofline: Roofline, *, matrices: bool, plot: str) -> str:
    """`roofline.md`: the same, with the plot at this path."""
    parts = [
        f"# Roofline of {escaped(roofline.model)}",
        f"{roofline.sparsity_achieved:.1%} sparse; {roofline.cpu}, {roofline.threads} of {roofline.cores} cores, "
        f"{roofline.instruction_set}; {roofline.rounds} rounds of {roofline.new_tokens} tokens after a prompt of "
        f"{roofline.past}.",
        f"![Lowest possible and measured time of a token]({plot})",
        "## Read bandwidth, GB/s",
        _grid(*_bandwidth_table(roofline)).in_markdown(),
        "## Engines",
        _grid(_ENGINE_COLUMNS, [_engine_rows(roofline)]).in_markdown(),
    ]
    for flavor in roofline.flavors:
        parts += [f"## {_title(flavor, roofline)}", _grid(_KIND_COLUMNS, _sections(flavor)).in_markdown()]
        if matrices:
            parts += ["### Every matrix", _grid(_MATRIX_COLUMNS, [_each(flavor)]).in_markdown()]
    return "\n\n".join([*parts, *(f"- {note}" for note in notes(roofline))]) + "\n"


def notes(roofline: Roofline) -> Iterator[str]:
    """What the figures mean, and where they must not be trusted."""
    yield (
        "Floor: the bytes over the highest bandwidth that at most as many threads reached on a set at least as large "
        f"as what a token reads, or of {roofline.memory_set_bytes / 1e6:.0f} MB where that is less. MB and GB are 1e6 "
        "and 1e9 bytes. Times are medians: of the whole token in the engine's own process, of each operator in ONNX "
        "Runtime's profile of it, less what profiling costs."
    )
    if len(roofline.engines) > len(roofline.flavors):
        yield (
            "Of engines without a table of their own the bytes are those of the file's matrices and of the cache: what "
            "they make of the file when they load it is not known. torch is counted in fp32, as it runs."
        )
    if roofline.other_load_cores >= 0.5:
        yield f"Other processes kept {roofline.other_load_cores:.1f} cores busy: measure again on a quiet machine."
    for flavor in roofline.flavors:
        yield from _notes_on(flavor, roofline)


def _notes_on(flavor: FlavorFigures, roofline: Roofline) -> Iterator[str]:
    if flavor.fits_cache and roofline.cache_bytes is not None:
        holds = (
            f"{flavor.flavor}: a token reads {flavor.token.bytes / 1e6:.1f} MB, which the last-level cache of "
            f"{roofline.cache_bytes / 1e6:.1f} MB can hold"
        )
        if flavor.token.floor_ms < flavor.memory_floor_ms:
            yield (
                f"{holds}: the {number(flavor.memory_floor_ms)} ms of reading them from memory are not a floor. The "
                "floor used is that of a set of this very size, read again and again."
            )
        else:
            yield (
                f"{holds}. Yet a set of this very size, read again and again, was read no faster than memory: others "
                "may share the cache. The floor is memory's, and could be lower elsewhere."
            )
    if flavor.matrices.measured_ms is None:
        yield f"{flavor.flavor}: ONNX Runtime merged a product with another operator; what it takes is not known."
    if flavor.parts_ms is not None and not _is_close(flavor.parts_ms, flavor.token.measured_ms):
        yield (
            f"{flavor.flavor}: its parts, timed one by one, add up to {number(flavor.parts_ms)} ms instead of "
            f"{number(flavor.token.measured_ms)} ms: the machine is not steady; measure again when it is quiet."
        )
    if any(kind.share is not None and kind.share > 1 for kind in flavor.kinds):
        yield (
            f"{flavor.flavor}: a share above 100% was read faster than the bandwidth that was measured: from a cache, "
            "or while the machine had more to give."
        )


def _is_close(parts_ms: float, whole_ms: float | None) -> bool:
    return whole_ms is not None and abs(parts_ms - whole_ms) <= _STEADY * whole_ms


def _title(flavor: FlavorFigures, roofline: Roofline) -> str:
    threads = "1 thread" if roofline.threads == 1 else f"{roofline.threads} threads"
    return (
        f"{flavor.flavor}, {threads}: {number(flavor.token.measured_ms)} ms/token, lowest possible "
        f"{number(flavor.token.floor_ms)} ms at {number(flavor.bandwidth_gb_s)} GB/s"
    )


def _bandwidth_table(roofline: Roofline) -> tuple[Cells, list[list[Cells]]]:
    counts = sorted({record.threads for record in roofline.bandwidth})
    gb_s = {(record.set_bytes, record.threads): record.gb_s for record in roofline.bandwidth}
    rows = [
        (_set_name(set_bytes, roofline), *(number(gb_s.get((set_bytes, count))) for count in counts))
        for set_bytes in sorted({record.set_bytes for record in roofline.bandwidth}, reverse=True)
    ]
    return ("set read", *("1 thread" if count == 1 else f"{count} threads" for count in counts)), [rows]


def _set_name(set_bytes: int, roofline: Roofline) -> str:
    users = [flavor.flavor for flavor in roofline.flavors if flavor.token.bytes == set_bytes]
    memory = ["memory"] if set_bytes == roofline.memory_set_bytes else []
    return f"{set_bytes / 1e6:.0f} MB ({', '.join(memory + users)})"


def _engine_rows(roofline: Roofline) -> list[Cells]:
    """The fastest first."""
    return [
        (
            one.engine,
            one.kv_cache,
            MISSING if one.linear_bits is None else f"{one.linear_bits:.2f}",
            *_figure_cells(one),
        )
        for one in sorted(roofline.engines, key=lambda one: one.measured_ms or 0.0)
    ]


def _sections(flavor: FlavorFigures) -> list[list[Cells]]:
    """The rows of a flavor's table, between rules."""
    outside = [
        _kind_cells(flavor.attention),
        _kind_cells(flavor.rest),
        _time_cells("between operators", flavor.between_ms),
        _time_cells("all outside the matrices", flavor.outside_ms),
    ]
    return [
        [_kind_cells(kind) for kind in flavor.kinds],
        [_kind_cells(flavor.matrices)],
        outside,
        [_kind_cells(flavor.token)],
    ]


def _each(flavor: FlavorFigures) -> list[Cells]:
    return [
        (one.name, one.kind, f"{one.rows} x {one.columns}", one.format, *_figure_cells(one))
        for one in flavor.each_matrix
    ]


def _kind_cells(kind: KindFigures) -> Cells:
    return kind.kind, str(kind.matrices or ""), ", ".join(kind.formats), *_figure_cells(kind)


def _time_cells(kind: str, measured_ms: float | None) -> Cells:
    return kind, "", "", "", "", number(measured_ms), "", ""


def _figure_cells(one: Figures) -> Cells:
    share = MISSING if one.share is None else percent(round(one.share, 2))
    return number(one.bytes / 1e6), number(one.floor_ms), number(one.measured_ms), number(one.gb_s), share


def _grid(columns: Sequence[str], sections: Sequence[Sequence[Cells]]) -> Grid:
    return Grid([Heading(column, column in _TEXT_COLUMNS) for column in columns], sections)
