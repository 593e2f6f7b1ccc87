"""Recipes: the settings of a calibration as a YAML file, with exact settings for single sites where one wants them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import SbpatchError

Objective = Literal["memory", "time"]  # what the budget is a share of
Allocation = Literal["joint", "measured", "entropy", "uniform"]  # the rule that shares it out


class SiteSetting(BaseModel):
    """A method with its parameters (`window`, `rank`, ...) as further keys, taken as they are, without a search."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int] = Field(init=False)

    method: str

    @property
    def parameters(self) -> dict[str, int]:
        return dict(self.model_extra or {})


class Recipe(BaseModel):
    """What `calibrate` is told; every key may be left out. `sites` maps shell patterns over site names to settings."""

    model_config = ConfigDict(extra="forbid")

    description: str = ""
    budget: float = 0.03
    max_drop: float | None = None
    method: str = "auto"
    objective: Objective = "memory"
    allocation: Allocation = "joint"
    data: str | None = None
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    min_tokens: int = Field(default=256, ge=1)
    sites: dict[str, SiteSetting] = Field(default_factory=dict)


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe, or the defaults where there is none.

    Raises:
        SbpatchError: the file is missing, is no YAML, or has a key or value that a recipe does not take.
    """
    if path is None:
        return Recipe()
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise SbpatchError(f"no recipe at {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SbpatchError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise SbpatchError(f"recipe {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def check_patterns(sites: Sequence[str], patterns: Mapping[str, Iterable[str]]) -> None:
    """Refuse a shell pattern that matches no site: mostly a typo, which would leave a site as the user did not want it.

    `patterns`: where each group of them was given -> the patterns.

    Raises:
        SbpatchError: the first such pattern, and the names there are.
    """
    for place, given in patterns.items():
        for pattern in given:
            if not any(fnmatch(site, pattern) for site in sites):
                names = ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
                raise SbpatchError(f"no attention site matches '{pattern}' of {place}: the sites are {names}")
