"""TRL's trainers with our routers: losses worked out by hand, and steps that equal those of `MoETrainer`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import HfArgumentParser, set_seed

from hf_moe_ext import (
    AdaMoERouterConfig,
    DeepSeekMoERouterConfig,
    DTSRouterConfig,
    ExpertChoiceRouterConfig,
    MoETrainer,
    StochasticRouterConfig,
    TopKRouterConfig,
    trace_routing,
)
from hf_moe_ext.data import byte_tokenizer
from hf_moe_ext.modeling.moe_structure import auxiliary_losses

from .common import NUM_EXPERTS, arguments, logged, rows, sgd, snapshot, stock_mixtral, tiny_moe
from .test_losses import COEFS, reference, router, slow_losses


pytest.importorskip("trl", minversion="1.16", reason="trl>=1.16 is not installed")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from hf_moe_ext.trainers.trl import MoEDPOConfig, MoEDPOTrainer, MoESFTConfig, MoESFTTrainer  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
LENGTHS = [9, 5, 7, 3]
DATA = rows(LENGTHS, prompts=[4, 0, 2, 1])
PLAIN = {"balance_coef": 0.0, "z_coef": 0.0, "entropy_coef": 0.0}


def tokenizer():
    made = byte_tokenizer()
    made.eos_token = "<pad>"
    return made


def as_dataset(data=DATA):
    """Tokenized texts without their padding, as TRL wants them."""
    real = [row["attention_mask"].bool() for row in data]
    return Dataset.from_list(
        [
            {name: row[name][mask].tolist() for name in ("input_ids", "labels")}
            for row, mask in zip(data, real, strict=True)
        ]
    )


def options(folder, **overrides):
    values = {**arguments(folder).to_dict(), **overrides}
    kept = ("output_dir", "report_to", "use_cpu", "disable_tqdm", "max_steps", "logging_steps", "save_strategy")
    kept += (
        "per_device_train_batch_size",
        "learning_rate",
        "lr_scheduler_type",
        "train_sampling_strategy",
        *overrides,
    )
    return {"bf16": False, **{name: values[name] for name in kept}}


def sft_config(folder, **overrides):
    return MoESFTConfig(**options(folder, **{"dataset_kwargs": {"skip_prepare_dataset": True}, **overrides}))


def sft(model, folder, data=None, teacher=None, peft_config=None, **overrides):
    """A trainer that is ready."""
    return MoESFTTrainer(
        model,
        sft_config(folder, **overrides),
        train_dataset=as_dataset() if data is None else data,
        processing_class=tokenizer(),
        teacher=teacher,
        peft_config=peft_config,
    )


def check_step(model, twin, msg="", atol=2e-5):
    """`twin` has gradients; `model` has taken a step of plain gradient descent."""
    moved = 0
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        moved += gradient is not None and bool(gradient.abs().max() > 1e-4)
        wanted = expected[name] if gradient is None else expected[name] - gradient
        torch.testing.assert_close(parameter, wanted, atol=atol, rtol=1e-5, msg=name + msg)
    assert moved > 5


# --- SFT ---


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("size", [4, 2, 1], ids=["4x1", "2x2", "1x4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_an_sft_step_follows_the_reference(tmp_path, size, smoothing, checkpointing):
    """Weights after a step, whatever the micro-batches, and every logged loss: nothing is lost, nothing is twice."""
    model, twin = tiny_moe(router(**COEFS)), tiny_moe(router(**COEFS)).train()
    total, parts = reference(twin, DATA, size, smoothing)
    total.backward()
    trainer = sft(
        model,
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=4 // size,
        label_smoothing_factor=smoothing,
        gradient_checkpointing=checkpointing,
        **sgd(),
    )
    trainer.train()
    check_step(model, twin)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["moe/lm_loss"] == pytest.approx(parts["lm"], rel=1e-5)
    for name in COEFS:
        assert line[f"moe/loss_{name}"] == pytest.approx(parts[name], rel=1e-5)
    assert "aux_loss" not in line and line["num_tokens"] == sum(LENGTHS)


ROUTERS = {
    "top_k": TopKRouterConfig(balance_coef=0.3, z_coef=0.05),
    "null_experts": AdaMoERouterConfig(balance_coef=0.5, balance_coef_end=0.1, balance_schedule="linear", z_coef=0.1),
    "bias": DeepSeekMoERouterConfig(
        expert_balance_coef=0.2, sequence_balance_coef=0.3, correction_bias=True, bias_update_rate=0.05
    ),
    "schedule": DTSRouterConfig(balance_coef=0.2),
}


def both(folder, make, *, teacher=None, **overrides):
    """The same training in `MoETrainer` and in `MoESFTTrainer`."""
    found = []
    for kind in ("moe", "trl"):
        model = make()
        given = None if teacher is None else teacher()
        if kind == "moe":
            args = arguments(folder / kind, **{"gradient_accumulation_steps": 2, "max_steps": 3, **overrides})
            trainer = MoETrainer(model=model, args=args, train_dataset=DATA * 3, teacher=given)
        else:
            values = {"gradient_accumulation_steps": 2, "max_steps": 3, "gradient_checkpointing": False, **overrides}
            values["pad_to_multiple_of"] = max(LENGTHS)  # so that random numbers have the same shapes
            trainer = sft(model, folder / kind, as_dataset(DATA * 3), given, **values)
        set_seed(3)
        trainer.train()
        found.append(trainer)
    return found


def check_same(first, second, atol=5e-5):
    for (name, one), other in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5, msg=name)
    for mine, theirs in zip(first.state.log_history[:3], second.state.log_history, strict=False):
        names = [name for name in mine if name.startswith(("moe/", "loss", "grad_norm"))]
        for name in names:
            if not any(word in name for word in ("time", "second", "flops")):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert len(names) > 10


@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_trains_as_in_moe_trainer(tmp_path, name):
    """Losses, schedules, bias updates and metrics of three steps with accumulation."""
    first, second = both(tmp_path, lambda: tiny_moe(ROUTERS[name]), **sgd(learning_rate=0.1))
    check_same(first, second)
    before = snapshot(tiny_moe(ROUTERS[name]))
    after = second.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before if "gate" in key)


CHOICES = {
    "freeze_router": {"freeze_router": True},
    "train_experts": {"train_experts": [1, 4], "weight_decay": 0.1},
    "train_only_moe": {"train_only_moe": True},
    "adaptive_balance": {"adaptive_balance": 0.2},
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_every_choice_is_that_of_moe_trainer(tmp_path, name):
    first, second = both(tmp_path, lambda: tiny_moe(TopKRouterConfig(balance_coef=0.3)), **CHOICES[name])
    check_same(first, second)
    assert str(first.parameter_report()) == str(second.parameter_report())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_teacher_is_heard_as_in_moe_trainer(tmp_path, smoothing):
    """TRL's measures come from the same logits then."""
    first, second = both(
        tmp_path,
        lambda: tiny_moe(TopKRouterConfig(balance_coef=0.3)),
        teacher=lambda: stock_mixtral(seed=5),
        distill_coef=0.7,
        distill_temperature=2.0,
        distill_steps=2,
        label_smoothing_factor=smoothing,
    )
    check_same(first, second)
    assert len(logged(second, "moe/loss_distillation")) == 2
    plain = sft(tiny_moe(TopKRouterConfig()), tmp_path / "plain", max_steps=1)
    plain.train()
    told = sft(tiny_moe(TopKRouterConfig()), tmp_path / "told", teacher=stock_mixtral(seed=5), distill_coef=1e-9)
    told.train()
    for name in ("entropy", "mean_token_accuracy", "loss", "num_tokens"):
        assert logged(plain, name)[0] == pytest.approx(logged(told, name)[0], rel=1e-5), name


