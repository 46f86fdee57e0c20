"""The commands of python -m mambaout_jax, one to a file."""
