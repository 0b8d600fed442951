"""The benchmarks' operations, against a count of every matrix product by hand."""
import pytest
import torch
import torch.nn.functional as F

from diffusion import SIZES, DiT
from throughput import flops


def dit_by_hand(depth, width, grid, patch, channels, drawn):
    """Operations of a DiT for one image: (its linear layers, its attention), a multiply-add being two.

    drawn: channels of what it predicts.
    """
    tokens, numbers = grid**2, patch**2
    block = 12 * width**2 * tokens + 6 * width**2               # qkv 3, proj 1, mlp 8 a token; adaLN an image
    ends = (channels + drawn) * numbers * width * tokens        # the patches in and out
    time = 256 * width + width**2 + 2 * width**2                # t's two layers, the last layer's adaLN
    return 2 * (depth * block + ends + time), depth * 4 * tokens**2 * width


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_dits_forward_is_its_linear_layers_and_its_attention(dtype):
    depth, width, _ = SIZES["S"]
    linear, attention = dit_by_hand(depth, width, 16, 2, 3, 3)
    assert linear + attention == pytest.approx(12.11e9, rel=1e-3) and attention / 12.11e9 > 0.09
    model, x = DiT("S", 32, 2, 3, 100).to(dtype), torch.zeros(1, 3, 32, 32)
    t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for count in (1, 2):
        with torch.no_grad():
            found = flops(lambda n=count: model(x.expand(n, -1, -1, -1), t.expand(n), y.expand(n)))
        assert found == count * (linear + attention)


@pytest.mark.parametrize("seen", (24, 7), ids="{} keys".format)
def test_attention_is_two_products_and_its_gradients_are_five(seen):
    """A gradient each of Q, K, V and the softmax; the fifth product is the forward pass's first once more."""
    B, h, N, d = 2, 3, 24, 16
    q, k, v = (torch.randn(B, h, n, d, requires_grad=True) for n in (N, seen, seen))
    product = 2 * B * h * N * seen * d

    def forward():
        return F.scaled_dot_product_attention(q, k, v)
    assert flops(forward) == 2 * product
    assert flops(lambda: forward().sum().backward()) == (2 + 5) * product
