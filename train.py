"""Trains and evaluates Slot Attention.

    python train.py                             the demo: 2 to 13 minutes on two CPU cores
    python train.py --data clevr --device cuda  the paper's recipe for CLEVR6, on a GPU
    python train.py --data clevr_like --small   a small model and a short schedule, for a CPU
    python train.py --data FOLDER --small       your own pictures
    python train.py --resume RUN                continue a run; --eval RUN: evaluate it
    torchrun --standalone --nproc_per_node=N train.py ...
                                                the same training on N GPUs, or in N processes

A run is a folder: checkpoint.pt, log.jsonl (one JSON object a line) and figure.png. The flags below
change a recipe's values. In brackets are those of --data clevr, the CLEVR6 recipe; RECIPES in
train.py has the others, and a run begins by printing where its own differ.
"""

import argparse
import ctypes
import functools
import inspect
import io
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import data  # before torch, see there
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import visualize
from data import RANK, InputError, say
from slot_attention import (MODELS, WeightsError, adjusted_rand_index, average_precision_clevr,
                            hungarian_huber_loss, load_weights)

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
SAVE_EVERY = 600  # seconds of training between saves

# --- The recipes --------------------------------------------------------------------------------

CROPS = Literal["paper", "official", "none"]
LAYERS = Literal["none", "encoder", "all"]


@dataclass
class Config:
    """The paper's recipe for CLEVR6 (appendix E).

    Each field is a flag (--batch-size), and its comment the help text. The fields that are named
    like arguments of the model's constructor are passed to it. If you add a field: a float's
    default is 0.0, not 0. A number must be positive, or may be 0 if its default is 0.
    """
    task: Literal["object_discovery", "set_prediction"] = "object_discovery"  # what to learn
    data: str = "clevr"  # tetrominoes, multi_dsprites, clevr, clevr_like ..., or a folder
    masks: str = ""  # a folder with the masks of your pictures, for FG-ARI
    seed: int = 0  # of weights, order and noise
    # The model
    resolution: int = 128  # height and width of the images
    num_slots: int = 7  # slots, K
    num_iterations: int = 3  # iterations, T; for training see train_iterations
    slot_dim: int = 64  # size of a slot, D
    mlp_hidden_size: int = 128  # hidden units of the MLP that updates the slots
    encoder_channels: int = 64  # channels of the encoder's 5x5 convolutions
    encoder_strides: tuple = (1, 1, 1, 1)  # their strides: a convolution for each
    encoder_dim: int = 64  # size of the encoder's features
    decoder_channels: int = 64  # channels of the decoder's transposed convolutions
    decoder_strides: tuple = (2, 2, 2, 2, 1)  # their strides: a convolution for each
    # The data
    crop: CROPS = "paper"  # of CLEVR; paper: central square; official: see README; none: whole
    min_objects: int = 0  # only scenes with at least this many objects
    max_objects: int = 6  # only scenes with at most this many objects
    train_count: int = 70_000  # scenes for training, at most
    eval_count: int = 320  # scenes for evaluation, at most
    data_root: str = "data"  # where the official files and the cache are
    # The training
    batch_size: int = 64  # images in a step, of all processes together
    steps: int = 500_000  # steps
    lr: float = 4e-4  # learning rate of Adam; Muon's is ten times this
    warmup: int = 10_000  # steps of linear warm-up
    decay_steps: int = 100_000  # steps in which the learning rate halves; not with Muon
    eval_every: int = 5_000  # steps between evaluations
    log_every: int = 10  # steps between lines of log.jsonl
    accumulate: int = 1  # micro-batches a step: less memory, the same gradient
    compile: bool = False  # torch.compile; not yet measured on a GPU
    device: str = DEVICES[0]  # cuda or cpu
    threads: int = 0  # CPU threads; 0: one for each idle core. To repeat a run to the bit, set it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if it is fast here
    # Not in the paper, and off in its recipes
    implicit: bool = False  # one-step gradient, only through the last iteration: less memory
    learned_queries: bool = False  # a learned mean for each slot's initial state
    train_iterations: int = 0  # T in training; 0: num_iterations
    query_scale: float = 1.0  # factor of project_q's initial weights: try 3 if slots become stripes
    decoder_kernel: Literal[3, 5] = 5  # size of the decoder's kernels
    pixel_shuffle: int = 1  # upscaling factor of the decoder's last layer; see Decoder
    clip: float = 0.0  # clip the gradient's norm to this; 0: do not clip
    muon: LAYERS = "none"  # hidden layers for Muon (encoder: all but the decoder's); lr falls to 0
    slot_loss: float = 0.0  # final weight of each slot's own loss; it grows from 0


