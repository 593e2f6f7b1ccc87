"""Training from scratch with sparse + low-rank attention: what the `train_*.py` recipes on sequences have in common.

A recipe describes its `Task` and calls `run`, which trains one small Transformer with each kind of attention, all alike, and
writes a table (Markdown) and the figures (JSON). As they are trained, it measures the entropy of the exact attention of the
models' queries and keys, and how far each approximation is from it (arXiv 2110.15343, Figure 8).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
import torch.nn.functional as F
from small_transformer import Answer, Transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sbpatch.attention import Geometry, sized_layer
from sbpatch.attention.per_head import Exact, Layer
from sbpatch.errors import SbpatchError
from sbpatch.measure import device_name
from sbpatch.plan.plan import versions
from sbpatch.sites.calls import Call
from sbpatch.sites.fidelity import head_profile, output_error

NAMES = {"scatterbrain": "reformer+favor", "performer": "favor"}  # any other name is that of a method of sbpatch
FULL = "full"  # exact attention
LOW_RANK = 0.25  # of the entries, where a method has two parts
IGNORED = -100  # a target that counts for nothing
PROBES = 8  # times that entropies and errors are measured in a training
PROBED = 4  # sequences on which they are


class Batch(NamedTuple):
    """`real` marks the tokens that are not padding; targets are (B, n) where each token is predicted from, else (B,)."""

    tokens: Tensor  # (B, n) int64
    targets: Tensor  # int64, `IGNORED` where nothing is asked
    real: Tensor | None = None  # (B, n) bool

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in self))

    def first(self, count: int) -> Batch:
        return Batch(*(None if x is None else x[:count] for x in self))


@dataclass(frozen=True)
class Task:
    """What is learned. `draw(count, generator)` gives training samples; `test` is never trained on."""

    name: str
    figure: str  # what is reported first: "perplexity" or "accuracy"
    vocabulary: int
    classes: int
    answer: Answer
    draw: Callable[[int, torch.Generator], Batch]
    test: Sequence[Batch]
    notes: dict[str, float]  # figures that the table needs beside it, such as chance

    @property
    def causal(self) -> bool:
        return self.answer == "each"


@dataclass
class Settings:
    """Sizes of a run; each is a flag."""

    tokens: int = 1024
    entries: int = 128  # that an approximation may store for one query row
    width: int = 64
    depth: int = 2
    heads: int = 4
    batch: int = 4
    steps: int = 1000
    lr: float = 1e-3
    base: float = 1e4  # of the rotary positions


# -- attention -------------------------------------------------------------------------------------------------------


def attention(method: str, site: Geometry, entries: int, seed: int) -> Layer:
    """The layer of one block, exact or of `entries` a query row."""
    if method == FULL:
        return Exact(site)
    return sized_layer(NAMES.get(method, method), site, entries, low_rank=LOW_RANK, seed=seed)


def geometry(task: Task, size: Settings) -> Geometry:
    return Geometry(size.tokens, size.heads, size.width // size.heads, causal=task.causal)


# -- training --------------------------------------------------------------------------------------------------------


def loss_of(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.inference_mode()
def figures(model: nn.Module, test: Sequence[Batch]) -> dict[str, float]:
    """Perplexity, and percent right, over all targets of the test samples."""
    loss, right, count = 0.0, 0, 0
    device = next(model.parameters()).device
    for batch in (on_host.to(device) for on_host in test):
        logits = model(batch.tokens, batch.real)
        loss += float(loss_of(logits, batch.targets, "sum"))
        right += int((logits.argmax(-1) == batch.targets).sum())
        count += int((batch.targets != IGNORED).sum())
    mean = torch.tensor(loss / count, dtype=torch.float64)
    return {"perplexity": float(mean.exp()), "accuracy": 100 * right / count}


@contextmanager
def calls_of(model: Transformer, causal: bool) -> Iterator[list[Call]]:
    """The attention calls of what runs inside, in the blocks' order."""
    calls: list[Call] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        q, k, v, real = inputs
        calls.append(Call(q, k, v, is_causal=causal, scale=None, key_mask=real))

    hooks = [block.attend.register_forward_hook(keep) for block in model.blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def probe(model: Transformer, task: Task, size: Settings, methods: Sequence[str], seed: int) -> dict[str, list[float]]:
    """For each block: the mean entropy of its exact attention in nats, and of each method how far its output is off."""
    device = next(model.parameters()).device
    batch = task.test[0].first(PROBED).to(device)
    with calls_of(model, task.causal) as calls:
        model(batch.tokens, batch.real)
    found = {"entropy": [float(head_profile(call)["entropy"].mean()) for call in calls]}
    for method in methods:
        layers = [attention(method, geometry(task, size), size.entries, seed + i).to(device) for i in range(len(calls))]
        found[method] = [
            float(output_error(call.through(layer), call.exact(), call.key_mask).mean())
            for call, layer in zip(calls, layers, strict=True)
        ]
    return found


class Drawn(IterableDataset[Batch]):
    """Training samples without end, batch after batch."""

    def __init__(self, task: Task, batch: int, generator: torch.Generator) -> None:
        self.task, self.batch, self.generator = task, batch, generator

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.task.draw(self.batch, self.generator)


def train(
    task: Task, size: Settings, method: str, seed: int, probed: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Train one model; its row of figures, with those of `probed` methods on the way."""
    torch.manual_seed(seed)  # the weights; the samples have a generator of their own, so that all methods see the same
    layers = [attention(method, geometry(task, size), size.entries, seed + i) for i in range(size.depth)]
    model = Transformer(task.vocabulary, task.classes, size.width, layers, task.answer, size.base).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.0, betas=(0.9, 0.98))
    drawn = Drawn(task, size.batch, torch.Generator().manual_seed(seed + 1))
    ahead = device.type != "cpu"  # another process draws samples while the device computes
    batches = iter(DataLoader(drawn, batch_size=None, num_workers=int(ahead), prefetch_factor=8 if ahead else None))
    warm_up, every = max(size.steps // 20, 1), max(size.steps // PROBES, 1)
    losses: list[float] = []
    course: list[dict[str, Any]] = []
    seconds = 0.0
    for step in range(1, size.steps + 1):
        began = time.process_time()
        batch = next(batches).to(device)
        for group in optimizer.param_groups:
            group["lr"] = size.lr * min(step / warm_up, 1.0, 4 - 4 * step / size.steps)  # falls in the last quarter
        loss = loss_of(model(batch.tokens, batch.real), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.process_time() - began
        if step % every == 0 or step == size.steps:
            seen = probe(model, task, size, probed, seed)
            course.append({"step": step, "loss": statistics.fmean(losses)} | seen)
            losses.clear()
            shown = " ".join(f"{x:.2f}" for x in seen["entropy"])
            print(f"{method}, seed {seed}, step {step}: loss {course[-1]['loss']:.4f}, entropy {shown}", flush=True)
    stored = size.tokens if method == FULL else model.blocks[0].attend.stored  # pairs with later tokens included
    row = {"method": method, "seed": seed, "stored": stored, "cpu_seconds": seconds, "course": course}
    return row | figures(model, task.test)


# -- one command -----------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """The type of a flag that counts something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def arguments(description: str, size: Settings, methods: Sequence[str], output: str) -> argparse.ArgumentParser:
    """The flags that all recipes have: the sizes of `Settings`, and what is run."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, value in asdict(size).items():
        parser.add_argument(f"--{name}", type=positive if isinstance(value, int) else float, default=value)
    parser.add_argument("--methods", nargs="+", default=list(methods), help="full, or names of sbpatch's methods")
    parser.add_argument("--seeds", type=positive, default=1, help="models of each method")
    parser.add_argument("--json", type=Path, default=Path(output), help="figures; the table lies beside it, as .md")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    return parser


def settings(args: argparse.Namespace) -> Settings:
    return Settings(**{name: getattr(args, name) for name in asdict(Settings())})


def run(parser: argparse.ArgumentParser, task: Callable[[argparse.Namespace], Task]) -> None:
    """The command: read its flags and train on the task that they ask for. What sbpatch refuses ends it with one line."""
    args = parser.parse_args()
    try:
        train_all(task(args), args)
    except SbpatchError as error:
        raise SystemExit(str(error)) from error


def train_all(task: Task, args: argparse.Namespace) -> None:
    """Train what the file of figures does not have yet, and write it and its table after each model.

    Raises:
        SbpatchError: an approximation that cannot be, before anything is trained.
    """
    torch.set_num_threads(args.threads)
    size = settings(args)
    head = {"task": task.name, "settings": asdict(size), "notes": task.notes}
    file = args.json.with_suffix(".json")
    result: dict[str, Any] = head | {"versions": versions(), "device": device_name(args.device.type), "rows": []}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        if {name: result[name] for name in head} != head:
            raise SystemExit(f"{file} holds runs of other settings; name another file with --json")
    rows = result["rows"]
    approximations = [method for method in args.methods if method != FULL]
    for method in approximations:
        attention(method, geometry(task, size), size.entries, 0)
    for seed in range(args.seeds):
        for method in args.methods:
            if any((row["method"], row["seed"]) == (method, seed) for row in rows):
                continue
            rows.append(train(task, size, method, seed, approximations if method == FULL else [method], args.device))
            results.write(file, tables(task, result), result)
    print(tables(task, result))


def tables(task: Task, result: dict[str, Any]) -> str:
    """Figures by method, and what the exact attention was like as the full model of the first seed was trained."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    lines = []
    for method, rows in by_method.items():
        each = [row[task.figure] for row in rows]
        last = [row["course"][-1] for row in rows]
        entropy = statistics.fmean(x for end in last for x in end["entropy"])
        error = "0" if method == FULL else f"{statistics.fmean(x for end in last for x in end[method]):.3f}"
        seconds = statistics.fmean(row["cpu_seconds"] for row in rows)
        found = (f"{statistics.fmean(each):.2f}", joined(each, ", "), f"{entropy:.2f}", error, f"{seconds:.0f}")
        lines.append((method, f"{rows[0]['stored']:.0f}", *found))
    names = ("attention", "entries a row", task.figure, "of each seed", "entropy", "output error", "CPU seconds")
    parts = [results.table(names, lines)]
    if FULL in by_method:
        course = by_method[FULL][0]["course"]
        kinds = [name for name in course[0] if name not in ("step", "loss")]  # the entropy, then methods
        lines = [(at["step"], f"{at['loss']:.3f}", *(joined(at[kind]) for kind in kinds)) for at in course]
        parts.append(results.table(("step", "loss", "entropy by block", *kinds[1:]), lines))
    if result["notes"]:
        parts.append("; ".join(f"{name}: {value:.2f}" for name, value in result["notes"].items()) + "\n")
    return "\n".join(parts)


def joined(values: Sequence[float], between: str = " ") -> str:
    return between.join(f"{x:.2f}" for x in values)
