"""What every test runs under: 8 simulated CPU devices, and every check that JAX and jaxtyping have.

The environment is set before JAX is imported; processes that a test starts inherit it.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # Compiling for TPUs without one: quiet, and in several processes at a time. Without these,
    # libtpu asks for a metadata server, logs to files, and refuses a second process.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    # XLA's own passes all run, the partitioner's among them; only LLVM does not optimise what they
    # leave for the CPU, which halves the time to compile.
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip(),
}

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before any test imports the package: shapes and types are checked at every call.
jaxtyping.install_import_hook("gshard_moe", "beartype.beartype")

# A first example compiles, which takes longer than any deadline.
hypothesis.settings.register_profile("gshard_moe", deadline=None)
hypothesis.settings.load_profile("gshard_moe")
