"""Compiler options with which the full-size networks compile on a CPU."""

# XLA's default order of operations favours concurrency and holds the float32 copies of all bfloat16 weights at once.
# Code that is built fast halves the time of compilation.
CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
