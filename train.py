"""Trains and evaluates Slot Attention.

    python train.py                              the demo: minutes on two CPU cores
    python train.py --data clevr                 the paper's recipe for CLEVR6: the values in brackets, each a flag
    python train.py --resume runs/clevr          go on; --eval runs/clevr: evaluate
    torchrun --nproc_per_node=N train.py ...     on N GPUs, or N processes on the CPU: the same training

A run is one folder: checkpoint.pt, log.jsonl (one JSON object a line) and figure.png.
"""

import argparse
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import visualize
from slot_attention import (MODELS, SetPrediction, adjusted_rand_index, average_precision_clevr, build_model,
                            hungarian_huber_loss, load_model)
from visualize import number

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# --- Training and evaluation -----------------------------------------------------------------------------------------


def train(config, out, checkpoint=None):
    """Trains by a config (its keys are those of DEFAULTS) into the folder `out`, from a checkpoint if given."""
    torch.manual_seed(config.seed)  # the same weights in every process
    device, dtype, model, compiled, optimizer = set_up(config, checkpoint)
    start, seconds, text = (checkpoint[key] for key in ("step", "seconds", "log")) if checkpoint else (0, 0.0, "")
    scenes, held_out = load_scenes(config, "train").to(device), load_scenes(config, "eval").to(device)
    with data.one_line_errors():
        log = data.open_log(out / "log.jsonl", text)
        if not checkpoint:
            save(out, config, model, optimizer, start, seconds, text)
    data.say(f"{scenes.source}: {len(scenes)} scenes, {len(held_out)} held out; {WORLD_SIZE} {device}, {dtype}; {out}")

    stop, since, clock = catch_signals(), start, time.perf_counter()
    total = torch.zeros(2, device=device)  # sum of the losses since the last line; number of signals
    for step, parts in zip(range(start + 1, config.steps + 1), batches(config, scenes, start, device)):
        total[0] += train_step(compiled, optimizer, parts, config, step - 1, dtype)
        at_eval = step % config.eval_every == 0 or step == config.steps
        if not at_eval and step % config.log_every and not (stop and WORLD_SIZE == 1):
            continue  # the loss is read, the device waited for, other processes' signals heard, only at a line

        total[1] = len(stop)
        if WORLD_SIZE > 1:
            dist.all_reduce(total)
        loss, stopped = total.tolist()
        loss /= step - since
        seconds += time.perf_counter() - clock
        result = evaluate(model, config, held_out, device, dtype) if at_eval and RANK == 0 else {}
        line = json.dumps({"step": step, "loss": loss, "seconds": round(seconds, 1), **result}) + "\n"
        text += line
        data.say(f"step {step:,}/{config.steps:,}  {seconds / step * (config.steps - step) / 60:.1f} min left  "
                 f"{step * config.batch_size / seconds:,.0f} images/s  loss {loss:.5f}  {json.dumps(result)[1:-1]}")
        with data.one_line_errors():
            if at_eval or stopped or not math.isfinite(loss):
                save(out, config, model, optimizer, step, seconds, text, loss + result.get("eval_loss", 0.0))
            log.write(line.encode())
        if stopped:
            data.say(f"stopped and saved; to go on: python train.py --resume {out}")
            sys.exit(128 + max(stop, default=signal.SIGTERM))
        total.zero_()
        since, clock = step, time.perf_counter()


