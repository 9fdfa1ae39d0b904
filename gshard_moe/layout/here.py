"""Where a program is traced: the mesh that is in effect, and what its devices are."""

import jax
from jax.sharding import AbstractMesh, Mesh

from gshard_moe.layout.layout import Layout


def mesh_here(layout: Layout) -> Mesh | AbstractMesh:
    """Returns the mesh that is set, else the layout's."""
    mesh = jax.sharding.get_abstract_mesh()
    return layout.mesh() if mesh.empty else mesh


def platform_of(layout: Layout | None) -> str:
    """Returns what the layout's devices are, or the default's if they are not known."""
    mesh = None if layout is None else layout.mesh()
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
