"""One of several processes that run the integer oracle: `integer_worker.py HOST:PORT COUNT ID`.

Each compares what its own devices hold, and prints a line a card.
"""

import sys

import jax

DEVICES = 8


def main(coordinator: str, count: int, index: int) -> None:
    """Runs every sharded card; exits with 1 if an array differs."""
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.distributed.initialize(coordinator, count, index)
    # The library is first used here: a backend must not be there before the processes meet.
    import cases
    import integer_case

    assert len(jax.devices()) == DEVICES
    assert len(jax.local_devices()) == DEVICES // count
    config = integer_case.config()
    case = integer_case.make(config)
    want = integer_case.expected(case, config)
    failed = False
    for card in cases.SHARDED_CARDS:
        got = integer_case.run(case, config, cases.layout(card))
        differing = integer_case.differences(got, want)
        print(f"process {index}: {card}: {differing or 'equal'}", flush=True)
        failed = failed or bool(differing)
    jax.distributed.shutdown()
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
