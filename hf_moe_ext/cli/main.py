"""Entry point of `hf-moe`: finds the command, parses its dataclass, turns errors into messages."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from importlib import import_module

from .. import __version__


# command -> (module, one line of help). Modules are imported when their command runs.
COMMANDS = {
    "demo": ("demo", "a real dense model becomes a trained, exported Mixture-of-Experts"),
    "upcycle": ("upcycle", "make a Mixture-of-Experts of a dense checkpoint"),
    "extend": ("extend", "give a stock MoE checkpoint other routers"),
    "student": ("student", "write a student with fewer layers than its teacher"),
    "quantize": ("quantize", "store the experts of a model in 8, 4 or 2 bits"),
    "adapters": ("adapters", "mixtures of PEFT adapters: make, export, save, load, merge"),
    "inspect": ("inspect", "what stands where in a model: layers, routers, experts, parameters"),
    "train": ("train", "train a Mixture-of-Experts on text"),
    "generate": ("generate", "generate text"),
    "export": ("export", "write a model Hub-ready, with code and card, and verify it in a clean process"),
    "deepspeed": ("deepspeed", "write DeepSpeed's configuration for a stock MoE, with its experts spread (AutoEP)"),
    "report": ("report", "draw what a training run recorded"),
    "kernels": ("kernels", "export the kernels for the Hub, or tune them for a GPU"),
    "list": ("list", "families, routers, methods, domains"),
    "env": ("env", "versions and devices, for bug reports"),
}


def usage() -> str:
    """The overview printed by `hf-moe --help`."""
    lines = ["usage: hf-moe [--verbose] COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "`hf-moe COMMAND --help` shows the options of a command. Options can come from a YAML file:"]
    lines += ["`hf-moe COMMAND --config FILE`. `--verbose` shows tracebacks and informative logging."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in argv
    argv = [arg for arg in argv if arg != "--verbose"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name = argv.pop(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        print(f"hf-moe: unknown command `{name}`.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        code = _run(name, argv, verbose)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nhf-moe: interrupted. Finished files are whole; nothing was left half-written.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if verbose:
            traceback.print_exc()
        print(f"hf-moe {name}: {_message(error)}", file=sys.stderr)
        return 2 if type(error).__name__ == "UsageError" else 1


def _run(name: str, argv: list[str], verbose: bool) -> int:
    from .common import configure_logging

    configure_logging(verbose)
    try:
        return import_module(f".{COMMANDS[name][0]}", __package__).run(argv) or 0
    except SystemExit as end:  # `--help`
        return int(end.code or 0)


def _message(error: Exception) -> str:
    text = re.sub(r"^\[Errno \d+\] ", "", str(error).strip()) or type(error).__name__
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "StorageFull" in text
    if (full or "No space left on device" in text) and "nothing was left" not in text:
        return (
            f"the disk is full; nothing was left half-written. Free some space, then run the command again. ({text})"
        )
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError, NotImplementedError)):
        return f"{text}\n({type(error).__name__}; `--verbose` shows where)"
    return text


if __name__ == "__main__":
    sys.exit(main())
