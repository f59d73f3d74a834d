"""Without a GPU the Triton kernels run in Triton's interpreter, chosen before anything imports triton."""

import os

import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Bit for bit comparisons need one rule for fused multiply-add; the default of Triton is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
