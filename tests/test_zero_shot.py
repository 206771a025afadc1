"""Zero-shot tasks: lm-eval's figures against those by hand, and what cannot be evaluated."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import string
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from owl_deploy.models.load import load_model, load_tokenizer
from owl_deploy.models.source import resolve_model

from .conftest import TESTS, VOCABULARY, RunCli, TinyModel
from .test_study import labelled, rows

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the tasks extra)")

HELLASWAG = TESTS / "hellaswag.jsonl"
# What HellaSwag's preprocessing makes of the fixture, written out: of `[title]` a full stop, of other brackets nothing.
QUERIES = [
    "Making tea: A man fills a kettle at the tap. He",
    "Mending a bicycle: A girl turns her bicycle upside down. She",
    "Home and Garden: How to plant a tree. Dig a hole. It should be twice as wide as the roots.",
    "Rowing: Four people sit in a long boat. They",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """A small LLaMA that reads printable characters one by one."""
    characters = {"<unk>": 0} | {character: index for index, character in enumerate(string.printable[:95], start=1)}
    assert len(characters) == VOCABULARY
    backend = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    directory = tmp_path_factory.mktemp("characters") / "model"
    shutil.copytree(tiny_model("llama", initializer_range=0.3, max_position_embeddings=256), directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>").save_pretrained(directory)
    return directory


class Scores(NamedTuple):
    acc: list[float]
    acc_norm: list[float]


@torch.no_grad()
def by_hand(model: Path) -> Scores:
    """Of each example: whether the right ending is the likeliest, and whether it is per character."""
    source = resolve_model(str(model))
    loaded, tokenizer = load_model(source), load_tokenizer(source)
    assert tokenizer is not None
    acc, acc_norm = [], []
    for query, line in zip(QUERIES, HELLASWAG.read_text().splitlines(), strict=True):
        row = json.loads(line)
        endings = [ending.replace("[substeps]", "") for ending in row["endings"]]
        sums = []
        for ending in endings:
            ids = tokenizer(f"{query} {ending}")["input_ids"]
            logs = loaded(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logs[at - 1, ids[at]].item() for at in range(len(query), len(ids))))
        assert len(set(sums)) == len(sums)
        normed = [value / len(ending) for value, ending in zip(sums, endings, strict=True)]
        acc.append(float(sums.index(max(sums)) == int(row["label"])))
        acc_norm.append(float(normed.index(max(normed)) == int(row["label"])))
    return Scores(acc, acc_norm)


@pytest.fixture(scope="module")
def expected(model: Path) -> Scores:
    found = by_hand(model)
    assert found.acc != found.acc_norm, "a fixture that cannot tell the two apart"
    return found


def evaluated(run_cli: RunCli, model: Path, *options: object, data: Path = HELLASWAG) -> dict[str, Any]:
    asked = ("--tasks", "hellaswag", "--task-data", f"hellaswag={data}", "--quiet", "--json")
    ran = run_cli("evaluate", model, *asked, *options)
    assert ran.code == 0, ran.stderr
    assert ran.stderr == ""
    row: dict[str, Any] = json.loads(ran.stdout)
    return row


def test_accuracy_is_what_the_logits_say(run_cli: RunCli, model: Path, expected: Scores) -> None:
    row = evaluated(run_cli, model)
    assert "perplexity" not in row
    (task,) = row["tasks"]
    assert task == {
        "task": "hellaswag",
        "examples": len(QUERIES),
        "acc": statistics.fmean(expected.acc),
        "acc_stderr": pytest.approx(statistics.stdev(expected.acc) / len(QUERIES) ** 0.5),
        "acc_norm": statistics.fmean(expected.acc_norm),
        "acc_norm_stderr": pytest.approx(statistics.stdev(expected.acc_norm) / len(QUERIES) ** 0.5),
    }


def test_the_same_examples_are_the_same_from_either_format(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    parquet = tmp_path / "validation.parquet"
    datasets.Dataset.from_json(str(HELLASWAG), cache_dir=str(tmp_path)).to_parquet(parquet)
    row = evaluated(run_cli, model)
    assert evaluated(run_cli, model, data=parquet) == row
    assert evaluated(run_cli, model, "--batch-size", 1)["tasks"] == row["tasks"]


def test_a_limit_takes_the_first_examples(run_cli: RunCli, model: Path, expected: Scores) -> None:
    row = evaluated(run_cli, model, "--limit", 1)
    (task,) = row["tasks"]
    assert (task["examples"], task["acc"], task["acc_norm"]) == (1, expected.acc[0], expected.acc_norm[0])
    assert task["acc_stderr"] is None
    assert row["tasks_sha256"] != evaluated(run_cli, model, "--limit", 2)["tasks_sha256"]


def test_perplexity_and_tasks_are_told_together(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(HELLASWAG.read_text())
    texts = ("--text", text, "--seqlen", 32, "--windows", 2)
    asked = ("--tasks", "hellaswag", "--task-data", f"hellaswag={HELLASWAG}", "--quiet")
    ran = run_cli("evaluate", model, *texts, *asked)
    assert ran.code == 0, ran.stderr
    perplexity, task = ran.stdout.splitlines()
    assert perplexity.startswith("perplexity ")
    assert task.startswith("hellaswag: acc 0.") and task.endswith("(4 examples)")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "hellaswag", "--task-data", "hellaswag=/no/such.jsonl"], "/no/such.jsonl: no such file"),
        (["--tasks", "hellaswag", "--task-data", "hellaswag"], "must end in .jsonl or .parquet"),
        (["--tasks", "boolq", "--task-data", "rte=/no/such.jsonl"], "one of the tasks asked for: boolq"),
        (["--tasks", "hellaswag,"], "give names with commas between them"),
        (["--tasks", "boolq", "--task-data", f"boolq={HELLASWAG}"], "hellaswag.jsonl: does not hold examples of boolq"),
        (["--limit", "5"], "--limit needs --tasks"),
        (["--task-data", "hellaswag=x.jsonl"], "--task-data needs --tasks"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(
    options: list[str], told: str, run_cli: RunCli, model: Path
) -> None:
    ran = run_cli("evaluate", model, *options)
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert told in line


def test_data_that_is_not_here_is_asked_for(
    run_cli: RunCli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    ran = run_cli("evaluate", model, "--tasks", "winogrande")
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert "winogrande: its data cannot be had" in line
    assert "--task-data winogrande=FILE" in line


def test_a_model_without_a_tokenizer_cannot_be_asked(run_cli: RunCli, tiny_llama: Path) -> None:
    ran = run_cli("evaluate", tiny_llama, "--tasks", "hellaswag", "--task-data", f"hellaswag={HELLASWAG}")
    assert ran.code == 2
    assert "has no tokenizer, which --tasks needs" in ran.stderr


def test_a_tokenizer_that_ends_no_text_cannot_be_asked(run_cli: RunCli, tiny_with_tokenizer: Path) -> None:
    ran = run_cli("evaluate", tiny_with_tokenizer, "--tasks", "hellaswag", "--task-data", f"hellaswag={HELLASWAG}")
    assert ran.code == 2
    assert "neither a BOS nor an EOS token" in ran.stderr


def test_lm_eval_that_is_not_installed_is_named(run_cli: RunCli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    ran = run_cli("evaluate", model, "--tasks", "hellaswag")
    assert ran.code == 2
    (line,) = ran.stderr.splitlines()
    assert "pip install 'owl-deploy[tasks]'" in line


# -------------------- the study


def test_the_study_is_table_5(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(HELLASWAG.read_text())
    texts = ("--calibration", text, "--samples", 4, "--seqlen", 32)
    asked = ("--tasks", "hellaswag", "--task-data", f"hellaswag={HELLASWAG}", "--quiet")
    study = ("study", "zero-shot", model, "-o", tmp_path / "out", *texts, *asked)
    assert run_cli(*study, "--methods", "magnitude,wanda").code == 0
    found = rows(tmp_path / "out" / "zero-shot-tasks.csv")
    assert labelled(found, "sparsity_asked", "method", "allocation", "task", "examples") == [
        ("0.0", "dense", "", "hellaswag", "4"),
        ("0.7", "magnitude", "uniform", "hellaswag", "4"),
        ("0.7", "wanda", "uniform", "hellaswag", "4"),
        ("0.7", "wanda", "owl", "hellaswag", "4"),
    ]
    assert [row["paper_llama_7b_percent"] for row in found] == ["74.8", "24.68", "31.83", "44.79"]
    (dense,) = evaluated(run_cli, model)["tasks"]
    assert float(found[0]["acc_norm_percent"]) == 100 * dense["acc_norm"]
    assert float(found[0]["acc_percent"]) == 100 * dense["acc"]
    together = rows(tmp_path / "out" / "zero-shot.csv")
    assert labelled(together, "model", "hellaswag", "mean")[:2] == [
        ("this", found[0]["acc_norm_percent"], found[0]["acc_norm_percent"]),
        ("paper's Table 5, LLaMA-7B", "74.8", "74.8"),
    ]
    assert (tmp_path / "out" / "zero-shot.png").read_bytes().startswith(b"\x89PNG")
    assert "4 of hellaswag examples" in (tmp_path / "out" / "zero-shot.md").read_text()

    cells = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    ran = run_cli(*study, "--methods", "wanda,ria")
    assert ran.code == 0, ran.stderr
    after = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert after[: len(cells)] == cells
    assert len(after) == len(cells) + 2
    assert run_cli(*study, "--limit", 3).code == 2  # other examples are another study


def test_a_pruned_cell_has_the_accuracy_of_the_pruned_checkpoint(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    asked = ("--tasks", "hellaswag", "--task-data", f"hellaswag={HELLASWAG}", "--quiet", "--json")
    texts = ("--calibration", tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (4, 32)))
    options = ("--methods", "magnitude", "--sparsities", "0.6")
    ran = run_cli("study", "zero-shot", model, "-o", tmp_path / "out", *texts, *asked, *options)
    assert ran.code == 0, ran.stderr
    _, cell = json.loads(ran.stdout)["cells"]
    by_magnitude = ("--sparsity", 0.6, "--method", "magnitude", "--allocation", "uniform", "--quiet")
    assert run_cli("prune", model, "-o", tmp_path / "sparse", *by_magnitude).code == 0
    assert cell["tasks"] == evaluated(run_cli, tmp_path / "sparse")["tasks"]


def test_table_1_is_a_part_of_the_methods(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (4, 32)))
    texts = ("--calibration", tmp_path / "ids.npy", "--evaluate", tmp_path / "ids.npy", "--quiet")
    study = ("study", "methods", model, "-o", tmp_path / "out", *texts, "--sparsities", "0.7")
    ran = run_cli(*study, "--methods", "magnitude,wanda,sparsegpt")
    assert ran.code == 0, ran.stderr
    found = rows(tmp_path / "out" / "methods.csv")
    assert labelled(found, "method", "allocation", "paper_llama_7b") == [
        ("dense", "", "5.68"),
        ("magnitude", "uniform", "48419.12"),
        ("magnitude", "owl", ""),
        ("wanda", "uniform", "85.77"),
        ("wanda", "owl", "24.55"),
        ("sparsegpt", "uniform", "26.3"),
        ("sparsegpt", "owl", "19.49"),
    ]
    assert "admm" not in (tmp_path / "out" / "methods.md").read_text()
    ran = run_cli(*study, "--methods", "wanda,magnitudes")
    assert ran.code == 2
    assert "'magnitudes' is not in this study" in ran.stderr
