"""Reports: they say what the rows say, slower and failed rows included, and lose nothing on the way to disk."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console

from owl_deploy.benchmarking.rows import RESULTS, Continuation, Row, Samples, Spread, merged, read_rows, updated
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.errors import UserError
from owl_deploy.formatting import enumeration, number, perplexity_text, size
from owl_deploy.machine.description import Machine
from owl_deploy.paper.speedups import paper_speedup
from owl_deploy.report.conditions import conditions
from owl_deploy.report.findings import findings, verdict
from owl_deploy.report.pareto import Box, Point, front_of, place_labels, points_of
from owl_deploy.report.plots import plot_pareto, plot_speedup
from owl_deploy.report.series import by_series
from owl_deploy.report.tables import COLUMNS, CSV_FIELDS, markdown_table, terminal_table, write_csv
from owl_deploy.report.write import write_report

from .conftest import RunCli

MACHINE = Machine(
    cpu="Test CPU",
    cores=2,
    instruction_set="avx2",
    memory_bytes=16 * 2**30,
    memory_bandwidth_gb_s=21.5,
    system="Linux 6.1",
)
PARITY = ParityRecord(
    reference="onnxruntime",
    positions=64,
    positions_with_past=16,
    max_abs_difference=3e-5,
    max_abs_difference_with_past=4e-5,
    argmax_agreement=1.0,
)
SPREADS = ("speedup_same_engine_spread", "speedup_fastest_dense_spread", "speedup_any_precision_spread")
ANY_PRECISION = "speed-up over fastest dense of any precision"
CANNOT_RUN = "the worker died | signal 11\nAssertion `rank == 4` failed in <layer> " + "x" * 400


def make_row(engine: str = "deepsparse", sparsity: float = 0.5, speedup: float = 1.5, **changes: Any) -> Row:
    """A row that ran: its speed-up, with 2% of spread, is over a dense row of 20 ms per token."""
    fields: dict[str, Any] = {
        "model": "someone/Tiny-1B",
        "bundle": f"sparse-{sparsity}",
        "engine": engine,
        "flavor": "standard",
        "threads": 2,
        "prompt_tokens": 64,
        "new_tokens": 32,
        "repetitions": 5,
        "sparsity_asked": sparsity,
        "sparsity_achieved": sparsity,
        "perplexity": 12.0 * 10 ** (4 * sparsity**4),
        "perplexity_text": "wikitext2",
        "perplexity_windows": 8,
        "ttft_ms_p50": 321.0,
        "decode_ms_p50": 20 / speedup,
        "decode_ms_p90": 22 / speedup,
        "decode_ms_p99": 30 / speedup,
        "decode_tokens_per_s": 50 * speedup,
        "speedup_same_engine": speedup,
        "speedup_same_engine_spread": around(speedup),
        "speedup_fastest_dense": speedup,
        "speedup_fastest_dense_spread": around(speedup),
        "paper_speedup": paper_speedup(sparsity),
        "load_ms": 900.0,
        "peak_rss_bytes": 2**30,
        "file_bytes": 500 * 2**20,
        "linear_bits": 4.5,
        "all_bits": 5.678,
        "load_average": (0.1, 1.9),
        "other_load_cores": 0.05,
        "parity": PARITY,
        "engine_facts": {"version": "1.8.0", "fraction_of_supported_ops": {"1": 0.98}, "internal_kv_cache": True},
        "machine": MACHINE,
        "samples_ms": Samples(ttft=[320.0, 322.0], decode=[[20.0, 20.5], [19.5, 20.0]]),
    }
    return Row(**fields | changes)


ITSELF = Spread(median=1, low=1, high=1)


def make_dense(engine: str = "deepsparse", **changes: Any) -> Row:
    """A dense row: its own speed-up is 1, without a spread."""
    return make_row(engine, 0.0, 1.0, speedup_same_engine_spread=None, **changes)


def make_fastest(engine: str, **changes: Any) -> Row:
    """The dense row that others' speed-ups are over."""
    return make_dense(engine, speedup_fastest_dense_spread=ITSELF, **changes)


