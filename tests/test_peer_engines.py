"""Engines that are compared with: each computes what ONNX Runtime computes, up to how its weights are rounded."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from owl_deploy.bundle.manifest import read_bundle
from owl_deploy.bundle.names import Flavor, model_file
from owl_deploy.engines.client import EngineFailed, EngineProcess
from owl_deploy.engines.environments import process_variables
from owl_deploy.engines.registry import ENGINES, installed_engines
from owl_deploy.errors import UserError
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.exporting.verify.parity import compare
from owl_deploy.pruning.run import Calibration

from .conftest import VOCABULARY, RunCli, TinyModel, run_in

PROMPT, LENGTH = 16, 24
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
OWN = ("onnxruntime-int8", "onnxruntime-int4", "torch", "torch-compiled")
OPENVINO = ("openvino", "openvino-int8", "openvino-int4", "openvino-int8-sparse")
EVERY = [*OWN, *(pytest.param(name, marks=pytest.mark.openvino) for name in OPENVINO)]

# Logits of two sequences, each with its first tokens at once (the last of them prefilled) and the rest one by one: in
# turn, side by side, and all at once.
SCRIPT = """
import importlib, json, sys
from pathlib import Path
import numpy as np
module, class_name, model, folder, prompt = sys.argv[1:]
prompt, folder = int(prompt), Path(folder)
ids = np.load(folder / "ids.npy")
def engine(batch):
    engine_class = getattr(importlib.import_module(module), class_name)
    return engine_class(Path(model), threads=1, context=ids.shape[1], prompts=(prompt,), batch=batch)
def run(engine, rows):
    scored = engine.score(np.ascontiguousarray(rows[:, :prompt]))
    prefilled = engine.prefill(np.ascontiguousarray(rows[:, :prompt]))[:, None]
    decoded = [engine.decode(np.ascontiguousarray(rows[:, index])) for index in range(prompt, rows.shape[1])]
    return np.concatenate([scored[:, :-1], prefilled, np.stack(decoded, axis=1)], axis=1)
one = engine(1)
in_turn = {f"in_turn_{turn}": run(one, ids[[row]])[0] for turn, row in enumerate((0, 1, 0))}
np.savez(folder / "logits.npz", at_once=one.score(ids[:1])[0], together=run(engine(2), ids), **in_turn)
(folder / "facts.json").write_text(json.dumps(one.describe()))
"""


class Computed(NamedTuple):
    """What an engine computed of both sequences, and says of itself."""

    logits: dict[str, NDArray[np.float32]]
    facts: dict[str, Any]


class Peers:
    """A small bundle that gets the flavors asked for, and what engines computed from it, each once."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.bundle = folder / "bundle"
        self._folder = folder
        self._computed: dict[str, Computed] = {}
        self._text = Calibration(str(folder / "text.npy"))
        np.save(self._text.spec, np.random.default_rng(2).integers(0, VOCABULARY, (4, LENGTH)))
        export_checkpoint(checkpoint, self.bundle, ("genai",))

    def flavor(self, name: Flavor) -> Path:
        export_checkpoint(self.checkpoint, self.bundle, (name,), calibration=self._text)
        return self.bundle / name

    def computed(self, name: str) -> Computed:
        if name not in self._computed:
            spec = ENGINES[name]
            folder = self._folder / name
            if folder.exists():
                pytest.fail(f"{name} failed in the test before")
            folder.mkdir()
            np.save(folder / "ids.npy", IDS)
            model = self.flavor(spec.flavors[0]) / model_file(spec.flavors[0])
            python = spec.environment.interpreter if spec.environment else sys.executable
            run_in(
                *(python, SCRIPT, spec.module, spec.class_name, model, folder, PROMPT),
                variables=process_variables(spec.environment),
                timeout_s=1800,
            )
            facts = json.loads((folder / "facts.json").read_text())
            self._computed[name] = Computed(dict(np.load(folder / "logits.npz")), facts)
        return self._computed[name]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Peers:
    # The builder of genai takes any linear with as many outputs as there are words for the head.
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": VOCABULARY + 32, "num_hidden_layers": 2}
    checkpoint = tiny_model("llama", **sizes, initializer_range=0.1)
    return Peers(checkpoint, tmp_path_factory.mktemp("peers"))


