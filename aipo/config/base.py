"""What sections of a config are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Statistic = Literal["mean_std", "iqr", "iqr_kappa"]
BucketBy = Literal["count", "quantile"]
KappaSchedule = Literal["combined", "linear", "plateau", "constant", "literal"]
Estimator = Literal["coordinate", "pointwise", "position"]
Features = Literal["random", "orthogonal", "quadrature"]
Normalize = Literal["none", "layernorm", "zscore"]
Measured = Literal[  # the names of aipo.tokens.table
    "entropy", "certainty", "energy", "gap", "residual", "attention", "information", "surprisal", "critical", "filler"
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads on, off, yes, no as booleans, and pydantic would take them for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise PydanticCustomError("boolean", "input should not be a boolean")
        return value
