"""One layer of a key-value cache of transformers that keeps every token and reads few of them a step.

The past lies in blocks of alike keys (partition.py), the latest tokens beside them in the order of time. A prompt is read by
whatever attention the model has. A step, one new token, is computed here: `update` answers with keys and values that know
this layer, and PyTorch's attention called on them calls `CompressedLayer.attend`. So nothing is asked of the model, patched
or not, but that it calls scaled_dot_product_attention; one that does something else with keys gets them in the order of time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..attention import masks
from ..errors import SbpatchError
from . import step
from .held import Held
from .partition import halves, rows
from .settings import Reads, Settings

AHEAD = 256  # tokens of memory beyond those in use, so that a token more is written and nothing moved


class CompressedLayer(CacheLayerMixin):
    """Keys (B, H, n, d) and values (B, H, n, e) of one layer; `keys` and `values` have those of blocks in the blocks' order."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self, settings: Settings, scratch: step.Scratch | None = None, reads: Reads = lambda mean, least, most: mean
    ) -> None:
        super().__init__()
        self.settings, self.scratch, self.reads = settings, scratch or step.Scratch(), reads
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.memory: tuple[Tensor, Tensor] | None = None  # (B, H, N, d) and (B, H, N, e), N a multiple of the block
        self.tokens = self.blocked = 0  # how many are held, and how many of them in blocks
        self.read = self.offered = 0  # tokens that steps read, and that they would have read of an exact cache
        self.is_initialized = False
        self._forget_blocks()

    def _forget_blocks(self) -> None:
        self.blocked = 0
        self.order: Tensor | None = None  # (B, H, blocked): where in time each token in a block stands
        self.points: tuple[Tensor, Tensor] | None = None  # means of the blocks, (B, H, m, d) and (B, H, m, e)
        self.padding: tuple[Tensor, Tensor, Tensor] | None = (
            None  # key mask (B, blocked), and `real` and `bias` of Past
        )

    # -- what transformers asks --------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.memory = (key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens, (B, H, t, d) and (B, H, t, e); answer with all of them, for one call of attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states.detach(), value_states.detach())
        new, s = key_states.shape[2], self.settings
        if new == self.tokens:
            if len(key_states) == 1:  # no padding beside one sample; in a batch the first step's mask says what is real
                self._make_blocks(None)
            return key_states, value_states
        held = self._used()
        if new == 1 and s.best(self.tokens, s.blocked(self.tokens, self.blocked), self.reads) > 0:
            return Held.of(held[0], self), Held.of(held[1], self)
        self._count(self.tokens if new == 1 else 0)
        return self.in_time(held[0]), self.in_time(held[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.clear()
        self.keys = self.values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens; as in transformers, their number is given as a negative one."""
        if tokens_to_remove > 0:
            raise SbpatchError(f"crop takes the number of tokens to remove as a negative one, not {tokens_to_remove}")
        if self.memory is None or tokens_to_remove == 0:
            return
        left = max(self.tokens + tokens_to_remove, 0)
        if left < self.blocked:
            memory = [self.in_time(x)[:, :, :left] for x in self._used()]
            self._forget_blocks()
            self._hold(*memory)
        self.tokens = left
        self.keys, self.values = self._used()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_sample(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_sample(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_sample(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        raise SbpatchError("a compressed cache does not move between devices: leave offloading out")

    def prefetch(self) -> None:
        self.offload()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _append(self, *new: Tensor) -> None:
        assert self.memory is not None
        stop = self.tokens + new[0].shape[2]
        if stop > self.memory[0].shape[2]:
            self._hold(*self._used(), room=stop + AHEAD)
        for memory, x in zip(self.memory, new, strict=True):
            memory[:, :, self.tokens : stop] = x
        self.tokens = stop
        self.keys, self.values = self._used()

    def _hold(self, *held: Tensor, room: int | None = None) -> None:
        """Move to memory for `room` tokens, or as many as are held and some."""
        block = self.settings.block
        room = -(-(room or held[0].shape[2] + AHEAD) // block) * block
        with torch.inference_mode(False):  # memory that can be written to in and out of that mode
            memory = tuple(x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in held)
        for to, x in zip(memory, held, strict=True):
            to[:, :, : x.shape[2]] = x
        self.memory = (memory[0], memory[1])

    def _used(self) -> tuple[Tensor, Tensor]:
        assert self.memory is not None
        return self.memory[0][:, :, : self.tokens], self.memory[1][:, :, : self.tokens]

    def _each_sample(self, select: Any) -> None:
        """Apply a selection of samples to all that is held."""
        if self.memory is None:
            return
        with torch.inference_mode(False):
            key, value = (select(x) for x in self.memory)
        self.memory = (key, value)
        self.order = None if self.order is None else select(self.order)
        self.points = None if self.points is None else (select(self.points[0]), select(self.points[1]))
        if self.padding is not None:
            mask, real, bias = (select(x) for x in self.padding)
            self.padding = (mask, real, bias)
        self.keys, self.values = self._used()

    def in_time(self, held: Tensor) -> Tensor:
        """`keys` or `values` as they came, (B, H, n, d)."""
        if self.order is None:
            return held
        out = held.clone()
        out.scatter_(2, self.order[..., None].expand(-1, -1, -1, held.shape[3]), held[:, :, : self.blocked])
        return out

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Bytes held, and those of the keys and values alone."""
        tensors = [*(self.memory or ()), *(self.points or ()), *(self.padding or ())]
        tensors += [] if self.order is None else [self.order]
        alone = [] if self.memory is None else self._used()
        return sum(x.numel() * x.element_size() for x in tensors), sum(x.numel() * x.element_size() for x in alone)

    # -- a step ------------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
        """Attention of the latest token, of all heads: query (B, H, 1, d), or (B, H_k, g, d) by groups -> the same with e.

        None where the mask says more than padding does, so that the whole past must be read.
        """
        assert self.memory is not None
        batch, heads = self.memory[0].shape[:2]
        real = None
        if mask is not None:
            real = masks.real_keys(mask, batch, self.tokens)  # (B, n)
            if masks.is_bias(mask) or not masks.is_plain(mask, real, False, mask.shape[-2]):
                self._count(self.tokens)
                return None
            real = None if bool(real.all()) else real
        self._make_blocks(real)
        assert self.points is not None
        q = query.reshape(batch, heads, -1, query.shape[-1]) * scale
        marks: tuple[Tensor | None, ...] = (None, None, None)
        if real is not None and self.padding is not None:
            marks = (self.padding[1], real[:, self.blocked :], self.padding[2])
        past = step.Past(*self.memory, self.tokens, self.settings.block, *self.points, *marks)
        best = max(self.settings.best(self.tokens, self.blocked, self.reads), 1)
        self._count(past.read(best))
        return step.attend(q, past, best, self.scratch).reshape(*query.shape[:-1], -1)

    def _count(self, read: int) -> None:
        self.read += read
        self.offered += self.tokens if read else 0

    def _make_blocks(self, real: Tensor | None) -> None:
        """Blocks of what is old enough, and of all anew where the padding is another than it was."""
        before = None if self.padding is None else self.padding[0]
        now = None if real is None or bool(real[:, : self.blocked].all()) else real[:, : self.blocked]
        if self.blocked and not (
            before is now is None or (before is not None and now is not None and before.equal(now))
        ):
            memory = [self.in_time(x) for x in self._used()]
            self._forget_blocks()
            self._hold(*memory)
        stop = self.settings.blocked(self.tokens, self.blocked)
        if stop > self.blocked:
            self._add_blocks(stop, real)

    def _add_blocks(self, stop: int, real: Tensor | None) -> None:
        """Blocks of the tokens from `blocked` to `stop`."""
        assert self.memory is not None
        start, block = self.blocked, self.settings.block
        keys = self.memory[0][:, :, start:stop]
        shape = keys.shape[:3]
        kept = None if real is None else real[:, None, start:stop].expand(shape)
        head = 0 if start else block  # the first real tokens come first, as they are
        if head and kept is not None:
            order = (~kept).long().argsort(stable=True, dim=-1)
        else:
            order = torch.arange(stop - start, device=keys.device).expand(shape)
        late = order[..., head:]
        inner = halves(rows(keys, late), block, None if kept is None else kept.gather(2, late))
        order = torch.cat([order[..., :head], late.gather(2, inner)], dim=2)
        for memory in self.memory:
            memory[:, :, start:stop] = rows(memory[:, :, start:stop], order)
        self.order = order if self.order is None else torch.cat([self.order, order + start], dim=2)
        self.blocked = stop
        self._add_points(start, real)

    def _add_points(self, start: int, real: Tensor | None) -> None:
        """Means of the blocks from token `start` on, over their real tokens."""
        assert self.memory is not None
        assert self.order is not None
        block, stop = self.settings.block, self.blocked
        parts = [x[:, :, start:stop].unflatten(2, (-1, block)).float() for x in self.memory]  # (B, H, m, c, d or e)
        if real is None:
            found = [x.mean(3) for x in parts]
        else:
            kept = real[:, None, :stop].expand(*self.order.shape).gather(2, self.order).unflatten(2, (-1, block))
            count = kept.sum(-1)  # (B, H, m) of all blocks
            weight = kept[:, :, start // block :, :, None].float() / count[:, :, start // block :, None, None].clamp(
                min=1
            )
            found = [(x * weight).sum(3) for x in parts]
            self.padding = (real[:, :stop].clone(), self._padded(kept), count.float().log())
        self.points = (found[0], found[1]) if self.points is None else (
            torch.cat([self.points[0], found[0]], dim=2), torch.cat([self.points[1], found[1]], dim=2)
        )  # fmt: skip

    def _padded(self, kept: Tensor) -> Tensor:
        """`real` of Past: (B, H, m, c) for all memory, (B, H, N // c, c)."""
        assert self.memory is not None
        return F.pad(kept, (0, 0, 0, self.memory[0].shape[2] // self.settings.block - kept.shape[2]))
