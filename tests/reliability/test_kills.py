"""Runs that are stopped or killed at any moment: the old result or none, the same plan afterwards, nothing left behind.

A run is a process of its own, forked from the tests so that nothing is imported again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import command, tree
from conftest import QUICK
from tiny import ROOT

CALIBRATE = ["calibrate", "tiny.pth", "-o", "new", *QUICK, "--samples", "6"]


def started(arguments: list[str]) -> int:
    """A process that runs the command, its output in `said`."""
    child = os.fork()
    if child:
        return child
    try:
        output = os.open("../said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os._exit(command(*arguments))
    finally:
        os._exit(99)


def ended(child: int) -> int:
    """Its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def living(group: int) -> list[str]:
    """Processes of a group that have not ended; one that has may wait to be reaped by whoever inherits it."""
    found = []
    for process in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = process.read_text().rsplit(")", 1)
        except OSError:  # gone meanwhile
            continue
        state, _, owner = rest.split()[:3]
        if int(owner) == group and state != "Z":
            found.append(name)
    return found


def seconds_of(arguments: list[str]) -> float:
    start = time.perf_counter()
    assert ended(started(arguments)) == 0, Path("../said").read_text()
    return time.perf_counter() - start


def killed_often(times: int, seed: int) -> int:
    """Runs killed at random moments one after the other, then one that is not; how many were hit before they were done."""
    draw = random.Random(seed)
    whole = min(seconds_of([x if x != "new" else "expected" for x in CALIBRATE]) for _ in range(2))
    expected = tree(Path("expected"))
    before = tree(Path())
    hit = 0
    for _ in range(times):
        child = started(CALIBRATE)
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        hit += ended(child) == -signal.SIGKILL
        if Path("new").exists():
            assert tree(Path("new")).keys() == expected.keys()
            assert tree(Path("new"))["sbpatch.json"] == expected["sbpatch.json"]
    assert ended(started(CALIBRATE)) == 0, Path("../said").read_text()
    after = tree(Path())
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"new"}
    for name, content in tree(Path("new")).items():
        assert name == "report.png" or content == expected[name], name
    return hit


def test_killed_calibrations_lose_nothing(place):
    assert killed_often(6, seed=0) >= 2


@pytest.mark.slow
def test_fifty_kills(place):
    assert killed_often(50, seed=1) >= 15


def test_a_result_that_was_there_survives_kills(place):
    before = tree(Path("out"))
    again = ["calibrate", "tiny.pth", "-o", "out", *QUICK, "--seed", "5"]
    for delay in (0.0, 0.1, 0.2, 0.3, 0.4):
        child = started(again)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        ended(child)
        now = tree(Path("out"))
        assert now == before or b'"seed": 5' in now["sbpatch.json"]
        assert now.keys() == before.keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9])
def test_a_stopped_run_ends_in_one_line(place, number, share):
    whole = seconds_of([x if x != "new" else "../first" for x in CALIBRATE])
    before = tree(Path())
    child = started(CALIBRATE)
    time.sleep(share * whole)
    os.kill(child, number)
    code = ended(child)
    said = Path("../said").read_text()
    assert code in (0, 128 + number, -number), said  # done before, or hit before it listened
    assert "Traceback" not in said
    if code == 128 + number:
        assert said == f"sbpatch: stopped by {number.name}\n"
        assert tree(Path()).keys() - before.keys() <= {".new.calibrating"}  # what was measured, to go on with
        assert ended(started(CALIBRATE)) == 0
        assert {name.split("/")[0] for name in tree(Path()).keys() - before.keys()} == {"new"}
        assert tree(Path("new"))["sbpatch.json"] == tree(Path("../first"))["sbpatch.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "arguments"),
    [
        (0.5, ["inspect", "tiny.pth"]),
        (2.0, ["inspect", "tiny.pth"]),
        (4.0, CALIBRATE),
        (9.0, ["eval", "out", "--dataset", "images", "--limit", "2"]),
        (16.0, ["eval", "out", "--dataset", "images", "--limit", "2"]),
    ],
)
def test_an_interrupt_from_the_terminal(place, delay, arguments):
    """It reaches the whole group, also while everything is still imported; no process of the group is left."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = tree(Path())
    process = subprocess.Popen(
        [sys.executable, "-m", "sbpatch.cli", *arguments, "--quiet"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 130), said
    if process.returncode == 130:
        assert said == "sbpatch: stopped by SIGINT\n"
        assert tree(Path()).keys() - before.keys() <= {".new.calibrating"}
    time.sleep(1)
    assert not living(process.pid)
