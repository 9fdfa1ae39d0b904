"""Bytes that instructions move, by hand: of a stack of layers, and a table of rows."""

import pytest

from gshard_moe.timeline import costs, hlo

KIB = 1024


def module_of(*entry: str, computations: str = "") -> hlo.Module:
    """A module; the last of the entry's lines is its root."""
    lines = [*(f"  {line}" for line in entry[:-1]), f"  ROOT {entry[-1]}"]
    text = ["HloModule m, is_scheduled=true", computations, "ENTRY %main () -> f32[] {", *lines]
    return hlo.parse("\n".join([*text, "}"]))


def bytes_of(module: hlo.Module) -> float:
    entry = module.computations[module.entry]
    return costs.moved_bytes(module, entry, entry.by_name[entry.root])


# A layer is 256 x 256 floats, 256 KiB; a stack has 32 of them.
LAYER = 256 * KIB
ARGUMENTS = (
    "%stack = f32[32,256,256]{2,1,0} parameter(0)",
    "%layer = f32[1,256,256]{2,1,0} parameter(1)",
    "%i = s32[] parameter(2)",
    "%rows = s32[64]{0} parameter(3)",
    "%table = f32[4096,256]{1,0} parameter(4)",
)


def body(*lines: str) -> str:
    """A computation of the same arguments, called `s l i r t`; the last line is the root."""
    arguments = [
        line.replace("%stack", "%s")
        .replace("%layer", "%l")
        .replace("%rows", "%r")
        .replace("%table", "%t")
        for line in ARGUMENTS
    ]
    inside = [*arguments, *lines[:-1], f"ROOT {lines[-1]}"]
    return "\n".join(["%body () -> f32[] {", *(f"  {line}" for line in inside), "}"])


SLICE = "%d = f32[1,256,256]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,256,256}"
UPDATE = "%u = f32[32,256,256]{2,1,0} dynamic-update-slice(%s, %l, %i, %i, %i)"
GATHER = "%g = f32[64,256]{1,0} gather(%t, %r), offset_dims={1}, slice_sizes={1,256}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%x = f32[1,256,256]{2,1,0} add(%layer, %layer)", 3 * LAYER),
        ("%x = f32[1,256,256]{2,1,0} dynamic-slice(%stack, %i, %i, %i)", 2 * LAYER),
        ("%x = f32[32,256,256]{2,1,0} dynamic-update-slice(%stack, %layer, %i, %i, %i)", 2 * LAYER),
        ("%x = f32[64,256]{1,0} gather(%table, %rows), offset_dims={1}", 2 * 64 * KIB),
        # Beside the core: there and back; or into the core's own memory, S(1).
        (
            "%x = (f32[1,256,256]{2,1,0}, f32[1,256,256]{2,1,0}, u32[]{:S(2)}) copy-start(%layer)",
            2 * LAYER,
        ),
        (
            "%x = (f32[1,256,256]{2,1,0:T(8,128)S(1)}, f32[1,256,256]{2,1,0:T(8,128)}, u32[]) "
            "copy-start(%layer), cross_program_prefetch_index=0",
            LAYER,
        ),
        (
            "%x = ((f32[32,256,256]{2,1,0}), f32[2,256,256]{2,1,0:S(1)}, u32[]) "
            "slice-start(%stack), slice={[4:6], [0:256], [0:256]}",
            2 * LAYER,
        ),
        (
            "%x = ((f32[32,256,256]{2,1,0}, s32[]), f32[1,256,256]{2,1,0}, u32[]) "
            "dynamic-slice-start(%stack, %i)",
            2 * LAYER,
        ),
    ],
)
def test_moved_bytes(line: str, expected: int):
    assert bytes_of(module_of(*ARGUMENTS, line)) == expected


@pytest.mark.parametrize(
    ("lines", "read", "written"),
    [
        # One layer of the stack, and which.
        ([SLICE, "%y = f32[1,256,256]{2,1,0} negate(%d)"], LAYER + 4, LAYER),
        # In place: the new layer is read and written, the rest of the buffer is left alone.
        ([UPDATE], LAYER + 4, LAYER),
        ([UPDATE, "%b = f32[32,65536]{1,0} bitcast(%u)"], LAYER + 4, LAYER),
        # 64 rows of the table, and which.
        ([GATHER, "%y = f32[64,256]{1,0} negate(%g)"], 64 * KIB + 256, 64 * KIB),
        # Sliced and read whole: whole.
        ([SLICE, "%y = f32[32,256,256]{2,1,0} sine(%s)"], 32 * LAYER + 4, 32 * LAYER),
        # A tuple: both its parts.
        (
            [UPDATE, "%n = f32[1,256,256]{2,1,0} negate(%l)", "%y = (f32[], f32[]) tuple(%u, %n)"],
            LAYER + 4,
            2 * LAYER,
        ),
        # In pairs, through a tuple that is taken apart again.
        (
            [
                "%p = (f32[32,256,256]{2,1,0}, s32[]) tuple(%s, %i)",
                "%s2 = f32[32,256,256]{2,1,0} get-tuple-element(%p), index=0",
                "%i2 = s32[] get-tuple-element(%p), index=1, metadata={}",
                SLICE.replace("(%s, %i", "(%s2, %i2"),
            ],
            LAYER + 4,
            LAYER,
        ),
        # All of it unread: nothing but what is written.
        (["%z = f32[] constant(0)", "%b = f32[1,256,256]{2,1,0} broadcast(%z)"], 0, LAYER),
    ],
)
@pytest.mark.parametrize("call", ["fusion", "fusion-start", "async-start"])
def test_a_fusion_reads_what_it_slices_and_writes_what_is_new(
    lines: list[str], read: int, written: int, call: str
):
    whole = f"%x = f32[] {call}(%stack, %layer, %i, %rows, %table), kind=kLoop, calls=%body"
    assert bytes_of(module_of(*ARGUMENTS, whole, computations=body(*lines))) == read + written
    # The same inside of another fusion.
    inner = whole.replace("%stack", "%s").replace("%layer", "%l").replace("%rows", "%r")
    inner = inner.replace("%table", "%t").replace("%x", "%f").replace(call, "fusion")
    outer = body(inner).replace("%body ()", "%outer ()")
    nested = whole.replace("%body", "%outer")
    module = module_of(*ARGUMENTS, nested, computations=body(*lines) + "\n" + outer)
    assert bytes_of(module) == read + written
