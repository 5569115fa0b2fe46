import pytest
import torch
import torch.nn.functional as F

from kogia.model.layers import Head
from kogia.model.linear import Linear
from kogia.model.moe import Experts
from kogia.ops.dispatch import use_backend

KINDS = {"fp8": {}, "int8": {}, "int4": {}, "int4 asymmetric": {"asymmetric": True}}


def packed(kind: str = "fp8", layer: Linear | None = None) -> Linear:
    layer = Linear(160, 140) if layer is None else layer
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    layer.pack(kind.split()[0], **KINDS[kind])
    return layer


def parts(layer: Linear) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.double()])
def test_a_packed_weight_refuses_to_be_cast_and_is_left_as_it_was(kind, cast):
    layer = packed(kind)
    before = layer.dense_weight(torch.float32)
    with pytest.raises(
        TypeError, match=f"stored as {kind[:4].strip()} cannot be cast to torch.*load the model in that"
    ):
        cast(torch.nn.Sequential(layer))
    assert layer.dense_weight(torch.float32).equal(before)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_in_float32_are_not_made_bfloat16(kind):
    with pytest.raises(TypeError, match=f"stored as {kind} cannot be cast to torch.bfloat16"):
        packed(kind).bfloat16()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_moves_and_a_dense_one_is_cast(kind):
    layer = packed(kind)
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    moved = layer.to("cpu").to("meta")
    assert {name: (t.dtype, t.is_meta) for name, t in moved.state_dict().items()} == {
        n: (d, True) for n, d in dtypes.items()
    }
    assert Linear(4, 3).to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_computes_with_its_dense_weight_and_comes_back_from_a_state_dict(kind):
    layer = packed(kind)
    x = torch.randn(3, 160)
    with use_backend("reference", ["linear"]):  # a CPU's kernel rounds the rows to int16
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(torch.float32)))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    fresh = Linear(160, 140)
    fresh.make_packed(kind.split()[0], zeros="asymmetric" in kind)
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(parts(fresh)[name], part) for name, part in parts(layer).items())
    torch.testing.assert_close(fresh(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_compute_what_their_dense_stacks_do(kind):
    experts, dense = Experts(160, 3, 32), Experts(160, 3, 32)
    for name in ("gate_up_proj", "down_proj"):
        stack = packed(kind, getattr(experts, name))
        with torch.no_grad():
            getattr(dense, name).weight.copy_(stack.dense_weight(torch.float32))
    x, weights = torch.randn(5, 160), torch.rand(5, 2)
    ids = torch.tensor([[0, 2], [2, 0], [0, 2], [0, -1], [-1, -1]])
    torch.testing.assert_close(experts(x, ids, weights), dense(x, ids, weights), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_head_gives_the_logits_and_log_probabilities_of_its_dense_weight(kind):
    head = packed(kind, Head(160, 140))
    x, targets = torch.randn(4, 160, requires_grad=True), torch.tensor([3, 0, 139, 7])
    logits = F.linear(x, head.dense_weight(torch.float32))
    torch.testing.assert_close(head(x), logits)
    values, entropy = head(x, targets)
    want = logits.log_softmax(-1)
    torch.testing.assert_close(values, want[torch.arange(4), targets], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1), rtol=1e-4, atol=1e-4)
    got, wanted = (
        torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in (values, want[range(4), targets])
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kinds", [("int4", "int4 asymmetric"), ("int4 asymmetric", "int4")])
def test_a_layer_packed_again_has_no_zeros_of_before(kinds):
    layer = Linear(160, 140)
    for kind in kinds:
        layer.weight = torch.nn.Parameter(torch.randn(140, 160))
        layer.pack("int4", **KINDS[kind])
        assert ("weight_zero_point" in layer.state_dict()) == ("asymmetric" in kind)
