"""Commands under a launcher: two and three processes give what one gives, speak once, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import jpeg, place, texts  # noqa: F401
from tiny import ROOT, command

from sbpatch import processes
from sbpatch.study.oracles import process_sweep

TIMED = ("latency_ms", "samples_per_second", "time_to_first_token_ms", "ms", "robust_pca_ms", "median_time_ratio")
# The command, which counts in a file of each process how often the exact model runs for what is measured.
COUNTING = """
import atexit, json, os
from collections import Counter
from sbpatch.calibration import refine, trial
from sbpatch.cli import main

runs = Counter()
for module, name in ((trial, "observed"), (trial, "with_gradients"), (refine, "answer_gradients")):
    def counted(*args, work=getattr(module, name), key=module.__name__.split(".")[-1] + "." + name, **options):
        runs[key] += 1
        return work(*args, **options)
    setattr(module, name, counted)
atexit.register(lambda: open(f"runs-{os.environ['RANK']}", "w").write(json.dumps(runs)))
main()
"""
# The command with shorter sites and a shorter sweep.
SHORT = """
from functools import partial
from sbpatch.cli import main
from sbpatch.study import analyze

analyze.TOKENS, analyze.process_sweep = 64, partial(analyze.process_sweep, betas=2)
main()
"""
# What a process of another rank than 0 does in place of the comparison: nothing, as it is killed, or fails alone.
STRICKEN = """
import os, signal, sys
import sbpatch.study.compare as compare
from sbpatch.cli import main
from sbpatch.errors import SbpatchError

def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def failing(*args, **kwargs):
    raise SbpatchError("only here")

if os.environ["RANK"] == "1":
    compare.compare = {"killed": killed, "failing": failing}[sys.argv.pop(1)]
else:
    sys.argv.pop(1)
main()
"""


@pytest.fixture
def five(place: Path) -> None:  # noqa: F811
    """Images of as many classes as the model has."""
    for name in "de":
        Path("images", name).mkdir()
        Path("images", name, "0.jpg").write_bytes(jpeg(ord(name)))


def launched(
    count: int, *args: str, program: tuple[str, ...] = ("-m", "sbpatch.cli")
) -> subprocess.CompletedProcess[str]:
    """`torchrun` of that many processes, with the threads of the tests."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*start, *program, *args], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def own_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What sbpatch itself said on standard error: the launcher adds a report of its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("sbpatch: ")]


def without_times(result: Any) -> Any:
    if isinstance(result, dict):
        return {key: without_times(value) for key, value in result.items() if key not in (*TIMED, "processes")}
    return [without_times(value) for value in result] if isinstance(result, list) else result


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_shares_are_all_items_once_and_in_order_again(items, size):
    shares = [processes.Group(rank, size).share(items) for rank in range(size)]
    assert processes.in_order(shares) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 9), st.data())
def test_teams_do_every_part_of_every_item_once(size, data):
    """The parts that the teams of a round have, put together again, are those of each item, in order."""
    items = data.draw(st.integers(1, size))
    parts = list(range(data.draw(st.integers(0, 12))))
    shares, taken = [], []
    for rank in range(size):
        processes._here = processes.Group(rank, size)
        teams = processes.Teams(items)
        taken.append(teams.item)
        shares.append(teams.share(parts))
    assert set(taken) == set(range(items))
    assert all(teams.in_order(item, shares) == parts for item in range(items))
    assert [len(some) for some in processes.rounds(range(2 * size + items))] == [size, size, items]
    processes._here = processes.ALONE


def test_one_process_takes_all():
    assert processes.count() == 1
    assert processes.is_first()
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gathered({"x": 0.1}) == [{"x": 0.1}]
    assert processes.from_first(lambda: 5) == 5
    assert processes.rounds("abc") == ["a", "b", "c"]
    assert processes.gathered_tensors({"x": torch.ones(2)})[0]["x"].tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("texts")