def train_step(model, optimizer, parts, config, step, dtype):
    """One step on this process's parts of a batch -> their share of its mean loss, not read: that waits for a GPU."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.zero_grad()
    total = 0.0
    for batch in parts:
        with torch.autocast(batch["image"].device.type, dtype, enabled=dtype != torch.float32):
            output = model(batch["image"], slots=model.slot_attention.init_slots(batch["noise"]),
                           num_iterations=config.train_iterations)
        loss = compute_loss(output, batch, config, step / config.steps) / (len(parts) * WORLD_SIZE)
        loss.backward()
        total += loss.detach()
    if WORLD_SIZE > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    if config.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return total


def compute_loss(output, batch, config=None, progress=0.0):
    """Mean squared error over batch, pixels and channels (section 2.2), or the set prediction's loss (section 2.3).

    Not in the paper: as progress goes from 0 to 1, up to slot_loss of the error gives way to the slots' own errors,
    larger where masks overlap and pictures differ: each pixel is left to one slot. What several slots paint right, as a
    background or one object, is left to one of them by a late penalty on the square roots of the masks' shares."""
    if isinstance(output, SetPrediction):
        return hungarian_huber_loss(output.predictions, batch["target"])
    error = F.mse_loss(output.recon_combined, batch["image"])
    if not config or config.slot_loss == 0:
        return error
    own = (output.masks * (output.recons - batch["image"][:, None]) ** 2).sum(dim=1).mean()
    spread = (output.masks.mean(dim=(2, 3, 4)) + 1e-6).sqrt().sum(dim=1).mean()  # + 1e-6: at 0 the slope is infinite
    return error + progress * config.slot_loss * (own - error) + 0.007 * config.slot_loss * progress ** 4 * spread


def learning_rate(step, config):
    """The official schedule: a linear warm-up, from 0, during which the decay goes on. Muon's decay is linear, to 0."""
    decay = 1 - step / config.steps if config.muon != "none" else 0.5 ** (step / config.decay_steps)
    return config.lr * min(1, step / max(config.warmup, 1)) * decay


class Muon(torch.optim.Adam):
    """Muon (Jordan, 2024) for the hidden layers' matrices, Adam for all else. Not in the paper: the small recipes'.

    A matrix moves by its momentum with all but the smallest singular values set near 1: directions are learned at the
    same speed, also those whose gradients are small. A kernel counts as a matrix [first dimension, the others]."""

    def __init__(self, model, layers):
        super().__init__(model.parameters(), betas=(0.9, 0.95), fused=True)
        # Not the first and last layer, nor what makes slots and positions. With the decoder's, slots may end in strips.
        others = r"slots_|\.pos\." + ("|^decoder" if layers == "encoder" else "")
        self.hidden = [parameter for name, parameter in list(model.named_parameters())[1:-2]
                       if parameter.dim() > 1 and not re.search(others, name)]

    @torch.no_grad()
    def step(self):
        for parameter in self.hidden:
            state = self.state[parameter]
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter))  # as Adam names and saves them
            momentum = state["exp_avg"].lerp_(parameter.grad, 0.05)
            update = orthogonalize(parameter.grad.lerp(momentum, 0.95).flatten(1))       # Nesterov's momentum
            rate = 10 * self.param_groups[0]["lr"] * max(1, update.shape[0] / update.shape[1]) ** 0.5
            parameter.sub_(rate * update.view_as(parameter))
            parameter.grad = None                                                        # nothing is left for Adam
        super().step()