SET_PREDICTION = dict(
    num_slots=10, encoder_strides=(1, 2, 2, 1), crop="none", max_objects=10, eval_count=15_000,
    batch_size=512, steps=150_000, warmup=1_000, decay_steps=50_000)
DSPRITES = dict(
    resolution=64, num_slots=6, encoder_channels=32, encoder_dim=32, decoder_channels=32,
    decoder_strides=(1, 1, 1), train_count=60_000)
SMALL = dict(
    implicit=True, encoder_channels=32, encoder_strides=(1, 2, 1), muon="encoder", lr=1e-3,
    warmup=100, clip=1.0, batch_size=32, train_count=10_000, eval_every=500)
SMALL_64 = dict(
    SMALL, resolution=64, num_iterations=8, train_iterations=5, query_scale=3.0, slot_loss=0.3,
    decoder_channels=32, decoder_strides=(1, 1), pixel_shuffle=4, steps=6_000)
SMALL_DSPRITES = dict(
    SMALL_64, num_slots=6, muon="all", decoder_channels=64, decoder_kernel=3, train_count=40_000)
SMALL_SET_PREDICTION = dict(
    SMALL, num_slots=10, crop="none", max_objects=10, learned_queries=True, num_iterations=4,
    encoder_strides=(2, 2, 2, 1), eval_count=1_000, steps=8_000)
FOLDER = dict(max_objects=254, train_count=1_000_000_000)
RECIPES = {  # NAME[-set_prediction][-small]: what differs from Config; folder: of any pictures
    "clevr": {},
    "clevr-small": SMALL_64,
    "clevr_like": {},
    "clevr_like-small": SMALL_64,
    "multi_dsprites": DSPRITES,
    "multi_dsprites-small": SMALL_DSPRITES,
    "multi_dsprites_on_colored": dict(DSPRITES, num_slots=5),
    "multi_dsprites_on_colored-small": dict(SMALL_DSPRITES, num_slots=5),
    "tetrominoes": dict(DSPRITES, resolution=35, num_slots=4),
    "tetrominoes-small": dict(
        SMALL, resolution=35, num_slots=4, num_iterations=10, train_iterations=5, muon="all",
        lr=1.6e-3, slot_loss=0.5, decoder_kernel=3, decoder_strides=(1, 1, 1), pixel_shuffle=3,
        train_count=40_000, eval_count=512, steps=3_000),
    "clevr-set_prediction": SET_PREDICTION,
    "clevr-set_prediction-small": SMALL_SET_PREDICTION,
    "clevr_like-set_prediction": SET_PREDICTION,
    "clevr_like-set_prediction-small": SMALL_SET_PREDICTION,
    "folder": FOLDER,
    "folder-small": SMALL_64 | FOLDER,
}

# --- The loop -----------------------------------------------------------------------------------


