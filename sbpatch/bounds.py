"""Numbers from files and flags: what each may be, checked before anything of that size is made.

The largest values are far beyond what has been run, and small enough that a wrong one is told from a large one.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from .errors import SbpatchError, printable

TOKENS = 1 << 20  # of one sample
PIXELS = 4096  # a side, of a model's input
HEADS = 1 << 12
WIDTH = 1 << 16  # of a head
SAMPLES = 1 << 24  # that are asked for at once
BATCH = 1 << 16
SEED = 2**32 - 1  # NumPy's largest; what is drawn from it stays within PyTorch's 64 bits
STEPS = 64  # of what a method repeats: Lloyd steps, hash rounds
CONFIG = 2**31 - 1  # of any integer of a model's configuration

Tokens = Annotated[int, Field(strict=True, ge=1, le=TOKENS)]
Count = Annotated[int, Field(strict=True, ge=0, le=TOKENS)]
Heads = Annotated[int, Field(strict=True, ge=1, le=HEADS)]
Width = Annotated[int, Field(strict=True, ge=1, le=WIDTH)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]  # of a layer, made from a run's seed
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def whole(value: Any, name: str, least: int, most: int) -> int:
    """An integer from a file, within bounds; neither true nor false nor a number with a fraction nor text.

    Raises:
        SbpatchError: it is something else.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SbpatchError(f"{name} is {shown(value)}: it must be an integer")
    if not least <= value <= most:
        raise SbpatchError(f"{name} is {shown(value)}: it must be from {least} to {most}")
    return value


def real(value: Any, name: str, least: float, most: float) -> float:
    """A finite number from a file, within bounds.

    Raises:
        SbpatchError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SbpatchError(f"{name} is {shown(value)}: it must be a number")
    if not least <= value <= most or not math.isfinite(value):
        raise SbpatchError(f"{name} is {shown(value)}: it must be from {least:g} to {most:g}")
    return float(value)


def integer_of(text: str, least: int, most: int) -> int:
    """An integer as users type it: the digits 0 to 9, perhaps with a sign.

    Raises:
        ValueError: it is none, or out of bounds; the message says what is meant.
    """
    bare = text.strip()
    if not (bare.isascii() and bare.removeprefix("-").isdigit() and len(bare) <= 20):
        raise ValueError(f"{shown(text)} is not an integer")
    if not least <= int(bare) <= most:
        raise ValueError(f"{shown(text)} is not from {least} to {most}")
    return int(bare)


def number_of(text: str, least: float, most: float) -> float:
    """A finite number as users type it.

    Raises:
        ValueError: it is none, or out of bounds; the message says what is meant.
    """
    bare = text.strip()
    if not bare.isascii() or "_" in bare:
        raise ValueError(f"{shown(text)} is not a number")
    try:
        value = float(bare)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a number") from None
    if not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{shown(text)} is not from {least:g} to {most:g}")
    return value


def shown(value: Any) -> str:
    """A wrong value as an error names it, cut where it is long."""
    text = printable(repr(value)) if not isinstance(value, int) or abs(value) < 1 << 200 else "a number of many digits"
    return text if len(text) <= 60 else text[:57] + "..."
