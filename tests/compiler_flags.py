"""XLA's flags for tests, which spend most of their time in the compiler."""

from importlib.metadata import version

# Unoptimised code compiles in half the time.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # Fusions emitted by the older emitter compile in a quarter of the time; 0.11 has one emitter.
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
