"""SDXL's UNet: a convolutional network with attention to the prompt, which predicts the noise of latents.

    e     = MLP(waves(t)) + MLP(pooled, waves(H, W, 0, 0, H, W))         added in every residual block
    x     = x + attention(norm(x));  x + attention(norm(x), prompt);  x + feed_forward(norm(x))       in turn
    x     = block(cat[x, skip])                          skips join the way down to the way up

2,567,463,684 parameters, most of them in 70 transformer blocks; 1.6 TFLOP for a picture of 512 pixels.
Sources: Ronneberger et al. 2015 (U-Net), Podell et al. 2023 (SDXL), Sauer et al. 2023 (SDXL-Turbo).
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nanodd.networks.autoencoder import Upsample, conv3
from nanodd.networks.uvit import sincos

# ----------------------------------------------------------------------------------------------------
# 1. Layers
#
# Names and shapes of all parameters are those of the published checkpoint.
# B pictures, h w latent cells at any level, N = h w tokens, C or D channels, T channels of e, X of context.

TIME_ID = 256                  # waves for each of the six numbers of the picture's size


def waves(positions, dim):
    """Positions (n,) -> (n, dim) float32: cosines, then sines."""
    return torch.cat(sincos(positions.float(), dim), dim=1)


class Embedding(nn.Module):
    """Two linear layers, (B, inputs) -> (B, T)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResBlock(nn.Module):
    """The autoencoder's block, with e added in its middle, and with another eps in its norms, 1e-5.

    x (B, inputs, h, w), e (B, T) -> (B, outputs, h, w).
    """

    def __init__(self, inputs, outputs, time):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs)
        self.conv1 = conv3(inputs, outputs)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(32, outputs)
        self.conv2 = conv3(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, outputs, h, w)
        h = h + self.time_emb_proj(F.silu(e))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) to context (B, M, X) -> (B, N, D). head: the width of a head."""

    def __init__(self, width, context, head):
        super().__init__()
        self.head = head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))    # the checkpoint's name is to_out.0

    def forward(self, x, context):
        q, k, v = (rearrange(y, "B N (heads d) -> B heads N d", d=self.head)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(x, "B heads N d -> B N (heads d)"))


class GEGLU(nn.Module):
    """(B, N, D) -> (B, N, 4D): half of a linear layer's outputs, times gelu of the rest (Shazeer 2020)."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=2)                              # 2 of (B, N, 4D)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, D) -> (B, N, D); the checkpoint's names are net.0 and net.2, with a dropout between."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward: x (B, N, D), context (B, 77, X) -> (B, N, D)."""

    def __init__(self, width, context, head):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, head)
        self.attn2 = Attention(width, context, head)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """x + `depth` blocks on the cells of x as tokens: x (B, D, h, w), context (B, 77, X) -> (B, D, h, w)."""

    def __init__(self, width, depth, context, head):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(Block(width, context, head) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x, context):
        tokens = self.proj_in(rearrange(self.norm(x), "B D h w -> B (h w) D"))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)                                 # (B, N, D)
        return x + rearrange(self.proj_out(tokens), "B (h w) D -> B D h w", h=x.shape[2])


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2), with zeros on all sides; the autoencoder's pads on two only."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


# ----------------------------------------------------------------------------------------------------
# 2. The network


class Level(nn.Module):
    """One resolution: ResBlocks, each of the first len(attentions) followed by a Transformer; then a resize.

    The UNet calls them one by one, since the skips lie between them.
    """

    def __init__(self, resnets, transformers, down=None, up=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers)
        self.downsamplers = nn.ModuleList([down] if down else [])
        self.upsamplers = nn.ModuleList([up] if up else [])

    def forward(self, j, x, e, context):
        """ResBlock j and its Transformer, if it has one: (B, channels, h, w) -> (B, width, h, w)."""
        x = self.resnets[j](x, e)
        return self.attentions[j](x, context) if j < len(self.attentions) else x


class UNet(nn.Module):
    """eps_hat(x_t, t, prompt): x (B, 4, h, w), t (B,) in [0, 999] -> (B, 4, h, w), in the weights' dtype.

    The prompt is context (B, 77, 2048) and pooled (B, 1280), as in text.py. The picture, of 8h x 8w pixels,
    is said to be as large as its original and not cropped. channels, depths: of the levels, from fine to
    coarse; a depth is the number of blocks in a Transformer, and 0 is none. context, pooled: the prompt's
    widths. head: the width of an attention head.
    """

    def __init__(self, channels=(320, 640, 1280), depths=(0, 2, 10), context=2048, pooled=1280, head=64):
        super().__init__()
        time = 4 * channels[0]                                  # T

        def level(inputs, width, depth, transformers, **resize):
            transformers = range(transformers if depth else 0)
            return Level([ResBlock(c, width, time) for c in inputs],
                         [Transformer(width, depth, context, head) for _ in transformers], **resize)
        self.conv_in = conv3(4, channels[0])
        self.time_embedding = Embedding(channels[0], time)
        self.add_embedding = Embedding(pooled + 6 * TIME_ID, time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, x = [channels[0]], channels[0]                   # channels of every skip, and of x
        levels = list(zip(channels, depths, strict=True))
        for k, (width, depth) in enumerate(levels, start=1):
            down = Downsample(width) if k < len(levels) else None
            self.down_blocks.append(level([x, width], width, depth, 2, down=down))
            skips += [width] * (3 if down else 2)
            x = width
        self.mid_block = level([x, x], x, depths[-1], 1)
        for k, (width, depth) in enumerate(levels[::-1], start=1):
            up = Upsample(width) if k < len(levels) else None
            inputs = [x + skips.pop(), width + skips.pop(), width + skips.pop()]
            self.up_blocks.append(level(inputs, width, depth, 3, up=up))
            x = width
        self.conv_norm_out = nn.GroupNorm(32, channels[0])
        self.conv_out = conv3(channels[0], 4)

    def embed(self, t, pooled, height, width):
        """e (B, T), of the time t (B,), pooled (B, 1280), and the picture's height and width in pixels."""
        ids = torch.tensor([height, width, 0, 0, height, width], device=t.device)       # (6,)
        ids = waves(ids, TIME_ID).flatten().expand(len(t), -1)                          # (B, 6 * 256)
        time = self.time_embedding(waves(t, self.time_embedding.linear_1.in_features))  # (B, T)
        return time + self.add_embedding(torch.cat([pooled, ids.to(pooled.dtype)], dim=1))

    def forward(self, x, t, context, pooled):
        dtype = self.conv_in.weight.dtype
        context, e = context.to(dtype), self.embed(t, pooled, 8 * x.shape[2], 8 * x.shape[3])
        x = self.conv_in(x.to(dtype))                                       # (B, 320, h, w)
        skips = [x]
        for level in self.down_blocks:                                      # ... (B, 1280, h/4, w/4)
            for j in range(len(level.resnets)):
                x = level(j, x, e, context)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)
        for j in range(len(self.mid_block.resnets)):
            x = self.mid_block(j, x, e, context)
        for level in self.up_blocks:                                        # ... (B, 320, h, w)
            for j in range(len(level.resnets)):                             # the last skip is used first
                x = level(j, torch.cat([x, skips.pop()], dim=1), e, context)
            for upsample in level.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                 # (B, 4, h, w)
