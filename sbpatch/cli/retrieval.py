"""`sbpatch eval --dataset passkey|needle`: what the model finds again in its context, exact and patched side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import retrieval as data
from ..data.preprocessing import TextPreprocessing
from ..data.texts import open_text
from ..evaluation import Subject, retrieval_report
from ..measure import device_name
from ..models.checkpoint import Checkpoint
from ..plan.plan import Plan, versions
from ..study.bench_model import at_length
from .decoding import check_decodes
from .flags import progress_bars
from .results import out, write_plot

EACH = 4  # tasks a depth


def retrieval_figures(
    subject: Subject,
    loaded: Checkpoint,
    plan: Plan | None,
    dataset: str,
    data_dir: Path | None,
    lengths: Sequence[int] | None,
    limit: int | None,
    seed: int,
    plot: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """The figures of `evaluation.retrieval` at each length, for the variants of `evaluation.decoding`.

    Of one length, a variant's figures are those of that length; of several, its accuracy over all tasks, and `by_length`.

    Raises:
        SbpatchError: the model is no causal language model, or has no positions for a length, or the text is too short for it.
    """
    check_decodes(loaded, f"--dataset {dataset}")
    from ..evaluation.decoding import variants_of  # transformers is slow to import, and there by now
    from ..evaluation.retrieval import retrieval

    assert isinstance(loaded.preprocessing, TextPreprocessing)
    text = open_text("wikitext-2" if data_dir else "python-docs", data_dir=data_dir)
    each = EACH if limit is None else max(1, limit // len(data.DEPTHS))
    tasks = {}
    for tokens in lengths or [loaded.preprocessing.tokens]:
        preprocessing = at_length(loaded, tokens).preprocessing
        assert isinstance(preprocessing, TextPreprocessing)
        tasks[tokens] = data.tasks(dataset, text, preprocessing, each=each, seed=seed)
    bars = progress_bars(quiet)
    found: dict[int, dict[str, dict[str, Any]]] = {tokens: {} for tokens in tasks}
    for name, (model, make_cache) in variants_of(subject, loaded.preprocessing.probe()).items():
        for tokens, some in tasks.items():
            found[tokens][name] = retrieval(model, some, make_cache=make_cache, progress=bars)
    title, model_name = f"{dataset} in {text.name}", plan.model if plan else loaded.name
    chance = retrieval_report.Chance(data.CHANCE[dataset], each * len(data.DEPTHS))
    if not quiet:
        out.print(retrieval_report.table(found, f"{title}, {model_name}", chance))
    write_plot(plot, lambda fresh: retrieval_report.plot(found, fresh, title, model_name))
    return {
        "model": model_name,
        "dataset": title,
        "samples": sum(map(len, tasks.values())),
        **({"length": next(iter(tasks))} if len(tasks) == 1 else {"lengths": list(tasks)}),
        "chance": chance.percent,
        "near_chance": chance.lengths(found),
        "seed": seed,
        "device": device_name(subject.device),
        "dtype": subject.dtype,
        "versions": versions(),
        "variants": retrieval_report.by_variant(found),
    }
