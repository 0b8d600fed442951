"""The two text encoders of SDXL: CLIP's transformers, which turn a prompt into what the UNet attends to.

    context = cat[hidden 1, hidden 2]    (77, 768 + 1280): what goes into the last layer, without a final norm
    pooled  = projection(norm(last layer of encoder 2))[end of the text]                  (1280,)

The mask is causal, and nothing else is masked: the tokens after the end of the text count as well.
Sources: Radford et al. 2021 (CLIP ViT-L), Cherti et al. 2023 (OpenCLIP bigG), Podell et al. 2023 (SDXL).
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# Names and shapes of all parameters are those of the published checkpoints. B prompts, D width.

SIZES = {                      # its folder: width D, layers, whether it is the one with a projection
    "text_encoder": (768, 12, False), "text_encoder_2": (1280, 32, True)}
TOKENS, LENGTH, HEAD = 49_408, 77, 64                           # ids, ids in a prompt, width of a head


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), with which OpenAI's CLIP was trained; OpenCLIP's has the exact GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, (B, 77, D) -> (B, 77, D); a token attends to itself and those before."""

    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (rearrange(proj(x), "B N (heads d) -> B heads N d", d=HEAD)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(x, "B heads N d -> B N (heads d)"))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, 77, D) -> (B, 77, D)."""

    def __init__(self, width, activation):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), activation=activation, fc2=nn.Linear(4 * width, width)))

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """ids (B, 77) int64 -> hidden (B, 77, D), pooled (B, D), or None in its place from the first encoder.

    which: "text_encoder", CLIP ViT-L with 123,060,480 parameters, or "text_encoder_2", OpenCLIP bigG with
    694,659,840.
    """

    def __init__(self, which):
        super().__init__()
        width, layers, pools = SIZES[which]
        activation = nn.GELU() if pools else QuickGELU()
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(TOKENS, width),
                                         "position_embedding": nn.Embedding(LENGTH, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(Layer(width, activation)
                                                              for _ in range(layers))}),
            "final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = nn.Linear(width, width, bias=False) if pools else None

    @torch.no_grad()
    def forward(self, ids):
        embeddings = self.text_model["embeddings"]
        *layers, last = self.text_model["encoder"]["layers"]
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight      # (B, 77, D)
        for layer in layers:
            x = layer(x)
        if self.text_projection is None:                        # the last layer and the norm are never used
            return x, None
        end = ids.argmax(dim=1)                                 # (B,): the end token has the largest id
        at_end = self.text_model["final_layer_norm"](last(x))[torch.arange(len(ids)), end]      # (B, D)
        return x, self.text_projection(at_end)
