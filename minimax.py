"""Fine-tunes the diffusion model so that what it generates is representative and diverse.

    L_r = mean over the classes c in the batch of  1 - min cos(z_hat[c], real memory[c])
    L_d = mean over the classes c in the batch of      max cos(z_hat[c], generated memory[c])
    L   = L_diff + lambda_r L_r + lambda_d L_d         Gu et al. 2024, eq. 3 to 5; Fan et al. 2025, eq. 2 to 4

    python minimax.py          # half a minute on two CPU cores; the first time 5, base model included
    python minimax.py --data imagewoof --root /data/imagenet        # Gu et al. 2024, from DiT-XL/2's weights
    torchrun --nproc-per-node=4 minimax.py ...                      # the batch divided over four GPUs

z_hat is the one-step prediction of the clean image, L_diff the loss of diffusion.py. As in Gu et al.'s code,
the min is over all pairs of a prediction and a stored real image of the class, the max over all pairs of a
prediction and an earlier one; a term's gradient reaches one prediction alone. Trains or fetches a base model
first if there is none. Writes the averaged tuned weights to out/digits/minimax.safetensors, to be loaded over
the base's, and minimax.png, samples of the same seeds before (above) and after (below) fine-tuning; with
--phases two files for each group of classes, minimax-0-19.safetensors and so on.
"""
import functools
import pathlib
import shlex

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch
import torch.nn.functional as F

from diffusion import denoising_loss, train_base, training_batch
from memory import Memory, rule_pair
from nanodd import checks, cli, processes, running
from nanodd.data import datasets
from nanodd.networks import models, training
from nanodd.sampling import sheets

# ----------------------------------------------------------------------------------------------------
# 1. The two criteria, and what Gu et al. compare them with
#
# z (n, D): the batch's predictions of one class, with gradients. memory (M, D): earlier embeddings of that
# class, or None. batch (n, D): that class's real images in the batch, which only the naive L_r compares with.


def cosines(z, memory):
    """Cosine similarities of all pairs: (n, D), (M, D) -> (n, M)."""
    return F.normalize(z, dim=1) @ F.normalize(memory, dim=1).T


def representativeness(z, batch, memory):
    """1 - the smallest of n x M cosines: pulls that prediction towards its image (Gu et al. 2024, eq. 3)."""
    return 0.0 if memory is None else 1 - cosines(z, memory).min()


def diversity(z, batch, memory):
    """The largest of n x M cosines: pushes that prediction from the earlier one (Gu et al. 2024, eq. 4)."""
    return 0.0 if memory is None else cosines(z, memory).max()


def naive_representativeness(z, batch, memory):
    """1 - the mean cosine to the batch's own real images: pulls all to the centre (Gu et al. 2024, eq. 2)."""
    return 1 - cosines(z, batch).mean()


def naive_diversity(z, batch, memory):
    """The mean cosine in place of the largest (Gu et al. 2024, Table 5)."""
    return 0.0 if memory is None else cosines(z, memory).mean()


CRITERIA = {                   # --criterion: (L_r, called with the real memory; L_d, with the generated one)
    "minmax": (representativeness, diversity),
    "naive": (naive_representativeness, naive_diversity),
}

# ----------------------------------------------------------------------------------------------------
# 2. The losses over the memories


class MinMax:
    """Computes lambda_r L_r + lambda_d L_d of a batch, then pushes the batch into its two memories.

    z_hat "x0" is (x_t - sqrt(1 - abar) eps_hat) / sqrt(abar), as in Gu et al.'s code, which gave their
    numbers; "paper" is x_t - eps_hat, as Fan et al. write it. Above about t = 500 the two agree in direction
    (they differ by the factor 1/sqrt(abar)); near t = 0 "paper" is about x_0 - eps. rules: keys of
    memory.RULES for the real and the generated memory. slots: entries per class. criterion: of CRITERIA.
    """

    def __init__(self, lambda_r, lambda_d, slots=64, rules=("fifo", "fifo"), z_hat="x0", criterion="minmax",
                 seed=0):
        self.lambda_r, self.lambda_d, self.z_hat = lambda_r, lambda_d, z_hat
        self.criterion_r, self.criterion_d = CRITERIA[criterion]
        self.real, self.generated = (Memory(slots, rule, seed) for rule in rules)

    def __call__(self, denoised, x0, labels):
        """-> (lambda_r L_r + lambda_d L_d, {"repr": L_r, "div": L_d}), scalars.

        denoised: diffusion.Denoised, and x0 (B, C, H, W): this process's share of the batch. labels: a list,
        of the whole batch. Compares before it pushes, so that no prediction is compared with itself. A class
        with an empty memory adds 0 but counts in the mean. Under torchrun every process pushes the whole
        batch, but takes the extremum, and the mean over classes, in its own share.
        """
        z = denoised.x0_hat if self.z_hat == "x0" else denoised.xt - denoised.eps_hat
        z, real = z.flatten(1), x0.flatten(1)                               # (B, D)
        own_labels = labels[processes.rank() * len(z):][:len(z)]
        z_by_class, real_by_class = by_class(z, own_labels), by_class(real, own_labels)
        l_r = l_d = torch.zeros((), device=z.device)
        for c, z_c in z_by_class.items():                                   # (n, D)
            l_r = l_r + self.criterion_r(z_c, real_by_class[c], self.real.get(c))
            l_d = l_d + self.criterion_d(z_c, real_by_class[c], self.generated.get(c))
        l_r, l_d = l_r / len(z_by_class), l_d / len(z_by_class)
        for memory, x in ((self.real, real), (self.generated, z)):
            for c, items in by_class(processes.all_gather(x), labels).items():
                memory.push(c, items)
        return self.lambda_r * l_r + self.lambda_d * l_d, {"repr": l_r.detach(), "div": l_d.detach()}

    def state_dict(self):
        return {"real": self.real.state_dict(), "generated": self.generated.state_dict()}

    def load_state_dict(self, state):
        self.real.load_state_dict(state["real"])
        self.generated.load_state_dict(state["generated"])


