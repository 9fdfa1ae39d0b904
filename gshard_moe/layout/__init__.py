"""Layouts: where every tensor of a model lives on a mesh, as a sharding card says."""

from gshard_moe.layout.flash import faults as flash_faults
from gshard_moe.layout.here import mesh_here, platform_of
from gshard_moe.layout.layout import (
    Layout,
    LayoutError,
    MeshLike,
    Stage,
    axis_type,
    free_axes,
    free_spec,
    parse_mesh,
)
from gshard_moe.layout.notation import ACTIVATIONS, LETTERS, PARAMETERS, ROLES, Dim
from gshard_moe.layout.sizes import letter_sizes, parameters_of

__all__ = [
    "ACTIVATIONS",
    "Dim",
    "LETTERS",
    "Layout",
    "LayoutError",
    "MeshLike",
    "PARAMETERS",
    "ROLES",
    "Stage",
    "axis_type",
    "flash_faults",
    "free_axes",
    "free_spec",
    "letter_sizes",
    "mesh_here",
    "parameters_of",
    "parse_mesh",
    "platform_of",
]