def train(config, out, checkpoint=None):
    """Trains as a Config says, and writes the run into the folder `out`.

    With a checkpoint it resumes. A signal ends the program after saving, with exit code 128 + the
    signal's number.
    """
    autocast = set_up(config)
    torch.manual_seed(config.seed)  # the same weights in every process
    model = build_model(config)
    compiled = torch.compile(model, dynamic=False) if config.compile else model
    optimizers = [torch.optim.Adam(model.parameters(), fused=True)]
    if config.muon != "none":  # not in the paper
        optimizers = muon_and_adam(model, config.muon)
    train_set = load_scenes(config, "train")
    eval_set = load_scenes(config, "eval")
    keep_freed_memory()
    step = 0  # steps done
    seconds = 0.0
    if checkpoint:
        if checkpoint["source"] != train_set.source:
            raise InputError(f"{out} was trained on {checkpoint['source']} (in brackets: scenes); "
                             f"--data and --data-root now give {train_set.source}. Restore the "
                             "old ones, or train anew with --out")
        load_weights(model, checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        step = checkpoint["step"]
        seconds = checkpoint["seconds"]
    log = open_log(out, step)
    changed = {key: value for key, value in vars(config).items() if value != getattr(Config, key)}
    say(f"{out}, settings other than the paper's for CLEVR6: {changed or 'none'}\n"
        f"{len(train_set):,} scenes of {train_set.source}, {len(eval_set):,} held out; "
        f"{step:,} of {config.steps:,} steps done")

    stop = catch_signals()
    logged = step
    while step < config.steps:
        if step == logged:  # a line of the log begins
            total = 0  # of its losses
            clock = time.perf_counter()
        model.train()
        model.zero_grad()
        for batch in micro_batches(step, config, train_set):
            with autocast:
                slots = model.slot_attention.init_slots(batch["noise"])  # see micro_batches
                output = compiled(batch["image"], slots, num_iterations=config.train_iterations)
            # The loss. If you change it, change it in evaluate as well (but for the slot loss).
            if config.task == "set_prediction":
                loss = hungarian_huber_loss(output.predictions, batch["target"])   # section 2.3
            else:
                loss = F.mse_loss(output.recon_combined, batch["image"])           # section 2.2
                if config.slot_loss:  # not in the paper
                    loss = add_slot_loss(loss, output, batch["image"], config.slot_loss,
                                         step / config.steps)
            loss = loss / (config.accumulate * WORLD_SIZE)  # so that sums of these are means
            loss.backward()
            total += loss.detach()  # read only when it is logged: reading waits for the GPU
        for parameter in model.parameters():
            sum_over_processes(parameter.grad)
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
        step += 1

        stopping = torch.tensor(len(stop))  # signals, in any process
        sum_over_processes(stopping)
        at_eval = step % config.eval_every == 0 or step == config.steps
        if at_eval or stopping or step % config.log_every == 0:
            sum_over_processes(total)
            steps = step - logged
            mean_loss = total.item() / steps
            duration = time.perf_counter() - clock
            seconds += duration
            row = {"step": step, "loss": mean_loss, "seconds": round(seconds, 1),
                   "images_per_s": round(steps * config.batch_size / duration, 1)}
            if config.device == "cuda":
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 1)
                torch.cuda.reset_peak_memory_stats()  # else cuDNN's first trials would stay in it
            if at_eval:
                row |= evaluate(model, config, eval_set, autocast)
            # Since the last line of the log, training began, or passed a multiple of SAVE_EVERY.
            save_is_due = seconds % SAVE_EVERY <= duration
            saving = at_eval or stopping or save_is_due
            write_row(log, row, config, renew=not saving)
            if saving:
                save(out, config, model, optimizers, step, seconds, train_set.source)
            logged = step
        if stopping:
            say(f"stopped and saved; to continue, call it with --resume {out}")
            number = stop[0] if stop else signal.SIGTERM  # another process got the signal
            sys.exit(128 + number)


