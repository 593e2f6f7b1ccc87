"""Several processes that run one command together, as `torchrun` and `accelerate launch` start them, by torch.distributed.

Each takes a share of the work, what they found is gathered, and the first one (rank 0) alone speaks and writes. Without a
launcher there is one process, which all functions here take as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import SbpatchError, one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for a process that lives; the connection to one that ended is closed at once
SAID = "sbpatch/said"  # in the launcher's store: how many processes had a line to say as they failed


@dataclass(frozen=True)
class Group:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    store: Any = None  # of the launcher

    @property
    def own(self) -> slice:
        """Which items are this process's: r, r + size, r + 2 size, ... for rank r."""
        return slice(self.rank, None, self.size)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items."""
        return items[self.own]


ALONE = Group()
_here = ALONE


def launched() -> int:
    """How many processes the launcher started, 1 without one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def join() -> None:
    """Become one of the processes that the launcher started; those after the first are silent from here on.

    Raises:
        SbpatchError: the others are not reached.
    """
    global _here
    if launched() == 1 or _here is not ALONE:
        return
    import torch.distributed as dist  # slow to import, and one process needs none of it
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise SbpatchError(f"the other processes of this run are not reached: {one_line(error)}") from None
    _here = Group(rank, size, store)
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def leave() -> None:
    """The end of what `join` began."""
    global _here
    if _here is not ALONE:
        import torch.distributed as dist

        dist.destroy_process_group()
    _here = ALONE


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process takes all of the work itself: what it does is a share already."""
    global _here
    before, _here = _here, ALONE
    try:
        yield
    finally:
        _here = before


def count() -> int:
    """How many processes share the work."""
    return _here.size


def count_here() -> int:
    """How many of them are on this machine."""
    size = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(size) if size.isdecimal() and int(size) else launched()


def place() -> int:
    """Which of the processes on its machine this one is."""
    number = os.environ.get("LOCAL_RANK", "0")
    return int(number) if number.isdecimal() else 0


def is_first() -> bool:
    """Whether this process speaks and writes."""
    return _here.rank == 0


def own() -> slice:
    """Which items are this process's, see `Group.own`."""
    return _here.own


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's items, see `Group.share`."""
    return _here.share(items)


def gathered(value: Any) -> list[Any]:
    """The value of every process, by rank; values are what JSON holds, and floats keep all their bits.

    Raises:
        SbpatchError: another process has ended.
    """
    return [value] if _here.size == 1 else [json.loads(data) for data in _exchanged(json.dumps(value).encode())]


def gathered_tensors(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of every process, by rank, on the CPU; as many and as large as each has.

    Raises:
        SbpatchError: another process has ended.
    """
    if _here.size == 1:
        return [dict(tensors)]
    from safetensors.torch import load, save

    mine = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return [load(data) for data in _exchanged(mine)]


def _exchanged(data: bytes) -> list[bytes]:
    import torch
    import torch.distributed as dist

    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_here.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        most = max(int(size) for size in sizes)
        found = [torch.zeros(most, dtype=torch.uint8) for _ in range(_here.size)]
        dist.all_gather(found, torch.nn.functional.pad(mine, (0, most - len(mine))))
    except RuntimeError:
        raise SbpatchError(
            "another process of this run has ended, so this one cannot finish: nothing is written"
        ) from None
    return [bytes(x[: int(size)].numpy()) for x, size in zip(found, sizes, strict=True)]


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """Shares that were gathered, as one list in the order of the items: `share` taken back."""
    most = max(map(len, shares))
    return [part[i] for i in range(most) for part in shares if i < len(part)]


def rounds(items: Sequence[T]) -> list[Sequence[T]]:
    """The items in their order, as many at a time as there are processes; of each round `share` is one item or none."""
    return [items[i : i + _here.size] for i in range(0, len(items), _here.size)]


@dataclass(frozen=True)
class Teams:
    """The processes shared out over the `items` of a round: each takes one, those that take the same one are its team."""

    items: int

    @property
    def item(self) -> int:
        """The item of this process."""
        return _here.rank % self.items

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """This process's parts of the work on its item."""
        return parts[_here.rank // self.items :: len(range(self.item, _here.size, self.items))]

    def in_order(self, item: int, shares: Sequence[Sequence[T]]) -> list[T]:
        """What was gathered of an item, in the order of its parts: `share` taken back."""
        return in_order(shares[item :: self.items])


def from_first(make: Callable[[], T]) -> T:
    """What `make()` gives in the first process, where alone it is called."""
    found: T = gathered(make() if is_first() else None)[0]
    return found


def check_same(text: str, what: str) -> None:
    """Refuse results that differ from one process to another, as they may on machines or with threads of two kinds.

    Raises:
        SbpatchError: they do.
    """
    if len(set(gathered(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        raise SbpatchError(f"the processes came to different {what}: start them on equal machines, with equal threads")


def first_to_fail() -> bool:
    """Whether this process is the one that says why the run failed: the first that asks."""
    if _here.store is None:
        return True
    try:
        return _here.store.add(SAID, 1) == 1
    except RuntimeError:  # the launcher is gone
        return is_first()
