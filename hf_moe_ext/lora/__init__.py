"""Adapters in and out: mixtures of LoRA experts from PEFT adapters, and back."""
