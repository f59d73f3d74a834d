"""`hf-moe generate`: text from a model, streamed to the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import UsageError, parse
from .common import load_model, require_tokenizer


@dataclass
class GenerateArguments:
    """Generate text and stream it to the terminal."""

    model: str = field(metadata={"help": "Model folder, `.gguf` file or Hub id."})
    prompt: str = field(metadata={"help": "What to continue, or to answer with --chat."})
    chat: bool = field(default=False, metadata={"help": "Put the prompt through the chat template."})
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens to generate."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the best token."})
    temperature: float = field(default=1.0, metadata={"help": "With --do_sample."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not beside the model."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def run(argv: list[str]) -> int:
    """Stream the continuation to standard output."""
    args: GenerateArguments = parse("generate", GenerateArguments, argv, positional=("model", "prompt"))
    if args.max_new_tokens < 1:
        raise UsageError(f"`--max_new_tokens` must be at least 1, got {args.max_new_tokens}.")
    if args.temperature <= 0:
        raise UsageError(f"`--temperature` must be positive, got {args.temperature}.")
    import torch
    from transformers import TextStreamer

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
    sampling = {"do_sample": True, "temperature": args.temperature} if args.do_sample else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=args.chat, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, **sampling)
    return 0


def encode(tokenizer, prompt: str, chat: bool):  # type: ignore[no-untyped-def]
    """Token tensors of a prompt, through the chat template where asked."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
