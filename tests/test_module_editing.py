"""Experts counted, added, taken out and trained alone, against models that never had them or never choose them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import hf_moe_ext as moe
from hf_moe_ext.mixtures import find_mixtures
from hf_moe_ext.modeling.moe_router import MoERouter
from hf_moe_ext.modeling.moe_structure import iter_routers, trace_routing
from hf_moe_ext.module_editing import Insertion, insert_experts, prune_experts, train_new_experts
from hf_moe_ext.trainers import train_rows
from hf_moe_ext.usage import ExpertUsage, expert_usage

from .modeling.test_moduleformer import make as moduleformer
from .trainers.common import arguments, logged, rows, sgd, snapshot, train


# mixtral and qwen2_moe renormalise, olmoe and moduleformer do not
NAMES = ("mixtral", "qwen2_moe", "olmoe", "moduleformer", "upcycled")
PLAIN = ("mixtral", "qwen2_moe", "olmoe")


def stock(name, router="top_k"):
    if name == "moduleformer":
        return moduleformer(moe_ext={"router": router, "attention": {"type": "routed", "router": router}})
    if name == "upcycled":
        model = moe.upcycle(tiny_model("llama"), "drop", num_experts=8, router=router, target="ext")
        for gate in iter_routers(model):
            gate.weight.data *= 30  # a fresh gate is nearly flat
        return model.eval()
    model = tiny_model(name)
    if name == "olmoe":
        model.config.norm_topk_prob = False
        for module in model.modules():
            if hasattr(module, "norm_topk_prob"):
                module.norm_topk_prob = False
    return model.eval()


def extended(name):
    """Every router of ours, with the rule computed here, and not by the gate itself."""
    model = stock(name, {"type": "top_k", "num_experts_per_tok": 2})
    return moe.extend(model, moe.TopKRouterConfig(num_experts_per_tok=2)) if name in PLAIN else model


def ids(batch=2, length=9):
    return torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, **inputs):
    return model(ids(), **inputs).logits


def without(model, removed, monkeypatch, keep_denominator):
    """Logits of a model whose routers never choose some experts, by their logits or by their choice alone."""
    name = "selection_scores" if keep_denominator else "router_logits"
    original = getattr(MoERouter, name)

    def patched(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        gone = removed.get(self.moe_site.key, ())
        return found.index_fill(-1, torch.tensor(list(gone), dtype=torch.long), float("-inf")) if gone else found

    with monkeypatch.context() as patch:
        patch.setattr(MoERouter, name, patched)
        return logits(model)


# --- counting ---


@pytest.mark.parametrize("name", NAMES)
def test_usage_against_the_logits(name):
    model = stock(name)
    before, expected = type(model), logits(model)
    batch = {"input_ids": ids(3, 6), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    batch["attention_mask"][1, :4] = 0  # padding on the left
    found = expert_usage(model, [batch, batch])
    assert type(model) is before and torch.equal(logits(model), expected)
    if name in PLAIN:
        moe.extend(model, moe.TopKRouterConfig())
    with trace_routing(model) as contexts, torch.no_grad():
        model(**batch)
    real = batch["attention_mask"].flatten().bool()
    records = contexts[0].all_records()
    assert records.keys() == found.keys()
    for key, record in records.items():
        p = record.logits.double().softmax(-1)[real]
        counts = torch.zeros(p.shape[1], dtype=torch.int64)
        for row in p.topk(2).indices.tolist():
            for number in row:
                counts[number] += 2  # the batch twice
        assert torch.equal(found[key].counts, counts) and found[key].tokens == 2 * int(real.sum())
        torch.testing.assert_close(found[key].scores, p.mean(0), rtol=1e-5, atol=1e-7)
        assert found[key].frequency.sum().item() == pytest.approx(2.0)


def test_experts_that_cover_a_share():
    usage = ExpertUsage(torch.tensor([50, 0, 30, 15, 5]), 100, torch.zeros(5))
    assert [usage.num_covering(share) for share in (0.5, 0.51, 0.8, 0.95, 0.96, 1.0)] == [1, 2, 2, 3, 4, 4]
    assert ExpertUsage(torch.zeros(3, dtype=torch.int64), 0, torch.zeros(3)).num_covering() == 0
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        usage.num_covering(0)


def test_nothing_to_count():
    with pytest.raises(ValueError, match="data is empty"):
        expert_usage(stock("mixtral"), [])
    with pytest.raises(ValueError, match="has a router of this package"):
        model = moe.extend(tiny_model("mixtral"), moe.MoeExtension(shared_experts=moe.SharedExpertsConfig()))
        expert_usage(model, [ids()])


# --- pruning ---


@pytest.mark.parametrize("keep_denominator", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_is_never_chosen(name, keep_denominator, monkeypatch, tmp_path):
    """Equal to the whole model with the logits of the removed experts at -inf, or with their choice forbidden. Saved
    and loaded it is the same."""
    model = extended(name)
    removed = {m.key: {0, 3} if m.attention is False else {1} for m in find_mixtures(model)[1]}
    whole = copy.deepcopy(model)
    expected = without(whole, removed, monkeypatch, keep_denominator)
    report = prune_experts(model, experts=removed, keep_denominator=keep_denominator)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(whole) - expected).abs().max() > 1e-3  # they were chosen
    assert report.removed == {key: tuple(sorted(numbers)) for key, numbers in removed.items()}
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    for layer in (*moe.describe(model).layers, *moe.describe(model).attention):
        if layer.key in removed:
            old = {m.key: m.num_experts for m in find_mixtures(whole)[1]}[layer.key]
            assert layer.num_experts == old - len(removed[layer.key]) == len(report.kept[layer.key])
    held = [gate.moe_removed_weight for gate in iter_routers(model) if "moe_removed_weight" in gate._buffers]
    assert bool(held) == (keep_denominator and name in ("olmoe", "moduleformer"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids(), **options), model.generate(ids(), use_cache=False, **options))


@pytest.mark.parametrize("keep_denominator", [False, True])
@pytest.mark.parametrize("name", ["olmoe", "moduleformer"])
def test_gradients_of_a_pruned_model(name, keep_denominator, monkeypatch):
    model = extended(name)
    removed = {m.key: {0} for m in find_mixtures(model)[1]}
    whole = copy.deepcopy(model)
    pruned = copy.deepcopy(model)
    report = prune_experts(pruned, experts=removed, keep_denominator=keep_denominator)
    pruned(ids(), labels=ids()).loss.backward()
    original = MoERouter.selection_scores

    def forbid(self, scores, *args):
        return original(self, scores, *args).index_fill(-1, torch.tensor([0]), float("-inf"))

    original_logits = MoERouter.router_logits

    def low(self, *args, **kwargs):
        return original_logits(self, *args, **kwargs).index_fill(-1, torch.tensor([0]), -1e4)

    patched = ("selection_scores", forbid) if keep_denominator else ("router_logits", low)
    with monkeypatch.context() as patch:
        patch.setattr(MoERouter, *patched)
        whole(ids(), labels=ids()).loss.backward()
    theirs = {m.key: m for m in find_mixtures(whole)[1]}
    for mixture in find_mixtures(pruned)[1]:
        kept = list(report.kept[mixture.key])
        others = {(path, name): tensor for path, _, _, name, tensor in theirs[mixture.key].stacks()}
        for path, _, _, name, tensor in mixture.stacks():
            expected = others[path, name].grad[kept]
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_experts_that_nothing_chooses(name):
    """Taking them out leaves the logits where weights are renormalised or their denominator is kept, and always the
    choices of the first mixture, whose input is as before."""
    model, few = stock(name), {"input_ids": ids(1, 3)}
    expected, usage = model(**few).logits, expert_usage(model, [few])
    unused = {key: (found.counts == 0).nonzero().flatten().tolist() for key, found in usage.items()}
    assert any(unused.values())
    kept, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = prune_experts(kept, usage, threshold=1e-9, keep_denominator=True)
    assert {key: list(numbers) for key, numbers in report.removed.items()} == unused
    torch.testing.assert_close(kept(**few).logits, expected, rtol=1e-5, atol=1e-5)
    prune_experts(plain, usage, threshold=1e-9)
    renormalises = name in ("mixtral", "qwen2_moe", "upcycled")
    assert torch.allclose(plain(**few).logits, expected, rtol=1e-5, atol=1e-5) == renormalises
    first = "attention.0" if name == "moduleformer" else "0"
    assert torch.equal(expert_usage(plain, [few])[first].counts, usage[first].counts[list(report.kept[first])])


def test_which_experts_go():
    model = stock("mixtral")
    counts = torch.tensor([5, 0, 9, 1, 4, 4, 9, 2])
    usage = {key: ExpertUsage(counts, 17, torch.zeros(8)) for key in ("0", "1", "2")}
    report = prune_experts(copy.deepcopy(model), usage, keep=4, layers=["1"])
    assert report.removed == {"1": (1, 3, 5, 7)} and report.kept == {"1": (0, 2, 4, 6)}
    report = prune_experts(copy.deepcopy(model), usage, threshold=3 / 17)
    assert set(report.removed.values()) == {(1, 3, 7)}
    assert "Removed 9 experts from 3 of 3 mixtures" in str(report)


def test_a_stock_model_stays_one_where_it_can(tmp_path):
    model = stock("mixtral")
    pruned = copy.deepcopy(model)
    prune_experts(pruned, experts={key: {1, 2} for key in "012"})
    assert type(pruned) is MixtralForCausalLM and pruned.config.num_local_experts == 6
    pruned.save_pretrained(tmp_path / "stock")
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "stock")
    assert torch.equal(logits(loaded), logits(pruned))
    uneven = copy.deepcopy(model)
    prune_experts(uneven, experts={"1": {1, 2}})
    assert type(uneven).__name__ == "MoeExtMixtralForCausalLM" and uneven.config.num_local_experts == 8
    assert uneven.config.moe_ext["layers"] == {"1": {"experts": {"num_experts": 6}}}
    assert [len(found.counts) for found in expert_usage(uneven, [{"input_ids": ids()}]).values()] == [8, 6, 8]
    with pytest.raises(ValueError, match='layer "1" has 6 experts, and the others have 8'):
        moe.restore(uneven)
    # Even again: the number moves into the config, and there is nothing to tell apart.
    prune_experts(uneven, experts={"0": {1, 2}, "2": {1, 2}})
    assert uneven.config.num_local_experts == 6
    assert torch.equal(logits(uneven), logits(pruned))
    uneven.save_pretrained(tmp_path / "even")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "even")), logits(pruned))
    moe.restore(uneven)
    assert type(uneven) is MixtralForCausalLM and torch.equal(logits(uneven), logits(pruned))


def test_pruned_twice(monkeypatch):
    """Rows that are kept add up."""
    model = extended("olmoe")
    whole = copy.deepcopy(model)
    expected = without(whole, {key: {0, 2, 5} for key in "012"}, monkeypatch, True)
    for numbers in ({2}, {0, 4}):  # 4 was 5 before
        prune_experts(model, experts={key: numbers for key in "012"}, keep_denominator=True)
    assert all(gate.moe_config.removed_experts == 3 for gate in iter_routers(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    first = next(iter_routers(model))
    with trace_routing(model) as contexts, torch.no_grad():
        model(ids())
    record = contexts[0].records["0"]
    assert record.scores.shape[1] == record.num_experts == 5
    torch.testing.assert_close(record.scores.sum(-1), torch.ones(18))
    assert (record.weights.sum(-1) < record.scores.topk(2).values.sum(-1)).all()  # some of it is with those that left
    assert not first.moe_removed_weight.requires_grad


@torch.no_grad()
def test_a_published_model_with_kept_rows(tmp_path, plugin_free_python):
    model = moduleformer(router_aux_loss_coef=0.1)
    prune_experts(model, experts={"0": {1}, "attention.1": {0, 2}}, keep_denominator=True)
    model.save_pretrained(tmp_path)
    save_file({"ids": ids(), "logits": logits(model)}, tmp_path / "expected.safetensors")
    done = plugin_free_python(
        """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