def orthogonalize(matrix):
    """Singular values, but the smallest, to about 1: five steps of Newton-Schulz, x -> 3.4 x - 4.8 x^3 + 2.0 x^5."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x


def batches(config, scenes, step, device):
    """The training batches from a step on, with the slots' initial noise [B, K, D], in this process's parts. Order and
    noise depend on seed, epoch and step alone: a run that goes on draws what it would have drawn."""
    size, per_epoch, pieces = config.batch_size, len(scenes) // config.batch_size, WORLD_SIZE * config.accumulate
    seed = config.seed * 1_000_003  # more than the usual numbers of steps: seeds share no noise
    while True:
        epoch, first = divmod(step, per_epoch)
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed + epoch))
        for index in order[:per_epoch * size].split(size)[first:]:
            generator = torch.Generator().manual_seed(seed + step)
            noise = torch.randn(size, config.num_slots, config.slot_dim, generator=generator)
            parts = list(zip(index.chunk(pieces), noise.chunk(pieces)))
            own = parts[RANK * config.accumulate:(RANK + 1) * config.accumulate]
            yield [{**scenes.batch(index, device), "noise": data.put(noise, device)} for index, noise in own]
            step += 1


@torch.no_grad()
def evaluate(model, config, scenes, device, dtype, num_iterations=None):
    """-> the mean loss of a split, "eval_loss"; where there are masks its mean FG-ARI, "ari"; or AP, "ap_DISTANCE"."""
    losses, aris, predictions, targets = [], [], [], []
    noise = torch.randn(len(scenes), config.num_slots, config.slot_dim, generator=torch.Generator().manual_seed(0))
    for index in torch.arange(len(scenes)).split(config.batch_size // (WORLD_SIZE * config.accumulate)):
        batch = scenes.batch(index, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = model(batch["image"], slots=model.slot_attention.init_slots(noise[index].to(device)),
                           num_iterations=num_iterations)
        losses.append(compute_loss(output, batch).expand(len(index)))
        if isinstance(output, SetPrediction):
            predictions.append(output.predictions)
            targets.append(batch["target"])
        elif "label" in batch:
            true_mask = F.one_hot(batch["label"].flatten(1).long(), 11)[..., 1:]  # [B, P, 10]: no background
            aris.append(adjusted_rand_index(true_mask, output.masks.flatten(2).transpose(1, 2)))
    result = {"eval_loss": round(torch.cat(losses).double().mean().item(), 6)}
    if aris:
        result["ari"] = round(torch.cat(aris).double().mean().item(), 4)
    if predictions:
        for d in (math.inf, 1, 0.5, 0.25, 0.125):
            result[f"ap_{d}"] = round(average_precision_clevr(torch.cat(predictions), torch.cat(targets), d), 4)
    return result


def print_evaluation(config, checkpoint):
    """Section 4.1's generalisation: the metrics after each number of iterations, on any number of objects and slots."""
    device, dtype, model, *_ = set_up(config, checkpoint)
    scenes = load_scenes(config, "eval").to(device)
    print(f"{len(scenes):,} held-out scenes of {scenes.source}, {config.num_slots} slots")
    for iterations in range(1, max(8, config.num_iterations) + 1):
        result = evaluate(model, config, scenes, device, dtype, iterations)
        print(json.dumps({"num_iterations": iterations, **result}), flush=True)


# --- The experiments. Each value is a flag: batch_size is --batch-size. ----------------------------------------------

