"""Nonlinear low-rank adaptation of PyTorch models: AuroRA (NeurIPS 2025, arXiv:2505.18738)."""

from aurora.checkpoint import load, save
from aurora.core import (
    ANL,
    AuroraConfig,
    AuroraLinear,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter_state_dict,
    merge,
    parameters,
    remove,
)

__version__ = "0.1.0"

__all__ = [
    "ANL",
    "AuroraConfig",
    "AuroraLinear",
    "adapter_state_dict",
    "disabled",
    "inject",
    "load",
    "load_adapter_state_dict",
    "merge",
    "parameters",
    "remove",
    "save",
]
