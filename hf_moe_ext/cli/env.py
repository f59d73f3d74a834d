"""`hf-moe env`: versions and devices."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from .arguments import parse


PACKAGES = (
    *("hf-moe-ext", "transformers", "torch", "accelerate", "peft", "datasets", "evaluate", "safetensors"),
    *("huggingface-hub", "triton", "bitsandbytes", "kernels", "gguf", "matplotlib", "tensorboard", "trackio", "trl"),
)


@dataclass
class EnvArguments:
    """Versions and devices, for bug reports."""


def run(argv: list[str]) -> int:
    """Print one line per fact."""
    parse("env", EnvArguments, argv)
    import torch

    print(f"{'python':<18}{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:<18}{version}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'GPUs':<18}{', '.join(devices) or 'none'}")
    print(f"{'CPU threads':<18}{torch.get_num_threads()} ({torch.backends.cpu.get_cpu_capability()})")
    return 0
