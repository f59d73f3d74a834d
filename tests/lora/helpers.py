"""Adapters of PEFT on tiny models, with values that count."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_inputs, tiny_model


@torch.no_grad()
def randomize_peft(model, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def peft_model(seed=0, name="llama", **options):
    """A tiny model with a random adapter of PEFT."""
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    return randomize_peft(get_peft_model(tiny_model(name), LoraConfig(**options)), seed).eval()


def saved_adapter(folder, seed=0, name="llama", **options):
    """Save one and return its logits."""
    model = peft_model(seed, name, **options)
    model.save_pretrained(folder)
    return logits(model, name)


@torch.no_grad()
def logits(model, name="llama", **options):
    return model(**tiny_inputs(name), **options).logits