def make_failed(sparsity: float = 0.7, error: str = CANNOT_RUN, **changes: Any) -> Row:
    """A row whose engine could not run."""
    names = ("engine", "model", "flavor", "threads", "prompt_tokens", "new_tokens", "repetitions")
    kept = make_row(sparsity=sparsity).model_dump(include={*names, "bundle", "sparsity_asked", "sparsity_achieved"})
    return Row(**kept | {"status": "failed", "error": error, "file_bytes": 2**20, "machine": MACHINE} | changes)


def around(speedup: float) -> Spread:
    return Spread(median=speedup, low=0.98 * speedup, high=1.02 * speedup)


def make_sweep() -> list[Row]:
    """DeepSparse gains from sparsity and fails once; ONNX Runtime starts faster and only loses."""
    return [
        make_row("onnxruntime", 0.9, 0.8, speedup_fastest_dense=0.8),
        make_row("onnxruntime", 0.5, 0.95, speedup_fastest_dense=0.95),
        make_fastest("onnxruntime", decode_ms_p50=15.0),
        make_failed(),
        make_row("deepsparse", 0.9, 2.5, speedup_fastest_dense=1.9, speedup_fastest_dense_spread=around(1.9)),
        make_row("deepsparse", 0.5, 1.31, unsteady=True),
        make_row("deepsparse", 0.1, 1.01),
        make_dense("deepsparse"),
    ]


def cells(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, its header first, its rule left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in lines]
    return [table[0], *table[2:]]


def test_the_paper_is_quoted_at_its_own_sparsities_only() -> None:
    quoted = [paper_speedup(tenth / 10) for tenth in range(10)]
    assert quoted == [1.0, 1.0, 1.0, 1.01, 1.25, 1.67, 1.81, 2.0, 2.37, 2.78]
    assert paper_speedup(0.1 + 0.2) == 1.01
    assert [paper_speedup(other) for other in (None, 0.55, 0.70001, 0.95)] == [None] * 4


@pytest.mark.parametrize(
    ("perplexity", "text"),
    [
        *((None, "–"), (12.344, "12.34"), (99.996, "100.0"), (123.44, "123.4"), (999.96, "1.0k")),
        *((26_013.0, "26.0k"), (999_960.0, "1.0e6"), (1.23e6, "1.2e6"), (4e12, "4.0e12")),
        *((math.inf, "inf"), (math.nan, "nan")),
    ],
)
def test_any_perplexity_is_readable(perplexity: float | None, text: str) -> None:
    assert perplexity_text(perplexity) == text


