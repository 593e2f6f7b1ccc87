"""k-means over keys: static shapes, the same bits on every run, no (n, m) tensor beyond a chunk of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import kernels
from .core import known_at_once, take

ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 25}  # numbers of one sample's rows that are worked on at once
CHUNK = 1024  # rows added at once
SAMPLE = 16  # keys a centre that the Lloyd steps look at; the final assignment looks at all


def runs(n: int, width: int, device: torch.device) -> list[slice]:
    """n rows in equal runs, small enough for a cache where each row takes so many numbers in one sample.

    ONNX files are written in half the time with few runs, each of which is so many nodes, and their runtime is as fast.
    """
    few = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    count = -(-n * width // ENTRIES.get("cuda" if few else device.type, ENTRIES["cpu"]))
    step = max(-(-n // count), min(n, 64))
    return [slice(start, start + step) for start in range(0, n, step)]


def nearest(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre c of each key, and its score k.c - |c|^2 / 2: k (B, H, n, d), centre (B, H, m, d) -> two (B, H, n).

    By |k - c|^2 = |k|^2 - 2 (k.c - |c|^2 / 2): the largest score is the nearest.
    """
    if kernels.chosen(k):
        from .kernels.clusters import nearest_centre

        return nearest_centre(k, centre)[:2]
    flat = centre.flatten(0, 1)
    bias = flat.square().sum(-1)[:, None]  # (B * H, 1, m)
    found = []
    for rows in runs(k.shape[2], centre.shape[1] * centre.shape[2], k.device):
        found.append(torch.baddbmm(bias, k[:, :, rows].flatten(0, 1).to(flat.dtype), flat.mT, beta=-0.5).max(-1))
    score, index = found[0] if len(found) == 1 else (torch.cat(x, -1) for x in zip(*found, strict=True))
    return index.view(k.shape[:3]), score.view(k.shape[:3])


def counts(index: Tensor, m: int, keep: Tensor | None = None) -> Tensor:
    """Members of each cluster, (B, H, m, 1) float32; `keep` (B, 1, n) is 1 for real keys. Whole numbers: exact in any order."""
    empty = torch.zeros(*index.shape[:2], m, device=index.device)
    ones = torch.ones(1, 1, index.shape[2], device=index.device) if keep is None else keep
    return empty.scatter_add(-1, index, ones.expand_as(index))[..., None]


def sums(rows: Tensor, index: Tensor, m: int, keep: Tensor | None = None) -> Tensor:
    """Sum of the rows (B, H, n, e) of each cluster: (B, H, m, e), float32 at least."""
    batch, heads, _, e = rows.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(batch * heads, m, e, dtype=wide, device=rows.device)
    for part, where in _chunks(rows, index, keep):
        total = added(total, part.to(wide).flatten(0, 1), where.flatten(0, 1))
    return total.view(batch, heads, m, e)


