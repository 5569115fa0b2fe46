import pytest
import torch

from kogia.model.linear import Linear


def packed() -> Linear:
    layer = Linear(160, 140)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    layer.pack("fp8")
    return layer


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_packed_weight_refuses_to_be_cast_and_is_left_as_it_was(cast):
    layer = packed()
    before = layer.dense_weight(torch.float32)
    with pytest.raises(TypeError, match="stored as fp8 cannot be cast to torch.*load the model in that dtype"):
        cast(torch.nn.Sequential(layer))
    assert layer.dense_weight(torch.float32).equal(before)


def test_a_packed_weight_moves_and_a_dense_one_is_cast():
    layer = packed().to("cpu").to("meta")
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight.is_meta
    assert layer.weight_scale_inv.is_meta
    assert Linear(4, 3).to(torch.bfloat16).weight.dtype == torch.bfloat16
