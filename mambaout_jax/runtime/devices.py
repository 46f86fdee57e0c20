"""Published peak speeds of accelerators, for model FLOPs utilization (MFU)."""

import re

# Dense bfloat16 FLOP/s of a device as jax counts devices (T4 and V100: float16); the first pattern
# found in its `device_kind` counts. Sources: Google Cloud's TPU pages, NVIDIA's data sheets.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v6( lite|e)", 918e12),
    (r"TPU v5p|TPU v5$", 459e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v4$", 275e12),
    (r"H200|H100.*HBM3|H100.*SXM", 989e12),
    (r"H100.*NVL", 835e12),
    (r"H100", 756e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bA10G?\b", 125e12),
    (r"V100", 125e12),
    (r"\bT4\b", 65e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the published peak in FLOP/s of a device, None for an unknown one."""
    return next((peak for kind, peak in PEAK_FLOPS if re.search(kind, device_kind)), None)
