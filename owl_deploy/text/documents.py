"""Calibration and evaluation text: hub data sets, local files, and the packaged demo text."""

from __future__ import annotations

import bz2
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from owl_deploy.errors import UserError, first_line

Split = Literal["calibration", "evaluation"]

_DEMO_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST_PARAGRAPH = 200  # characters: shorter lines of wiki markup are mostly remains of lists and tables


def load_documents(spec: str, split: Split) -> list[str]:
    """The documents that `spec` names.

    Args:
        spec: `c4`, `wikitext2`, `demo`, or a `.txt` (one document), `.jsonl` or `.parquet` (column `text`) file.
        split: hub data sets and the demo have one text to calibrate on and another to evaluate on, as the
            published tables have: C4's first training shard or validation shard, WikiText-2's train or test.

    Raises:
        UserError: the text is not there, cannot be read, or is empty.
    """
    if spec == "demo":
        documents = demo_documents(split)
    elif spec in ("c4", "wikitext2"):
        documents = _hub_documents(spec, split)
    else:
        documents = _file_documents(spec)
    if not any(document.strip() for document in documents):
        raise UserError(f"{spec}: holds no text")
    return documents


def _hub_documents(spec: str, split: Split) -> list[str]:
    if spec == "c4":
        names = {
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        }
        arguments: dict[str, Any] = {
            "path": "allenai/c4",
            "data_files": {"all": names[split]},
            "split": "all",
        }
    else:
        name = {"calibration": "train", "evaluation": "test"}[split]
        arguments = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": name}
    return _column(spec, **arguments)


def _column(spec: str, **arguments: Any) -> list[str]:
    """The `text` column of a data set, through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    try:
        rows = datasets.load_dataset(**arguments)
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        reason = first_line(error)
        raise UserError(f"{spec}: cannot be read ({reason}); give a local .txt, .jsonl or .parquet file") from error
    if "text" not in rows.column_names:
        raise UserError(f"{spec}: has no column 'text'; its columns are {', '.join(rows.column_names)}")
    return [text for text in rows["text"] if text]


def _file_documents(spec: str) -> list[str]:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"{spec}: no such text; give c4, wikitext2, demo, or a .txt, .jsonl, .parquet or .npy file")
    if path.suffix == ".txt":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{spec}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    builders = {".jsonl": "json", ".parquet": "parquet"}
    if path.suffix not in builders:
        raise UserError(f"{spec}: text files end in .txt, .jsonl or .parquet, token ids in .npy")
    return _column(spec, path=builders[path.suffix], data_files=str(path), split="train")


def demo_documents(split: Split) -> list[str]:
    """Real English from gensim's test data: 300 news articles, or the prose of 106 Wikipedia pages."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise UserError("the demo text is not installed; run: pip install gensim==4.4.0")
    folder = Path(spec.origin).parent / "test" / "test_data"
    if split == "calibration":
        return [line.strip() for line in (folder / "lee_background.cor").read_text(encoding="utf-8").splitlines()]
    return list(_wikipedia_prose(folder / _DEMO_WIKIPEDIA))


def _wikipedia_prose(dump: Path) -> Iterator[str]:
    """The paragraphs of each article, without headings, lists, tables and markup."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(dump) as file:
        for _, markup, _ in extract_pages(file, ("0",)):
            if markup.lstrip().upper().startswith("#REDIRECT"):
                continue
            lines = (re.sub(r"'{2,}", "", line).strip() for line in filter_wiki(markup).splitlines())
            paragraphs = [line for line in lines if len(line) >= _SHORTEST_PARAGRAPH and line[0].isalnum()]
            if paragraphs:
                yield "\n\n".join(paragraphs)
