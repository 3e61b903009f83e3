"""Nonlinear low-rank adaptation of PyTorch models: AuroRA (NeurIPS 2025, arXiv:2505.18738)."""

from aurora import _kernels as _kernels  # puts itself into core
from aurora import _layer as _layer  # likewise
from aurora import _operations as _operations  # likewise
from aurora import _refusals as _refusals  # likewise
from aurora._running import check as check
from aurora.adapters import adapter_names as adapter_names
from aurora.adapters import add_adapter as add_adapter
from aurora.adapters import delete_adapter as delete_adapter
from aurora.adapters import set_adapter as set_adapter
from aurora.adapters import use as use
from aurora.attention import fuse_attention as fuse_attention
from aurora.attention import unfuse_attention as unfuse_attention
from aurora.bounds import BoundsReport as BoundsReport
from aurora.bounds import Certificate as Certificate
from aurora.bounds import assert_bounded as assert_bounded
from aurora.bounds import certify as certify
from aurora.bounds import report_bounds as report_bounds
from aurora.checkpoint import Loaded as Loaded
from aurora.checkpoint import adapter_state_dict as adapter_state_dict
from aurora.checkpoint import load as load
from aurora.checkpoint import load_adapter_state_dict as load_adapter_state_dict
from aurora.checkpoint import save as save
from aurora.core import ANL as ANL
from aurora.core import AuroraConfig as AuroraConfig
from aurora.core import AuroraLinear as AuroraLinear
from aurora.core import disabled as disabled
from aurora.core import inject as inject
from aurora.core import parameters as parameters
from aurora.core import remove as remove
from aurora.core import static_merge as static_merge
from aurora.core import summary as summary
from aurora.merging import MergeReport as MergeReport
from aurora.merging import merge as merge
from aurora.merging import watch_linearity as watch_linearity
from aurora.plots import plot as plot
from aurora.recipes import lasso as lasso
from aurora.recipes import parameter_groups as parameter_groups
from aurora.recipes import recommended as recommended
from aurora.recipes import rotate as rotate
from aurora.recipes import roughness as roughness
from aurora.recipes import start_as_identity as start_as_identity
from aurora.recipes import start_from_gradient as start_from_gradient

__version__ = "0.2.0"

# What is imported above as itself, and none of the modules it comes from.
__all__ = sorted(name for name, found in globals().items() if hasattr(found, "__qualname__"))
