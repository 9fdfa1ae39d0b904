"""The integer oracle over two processes of four devices: `==` with the numpy loop."""

import os
import pathlib
import subprocess
import sys

import cases
import combinations
import job

WORKER = pathlib.Path(__file__).parent / "integer_worker.py"
# Each compiles some twenty layers.
PATIENCE = 2 * job.PATIENCE


def test_two_processes_agree_with_the_loop_to_the_bit():
    here = str(WORKER.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, str(WORKER.parents[1])])}
    address = f"localhost:{job.free_port()}"
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), address, "2", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    names = [*cases.SHARDED_CARDS, *(found.name for found in combinations.OVER_PROCESSES)]
    for index, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0, output
        for name in names:
            assert f"process {index}: {name}: equal" in output