def by_class(x, labels):
    """x (B, D), labels (list of B) -> {class: its part (n, D)}. A list: reading a tensor awaits the GPU."""
    vectors = x.unbind()
    return {c: torch.stack([vector for vector, label in zip(vectors, labels, strict=True) if label == c])
            for c in sorted(set(labels))}


# ----------------------------------------------------------------------------------------------------
# 3. The training loop


def tune(trainer, examples, rows, schedule, minmax, start=0):
    """The loop, run by training.fit: yields {"loss": L_diff, "repr": L_r, "div": L_d} after every step."""
    plan, labels = trainer.plan, examples.labels.cpu()                      # (N,)
    for step in range(start, plan.steps):
        x0, y, t, eps = training_batch(examples, plan, step, rows, schedule)
        # the classes of the whole batch, since y has "no class" in place of a tenth of them
        batch_labels = labels[training.batch_index(len(labels), plan.batch, step, plan.seed)].tolist()
        denoised = denoising_loss(trainer.predict, schedule, x0, y, t, eps)
        penalty, terms = minmax(denoised, x0, batch_labels)     # lambda_r L_r + lambda_d L_d
        trainer.optimizer.zero_grad(set_to_none=True)
        (denoised.loss.mean() + penalty).backward()
        trainer.step(step)                                      # the rate, AdamW, the averaged weights
        yield {"loss": denoised.loss.detach().mean(), **terms}


def tune_phase(args, run, data, phase, base, path):
    """Fine-tunes the base model in the file `base` on the classes phase[0] to phase[1], and writes `path`."""
    start = models.new_tuned(args, run, data, phase, base, path)            # builds the network and AdamW
    if start is None:                                           # `path` is finished
        return
    minmax = MinMax(args.lambda_r, args.lambda_d, args.slots, args.memory, args.z_hat, args.criterion,
                    run.seed)
    loop = functools.partial(tune, start.trainer, start.examples, start.rows, start.schedule, minmax)
    show = sheets.comparing(start, path.with_suffix(".png"))    # draws the same seeds before and after
    training.fit(start.trainer, loop, path, start.header, run.overwrite, memories=minmax, show=show)


# ----------------------------------------------------------------------------------------------------
# 4. The driver


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, cli.TRAINING)
    parser.add_argument("--base", type=pathlib.Path, metavar="FILE",
                        help="the base model (default: base.safetensors in --out or out/NAME, trained with "
                             "this --seed if there is none; for ImageNet the published weights, fetched)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="images a step, of all processes (default: the recipe's)")
    parser.add_argument("--lambda-r", type=float, help="weight of representativeness (default: the recipe's)")
    parser.add_argument("--lambda-d", type=float, help="weight of diversity (default: the recipe's)")
    parser.add_argument("--memory", default="fifo", metavar="fifo|adaptive|REAL,GENERATED",
                        help="which entries are forgotten: see memory.py (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=64, help="entries per class (default: %(default)s)")
    parser.add_argument("--z-hat", choices=("x0", "paper"), default="x0",
                        help="the prediction that the losses compare (default: %(default)s)")
    parser.add_argument("--criterion", choices=CRITERIA, default="minmax",
                        help="the two losses: see section 1 (default: %(default)s)")
    parser.add_argument("--naive", dest="criterion", action="store_const", const="naive",
                        help="short for --criterion naive: means in place of min and max")
    parser.add_argument("--tune", choices=("difffit", "all"), default="difffit",
                        help="biases, gammas and labels only, or every weight (default: %(default)s)")
    parser.add_argument("--classes", metavar="A-B",
                        help="tune on these classes alone, counted from 0: one phase of a large data set")
    parser.add_argument("--phases", type=int, metavar="N",
                        help="a model for every N classes, one by one; Gu et al. take 20 for ImageNet-100")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        run = cli.run_of(args, __file__, argv)
        data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
        checks.fill_tuning_flags(args, data.recipe)
        args.memory = list(rule_pair(args.memory))              # an unknown rule is refused before any work
        phases = checks.phases(args, data)
        if args.dry_run:
            return models.describe_phases(data, phases)
        base = models.base_of(args, data, run, train_base)
        for path, phase in phases.items():
            tune_phase(args, run, data, phase, base, path)
        source = path if len(phases) == 1 else path.parent
        print(f"{source} -> python sample.py {data.recipe.sampling}{cli.data_flags(args, '--out')}"
              + (f" --checkpoint {shlex.quote(str(source))}" if args.out or args.classes else ""))


if __name__ == "__main__":
    main()
