"""`python -m tilewright_kernels.memory_patterns [MiB]`: the speed of each pattern here."""

import sys

import torch

from tilewright_kernels.memory_patterns import bandwidth_report

print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU: plain torch, no kernels")
print(f"{'pattern':<26}{'GB/s':>8}{'of copy_':>10}")
for line in bandwidth_report(megabytes=int(sys.argv[1]) if len(sys.argv) > 1 else 256):
    print(f"{line.pattern:<26}{line.gb_per_s:>8.0f}{line.share:>10.1%}")
