"""l_p attention: weights |q.k|^p in place of exp(q.k), to train models with (Kannan et al., arXiv 2410.05462).

    A_ij = |q_i.k_j|^p / sum_l |q_i.k_l|^p,   output = A V

This is the attention that the guarantee of leverage.py is about: for every eps there are d^max(1, p/2) / eps keys whose columns
hold all entries above eps, of whatever queries. The weights depend on directions alone: neither the length nor the sign of a
query or of all keys counts, so there is no softmax scale. It approximates no softmax, and so is no method of the registry.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import SbpatchError
from .core import repeated
from .leverage import universal_set


class LpAttention(nn.Module):
    """l_p attention of many heads, differentiable in queries, keys and values; nothing in it is drawn or learned.

    Args:
        power: p, at least 1; 2 is the smoothest to train, large ones come near to reading one key.
        keys: read only so many keys of largest l_p sensitivity, the universal set, found anew for each head and sample; None:
            all. Without them the (n_q, n) matrix is formed.
        causal: no query reads a later key; not with `keys`, which are those among all keys.

    Raises:
        SbpatchError: a power below 1 or not finite, no keys, or `keys` at a causal site.
    """

    def __init__(self, power: float, keys: int | None = None, causal: bool = False) -> None:
        super().__init__()
        if not 1 <= power < float("inf"):
            raise SbpatchError(f"l_p attention needs a finite power of at least 1, not {power}")
        if keys is not None and keys < 1:
            raise SbpatchError(f"l_p attention needs at least 1 key to read, not {keys}")
        if keys is not None and causal:
            raise SbpatchError("the universal set is one among all keys, the future included, and cannot be causal")
        self.power, self.keys, self.causal = power, keys, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """q (B, H, n_q, d), k (B, H_k, n, d), v (B, H_k, n, e), key_mask (B, n) bool, True for real keys -> (B, H, n_q, e).

        H is a multiple of H_k. A query that is orthogonal to every key it may read gets zeros.
        """
        keep = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, n)
        if self.keys is not None:
            index = universal_set(k, key_mask, self.keys, self.power)  # (B, H_k, keys)
            k, v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
            if keep is not None:
                keep = keep.expand(-1, k.shape[1], -1, -1).gather(-1, index[:, :, None])
                keep = repeated(keep, q.shape[1])
        k, v = (repeated(x, q.shape[1]) for x in (k, v))
        size = (q @ k.mT).abs()  # (B, H, n_q, n)
        if keep is not None:
            size = size.masked_fill(~keep, 0)
        if self.causal:
            size = size.tril()
        # of the largest, so that no power overflows; the quotient below does not depend on it, nor does its gradient
        largest = size.detach().amax(-1, keepdim=True)
        weight = (size / largest.masked_fill(largest == 0, 1)).pow(self.power)
        total = weight.sum(-1, keepdim=True)
        return weight @ v / total.masked_fill(total == 0, 1)