def micro_batches(step, config, scenes):
    """Yields this process's micro-batches of a step, with the slots' initial noise [B, K, D].

    For the same scenes and batch size, order and noise depend on seed and step alone. So a resumed
    run goes on as if it had never stopped, and any number of processes and micro-batches trains as
    one does.
    """
    epoch, position = divmod(step, len(scenes) // config.batch_size)  # only whole batches
    indices = epoch_batches(config.seed, epoch, len(scenes), config.batch_size)[position]
    noises = torch.randn(config.batch_size, config.num_slots, config.slot_dim,
                         generator=seeded(config.seed, step))
    # [processes, micro-batches, rows]: which rows of the batch each process takes, and when.
    positions = torch.arange(config.batch_size).view(WORLD_SIZE, config.accumulate, -1)
    for rows in positions[RANK]:
        batch = scenes.batch(indices[rows], config.device, ("image", "target"))
        batch["noise"] = data.to_device(noises[rows], config.device)
        yield batch


@functools.lru_cache(maxsize=1)
def epoch_batches(seed, epoch, count, batch_size):
    """Returns the batches of an epoch: indices of the training scenes, in a random order."""
    return torch.randperm(count, generator=seeded(seed, epoch)).split(batch_size)


def seeded(seed, number):
    """Returns a generator for a step's noise, or an epoch's order.

    In a million steps, no two seeds share one.
    """
    return torch.Generator().manual_seed(1_000_003 * seed + number)


def sum_over_processes(tensor):
    """Sums a tensor over all processes, in place. None, an unused layer's gradient, stays None."""
    if WORLD_SIZE > 1 and tensor is not None:
        dist.all_reduce(tensor)


def learning_rate(step, config):
    """Returns the official schedule: linear warm-up times exponential decay, both from step 0."""
    decay = 0.5 ** (step / config.decay_steps)
    if config.muon != "none":  # not in the paper: linearly to 0
        decay = 1 - step / config.steps
    return config.lr * min(1, step / config.warmup) * decay


# --- Evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, config, scenes, autocast, num_iterations=None):
    """Returns a split's mean loss, "eval_loss" (of the paper), and mean "fg_ari" if it has masks.

    For set prediction, the average precision within each distance: "ap_inf", "ap_1" ...
    """
    noise = torch.randn(len(scenes), config.num_slots, config.slot_dim, generator=seeded(0, 0))
    model.eval()
    eval_loss = 0.0
    fg_ari = []
    predictions = []
    targets = []
    size = config.batch_size // (WORLD_SIZE * config.accumulate)  # it fits in memory in training
    for index in torch.arange(len(scenes)).split(size):
        batch = scenes.batch(index, config.device)
        with autocast:
            slots = model.slot_attention.init_slots(noise[index].to(config.device))
            output = model(batch["image"], slots, num_iterations=num_iterations)
        if config.task == "set_prediction":
            loss = hungarian_huber_loss(output.predictions, batch["target"])
            predictions += output.predictions
            targets += batch["target"]
        else:
            loss = F.mse_loss(output.recon_combined, batch["image"])
            if "label" in batch:
                fg_ari += foreground_ari(batch["label"], output.masks).tolist()
        eval_loss += loss.item() * len(index)
    metrics = {"eval_loss": round(eval_loss / len(scenes), 6)}
    if predictions:
        for distance in (torch.inf, 1, 0.5, 0.25, 0.125):
            ap = average_precision_clevr(torch.stack(predictions), torch.stack(targets), distance)
            metrics[f"ap_{distance}"] = round(ap, 4)
    elif fg_ari:
        metrics["fg_ari"] = round(sum(fg_ari) / len(scenes), 4)
    return metrics


def foreground_ari(label, masks):
    """Returns FG-ARI [B] of masks [B, K, 1, H, W]; label [B, H, W]: 0 background, 255 left out."""
    label = label.flatten(1)[..., None]                                 # [B, P, 1]
    foreground = label[(label > 0) & (label < 255)].unique()            # [entities]
    true_mask = label == foreground                                     # [B, P, entities]
    return adjusted_rand_index(true_mask, masks.flatten(2).mT)


def print_evaluation(config, checkpoint):
    """Prints the metrics after 1, 2, 3 ... iterations (generalisation, section 4.1)."""
    autocast = set_up(config)
    if RANK > 0:
        return
    scenes = load_scenes(config, "eval")
    # Whatever --num-slots says, the model has as many learned means as in training.
    model = build_model(replace(config, num_slots=checkpoint["arguments"]["num_slots"]))
    load_weights(model, checkpoint["model"])
    if scenes.source != checkpoint.get("source", scenes.source):
        say(f"trained on {checkpoint['source']}: some of these scenes may have been in it")
    print(f"{len(scenes):,} held-out scenes of {scenes.source}, {config.num_slots} slots")
    for iterations in range(1, max(8, config.num_iterations) + 1):
        result = evaluate(model, config, scenes, autocast, iterations)
        print(json.dumps({"num_iterations": iterations, **result}), flush=True)


# --- Runs ---------------------------------------------------------------------------------------


def load_scenes(config, split):
    """Returns a split of the run's dataset. Raises InputError if it is smaller than a batch."""
    scenes = visualize.load_split(vars(config), split)
    if split == "train" and len(scenes) < config.batch_size:
        raise InputError(f"{len(scenes)} scenes for training are fewer than --batch-size "
                         f"{config.batch_size}: add some, or choose a smaller one")
    return scenes


def set_up(config):
    """Prepares hardware and processes, and writes the number of threads into the config.

    Returns the autocast to bfloat16, which may be off.
    """
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # which "cuda" means from here
        if config.dtype == "float32":
            torch.backends.cudnn.allow_tf32 = False
        else:
            torch.set_float32_matmul_precision("high")  # TF32; in cuDNN it is on already
        torch.backends.cudnn.benchmark = True
        fast = torch.cuda.get_device_capability()[0] >= 8
    else:
        config.threads = config.threads or idle_cores()  # saved: a resumed run takes as many
        # Other CPUs emulate bfloat16, 50 times slower than float32. On Intel's that have
        # avx512_bf16, but no AMX, it is slower than float32, too.
        cpuinfo = Path("/proc/cpuinfo")
        fast = cpuinfo.exists() and re.search(
            "(?s)amx_bf16|AuthenticAMD.*avx512_bf16", cpuinfo.read_text())
    if config.threads:
        torch.set_num_threads(min(config.threads, os.cpu_count()))
    if WORLD_SIZE > 1:
        # Gradients may be on a GPU, signals are counted on the CPU: a backend for each.
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if fast else "float32"
    say(f"on {WORLD_SIZE} x {config.device}, {dtype}, threads: {torch.get_num_threads()} "
        "(--threads)")
    if config.device != DEVICES[0]:
        say("there is a GPU, too: to use it, --device cuda")
    return torch.autocast(config.device, torch.bfloat16, enabled=dtype == "bfloat16")


def idle_cores():
    """Returns how many threads to use: torch's, but at most one for each core that is idle now.

    Where a core is busy with other work, the thread that waits for it would stop all others.
    """
    def idle():  # of all cores, in 1/100 s, also those that wait for a disk
        return sum(map(int, Path("/proc/stat").read_text().split()[4:6]))

    threads = torch.get_num_threads()
    with suppress(OSError):  # not Linux
        before = idle()
        time.sleep(0.5)
        cores = round((idle() - before) / 50)
        threads = min(threads, max(cores, 1))
    return threads


def keep_freed_memory():
    """Makes glibc keep large tensors' memory for the next: clearing pages is 1/8 of a step."""
    with suppress(OSError):  # another libc, or not Linux
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)   # M_MMAP_MAX: take everything from the heap,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never give it back


