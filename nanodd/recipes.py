"""The recipes: every number that the stages take from the data set, unless a flag replaces it.

`python diffusion.py --data NAME --dry-run` prints the recipe that a data set gets.
"""
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """All numbers that the stages take from the data set. The defaults are for a folder on a laptop."""
    name: str
    size: int = 32             # side of what the diffusion model draws: pixels, or latent cells of 8 pixels
    channels: int = 3          # of what it draws: 1 or 3; of latents 4
    latents: bool = False      # whether it draws latents, which the autoencoder decodes
    weights: str = ""          # published weights of the base model; "" where it is trained here
    network: str = "tiny"      # DiT's size: tiny, XS, S, B, L or XL
    patch: int = 4             # pixels (or latent cells) per token side
    steps: int = 3000          # training steps of the base model
    batch: int = 32            # images a step
    lr: float = 2e-3           # peak learning rate of the base
    ema: float = .995          # EMA decay, after its warm-up
    tune_steps: int = 400      # steps of fine-tuning with the min-max losses; 0: tune_epochs says how many
    tune_epochs: int = 0
    tune_batch: int = 64
    tune_lr: float = 1e-3
    tune_beta2: float = .99    # AdamW's beta2
    tune_ema: float = .99
    tune_warm: bool = True     # the EMA decay warms up, so that tune_ema matters only in long runs
    lambda_r: float = .002
    lambda_d: float = .008
    guidance: float = 2.       # classifier-free guidance when sampling; 1 is none
    sampling: str = "--steps 10"                                # what minimax.py proposes for sample.py
    flip: bool = True          # mirror training images: right for photographs, wrong for digits
    net: str = "convnet3"      # the judge (convnet.py)
    judge_size: int = 32       # the size that images are brought to for the judge, in pixels
    protocol: str = "short"    # how the judge is trained (train_eval.py, section 2): challenge, short or gu
    # the judge's augmentations (train_eval.py, section 1), joined by "_"; "": all six of the challenge
    augment: str = "color_crop_cutout_flip_scale_rotate"
    mean: tuple = (.5, .5, .5)                                  # the judge sees (pixel / 255 - mean) / std
    std: tuple = (.25, .25, .25)
    epochs: int = 200          # of the judge, at most (for short; challenge and gu have their own)
    views: int = 40_000        # images that the judge sees, at most (for short): large sets get fewer epochs

    @property
    def pixels(self):
        """The side of the pictures that are read and drawn, in pixels."""
        return 8 * self.size if self.latents else self.size

    @property
    def colours(self):
        """The channels of the pictures: 1 or 3."""
        return 3 if self.latents else self.channels


RECIPES = {
    "folder": Recipe("folder"),
    # The digits are drawn at their native 8x8. Enlarged to 16x16 first, they need many times the steps of the
    # same network, since most of the 256 numbers then carry noise alone. The judge sees them at 16x16, which
    # leaves room for three poolings. Black stays 0 under the judge's normalisation, so that augmentation
    # fills with background. Guidance costs variety, and with it accuracy (docs/digits.md, the map): none.
    "digits": Recipe(
        "digits", size=8, channels=1, patch=2, steps=7500, lr=4e-3, guidance=1., flip=False, judge_size=16,
        augment="color_crop_cutout_scale_rotate", mean=(0.,), std=(.5,)),
    # Gu et al. 2024: 256-pixel pictures from the published DiT-XL/2. The averaged weights start at the
    # published ones, and still contain 30 % of them after 12,000 steps.
    "imagenet": Recipe(
        "imagenet", channels=4, latents=True, weights="DiT-XL-2-256x256", network="XL", patch=2,
        steps=400_000, batch=256, lr=1e-4, ema=.9999, tune_steps=0, tune_epochs=8, tune_batch=8,
        tune_beta2=.999, tune_ema=.9999, tune_warm=False, guidance=4.,
        sampling="--sampler ddpm --grid uniform --steps 50 --cfg-channels 3", net="resnetap10",
        judge_size=224, protocol="gu", augment="", mean=(.485, .456, .406), std=(.229, .224, .225),
        epochs=300, views=4_000_000),
}
RECIPES["imagenet512"] = replace(RECIPES["imagenet"], name="imagenet512", size=64, weights="DiT-XL-2-512x512")
# The challenge's two data sets at their own size, 256 tokens both. The judge's numbers are the challenge's.
# 16,000 steps are 82 epochs of CIFAR-100, twelve minutes of an H100 when compiled (docs/log.md). Of the rates
# from 4e-4 to 3.2e-3 the two largest, 1.6e-3 and more, did best on a stand-in (on a CPU: 600 steps of
# 64 images of 8 pixels, a network as wide and a third as deep); a deeper network needs a smaller one. No
# other number was tuned. CIFAR-10 was not part of the challenge.
RECIPES["cifar100"] = replace(
    RECIPES["folder"], name="cifar100", network="S", patch=2, steps=16_000, batch=256, lr=1e-3, ema=.999,
    tune_steps=0, tune_epochs=8, tune_beta2=.999, tune_ema=.9999, guidance=1.5, protocol="challenge",
    augment="", mean=(.5071, .4866, .4409), std=(.2673, .2564, .2762), epochs=200, views=1_000_000)
RECIPES["cifar10"] = replace(
    RECIPES["cifar100"], name="cifar10", mean=(.4914, .4822, .4465), std=(.2470, .2435, .2616))
RECIPES["tiny-imagenet"] = replace(
    RECIPES["cifar100"], name="tiny-imagenet", size=64, patch=4, judge_size=64, mean=(.485, .456, .406),
    std=(.229, .224, .225))

# The names that --data takes, each with the name of its recipe. No folder of a user's may have such a name.
IMAGENETS = "imagenette", "imagewoof", "imageidc", "imagenet100", "imagenet"
BUILT_IN = {"digits": "digits", "cifar10": "cifar10", "cifar100": "cifar100",
            "tiny-imagenet": "tiny-imagenet",
            **dict.fromkeys(IMAGENETS, "imagenet")}
NEEDS_ROOT = ("tiny-imagenet", *IMAGENETS)                      # never fetched: --root is needed


def own_recipe(data):
    """The name of the recipe that --data NAME or DIR has, unless --recipe names another one."""
    return BUILT_IN.get(data, "folder")