def test_figures_keep_three_digits_and_say_their_unit() -> None:
    assert [number(value) for value in (None, 0.123, 9.996, 45.67, 99.96, 1234.5)] == [
        *("–", "0.12", "10.0", "45.7", "100", "1234")
    ]
    assert [size(count) for count in (None, 2**20, 3 * 2**29)] == ["–", "1.00 MiB", "1.50 GiB"]
    assert [enumeration(items) for items in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_rows_are_sorted_by_engine_and_sparsity() -> None:
    shown = [(row[0], row[1]) for row in cells(markdown_table(make_sweep()))[1:]]
    assert shown == [
        ("deepsparse", "dense (0.00%)"),
        ("deepsparse", "10% (10.00%)"),
        ("deepsparse †", "50% (50.00%)"),
        ("deepsparse", "70% (70.00%)"),
        ("deepsparse", "90% (90.00%)"),
        ("onnxruntime", "dense (0.00%)"),
        ("onnxruntime", "50% (50.00%)"),
        ("onnxruntime", "90% (90.00%)"),
    ]


def test_an_engine_is_named_by_what_tells_its_series_apart() -> None:
    rows = [make_row(flavor="genai"), make_row(), make_row(threads=10), make_row("onnxruntime", flavor="genai")]
    assert [series.name for series in by_series(rows)] == [
        *("deepsparse (genai, threads 2)", "deepsparse (standard, threads 2)", "deepsparse (standard, threads 10)"),
        "onnxruntime",
    ]


def test_bundles_of_equal_sparsity_are_told_apart_by_name() -> None:
    table = cells(markdown_table([make_row(bundle="uniform"), make_row(bundle="owl"), make_row(sparsity=0.6)]))
    assert [row[1] for row in table[1:]] == ["50% owl (50.00%)", "50% uniform (50.00%)", "60% (60.00%)"]


def test_a_checkpoint_pruned_elsewhere_counts_as_sparse() -> None:
    row = make_row(sparsity_asked=None, sparsity_achieved=0.4987, paper_speedup=None)
    assert cells(markdown_table([row]))[1][1] == "49.87% (49.87%)"
    assert by_series([row])[0].sparse == [row]


def test_a_speedup_is_shown_with_its_spread() -> None:
    spread = Spread(median=1.31, low=1.28, high=1.35)
    row = cells(markdown_table([make_row(speedup=1.31, speedup_same_engine_spread=spread)]))[1]
    assert row[6] == "1.31x (1.28–1.35)"
    assert row[4] == "15.3 (16.8, 22.9)"
    assert row[8:] == ["1.67x", "1.00 GiB", "4.50 (5.68)", "500 MiB"]


def test_every_line_of_the_markdown_table_has_every_column_that_says_something() -> None:
    table = cells(markdown_table(make_sweep()))
    titles = [column.title for column in COLUMNS]
    empty = {"batch", "prefill tokens/s", "end to end ms (tokens/s)", "joules per token", ANY_PRECISION}
    assert table[0] == [title for title in titles if title not in empty]
    assert {len(row) for row in table} == {len(table[0])}


def test_new_figures_have_columns_as_soon_as_one_row_has_them() -> None:
    figures = {"prefill_tokens_per_s": 1234.5, "end_to_end_ms_p50": 900.0, "end_to_end_tokens_per_s": 35.5}
    int4 = {"speedup_any_precision": 0.61, "decode_joules_per_token": 0.5, "batch": 4}
    table = cells(markdown_table([make_row(**figures | int4), make_failed(batch=4)]))
    assert table[0] == [column.title for column in COLUMNS]
    row = dict(zip(table[0], table[1], strict=True))
    assert (row["batch"], row["prefill tokens/s"], row["end to end ms (tokens/s)"]) == ("4", "1234", "900 (35.5)")
    assert (row["joules per token"], row[ANY_PRECISION]) == ("0.50", "0.61x")
    assert row["bits a weight in linears (in all)"] == "4.50 (5.68)"


def test_a_speedup_over_any_precision_has_no_column_where_it_says_the_same() -> None:
    assert ANY_PRECISION not in markdown_table([make_row(speedup_any_precision=1.5)])


def test_a_wide_confidence_interval_is_marked_and_kept() -> None:
    wide = Spread(median=1.5, low=1.1, high=1.9, confidence_low=1.2, confidence_high=1.6)
    narrow = wide.model_copy(update={"confidence_low": 1.45, "confidence_high": 1.55})
    marked = markdown_table([make_row(speedup_same_engine_spread=wide)])
    assert "1.50x (1.10–1.90) ‡" in marked
    assert "‡ wide: the 95% confidence interval of this speed-up is wider than 20% of it" in marked
    assert "‡" not in markdown_table([make_row(speedup_same_engine_spread=narrow)])


def test_a_failed_row_says_why_in_its_first_figure_and_shows_no_others() -> None:
    row = cells(markdown_table([make_row(sparsity=0.6), make_failed()]))[2]
    assert row[2].startswith("failed: the worker died ¦ signal 11 Assertion `rank == 4`")
    assert len(row[2]) < 80
    assert set(row[3:-2]) == {"–"}


def test_footnotes_explain_what_is_there_and_nothing_else() -> None:
    assert "† unsteady: some round's median was over 1.5 times" in markdown_table([make_row(unsteady=True)])
    steady = markdown_table([make_row(sparsity=0.55)])
    assert "†" not in steady
    assert "Paper's Table 8:" not in steady
    assert "Speed-ups: median of rounds" in steady


def test_the_terminal_shows_what_the_markdown_shows() -> None:
    rows = make_sweep()
    console = Console(width=400, file=io.StringIO())
    with console.capture() as captured:
        console.print(terminal_table(rows))
    shown = captured.get()
    for row in cells(markdown_table(rows)):
        words = [word for cell in row for word in cell.replace("¦", "|").replace("&lt;", "<").split(" (")]
        assert all(word in shown for word in words)


def test_the_csv_has_every_field_but_the_samples_and_the_full_error(tmp_path: Path) -> None:
    write_csv(make_sweep(), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(CSV_FIELDS) == len(set(CSV_FIELDS))
    assert set(records[0]) == leaves(Row) - leaves(Samples, "samples_ms.") - {f"{name}.median" for name in SPREADS}
    failed = next(record for record in records if record["status"] == "failed")
    assert failed["error"] == CANNOT_RUN
    assert failed["decode_ms_p50"] == failed["parity.positions"] == failed["load_average"] == ""
    sparse = records[-1]
    assert (sparse["engine"], float(sparse["sparsity_asked"]), float(sparse["decode_ms_p50"])) == (
        *("onnxruntime", 0.9),
        20 / 0.8,
    )
    assert json.loads(sparse["load_average"]) == [0.1, 1.9]
    assert json.loads(sparse["engine_facts"])["version"] == "1.8.0"


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all fields, those of nested records included."""
    records: dict[str, type[BaseModel]] = {"machine": Machine, "parity": ParityRecord, "samples_ms": Samples}
    records |= dict.fromkeys(SPREADS, Spread) | {"continuation": Continuation}
    names: set[str] = set()
    for name in model.model_fields:
        names |= leaves(records[name], f"{prefix}{name}.") if name in records else {f"{prefix}{name}"}
    return names


def test_a_difference_needs_the_whole_spread_on_one_side_of_one() -> None:
    assert verdict(1.05, Spread(median=1.05, low=1.01, high=1.1)) == "faster"
    assert verdict(1.05, Spread(median=1.05, low=0.99, high=1.1)) == "no different"
    assert verdict(0.9, Spread(median=0.9, low=0.8, high=0.99)) == "slower"
    assert verdict(0.9, None) == "slower"


def test_findings_say_where_sparse_is_faster_and_where_it_is_slower() -> None:
    deepsparse, onnxruntime, *_ = findings(make_sweep())
    assert deepsparse == (
        "**deepsparse**: sparse decode reaches 2.50x (2.45–2.55) at 90% sparsity (in the paper 2.78x) over its own "
        "dense model. Sparse is faster at 50% and 90%; no different within the spread of rounds at 10%. "
        "Against the fastest dense engine, onnxruntime, its best is 1.90x (1.86–1.94) at 90%: faster."
    )
    assert "sparsity gains nothing over its own dense model: 0.95x" in onnxruntime
    assert "**slower than dense** at 50% and 90%" in onnxruntime
    assert "fastest dense engine" not in onnxruntime


def test_findings_say_that_a_gain_over_its_own_dense_model_may_still_lose() -> None:
    dense = [make_dense("slow"), make_fastest("fast", decode_ms_p50=5.0)]
    sparse = make_row("slow", 0.5, 2.0, speedup_fastest_dense=0.5, speedup_fastest_dense_spread=around(0.5))
    assert "fast, its best is 0.50x (0.49–0.51) at 50%: **still slower**." in findings([*dense, sparse])[0]


def test_findings_tell_no_speedup_without_a_dense_row() -> None:
    row = make_row(speedup_same_engine=None, speedup_fastest_dense=None)
    assert findings([row])[0] == "**deepsparse**: it has no dense row of its own."


def test_engines_that_agree_on_perplexity_share_a_sentence() -> None:
    rows = [make(engine) for engine in ("deepsparse", "onnxruntime") for make in (make_dense, make_row)]
    assert "Perplexity in deepsparse and onnxruntime: 12.00 dense, 21.34 at 50% (1.78x)." in findings(rows)


def test_perplexity_that_was_not_measured_or_is_infinite_is_said_to_be() -> None:
    assert any("Perplexity was not measured" in finding for finding in findings([make_row(perplexity=None)]))
    assert "Perplexity in deepsparse: inf at 50%." in findings([make_row(perplexity=math.inf)])


def test_findings_name_failed_and_unsteady_rows() -> None:
    *_, failed, unsteady = findings([*make_sweep(), make_failed(0.8)])
    assert failed.startswith("**Failed**: deepsparse at 70% and 80%: the worker died | signal 11 Assertion")
    assert "in <layer>" in failed
    assert unsteady == "**Unsteady** (†), not to be relied on: deepsparse at 50%."


def test_the_report_is_complete_and_its_rows_can_be_read_back(tmp_path: Path) -> None:
    rows = make_sweep()
    report = write_report(rows, tmp_path / "new" / "folder", command="owl-deploy bench sparse-*")
    assert report == tmp_path / "new" / "folder" / "report.md"
    assert {path.name for path in report.parent.iterdir()} == {
        *("report.md", "report.html", "results.jsonl", "results.csv", "speedup.png", "pareto.png")
    }
    assert read_rows(report.parent / RESULTS) == rows
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# Sparse decode speed of Tiny-1B\n")
    assert markdown_table(rows) in text
    assert "](speedup.png)" in text
    assert "](pareto.png)" in text
    assert "the worker died \\| signal 11 Assertion `rank == 4` failed in &lt;layer>" in text
    assert "```sh\nowl-deploy bench sparse-*\n```" in text
    for condition in (
        *("64 prompt tokens and 32 new ones", "threads: 2", "Test CPU, cores: 2, avx2, 16.0 GiB"),
        *("21.5 GB/s", "0.10 before the first round, 1.90 after", "version: 1.8.0", "98% with 1 at once"),
        *("Parity of deepsparse with onnxruntime: logits differ by 4.0e-05", "wikitext2, windows: 8"),
    ):
        assert condition in text


def test_only_a_report_with_deepsparse_speaks_of_its_licence(tmp_path: Path) -> None:
    with_deepsparse = write_report([make_row()], tmp_path / "a", command="x").read_text(encoding="utf-8")
    without = write_report([make_row("onnxruntime")], tmp_path / "b", command="x").read_text(encoding="utf-8")
    assert "not production use" in " ".join(with_deepsparse.split())
    assert "Licence" not in without


@pytest.mark.parametrize("row", [make_failed(), make_row(perplexity=None, parity=None, load_average=None)])
def test_a_report_of_one_poor_row_is_still_a_report(row: Row, tmp_path: Path) -> None:
    report = write_report([row], tmp_path, command="x")
    assert "## How it was measured" in report.read_text(encoding="utf-8")


def test_without_perplexity_there_is_no_plot_of_it(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"perplexity": None}) for row in make_sweep()]
    report = write_report(rows, tmp_path, command="x")
    assert not (tmp_path / "pareto.png").exists()
    assert "pareto.png" not in report.read_text(encoding="utf-8")


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was measured"):
        write_report([], tmp_path, command="x")


@pytest.mark.parametrize("plot", [plot_speedup, plot_pareto])
@pytest.mark.parametrize(
    "rows", [make_sweep(), [make_failed()], [make_row(perplexity=math.inf, speedup_same_engine=None)]]
)
def test_equal_rows_give_equal_pngs(plot: Callable[[list[Row], Path], None], rows: list[Row], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot(rows, tmp_path / name)
    png = (tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png == (tmp_path / "b.png").read_bytes()
    assert not list(tmp_path.glob(".*"))


# -------------------- what is new in schema 2


def test_findings_compare_with_the_fastest_dense_row_of_any_precision() -> None:
    over_int4 = {"speedup_any_precision": 0.7, "speedup_any_precision_spread": around(0.7)}
    itself = {"speedup_any_precision": 1.0, "speedup_any_precision_spread": ITSELF}
    rows = [make_fastest("onnxruntime"), make_row("onnxruntime", 0.5, 1.2, **over_int4)]
    rows.append(make_dense("onnxruntime-int4", weights="int4", flavor="genai-int4", decode_ms_p50=4.0, **itself))
    first = findings(rows)[0]
    assert "any precision, onnxruntime-int4, its best is 0.70x (0.69–0.71) at 50%: **still slower**." in first
    assert "Against the fastest dense engine," not in first


def test_rows_of_several_runs_are_not_said_to_be_over_one_dense_row() -> None:
    rows = [make_fastest("onnxruntime"), make_fastest("sparse-int8"), make_row("deepsparse")]
    assert not any("Against" in finding for finding in findings(rows))
    assert "a speed-up is over a dense row of its own run" in markdown_table(rows)


def test_findings_say_what_does_not_repeat_what_grows_and_what_continues_otherwise() -> None:
    parted = Continuation(reference="onnxruntime", matching=12, tokens=32)
    rows = [
        make_row("a", repeatable=False),
        make_row("b", rss_growth_bytes=2**28),
        make_row("c", rss_growth_bytes=2**20),
        make_row("d", continuation=parted),
        make_row("e", continuation=parted.model_copy(update={"matching": 32})),
    ]
    *_, unrepeatable, grown, continued = findings(rows)
    assert unrepeatable == "**Not repeatable**: rounds from the same prompt generated different tokens: a at 50%."
    assert grown == "**Memory grew** from the first round to the last: b at 50% by 256 MiB (peak 1.00 GiB)."
    assert "from the same weights: d at 50% after 12 of 32 tokens of onnxruntime's. " in continued


def test_workloads_and_machines_have_series_of_their_own(tmp_path: Path) -> None:
    other = MACHINE.model_copy(update={"cpu": "Other CPU", "cores": 64})
    rows = [make_row(), make_row(batch=4), make_row(machine=other)]
    assert [series.name for series in by_series(rows)] == [
        *("deepsparse (Other CPU, batch 1)", "deepsparse (Test CPU, batch 1)", "deepsparse (Test CPU, batch 4)")
    ]
    text = write_report(rows, tmp_path, command="x").read_text(encoding="utf-8")
    assert text.count("\n| engine |") == 3
    assert "## Other CPU, cores 64, batch 1\n" in text
    assert "batch 1, threads: 2; Tiny-1B, 64 prompt tokens and 32 new ones, batch 4" in text


def test_conditions_describe_the_machine() -> None:
    detailed = MACHINE.model_copy(
        update={
            "memory_bandwidth_one_thread_gb_s": 12.5,
            "instruction_sets": ["amx", "avx512"],
            "numa_nodes": 2,
            "frequency_governor": "powersave",
            "container_cores": 1.5,
        }
    )
    lines = conditions([make_row(machine=detailed)])
    assert (
        "Machine: Test CPU, cores: 2, amx avx512, 16.0 GiB, Linux 6.1, NUMA nodes: 2, frequency governor: powersave, "
        "limited to 1.5 cores' time" in lines
    )
    assert "Memory reads: 21.5 GB/s with as many threads, 12.5 GB/s with one" in lines


def points(*figures: tuple[float, float]) -> list[Row]:
    """Rows of these decode times and perplexities."""
    return [
        make_row(f"engine-{index}", decode_ms_p50=time, perplexity=perplexity)
        for index, (time, perplexity) in enumerate(figures)
    ]


def test_the_front_holds_what_no_row_beats_in_both() -> None:
    found = front_of(points_of(points((10, 20), (12, 20), (8, 40), (8, 50), (30, 10), (31, 10.5), (10, 20))))
    assert [(point.series, point.decode_ms) for point in found] == [
        *(("engine-2", 8), ("engine-0", 10), ("engine-6", 10), ("engine-4", 30))
    ]
    assert front_of(points_of(points((10, math.inf)))) == []


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=12))
def test_every_point_off_the_front_is_beaten_by_one_on_it(figures: list[tuple[float, float]]) -> None:
    found = points_of(points(*figures))
    front = front_of(found)
    assert front

    def beats(one: Point, other: Point) -> bool:
        no_worse = one.decode_ms <= other.decode_ms and one.perplexity <= other.perplexity
        return no_worse and (one.decode_ms, one.perplexity) != (other.decode_ms, other.perplexity)

    for point in found:
        assert any(beats(one, point) for one in front) is not point.in_front


def test_labels_overlap_neither_points_nor_each_other_nor_leave_the_plot() -> None:
    anchors = [(20.0 * (index % 5) + 10, 30.0 * (index // 5) + 10) for index in range(20)]
    frame = Box(0, 0, 120, 140)
    placed = place_labels(anchors, [(12.0, 6.0)] * 20, frame, marker=4)
    boxes = [box for box in placed if box is not None]
    assert len(boxes) > 10
    assert all(box.lies_in(frame) for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.distance(*anchor) == 0 for box in boxes for anchor in anchors)


# -------------------- owl-deploy report


def results_file(directory: Path, *rows: Row) -> Path:
    directory.mkdir()
    path = directory / RESULTS
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in rows), encoding="utf-8")
    return path


def test_results_of_several_machines_make_one_report(tmp_path: Path, run_cli: RunCli) -> None:
    here, there = make_row(), make_row(machine=MACHINE.model_copy(update={"cpu": "Other CPU"}))
    a, b = results_file(tmp_path / "a", make_row(speedup=1.1), make_dense()), results_file(tmp_path / "b", here, there)
    ran = run_cli("report", a.parent, b, "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    assert "rows replaced by later ones of the same measurement: 1" in ran.stderr
    rows = [Row.model_validate_json(line) for line in ran.stdout.splitlines()]
    assert rows == [here, make_dense(), there] == read_rows(tmp_path / "out" / RESULTS)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"owl-deploy report {a.parent} {b} -o {tmp_path / 'out'}" in text
    assert "Other CPU" in text


@pytest.mark.parametrize("recorded", [True, False])
def test_bundles_of_one_name_in_two_results_do_not_take_each_others_place(
    recorded: bool, tmp_path: Path, run_cli: RunCli
) -> None:
    results = []
    for name, size_bytes in (("a", 100), ("b", 200)):
        hashes = {"checkpoint_sha256": f"{name} dense"}, {"checkpoint_sha256": f"{name} sparse"}
        dense, sparse = hashes if recorded else ({}, {})
        rows = [
            make_dense(bundle="dense", file_bytes=size_bytes, **dense),
            make_row(bundle="sparse", file_bytes=size_bytes, **sparse),
        ]
        results.append(results_file(tmp_path / name, *rows))
    ran = run_cli("report", *results, "-o", tmp_path / "out", "--json")
    assert (len(ran.stdout.splitlines()), ran.stderr) == (4, "")


def test_rows_of_one_checkpoint_are_told_apart_by_the_head_their_size_shows() -> None:
    rows = [make_row(checkpoint_sha256="c", file_bytes=size_bytes, bundle="x") for size_bytes in (1, 2, 2)]
    assert merged([rows]) == rows[:2]


def test_what_is_measured_again_in_one_directory_takes_its_own_place() -> None:
    before = [make_dense(bundle="dense"), make_row(bundle="sparse", checkpoint_sha256="pruned once")]
    after = [make_row(bundle="sparse", checkpoint_sha256="pruned again")]
    assert updated(before, after) == [before[0], *after]


def test_the_recorded_results_can_be_reported_again(tmp_path: Path, run_cli: RunCli) -> None:
    recorded = Path(__file__).parents[1] / "benchmarks" / "smollm2-135m-sparse-xeon-2-core"
    assert run_cli("report", recorded, "-o", tmp_path / "out", "--quiet") == (0, "", "")
    assert "sparse-int8" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "holds no rows"),
        (b"\xff\xfe", "cannot be read (not text)"),
        (b"once upon a time", "results.jsonl:1: not a result row"),
        (b"[1]", "results.jsonl:1: not a result row"),
        (b'{"model": 3}', "results.jsonl:1: not a result row (model: "),
        (b'{"schema_version": 99, "news": 1}', "results.jsonl:1: written by a newer owl-deploy (schema 99"),
    ],
)
def test_what_is_not_a_result_is_refused(content: bytes | None, words: str, tmp_path: Path, run_cli: RunCli) -> None:
    if content is not None:
        (tmp_path / RESULTS).write_bytes(content)
    ran = run_cli("report", tmp_path / RESULTS, "-o", tmp_path / "out")
    assert (ran.code, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_the_schema_describes_every_field(run_cli: RunCli) -> None:
    ran = run_cli("report", "--schema")
    assert ran.code == 0
    schema = json.loads(ran.stdout)
    assert set(schema["properties"]) == set(Row.model_fields)
    for name, record in [("Row", schema), *schema["$defs"].items()]:
        assert record["description"], name
        for field, described in record["properties"].items():
            assert described.get("description"), f"{name}.{field}"
    written = json.loads(make_row(perplexity=math.inf).model_dump_json())
    assert set(schema["required"]) <= set(written)
    assert "Infinity" in json.dumps(schema["properties"]["perplexity"])
    assert written["perplexity"] == "Infinity"