expected = load_file(sys.argv[1] + "/expected.safetensors")
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_the_configured_router_of_moduleformer_stays():
    """A layer with another number of attention experts has the same router, losses included."""
    model = moduleformer(router_aux_loss_coef=0.5)
    prune_experts(model, experts={"attention.1": {0}})
    again = type(model)(copy.deepcopy(model.config))
    for mine, other in zip(iter_routers(model), iter_routers(again), strict=True):
        assert mine.moe_config == other.moe_config and mine.moe_config.information_coef == 0.5
        assert mine.moe_site.num_experts == other.moe_site.num_experts


# --- insertion ---


@pytest.mark.parametrize("init", ["random", "copy"])
@pytest.mark.parametrize("name", NAMES)
def test_inserted(name, init, monkeypatch, tmp_path):
    """Old rows stay, new ones are as asked. With the new logits at -inf nothing has changed, bit for bit."""
    model = extended(name)
    usage = expert_usage(model, [{"input_ids": ids()}])
    before = {m.key: {(p, n): t.detach().clone() for p, _, _, n, t in m.stacks()} for m in find_mixtures(model)[1]}
    expected = logits(model)
    insertion = insert_experts(model, 2, init=init, usage=usage, noise=0.0, gate_std=0.5, seed=3)
    assert insertion.new == {key: (len(found.counts), len(found.counts) + 1) for key, found in usage.items()}
    for mixture in find_mixtures(model)[1]:
        for path, module, _, kind, tensor in mixture.stacks():
            old = before[mixture.key][path, kind]
            assert torch.equal(tensor[:-2], old)
            new = tensor[-2:].detach()
            if module in mixture.gate_modules():
                assert 0.25 < new.std() < 0.75
            elif init == "copy":
                best = usage[mixture.key].counts.argmax()
                assert torch.equal(new, old[best].expand_as(new))
            else:
                assert new.std() == pytest.approx(old.std().item(), rel=0.2)
                assert not torch.equal(new[0], new[1])
    found = without(model, insertion.new, monkeypatch, False)
    if (
        name == "moduleformer"
    ):  # its gate is one product over all experts, whose number may change the rounding of each
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert not torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    # Out again: the model as it was, config included.
    prune_experts(model, experts=insertion.new)
    assert torch.equal(logits(model), expected)
    for mixture in find_mixtures(model)[1]:
        assert all(torch.equal(t, before[mixture.key][p, n]) for p, _, _, n, t in mixture.stacks())


