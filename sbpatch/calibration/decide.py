"""What can be said of a site before anything is measured there: left out, unsupported, too short to gain on, or to be tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from types import MappingProxyType

from ..attention import Geometry
from ..plan.plan import Decision, SitePlan
from ..plan.recipe import SiteSetting
from ..sites.find import Site
from .costs import CostTable

# Without the times of the device: below this, exact attention is one small call, and few patches are faster.
MIN_TOKENS = 256


def first_decision(
    site: Site,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: CostTable | int = MIN_TOKENS,
    fixed: Mapping[str, SiteSetting] = MappingProxyType({}),
) -> SitePlan:
    """What can be said of a site before anything is measured there, and why.

    `limit`: the times of the device, or in their place the number of tokens from which a site may be patched.
    """

    def of(decision: Decision, reason: str) -> SitePlan:
        return SitePlan.of(site, decision, reason)

    if site.local and site.unsupported:
        return of("exact", site.unsupported)
    if site.unsupported:
        return of("unsupported", site.unsupported)
    if include and not any(fnmatch(site.name, pattern) for pattern in include):
        return of("exact", "not among --include")
    if any(fnmatch(site.name, pattern) for pattern in exclude):
        return of("exact", "excluded")
    tokens = described(site.geometry)
    if any(fnmatch(site.name, pattern) for pattern in fixed):
        return of("patch", tokens)
    if isinstance(limit, int):
        if min(site.geometry.rows, site.geometry.tokens) < limit:
            return of("exact", f"{tokens}: under {limit}, exact attention costs too little to gain on")
        return of("patch", tokens)
    layer = limit.cheapest(site.geometry)
    if layer is None:
        return of("exact", f"{tokens}: too few for any patch")
    if not limit.pays(layer):
        return set_aside(of("exact", ""), limit, limit.ms(layer))
    found = of("patch", tokens)
    found.exact_ms, found.patched_ms = limit.exact_ms(site.geometry), limit.ms(layer)
    return found


def described(site: Geometry) -> str:
    """How many tokens a site has, or how many queries and keys."""
    return f"{site.queries} queries and {site.tokens} keys" if site.queries else f"{site.tokens} tokens"


def set_aside(site: SitePlan, costs: CostTable, fastest: float) -> SitePlan:
    """The site left exact, because the fastest patch, in milliseconds a sample, is not faster than exact attention."""
    exact = costs.exact_ms(site.geometry)
    times = f"exact attention takes {exact:.3g} ms a sample, the fastest patch {fastest:.3g} ms"
    reason = f"{described(site.geometry)}: {times}"
    return site.model_copy(update={"decision": "exact", "exact_ms": exact, "patched_ms": fastest, "reason": reason})
