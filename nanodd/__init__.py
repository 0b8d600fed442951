"""What the six stage files stand on, and what only scale and the papers' details need.

    errors, processes, files, recipes, cli          what every file uses
    data/        image sets: folders, archives, .npz; the data sets by their names
    networks/    behind diffusion.py: checkpoints, what stands around a training loop, U-ViT, the autoencoder
    sampling/    behind sample.py: DPM-Solver, the set on disk, the choice of a step count
    judging/     behind train_eval.py: other judges, Gu et al.'s protocol, resuming, real baselines

Nothing in here imports a stage file or has a command line: whatever can be typed stands at the top.
"""
import os

# libgomp's threads wait for one another at the end of every matrix product: the first one spins for up to
# 300,000 rounds before it sleeps. A tiny network's products take microseconds, so that one other process that
# keeps a core busy makes a training step several times slower. With 500 rounds it is less than twice as slow
# (docs/speed.md). libgomp reads the number once, when torch is imported: import this package before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")
