"""Tiny models and a tokenizer for the export tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from hf_moe_ext.modeling.modeling_moe_ext import extended_class
from hf_moe_ext.patching import extend


_SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def stock_mixtral():
    config = MixtralConfig(**_SIZES, num_local_experts=6, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


def stock_llama():
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def mixtral():
    return extend(stock_mixtral(), {"router": {"type": "top_p", "threshold": 0.5}})


def llama():
    """Experts in place of the dense blocks."""
    model_class = extended_class(LlamaForCausalLM)
    extension = {"experts": {"num_experts": 4}, "router": {"type": "top_p", "renormalize": True}}
    return model_class(model_class.config_class(**_SIZES, moe_ext=extension)).eval()


EXTENDED = {"mixtral": mixtral, "llama": llama}


def token_ids():
    return torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    output = model(token_ids())
    return output.logits if "logits" in output else output.last_hidden_state


def byte_tokenizer():
    """One token per byte, with a chat template."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab |= {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 4)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return wrapped
