"""What fixed patterns share: counting their pairs, and places along a sequence that may be padded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .core import Stretches, Tiles

BLOCK = 128  # queries of a tile that share a list of keys
UNIT = 2**31  # places along a sequence are integers over this: exact, and no dtype of the model rounds them


def blocks(count: int, size: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Consecutive tokens in blocks: query index (count, size), the last block repeating token n - 1, and slots (n,)."""
    position = torch.arange(count * size, device=device)
    return position.clamp(max=n - 1).view(count, size), position[:n]


def listed(read: Stretches, n: int) -> Tiles:
    """The same as lists of single keys, of a sequence of n tokens."""
    chosen, count, block, tile, near, first = read
    device = chosen.device
    query, place = blocks(chosen.shape[2], tile, n, device)
    start = query[:, :1]  # (T, 1)
    own = start + torch.arange(tile, device=device)
    before = start + torch.arange(-min(near, n), 0, device=device)
    head = torch.arange(min(first, n), device=device).expand(len(start), -1)
    far = (chosen[..., None] * block + torch.arange(block, device=device)).flatten(-2)  # (B, H, T, p c)
    taken = (chosen < count).repeat_interleave(block, -1) & (far >= head.shape[-1])  # a first token counts once
    every, valid = [own, before, head, far], [own < n, before >= 0, head < start - near, taken]
    key, keep = (torch.cat([x.expand(*chosen.shape[:2], -1, -1) for x in xs], dim=-1) for xs in (every, valid))
    return Tiles(query, key.clamp(0, n - 1), keep[..., None, :], place, diagonal=True)


def wider(times: int) -> int:
    """How much larger tiles become where sequences are `times` as long, powers of two both: as the root of the length."""
    return 2 ** ((times.bit_length() - 1) // 2)


def beside(queries: int, keys: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sorted queries in tiles beside sorted keys in tiles of `size`: query r of `queries` beside key r keys / queries.

    Returns:
        Places of the queries of each tile, (T, g), the last one repeated; where in the flattened (T, g) each lies, (queries,).
    """
    start = -(-torch.arange(-(-keys // size), device=device) * size * queries // keys)  # rounded up
    width = -(-size * queries // keys)
    row = torch.arange(queries, device=device)
    tile = row * keys // (queries * size)
    place = start[:, None] + torch.arange(width, device=device)
    return place.clamp(max=queries - 1), tile * width + row - start[tile]


def mean_pairs(rounds: Iterable[Tiles], causal: bool) -> float:
    """Pairs per query row on average, the future left out where the site is causal."""
    total = 0.0
    for tiles in rounds:
        valid = tiles.valid
        if causal:
            valid = valid & (tiles.key[..., None, :] <= tiles.query[..., :, None])
        rows = valid.sum(-1).expand(tiles.query.shape).flatten(-2)
        total += float(rows.gather(-1, tiles.slot).float().mean())
    return total


def real_tokens(place: Tensor, n: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens at ascending places, 0 to UNIT - 1, along those that are not padding: floor(place n / UNIT).

    place (m,) -> index (m,) and whether it is new, bool (m,): where m is close to n, two places fall on one token.
    With key_mask (B, n) both are (B, m), and nothing is new where all is padding.
    """
    if key_mask is None:
        index = place * n // UNIT
        return index, index.diff(prepend=index.new_full((1,), -1)) > 0
    seen = key_mask.cumsum(-1)  # (B, n)
    turn = place * seen[:, -1:] // UNIT  # (B, m), the t-th real token
    index = torch.searchsorted(seen, turn + 1).clamp(max=n - 1)
    new = (turn.diff(dim=-1, prepend=turn.new_full((len(turn), 1), -1)) > 0) & (seen[:, -1:] > 0)
    return index, new


def shared_keys(key: Tensor, valid: Tensor, n: int, heads: int) -> Tiles:
    """All n queries, in blocks, against one list of keys: key and valid (m,), (B, m) for every head, or (B, H, m)."""
    query, slot = blocks(-(-n // BLOCK), BLOCK, n, key.device)
    if key.ndim == 2:
        key, valid = (x[:, None].expand(-1, heads, -1) for x in (key, valid))
    key = key[..., None, :].expand(*key.shape[:-1], len(query), -1)
    valid = valid[..., None, None, :].expand(*valid.shape[:-1], len(query), 1, -1)
    return Tiles(query, key, valid, slot)
