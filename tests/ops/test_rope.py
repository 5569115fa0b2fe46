import math

import pytest
import torch

from kogia.ops.rope import (
    inverse_frequencies,
    rope_angles,
    rotate_half_split,
    rotate_interleaved,
    yarn_inverse_frequencies,
    yarn_mscale,
)

V3 = dict(factor=40, original_max_position=4096, beta_fast=32, beta_slow=1)


def test_interleaved_rotation_is_multiplication_by_a_complex_unit():
    torch.manual_seed(0)
    positions, theta = torch.tensor([0, 1, 17, 4095]), inverse_frequencies(8, 10000.0)
    x = torch.randn(4, 3, 8)
    units = torch.polar(torch.ones(4, 4, dtype=torch.float64), positions[:, None].double() * theta.double())
    want = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * units[:, None]).flatten(-2)
    got = rotate_interleaved(x, *rope_angles(positions, theta))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)  # float32 angles
    torch.testing.assert_close(got[0], x[0], rtol=0, atol=0)


def test_half_split_rotation_is_the_rotate_half_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(1)
    positions, x = torch.tensor([0, 3, 900]), torch.randn(3, 2, 10)
    cos, sin = rope_angles(positions, inverse_frequencies(10, 500.0))
    wide_cos, wide_sin = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    want, _ = llama.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], wide_cos, wide_sin)
    torch.testing.assert_close(rotate_half_split(x, cos, sin), want[0].transpose(0, 1))


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
def test_scores_depend_on_the_distance_alone_and_lengths_are_kept(rotate):
    torch.manual_seed(2)
    q, k, theta = torch.randn(1, 1, 16), torch.randn(1, 1, 16), inverse_frequencies(16, 10000.0)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rope_angles(torch.tensor([position]), theta)).double()

    near, far = (at(q, 9) * at(k, 4)).sum(), (at(q, 1009) * at(k, 1004)).sum()
    torch.testing.assert_close(near, far, rtol=0, atol=1e-3)
    assert abs(near - (at(q, 9) * at(k, 9)).sum()) > 0.05
    torch.testing.assert_close(at(q, 77).norm(), q.double().norm())


def test_the_two_layouts_agree_after_permuting_the_pairs_and_differ_without():
    torch.manual_seed(3)
    x, (cos, sin) = torch.randn(5, 2, 8), rope_angles(torch.arange(5), inverse_frequencies(8, 100.0))
    permuted = x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    want = rotate_half_split(permuted, cos, sin).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotate_interleaved(x, cos, sin), want)
    assert (rotate_half_split(x, cos, sin) - want)[1:].abs().max() > 0.1


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_ramps_from_pair_10_to_23():
    theta = inverse_frequencies(64, 10000.0)
    ratio = (yarn_inverse_frequencies(64, 10000.0, **V3) / theta).tolist()
    for i in range(32):
        base = 10000.0 ** (-2 * i / 64)
        assert theta[i].item() == pytest.approx(base, rel=1e-6)
        ramp = min(max((i - 10) / 13, 0.0), 1.0)
        assert ratio[i] == pytest.approx((1 - ramp) + ramp / 40, rel=1e-5)
    assert ratio[10] == pytest.approx(1.0)
    assert ratio[11] < 0.95
    assert ratio[22] > 0.026
    assert ratio[23] == pytest.approx(1 / 40)


def test_yarn_frequencies_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32}
    yarn |= {"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707, "rope_theta": 10000.0}
    config = transformers.DeepseekV3Config(qk_rope_head_dim=64, max_position_embeddings=163840, rope_parameters=yarn)
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device=torch.device("cpu"))
    torch.testing.assert_close(yarn_inverse_frequencies(64, 10000.0, **V3), theirs)
    assert factor == pytest.approx(1.0)


def test_yarn_with_equal_corrections_is_a_step_and_stays_finite():
    # Kimi-K2 ships beta_fast = beta_slow = 1
    theta = yarn_inverse_frequencies(
        64, 50000.0, factor=32, original_max_position=4096, beta_fast=1.0, beta_slow=1.0
    ) / inverse_frequencies(64, 50000.0)
    assert theta.isfinite().all()
    assert theta[19].item() == pytest.approx(1.0)
    assert theta[20].item() == pytest.approx(1 / 32)


def test_mscale_is_one_without_extension_and_follows_the_logarithm():
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40, 1.0) == pytest.approx(1.368888, abs=1e-6)
    assert yarn_mscale(40, 0.707) == pytest.approx(1.260804, abs=1e-6)
    assert yarn_mscale(40, 0.0) == 1.0


def test_angles_beyond_the_original_context_follow_the_stretched_frequencies():
    theta = yarn_inverse_frequencies(64, 10000.0, **V3)
    positions = torch.tensor([4096, 100_000, 163_839])
    cos, sin = rope_angles(positions, theta)
    for row, position in enumerate(positions.tolist()):
        for pair in (0, 16, 31):
            # the product is rounded to float32 before the cosine: half an ulp of the angle, at most 0.008 rad here
            angle = position * theta[pair].item()
            assert cos[row, pair].item() == pytest.approx(math.cos(angle), abs=angle * 2**-23 + 1e-7)
            assert sin[row, pair].item() == pytest.approx(math.sin(angle), abs=angle * 2**-23 + 1e-7)


def test_the_factor_multiplies_cos_and_sin():
    plain, scaled = (rope_angles(torch.arange(4), inverse_frequencies(4, 10.0), s) for s in (1.0, 1.5))
    torch.testing.assert_close(scaled[0], plain[0] * 1.5)
    torch.testing.assert_close(scaled[1], plain[1] * 1.5)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
def test_bfloat16_is_rotated_in_float32_and_rounded_once(rotate):
    x = torch.randn(6, 2, 8).bfloat16()
    cos, sin = rope_angles(torch.arange(6) + 1000, inverse_frequencies(8, 10000.0))
    got = rotate(x, cos, sin)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotate(x.float(), cos, sin).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_neighbouring_pairs_may_start_at_an_odd_place_in_memory(first, tokens):
    row = torch.randn(tokens, first + 6 + first % 2)
    cos, sin = rope_angles(torch.arange(tokens) + 1, inverse_frequencies(6, 100.0))
    x = row[:, None, first : first + 6].requires_grad_()
    got = rotate_interleaved(x, cos, sin)
    angle = torch.atan2(sin, cos).double()
    even, odd = x[:, 0, 0::2].double(), x[:, 0, 1::2].double()
    want = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
    torch.testing.assert_close(got[:, 0].double(), want.flatten(1), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(got)
    back = rotate_interleaved(grad, cos, -sin)  # a rotation's transpose is the rotation back
    torch.testing.assert_close(torch.autograd.grad(got, x, grad)[0], back, rtol=1e-5, atol=1e-6)
