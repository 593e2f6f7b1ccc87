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
from contextlib import suppress
from pathlib import Path

import pytest
from cases import command, tree
from conftest import QUICK
from tiny import ROOT

FEW, MANY, OF_AN_EXPORTER = 6, {"calibrate": 50, "export": 20, "finetune": 20}, 3  # kills in each test
OVER_A_RESULT, OF_AN_EVAL = (0.0, 0.1, 0.2, 0.3, 0.4), (8.0, 13.0)  # seconds after which one comes
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


def result(arguments: list[str], name: str) -> list[str]:
    """The same run with another target than `new`."""
    return [x.replace("new", name) for x in arguments]


def of(name: str) -> dict[str, bytes]:
    """The files of a result, a single one too, but the plot with its times."""
    found = tree(Path(name)) if Path(name).is_dir() else {"": Path(name).read_bytes()}
    return {key: content for key, content in found.items() if key != "report.png"}


def killed_often(arguments: list[str], times: int, seed: int, target: str = "new", same: bool = True) -> int:
    """Runs killed at random moments one after the other, then one that is not; how many were hit before they were done.

    `same`: every run writes the same bits.
    """
    draw = random.Random(seed)
    whole = min(seconds_of(result(arguments, "expected")) for _ in range(2))
    expected = of(target.replace("new", "expected"))
    before = tree(Path())
    hit = 0
    for _ in range(times):
        child = started(arguments)
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        hit += ended(child) == -signal.SIGKILL
        if Path(target).exists():
            assert of(target).keys() == expected.keys()
            assert of(target) == expected or not same
    assert ended(started(arguments)) == 0, Path("../said").read_text()
    assert {name.split("/")[0] for name in tree(Path()).keys() - before.keys()} == {target}
    assert of(target) == expected or not same
    return hit


def test_killed_calibrations_lose_nothing(place):
    assert killed_often(CALIBRATE, FEW, seed=0) >= 2


@pytest.mark.slow
def test_fifty_kills(place):
    assert killed_often(CALIBRATE, MANY["calibrate"], seed=1) >= 15


COPY = ["export", "out", "--format", "safetensors", "-o", "new", "--quiet"]
TUNE = ["finetune", "out", "--dataset", "images", "-o", "new", "--steps", "4", "--validation", "2", "--batch-size", "2",
        "--quiet", "--device", "cpu"]  # fmt: skip
PT2 = ["export", "out", "-o", "new.pt2", "--quiet"]
ONNX = ["export", "out", "--format", "onnx", "-o", "new.onnx", "--quiet"]
OTHERS = {"export": COPY, "finetune": TUNE}


@pytest.mark.parametrize("verb", OTHERS)
def test_killed_exports_and_finetunings_lose_nothing(place, verb):
    assert killed_often(OTHERS[verb], FEW, seed=2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("verb", OTHERS)
def test_many_kills_of_exports_and_finetunings(place, verb):
    assert killed_often(OTHERS[verb], MANY[verb], seed=3) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "target"), [(PT2, "new.pt2"), (ONNX, "new.onnx")], ids=["pt2", "onnx"])
def test_killed_exporters_lose_nothing(place, arguments, target):
    assert killed_often(arguments, OF_AN_EXPORTER, seed=4, target=target, same=False) >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("verb", OTHERS)
def test_a_stopped_export_or_finetuning_ends_in_one_line(place, verb, share, number):
    whole = seconds_of(result(OTHERS[verb], "../expected"))
    before = tree(Path())
    code, said = stopped(OTHERS[verb], share * whole, number)
    left = tree(Path()).keys() - before.keys()
    if code == 0:
        return
    assert said == f"sbpatch: stopped by {number.name}\n"
    if Path("new").exists():  # it was done but for its last words
        assert of("new") == of("../expected")
        return
    assert {name.split("/")[0] for name in left} <= {".new.finetuning"}  # to go on with
    again = ["--resume"] if ".new.finetuning/best.safetensors" in left and ".new.finetuning/state.pt" in left else []
    assert ended(started([*OTHERS[verb], *again])) == 0, Path("../said").read_text()
    assert {name.split("/")[0] for name in tree(Path()).keys() - before.keys()} == {"new"}
    assert of("new") == of("../expected")


