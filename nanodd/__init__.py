"""What the six stage files stand on, and what only scale and the papers' details need.

    errors, processes, files, recipes, cli          what every file uses
    data/        image sets: folders, archives, .npz; the data sets by their names
    networks/    behind diffusion.py: checkpoints, what stands around a training loop, U-ViT, the autoencoder
    sampling/    behind sample.py: DPM-Solver, the set on disk, the choice of a step count
    judging/     behind train_eval.py: other judges, Gu et al.'s protocol, resuming, real baselines

Nothing in here imports a stage file or has a command line: whatever can be typed stands at the top.
"""