def build_model(config):
    """Returns the config's model, on its device, with initial weights."""
    model = MODELS[config.task](**model_arguments(config))
    model.slot_attention.project_q.weight.data *= config.query_scale
    return model.to(config.device, memory_format=torch.channels_last)  # the faster layout


def model_arguments(config):
    """Returns the values of the config that the model's constructor takes."""
    names = inspect.signature(MODELS[config.task]).parameters
    return {name: getattr(config, name) for name in names}


def save(out, config, model, optimizers, step, seconds, source):
    """Writes the checkpoint. If it has NaN, raises InputError and keeps the one before."""
    content = {"task": config.task, "arguments": model_arguments(config), "config": vars(config),
               "model": model.state_dict(), "step": step, "seconds": seconds, "source": source,
               "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    check_finite(content)
    if RANK == 0:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with data.whole_file(out / "checkpoint.pt") as file:
            file.write(buffer.getbuffer())


def check_finite(content):
    """Raises InputError if a float, or a tensor, in dicts and lists has NaN or infinite values."""
    for value in tree_leaves(content):
        if isinstance(value, (float, torch.Tensor)) and not torch.as_tensor(value).isfinite().all():
            raise InputError(f"NaN or infinite values by step {content['step']}: not saved. "
                             "Resume from the last save, or start again, with a smaller --lr, or "
                             "with --clip 1")


def open_log(out, step):
    """Opens and locks a run's log, without the lines after `step`, which a killed run lost."""
    if RANK > 0:
        return open(os.devnull, "wb")
    path = out / "log.jsonl"
    with data.reading(path):
        os.makedirs(out, exist_ok=True)
        log = open(path, "ab+")
        if not data.lock(log):
            raise InputError(f"another process is training into {out}/: wait for it, or "
                             "choose another --out")
        log.seek(0)
        size = sum(len(line) for line in log
                   if b"\n" in line and json.loads(line)["step"] <= step)
        log.truncate(size)
    return log


def write_row(log, row, config, renew):
    """Appends a row to the log, and shows it on stderr: on a line that renews itself, or stays.

    Raises InputError if a value is not finite, or the disk is full.
    """
    check_finite(row)
    line = json.dumps(row).encode() + b"\n"
    with data.reading(f"cannot write {log.name}"):
        log.write(line)
        log.flush()
    left = data.duration(row["seconds"] * (config.steps / row["step"] - 1))
    values = "  ".join(f"{key} {value:.4g}" for key, value in row.items()
                       if key not in ("step", "seconds", "peak_gib"))  # in 80 columns
    say(f"step {row['step']:,} of {config.steps:,}, {left} left  {values}", renew)


def catch_signals():
    """Returns a list, to which the first Ctrl-C, SIGTERM or SIGHUP is added; a second one kills."""
    stop = []

    def handle(number, frame):
        stop.append(number)
        if "RANK" not in os.environ:  # torchrun sends each signal again, and kills by itself
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)
            with suppress(OSError):  # a closed terminal; print may be busy just now
                os.write(2, b"\nsaving after this step or evaluation (again: stop unsaved)\n")

    for number in SIGNALS:
        signal.signal(number, handle)
    return stop