COUNT, COUNT_OR_0, SIZE, STRIDE = number(int, 1, 1e9), number(int, 0, 1e9), number(int, 1, 4096), number(int, 1, 3)
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
DEFAULTS = {  # the paper's recipe for CLEVR6 (appendix E): value, type or choices, meaning
    "task": ("object_discovery", list(MODELS), "what to learn"),
    "data": (None, list(data.DATA), "the dataset; without it the demo: --data tetrominoes --small"),
    "seed": (0, COUNT_OR_0, "of weights, order and noise"),
    "num_slots": (7, number(int, 1, 100), "slots, K"),
    "num_iterations": (3, SIZE, "iterations of attention, T"),
    "train_iterations": (None, SIZE, "iterations in training, if fewer: faster"),
    "slot_dim": (64, SIZE, "size of a slot, D"),
    "implicit": (False, bool, "one-step gradient: only the last iteration has one (less memory, steadier)"),
    "learned_queries": (False, bool, "a mean of its own for the initial state of each slot"),
    "resolution": (128, SIZE, "height and width of the pictures"),
    "encoder_channels": (64, SIZE, "channels of the encoder's convolutions"),
    "encoder_strides": ((1, 1, 1, 1), STRIDE, "stride of each convolution of the encoder"),
    "query_scale": (1.0, number(float, 0, 1e3), "factor of the queries' initial weights; at 3 slots tile less"),
    "decoder_channels": (64, SIZE, "channels of the decoder's convolutions"),
    "decoder_strides": ((2, 2, 2, 2, 1), STRIDE, "stride of each transposed convolution of the decoder"),
    "decoder_kernel": (5, [3, 5], "size of the decoder's kernels"),
    "pixel_shuffle": (1, SIZE, "the decoder's last layer makes blocks of this many pixels a side"),
    "crop": ("paper", ["paper", "official", "none"], "official: that code's, CLEVR_v1.0 off centre (else as paper)"),
    "min_objects": (0, COUNT_OR_0, "only scenes with at least this many objects"),
    "max_objects": (6, COUNT_OR_0, "only scenes with at most this many objects"),
    "train_count": (70_000, COUNT, "scenes for training, at most"),
    "eval_count": (320, COUNT, "scenes for evaluation, at most"),
    "batch_size": (64, COUNT, "scenes in a step"),
    "steps": (500_000, COUNT, "steps"),
    "muon": ("none", ["none", "encoder", "all"], "Muon for hidden matrices (encoder: not the decoder's), linear decay"),
    "lr": (4e-4, number(float, 1e-12, 1e12), "learning rate of Adam; Muon's is 10 times this"),
    "warmup": (10_000, COUNT_OR_0, "steps until the learning rate is reached"),
    "decay_steps": (100_000, COUNT, "the learning rate halves over this many steps, smoothly"),
    "clip": (0.0, number(float, 0, 1e12), "largest norm of the gradient; 0: any"),
    "slot_loss": (0.0, number(float, 0, 1), "weight of the slots' own errors at the last step, see compute_loss"),
    "eval_every": (5_000, COUNT, "steps between evaluations"),
    "log_every": (10, COUNT, "steps between lines of the log; several processes heed a signal only there"),
    "accumulate": (1, COUNT, "take each batch in this many parts: less memory, the same gradient"),
    "compile": (True, bool, "torch.compile, on CUDA; it needs a C compiler"),
    "device": (DEVICES[0], DEVICES, "where to train"),
    "dtype": ("auto", ["auto", "float32", "bfloat16"], "auto: bfloat16 where the hardware has it"),
    "data_root": ("data", str, "where the real files and the caches are"),
}
FULL_SIZE = dict(encoder_channels=32, decoder_channels=32, decoder_strides=(1, 1, 1), train_count=60_000)
SETS = dict(num_slots=10, encoder_strides=(1, 2, 2, 1), crop="none", max_objects=10, eval_count=15_000, batch_size=512,
            steps=150_000, warmup=1_000, decay_steps=50_000)
SMALL = dict(muon="encoder", lr=1e-3, warmup=100, clip=1.0, slot_loss=0.3, implicit=True, num_iterations=8,
             train_iterations=5, encoder_channels=32, encoder_strides=(1, 2, 1), batch_size=32, train_count=10_000,
             eval_every=500, compile=False)
SMALL_35 = dict(SMALL, muon="all", lr=1.6e-3, slot_loss=0.5, num_iterations=10, decoder_channels=64,
                decoder_kernel=3, pixel_shuffle=3, train_count=40_000, eval_count=512, steps=3_000)
SMALL_64 = dict(SMALL, resolution=64, query_scale=3.0, decoder_channels=32, decoder_strides=(1, 1), pixel_shuffle=4,
                steps=6_000)
SMALL_DSPRITES = dict(SMALL_64, muon="all", decoder_channels=64, decoder_kernel=3, train_count=40_000)
SMALL_SETS = dict(SMALL, learned_queries=True, num_iterations=4, train_iterations=4, encoder_strides=(2, 2, 2, 1),
                  eval_count=1_000, steps=8_000)