def test_eval_of_two_processes_is_that_of_one(capsys):
    """Seven windows in batches of two: the last batch is short, and each process has two."""
    args = ("eval", "llama", "--dataset", "text.txt", "--length", "48", "--limit", "7", "--batch-size", "2", "--json")
    done = launched(2, *args, "two.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("llama on text.txt") == 1  # the table, once
    assert command(*args, "one.json") == 0
    assert "llama on text.txt" in capsys.readouterr().out
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert without_times(two["variants"]) == without_times(one["variants"])  # bit for bit
    assert one["variants"]["sdpa"]["perplexity"] > 1
    assert one["variants"].keys() == two["variants"].keys()


@pytest.mark.slow
def test_calibrate_of_three_processes_is_that_of_one():
    """The same plan and the same tensors, bit for bit, and nothing else is written."""
    args = ["calibrate", "tiny.pth", "--samples", "9", "--budget", "0.2", "--data", "images", "--keep-slow"]
    done = launched(3, *args, "-o", "many", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to many") == 1
    assert command(*args, "-o", "one", "--quiet") == 0
    for name in ("sbpatch.json", "sbpatch.safetensors", "README.md", "model.safetensors"):
        assert Path("many", name).read_bytes() == Path("one", name).read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["images", "many", "one", "tiny.pth"]


@pytest.mark.slow
def test_the_exact_model_runs_once_a_sample_whatever_the_number_of_processes():
    """For the entropy and in learning; for the gradients at first on two samples, twice, then on the others."""
    Path("counting.py").write_text(COUNTING)
    args = ["calibrate", "tiny.pth", "--samples", "8", "--budget", "0.2", "--data", "images", "--keep-slow"]
    done = launched(2, *args, "--dry-run", "--method", "clusters", "--device", "cpu", program=("counting.py",))
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [json.loads(Path(f"runs-{rank}").read_text()) for rank in range(2)]
    assert [run["trial.observed"] for run in runs] == [4, 4]
    assert [run["trial.with_gradients"] for run in runs] == [5, 5]
    assert [run["refine.answer_gradients"] for run in runs] == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_analyze_of_several_processes_is_that_of_one(count):
    """Three samples: with two processes the second has none in the last round."""
    Path("short.py").write_text(SHORT)
    args = ["analyze", "tiny.pth", "--data", "images", "--samples", "3", "--device", "cpu"]
    done = launched(count, *args, "-o", "many", "--json", "many.json", program=("short.py",))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to many") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbpatch.study.analyze.TOKENS", 64)
        patch.setattr("sbpatch.study.analyze.process_sweep", partial(process_sweep, betas=2))
        assert command(*args, "-o", "one", "--quiet") == 0
    one, many = (without_times(json.loads(Path(name, "analysis.json").read_text())) for name in ("one", "many"))
    assert many == one
    assert without_times(json.loads(Path("many.json").read_text())) == many
    assert len(one["points"]) == 9  # three sites of one head
    assert sorted(path.name for path in Path("many").iterdir()) == sorted(path.name for path in Path("one").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("five")
def test_compare_of_two_processes_is_that_of_one():
    args = ["compare", "tiny.pth", "--dataset", "images", "--data", "images", "--samples", "4", "--budgets", "0.2"]
    args += ["--methods", "window,clusters,favor", "--quiet", "--json"]
    done = launched(2, *args, "two.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    assert command(*args, "one.json") == 0
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert [row["method"] for row in two["rows"]] == ["exact", "window", "clusters", "favor"]
    assert without_times(two["rows"]) == without_times(one["rows"])


@pytest.mark.slow
@pytest.mark.usefixtures("five")
@pytest.mark.parametrize("how", ["killed", "failing"])
def test_a_process_that_dies_ends_all_with_one_line(how):
    Path("stricken.py").write_text(STRICKEN)
    before = sorted(Path().rglob("*"))
    args = ["compare", "tiny.pth", "--dataset", "images", "--data", "images", "--samples", "4", "--budgets", "0.2"]
    args += ["--methods", "window,clusters", "--json", "x.json"]
    done = launched(2, how, *args, program=("stricken.py",))
    assert done.returncode != 0
    (line,) = own_lines(done)
    assert ("only here" if how == "failing" else "another process of this run") in line
    assert done.stderr.count("Traceback") == 1  # the launcher's own report
    assert sorted(Path().rglob("*")) == before
