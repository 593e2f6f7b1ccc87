"""The plan: what every attention site of a model becomes, and why. Its file is `sbpatch.json`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from ..attention import PARTS, Geometry, Scatterbrain, parse_method
from ..attention.per_head import Exact, Layer, PerHead
from ..errors import SbpatchError
from ..sites.find import Site
from ..version import __version__

PLAN_FILE = "sbpatch.json"
FORMAT = 2  # of the file; raised where an older plan would mean something else now
Decision = Literal["patch", "exact", "unsupported"]


def versions() -> dict[str, str]:
    """Versions that figures are stated with."""
    return {
        "sbpatch": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


class Setting(BaseModel):
    """A method with its cost; its parameters are further keys (`window`, ...)."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    method: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    rank: int | None = None
    nnz: float | None = None
    budget: float | None = None  # stored / the keys of a row

    def take(self, layer: Layer, seed: int) -> None:
        """Take over a built layer's method, parameters and cost."""
        self.method, self.seed = layer.method, seed
        for name, value in layer.parameters_used.items():
            setattr(self, name, value)
        self.rank, self.nnz, self.budget = layer.rank, layer.nnz, layer.stored / layer.site.row_keys

    def build(self, site: Geometry, name: str) -> Layer:
        """The layer, its buffers drawn from the seed."""
        if self.method is None or self.seed is None:
            raise SbpatchError(f"plan of site '{name}' says patch but names no method or seed: calibrate again")
        if self.method == Exact.method:
            return Exact(site)
        parameters = {k: v for k, v in (self.model_extra or {}).items() if isinstance(v, int)}
        _, low_rank = parse_method(self.method)
        if low_rank is not None and self.rank is not None and PARTS[low_rank].kind != "joined":
            parameters["rank"] = self.rank
        return Scatterbrain(self.method, site, self.seed, **parameters)


class HeadGroup(Setting):
    """Heads of a site that share a setting."""

    heads: list[int]
    output_error: float | None = None


class SitePlan(Setting):
    """One site: its shape, what was measured, and what is done. Where its heads differ, `per_head` has their settings."""

    name: str
    class_name: str = Field(alias="class")
    tokens: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    key_heads: int = Field(default=0, ge=0)  # of keys and values, where query heads share them
    causal: bool = False
    grid: tuple[int, int] | None = None
    prefix: int = Field(default=0, ge=0)
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
                "key_heads": g.key_heads, "causal": g.causal, "grid": g.grid, "prefix": g.prefix, "decision": decision,
                "reason": reason,
            }
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.tokens, self.heads, self.head_dim, self.causal, self.grid, self.prefix, self.key_heads)

    @property
    def entries(self) -> float:
        """Entries of the exact attention of one sample: half the square where it is causal."""
        return self.heads * self.tokens * self.geometry.row_keys

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

    requested: float
    used: float = 0.0
    model: float = 1.0


class Plan(BaseModel):
    """What `calibrate` decides and `patch` carries out. `tensors` are the patch's own (projections), by site and name."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    format: int = FORMAT
    model: str
    base_sha256: str = ""
    seed: int
    versions: dict[str, str] = Field(default_factory=versions)
    data: dict[str, Any] = Field(default_factory=dict)
    input_size: list[int] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    budget: Budget
    objective: Literal["memory", "time"] = "memory"  # what the budget is a share of
    allocation: str = "joint"
    max_drop: float | None = None  # what was asked for in place of a budget
    agreement: float | None = None  # percent, on the calibration sample
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
        return self.model_dump_json(indent=2, by_alias=True, exclude_none=True) + "\n"

    @classmethod
    def read(cls, path: Path, tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """Read `sbpatch.json`.

        Raises:
            SbpatchError: the file is missing, is not a plan (the line names the first thing wrong with it), or is of another
                version's format.
        """
        try:
            plan = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SbpatchError(f"no plan at {path}: {error.strerror}") from error
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
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