EXPERIMENTS = {  # what differs from DEFAULTS, and what with --small differs from that
    ("object_discovery", "clevr"): ({}, SMALL_64),
    ("object_discovery", "clevr_like"): ({}, SMALL_64),
    ("object_discovery", "multi_dsprites"): (dict(FULL_SIZE, num_slots=6, resolution=64), SMALL_DSPRITES),
    ("object_discovery", "multi_dsprites_on_colored"): (dict(FULL_SIZE, num_slots=5, resolution=64), SMALL_DSPRITES),
    ("object_discovery", "tetrominoes"): (dict(FULL_SIZE, num_slots=4, resolution=35), SMALL_35),
    ("set_prediction", "clevr"): (SETS, SMALL_SETS),
    ("set_prediction", "clevr_like"): (SETS, SMALL_SETS),
}

# --- Runs and the command line ---------------------------------------------------------------------------------------


def save(out, config, model, optimizer, step, seconds, text, loss=0.0):
    """Writes the checkpoint. Raises ValueError where loss, weights or the optimizer's means are not finite."""
    content = {"config": vars(config), "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
               "seconds": seconds, "log": text}
    means = [value for state in content["optimizer"]["state"].values() for value in state.values()]
    if not (math.isfinite(loss) and all(value.isfinite().all() for value in [*content["model"].values(), *means])):
        raise ValueError(f"NaN or infinite loss or weights by step {step}, not saved; try a smaller --lr, or --clip 1")
    if RANK == 0:
        with data.whole_file(out / "checkpoint.pt") as part:
            torch.save(content, part)


@data.one_line_errors()
def load_scenes(config, split):
    """A split of the run's dataset."""
    scenes = data.load(config.data, split, config.data_root, getattr(config, f"{split}_count"), config.resolution,
                       config.crop, config.min_objects, config.max_objects)
    if split == "train" and len(scenes) < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {len(scenes)} training scenes there are")
    return scenes


def catch_signals():
    """-> a list, to which Ctrl-C, SIGTERM and SIGHUP will add their number: the loop saves and stops."""
    stop = []
    for caught in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(caught) != signal.SIG_IGN:  # as under nohup
            signal.signal(caught, lambda signum, frame: stop.append(signum))
    return stop


def set_up(config, checkpoint=None):
    """-> device, dtype, the model, the model as training calls it (compiled on CUDA), its optimizer."""
    cuda = config.device == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")  # gives large tensors back to the system; clearing new pages is 1/8 of a step:
        libc.mallopt(-4, 0)              # M_MMAP_MAX: take all from the heap,
        libc.mallopt(-1, -1)             # M_TRIM_THRESHOLD: and keep what is freed
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    # auto: bfloat16 where the hardware multiplies in it. Other CPUs emulate it, 50 times slower than float32.
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    fast = torch.cuda.get_device_capability()[0] >= 8 if cuda else re.search("avx512_bf16|amx_bf16", cpuinfo)
    dtype = getattr(torch, config.dtype, torch.bfloat16 if fast else torch.float32)  # torch has no "auto"
    with data.one_line_errors():
        model = load_model({**checkpoint, "config": vars(config)}) if checkpoint else build_model(vars(config))
    # The weights' layout decides that of the maps: the fastest for convolutions.
    model = model.to(device, memory_format=torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format)
    compiled = torch.compile(model, dynamic=False) if config.compile and cuda else model
    optimizer = Muon(model, config.muon) if config.muon != "none" else torch.optim.Adam(model.parameters(), fused=True)
    if checkpoint and "optimizer" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():  # in the parameters' layout, which a dtype may have changed
            state.update({key: torch.empty_like(parameter).copy_(value) for key, value in state.items() if value.dim()})
    return device, dtype, model, compiled, optimizer