def test_seeds_and_noise():
    def made(seed, **options):
        model = stock("mixtral")
        usage = expert_usage(model, [{"input_ids": ids()}])
        insert_experts(model, 1, layers=["0", "2"], seed=seed, usage=usage, **options)
        mixtures = {m.key: m for m in find_mixtures(model)[1]}
        assert [m.num_experts for m in mixtures.values()] == [9, 8, 9]
        return {key: [t[-1] for *_, t in mixtures[key].stacks()] for key in ("0", "2")}

    first, again, other = made(0), made(0), made(1)
    assert all(torch.equal(a, b) for a, b in zip(first["0"], again["0"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first["0"], other["0"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first["0"], first["2"], strict=True))
    exact, noisy = made(0, init="copy", noise=0.0), made(0, init="copy", noise=0.1)
    ratio = (noisy["0"][1] - exact["0"][1]).std() / stock("mixtral").model.layers[0].mlp.experts.gate_up_proj.std()
    assert ratio.item() == pytest.approx(0.1, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize(
    "router", [{"type": "sigmoid", "num_experts_per_tok": 2}, {"type": "moduleformer", "hidden_size": 8}]
)
def test_other_routers(router, tmp_path):
    """Their own rows go along: in and out is nothing, out and loaded is the same."""
    model = moe.extend(tiny_model("mixtral"), {"router": router})
    for name, parameter in model.named_parameters():
        if ".moe_" in name:
            parameter.normal_()
    expected = logits(model)
    insertion = insert_experts(model, 8, gate_std=1.0)  # 8 is a size of the router itself, too
    assert not torch.equal(logits(model), expected)
    prune_experts(model, experts=insertion.new)
    assert torch.equal(logits(model), expected)
    prune_experts(model, experts={"1": {0, 5}, "2": {1}})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_biases_and_the_selection_bias():
    model = moe.extend(tiny_model("gpt_oss"), moe.TopKRouterConfig(correction_bias=True))
    for gate in iter_routers(model):
        gate.moe_correction_bias.copy_(torch.arange(8.0))
        gate.bias.data.copy_(torch.arange(8.0))
    insert_experts(model, 1)
    gate, experts = (getattr(find_mixtures(model)[1][0], name) for name in ("gate", "experts"))
    assert gate.moe_correction_bias[-1] == gate.bias[-1] == 3.5
    assert (experts.down_proj_bias[-1] == 0).all() and experts.down_proj_bias.shape[0] == 9
    assert model(ids()).logits.isfinite().all()


# --- training what is new ---


@pytest.mark.parametrize("name", ["mixtral", "moduleformer"])
def test_only_new_experts_are_trained(name, tmp_path):
    model = stock(name)
    if name == "mixtral":
        moe.extend(model, moe.TopKRouterConfig(balance_coef=0.01))
    insertion = insert_experts(model, 2, layers=["0", "1"] if name == "mixtral" else None)
    mask = train_new_experts(model, insertion, gate_penalty=0.1)
    before = snapshot(model)
    trainer = moe.MoETrainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, weight_decay=0.3),
        train_dataset=rows([9] * 8),
    )
    trainer.expert_mask = mask
    trainer.train()
    assert logged(trainer, "moe/loss_new_gates")
    own = {id(t): m.key for m in find_mixtures(model)[1] for *_, t in m.stacks()}
    changed = set()
    for key, parameter in model.named_parameters():
        new = insertion.new.get(own.get(id(parameter)), ())
        old = [i for i in range(len(parameter)) if i not in new]
        assert torch.equal(parameter.detach()[old], before[key][old]), key
        changed |= {key for i in new if not torch.equal(parameter.detach()[i], before[key][i])}
    assert len(changed) == sum(1 for m in find_mixtures(model)[1] if m.key in insertion.new for _ in m.stacks())
    shown = str(trainer.parameter_report())
    assert "Experts trained: 8, 9 of 10 in the layers 0, 1" in shown or name != "mixtral"
    mask.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.moe_link.observers


def test_the_penalty_is_the_squared_norm(tmp_path):
    """Its gradient is 2 mu A over the number of mixtures, also where a batch is in parts."""
    gradients = []
    for batch, parts in ((4, 1), (2, 2)):
        model = moe.extend(stock("mixtral"), moe.TopKRouterConfig())
        insertion = insert_experts(model, 1, gate_std=0.5)
        before = snapshot(model)
        for penalty in (0.0, 0.7):
            twin = copy.deepcopy(model)
            mask = train_new_experts(twin, insertion, gate_penalty=penalty)
            train(
                twin,
                rows([9] * 4),
                tmp_path / "out",
                **sgd(per_device_train_batch_size=batch, gradient_accumulation_steps=parts),
            )
            gradients.append(before["model.layers.0.mlp.gate.weight"] - twin.model.layers[0].mlp.gate.weight.detach())
            mask.remove()
        added = gradients[-1] - gradients[-2]
        expected = torch.zeros_like(added)
        expected[-1] = 2 * 0.7 * before["model.layers.0.mlp.gate.weight"][-1] / 3
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


def test_training_goes_on_after_loading(tmp_path):
    model = moe.extend(stock("olmoe"), moe.TopKRouterConfig())
    insertion = insert_experts(model, 1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    mask = train_new_experts(loaded, Insertion(insertion.new))
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    mask.attach(optimizer)
    loaded(ids(), labels=ids()).loss.backward()
    optimizer.step()
    for key, parameter in loaded.named_parameters():
        old = model.state_dict()[key]
        same = parameter.shape[0] != 9 or not ("gate" in key or "experts" in key)
        assert torch.equal(parameter if same else parameter[:8], old if same else old[:8]), key
    gate = loaded.model.layers[0].mlp.gate.weight
    assert not torch.equal(gate[8], model.model.layers[0].mlp.gate.weight[8])


# --- what is refused ---


def usage_of(model, **counts):
    return {
        m.key: ExpertUsage(torch.ones(m.num_experts, dtype=torch.int64), 4, torch.zeros(1))
        for m in find_mixtures(model)[1]
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of `threshold`, `keep` and `experts`, got none"),
        ({"keep": 4, "threshold": 0.1}, "got `?threshold`? and `?keep`?"),
        ({"keep": 4}, "`keep` needs `usage`"),
        ({"experts": {"7": {0}}}, "`experts` names `7`; the mixtures of this model are 0, 1, 2"),
        ({"experts": {"0": {8}}}, r"`experts` names \[8\] of `0`, whose experts are 0 to 7"),
        ({"experts": {"0": {0, 1, 2, 3, 4, 5, 6}}}, "`0` would have 1 experts, and a token uses 2"),
        ({"experts": {"0": {0}}, "layers": ["0"]}, "leave `layers` out"),
        ({"usage": True, "keep": 0}, "`keep` must be a positive integer, got 0"),
        ({"usage": True, "keep": 1}, "would have 1 experts"),
        ({"usage": True, "threshold": 1.5}, r"`threshold` must be in \[0, 1\], got 1.5"),
        ({"usage": True, "threshold": 0.1, "layers": ["9"]}, "the mixtures of this model are 0, 1, 2"),
    ],
)
def test_bad_pruning(options, message):
    model = stock("mixtral")
    if options.get("usage"):
        options = {**options, "usage": usage_of(model)}
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune_experts(model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model) is MixtralForCausalLM and model.config.num_local_experts == 8


def test_bad_usage():
    model = stock("mixtral")
    usage = usage_of(model)
    prune_experts(model, usage, keep=7)
    with pytest.raises(ValueError, match="`usage` counts 8 experts of `0`, which has 7. Measure it anew"):
        prune_experts(model, usage, keep=6)
    with pytest.raises(ValueError, match='init="copy" needs the `usage` of `0`'):
        insert_experts(model, 1, init="copy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_new": 0}, "`num_new` must be a positive integer, got 0"),
        ({"num_new": 1, "init": "zeros"}, '`init` must be "random" or "copy", got'),
        ({"num_new": 1, "noise": -1.0}, "`noise` must be non-negative"),
        ({"num_new": 1, "layers": []}, r"`layers` is \[\]"),
    ],
)
def test_bad_insertion(options, message):
    with pytest.raises(ValueError, match=message):
        insert_experts(stock("mixtral"), **options)


