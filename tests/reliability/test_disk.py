"""Disks that take no more, places that cannot be written to, and targets that are inputs: one line, the old result whole."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cases import command, one_line_of, refused_line, tree
from conftest import QUICK

from sbpatch.calibration.journal import Journal
from sbpatch.writing import beside, check_target, written_whole

COMMANDS = {
    "calibrate": ["calibrate", "tiny.pth", "-o", "new", *QUICK],
    "calibrate again": ["calibrate", "tiny.pth", "-o", "out", *QUICK, "--seed", "1"],
    "calibrate text": ["calibrate", "bert", "-o", "new", "--budget", "0.2", "--data", "text.txt", "--keep-slow",
                       "--method", "clusters", "--length", "256", "--samples", "2", "--quiet"],
    "export copy": ["export", "out", "--format", "safetensors", "-o", "copy", "--quiet"],
    "json": ["inspect", "tiny.pth", "--json", "x.json", "--quiet"],
    "json again": ["inspect", "tiny.pth", "--json", "old.json", "--quiet"],
    "plot": ["bench", "--lengths", "64", "--methods", "clusters", "--budget", "0.2", "--heads", "1",
             "--plot", "x.png", "--quiet"],
}  # fmt: skip
SLOW = {
    "export pt2": ["export", "out", "-o", "x.pt2", "--quiet"],
    "export onnx": ["export", "out", "--format", "onnx", "--quiet"],
}


class Faults:
    """Writing calls of the process below a folder, the n-th of which fails."""

    def __init__(self, folder: Path, at: int, number: int) -> None:
        self.folder, self.at, self.number, self.calls = str(folder), at, number, 0

    def hit(self) -> None:
        self.calls += 1
        if self.calls >= self.at:  # a full disk stays full
            raise OSError(self.number, os.strerror(self.number))

    def concerns(self, path: object) -> bool:
        return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(self.folder)  # type: ignore[arg-type]


@contextmanager
def failing(folder: Path, at: int, number: int = errno.ENOSPC) -> Iterator[Faults]:
    """In `folder` the `at`-th opening for writing, new folder, sync or write of the journal fails, and all after it."""
    faults = Faults(folder, at, number)
    real_open, real_mkdir, real_fsync, real_write = builtins.open, os.mkdir, os.fsync, os.write

    def fake_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+") and faults.concerns(file):
            faults.hit()
        return real_open(file, mode, *args, **kwargs)

    def fake_mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if faults.concerns(path):
            faults.hit()
        real_mkdir(path, *args, **kwargs)

    def fake_fsync(file: int) -> None:
        faults.hit()
        real_fsync(file)

    def fake_write(file: int, data: bytes) -> int:
        if file > 2 and faults.concerns(os.readlink(f"/proc/self/fd/{file}")):
            faults.hit()
        return real_write(file, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", fake_open)
        patch.setattr(io, "open", fake_open)
        patch.setattr(os, "mkdir", fake_mkdir)
        patch.setattr(os, "fsync", fake_fsync)
        patch.setattr(os, "write", fake_write)
        yield faults


def ends_as_it_should(capfd: pytest.CaptureFixture[str], before: dict[str, bytes], code: int) -> None:
    said = capfd.readouterr()
    assert code == 1, said
    assert said.err.startswith("sbpatch: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert "should not have happened" not in said.err
    assert tree(Path()) == before


FAULTS = [(name, at, errno.ENOSPC) for name in COMMANDS for at in (1, 2, 3, 5, 8)]
FAULTS += [
    (name, at, number)
    for name in ("calibrate again", "json again")
    for at in (1, 2)
    for number in (errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES)
]


@pytest.mark.parametrize(("name", "at", "number"), FAULTS)
def test_the_nth_write_fails(place, capfd, name, at, number):
    Path("old.json").write_text("old")
    before = tree(Path())
    with failing(place, at, number) as faults:
        code = command(*COMMANDS[name])
    if faults.calls < at:
        assert code == 0
        return
    ends_as_it_should(capfd, before, code)


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a quota or a full disk is to libraries that are no Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 100, 10_000, 100_000])
@pytest.mark.parametrize("name", [name for name in COMMANDS if "text" not in name])
def test_files_that_may_not_grow(place, capsys, name, most):  # capfd's own file could not grow either
    Path("old.json").write_text("old")
    before = tree(Path())
    with small_files(most):
        code = command(*COMMANDS[name])
    if code == 0:
        return  # all of it was smaller
    ends_as_it_should(capsys, before, code)


@pytest.mark.slow
@pytest.mark.parametrize("most", [1000, 100_000])
@pytest.mark.parametrize("name", SLOW)
def test_exports_on_a_full_disk(place, capsys, name, most):
    before = tree(Path())
    with small_files(most):
        code = command(*SLOW[name])
    ends_as_it_should(capsys, before, code)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("options", ["size=64k", "nr_inodes=4", "ro"])
@pytest.mark.parametrize("name", ["calibrate", "export copy", "json"])
def test_small_file_systems(place, capfd, name, options):
    Path("disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", "disk"], capture_output=True, check=False
    ).returncode:
        pytest.skip("mount is not allowed here")
    try:
        targets = {"new": "disk/new", "copy": "disk/copy", "x.json": "disk/x.json"}
        arguments = [targets.get(x, x) for x in COMMANDS[name]]
        before = tree(Path())
        code = command(*arguments)
        if not (code == 0 and name == "json"):  # a few kilobytes fit
            ends_as_it_should(capfd, before, code)
    finally:
        subprocess.run(["umount", "disk"], check=True)


# ---- targets

LONG = "n" * 255
TARGETS: dict[str, Callable[[], str]] = {
    "a directory": lambda: "images",
    "a device": lambda: "/dev/full",
    "an empty device": lambda: "/dev/null",
    "a pipe": lambda: os.mkfifo("pipe") or "pipe",  # type: ignore[func-returns-value]
    "a link to a device": lambda: os.symlink("/dev/null", "link") or "link",  # type: ignore[func-returns-value]
    "a link to nowhere": lambda: os.symlink("gone", "link") or "link",  # type: ignore[func-returns-value]
    "a circle": lambda: os.symlink("link", "link") or "link",  # type: ignore[func-returns-value]
    "a link to a circle": lambda: os.symlink("b", "a") or os.symlink("a", "b") or "a",  # type: ignore[func-returns-value]
    "the model": lambda: "tiny.pth",
    "the model otherwise": lambda: "images/../tiny.pth",
    "a link to the model": lambda: os.symlink("tiny.pth", "link") or "link",  # type: ignore[func-returns-value]
    "an image": lambda: "images/a/0.jpg",
    "no folder": lambda: "no/where",
    "in a file": lambda: "text.txt/x",
    "too long": lambda: LONG + "n",
    "too long in bytes": lambda: "é" * 128,
    "a closed descriptor": lambda: "/dev/fd/777",
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_targets_that_cannot_be(place, capfd, flag, target):
    path = TARGETS[target]()
    if flag == "--plot" and target == "a closed descriptor":
        pytest.skip("a plot is a file")
    quick = ["--dataset", "images", "--data", "images", "--samples", "2", "--methods", "clusters", "--budgets", "0.2"]
    refused_line(capfd, "compare", "tiny.pth", *quick, "--quiet", flag, path)


OVER = ["sbpatch.json", "model.safetensors", "config.json", "README.md", "report.png"]


@pytest.mark.parametrize("name", OVER)
@pytest.mark.parametrize("verb", ["eval", "export", "export -o", "inspect"])
def test_no_result_replaces_a_file_of_the_artifact(place, capfd, verb, name):
    before = tree(Path("out"))
    arguments = {
        "eval": ["eval", "out", "--dataset", "images", "--json", f"out/{name}"],
        "export": ["export", "out", "--json", f"out/{name}"],
        "export -o": ["export", "out", "-o", f"out/{name}"],
        "inspect": ["inspect", "out", "--json", f"out/{name}"],
    }[verb]
    assert "this run reads" in refused_line(capfd, *arguments, "--quiet")
    assert tree(Path("out")) == before


INSPECT = ["inspect", "out", "--quiet", "--json"]


def test_an_earlier_result_beside_the_plan_is_replaced(place, capfd):
    before = tree(Path("out"))
    for _ in range(2):
        assert command(*INSPECT, "out/sites.json") == 0
    assert command(*INSPECT, "linked.json") == 0
    os.symlink("../linked.json", "out/link.json")
    assert command(*INSPECT, "out/link.json") == 0
    quick = ["--data", "images", "--methods", "clusters", "--site", "*attention1*", "--budget", "0.2"]
    for _ in range(2):
        assert command("bench", "out", "--quiet", "--plot", "out/times.png", *quick) == 0
    after = tree(Path("out"))
    assert after.keys() - before.keys() == {"sites.json", "link.json", "times.png"}
    assert before.items() <= after.items()


NOT_RESULTS = {
    "other.json": '{"model": "x"}', "list.json": "[1]", "nested.json": '{"versions": [{"sbpatch": 1}]}',
    "broken.json": '{"versions": {"sbpatch"', "deep.json": "[" * 10**5, "vocab.json": "{}", "notes.txt": "x",
    "result": '{"versions": {"sbpatch": "0.1.0"}}', "sub/result.json": '{"versions": {"sbpatch": "0.1.0"}}',
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RESULTS)
def test_no_other_file_of_a_directory_is_replaced(place, capfd, name):
    Path("out", name).parent.mkdir(exist_ok=True)
    Path("out", name).write_text(NOT_RESULTS[name])
    assert "this run reads" in refused_line(capfd, *INSPECT, f"out/{name}")


def test_a_result_is_not_replaced_where_it_is_read_or_no_plan_lies(place, capfd):
    assert command(*INSPECT, "out/costs.json") == 0
    Path("timm/costs.json").write_bytes(Path("out/costs.json").read_bytes())
    given = ["--data", "images", "--samples", "2", "--cost-table", "out/costs.json", "--dry-run", "--quiet"]
    assert "this run reads" in refused_line(capfd, "calibrate", "out", *given, "--json", "out/costs.json")
    assert "this run reads" in refused_line(capfd, "inspect", "timm", "--quiet", "--json", "timm/costs.json")
    assert "this run reads" in refused_line(capfd, *INSPECT, "out/report.png")


@pytest.mark.parametrize("what", ["--data", "--recipe", "--json", "--checkpoint", "--cost-table"])
def test_no_output_directory_replaces_what_is_read_in_it(place, capfd, what):
    os.rename("images", "out/images")
    Path("out/x").write_text("{}")
    given = {"--data": "out/images"}.get(what, "out/x")
    more = ["--data", "text.txt"] if what != "--data" else []
    if what == "--recipe":
        Path("out/x").write_text("budget: 0.2\n")
    assert "lies in the output directory" in refused_line(
        capfd, "calibrate", "tiny.pth", "-o", "out", *more, what, given, "--quiet"
    )


@pytest.mark.parametrize(
    "target", ["a link to nowhere", "a circle", "a pipe", "the model", "no folder", "too long", "in a file"]
)
def test_output_directories_that_cannot_be(place, capfd, target):
    refused_line(capfd, "calibrate", "tiny.pth", "-o", TARGETS[target](), *QUICK)


@pytest.mark.parametrize(
    "name", ["x.json", ".hidden", LONG, "é" * 127, "a b", "-x", "x\x1b[31m", "\udcff\udcfe"], ids=ascii
)
def test_names_that_can_be(place, name):
    for text in ("one", "two"):
        with written_whole(Path(name)) as fresh:
            fresh.write_text(text)
        assert Path(name).read_text() == text
    assert not [entry for entry in os.listdir() if ".writing-" in entry]
    assert len(os.fsencode(beside(Path(name), "calibrating").name)) <= 255


def test_a_link_stays_a_link(place):
    Path("real").write_text("old")
    os.symlink("real", "link")
    with written_whole(Path("link")) as fresh:
        fresh.write_text("new")
    assert Path("link").is_symlink()
    assert Path("real").read_text() == "new"
    assert check_target(Path("link")) == Path("real").absolute()


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_open_files_as_targets(place, capfd, name):
    assert command("inspect", "tiny.pth", "--quiet", "--json", name) == 0
    assert '"model": "tiny.pth"' in capfd.readouterr().out


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_has_is_not(place):
    left = Path(".x.json.writing-killed")
    left.mkdir()
    (left / "new").write_text("half")
    with written_whole(Path("x.json")) as outer:
        outer.write_text("outer")
        with written_whole(Path("x.json")) as inner:
            inner.write_text("inner")
        assert outer.read_text() == "outer"
    assert not left.exists()
    assert Path("x.json").read_text() == "outer"
    assert not [entry for entry in os.listdir() if entry.startswith(".x.json")]


@pytest.mark.parametrize("kind", ["pipe", "directory", "link", "link to a circle", "link to a directory"])
def test_a_journal_in_an_odd_place(place, kind):
    path = Path("journal")
    {"pipe": os.mkfifo, "directory": os.mkdir}.get(kind, lambda p: os.symlink(
        {"link": "text.txt", "link to a circle": "journal", "link to a directory": "images"}[kind], p))(path)  # fmt: skip
    before = tree(Path("images")), Path("text.txt").read_bytes()
    if "link" in kind:
        journal = Journal(path, "settings")
        assert "was a link" in journal.note
        journal.close()
        assert not path.exists()
    else:
        one_line_of(Journal, path, "settings")
    assert (tree(Path("images")), Path("text.txt").read_bytes()) == before
