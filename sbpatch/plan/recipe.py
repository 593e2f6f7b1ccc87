"""Recipes: the settings of a calibration as a YAML file, with exact settings for single sites where one wants them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..attention import check_parameters
from ..bounds import Tokens
from ..errors import SbpatchError, one_line
from ..reading import read_text
from .setting import MethodSetting

Objective = Literal["memory", "time"]  # what the budget is a share of
Allocation = Literal["joint", "measured", "entropy", "uniform"]  # the rule that shares it out


class SiteSetting(MethodSetting):
    """A method with its parameters (`window`, `rank`, ...), used as they are, without a search."""

    method: str

    @model_validator(mode="after")
    def _parameters_are_the_methods(self) -> SiteSetting:
        check_parameters(self.method, self.parameters)
        return self


class Recipe(BaseModel):
    """What `calibrate` is told; every key may be left out. `sites` maps shell patterns over site names to settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    description: str = ""
    budget: float = 0.03
    max_drop: float | None = None
    method: str = "auto"
    objective: Objective = "memory"
    allocation: Allocation = "joint"
    data: str | None = None
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    min_tokens: Tokens = 256
    sites: dict[str, SiteSetting] = Field(default_factory=dict)


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe, or the defaults where there is none.

    Raises:
        SbpatchError: the file is missing, is no YAML, or has a key or value that a recipe does not take.
    """
    if path is None:
        return Recipe()
    if not path.exists():
        raise SbpatchError(f"no recipe at {path}: No such file or directory")
    text = read_text(path, "recipe")
    try:
        return Recipe.model_validate(yaml.safe_load(text) or {})
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if not isinstance(error, ValidationError):  # a ValueError is of a date or number that YAML knows
            raise SbpatchError(f"{path} is not YAML: {one_line(error)}") from None
        first = error.errors()[0]
        raise SbpatchError(f"recipe {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except SbpatchError as error:
        raise SbpatchError(f"recipe {path}: {error}") from None


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
