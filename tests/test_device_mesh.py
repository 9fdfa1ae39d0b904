"""A mesh over the devices of real slices, which no device is needed for."""

import pytest
from jax.experimental import topologies

from gshard_moe.layout import Layout


@pytest.mark.parametrize(
    ("name", "count"),
    [("v5p:8x8x8", 512), ("v5e:4x8", 32), ("v4:2x2x2", 16), ("tpu7x:2x2x2", 16)],
)
def test_axes_that_split_a_torus_or_a_chip(name, count):
    """`jax.make_mesh` refuses an axis of 4 on 8 x 8 x 8, and two devices a chip."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Layout.load("expert_data").mesh(devices)
    assert dict(mesh.shape) == {"data": count // 4, "expert": 4}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