SIGNALS = [number for number in signal.Signals  # Windows has no SIGHUP, and nohup ignores it
           if number.name in ("SIGINT", "SIGTERM", "SIGHUP")
           and signal.getsignal(number) != signal.SIG_IGN]

# --- Not in the paper ---------------------------------------------------------------------------


def add_slot_loss(mse, output, image, weight, progress):
    """Returns the loss that encourages each pixel, and each object, to be in one slot.

    With masks m, the slots' pictures r, the image x, weight w, and progress p, from 0 to 1 in a
    training:

        own = mean(sum_k m_k (r_k - x)^2)     each slot has to match the image where its mask is
        spread = sum_k sqrt(mean(m_k))        is least when few slots cover the image
        loss = (1 - p w) mse + p w own + 0.007 w p^4 spread

    The numbers were chosen by trials.
    """
    own = (output.masks * (output.recons - image[:, None]) ** 2).sum(dim=1).mean()
    shares = output.masks.mean(dim=(2, 3, 4))                           # [B, K]
    spread = (shares + 1e-6).sqrt().sum(dim=1).mean()  # at 0 the slope would be infinite
    loss = mse + progress * weight * (own - mse)
    return loss + 0.007 * weight * progress ** 4 * spread


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024) for matrices; a kernel counts as a matrix [first dimension, the others].

    The update is the momentum with its singular values, except the smallest, set to about 1. So all
    directions are learned at the same speed, also those whose gradients are small.
    """

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 0.05)
            update = parameter.grad.lerp(momentum, 0.95)  # Nesterov's
            update = orthogonalize(update.flatten(1))
            rows, columns = update.shape
            rate = 10 * group["lr"] * max(1, rows / columns) ** 0.5
            parameter.sub_(rate * update.view_as(parameter))


def orthogonalize(matrix):
    """Sets singular values, except the smallest, to about 1: five steps of Newton-Schulz.

    Each step maps them by x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5.
    """
    rows, columns = matrix.shape
    if rows > columns:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + ((2.0315 * square) @ square - 4.7750 * square) @ x
    return x


def muon_and_adam(model, layers):
    """Returns Muon for the hidden layers' matrices, and Adam for all else.

    The model's first and last matrix, initial slots and positions are left to Adam, with betas 0.9
    and 0.95. With layers="encoder" the decoder is left to Adam, too: with Muon on it, slots may end
    as stripes.
    """
    parameters = dict(model.named_parameters())
    matrices = [name for name in parameters if parameters[name].dim() > 1]
    others = r"slots_|\.pos\."
    if layers == "encoder":
        others += "|^decoder"
    hidden = [parameters.pop(name) for name in matrices[1:-1] if not re.search(others, name)]
    return [
        Muon(hidden, {}),
        torch.optim.Adam(parameters.values(), betas=(0.9, 0.95), fused=True),
    ]


# --- The command line ---------------------------------------------------------------------------


def parse(argv=None):
    """Returns the arguments, the run's Config, and the checkpoint of --resume or --eval."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    modes = {
        "--resume": "continue this run",
        "--eval": "evaluate this run, or this file of weights",
        "--out": "the folder of a new run [runs/ and the recipe's name]",
    }
    for flag, text in modes.items():
        mode.add_argument(flag, type=Path, metavar="RUN", help=text)
    parser.add_argument("--small", action="store_true",
                        help="a small model, trained with additions to the paper: for a CPU, "
                        "and to begin with")
    comments = dict(re.findall(r"(\w+): .* = .*  # (.*)", inspect.getsource(Config)))
    for field in fields(Config):
        kind = type(field.default)
        how = {"type": kind, "choices": get_args(field.type) or None}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            how = {"type": int, "nargs": "+"}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{comments.get(field.name)} [CLEVR6: {field.default}]", **how)
    args = parser.parse_args(argv)
    typed = {key: value for key, value in vars(args).items() if hasattr(Config, key)}

    run = args.resume or args.eval
    if run:
        if args.small:
            raise InputError(f"--small is for new runs: {run} has its recipe")
        checkpoint = visualize.read_run(run)
        args.out = run
        values = checkpoint["config"]
        if unknown := values.keys() - vars(Config):
            raise InputError(f"{run} is of another version of this code: it has {unknown}")
        if args.eval:
            values.update(device=DEVICES[0], threads=0)  # it may be another machine
        elif "steps" not in values:  # a mere file of weights
            raise InputError(f"{run} is a file of weights: --resume continues a run's folder")
        elif "muon" in typed:
            raise InputError("--resume continues a run with its optimizer, so without --muon")
    else:  # a new run
        checkpoint = None
        demo = "data" not in typed
        name = typed.setdefault("data", "tetrominoes")
        suffix = "-set_prediction" if typed.get("task") == "set_prediction" else ""
        if args.small or demo:
            suffix += "-small"
        values = RECIPES.get(name + suffix, RECIPES.get("folder" + suffix))
        if values is None:
            raise InputError(f"there is no recipe {name}{suffix}: --task set_prediction is for "
                             "--data clevr and clevr_like, or needs a recipe of this name")
        folder = "demo" if demo else Path(name).resolve().name + suffix
        args.out = args.out or Path("runs", folder)
        if os.path.exists(args.out / "checkpoint.pt"):
            raise InputError(f"{args.out}/ holds a run: --resume or delete it, or choose another "
                             "--out")
    config = Config(**(values | typed))
    check(config)
    return args, config, checkpoint


