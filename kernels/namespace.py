"""The namespace of our operators, `torch.ops.moe_ext`. An export writes another one: several may be loaded at once."""

NAMESPACE = "moe_ext"
