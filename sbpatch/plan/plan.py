"""The plan: what every attention site of a model becomes, and why. Its file is `sbpatch.json`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from ..attention import PARTS, Geometry, Scatterbrain, check_parameters, parse_method
from ..attention.per_head import Exact, Layer, PerHead
from ..bounds import HEADS, Count, Heads, NotNegative, Seed, Tokens, Width
from ..errors import SbpatchError
from ..reading import read_text
from ..sites.find import Site
from ..version import __version__
from ..writing import json_text
from .setting import MethodSetting

PLAN_FILE = "sbpatch.json"
FORMAT = 2  # of the file; raised where an older plan would mean something else now
Decision = Literal["patch", "exact", "unsupported"]


def versions() -> dict[str, str]:
    """Versions that figures are stated with."""
    return {
        "sbpatch": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
    }


class Setting(MethodSetting):
    """A method with its cost and parameters. The rank, which many methods count and some are given, is a field."""

    method: str | None = None
    seed: Seed | None = None
    rank: Count | None = None
    nnz: NotNegative | None = None
    budget: NotNegative | None = None  # stored / the keys of a row

    def take(self, layer: Layer, seed: int) -> None:
        """Take over a built layer's method, parameters and cost."""
        self.method, self.seed = layer.method, seed
        self.parameters = {name: value for name, value in layer.parameters_used.items() if name != "rank"}
        self.rank, self.nnz, self.budget = layer.rank, layer.nnz, layer.stored / layer.site.row_keys

    def build(self, site: Geometry, name: str) -> Layer:
        """The layer, its buffers drawn from the seed."""
        if self.method is None or self.seed is None:
            raise SbpatchError(f"plan of site '{name}' says patch but names no method or seed: calibrate again")
        if self.method == Exact.method:
            return Exact(site)
        parameters = dict(self.parameters)
        _, low_rank = parse_method(self.method)
        if low_rank is not None and self.rank is not None and PARTS[low_rank].kind != "joined":
            parameters["rank"] = self.rank
        check_parameters(self.method, parameters, site)
        return Scatterbrain(self.method, site, self.seed, **parameters)


class HeadGroup(Setting):
    """Heads of a site that share a setting."""

    heads: list[Count] = Field(min_length=1, max_length=HEADS)
    output_error: float | None = None


class SitePlan(Setting):
    """One site: its shape, what was measured, and what is done. Where its heads differ, `per_head` has their settings."""

    name: str
    class_name: str = Field(alias="class")
    tokens: Tokens
    heads: Heads
    head_dim: Width
    key_heads: Count = 0  # of keys and values, where query heads share them
    queries: Tokens | None = None  # where they are not as many as the keys
    value_dim: Width | None = None  # where values are not as wide as keys
    causal: bool = False
    grid: tuple[Tokens, Tokens] | None = None
    prefix: Count = 0
    reach: Count | None = None  # tokens that each reads, its own counted; longer sequences are read locally
    entropy: list[float] | None = None  # nats, one a head
    entropy_ratio: float | None = None  # mean over heads, divided by ln n
    logit_spread: list[float] | None = None  # standard deviation of q.k in a row, one a head
    sink_mass: list[float] | None = None  # share of the attention that the first four tokens get, one a head
    locality: list[float] | None = None  # share that the 64 nearest tokens get, one a head
    decision: Decision
    reason: str
    per_head: list[HeadGroup] | None = None
    matrix_error: float | None = None
    output_error: float | None = None
    exact_ms: float | None = None  # of one sample, by the cost table
    patched_ms: float | None = None  # of what was chosen; of the fastest layer where none was faster than exact

    @model_validator(mode="after")
    def _grid_holds_the_tokens(self) -> SitePlan:
        if self.grid is not None and (min(self.grid) < 1 or self.tokens != self.prefix + self.grid[0] * self.grid[1]):
            raise ValueError(f"{self.tokens} tokens are not {self.prefix} + {self.grid[0]} x {self.grid[1]}")
        return self

    @model_validator(mode="after")
    def _key_heads_share_the_heads(self) -> SitePlan:
        if self.key_heads and self.heads % self.key_heads:
            raise ValueError(f"{self.heads} heads do not share {self.key_heads} key heads evenly")
        return self

    @classmethod
    def of(cls, site: Site, decision: Decision, reason: str) -> SitePlan:
        g = site.geometry
        return cls.model_validate(
            {
                "name": site.name, "class": site.class_name, "tokens": g.tokens, "heads": g.heads, "head_dim": g.head_dim,
                "key_heads": g.key_heads, "queries": g.queries or None, "value_dim": g.value_dim or None,
                "causal": g.causal, "grid": g.grid, "prefix": g.prefix, "reach": site.reach,
                "decision": decision, "reason": reason,
            }
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            self.tokens, self.heads, self.head_dim, self.causal, self.grid, self.prefix, self.key_heads,
            self.queries or 0, self.value_dim or 0,
        )  # fmt: skip

    @property
    def local(self) -> bool:
        """Whether its tokens read their neighbours alone."""
        return self.reach is not None and self.reach < self.tokens

    @property
    def entries(self) -> float:
        """Entries of the exact attention of one sample: half the square where it is causal."""
        return self.heads * self.geometry.rows * self.geometry.row_keys

    @property
    def stored(self) -> float:
        """Entries that the planned attention stores for one sample, all of them where the site stays exact."""
        return self.entries * (self.budget if self.decision == "patch" and self.budget is not None else 1.0)

    def use(self, layer: Layer | PerHead, seed: int) -> None:
        """Take over what a built layer is; a layer that is exact throughout leaves the site as it was."""
        if not isinstance(layer, PerHead):
            self.take(layer, seed)
            if isinstance(layer, Exact):
                self.decision = "exact"
            return
        self.method, self.seed, self.per_head = layer.method, seed, []
        self.nnz, self.budget = layer.nnz, layer.stored / self.geometry.row_keys
        for heads, part in zip(layer.heads, layer.layers, strict=True):
            group = HeadGroup(heads=heads)
            group.take(part, seed)  # type: ignore[arg-type]
            self.per_head.append(group)

    def layer(self) -> Layer | PerHead:
        """Build the layer of a patched site, its buffers drawn from the site's seed."""
        if self.per_head is None:
            return self.build(self.geometry, self.name)
        geometry = [self.geometry.of_heads(len(group.heads)) for group in self.per_head]
        layers = [group.build(part, self.name) for group, part in zip(self.per_head, geometry, strict=True)]
        return PerHead(self.geometry, [group.heads for group in self.per_head], layers)