def members(k: Tensor, v: Tensor, index: Tensor, m: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the keys and of the values of each cluster and their number, (B, H, m, d), (B, H, m, e) and (B, H, m, 1)."""
    if kernels.chosen(k) and kernels.chosen(v):
        from .kernels.clusters import cluster_sums

        total, number = cluster_sums(k, v, index, key_mask, m)
        return total[..., : k.shape[-1]], total[..., k.shape[-1] :], number[..., None]
    keep = None if key_mask is None else key_mask[:, None, :].float()
    return sums(k, index, m, keep), sums(v, index, m, keep), counts(index, m, keep)


def nearest_members(
    k: Tensor, v: Tensor, centre: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest centre (B, H, m, d) of each key, (B, H, n), and `members` of these clusters."""
    many = centre.shape[2]
    if kernels.chosen(k) and kernels.chosen(v):
        from .kernels import lloyd as fast

        if fast.fits(k, many) and fast.fits(v, many):
            index, total, number = fast.assigned_sums(k, v, centre, key_mask)
            return index, total[..., : k.shape[-1]], total[..., k.shape[-1] :], number[..., None]
    index = nearest(k.detach(), centre)[0]
    return index, *members(k, v, index, many, key_mask)


def added(total: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """`total` (G, m, e) with each of the rows (G, n, e) added to its cluster's; it may be changed in place.

    On a CPU rows are added in their order. On a GPU that would be a race, so there it is a product with the one-hot matrix.
    """
    groups, m, e = total.shape
    if kernels.chosen(rows[..., : kernels.COLUMNS]):
        from .kernels.clusters import cluster_sums

        parts = (cluster_sums(x[None], None, index[None], None, m)[0][0] for x in rows.split(kernels.COLUMNS, -1))
        return total + torch.cat(list(parts), -1)
    if rows.is_cuda:
        one_hot = rows.new_zeros(*index.shape, m).scatter(-1, index[..., None], 1.0)
        return total + one_hot.mT @ rows
    if groups > 1:
        index = index + m * torch.arange(groups, device=rows.device)[:, None]
    # of contiguous rows with one index each, PyTorch adds whole rows at once
    where = index.reshape(-1, 1).expand(-1, e)
    return total.view(-1, e).scatter_add_(0, where, rows.reshape(-1, e).contiguous()).view(groups, m, e)


def means(total: Tensor, count: Tensor, centre: Tensor) -> Tensor:
    """Mean of each cluster, (B, H, m, e), by the sum of its rows and their count (B, H, m, 1); without any, its centre."""
    return torch.where(count == 0, centre, total / count.clamp(min=1))


def _chunks(rows: Tensor, index: Tensor, keep: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of `CHUNK` rows, of all where a kernel adds them, zero where they are padding, and their clusters."""
    size = rows.shape[2] if kernels.chosen(rows) else CHUNK
    kept = [None] * len(rows.split(size, 2)) if keep is None else keep.split(size, 2)
    for part, where, real in zip(rows.split(size, 2), index.split(size, 2), kept, strict=True):
        yield part if real is None else part * real[..., None], where


def strided(k: Tensor, key_mask: Tensor | None, count: int, once: bool = False) -> Tensor:
    """`count` keys at even strides over those that are not padding, (B, H, count, d); zeros where all is padding.

    Where there are fewer than that, keys repeat; `once`: each comes once, and what follows them is to be ignored.
    """
    n = k.shape[-2]
    if key_mask is None:
        return k.index_select(2, torch.arange(n, 2 * count * n, 2 * n, device=k.device) // (2 * count))
    odd = 2 * torch.arange(count, device=k.device) + 1
    seen = key_mask.cumsum(-1)  # (B, n)
    place = torch.where(key_mask, seen - 1, n)  # the t-th real token at place t, padding past the end
    real = seen.new_zeros(seen.shape[0], n + 1).scatter(-1, place, torch.arange(n, device=k.device).expand_as(seen))
    every = seen[:, -1:]  # (B, 1) real tokens
    of = every.clamp(min=1, max=count) if once else count
    index = real.gather(-1, (odd * every // (2 * of)).clamp(max=n - 1))  # (B, count)
    chosen = k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1]))
    return chosen.masked_fill(~key_mask.any(-1)[:, None, None, None], 0)


def lloyd(k: Tensor, key_mask: Tensor | None, m: int, steps: int) -> Tensor:
    """Centres (B, H, m, d) of the keys (B, H, n, d) after `steps` Lloyd steps from strided starts.

    The steps see at most `SAMPLE` keys a centre, at even strides: centres need no more, and it makes them cheap. A cluster
    that ran empty moves to one of the keys farthest from their centres. In images many keys are alike (a plain
    background), strided starts repeat them, and without this most of the rank would be spent on nothing.
    """
    n = k.shape[-2]
    seen = min(n, SAMPLE * m)
    wide = torch.promote_types(k.dtype, torch.float32)
    centre = strided(k, key_mask, m).to(wide)
    fast = _fast(k, m, seen)
    if seen < n and (fast is None or key_mask is not None):
        k = strided(k, key_mask, seen, once=True)
        if key_mask is not None:  # fewer real keys than that: as if the padding were not there
            key_mask = torch.arange(seen, device=k.device) < key_mask.sum(-1, keepdim=True)
    if fast is not None:
        for _ in range(steps):
            centre = fast(k, centre, key_mask, seen)
        return centre
    k = k.contiguous()  # rows of it are taken in each step
    step = _step(k, m, key_mask)
    most = min(m, seen) - 1
    for _ in range(steps):
        total, count, distance = step(centre)
        empty = count == 0
        if known_at_once(k) and not empty.any():
            centre = total / count
            continue
        farthest, far = distance.topk(most + 1, dim=-1)  # (B, H, m)
        turn = (empty.squeeze(-1).cumsum(-1) - 1).clamp_(0, most)  # the t-th empty cluster takes
        key = take(k, far.gather(-1, turn)[..., None, :]).squeeze(2)  # the t-th farthest key
        moved = torch.where(farthest.gather(-1, turn)[..., None] > 0, key.to(wide), centre)
        centre = torch.where(empty, moved, total / count)
    return centre


def _fast(k: Tensor, m: int, seen: int) -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor] | None:
    """The kernel for a whole step, where there is one for so many clusters and keys."""
    if kernels.chosen(k):
        from .kernels import lloyd

        if lloyd.fits(k, m) and seen <= lloyd.SEEN:
            return lloyd.lloyd_step
    return None


def _step(k: Tensor, m: int, key_mask: Tensor | None) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A function from centres (B, H, m, d) to the sums (B, H, m, d) and numbers (B, H, m, 1) of the keys that are nearest to
    each, and the squared distances (B, H, n) of the keys, 0 at padding.
    """
    if kernels.chosen(k):
        from .kernels.clusters import cluster_sums, nearest_centre

        def on_device(centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            index, score, square = nearest_centre(k, centre)
            total, count = cluster_sums(k, None, index, key_mask, m)
            distance = torch.sub(square, score, alpha=2)
            return total, count[..., None], distance if key_mask is None else distance * key_mask[:, None]

        return on_device
    keep = (
        torch.ones_like(k[..., :1])
        if key_mask is None
        else key_mask.to(k.dtype)[:, None, :, None].expand_as(k[..., :1])
    )
    rows = torch.cat((k if key_mask is None else k * keep, keep), dim=-1)
    rows = rows.to(torch.promote_types(k.dtype, torch.float32))
    square = torch.linalg.vector_norm(k, dim=-1, dtype=rows.dtype).square()

    def on_host(centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, score = nearest(rows[..., :-1], centre)
        empty = rows.new_zeros(index.shape[0] * index.shape[1], m, rows.shape[-1])
        total = added(empty, rows.flatten(0, 1), index.flatten(0, 1)).unflatten(0, index.shape[:2])
        distance = torch.sub(square, score, alpha=2)
        return total[..., :-1], total[..., -1:], distance if key_mask is None else distance * keep.squeeze(-1)

    return on_host