def test_two_passes_are_compared_as_in_moe_trainer(tmp_path):
    first, second = both(tmp_path, lambda: tiny_moe(StochasticRouterConfig(train_draw="token", consistency_coef=0.5)))
    check_same(first, second)
    assert logged(second, "moe/loss_consistency")[0] > 0


def test_evaluation_losses_are_plain(tmp_path):
    trainer = sft(tiny_moe(router(**COEFS)), tmp_path)
    found = trainer.evaluate(as_dataset())["eval_loss"]
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}
        losses = []
        for row in range(len(DATA)):
            logits = trainer.model.eval()(batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1])
            targets = batch["labels"][row, 1:]
            losses.append(F.cross_entropy(logits.logits[0, :-1], targets, ignore_index=-100, reduction="sum"))
    assert found == pytest.approx(float(sum(losses) / (batch["labels"][:, 1:] != -100).sum()), rel=1e-5)


@pytest.mark.parametrize("how", ["padding_free", "packing"])
def test_documents_in_one_row_train_as_apart(tmp_path, how):
    """A row of several documents: attention, losses and balance are those of the padded batch."""
    config = DeepSeekMoERouterConfig(expert_balance_coef=0.2, sequence_balance_coef=0.3, z_coef=0.05)
    apart = sft(tiny_moe(config), tmp_path / "a", per_device_train_batch_size=4, **sgd())
    apart.train()
    if how == "packing":
        data = as_dataset()
        together = sft(
            tiny_moe(config),
            tmp_path / "b",
            data,
            packing=True,
            max_length=sum(LENGTHS),
            dataset_kwargs=None,
            per_device_train_batch_size=1,
            **sgd(),
        )
        assert len(together.train_dataset) == 1
    else:
        together = sft(
            tiny_moe(config),
            tmp_path / "b",
            padding_free=True,
            max_length=None,
            per_device_train_batch_size=4,
            **sgd(),
        )
    together.train()
    for (name, one), other in zip(apart.model.named_parameters(), together.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5, msg=name)
    for name in ("moe/loss_sequence_balance", "moe/loss_expert_balance", "moe/loss_z", "moe/lm_loss"):
        assert logged(apart, name)[0] == pytest.approx(logged(together, name)[0], rel=1e-5), name


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.gate.weight"]}


