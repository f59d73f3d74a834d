"""Pictures of a training run: where the tokens went, how sure the routers were, how the loss fell."""

from .drawing import report


__all__ = ["report"]
