"""Triton kernels for CUDA devices, each with the signature and results of a plain function beside it, which is its reference.

`chosen` says whether a tensor goes to them. Nothing here waits for the device, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # of a head
COLUMNS = 128  # of rows that are added at once
MOST_BLOCKS = 512  # that one program ranks
SHARED_KIB = 227  # of memory a block, which the kernels' sizes were chosen for: those of an H100, H200 or B200

GRADIENTS = os.environ.get("SBPATCH_GRADIENTS") == "kernels"  # else of the plain forms: no GPU has run gradients.py yet

log = logging.getLogger("sbpatch")


def chosen(x: Tensor) -> bool:
    """Whether kernels compute from x (..., width); where they decline on a CUDA device, the log says so, once a reason.

    Exported files have to run without them.
    """
    if not x.is_cuda or torch.compiler.is_exporting():
        return False
    reason = _reason(x.dtype, x.shape[-1], x.device.index)
    if reason:
        _say(reason)
    return not reason


@cache
def _reason(dtype: torch.dtype, width: int, device: int) -> str:
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'sbpatch[gpu]'"
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin >> 10  # type: ignore[attr-defined]
    if shared < SHARED_KIB:
        return f"the kernels need {SHARED_KIB} KiB of shared memory a block, and {found.name} has {shared}"
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if width > WIDEST:
        return f"the kernels take heads of up to {WIDEST} numbers, not {width}"
    return ""


@cache
def _say(reason: str) -> None:
    log.warning("attention runs in PyTorch's own operations: %s", reason)
