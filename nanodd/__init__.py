"""The code that all stage files share, and the code that only large data and the papers' details need.

    errors, processes, files, recipes, cli, checks      used by all stages
    data/        image sets: folders, archives, .npz; the data sets by their names
    networks/    for diffusion.py and minimax.py: checkpoints, training, U-ViT, the autoencoder
    sampling/    for sample.py: DPM-Solver, the distilled set on disk, step counts, modes, sheets of samples
    judging/     for train_eval.py: other judges, Gu et al.'s protocol, resuming, baselines of real images

No file of this package imports a stage file or has a command line: every command is a file of the top level.
"""
import os

# libgomp's threads wait for one another at the end of every matrix product: the first one spins for up to
# 300,000 rounds before it sleeps. A tiny network's products take microseconds, so that one other process that
# keeps a core busy makes a training step several times slower. With 500 rounds it is less than twice as slow
# (docs/log.md). libgomp reads the number once, when torch is imported: import this package before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")
