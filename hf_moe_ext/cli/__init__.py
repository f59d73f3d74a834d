"""The command line, `hf-moe`."""
