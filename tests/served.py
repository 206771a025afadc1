"""Bundles small enough to serve in a test, and servers that run: in this process, or started as a user starts them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvicorn
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from owl_deploy.bundle.names import Flavor
from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.serving.app import Limits, create_app
from owl_deploy.serving.run import Opened, Serving, open_bundle

from .conftest import TESTS, TinyModel

CONTEXT = 512
KEY = "a key of the tests"
TEMPLATE = """\
{% if tools %}<|im_start|>tools {% for tool in tools %}{{ tool | tojson }} {% endfor %}\
<tool_call></tool_call><|im_end|>{% endif %}\
{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}\
{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\
<|im_end|>{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"""


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes, with some merges, a chat template that knows tools, and an end of a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATE, "the user and the assistant say the same word to each other"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False
    )


def export_tiny(tiny_model: TinyModel, folder: Path, flavors: list[Flavor]) -> Path:
    """A random model of these flavors, in `folder`/tiny."""
    checkpoint = folder / "checkpoint"
    tokenizer = bytes_tokenizer()
    shutil.copytree(
        tiny_model("llama", head_dim=16, vocab_size=320, max_position_embeddings=CONTEXT, eos_token_id=1), checkpoint
    )
    tokenizer.save_pretrained(checkpoint)
    export_checkpoint(checkpoint, folder / "tiny", flavors)
    return folder / "tiny"


@dataclass(frozen=True)
class Running:
    """A server; `opened` if it runs in this process."""

    url: str
    pid: int
    opened: Opened | None = None

    def client(self, **options: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **({"api_key": KEY, "max_retries": 0, "timeout": 60} | options))

    def async_client(self, **options: object) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", **({"api_key": KEY, "max_retries": 0, "timeout": 60} | options))


@contextlib.contextmanager
def running(
    bundle: Path, serving: Serving = Serving(), *, limits: Limits = Limits(), api_key: str | None = None
) -> Iterator[Running]:
    """A server in this process."""
    opened = open_bundle(bundle, serving)
    opened.engine.start()
    application = create_app(opened.engine, opened.model, opened.metrics, limits=limits, api_key=api_key)
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_config=None, lifespan="off"))
    server.config.load()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", os.getpid(), opened)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        opened.engine.stop()


@contextlib.contextmanager
def started(bundle: Path, *options: object, **variables: str) -> Iterator[tuple[Running, subprocess.Popen[str]]]:
    """`owl-deploy serve` in a process of its own, which is killed in the end if it still runs."""
    command = [sys.executable, "-c", "from owl_deploy.cli import main; main()", "serve", bundle, "--json", *options]
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Running(json.loads(line)["url"], process.pid), process
    finally:
        process.kill()
        process.communicate()


def rss_bytes(pid: int) -> int:
    """Memory that a process holds."""
    return int(psutil.Process(pid).memory_info().rss)
