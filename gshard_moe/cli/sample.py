"""`gshard-moe sample`."""

import codecs
import pathlib
import sys
from typing import Annotated

import tyro

from gshard_moe.cli import devices
from gshard_moe.layout import Layout
from gshard_moe.train import checkpoint
from gshard_moe.train import run as runs
from gshard_moe.train import sample as sampling
from gshard_moe.train import state as states


def sample(
    *,
    run: pathlib.Path,
    prompt: str = "def ",
    tokens: int | None = None,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    sharding: str = "single",
    mesh: str | None = None,
    devices_: Annotated[int | None, tyro.conf.arg(name="devices")] = None,
) -> int:
    """Prints text from a trained model. Experts are dropless here.

    Args:
      run: Directory of a training.
      prompt: What the text begins with.
      tokens: How many bytes to add (default: 300, or what the model's positions leave room for).
      num_samples: How many texts; they must divide by the mesh axes of the batch.
      temperature: 0 takes the likeliest byte.
      top_p: Samples from the likeliest bytes that together have this probability.
      seed: Of the randomness.
      sharding: A sharding card, by name or path.
      mesh: Other sizes for axes of the card's mesh.
      devices_: How many devices (default: as the card's mesh, or all).
    """
    spec = runs.load(run)
    layout = Layout.load(sharding, mesh=mesh)
    devices.prepare(devices_, layout)
    layout = devices.bind(layout, devices_ or devices.fixed_size(layout), _say)
    model = states.Model(spec.model, layout)
    with checkpoint.Checkpoints(spec.checkpoints, keep=None) as checkpoints:
        restored = checkpoints.restore(states.abstract_state(model), say=_say)
    if restored is None:
        raise runs.RunError(f"{run}: must hold a checkpoint; there is none yet")
    _say(f"step {restored.step}")
    if tokens is None:
        tokens = max(min(300, spec.model.max_positions - len(prompt.encode())), 1)
    text = sampling.sample(
        model,
        restored.state.params,
        prompt.encode(),
        biases=restored.state.biases,
        num_tokens=tokens,
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if num_samples == 1:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        before = prompt  # printed with the first byte: a refusal comes before it
        for row_B in text:
            print(before + decoder.decode(bytes(row_B)), end="", flush=True)
            before = ""
        print(decoder.decode(b"", final=True))
        return 0
    rows = list(text)
    for i in range(num_samples):
        body = bytes(int(row_B[i]) for row_B in rows).decode("utf-8", "replace")
        print(f"--- {i}\n{prompt}{body}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
