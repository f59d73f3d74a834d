"""`hf-moe generate`: text from a model, streamed to the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .arguments import UsageError, parse
from .common import load_model, require_tokenizer


STRATEGIES = ("self_contrast", "contrastive_search", "dola")


@dataclass
class GenerateArguments:
    """Generate text and stream it to the terminal."""

    model: str = field(metadata={"help": "Model folder, `.gguf` file or Hub id."})
    prompt: str = field(metadata={"help": "What to continue, or to answer with --chat."})
    chat: bool = field(default=False, metadata={"help": "Put the prompt through the chat template."})
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens to generate."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the best token."})
    temperature: float = field(default=1.0, metadata={"help": "With --do_sample."})
    strategy: str | None = field(default=None, metadata={"help": "self_contrast, contrastive_search or dola."})
    beta: float = field(default=0.5, metadata={"help": "Strength of self_contrast."})
    alpha: float = field(
        default=0.1, metadata={"help": "Self_contrast and dola leave out tokens below this share of the best one."}
    )
    weak: str = field(
        default="rank-2", metadata={"help": "Weak routing of self_contrast: rank-K, topk-K, threshold-P or random."}
    )
    strong: str | None = field(default=None, metadata={"help": "Strong routing of self_contrast, such as topk-4."})
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "Use so many experts for each token."})
    show_routing: str | None = field(
        default=None, metadata={"help": "Colour tokens by their experts, and write a page of it to this .html file."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not beside the model."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Stream the continuation to standard output."""
    args: GenerateArguments = parse("generate", GenerateArguments, argv, positional=("model", "prompt"))
    _check(args)
    import torch
    from transformers import TextStreamer

    from ..generation import generate, num_experts_per_tok

    trust = args.trust_remote_code
    model = load_model(args.model, trust_remote_code=trust, dtype=args.dtype).eval()
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text; pass a causal or seq2seq language model.")
    tokenizer = require_tokenizer(args.tokenizer or args.model, trust_remote_code=trust)
    if args.chat and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {args.model} has no chat template; leave out --chat.")
    inputs = encode(tokenizer, args.prompt, args.chat).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no token; pass some text.")
    torch.manual_seed(args.seed)
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    if args.do_sample:
        settings["temperature"] = args.temperature
    streamer = TextStreamer(tokenizer, skip_prompt=args.chat, skip_special_tokens=True)
    with _experts(model, args.num_experts_per_tok, num_experts_per_tok):
        if args.strategy is None:
            ids = model.generate(**inputs, streamer=streamer, **settings)
        else:
            settings |= _settings(args)
            ids = generate(model, **inputs, strategy=args.strategy, streamer=streamer, **settings)
        if args.show_routing is not None:
            _show_routing(model, tokenizer, ids, args.show_routing)
    return 0


def _check(args: GenerateArguments) -> None:
    if args.max_new_tokens < 1:
        raise UsageError(f"`--max_new_tokens` must be at least 1, got {args.max_new_tokens}.")
    if args.temperature <= 0:
        raise UsageError(f"`--temperature` must be positive, got {args.temperature}.")
    if args.strategy is not None and args.strategy not in STRATEGIES:
        raise UsageError(f"`--strategy` must be one of {', '.join(STRATEGIES)}, got {args.strategy}.")
    if args.num_experts_per_tok is not None and args.num_experts_per_tok < 1:
        raise UsageError(f"`--num_experts_per_tok` must be at least 1, got {args.num_experts_per_tok}.")
    if args.show_routing is not None and not args.show_routing.endswith(".html"):
        raise UsageError(f"`--show_routing` names the .html file to write, got {args.show_routing}.")
    from ..generation import RoutingMode
    from ..generation.decoding import check_strengths

    try:
        check_strengths(args.beta, args.alpha)
        for mode in (args.weak, args.strong):
            if mode is not None:
                RoutingMode.read(mode)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _settings(args: GenerateArguments) -> dict[str, Any]:
    """What the chosen strategy takes."""
    if args.strategy == "self_contrast":
        return {"beta": args.beta, "alpha": args.alpha, "weak": args.weak, "strong": args.strong}
    return {"alpha": args.alpha} if args.strategy == "dola" else {}


def _experts(model: Any, k: int | None, num_experts_per_tok: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext() if k is None else num_experts_per_tok(model, k)


def _show_routing(model: Any, tokenizer: Any, ids: Any, path: str) -> None:
    from ..reporting.tokens import trace_tokens

    found = trace_tokens(model, tokenizer, ids[:1])
    written = found.write(path)
    print(f"\n{found.coloured()}\n{found.legend()}\nwrote {written}")


def encode(tokenizer, prompt: str, chat: bool):  # type: ignore[no-untyped-def]
    """Token tensors of a prompt, through the chat template where asked."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
