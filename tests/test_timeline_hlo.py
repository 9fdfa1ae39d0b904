"""Scheduled HLO text is read as it is written, and refused where it is not one."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from gshard_moe.timeline import hlo

TEXT = (pathlib.Path(__file__).parent / "data" / "small.hlo").read_text()


def test_a_text_is_read():
    module = hlo.parse(TEXT)
    assert (module.name, module.num_partitions, module.entry) == ("jit_step", 16, "main")
    assert set(module.computations) == {"add", "offloaded", "main"}
    main = module.computations["main"]
    assert [i.opcode for i in main.instructions] == [
        *("parameter", "constant", "all-to-all-start", "fusion", "all-to-all-done"),
        *("reduce", "tuple"),
    ]
    assert main.root == "out"
    start, fusion = main.by_name["a2a-start"], main.by_name["fusion.1"]
    assert start.operands == ("x",)
    assert start.op_name == 'jit(step)/layers/exchange/\\"odd\\" (name)'
    assert start.result_bytes == 2 * 8 * 4 * 4 + 2 * 4
    assert fusion.called("calls", "body") == ["offloaded"]
    assert fusion.backend_config["window_config"]["estimated_cycles"] == "1750"
    assert main.by_name["total"].operands == ("a2a-done", "zero")
    assert main.by_name["x"].operands == () == main.by_name["zero"].operands
    assert main.by_name["a2a-done"].backend_config == {}


def test_a_kernels_notes_stand_on_lines_of_their_own():
    """As XLA writes them, in a loop's body too: what follows is still the instruction's."""
    notes = 'frontend_attributes={kernel_metadata={\n"a":"{\\"b\\": 1}",\n"c":"d"\n}}'
    text = f"""HloModule m, is_scheduled=true

%body (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %k = (f32[8]{{0}}, f32[8]{{0}}) custom-call(%x), {notes}, backend_config={{"n":1}}
  ROOT %y = f32[8]{{0}} get-tuple-element(%k), index=1, {notes}, metadata={{op_name="g"}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0}} parameter(0)
  ROOT %z = f32[8]{{0}} call(%x.1), to_apply=%body
}}
"""
    module = hlo.parse(text)
    body = module.computations["body"]
    assert [i.opcode for i in body.instructions] == [
        *("parameter", "custom-call", "get-tuple-element"),
    ]
    assert body.root == "y" and module.entry == "main"
    assert body.by_name["k"].backend_config == {"n": 1}
    assert body.by_name["y"].op_name == "g"
    with pytest.raises(hlo.TextError, match="body .* it was cut off"):
        hlo.parse(text[: text.index('"c":"d"')])


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("pred[7]", 7),
        ("s4[3]", 2),
        ("f8e4m3fn[2,2]", 4),
        ("c64[2]", 16),
        ("(f32[2]{0}, /*index=1*/(s32[], token[]))", 12),
        ("f32[<=8,2]", 64),
        ("f32[0,5]", 0),
        ("u32[]{:S(2)}", 4),
    ],
)
def test_bytes_of_shapes(shape: str, size: int):
    assert hlo.shape_bytes(shape) == size


def test_a_dtype_that_nobody_knows_is_refused():
    with pytest.raises(hlo.TextError, match=r"must be of a known dtype; got 'q7'"):
        hlo.shape_bytes("q7[3]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must begin with .HloModule.; got ''"),
        ("module @jit_f {", r'must begin with "HloModule"; got .module @jit_f'),
        (TEXT.replace(", is_scheduled=true", ""), r"is_scheduled=true.; got one that is not"),
        (TEXT[: TEXT.index("  %a2a-done")], r"computation main \(line 14\) must end .*cut off"),
        (TEXT[: TEXT.index("ENTRY")], r"must have an ENTRY computation; got 2 without one"),
        (TEXT.replace("to_apply=%add", "to_apply=%mul"), r"total calls mul, which is not in"),
        (TEXT.replace("ROOT %out", "%out"), r"computation main \(line 14\) must have a ROOT"),
        (TEXT.replace("tuple(%a2a-done, %total)", "%total"), r"line 21 must name an operation"),
        (TEXT.replace("tuple(%a2a-done, %total)", "tuple(%a2a-done"), r"must close its paren"),
        (TEXT.replace("tuple(%a2a-done, %total)", "tuple(%gone)"), r"out reads gone, which is not"),
    ],
)
def test_what_is_no_scheduled_module_is_refused(text: str, message: str):
    with pytest.raises(hlo.TextError, match=message):
        hlo.parse(text)


def test_what_jax_compiles_is_read():
    def step(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), c.sum()), x, length=3)

    text = jax.jit(step).lower(jnp.ones((8, 8))).compile().as_text()
    module = hlo.parse(text)
    opcodes = {i.opcode for c in module.computations.values() for i in c.instructions}
    assert "while" in opcodes
    names = {i.op_name for c in module.computations.values() for i in c.instructions}
    assert any("while/body" in name for name in names)
