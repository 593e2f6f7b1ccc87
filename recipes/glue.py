"""GLUE: fine-tune a BERT-like classifier whose attention is sparse + low-rank from the start, beside one with exact attention.

    python recipes/glue.py --model bert-base-uncased --task sst2 -o glue-sst2
    python recipes/glue.py --model DIR --task mrpc --data FOLDER -o glue-mrpc

For each of `--methods` a model is read anew, every attention of it gets a layer of that method which stores half of the entries
of 128 tokens (`--share`), and `transformers.Trainer` trains it for 3 epochs at 3e-5 in batches of 32: the setting of the
Scatterbrain paper (arXiv 2110.15343, Table 8). glue-sst2.md is a table of what each reached in validation, glue-sst2.json has
the same with the settings. FOLDER has train.tsv and dev.tsv as GLUE publishes them; without it `datasets` asks the hub.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
from datasets import Dataset, load_dataset
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import cuda, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sbpatch.attention import sized_layer
from sbpatch.errors import SbpatchError
from sbpatch.plan.plan import versions
from sbpatch.sites import find_sites
from sbpatch.sites.swap import PatchedSite, swap

TOKENS = 128
EPOCHS, BATCH, RATE = 3, 32, 3e-5
EXACT = "exact"
METHODS = f"{EXACT},lsh+favor,favor,window+clusters"
METRICS: Mapping[str, Callable[[Any, Any], Any]] = {
    "accuracy": accuracy_score,
    "F1": f1_score,
    "Matthews": matthews_corrcoef,
    "Pearson": lambda y, found: pearsonr(y, found).statistic,
    "Spearman": lambda y, found: spearmanr(y, found).statistic,
}


@dataclass(frozen=True)
class Task:
    """A task of GLUE: the columns of its texts on the hub and in its .tsv files, its labels in order, what is reported."""

    texts: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    labels: tuple[str, ...] = ("0", "1")  # none: the label is a number to predict
    columns: tuple[str, ...] = ()  # in the files, where they are not `texts`
    label: str = "label"  # its column in the files
    header: tuple[str, ...] | None = None  # of files that have no line of names
    dev: str = "dev"
    validation: str = "validation"


PAIR, ENTAILED = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("Matthews",), header=("source", "label", "note", "sentence")),
    "sst2": Task(("sentence",)),
    "mrpc": Task(PAIR, ("accuracy", "F1"), columns=("#1 String", "#2 String"), label="Quality"),
    "stsb": Task(PAIR, ("Pearson", "Spearman"), labels=(), label="score"),
    "qqp": Task(("question1", "question2"), ("accuracy", "F1"), label="is_duplicate"),
    "mnli": Task(
        ("premise", "hypothesis"), labels=("entailment", "neutral", "contradiction"), columns=PAIR, label="gold_label",
        dev="dev_matched", validation="validation_matched",
    ),
    "qnli": Task(("question", "sentence"), labels=ENTAILED),
    "rte": Task(PAIR, labels=ENTAILED),
}  # fmt: skip


def examples(name: str, folder: Path | None, cache: Path) -> tuple[Dataset, Dataset]:
    """The training and validation part, with a column `label` and columns of texts."""
    task = TASKS[name]
    if folder is None:
        found = load_dataset("nyu-mll/glue", name)
        return found["train"], found[task.validation]
    files = {part: str(folder / f"{file}.tsv") for part, file in (("train", "train"), ("dev", task.dev))}
    found = load_dataset(
        "csv", data_files=files, delimiter="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, cache_dir=str(cache),
        column_names=None if task.header is None else list(task.header),
    )  # fmt: skip

    def row(line: dict[str, Any]) -> dict[str, Any]:
        texts = {text: str(line[column]) for text, column in zip(task.texts, task.columns or task.texts, strict=True)}
        label = line[task.label]
        return texts | {"target": task.labels.index(str(label)) if task.labels else float(label)}

    parts = [found[part].map(row, remove_columns=found[part].column_names) for part in ("train", "dev")]
    return parts[0].rename_column("target", "label"), parts[1].rename_column("target", "label")


def tokenized(data: Dataset, tokenizer: Any, texts: tuple[str, ...]) -> Dataset:
    def encode(rows: dict[str, Any]) -> Any:
        return tokenizer(*(rows[text] for text in texts), truncation=True, max_length=TOKENS, padding="max_length")

    return data.map(encode, batched=True, remove_columns=[c for c in data.column_names if c != "label"])


def classifier(model: str, labels: int, method: str, share: float, example: Any, seed: int) -> tuple[nn.Module, float]:
    """The model with a new head for so many labels (0: a number), patched; and the share of the entries that it stores."""
    config = AutoConfig.from_pretrained(model, num_labels=labels or 1)
    for dropout in ("attention_probs_dropout_prob", "attention_dropout"):  # there is no matrix to drop entries of
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    network = AutoModelForSequenceClassification.from_pretrained(model, config=config)
    if method == EXACT:
        return network, 1.0
    sites = find_sites(network, example)
    try:
        layers = [
            sized_layer(method, site.geometry, share * site.geometry.row_keys, seed=seed + i)
            for i, site in enumerate(sites)
        ]
    except SbpatchError as error:
        raise SystemExit(f"{error}: give a larger --share") from error
    swap(network, {site.name: PatchedSite(site.name, each) for site, each in zip(sites, layers, strict=True)})
    return network, float(np.mean([each.stored / each.site.row_keys for each in layers]))


def figures(task: Task, logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    found = logits.argmax(-1) if task.labels else logits[:, 0]
    return {name: float(METRICS[name](labels, found)) for name in task.metrics}


def run(args: argparse.Namespace) -> dict[str, Any]:
    task = TASKS[args.task]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = examples(args.task, args.data, args.output / "cache")
    training, validation = (tokenized(part, tokenizer, task.texts) for part in parts)
    example = {name: x for name, x in validation.with_format("torch")[:2].items() if name != "label"}
    result: dict[str, Any] = {"task": args.task, "model": args.model, "share": args.share, "epochs": args.epochs}
    result |= {"steps": args.steps, "batch": args.batch, "rate": args.rate, "seed": args.seed, "versions": versions()}
    result |= {"training": len(training), "validation": len(validation), "rows": []}
    for method in args.methods.split(","):
        arguments = TrainingArguments(
            str(args.output / "trainer"), num_train_epochs=args.epochs, max_steps=args.steps or -1, seed=args.seed,
            per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch, learning_rate=args.rate,
            save_strategy="no", report_to=[], use_cpu=not cuda.is_available(),
        )  # fmt: skip
        set_seed(args.seed)  # the new head is the same for all
        network, stored = classifier(args.model, len(task.labels), method, args.share, example, args.seed)
        trainer = Trainer(network, arguments, train_dataset=training)
        trainer.train()
        answer = trainer.predict(validation)
        found = figures(task, answer.predictions, answer.label_ids)
        result["rows"].append({"method": method, "stored": stored, **found})
        print(table(result["rows"]).splitlines()[-1], flush=True)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in ("method", "stored")]
    cells = ((r["method"], *(f"{r[name]:.3f}" for name in ("stored", *names))) for r in rows)
    return results.table(("method", "stored of the entries", *names), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base-uncased", help="of the hub, or a directory of transformers")
    parser.add_argument("--task", choices=sorted(TASKS), default="sst2")
    parser.add_argument("--data", type=Path, help="folder of the task's train.tsv and dev.tsv; default: the hub's")
    parser.add_argument("--methods", default=METHODS, help="comma-separated; exact: as it is")
    parser.add_argument("--share", type=float, default=0.5, help="entries stored / entries of exact attention")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("glue"), help="work files; and .md and .json beside it"
    )
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--steps", type=int, help="in place of epochs")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args)
    results.write(args.output, table(result["rows"]), result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