class Budget(BaseModel):
    """Shares of the exact entries: asked for; stored over the sites that calibration decided on, those it left exact
    included; stored over all sites. Exact ones count in full.
    """

    requested: NotNegative
    used: NotNegative = 0.0
    model: NotNegative = 1.0


class Plan(BaseModel):
    """What `calibrate` decides and `patch` carries out. `tensors` are the patch's own (projections), by site and name."""

    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)

    format: int = FORMAT
    model: str
    base_sha256: str = ""
    seed: Seed
    versions: dict[str, str] = Field(default_factory=versions)
    data: dict[str, Any] = Field(default_factory=dict)
    input_size: list[Tokens] | None = Field(default=None, min_length=1, max_length=3)
    device: str = "cpu"
    dtype: str = "float32"
    budget: Budget
    objective: Literal["memory", "time"] = "memory"  # what the budget is a share of
    allocation: str = "joint"
    max_drop: float | None = None  # what was asked for in place of a budget
    check: dict[str, float] = Field(default_factory=dict)  # of the whole model, on samples the choice did not see
    finetuned: dict[str, Any] | None = None  # on what and how, where the weights are not the base's own any more
    sites: list[SitePlan]
    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True)

    @property
    def patched(self) -> list[SitePlan]:
        return [site for site in self.sites if site.decision == "patch"]

    def settle_budget(self) -> None:
        """Fill in what the plan uses; the one place where the budget is added up."""
        decided = [site for site in self.sites if site.decision == "patch" or site.method is not None]
        if decided:
            self.budget.used = sum(s.stored for s in decided) / sum(s.entries for s in decided)
        self.budget.model = sum(s.stored for s in self.sites) / sum(s.entries for s in self.sites)

    def layers(self) -> dict[str, Layer | PerHead]:
        """Build every patched site's layer; buffers come from `tensors` where they were saved, else from the seed.

        Raises:
            SbpatchError: a saved tensor is missing, left over or of another shape.
        """
        layers = {site.name: site.layer() for site in self.patched}
        if not self.tensors:
            return layers
        wanted = {f"{name}.{key}": t for name, layer in layers.items() for key, t in patch_tensors(layer).items()}
        if odd := sorted(wanted.keys() ^ self.tensors.keys()):
            raise SbpatchError(f"tensors of the patch do not fit its plan: '{odd[0]}' is missing or left over")
        for name, buffer in wanted.items():
            if buffer.shape != self.tensors[name].shape:
                raise SbpatchError(f"tensor '{name}' of the patch has shape {tuple(self.tensors[name].shape)}")
            buffer.copy_(self.tensors[name])
        return layers

    def to_json(self) -> str:
        """Raises SbpatchError where a number is not finite."""
        return json_text(self.model_dump(mode="json", by_alias=True, exclude_none=True))

    @classmethod
    def read(cls, path: Path, tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """Read `sbpatch.json`.

        Raises:
            SbpatchError: the file is missing, is not a plan (the line names the first thing wrong with it), or is of another
                version's format.
        """
        if not path.exists():
            raise SbpatchError(f"no plan at {path}: No such file or directory")
        text = read_text(path, "plan")
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise SbpatchError(f"{path} is not a plan: {where}: {first['msg']}") from error
        found = plan.format if "format" in plan.model_fields_set else 1  # the first format did not name itself
        if found != FORMAT:
            age = "an older" if found < FORMAT else "a newer"
            raise SbpatchError(
                f"{path} was written by {age} version of sbpatch (format {found}, this one reads {FORMAT}): calibrate again"
            )
        plan.tensors = dict(tensors or {})
        return plan


def patch_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The random buffers of a layer (floating point); index tables are rebuilt from the plan instead."""
    return {name: t for name, t in layer.named_buffers() if t.is_floating_point()}
