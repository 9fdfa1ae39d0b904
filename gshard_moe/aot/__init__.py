"""Ahead of time: programs compiled for clusters that nobody has at hand."""

from gshard_moe.aot.cluster import Cluster, ClusterError, cluster, compile_only
from gshard_moe.aot.compile import Compiled, CompileError, Memory, compile_lowered
from gshard_moe.aot.jit import JitWithOptions, jit
from gshard_moe.aot.options import OPTIONS, Option, compiler_options, generation_of

__all__ = [
    "OPTIONS",
    "Cluster",
    "ClusterError",
    "CompileError",
    "Compiled",
    "JitWithOptions",
    "Memory",
    "Option",
    "cluster",
    "compile_lowered",
    "compiler_options",
    "generation_of",
    "jit",
    "compile_only",
]
