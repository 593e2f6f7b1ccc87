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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain, sized_layer
from sbpatch.attention.per_head import Exact
from sbpatch.errors import SbpatchError
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


@dataclass(frozen=True)
class Task:
    """What is learned. `draw(count, generator)` gives training samples; `test` is never trained on."""

    name: str
    figure: str  # what is reported first: "perplexity" or "accuracy"
    vocabulary: int
    classes: int
    causal: bool  # each token predicts from those before it; else one answer a sequence
    draw: Callable[[int, torch.Generator], Batch]
    test: Sequence[Batch]
    notes: dict[str, float]  # figures that the table needs beside it, such as chance


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


# -- the model -------------------------------------------------------------------------------------------------------


def attention(method: str, site: Geometry, entries: int, seed: int) -> Exact | Scatterbrain:
    """The layer of one block, exact or of `entries` a query row."""
    if method == FULL:
        return Exact(site)
    return sized_layer(NAMES.get(method, method), site, entries, low_rank=LOW_RANK, seed=seed)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864): pairs of coordinates of q and k turn by the token's place."""

    turn: Tensor  # (2, n, d): cosines and sines

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(tokens), 1e4 ** -torch.linspace(0, 1, width // 2)).repeat(1, 2)
        self.register_buffer("turn", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.turn[0] + torch.cat((-second, first), -1) * self.turn[1]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a normalisation and added to its input."""

    def __init__(self, width: int, heads: int, rotary: Rotary, attend: Exact | Scatterbrain) -> None:
        super().__init__()
        self.heads, self.rotary, self.attend = heads, rotary, attend
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, d) each
        x = x + self.out(self.attend(self.rotary(q), self.rotary(k), v, real).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Tokens (B, n) -> logits (B, n, classes) of a causal task, (B, classes) of another one."""

    def __init__(self, task: Task, size: Settings, method: str, seed: int) -> None:
        super().__init__()
        self.causal = task.causal
        self.embedding = nn.Embedding(task.vocabulary, size.width)
        site = geometry(task, size)
        rotary = Rotary(size.tokens, site.head_dim)
        layers = [attention(method, site, size.entries, seed + i) for i in range(size.depth)]
        self.blocks = nn.ModuleList(Block(size.width, size.heads, rotary, layer) for layer in layers)
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, task.classes)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, real)
        if not self.causal:  # the first token answers
            x = x[:, 0]
        return self.head(self.norm(x))