def check(config):
    """Raises InputError if a value of the config is out of range."""
    for key, value in vars(config).items():
        default = getattr(Config, key)
        if not (isinstance(value, (str, bool)) or value == default or np.min(value) > 0):
            wanted = "more than 0" if default else "0 or more"
            raise InputError(f"--{key.replace('_', '-')} must be {wanted}")
    if config.device not in DEVICES:
        raise InputError(f"--device must be one of {DEVICES} here (no cuda: a CPU build of "
                         "PyTorch, an old driver, or a container without GPUs?). Of several GPUs, "
                         "choose one by CUDA_VISIBLE_DEVICES")
    if config.batch_size % (WORLD_SIZE * config.accumulate):
        raise InputError("--batch-size must be a multiple of --accumulate times the number of "
                         f"processes ({WORLD_SIZE})")
    if config.task == "set_prediction" and (config.num_slots > 16 or config.crop != "none"):
        raise InputError("set prediction takes at most 16 --num-slots, and whole images: "
                         "--crop none")


def main(argv=None):
    with data.one_line_errors(WeightsError):
        args, config, checkpoint = parse(argv)
        if args.eval:
            return print_evaluation(config, checkpoint)
        train(config, args.out, checkpoint)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        if RANK == 0:
            visualize.main([str(args.out)])


if __name__ == "__main__":
    main()
