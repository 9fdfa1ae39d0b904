"""One of several processes that run the integer oracle: `integer_worker.py HOST:PORT COUNT ID`.

Each compares what its own devices hold, and prints a line for each card and each combination.
"""

import sys

import jax

DEVICES = 8


def main(coordinator: str, count: int, index: int) -> None:
    """Runs every sharded card and one combination of each way; exits with 1 if any differs."""
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.distributed.initialize(coordinator, count, index)
    # The library is first used here: a backend must not be there before the processes meet.
    import cases
    import combinations
    import integer_case

    assert len(jax.devices()) == DEVICES
    assert len(jax.local_devices()) == DEVICES // count
    config = integer_case.config()
    case = integer_case.make(config)
    want = integer_case.expected(case, config)
    runs = [(card, case, want, config, cases.layout(card)) for card in cases.SHARDED_CARDS]
    for found in combinations.OVER_PROCESSES:
        layer, drawn = combinations.layer(found.routing), combinations.expected(found.routing)
        runs.append((found.name, *drawn, layer, combinations.layout(found)))
    failed = False
    for name, case, want, config, layout in runs:
        differing = integer_case.differences(integer_case.run(case, config, layout), want)
        print(f"process {index}: {name}: {differing or 'equal'}", flush=True)
        failed = failed or bool(differing)
    jax.distributed.shutdown()
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