def geometry(task: Task, size: Settings) -> Geometry:
    return Geometry(size.tokens, size.heads, size.width // size.heads, causal=task.causal)


# -- training --------------------------------------------------------------------------------------------------------


def loss_of(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.inference_mode()
def figures(model: nn.Module, test: Sequence[Batch]) -> dict[str, float]:
    """Perplexity, and percent right, over all targets of the test samples."""
    loss, right, count = 0.0, 0, 0
    for batch in test:
        logits = model(batch.tokens, batch.real)
        loss += float(loss_of(logits, batch.targets, "sum"))
        right += int((logits.argmax(-1) == batch.targets).sum())
        count += int((batch.targets != IGNORED).sum())
    mean = torch.tensor(loss / count, dtype=torch.float64)
    return {"perplexity": float(mean.exp()), "accuracy": 100 * right / count}


@contextmanager
def calls_of(model: Transformer) -> Iterator[list[Call]]:
    """The attention calls of what runs inside, in the blocks' order."""
    calls: list[Call] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        q, k, v, real = inputs
        calls.append(Call(q, k, v, is_causal=model.causal, scale=None, key_mask=real))

    hooks = [block.attend.register_forward_hook(keep) for block in model.blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def probe(model: Transformer, task: Task, size: Settings, methods: Sequence[str], seed: int) -> dict[str, list[float]]:
    """For each block: the mean entropy of its exact attention in nats, and of each method how far its output is off."""
    batch = task.test[0]
    with calls_of(model) as calls:
        model(batch.tokens[:PROBED], None if batch.real is None else batch.real[:PROBED])
    found = {"entropy": [float(head_profile(call)["entropy"].mean()) for call in calls]}
    for method in methods:
        layers = [attention(method, geometry(task, size), size.entries, seed + i) for i in range(len(calls))]
        found[method] = [
            float(output_error(call.through(layer), call.exact(), call.key_mask).mean())
            for call, layer in zip(calls, layers, strict=True)
        ]
    return found


def train(task: Task, size: Settings, method: str, seed: int, probed: Sequence[str]) -> dict[str, Any]:
    """Train one model; its row of figures, with those of `probed` methods on the way."""
    torch.manual_seed(seed)  # the weights; the samples have a generator of their own, so that all methods see the same
    model = Transformer(task, size, method, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed + 1)
    warm_up, every = max(size.steps // 20, 1), max(size.steps // PROBES, 1)
    losses: list[float] = []
    course: list[dict[str, Any]] = []
    seconds = 0.0
    for step in range(1, size.steps + 1):
        began = time.process_time()
        batch = task.draw(size.batch, generator)
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


def arguments(description: str, size: Settings, methods: Sequence[str], output: str) -> argparse.ArgumentParser:
    """The flags that all recipes have: the sizes of `Settings`, and what is run."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, value in asdict(size).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--methods", nargs="+", default=list(methods), help="full, or names of sbpatch's methods")
    parser.add_argument("--seeds", type=int, default=1, help="models of each method")
    parser.add_argument("--json", type=Path, default=Path(output), help="figures; the table lies beside it, as .md")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def settings(args: argparse.Namespace) -> Settings:
    return Settings(**{name: getattr(args, name) for name in asdict(Settings())})


def run(task: Task, args: argparse.Namespace) -> None:
    """Train what the file of figures does not have yet, and write it and its table after each model."""
    torch.set_num_threads(args.threads)
    size = settings(args)
    head = {"task": task.name, "settings": asdict(size), "notes": task.notes}
    result: dict[str, Any] = head | {"versions": versions(), "threads": args.threads, "rows": []}
    if args.json.exists():
        result = json.loads(args.json.read_text(encoding="utf-8"))
        if {name: result[name] for name in head} != head:
            raise SystemExit(f"{args.json} holds runs of other settings; name another file with --json")
    rows = result["rows"]
    approximations = [method for method in args.methods if method != FULL]
    try:  # refuse what cannot be before anything is trained
        for method in approximations:
            attention(method, geometry(task, size), size.entries, 0)
    except SbpatchError as error:
        raise SystemExit(str(error)) from error
    for seed in range(args.seeds):
        for method in args.methods:
            if any((row["method"], row["seed"]) == (method, seed) for row in rows):
                continue
            rows.append(train(task, size, method, seed, approximations if method == FULL else [method]))
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            args.json.with_suffix(".md").write_text(tables(task, result), encoding="utf-8")
    print(tables(task, result))


def tables(task: Task, result: dict[str, Any]) -> str:
    """Figures by method, and what the exact attention was like as the full model of the first seed was trained."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    lines = [f"| attention | entries a row | {task.figure} | of each seed | entropy | output error | CPU seconds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for method, rows in by_method.items():
        each = [row[task.figure] for row in rows]
        last = [row["course"][-1] for row in rows]
        entropy = statistics.fmean(x for end in last for x in end["entropy"])
        error = "0" if method == FULL else f"{statistics.fmean(x for end in last for x in end[method]):.3f}"
        seconds = statistics.fmean(row["cpu_seconds"] for row in rows)
        cells = (f"{rows[0]['stored']:.0f}", f"{statistics.fmean(each):.2f}", ", ".join(f"{x:.2f}" for x in each))
        lines.append(f"| {method} | {' | '.join(cells)} | {entropy:.2f} | {error} | {seconds:.0f} |")
    full = next(iter(by_method.get(FULL, [])), None)
    if full is not None:
        names = [name for name in full["course"][0] if name not in ("step", "loss", "entropy")]
        lines += ["", f"| step | loss | entropy by block | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
        for at in full["course"]:
            cells = [" ".join(f"{x:.2f}" for x in at[name]) for name in ("entropy", *names)]
            lines.append(f"| {at['step']} | {at['loss']:.3f} | {' | '.join(cells)} |")
    notes = [f"{name}: {value:.2f}" for name, value in result["notes"].items()]
    return "\n".join([*lines, *(["", "; ".join(notes)] if notes else [])]) + "\n"