def benchmark(config):
    """Prints one JSON line: images a second; milliseconds of a training step, median, least, most; peak memory."""
    device, dtype, model, compiled, optimizer = set_up(config)
    config.train_count, every = 2 * config.batch_size, 10 if device.type == "cuda" else 1
    scenes = load_scenes(config, "train").to(device)
    times = []
    for step, parts in zip(range(14 * every), batches(config, scenes, 0, device)):
        loss = train_step(compiled, optimizer, parts, config, step, dtype)
        if step % every == every - 1:  # waiting after every step would stop Python from working ahead of a GPU
            loss.item()
            times.append(time.perf_counter())
    ms = sorted(round(1e3 * (end - start) / every, 2) for start, end in zip(times[2:], times[3:]))
    if RANK == 0:
        print(json.dumps({"task": config.task, "data": config.data, "batch_size": config.batch_size,
                          "device": str(device), "dtype": str(dtype), "ms": [ms[len(ms) // 2], ms[0], ms[-1]],
                          "images_per_s": round(1e3 * config.batch_size / ms[len(ms) // 2], 2),
                          "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) or None}))


def parse(argv):
    """-> what was asked for; the run's config; with --resume or --eval the checkpoint, which brings the config."""
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run")
    mode.add_argument("--eval", type=Path, metavar="RUN", help="evaluate this run, or a file of weights")
    mode.add_argument("--benchmark", action="store_true", help="time the training step: one line of JSON")
    mode.add_argument("--out", help="the run's folder; runs/DATA if not given")
    parser.add_argument("--small", action="store_true", help="a small model and a short schedule, for a CPU")
    for key, (value, kind, text) in DEFAULTS.items():
        how = {"choices": kind, "type": type(kind[0])} if isinstance(kind, list) else {"type": kind}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        how = {**how, "nargs": "+"} if isinstance(value, tuple) else how
        parser.add_argument(f"--{key.replace('_', '-')}", default=value, help=f"{text} ({value})", **how)
    args, checkpoint = parser.parse_args(argv), None

    run, experiment = args.resume or args.eval, (args.task, args.data or "tetrominoes")
    if run:
        with data.one_line_errors():
            checkpoint = visualize.read_checkpoint(run)
        device = checkpoint["config"].get("device")
        parser.set_defaults(**{**checkpoint["config"], "device": device if device in DEVICES else DEVICES[0]})
    elif experiment in EXPERIMENTS:
        paper, small = EXPERIMENTS[experiment]
        parser.set_defaults(**{**paper, **(small if args.small or not args.data else {}), "data": experiment[1]})
    else:
        parser.error("there is no --task {} for --data {}".format(*experiment))
    args = parser.parse_args(argv)  # again: the defaults are now the experiment's, or the run's
    config = argparse.Namespace(**{key: getattr(args, key) for key in DEFAULTS})
    if config.batch_size % (WORLD_SIZE * config.accumulate):
        parser.error(f"--batch-size must be a multiple of {WORLD_SIZE} processes x --accumulate {config.accumulate}")
    if config.task == "set_prediction" and (config.num_slots > 16 or config.crop != "none"):
        parser.error("set prediction takes at most 16 --num-slots, for its matching, and whole pictures: --crop none")
    args.out = Path(args.resume or args.out or f"runs/{config.data}")
    if RANK == 0 and not (run or args.benchmark) and os.path.exists(args.out / "checkpoint.pt"):
        parser.error(f"{args.out}/ holds a run: go on with --resume {args.out}, or choose another --out")
    if args.resume and not (args.out.is_dir() and "optimizer" in checkpoint
                            and config.muon == checkpoint["config"].get("muon")):
        parser.error("--resume goes on with a run's folder, not with weights alone, and with the run's --muon")
    return args, config, checkpoint


def main(argv=None):
    args, config, checkpoint = parse(argv)
    if args.benchmark:
        return benchmark(config)
    if args.eval:
        return print_evaluation(config, checkpoint)
    train(config, args.out, checkpoint)
    if RANK == 0:
        visualize.main([str(args.out)])


if __name__ == "__main__":
    main()
