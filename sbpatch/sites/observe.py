"""One run of the exact model, in which something is looked at or measured at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..data import batch
from ..data.batch import Inputs
from ..errors import SbpatchError
from .calls import Call
from .swap import swapped

ADVICE = "weights or inputs are too large for this number format: try --dtype float32, or another checkpoint"
Watcher = Callable[[Call, Tensor], None]  # takes a call in plain form and its output (B, H, n, e)


def check_finite(values: Tensor, where: str, what: str) -> None:
    """Refuse to go on with a NaN or an infinity, which defeats every comparison after it.

    Raises:
        SbpatchError: `values` has one; the line says where.
    """
    if not values.numel():
        return
    low, high = values.aminmax()  # both NaN where one value is; unlike isfinite(), no tensor of that size is made
    if not bool(low.isfinite() & high.isfinite()):
        raise SbpatchError(f"{where}: {what} is not finite; {ADVICE}")


def observed(model: nn.Module, inputs: Inputs, watchers: Mapping[str, Watcher], causal: Mapping[str, bool]) -> Tensor:
    """Run the exact model on a batch, and hand the call of each site and its output to the site's watcher, as it is made.

    No more than one site's queries, keys and values are held. `causal` says what each site's calls are. Returns the answer.

    Raises:
        SbpatchError: an output is not finite, a call is not plain attention, or not causal where its site is or the reverse.
    """

    def watch(name: str) -> Callable[[Call], Tensor]:
        def attend(call: Call) -> Tensor:
            output = call.exact()
            check_finite(output, f"site '{name}'", "its attention's output")
            watchers[name](in_plain_form(call, name, causal[name]), output)
            return output

        return attend

    with swapped(model, {name: watch(name) for name in watchers}):
        return batch.run(model, inputs)


def in_plain_form(call: Call, site: str, causal: bool) -> Call:
    """`Call.plain`, whose refusal names the site."""
    try:
        return call.plain(causal)
    except SbpatchError as error:
        raise SbpatchError(f"site '{site}': {error}; leave it out (--exclude, for bench --site)") from error
