"""Initial weights of gates."""

from __future__ import annotations

import pytest
import torch

from hf_moe_ext.modeling.moe_structure import created_blocks, trace_routing
from hf_moe_ext.upcycling import gate_inits as module
from hf_moe_ext.upcycling import list_gate_inits, load_upcycled, register_gate_init, upcycle
from hf_moe_ext.upcycling.clustering import kmeans
from hf_moe_ext.upcycling.gate_inits import is_calibrated
from tests.tiny_models import tiny_inputs, tiny_model


PROMPTS = [["abcd", "efgh"], ["ijklm"], ["nopq", "rst", "uv"], ["wxyz"]]
AGAINST = [["wxyz"], ["abcd"], ["ijklm"], ["efgh"]]


class Letters:
    """A tokenizer: one id for each letter."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 90 for letter in text]}


def gates(name="llama", init="normal", num_experts=4, **options):
    model = upcycle(tiny_model(name), num_experts=num_experts, gate_init=init, target="ext", check=False, **options)
    return [block.gate.weight.detach() for block in created_blocks(model)]


def with_prompts(init, **options):
    """With what any of the functions may need."""
    data = {"calibration": sum(PROMPTS, [])} if is_calibrated(init) else {}
    return gates(init=init, gate_prompts=PROMPTS, tokenizer=Letters(), **data, **options)


@pytest.mark.parametrize("name", sorted(list_gate_inits()))
def test_seeds_reproduce_and_shapes_fit(name):
    first, again = ([g.clone() for g in with_prompts(name, gate_noise=0.1, seed=7)] for _ in range(2))
    other = with_prompts(name, gate_noise=0.1, seed=8)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (4, 32) and torch.equal(a, b) and not torch.equal(a, c)


def test_normal_and_uniform_have_their_statistics_and_differ_between_layers():
    normal = gates(init="normal", num_experts=64)
    uniform = gates(init="uniform", num_experts=64)
    for weight in normal:
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1) and abs(float(weight.mean())) < 0.002
    for weight in uniform:
        assert float(weight.abs().max()) == pytest.approx(32**-0.5, rel=0.01)
        assert float(weight.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.1)
    assert not torch.equal(normal[0], normal[1]) and not torch.equal(uniform[0], uniform[1])


def test_zeros_tie_and_noise_breaks_the_tie():
    assert all(not weight.any() for weight in gates(init="zeros"))
    noisy = gates(init="zeros", gate_noise=1e-3)
    assert all(0.0005 < float(weight.std()) < 0.002 for weight in noisy)
    with pytest.raises(ValueError, match="tie.*`gate_noise=1e-3`"):
        upcycle(tiny_model("llama"), "granular", gate_init="zeros")
    model = upcycle(tiny_model("llama"), "granular", gate_init="zeros", gate_noise=1e-3)
    assert model.upcycle_report.preserves_function


@pytest.mark.parametrize("name", ["hidden", "hidden_avg"])
def test_the_experts_own_prompt_gets_its_top_logit(name):
    """Each row is the unit vector of a state that the gate sees: no other row has a larger product with that state."""
    prompts = [["abcd"], ["ijklm"], ["nopq"], ["wxyz"]]
    dense = tiny_model("llama")
    options = {"gate_init": name, "gate_prompts": prompts, "tokenizer": Letters(), "target": "ext"}
    model = upcycle(dense, num_experts=4, **options)
    assert model.upcycle_report.preserves_function
    for expert, (text,) in enumerate(prompts):
        with torch.no_grad(), trace_routing(model) as contexts:
            model(input_ids=torch.tensor([Letters()(text)["input_ids"]]))
        for record in contexts[0].records.values():
            logits = record.logits[-1] if name == "hidden" else record.logits.mean(dim=0)
            assert int(logits.argmax()) == expert


@pytest.mark.parametrize("name", ["hidden", "hidden_avg"])
def test_states_are_those_at_the_gates_input_averaged_over_prompts(name):
    dense = tiny_model("llama")
    seen = []
    handle = dense.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for text in PROMPTS[2]:
            dense(input_ids=torch.tensor([Letters()(text)["input_ids"]]))
    handle.remove()
    vectors = [states[-1] if name == "hidden" else states.mean(dim=0) for states in seen]
    expected = torch.stack(vectors).mean(dim=0)
    torch.testing.assert_close(with_prompts(name)[1][2], expected / expected.norm())


@pytest.mark.parametrize("name", ["hidden", "hidden_avg", "cheap_embed"])
def test_rows_have_unit_norm_and_negative_prompts_move_them(name):
    plain = with_prompts(name)
    moved = with_prompts(name, negative_prompts=AGAINST)
    for weight, other in zip(plain, moved, strict=True):
        torch.testing.assert_close(weight.norm(dim=-1), torch.ones(4))
        torch.testing.assert_close(other.norm(dim=-1), torch.ones(4))
        assert not torch.allclose(weight, other)


def test_cheap_embed_is_the_summed_embeddings_in_all_layers():
    weights = with_prompts("cheap_embed")
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    ids = [token for text in PROMPTS[0] for token in Letters()(text)["input_ids"]]
    expected = tiny_model("llama").model.embed_tokens.weight[ids].sum(dim=0)
    torch.testing.assert_close(weights[0][0], expected / expected.norm())


@pytest.mark.parametrize("family", ["t5", "bert", "opt", "gpt2"])
def test_states_are_found_in_every_form_of_block(family):
    weights = with_prompts("hidden_avg", name=family)
    assert all(weight.shape == (4, 32) and weight.isfinite().all() for weight in weights)


def test_centres_are_found_and_stay_put():
    """Planted clusters of unequal size; and the conditions of a fixed point, against a loop."""
    truth = torch.tensor([0] * 30 + [1] * 12 + [2] * 6 + [3] * 2)
    points = 5 * torch.eye(4, 7)[truth] + 0.2 * torch.randn(50, 7)
    centres = kmeans(points, 4, seed=0)
    wanted = torch.stack([points[truth == cluster].mean(0) for cluster in range(4)])
    order = torch.cdist(wanted, centres).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centres[order], wanted)
    points = torch.randn(60, 3)
    centres = kmeans(points, 5, seed=1)
    owner = torch.tensor([min(range(5), key=lambda c: float((p - centres[c]).norm())) for p in points])  # noqa: B023
    for cluster in range(5):
        torch.testing.assert_close(centres[cluster], points[owner == cluster].mean(0))
    assert torch.equal(kmeans(torch.zeros(6, 2), 3, seed=0), torch.zeros(3, 2))  # all alike, and some without points


def test_centroids_are_those_of_the_gates_inputs():
    """Every row is the direction of the mean of the unit states that are nearest to it, of the dense model run by
    hand; the largest logit of a state is that of its centre."""
    dense = tiny_model("llama")
    texts = sum(PROMPTS, [])
    model = upcycle(
        dense, num_experts=4, gate_init="centroid", calibration=texts, tokenizer=Letters(), target="ext", check=False
    )
    for block, layer in zip(created_blocks(model), dense.model.layers, strict=True):
        states = []
        handle = layer.mlp.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0][0]))
        with torch.no_grad():
            for text in texts:
                dense(torch.tensor([Letters()(text)["input_ids"]]))
        handle.remove()
        states = torch.nn.functional.normalize(torch.cat(states), dim=1)
        weight = block.gate.weight.detach()
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(4))
        # A fixed point: the centre behind a row is as long as the mean of its members is.
        lengths = torch.ones(4)
        for _ in range(100):
            owner = torch.cdist(states, weight * lengths[:, None]).argmin(1)
            means = torch.stack([states[owner == expert].mean(0) for expert in range(4)])
            lengths = means.norm(dim=1)
        torch.testing.assert_close(weight, means / lengths[:, None], rtol=1e-3, atol=1e-4)


def test_centroids_need_data(tmp_path):
    with pytest.raises(ValueError, match='gates by `gate_init="centroid"` need `calibration`'):
        gates(init="centroid")
    with pytest.raises(ValueError, match="at least as many tokens as the 4 experts; `calibration` has 3"):
        gates(init="centroid", calibration=["abc"], tokenizer=Letters())
    with pytest.raises(ValueError, match="do not use `calibration`"):
        gates(calibration=["abc"], tokenizer=Letters())
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='`gate_init="centroid"` need `calibration`'):
        load_upcycled(tmp_path, gate_init="centroid")


def test_one_pass_serves_method_and_gates(monkeypatch):
    from hf_moe_ext import calibration

    calls, original = [], calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda *a, **k: calls.append(len(a[2])) or original(*a, **k))
    options = {"num_experts": 4, "gate_init": "centroid", "tokenizer": Letters(), "calibration": sum(PROMPTS, [])}
    upcycle(tiny_model("llama"), "split", split_by="coactivation", check=False, **options)
    assert calls == [2]


def test_rows_of_slices_repeat_those_of_their_copy():
    model = upcycle(tiny_model("llama"), "granular", granularity=3, num_experts=4, target="ext", check=False)
    for weight, copies in zip((b.gate.weight for b in created_blocks(model)), gates(), strict=True):
        assert torch.equal(weight, copies.repeat_interleave(3, dim=0))


def test_given_tensors_are_used():
    given = {str(key): torch.randn(4, 32) for key in range(3)}
    for weight, key in zip(gates(init=given), given, strict=True):
        assert torch.equal(weight, given[key])
    with pytest.raises(ValueError, match=r'\(8, 32\) tensor for layer "0", got \(4, 32\)'):
        gates(init=given, num_experts=8)
    del given["1"]
    with pytest.raises(ValueError, match='layer "1", got nothing'):
        gates(init=given)


def test_prompts_that_are_alike_are_warned_about(monkeypatch):
    messages = []
    monkeypatch.setattr(module.logger, "warning_once", messages.append)
    gates(init="cheap_embed", gate_prompts=[[30 * "abcd" + last] for last in "efgh"], tokenizer=Letters())
    assert any("nearly the same gate rows" in message for message in messages)


def test_the_dense_model_is_left_in_its_mode_without_hooks():
    dense = tiny_model("llama").train()
    options = {"gate_prompts": PROMPTS, "tokenizer": Letters(), "target": "ext"}
    upcycle(dense, num_experts=4, gate_init="hidden", **options)
    assert dense.training and all(not module._forward_pre_hooks for module in dense.modules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"gate_init": "hiden"}, "unknown gate_init `hiden`.*Did you mean `hidden`", id="name"),
        pytest.param({"gate_init": "hidden"}, "needs `gate_prompts=", id="prompts"),
        pytest.param({"gate_init": "hidden", "gate_prompts": PROMPTS}, "`tokenizer=...`", id="tokenizer"),
        pytest.param(
            {"gate_init": "hidden", "gate_prompts": PROMPTS[:3], "tokenizer": Letters()},
            "`gate_prompts` must hold one non-empty list of texts for each of the 4 experts, got 3",
            id="count",
        ),
        pytest.param(
            {"gate_init": "hidden", "gate_prompts": ["a", "b", "c", "d"], "tokenizer": Letters()},
            "one non-empty list of texts",
            id="strings",
        ),
        pytest.param(
            {
                "gate_init": "cheap_embed",
                "gate_prompts": PROMPTS,
                "negative_prompts": [[]] * 4,
                "tokenizer": Letters(),
            },
            "`negative_prompts` must hold",
            id="negative",
        ),
        pytest.param(
            {"gate_init": "hidden", "gate_prompts": [["a"], [""], ["b"], ["c"]], "tokenizer": Letters()},
            "made no token of the prompt ''",
            id="empty",
        ),
        pytest.param({"gate_noise": -1.0}, "`gate_noise` must be non-negative, got -1", id="noise"),
    ],
)
def test_bad_requests_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        upcycle(tiny_model("llama"), num_experts=4, **options)


def test_images_have_no_prompts():
    with pytest.raises(ValueError, match="reads texts, which ViTForImageClassification does not take"):
        with_prompts("hidden", name="vit")


def test_an_own_function_can_be_registered(monkeypatch):
    monkeypatch.setattr(module, "_GATE_INITS", dict(module._GATE_INITS))

    @register_gate_init("ones")
    def ones(request):
        return {key: torch.ones(request.num_experts, size) for key, size in request.hidden_sizes.items()}

    assert all(torch.equal(weight, torch.ones(4, 32)) for weight in gates(init="ones"))
    with pytest.raises(ValueError, match="registered already"):
        register_gate_init("ones")
    with pytest.raises(ValueError, match="lower-case"):
        register_gate_init("Ones")


def test_the_plain_rule_of_the_gate_is_softmax_topk_renormalised():
    model = upcycle(tiny_model("llama"), num_experts=4, target="ext", check=False)
    with torch.no_grad(), trace_routing(model) as contexts:
        model(**tiny_inputs("llama"))
    record = contexts[0].records["0"]
    torch.testing.assert_close(record.weights.sum(dim=-1), torch.ones(len(record.weights)))
    assert record.index.shape[-1] == 2
