"""Nonlinear low-rank adaptation of PyTorch models: AuroRA (NeurIPS 2025, arXiv:2505.18738)."""

import importlib
from typing import TYPE_CHECKING, Any

from aurora.checkpoint import adapter_state_dict, load, load_adapter_state_dict, save
from aurora.core import (
    ANL,
    AuroraConfig,
    AuroraLinear,
    disabled,
    inject,
    parameters,
    remove,
)
from aurora.recipes import (
    parameter_groups,
    roughness,
    start_as_identity,
    start_from_gradient,
)

if TYPE_CHECKING:
    from aurora.bounds import BoundsReport, Certificate, assert_bounded, certify, report_bounds
    from aurora.merging import MergeReport, merge, watch_linearity

__version__ = "0.1.0"

__all__ = [
    "ANL",
    "AuroraConfig",
    "AuroraLinear",
    "BoundsReport",
    "Certificate",
    "MergeReport",
    "adapter_state_dict",
    "assert_bounded",
    "certify",
    "disabled",
    "inject",
    "load",
    "load_adapter_state_dict",
    "merge",
    "parameter_groups",
    "parameters",
    "remove",
    "report_bounds",
    "roughness",
    "save",
    "start_as_identity",
    "start_from_gradient",
    "watch_linearity",
]

# What training does not need is imported when it is first asked for.
_LATER = {
    "bounds": ("BoundsReport", "Certificate", "assert_bounded", "certify", "report_bounds"),
    "merging": ("MergeReport", "merge", "watch_linearity"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name == module or name in names:
            found = importlib.import_module(f"aurora.{module}")
            return found if name == module else getattr(found, name)
    raise AttributeError(f"module 'aurora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
