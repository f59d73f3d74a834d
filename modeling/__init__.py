"""What runs in `forward` and travels to the Hub: routers, experts, and the registered Auto classes."""