@pytest.mark.parametrize(
    ("name", "extension", "message"),
    [
        ("jetmoe", None, "one number of experts, in every layer"),
        ("dbrx", None, "one number of experts"),
        ("minimax_m2", None, "selection bias stands outside of the gate"),
        ("deepseek_v3", None, "in 2 groups of equal size"),
        ("mixtral", {"router": "xmoe"}, "the router `xmoe` has more than a row"),
        ("mixtral", {"router": {"type": "hash", "vocab_size": 96}}, "the router `hash` has more than a row"),
        ("mixtral", {"router": "top_k", "zero_experts": {"zero": 1}}, "zero-computation experts"),
        ("mixtral", {"router": "top_k", "layers": {"0": None}}, "the extension leaves its layer stock"),
    ],
)
def test_mixtures_that_cannot_change(name, extension, message):
    model = tiny_model(name)
    if extension is not None:
        moe.extend(model, extension)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        insert_experts(model, 1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_other_refusals():
    with pytest.raises(ValueError, match="has no experts"):
        insert_experts(tiny_model("llama"), 1)
    model = moe.extend(stock("olmoe"), moe.TopPRouterConfig(threshold=0.3))
    with pytest.raises(ValueError, match="`keep_denominator` is for the router `top_k`; `0` has `top_p`"):
        prune_experts(model, experts={"0": {1}}, keep_denominator=True)
    prune_experts(model, experts={"0": set(range(1, 8))})  # a token takes as many as there are
    assert model(ids()).logits.isfinite().all()
    model = stock("mixtral")
    insertion = insert_experts(model, 1)
    with pytest.raises(ValueError, match="`gate_penalty` goes into the loss of extended models"):
        train_new_experts(model, insertion, gate_penalty=0.1)
    with pytest.raises(ValueError, match=r"`insertion` names the experts \[9\] of `0`; the model has experts 0 to 8"):
        train_new_experts(model, Insertion({"0": (9,)}))
    with pytest.raises(ValueError, match="`x`; the model has no such mixture"):
        train_new_experts(model, Insertion({"x": (0,)}))
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(torch.empty_like(experts.gate_up_proj, device="meta"))
    with pytest.raises(ValueError, match="quantized, or not in memory"):
        insert_experts(model, 1)


def test_rows_that_are_not_there():
    model = stock("mixtral")
    weight = model.model.layers[0].mlp.gate.weight
    with pytest.raises(ValueError, match=r"`rows` names \[8\] of a tensor with 8 rows"):
        train_rows(model, {weight: [0, 8]})
    with pytest.raises(ValueError, match=r"a tensor of the shape \[2, 2\] that the model does not have"):
        train_rows(model, {nn.Parameter(torch.zeros(2, 2)): [0]})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_removed_rows_of_a_router_that_renormalises():
    for router in ({"removed_experts": 2}, {"removed_experts": 2, "score": "softmax", "score_order": "topk_score"}):
        with pytest.raises(ValueError, match="`removed_experts` has no meaning .* renormalised"):
            moe.extend(tiny_model("mixtral"), moe.TopKRouterConfig(**router))
    with pytest.raises(ValueError, match="`removed_experts` must be non-negative, got -1"):
        moe.TopKRouterConfig(removed_experts=-1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmoe", "moduleformer"])
def test_compiled_and_in_bfloat16(name):
    model = extended(name)
    insert_experts(model, 2)
    prune_experts(model, experts={m.key: {0, 1} for m in find_mixtures(model)[1]}, keep_denominator=True)
    expected = logits(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    low = copy.deepcopy(model).bfloat16()
    assert all(gate.moe_removed_weight.dtype == torch.bfloat16 for gate in iter_routers(low))
    errors = (logits(low).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.05  # a token near the border chooses another expert


def test_experts_run_by_every_implementation():
    """The kernels and the stock functions read the new numbers."""
    model = extended("mixtral")
    insert_experts(model, 3)
    prune_experts(model, experts={"0": {0, 9}})
    found = {}
    for implementation in ("moe_ext", "eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        found[implementation] = logits(model)
    for other in ("eager", "grouped_mm"):
        torch.testing.assert_close(found[other], found["moe_ext"], rtol=1e-4, atol=1e-5)
    assert F.softmax(found["eager"], -1).isfinite().all()
