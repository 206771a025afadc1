"""Sweeps and benchmarks through the command: rows that can be recomputed from their samples, and nothing lost."""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from owl_deploy.benchmarking import checks, measure
from owl_deploy.benchmarking.rows import Row, read_rows
from owl_deploy.benchmarking.workload import Configuration
from owl_deploy.bundle.expected import EXPECTED, read_expected, write_expected
from owl_deploy.bundle.manifest import read_bundle
from owl_deploy.bundle.names import Flavor
from owl_deploy.engines.registry import ENGINES, engine_spec, named_engines
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.pruning.levels import parse_sparsities
from owl_deploy.sparse import library
from owl_deploy.sparse.formats import WEIGHTS

from .conftest import WORDS, Ran, RunCli, describe_again

REQUIRED = [
    "engine",
    "flavor",
    "weights",
    "threads",
    "sparsity_asked",
    "sparsity_achieved",
    "perplexity",
    "ttft_ms_p50",
    "decode_ms_p50",
    "decode_ms_p90",
    "decode_ms_p99",
    "decode_tokens_per_s",
    "speedup_same_engine",
    "speedup_fastest_dense",
    "peak_rss_bytes",
    "file_bytes",
    "load_average",
    "samples_ms",
]
WORKLOAD = ("--prompt", 24, "--new-tokens", 8, "--threads", 1, "--max-load", 99)


def sweep(run_cli: RunCli, out: Path, model: Path, reference: Path, *more: object) -> Ran:
    return run_cli(
        *("bench", "--sweep", model, "--sparsities", "0,0.5", "-o", out, *WORKLOAD, "--json"),
        *("--calibration", reference / "tiny_calib.npy", "--text", reference / "tiny_eval.npy", "--seqlen", 64),
        *more,
    )