@pytest.fixture
def computed(request: pytest.FixtureRequest, peers: Peers, engine: str) -> Computed:
    """What the test's `engine` computed."""
    if engine in OPENVINO:
        request.getfixturevalue("openvino_python")
    return peers.computed(engine)


def difference(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("engine", EVERY)
def test_logits_are_those_of_onnx_runtime_but_for_rounding(peers: Peers, engine: str, computed: Computed) -> None:
    expected = peers.computed("onnxruntime").logits
    for sequence in ("in_turn_0", "in_turn_1"):
        actual = computed.logits[sequence]
        parity = compare(
            *(expected[sequence], actual[:PROMPT], actual[PROMPT:]),
            what=engine,
            reference="onnxruntime",
            precision=ENGINES[engine].precision,
        )
        if ENGINES[engine].precision == "fp32":
            assert max(parity.max_abs_difference, parity.max_abs_difference_with_past) < 1e-4
        else:
            assert parity.relative_difference is not None
            assert parity.relative_difference > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("engine", EVERY)
def test_decoding_continues_the_prefill(engine: str, computed: Computed) -> None:
    """What is rounded on the way through the model may be rounded otherwise for one token than for many."""
    allowed = 1e-5 if ENGINES[engine].precision == "fp32" else 0.05
    assert difference(computed.logits["in_turn_0"], computed.logits["at_once"]) < allowed


@pytest.mark.parametrize("engine", EVERY)
def test_a_new_sequence_knows_nothing_of_the_one_before(computed: Computed) -> None:
    assert difference(computed.logits["in_turn_1"], computed.logits["in_turn_0"]) > 0.5
    assert difference(computed.logits["in_turn_2"], computed.logits["in_turn_0"]) < 1e-6


@pytest.mark.parametrize("engine", EVERY)
def test_sequences_side_by_side_are_as_they_are_alone(engine: str, computed: Computed) -> None:
    alone = np.stack([computed.logits["in_turn_0"], computed.logits["in_turn_1"]])
    allowed = 1e-5 if ENGINES[engine].precision == "fp32" else 0.05
    assert difference(computed.logits["together"], alone) < allowed


@pytest.mark.parametrize("engine", EVERY)
def test_engines_say_what_they_are(engine: str, computed: Computed) -> None:
    assert computed.facts["version"]
    assert computed.facts["instruction_set"]
    if ENGINES[engine].precision == "fp32":
        assert computed.facts["instruction_set"] not in ("amx", "avx512_vnni"), "these do not multiply fp32"
    assert computed.facts["prefill_logits"] == "last"
    if engine == "openvino":
        precisions = ("inference_precision_hint", "kv_cache_precision", "dynamic_quantization_group_size")
        assert [computed.facts[name] for name in precisions] == ["f32", "f32", 0]
    if engine == "openvino-int8-sparse":  # of a model without zeros no product is one of sparse weights, AMX or not
        dense = r"0 of \d+ products \(it needs AMX and a rate of zeros of 0\.1\): dense weights instead"
        assert re.fullmatch(dense, computed.facts["sparse_weights"])


def bench(peers: Peers, run_cli: RunCli, out: Path, engines: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of onnxruntime and these engines, by the command."""
    np.save(out / "text.npy", np.random.default_rng(1).integers(0, VOCABULARY, (2, 64)))
    for engine in engines:
        peers.flavor(ENGINES[engine].flavors[0])
    ran = run_cli(
        *("bench", peers.bundle, "--engines", ",".join(["onnxruntime", *engines]), "-o", out, "--json"),
        *("--prompt", 24, "--new-tokens", 4, "--repetitions", 1, "--threads", 1, "--max-load", 99),
        *("--text", out / "text.npy", "--seqlen", 64),
    )
    assert ran.code == 0, ran.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * (1 + len(engines)), [row["error"] for row in rows]
    return rows


def check_rows(rows: list[dict[str, Any]]) -> None:
    expected = next(row["perplexity"] for row in rows if row["engine"] == "onnxruntime")
    for row in rows:
        precision = ENGINES[row["engine"]].precision
        assert row["weights"] == precision
        assert row["perplexity"] == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 0.1)


def test_the_command_measures_engines_of_our_own_environment(peers: Peers, run_cli: RunCli, tmp_path: Path) -> None:
    check_rows(bench(peers, run_cli, tmp_path, ("onnxruntime-int8", "onnxruntime-int4", "torch")))


def test_where_onnxruntime_is_not_measured_packed32_takes_its_place(
    peers: Peers, run_cli: RunCli, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    export_checkpoint(peers.checkpoint, bundle, ("torch", "sparse-packed32"))
    ran = run_cli(
        *("bench", bundle, "--engines", "torch,sparse-packed32", "-o", tmp_path / "out", "--json"),
        *("--prompt", 24, "--new-tokens", 4, "--repetitions", 1, "--threads", 1, "--max-load", 99),
    )
    assert ran.code == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    references = {row["engine"]: row["parity"]["reference"] for row in rows}
    assert references == {"torch": "sparse-packed32", "sparse-packed32": "torch"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Parity of torch with sparse-packed32" in text


@pytest.mark.openvino
def test_the_command_measures_openvino(peers: Peers, run_cli: RunCli, tmp_path: Path, openvino_python: Path) -> None:
    assert openvino_python.is_file()
    check_rows(bench(peers, run_cli, tmp_path, ("openvino", "openvino-int8-sparse")))
    assert "openvino-int8-sparse reads sparse weights in 0 of" in (tmp_path / "report.md").read_text()
    stored = read_bundle(peers.bundle).flavors["openvino-int8-static"].stored
    assert stored is not None
    assert 8 < 8 * stored.linear_bytes / stored.linear_weights < 9
    assert stored.linear_weights == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * (VOCABULARY + 32))
    assert stored.head_weights == VOCABULARY * 64


@pytest.mark.parametrize("flavor", ["genai-int8", "genai-int4"])
def test_every_matrix_is_rounded(peers: Peers, flavor: Flavor) -> None:
    import onnx

    graph = onnx.load(peers.flavor(flavor) / "model.onnx", load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert "MatMul" not in operators
    rounded = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(rounded) == 2 * 5 + 1  # q, k and v are one product; and the head
    for node in rounded:
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        assert (settings["bits"], settings["block_size"], settings["accuracy_level"]) == (int(flavor[-1]), 32, 4)
    files = {Path(file.path).name for file in read_bundle(peers.bundle).flavors[flavor].graph_files}
    assert files == {"model.onnx", "model.onnx.data"}


def test_without_a_compiler_torch_compiled_says_so(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with (
        EngineProcess(ENGINES["torch-compiled"], 1) as process,
        pytest.raises(EngineFailed, match=r"needs a C\+\+ compiler: install g\+\+"),
    ):
        process.load(peers.flavor("torch") / "config.json", threads=1, context=LENGTH, prompts=[PROMPT])


def test_engines_that_share_an_environment_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_ENGINES", str(tmp_path))
    with pytest.raises(UserError, match=r"engine openvino-int4: .* owl-deploy engines install openvino$"):
        installed_engines("onnxruntime,openvino-int4")
    with pytest.raises(UserError, match=r"owl-deploy engines install openvino"):
        EngineProcess(ENGINES["openvino-int8"], 1)
