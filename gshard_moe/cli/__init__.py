"""`gshard-moe`: the command line. It parses, prints and leaves the arithmetic to the library."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

import tyro

from gshard_moe.cli.compare import compare
from gshard_moe.cli.compile import compile
from gshard_moe.cli.explain import explain
from gshard_moe.cli.sample import sample
from gshard_moe.cli.train import train

VERBS: dict[str, Callable[..., int]] = {
    "train": train,
    "sample": sample,
    "explain": explain,
    "compile": compile,
    "compare": compare,
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs a verb and leaves with its exit status; what the user can mend is one message."""
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="gshard-moe",
            description="Mixture-of-Experts on JAX: annotated once, run on any mesh.",
            args=args,
        )
    except KeyboardInterrupt:
        print("gshard-moe: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # who read our output has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"gshard-moe: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _is_ours(error: BaseException) -> bool:
    """Whether an error is a message for the user, and not a fault of ours."""
    return type(error).__module__.startswith("gshard_moe")
