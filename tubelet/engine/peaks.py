"""Which GPU a driver's name means, and its dense peak: what MFU is measured against, in a run and in a plan.

Names are matched by whole words: "L40" is no "L4", "H100 PCIe" and "H100 NVL" are slower than the SXM module, and "H20",
"A10G", "RTX 4090 D" or a MIG slice of an H100 are other devices, of which nothing is claimed.
"""

from __future__ import annotations

import re

PEAK_TFLOPS = {"h100": 989.0, "h100-pcie": 756.0, "h100-nvl": 835.0, "h800": 989.0, "h200": 989.0, "h200-nvl": 835.0,
               "gh200": 990.0, "b200": 2250.0, "a100": 312.0, "a100-40": 312.0, "a800": 312.0, "l40s": 362.0, "l40": 181.0,
               "l4": 121.0, "a10": 125.0, "v100": 125.0, "rtx4090": 165.0, "rtx3090": 71.0}
"""Dense bf16 (never the 2:4-sparse figure) by kind, in TFLOP/s, from the vendors' data sheets; of a V100 fp16."""

_WORDS = {"h100-pcie": "h100 pcie", "h100-nvl": "h100 nvl", "h200-nvl": "h200 nvl", "a100-40": "a100 40gb",
          "rtx4090": "4090", "rtx3090": "3090"}
_OTHERS = {"mig", "laptop", "d", "ti"}


def gpu_kind(device_name: str) -> str | None:
    """The key of `PEAK_TFLOPS` for what `torch.cuda.get_device_name` says; None for a GPU that is not among them."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & _OTHERS:
        return None
    fitting = [key for key in PEAK_TFLOPS if set(_WORDS.get(key, key).split()) <= words]
    return max(fitting, key=lambda key: len(_WORDS.get(key, key).split()), default=None)