def test_adapters_train_with_the_losses_once(tmp_path):
    model = tiny_moe(router(**COEFS))
    before = snapshot(model)
    total, parts = reference(tiny_moe(router(**COEFS)).train(), DATA, 4)
    trainer = sft(model, tmp_path, peft_config=LoraConfig(**LORA), per_device_train_batch_size=4, max_steps=2)
    trainer.train()
    line = trainer.state.log_history[0]  # new adapters change nothing in the first step
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["moe/aux_loss"] == pytest.approx(total.item() - parts["lm"], rel=1e-4)
    base = trainer.model.get_base_model()
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(before[name], kept[name]) for name in before if "experts" in name)
    moved = {n: p for n, p in trainer.model.named_parameters() if "lora_B" in n}
    assert moved and all(bool(p.abs().max() > 0) for p in moved.values())
    assert any("gate" in name for name in moved)


def make_resumable(folder, **overrides):
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    return sft(tiny_moe(ROUTERS["bias"]), folder, as_dataset(DATA * 4), **(values | overrides))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """The log between two checkpoints, and TRL's counts, too."""
    whole = make_resumable(tmp_path / "a")
    whole.train()
    make_resumable(tmp_path / "b").train()
    resumed = make_resumable(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    first, second = (t.state.log_history[0] for t in (whole, resumed))
    for name in first:
        if not any(word in name for word in ("time", "second", "flops")):
            assert first[name] == second[name], name
    assert {"entropy", "num_tokens", "mean_token_accuracy", "moe/loss_sequence_balance"} <= set(first)


def test_a_folder_is_loaded(tmp_path):
    model = tiny_moe(router(**COEFS))
    model.save_pretrained(tmp_path / "model")
    trainer = sft(str(tmp_path / "model"), tmp_path / "out", freeze_router=True)
    assert type(trainer.model).__name__ == "MoeExtMixtralForCausalLM" and len(trainer.routers) == 2
    assert not any(p.requires_grad for r in trainer.routers for p in r.parameters())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.model.config.router_aux_loss_coef == model.config.router_aux_loss_coef
    assert trainer.model.config.output_router_logits is False


# --- DPO ---


TEXTS = [("ab c", "yes", "n"), ("d", "e", "fgh"), ("hi! ", "so", "x y"), ("jk", "l", "m")]
PAIRS = [tuple(tokenizer()(text).input_ids + ([0] if i else []) for i, text in enumerate(row)) for row in TEXTS]
WORDS = {"vocab_size": 257}


def pairs():
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in TEXTS])


