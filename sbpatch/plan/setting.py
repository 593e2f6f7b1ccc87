"""A method with its parameters, as plans and recipes write it down."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..bounds import Count


class MethodSetting(BaseModel):
    """A method's parameters stand beside the other keys in a file (`window`, ...), and have a dictionary of their own here.

    So none can pass for one of the fields. Keys that are no fields are parameters.
    """

    model_config = ConfigDict(populate_by_name=True, allow_inf_nan=False)

    parameters: dict[str, Count] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _parameters_apart(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {key for name, field in cls.model_fields.items() for key in (name, field.alias)} - {"parameters"}
        others = {key: value for key, value in data.items() if key not in known}
        return {key: value for key, value in data.items() if key in known} | {"parameters": others}

    @model_serializer(mode="wrap")
    def _parameters_beside(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**handler(self), **self.parameters}
