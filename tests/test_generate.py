"""`owl-deploy generate`: the text it makes, how it is sampled, and what is wrong when it makes none."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from owl_deploy.bundle.manifest import read_bundle
from owl_deploy.bundle.names import Flavor
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.sparse_engine import SparseEngine
from owl_deploy.errors import UserError
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.generation.model import GenerationModel, Sampling
from owl_deploy.generation.text import TextStream, prompt_ids
from owl_deploy.sparse.library import library_path

from .conftest import VOCABULARY, Ran, RunCli, TinyModel, describe_again

FLAVORS: list[Flavor] = ["standard", "genai", "sparse-packed32"]
PROMPT, PROMPT_IDS = "word4 word5 word6", [5, 6, 7]
CONTEXT = 64
NEW = 24
TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'system' %}word1 {% else %}word2 {% endif %}\
{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}word3{% endif %}"""

flavors = pytest.mark.parametrize("flavor", FLAVORS)


@pytest.fixture(scope="module")
def worded(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A bundle of every kind of graph, with a tokenizer and no chat template."""
    try:
        library_path()
    except UserError as error:
        pytest.skip(str(error))
    checkpoint, bundle = (tmp_path_factory.mktemp("generate") / name for name in ("checkpoint", "bundle"))
    shutil.copytree(tiny_model("llama", head_dim=16), checkpoint)
    tiny_tokenizer.save_pretrained(checkpoint)
    export_checkpoint(checkpoint, bundle, FLAVORS)
    return bundle


@pytest.fixture
def copied(worded: Path, tmp_path: Path) -> Path:
    """A copy of that bundle, to change."""
    return Path(shutil.copytree(worded, tmp_path / "bundle"))


Generate = Callable[..., dict[str, Any]]


@pytest.fixture
def generate(run_cli: RunCli) -> Generate:
    """What `generate --json` prints; of `PROMPT`, unless told otherwise."""

    def run(bundle: Path, *options: object, prompt: str = PROMPT) -> dict[str, Any]:
        ran = run_cli("generate", bundle, prompt, "--max-new-tokens", NEW, *options, "--json", "--quiet")
        assert ran.code == 0, ran.stderr
        assert ran.stderr == ""
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    return run


def greedy(bundle: Path, flavor: Flavor, new_tokens: int = NEW) -> list[int]:
    """The likeliest tokens, by the engine class and argmax."""
    engine = SparseEngine if flavor.startswith("sparse") else OnnxRuntimeEngine
    model = engine(bundle / flavor / "model.onnx", threads=1, context=CONTEXT)
    tokens = [int(model.prefill(np.array([PROMPT_IDS], np.int64))[0].argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(model.decode(np.array(tokens[-1:]))[0].argmax()))
    return tokens


def words(tokens: list[int]) -> str:
    return " ".join(f"word{token - 1}" for token in tokens)


def check_refused(ran: Ran, *parts: object) -> None:
    assert ran.code == 2, ran
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    for part in ("error: ", *parts):
        assert str(part) in line


# -------------------- the text


@flavors
def test_without_a_temperature_it_is_the_argmax_of_the_engine(worded: Path, generate: Generate, flavor: Flavor) -> None:
    made = generate(worded, "--flavor", flavor)
    assert made["text"] == words(greedy(worded, flavor))
    assert (made["flavor"], made["prompt_tokens"], made["new_tokens"]) == (flavor, len(PROMPT_IDS), NEW)
    assert (made["finish"], made["seed"]) == ("length", None)
    assert min(made["ttft_ms"], made["decode_ms_p50"], made["decode_tokens_per_s"]) > 0


def test_sparse_comes_first(worded: Path, generate: Generate) -> None:
    assert generate(worded)["flavor"] == "sparse-packed32"


def test_it_streams_the_text_to_stdout_and_one_line_of_timings_to_stderr(worded: Path, run_cli: RunCli) -> None:
    ran = run_cli("generate", worded, PROMPT, "--max-new-tokens", NEW)
    assert ran.stdout == words(greedy(worded, "sparse-packed32")) + "\n"
    (line,) = ran.stderr.splitlines()
    for part in ("sparse-packed32", "3 prompt tokens", f"{NEW} new", "ms/token", "tokens/s"):
        assert part in line
    assert run_cli("generate", worded, PROMPT, "--max-new-tokens", NEW, "--quiet") == (0, ran.stdout, "")


def test_a_single_token_has_no_decode_times(worded: Path, run_cli: RunCli) -> None:
    ran = run_cli("generate", worded, PROMPT, "--max-new-tokens", 1, "--json")
    made = json.loads(ran.stdout)
    assert (made["new_tokens"], made["decode_ms_p50"], made["decode_tokens_per_s"]) == (1, None, None)


@flavors
def test_it_ends_at_any_stop_token(copied: Path, generate: Generate, flavor: Flavor) -> None:
    expected = greedy(copied, flavor)
    path = copied / flavor / ("generation_config.json" if flavor == "standard" else "genai_config.json")
    config = json.loads(path.read_text())
    (config if flavor == "standard" else config["model"])["eos_token_id"] = [0, expected[5]]
    path.write_text(json.dumps(config))
    end = expected.index(expected[5])
    made = generate(copied, "--flavor", flavor)
    assert (made["text"], made["new_tokens"], made["finish"]) == (words(expected[:end]), end, "stop")


def test_it_ends_where_the_context_is_full(worded: Path, generate: Generate) -> None:
    made = generate(worded, "--max-new-tokens", 1000)
    assert (made["finish"], made["new_tokens"]) == ("context", CONTEXT - len(PROMPT_IDS))


def test_a_standard_graph_of_a_model_without_a_context(copied: Path, generate: Generate) -> None:
    manifest = json.loads((copied / "bundle.json").read_text())
    (copied / "bundle.json").write_text(json.dumps(manifest | {"context": None}))
    assert generate(copied, "--flavor", "standard")["text"] == words(greedy(copied, "standard"))


def test_the_prompt_from_stdin(worded: Path, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert generate(worded, prompt="-")["text"] == generate(worded)["text"]


def test_a_bundle_names_no_library(worded: Path) -> None:
    assert "custom_ops" not in (worded / "sparse-packed32" / "genai_config.json").read_text()


# -------------------- sampling


def test_the_same_seed_gives_the_same_text_and_another_another(worded: Path, generate: Generate) -> None:
    made = [generate(worded, "--temperature", 1, "--seed", seed) for seed in (7, 7, 8)]
    assert made[0]["text"] == made[1]["text"] != made[2]["text"]
    assert [one["seed"] for one in made] == [7, 7, 8]


def test_a_seed_that_was_not_given_is_told(worded: Path, generate: Generate) -> None:
    first = generate(worded, "--temperature", 1)
    again = generate(worded, "--temperature", 1, "--seed", first["seed"])
    assert first["text"] == again["text"]


@pytest.fixture(scope="module")
def model(worded: Path) -> GenerationModel:
    return GenerationModel(worded, read_bundle(worded), "genai", threads=1)


@pytest.fixture(scope="module")
def probabilities(worded: Path) -> np.ndarray:
    """Of the token after the prompt, at temperature 0.05."""
    engine = OnnxRuntimeEngine(worded / "genai" / "model.onnx", threads=1, context=CONTEXT)
    logits = engine.prefill(np.array([PROMPT_IDS], np.int64))[0].astype(np.float64) / 0.05
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def sampled(model: GenerationModel, count: int, **options: Any) -> Iterator[int]:
    for seed in range(count):
        yield next(model.tokens(PROMPT_IDS, 1, Sampling(temperature=0.05, seed=seed, **options)))[0]


@pytest.mark.parametrize("top_k", [0, 5, 10 * VOCABULARY])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_are_sampled_as_likely_as_they_are(
    model: GenerationModel, probabilities: np.ndarray, top_k: int, top_p: float
) -> None:
    order = np.argsort(-probabilities)[: top_k or None]
    expected = probabilities[order] / probabilities[order].sum()
    nucleus = int(np.searchsorted(np.cumsum(expected), top_p)) + 1
    order, expected = order[:nucleus], expected[:nucleus] / expected[:nucleus].sum()
    count = 400
    found = list(sampled(model, count, top_k=top_k, top_p=top_p))
    assert set(found) <= set(order.tolist())
    assert abs(found.count(int(order[0])) / count - expected[0]) < 0.1  # 4 standard deviations


def test_a_temperature_next_to_none_takes_the_likeliest(worded: Path, generate: Generate) -> None:
    assert generate(worded, "--temperature", 1e-40)["text"] == generate(worded)["text"]


def test_a_penalty_keeps_tokens_from_coming_again(worded: Path, generate: Generate) -> None:
    made = generate(worded, "--repetition-penalty", 100)["text"].split()
    assert len(set(made)) == len(made) == NEW


# -------------------- chat


@pytest.fixture
def chatty(copied: Path) -> Path:
    """A bundle with a chat template."""
    (copied / "sparse-packed32" / "chat_template.jinja").write_text(TEMPLATE)
    return copied


def test_a_chat_template_is_used_where_there_is_one(chatty: Path, generate: Generate) -> None:
    told = "word2 " + PROMPT + " word3"
    made = generate(chatty)
    assert made["prompt_tokens"] == 5
    assert made["text"] == generate(chatty, "--no-chat", prompt=told)["text"]
    assert generate(chatty, "--no-chat")["prompt_tokens"] == 3


def test_a_chat_may_be_opened_by_the_system(chatty: Path, generate: Generate) -> None:
    made = generate(chatty, "--system", "word9")
    assert made["prompt_tokens"] == 7
    assert made["text"] == generate(chatty, "--no-chat", prompt=f"word1 word9 word2 {PROMPT} word3")["text"]


def test_a_template_that_knows_no_system(copied: Path, run_cli: RunCli) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}word1"
    (copied / "sparse-packed32" / "chat_template.jinja").write_text(template)
    check_refused(run_cli("generate", copied, PROMPT, "--system", "word9"), "no system", "--system")


def test_a_system_without_a_chat(worded: Path, chatty: Path, run_cli: RunCli) -> None:
    check_refused(run_cli("generate", worded, PROMPT, "--system", "word9"), "--system", "has none")
    check_refused(run_cli("generate", chatty, PROMPT, "--system", "word9", "--no-chat"), "--system", "--no-chat")


# -------------------- text, piece by piece


def byte_level() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback() -> PreTrainedTokenizerBase:
    """As SentencePiece decodes: a word brings its space, which the first one loses."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁owl": 256, "▁": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["owl", "an owl  two", "grüne Eule", "梟 🦉🦉!", " \n\n x"])
