"""Trains and evaluates Slot Attention.

    python train.py                              the demo: minutes on two CPU cores
    python train.py --data clevr                 the paper's recipe for CLEVR6; every value of it is a flag
    python train.py --resume runs/clevr          go on
    python train.py --eval runs/clevr            evaluate

A run is one folder: checkpoint.pt, log.jsonl (one JSON object a line) and its figure.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from slot_attention import SlotAttentionAutoEncoder, adjusted_rand_index

# ---------------------------------------------------------------------------------------------------------------------
# The experiments. Each value is a flag: batch_size is --batch-size.
# ---------------------------------------------------------------------------------------------------------------------

RECIPE = {  # the paper's for CLEVR6 (appendix E.3), and what each value means
    "num_slots": (7, "slots, K"),
    "num_iterations": (3, "iterations of attention, T"),
    "slot_dim": (64, "size of a slot, D"),
    "mlp_hidden_size": (128, "hidden size of the MLP behind the GRU"),
    "implicit": (False, "one-step gradient: iterate without gradient, then once with it"),
    "resolution": (128, "height and width of the pictures"),
    "encoder_channels": (64, "channels of the encoder's convolutions"),
    "encoder_strides": ((1, 1, 1, 1), "stride of each convolution of the encoder, as 1,2,2,1"),
    "decoder_channels": (64, "channels of the decoder's convolutions"),
    "decoder_strides": ((2, 2, 2, 2, 1), "stride of each transposed convolution of the decoder"),
    "decoder_kernel": (5, "their size"),
    "pixel_shuffle": (1, "the last layer makes blocks of so many pixels"),
    "min_objects": (0, "only scenes with so many objects or more"),
    "max_objects": (6, "only scenes with so many objects or fewer"),
    "train_count": (70_000, "scenes for training, at most"),
    "eval_count": (320, "scenes for evaluation, at most"),
    "batch_size": (64, "scenes in a step"),
    "steps": (500_000, "steps"),
    "lr": (4e-4, "learning rate of Adam"),
    "warmup": (10_000, "steps until the learning rate is reached"),
    "decay_rate": (0.5, "the learning rate falls by this factor ..."),
    "decay_steps": (100_000, "... every so many steps, smoothly"),
    "beta2": (0.999, "Adam's decay of the squared gradients"),
    "clip": (0.0, "largest norm of the gradient; 0: any"),
    "eval_every": (5_000, "steps between evaluations"),
}
FULL_RESOLUTION = dict(encoder_channels=32, decoder_channels=32, decoder_strides=(1, 1, 1), max_objects=10,
                       train_count=60_000)
EXPERIMENTS = {  # what differs from that
    "clevr": {},
    "clevr_like": {},
    "multi_dsprites": dict(FULL_RESOLUTION, num_slots=6, resolution=64),
    "multi_dsprites_on_colored": dict(FULL_RESOLUTION, num_slots=5, resolution=64),
    "tetrominoes": dict(FULL_RESOLUTION, num_slots=4, resolution=35),
}
SMALL = {  # and with --small, for minutes on a CPU
    "tetrominoes": dict(encoder_strides=(1, 2, 1), decoder_strides=(1, 1), pixel_shuffle=3, train_count=30_000, eval_count=512,
                        steps=2_000, lr=3e-3, warmup=100, decay_steps=400, beta2=0.95, clip=1.0, eval_every=250),
}
MODEL_KEYS = list(RECIPE)[:12]


def learning_rate(step, lr, warmup, decay_rate, decay_steps):
    """The official schedule: the warm-up is linear and the decay goes on during it; the first step has rate 0."""
    return lr * min(1, step / max(warmup, 1)) * decay_rate ** (step / decay_steps)