def dpo(model, folder, ref_model=None, peft_config=None, data=None, **overrides):
    values = {"per_device_train_batch_size": 4, "beta": 0.3, **overrides}
    return MoEDPOTrainer(
        model,
        ref_model,
        MoEDPOConfig(**options(folder, **values)),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def padded(chosen):
    """The chosen and then the rejected texts of some pairs: ids, mask, and the first place of each completion."""
    texts = [(p, c) for p, c, _ in chosen] + [(p, r) for p, _, r in chosen]
    longest = max(len(p) + len(c) for p, c in texts)
    ids = torch.tensor([[*p, *c, *[0] * (longest - len(p) - len(c))] for p, c in texts])
    mask = torch.tensor([[1] * len(p + c) + [0] * (longest - len(p + c)) for p, c in texts])
    return ids, mask, [len(p) for p, _ in texts]


def log_likelihoods(model, chosen):
    """Of the completions, one by one."""
    ids, mask, starts = padded(chosen)
    log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    lengths = mask.sum(dim=1).tolist()
    return [
        sum(log_probs[row, place - 1, ids[row, place]] for place in range(start, length))
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def dpo_reference(model, ref, size):
    parts = dict.fromkeys(("dpo", *COEFS), 0.0)
    steps = len(PAIRS) // size
    for i in range(0, len(PAIRS), size):
        chosen = PAIRS[i : i + size]
        with trace_routing(model) as contexts:
            found = log_likelihoods(model, chosen)
        with torch.no_grad():
            known = log_likelihoods(ref, chosen)
        gaps = [f - k for f, k in zip(found, known, strict=True)]
        for row in range(size):
            parts["dpo"] = parts["dpo"] - F.logsigmoid(0.3 * (gaps[row] - gaps[row + size])) / len(PAIRS)
        for record in contexts[0].records.values():
            losses = slow_losses(record.logits, record.index, padded(chosen)[1].reshape(-1))
            for name, value in losses.items():
                parts[name] = parts[name] + value / len(contexts[0].records) / steps
    return parts["dpo"] + sum(COEFS[name] * parts[name] for name in COEFS), parts


@pytest.mark.parametrize("size", [4, 2, 1], ids=["4x1", "2x2", "1x4"])
@pytest.mark.parametrize("given", [True, False], ids=["reference", "copy"])
def test_a_dpo_step_follows_the_reference(tmp_path, size, given):
    model, twin = tiny_moe(router(**COEFS), **WORDS), tiny_moe(router(**COEFS), **WORDS).train()
    ref = tiny_moe(router(**COEFS), seed=7, **WORDS).eval()
    total, parts = dpo_reference(twin, ref if given else tiny_moe(router(**COEFS), **WORDS).eval(), size)
    total.backward()
    start = snapshot(model)
    trainer = dpo(
        model,
        tmp_path,
        ref if given else None,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=4 // size,
        **sgd(),
    )
    trainer.train()
    check_step(model, twin)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert line["moe/lm_loss"] == pytest.approx(parts["dpo"].item(), rel=1e-5)
    for name in COEFS:
        assert line[f"moe/loss_{name}"] == pytest.approx(parts[name].item(), rel=1e-5)
    if not given:
        assert trainer.ref_model is not model and not trainer.ref_model.training
        assert parts["dpo"].item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
        kept = trainer.ref_model.state_dict()
        assert all(torch.equal(start[name], kept[name]) for name in start)


def test_the_reference_under_adapters_counts_nowhere(tmp_path):
    """The same model is asked twice, once without its adapters: only the other pass has losses, loads and updates."""
    config = DeepSeekMoERouterConfig(expert_balance_coef=0.2, correction_bias=True, bias_update_rate=0.05, z_coef=0.1)
    model, twin = tiny_moe(config, **WORDS), tiny_moe(config, **WORDS)
    ids, mask, _ = padded(PAIRS)
    with trace_routing(twin.train()) as contexts, torch.no_grad():
        twin(input_ids=ids, attention_mask=mask)
    aux, named = auxiliary_losses(contexts)
    trainer = dpo(model, tmp_path, peft_config=LoraConfig(**LORA))
    seen = []
    for one in trainer.routers:
        one.after_optimizer_step = lambda counts, update=one.after_optimizer_step: (
            seen.append(counts),
            update(counts),
        )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["moe/lm_loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    assert line["moe/aux_loss"] == pytest.approx(aux.item(), rel=1e-4)
    assert line["moe/loss_z"] == pytest.approx(named["z"].item(), rel=1e-4)
    assert len(seen) == 2
    for counts, record in zip(seen, contexts[0].records.values(), strict=True):
        chosen = record.index[mask.flatten().bool()].flatten()
        assert counts.tolist() == chosen.bincount(minlength=NUM_EXPERTS).tolist()


def test_precomputed_references_give_the_same_step(tmp_path):
    found = []
    for precompute in (False, True):
        model = tiny_moe(router(**COEFS), **WORDS)
        trainer = dpo(model, tmp_path / str(precompute), precompute_ref_log_probs=precompute, **sgd())
        trainer.train()
        found.append(trainer)
    check = zip(found[0].model.named_parameters(), found[1].model.parameters(), strict=True)
    for (name, one), other in check:
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)


def test_what_sft_made_is_the_reference_of_dpo(tmp_path):
    """TRL binds a forward to a model. The copy that is the reference must not run the model that is trained."""
    model = tiny_moe(router(**COEFS), **WORDS)
    sft(model, tmp_path / "sft").train()
    ids, mask, _ = padded(PAIRS)
    trainer = dpo(model, tmp_path / "dpo", max_steps=3)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "fused_lm_head": True}
    before = trainer.ref_model(**batch).log_probs
    trainer.train()
    assert torch.equal(trainer.ref_model(**batch).log_probs, before)
    assert not torch.allclose(model.eval()(**batch).log_probs, before, atol=1e-3)
    assert abs(logged(trainer, "rewards/margins")[-1]) > 1e-3


def test_a_dpo_run_resumes_exactly(tmp_path):
    def make(folder):
        values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
        return dpo(tiny_moe(ROUTERS["bias"], **WORDS), folder, data=pairs(), per_device_train_batch_size=2, **values)

    whole = make(tmp_path / "a")
    whole.train()
    make(tmp_path / "b").train()
    resumed = make(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole.state.log_history[0]["rewards/margins"] == resumed.state.log_history[0]["rewards/margins"]


# --- domains, arguments, refusals ---


def test_domains_are_measured_apart(tmp_path):
    data = as_dataset().add_column("domain", [0, 1, 1, 0])
    trainer = sft(
        tiny_moe(router()), tmp_path / "a", data, routing_domains=["code", "prose"], per_device_train_batch_size=4
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["moe/domain/code/entropy"] != line["moe/domain/prose/entropy"]
    data = pairs().add_column("domain", [0, 1, 1, 1])
    trainer = dpo(tiny_moe(router(), **WORDS), tmp_path / "b", data=data, routing_domains=["code", "prose"])
    trainer.train()
    texts = [PAIRS[0]]
    ids, mask, _ = padded(texts)
    twin = tiny_moe(router(), **WORDS).eval()
    with trace_routing(twin) as contexts, torch.no_grad():
        twin(input_ids=ids, attention_mask=mask)
    used = mask.flatten().bool()
    k = [(r.index[used] < NUM_EXPERTS).sum(-1).float().mean() for r in contexts[0].records.values()]
    assert trainer.state.log_history[0]["moe/domain/code/mean_k"] == pytest.approx(float(sum(k) / 2), rel=1e-5)


def test_arguments_are_parsed(tmp_path):
    line = ["--output_dir", str(tmp_path), "--freeze_router", "true", "--max_length", "77", "--bf16", "false"]
    (args,) = HfArgumentParser(MoESFTConfig).parse_args_into_dataclasses([*line, "--use_cpu"])
    assert args.freeze_router and args.max_length == 77
    (args,) = HfArgumentParser(MoEDPOConfig).parse_args_into_dataclasses([*line, "--use_cpu", "--beta", "0.5"])
    assert args.beta == 0.5 and args.freeze_router


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef` \(0.01\) weighs the stock auxiliary loss"):
        sft_config(tmp_path, router_aux_loss_coef=0.01)
    with pytest.raises(ValueError, match="`routing_metrics_max_series` must be an integer"):
        MoEDPOConfig(**options(tmp_path, routing_metrics_max_series=3))
    with pytest.raises(TypeError, match="`args` must be MoESFTConfig, got MoETrainingArguments"):
        MoESFTTrainer(tiny_moe(), arguments(tmp_path), train_dataset=as_dataset(), processing_class=tokenizer())
    with pytest.raises(ValueError, match="has stock routers, which leave no records"):
        sft(stock_mixtral(), tmp_path)
    with pytest.raises(ValueError, match="distil with `MoESFTTrainer`"):
        MoEDPOTrainer(tiny_moe(), args=MoEDPOConfig(**options(tmp_path)), teacher=stock_mixtral())
    with pytest.raises(ValueError, match="asks for a consistency loss between two passes, which DPO does not have"):
        dpo(tiny_moe(StochasticRouterConfig(), **WORDS), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        StochasticRouterConfig(train_draw="sequence"),
        ExpertChoiceRouterConfig(allow_non_causal=True),
    ],
    ids=lambda config: config.type,
)
def test_rows_of_documents_are_refused_where_they_would_meet(tmp_path, config):
    with pytest.raises(ValueError, match=f"the router `{config.type}` looks at a whole row"):
        sft(tiny_moe(config), tmp_path, padding_free=True, max_length=None)


def test_domains_in_rows_of_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`routing_domains` are measured row by row"):
        sft(tiny_moe(), tmp_path, padding_free=True, max_length=None, routing_domains=["a", "b"])