def rows_of(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "out"


@pytest.fixture
def swept(out: Path, run_cli: RunCli, tiny_llama: Path, reference: Path) -> list[dict[str, Any]]:
    """The rows of a sweep over 0 and 50% in two rounds; made once, then found again."""
    ran = sweep(run_cli, out, tiny_llama, reference, "--repetitions", 2)
    assert ran.code == 0
    return rows_of(ran)


def test_a_sweep_gives_a_row_per_level_with_every_promised_field(swept: list[dict[str, Any]]) -> None:
    assert [(row["engine"], row["sparsity_asked"]) for row in swept] == [("onnxruntime", 0.0), ("onnxruntime", 0.5)]
    for row in swept:
        assert row["status"] == "ok"
        assert all(row[name] is not None for name in REQUIRED)


def test_rows_on_stdout_are_those_in_the_file(swept: list[dict[str, Any]], out: Path) -> None:
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == swept
    assert all(isinstance(row, Row) for row in read_rows(out / "results.jsonl"))
    assert {"report.md", "results.csv", "speedup.png"} <= {file.name for file in out.iterdir()}


def test_figures_can_be_recomputed_from_the_samples(swept: list[dict[str, Any]]) -> None:
    dense, sparse = (row["samples_ms"] for row in swept)
    for row in swept:
        decode = [value for samples in row["samples_ms"]["decode"] for value in samples]
        assert len(decode) == 2 * 7
        assert row["decode_ms_p50"] == pytest.approx(statistics.median(decode))
        assert row["ttft_ms_p50"] == pytest.approx(statistics.median(row["samples_ms"]["ttft"]))
        assert row["decode_tokens_per_s"] == pytest.approx(1e3 * len(decode) / sum(decode))
    ratios = [
        statistics.median(before) / statistics.median(after)
        for before, after in zip(dense["decode"], sparse["decode"], strict=True)
    ]
    assert swept[1]["speedup_same_engine"] == pytest.approx(statistics.median(ratios))
    assert swept[0]["speedup_same_engine"] == 1.0


def test_perplexity_in_the_engine_is_that_of_torch(
    swept: list[dict[str, Any]], out: Path, reference: Path, run_cli: RunCli
) -> None:
    for row, level in zip(swept, ("0", "0.5"), strict=True):
        ran = run_cli(
            *("evaluate", out / level / "checkpoint", "--text", reference / "tiny_eval.npy", "--seqlen", 64, "--json")
        )
        assert row["perplexity"] == pytest.approx(json.loads(ran.stdout)["perplexity"], rel=1e-3)


def test_what_was_measured_is_not_measured_again_and_more_rounds_are_added(
    swept: list[dict[str, Any]], out: Path, tiny_llama: Path, reference: Path, run_cli: RunCli
) -> None:
    log = out / "measurements.jsonl"
    before = log.read_text()
    assert (
        rows_of(sweep(run_cli, out, tiny_llama, reference, "--repetitions", 2))[0]["samples_ms"]
        == (swept[0]["samples_ms"])
    )
    assert log.read_text() == before
    log.write_text(before + '{"kind": "round", "key": "cut sho')  # a kill while a line was written
    rows = rows_of(sweep(run_cli, out, tiny_llama, reference, "--repetitions", 3))
    assert all(json.loads(line) for line in log.read_text().splitlines())
    assert rows[0]["samples_ms"]["decode"][:2] == swept[0]["samples_ms"]["decode"]
    assert [row["repetitions"] for row in rows] == [3, 3]


def test_a_model_without_text_is_measured_on_random_tokens_without_perplexity(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli
) -> None:
    assert swept
    ran = run_cli("bench", out / "0" / "bundle", "-o", tmp_path / "out", *WORKLOAD, "--repetitions", 1, "--json")
    assert ran.code == 0
    (row,) = rows_of(ran)
    assert row["perplexity"] is None
    assert row["decode_ms_p50"] > 0


def test_the_command_in_the_report_can_be_pasted_into_a_shell(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert swept
    arguments = [out / "0" / "bundle", "-o", tmp_path / "two words", *WORKLOAD, "--repetitions", 1]
    condition = 'speedup["onnxruntime"]@0 > 99'
    command = ["owl-deploy", "bench", *map(str, arguments), "--fail-if", condition]
    monkeypatch.setattr("sys.argv", command)
    run_cli(*command[1:])
    report = (tmp_path / "two words" / "report.md").read_text(encoding="utf-8")
    assert any(shlex.split(line) == command for line in report.splitlines() if line.startswith("owl-deploy bench"))


def test_an_engine_that_fails_is_a_row_that_says_so(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker's module does not exist: the process answers, and the other engine goes on."""
    assert swept
    broken = engine_spec("onnxruntime")
    broken = type(broken)(**{**vars(broken), "name": "broken", "module": "owl_deploy.engines.none"})
    monkeypatch.setitem(ENGINES, "broken", broken)
    run = ("bench", out / "0" / "bundle", "-o", tmp_path / "out", *WORKLOAD, "--repetitions", 1, "--json")
    ran = run_cli(*run, "--engines", "broken,onnxruntime")
    assert ran.code == 0
    failed, working = rows_of(ran)
    assert failed["status"] == "failed"
    assert "owl_deploy.engines.none" in failed["error"]
    assert working["status"] == "ok"
    again = rows_of(run_cli(*run, "--engines", "broken,onnxruntime"))
    assert again[1]["samples_ms"] == working["samples_ms"]  # what works is not measured again
    assert run_cli(*run, "--engines", "broken").code == 1


def test_an_engine_that_computes_something_else_is_not_timed(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime under another name, asked for the logits of a sparser model than it is compared with."""
    assert swept
    other = engine_spec("onnxruntime")
    monkeypatch.setitem(ENGINES, "other", type(other)(**{**vars(other), "name": "other", "checked_at_export": False}))
    compare = checks.compare
    monkeypatch.setattr(checks, "compare", lambda expected, *rest, **options: compare(expected + 1, *rest, **options))
    ran = run_cli(
        *("bench", out / "0" / "bundle", "-o", tmp_path / "out", *WORKLOAD, "--repetitions", 1, "--json"),
        *("--engines", "other"),
    )
    assert ran.code == 1
    (row,) = rows_of(ran)
    assert "logits differ" in row["error"]
    assert row["samples_ms"]["decode"] == []


def test_a_busy_machine_is_refused(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert swept
    monkeypatch.setattr(measure, "busy_cores", lambda _: 1.7)
    ran = run_cli(
        *("bench", out / "0" / "bundle", "-o", tmp_path / "out", "--prompt", 8, "--new-tokens", 4, "--threads", 1)
    )
    assert ran.code == 2
    assert "1.7 cores busy" in ran.stderr
    assert "--max-load" in ran.stderr


def test_prompts_and_batches_are_workloads_of_their_own_and_join_what_is_there(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli
) -> None:
    assert swept
    run = ("bench", out / "0" / "bundle", "-o", tmp_path / "out", "--threads", 1, "--max-load", 99, "--new-tokens", 6)
    more = ("--repetitions", 2, "--json")
    first = rows_of(run_cli(*run, *more, "--prompt", "1,12", "--batch", "1,3"))
    assert [(row["prompt_tokens"], row["batch"]) for row in first] == [(1, 1), (1, 3), (12, 1), (12, 3)]
    for row in first:
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] * _steps_per_s(row))
        assert row["prefill_tokens_per_s"] == pytest.approx(
            1e3 * row["batch"] * row["prompt_tokens"] / row["ttft_ms_p50"]
        )
        assert row["repeatable"]
        assert row["continuation"] == {"reference": "onnxruntime", "matching": 6, "tokens": 6}
    assert rows_of(run_cli(*run, *more, "--prompt", "24", "--batch", "1"))
    kept = read_rows(tmp_path / "out" / "results.jsonl")
    assert [(row.prompt_tokens, row.batch) for row in kept] == [(1, 1), (1, 3), (12, 1), (12, 3), (24, 1)]
    assert [row.model_dump(mode="json") for row in kept[:4]] == first


def _steps_per_s(row: dict[str, Any]) -> float:
    steps = [value for samples in row["samples_ms"]["decode"] for value in samples]
    return 1e3 * len(steps) / sum(steps)


def test_intervals_come_from_the_rounds(swept: list[dict[str, Any]]) -> None:
    for row in swept:
        spread = row["speedup_same_engine_spread"]
        assert spread["low"] <= spread["confidence_low"] <= spread["median"] <= spread["confidence_high"]
        assert spread["confidence_high"] <= spread["high"]


def test_a_condition_fails_the_run_and_leaves_its_results(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli
) -> None:
    assert swept
    run = ("bench", out / "0" / "bundle", "-o", tmp_path / "out", *WORKLOAD, "--repetitions", 1, "--json")
    met = run_cli(*run, "--fail-if", 'decode_ms["onnxruntime"]@0 > 0')
    assert met.code == 1
    assert 'decode_ms["onnxruntime"]@0 > 0' in met.stderr
    assert rows_of(met)[0]["status"] == "ok"
    assert run_cli(*run, "--fail-if", 'decode_ms["onnxruntime"]@0 < 0').code == 0
    assert run_cli(*run, "--fail-if", 'decode_ms["onnxruntime"]@0.4 < 0').code == 2
    untold = run_cli(*run, "--fail-if", 'perplexity["onnxruntime"]@0 > 100')
    assert untold.code == 1
    assert 'it cannot be told: perplexity["onnxruntime"]@0 was not measured' in untold.stderr


def test_from_text_to_text_is_longer_than_its_parts(tiny_with_tokenizer: Path, tmp_path: Path, run_cli: RunCli) -> None:
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"word{index}" for index in range(60)))
    export = ("export", tiny_with_tokenizer, "-o", tmp_path / "bundle", "--flavor", "standard", "--quiet")
    assert run_cli(*export).code == 0
    ran = run_cli(
        *("bench", tmp_path / "bundle", "-o", tmp_path / "out", *WORKLOAD, "--repetitions", 2, "--text", words),
        *("--end-to-end", "--json"),
    )
    assert ran.code == 0
    (row,) = rows_of(ran)
    assert row["end_to_end_ms_p50"] > 0
    assert row["end_to_end_tokens_per_s"] == pytest.approx(1e3 * 8 / row["end_to_end_ms_p50"])


def test_text_is_read_by_the_first_bundles_tokenizer_whatever_engine_comes_first(
    tiny_with_tokenizer: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    bundles: dict[str, tuple[Flavor, ...]] = {"a": ("standard",), "b": ("standard", "torch")}
    for name, flavors in bundles.items():
        export_checkpoint(tiny_with_tokenizer, tmp_path / name, flavors)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 2))
    ran = run_cli(
        *("bench", tmp_path / "a", tmp_path / "b", "--engines", "torch,onnxruntime", "-o", tmp_path / "out", "--json"),
        *(*WORKLOAD, "--repetitions", 1, "--text", text, "--seqlen", 48, "--windows", 2),
    )
    assert ran.code == 0, ran.stderr
    assert [row["perplexity"] is not None for row in rows_of(ran)] == [True] * 3


def test_text_to_text_needs_a_tokenizer(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli
) -> None:
    assert swept
    ran = run_cli("bench", out / "0" / "bundle", "-o", tmp_path / "out", *WORKLOAD, "--end-to-end")
    assert ran.code == 2
    assert "no tokenizer" in ran.stderr


# -------------------- bad input


def test_a_corrupted_graph_is_refused(out: Path, swept: list[dict[str, Any]], run_cli: RunCli, tmp_path: Path) -> None:
    assert swept
    bundle = tmp_path / "bundle"
    shutil.copytree(out / "0.5" / "bundle", bundle)
    weights = bundle / "genai" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:1000])
    ran = run_cli("bench", bundle, "-o", tmp_path / "results")
    assert ran.code == 2
    assert "model.onnx.data" in ran.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", 120, "--new-tokens", 20), "context of 128"),
        (("--threads", 4096), "may use"),
        (("--prompt", 8, "--new-tokens", 8, "--text", "missing.npy"), "no such file"),
        (("--engines", "onnxruntime,nonesuch"), "unknown"),
        (("--prompt", "8,-1"), "--prompt 8,-1: give positive whole numbers"),
        (("--batch", "0"), "--batch 0: give positive whole numbers"),
    ],
)
def test_a_workload_that_cannot_be_run_is_refused(
    options: tuple[object, ...],
    message: str,
    out: Path,
    swept: list[dict[str, Any]],
    run_cli: RunCli,
    tmp_path: Path,
) -> None:
    assert swept
    ran = run_cli("bench", out / "0" / "bundle", "-o", tmp_path / "results", *options)
    assert ran.code == 2
    assert message in ran.stderr
    assert not (tmp_path / "results").exists()


def test_a_directory_that_is_not_a_bundle_is_refused(tmp_path: Path, run_cli: RunCli) -> None:
    ran = run_cli("bench", tmp_path, "-o", tmp_path / "results")
    assert ran.code == 2
    assert "not an export bundle" in ran.stderr


def test_bundles_and_a_sweep_together_are_refused(tmp_path: Path, run_cli: RunCli) -> None:
    assert run_cli("bench", tmp_path, "--sweep", "demo").code == 2
    assert run_cli("bench").code == 2


def test_sparsities_are_a_range_with_both_ends_or_a_list() -> None:
    assert parse_sparsities("0:0.9:0.1") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert parse_sparsities("0.7,0,0.5") == [0, 0.5, 0.7]


@pytest.mark.parametrize("text", ["", "0:1:0.1", "0:0.9", "0:0.9:0", "0:0.9:-0.1", "-0.1", "nan", "half", "0:0.9:1e-9"])
def test_other_sparsities_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--sparsities"):
        parse_sparsities(text)


# -------------------- DeepSparse


@pytest.mark.deepsparse
def test_deepsparse_agrees_with_onnx_runtime_and_torch(
    tiny_llama: Path, reference: Path, tmp_path: Path, run_cli: RunCli, deepsparse_python: Path
) -> None:
    assert deepsparse_python.is_file()
    rows = rows_of(
        sweep(
            *(run_cli, tmp_path / "out", tiny_llama, reference),
            *("--engines", "deepsparse,onnxruntime", "--repetitions", 2),
        )
    )
    assert [row["status"] for row in rows] == ["ok"] * 4
    for deepsparse, onnxruntime in zip(rows[:2], rows[2:], strict=True):
        assert deepsparse["perplexity"] == pytest.approx(onnxruntime["perplexity"], rel=1e-3)
        assert deepsparse["parity"]["max_abs_difference"] < 1e-2
        assert min(deepsparse["engine_facts"]["fraction_of_supported_ops"].values()) > 0.5


@pytest.mark.smollm2
@pytest.mark.deepsparse
def test_the_main_job_on_the_real_model_with_both_engines(
    smollm2_dense: Path, deepsparse_python: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    assert deepsparse_python.is_file()
    ran = run_cli(
        *("bench", "--sweep", smollm2_dense, "--sparsities", "0,0.7", "--engines", "onnxruntime,deepsparse"),
        *("--calibration", "demo", "--samples", 8, "--calibration-seqlen", 256, "--text", "demo", "--windows", 2),
        *("--prompt", 256, "--new-tokens", 16, "--repetitions", 2, "--max-load", 99, "-o", tmp_path / "out", "--json"),
    )
    assert ran.code == 0
    rows = rows_of(ran)
    assert [row["status"] for row in rows] == ["ok"] * 4
    for index, level in enumerate(("0", "0.7")):
        ran = run_cli(
            *("evaluate", tmp_path / "out" / level / "checkpoint", "--text", "demo", "--seqlen", 256, "--windows", 2),
            "--json",
        )
        in_torch = json.loads(ran.stdout)["perplexity"]
        for row in (rows[index], rows[2 + index]):
            assert row["perplexity"] == pytest.approx(in_torch, rel=1e-3)
            assert row["sparsity_achieved"] == pytest.approx(float(level), abs=2e-3)


def test_ours_too_are_checked_on_the_machine_that_measures(
    out: Path, swept: list[dict[str, Any]], tmp_path: Path, run_cli: RunCli
) -> None:
    """A graph that computes something else here than at export, and a bundle that holds nothing to compare with."""
    assert swept
    assert swept[0]["parity"]["reference"] == "torch"
    assert swept[0]["parity"]["positions_with_past"] == 3
    bundle = shutil.copytree(out / "0" / "bundle", tmp_path / "bundle")
    expected = bundle / "genai" / EXPECTED
    _expect_other_logits(bundle / "genai")
    describe_again(bundle, expected)
    run = ("bench", bundle, *WORKLOAD, "--repetitions", 1, "--json")
    ran = run_cli(*run, "-o", tmp_path / "other")
    assert ran.code == 1
    assert "logits differ" in rows_of(ran)[0]["error"]
    expected.unlink()
    describe_again(bundle, expected)
    ran = run_cli(*run, "-o", tmp_path / "old")
    assert ran.code == 1
    assert "export the model again" in rows_of(ran)[0]["error"]


def test_an_engine_that_others_are_compared_with_is_checked_first(
    tiny_llama: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """torch is compared with ONNX Runtime, which computes something else here than at export."""
    bundle = tmp_path / "bundle"
    export_checkpoint(tiny_llama, bundle, ("genai", "torch"))
    _expect_other_logits(bundle / "genai")
    describe_again(bundle, bundle / "genai" / EXPECTED)
    ran = run_cli(
        *("bench", bundle, "--engines", "torch", "-o", tmp_path / "out", *WORKLOAD, "--repetitions", 1, "--json")
    )
    assert ran.code == 1
    (row,) = rows_of(ran)
    assert f"onnxruntime {bundle}: logits differ" in row["error"]
    assert row["samples_ms"]["decode"] == []


def test_logits_of_too_few_positions_are_no_match(out: Path, swept: list[dict[str, Any]]) -> None:
    assert swept
    bundle = out / "0" / "bundle"
    item = Configuration(engine_spec("onnxruntime"), bundle, read_bundle(bundle), "genai")
    check = checks.ParityCheck([item], MagicMock(), running=MagicMock(), has_failed=MagicMock(), timeout_s=1)
    process = MagicMock()
    process.logits.return_value = np.zeros((1, 128), np.float32), np.zeros((16, 128), np.float32)
    with pytest.raises(CheckFailed, match=r"in shape: \(1, 128\), \(16, 128\) for 64 tokens"):
        check.of(item, process)


def _expect_other_logits(flavor: Path) -> None:
    kept = read_expected(flavor)
    assert kept is not None
    logits = np.random.default_rng(0).normal(size=(len(kept.ids), kept.logits.shape[1])).astype(np.float32)
    write_expected(flavor, kept.ids, logits, decoded=16)


def test_other_kernels_are_other_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sparse = engine_spec("sparse-int8")
    first = sparse.what_runs()
    assert sparse.what_runs() == first
    monkeypatch.setenv("OWL_DEPLOY_KERNELS", "scalar")
    chosen = sparse.what_runs()
    assert chosen != first
    rebuilt = tmp_path / "libowl_sparse.so"
    rebuilt.write_bytes(b"another build")
    monkeypatch.setattr(library, "_PATH", rebuilt)
    assert sparse.what_runs() not in (first, chosen)
    assert engine_spec("onnxruntime").what_runs() == engine_spec("onnxruntime").what_runs()


def test_settings_of_an_engines_libraries_make_other_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = engine_spec("torch")
    first = torch.what_runs()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # which the engine's process is given anyway
    assert torch.what_runs() == first
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert torch.what_runs() != first


def test_a_bundle_with_one_format_is_measured_in_it_and_again_with_other_kernels(
    tiny_llama: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        slowest = library.instruction_sets()[-1]
    except UserError as error:
        pytest.skip(str(error))
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    export_checkpoint(tiny_llama, bundle, ("sparse-int8",))
    run = ("bench", bundle, "--engines", "sparse", "-o", out, *WORKLOAD, "--repetitions", 1, "--json")

    def measured() -> int:
        ran = run_cli(*run)
        assert ran.code == 0, ran.stderr
        (row,) = rows_of(ran)
        assert row["engine"] == "sparse-int8"
        assert row["parity"]["reference"] == "torch"
        return len((out / "measurements.jsonl").read_text().splitlines())

    assert [measured(), measured()] == [2, 2]
    monkeypatch.setenv("OWL_DEPLOY_KERNELS", slowest)
    assert [measured(), measured()] == [4, 4]
    named = run_cli(*run, "--engines", "sparse-packed16")
    assert named.code == 2
    assert "sparse-packed16, which no bundle holds" in named.stderr


def test_a_group_of_engines_is_those_whose_graphs_are_there() -> None:
    assert [spec.name for spec in named_engines("sparse", {"genai", "sparse-int8"})] == ["sparse-int8"]
    assert len(named_engines("sparse", {"genai"})) == len(WEIGHTS)  # so that the message can name what is missing
    assert [spec.name for spec in named_engines("sparse-packed16", {"sparse-int8"})] == ["sparse-packed16"]