def stopped(arguments: list[str], delay: float, number: signal.Signals) -> tuple[int, str]:
    """Exit code and output of a run that gets a signal after some seconds."""
    child = started(arguments)
    time.sleep(delay)
    os.kill(child, number)
    code = ended(child)
    said = Path("../said").read_text()
    assert code in (0, 128 + number, -number), said  # done before, or hit before it listened
    assert "Traceback" not in said
    return (0 if code == -number else code), said


# ---- eval, whose variants and readers are processes of their own

EVAL = ["eval", "tiny.pth", "--dataset", "many", "--skip-bad", "--json", "new.json", "--quiet"]


def many_images() -> None:
    """More than this process reads by itself."""
    for name in "ab":
        Path("many", name).mkdir(parents=True)
        for i in range(40):
            Path("many", name, f"{i}.jpg").symlink_to(Path(f"images/{name}/{'ab'.index(name)}.jpg").resolve())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.usefixtures("forked_variants")
def test_a_stopped_eval_ends_in_one_line_and_leaves_no_process(place, share, number):
    many_images()
    whole = seconds_of(EVAL)
    Path("new.json").unlink()
    before = tree(Path())
    code, said = stopped(EVAL, share * whole, number)
    if code:
        assert said == f"sbpatch: stopped by {number.name}\n"
        assert tree(Path()).keys() - before.keys() <= {"new.json"}
    time.sleep(0 if not writing_to(Path("../said")) else 2)  # Python's own tracker of resources ends a moment later
    assert not writing_to(Path("../said"))


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_stopped_finetuning_leaves_no_process_that_reads_images(place, share):
    many_images()
    tune = ["many" if x == "images" else x for x in TUNE] + ["--steps", "40"]
    whole = seconds_of(result(tune, "../expected"))
    code, said = stopped(tune, share * whole, signal.SIGINT)
    assert not code or said == "sbpatch: stopped by SIGINT\n"
    assert not writing_to(Path("../said"))


def writing_to(path: Path) -> list[str]:
    """Processes that have a file open: of a run, those whose output goes there, children that nobody owns any more too."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or another user's
            if any(os.path.samefile(file, path) for file in (process / "fd").iterdir() if file.exists()):
                found.append(process.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("delay", OF_AN_EVAL)
def test_a_killed_eval_leaves_no_process_and_no_file(place, delay):
    """A process as users start it, whose variants are spawned: each ends by itself when nobody asks it any more."""
    many_images()
    before = tree(Path())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sbpatch.cli", *EVAL],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip
    time.sleep(delay)
    process.kill()
    process.wait()
    for _ in range(120):  # what is still importing finds out when it has done so
        if not living(process.pid):
            break
        time.sleep(0.5)
    assert not living(process.pid)
    left = tree(Path()).keys() - before.keys()
    assert left <= {"new.json"}


def test_a_result_that_was_there_survives_kills(place):
    before = tree(Path("out"))
    again = ["calibrate", "tiny.pth", "-o", "out", *QUICK, "--seed", "5"]
    for delay in OVER_A_RESULT:
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
    whole = seconds_of(result(CALIBRATE, "../first"))
    before = tree(Path())
    code, said = stopped(CALIBRATE, share * whole, number)
    if code:
        assert said == f"sbpatch: stopped by {number.name}\n"
        # none or all of the result, beside what was measured, to go on with
        left = tree(Path()).keys() - before.keys() - {".new.calibrating"}
        assert left in (set(), {"new"} | {f"new/{name}" for name in tree(Path("../first"))})
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
        (7.0, ["eval", "out", "--dataset", "images", "--limit", "2"]),
        (12.0, ["eval", "out", "--dataset", "images", "--limit", "2"]),
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


def kill_table() -> str:
    """The table of docs/reliability.md: kill -9, and those of the tests that are not slow among them."""
    kills = {
        "calibrate": (FEW + len(OVER_A_RESULT), MANY["calibrate"]),
        "export": (FEW, MANY["export"] + 2 * OF_AN_EXPORTER),
        "finetune": (FEW, MANY["finetune"]),
        "eval": (0, len(OF_AN_EVAL)),
    }
    rows = [f"| `{verb}` | {few + many} | {few} |" for verb, (few, many) in kills.items()]
    return "\n".join(["| killed | times | in the quick tests |", "|---|---|---|", *rows])


def test_the_page_has_the_counts():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert kill_table() in page, f"put this into docs/reliability.md:\n{kill_table()}"