def test_pieces_of_text_hold_whole_characters(make: Callable[[], PreTrainedTokenizerBase], text: str) -> None:
    tokenizer = make()
    if make is byte_level:
        ids = tokenizer(text)["input_ids"]
    else:
        ids = [256, *text.encode(), 256, 257, 256, *text.encode(), 256]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert stream.rest() == ""
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > len(text) / 2  # they do come one by one


def test_half_a_character_comes_last() -> None:
    tokenizer = byte_level()
    ids = tokenizer("x🦉")["input_ids"][:3]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["x", "", ""]
    assert "x" + stream.rest() == tokenizer.decode(ids)


def test_bytes_that_are_no_text_do_not_end_it() -> None:
    tokenizer = byte_fallback()
    for seed in range(100):
        stream = TextStream(tokenizer)
        ids = [*np.random.default_rng(seed).integers(0, len(tokenizer), 30).tolist(), 256, 256]
        assert ("".join(map(stream.push, ids)) + stream.rest()).endswith(" owl owl")


def test_special_tokens_are_no_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tiny_tokenizer)
    assert [stream.push(token) for token in (5, 0, 6)] == ["word4", "", " word5"]


# -------------------- what is wrong


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(worded: Path, run_cli: RunCli, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(run_cli("generate", worded, prompt), "prompt is empty")
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    check_refused(run_cli("generate", worded, "-"), "prompt is empty")


def test_a_prompt_that_is_no_text(worded: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(run_cli("generate", worded, "word1 \udcff"), "not UTF-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"word1 \xff"), encoding="utf-8"))
    check_refused(run_cli("generate", worded, "-"), "stdin", "not text")


def test_a_prompt_that_fills_the_context(worded: Path, run_cli: RunCli) -> None:
    ran = run_cli("generate", worded, " ".join(["word1"] * CONTEXT))
    check_refused(ran, f"{CONTEXT} tokens", f"context of {CONTEXT}", "shorten")
    assert run_cli("generate", worded, " ".join(["word1"] * (CONTEXT - 1))).code == 0


def test_no_bundle(run_cli: RunCli, tmp_path: Path) -> None:
    check_refused(run_cli("generate", tmp_path, PROMPT), tmp_path, "bundle.json", "owl-deploy export")


def test_no_such_flavor(worded: Path, run_cli: RunCli) -> None:
    check_refused(run_cli("generate", worded, PROMPT, "--flavor", "ggml"), "--flavor ggml", ", ".join(FLAVORS))
    check_refused(run_cli("generate", worded, PROMPT, "--flavor", "sparse-int8"), worded, "sparse-int8", "export it")


def test_no_tokenizer(copied: Path, run_cli: RunCli) -> None:
    for file in (copied / "genai").glob("*token*"):
        file.unlink()
    check_refused(run_cli("generate", copied, PROMPT, "--flavor", "genai"), copied / "genai", "no tokenizer")


def test_the_tokenizer_of_another_model(copied: Path, run_cli: RunCli) -> None:
    manifest = json.loads((copied / "bundle.json").read_text())
    (copied / "bundle.json").write_text(json.dumps(manifest | {"vocabulary": 6}))
    check_refused(run_cli("generate", copied, PROMPT), "token 7", "only 6")


@flavors
def test_a_graph_that_is_incomplete(copied: Path, run_cli: RunCli, flavor: Flavor) -> None:
    graph = copied / flavor / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    check_refused(run_cli("generate", copied, PROMPT, "--flavor", flavor), graph, "export the model again")


def test_a_graph_that_does_not_load(copied: Path, run_cli: RunCli) -> None:
    graph = copied / "genai" / "model.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    check_refused(run_cli("generate", copied, PROMPT, "--flavor", "genai"), graph, "its contents are not those")
    describe_again(copied, graph)
    check_refused(run_cli("generate", copied, PROMPT, "--flavor", "genai"), graph.parent, "cannot load")


@pytest.mark.parametrize(
    "options",
    [
        ["--top-k", "5"],
        ["--top-p", "0.5"],
        ["--temperature", "1", "--top-p", "0"],
        ["--temperature", "1", "--top-p", "nan"],
        ["--repetition-penalty", "0"],
    ],
)
def test_options_that_mean_nothing(worded: Path, run_cli: RunCli, options: list[str]) -> None:
    check_refused(run_cli("generate", worded, PROMPT, *options), options[-2])


def test_an_interrupted_text(worded: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[tuple[int, float]]:
        yield 5, 1.0
        yield 6, 1.0
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationModel, "tokens", interrupted)
    ran = run_cli("generate", worded, PROMPT)
    assert (ran.code, ran.stdout) == (130, "word4 word5")
    assert ran.stderr.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in ran.stderr


def test_a_prompt_of_unknown_characters() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match="no tokens"):
        prompt_ids(tokenizer, "xyz", system=None, chat=True)


# -------------------- a real model


@pytest.mark.smollm2
def test_smollm2_answers(smollm2_dense: Path, tmp_path: Path, generate: Generate) -> None:
    export_checkpoint(smollm2_dense, tmp_path / "bundle", ["sparse-packed16"])
    made = generate(tmp_path / "bundle", prompt="What is the capital of France?")
    assert "Paris" in made["text"]
    assert (made["prompt_tokens"], made["finish"]) == (37, "stop")
