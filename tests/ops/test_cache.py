import pytest
import torch

from kogia.ops.cache import LatentRow
from kogia.ops.fp8 import dequantize_groups, quantize_groups


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_row_widths_are_those_of_the_published_kernels():
    assert LatentRow(512, 64).width == 576
    assert LatentRow(512, 64, fp8=True).width == 656
    assert LatentRow(512, 64, index=128, fp8=True).width == 656 + 132


@pytest.mark.parametrize("index", [0, 20])
def test_a_dense_row_is_its_parts_end_to_end_and_a_narrow_row_keeps_the_prefix(index):
    latent, rope, key = drawn(3, 10), drawn(3, 4), drawn(3, index)
    row = LatentRow(6, 4, index)
    packed = row.pack(latent, rope, key if index else None)
    assert packed.equal(torch.cat((latent[:, :6], rope, key), -1))
    assert row.unpack(packed, torch.float32).equal(packed)


@pytest.mark.parametrize(("width", "index"), [(512, 128), (130, 0), (7, 3)])
def test_an_fp8_row_rounds_latents_by_one_part_in_16_and_keeps_the_rotary_key_in_bfloat16(width, index):
    latent, rope, key = drawn(5, width) * 3, drawn(5, 6), drawn(5, index)
    row = LatentRow(width, 6, index, fp8=True)
    packed = row.pack(latent, rope, key if index else None)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, row.width))
    back = row.unpack(packed.view(1, 5, -1), torch.float32)[0]
    got_latent, got_rope, got_key = back.split([width, 6, index], -1)
    assert got_rope.equal(rope.bfloat16().float())
    for got, want in ((got_latent, latent), (got_key, key)):
        smallest = want.abs().max() / 448 / 1024 if want.numel() else 0.0  # half a subnormal step
        assert ((got - want).abs() <= want.abs() / 16 + smallest * 1.01).all()


def test_groups_of_128_neighbours_are_scaled_apart():
    x = torch.cat((torch.full((1, 128), 1e-3), torch.full((1, 2), 448.0)), -1)
    quantized, scale = quantize_groups(x)
    assert scale[0, 1] == 1.0
    torch.testing.assert_close(dequantize_groups(quantized, scale, torch.float32), x)
    assert quantize_groups(torch.zeros(2, 5))[1].tolist() == [[1.0], [1.0]]
