"""XLA's flags for tests, which spend most of their time in the compiler."""

# Unoptimised code compiles in half the time.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
