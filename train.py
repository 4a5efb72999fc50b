"""Trains and evaluates Slot Attention.

    python train.py                              the demo: minutes on two CPU cores
    python train.py --data clevr                 the paper's recipe for CLEVR6; every value of it is a flag
    python train.py --resume runs/clevr          go on
    python train.py --eval runs/clevr            evaluate
    python train.py --data clevr --benchmark     time its training step
    torchrun --nproc_per_node=N train.py ...     on N GPUs, or N processes on the CPU: the same training

A run is one folder: checkpoint.pt, log.jsonl (one JSON object a line) and its figure.
"""

import argparse
import contextlib
import ctypes
import functools
import inspect
import json
import math
import operator
import os
import re
import signal
import statistics
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
from data import on_terminal, say
from slot_attention import (SetPrediction, SlotAttentionAutoEncoder, SlotAttentionClassifier, adjusted_rand_index,
                            average_precision_clevr, hungarian_huber_loss)

RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(key, default)) for key, default in  # as torchrun numbers them
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

# ---------------------------------------------------------------------------------------------------------------------
# The experiments. Each value is a flag: batch_size is --batch-size.
# ---------------------------------------------------------------------------------------------------------------------

RECIPE = {  # the paper's for CLEVR6 (appendix E), and what each value means
    "num_slots": (7, "slots, K"),
    "num_iterations": (3, "iterations of attention, T"),
    "slot_dim": (64, "size of a slot, D"),
    "mlp_hidden_size": (128, "hidden size of the MLP behind the GRU"),
    "implicit": (False, "one-step gradient: iterate without gradient, then once with it"),
    "learned_queries": (False, "a mean of its own for the initial state of each slot"),
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
    "slot_loss": (0.0, "weight of the slots' own errors in the loss, see compute_loss; not in the paper"),
    "slot_loss_from": (0, "the step that it starts from: first the slots must find the objects"),
    "eval_every": (5_000, "steps between evaluations"),
}
PAPER_64_AND_35 = dict(encoder_channels=32, decoder_channels=32, decoder_strides=(1, 1, 1), max_objects=10,
                       train_count=60_000)  # at the resolutions of Multi-dSprites and Tetrominoes
SET_PREDICTION = dict(num_slots=10, encoder_strides=(1, 2, 2, 1), max_objects=10, eval_count=15_000, batch_size=512,
                      steps=150_000, warmup=1_000, decay_steps=50_000)
EXPERIMENTS = {  # task -> dataset -> what differs from RECIPE
    "object_discovery": {
        "clevr": {},
        "clevr_like": {},
        "multi_dsprites": dict(PAPER_64_AND_35, num_slots=6, resolution=64),
        "multi_dsprites_on_colored": dict(PAPER_64_AND_35, num_slots=5, resolution=64),
        "tetrominoes": dict(PAPER_64_AND_35, num_slots=4, resolution=35),
    },
    "set_prediction": {"clevr": SET_PREDICTION, "clevr_like": SET_PREDICTION},
}
QUICK = dict(implicit=True, encoder_channels=32, batch_size=32, lr=2e-3, warmup=200, beta2=0.95, clip=1.0,
             eval_every=500)
QUICK_DISCOVERY = dict(QUICK, decoder_channels=32, decoder_strides=(1, 1), slot_loss=0.5)
QUICK_64 = dict(QUICK_DISCOVERY, learned_queries=True, resolution=64, encoder_strides=(1, 2, 1), pixel_shuffle=4,
                slot_loss_from=2_000, steps=6_000, decay_steps=1_500, train_count=10_000)
QUICK_DSPRITES = dict(QUICK_64, train_count=40_000, batch_size=16, steps=12_000, decay_steps=3_000,
                      slot_loss_from=2_500, eval_every=1_000)
QUICK_SETS = dict(QUICK, learned_queries=True, encoder_strides=(2, 2, 2, 1), train_count=10_000, eval_count=1_000,
                  steps=8_000, decay_steps=2_000)
SMALL = {  # and with --small, for minutes on a CPU
    "object_discovery": {
        "tetrominoes": dict(QUICK_DISCOVERY, encoder_strides=(1, 2, 1), pixel_shuffle=3, slot_loss_from=600,
                            steps=4_000, decay_steps=1_000, train_count=40_000, eval_count=512),
        "multi_dsprites": QUICK_DSPRITES,
        "multi_dsprites_on_colored": QUICK_DSPRITES,
        "clevr": QUICK_64,
        "clevr_like": QUICK_64,
    },
    "set_prediction": {"clevr": QUICK_SETS, "clevr_like": QUICK_SETS},
}
MODELS = {"object_discovery": SlotAttentionAutoEncoder, "set_prediction": SlotAttentionClassifier}
MODEL_KEYS = [key for key in RECIPE if key in inspect.signature(SlotAttentionAutoEncoder).parameters]
EVAL_KEYS = ("num_slots", "num_iterations", "min_objects", "max_objects", "eval_count", "batch_size")  # may be typed
# The largest values that make sense: a typing error or a damaged file has larger ones.
LARGEST = {**dict.fromkeys(MODEL_KEYS, 1_024), "resolution": 2_048, "decoder_kernel": 15, "pixel_shuffle": 32,
           "min_objects": 10, "max_objects": 10, "train_count": 1_000_000, "eval_count": 1_000_000,
           "batch_size": 100_000, "decay_rate": 1.0, "beta2": 0.999999, "slot_loss": 1.0}
DTYPES = ("auto", "float32", "bfloat16")
RUNTIME = {  # how a run is computed, not what; a resumed run keeps it
    "data_root": ("data", "where the real files are"),
    "download": (False, "fetch CLEVR_v1.0 if there is no CLEVR"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cuda, cpu or mps"),
    "dtype": ("auto", "auto, float32 or bfloat16; auto: bfloat16 where the hardware has it"),
    "compile": (torch.cuda.is_available(), "torch.compile, on CUDA (on a CPU it takes minutes and gains nothing)"),
    "accumulate": (1, "take each batch in so many parts: less memory, the same gradient"),
    "log_every": (10, "steps between lines of the log"),
}
DEFAULTS = {key: value for key, (value, _) in (*RECIPE.items(), *RUNTIME.items())}


# ---------------------------------------------------------------------------------------------------------------------
# A run on disk: checkpoint.pt and log.jsonl
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary path, which replaces `path` at the end: a kill, a full disk or an error leaves that alone."""
    part, ours = path.with_name(f"part-{path.name}"), False  # the suffix stays: it says a figure's format
    try:
        with open(part, "ab") as file:
            if data.try_lock(file) is False:
                raise ValueError(f"another process is writing {path}: wait for it")
            ours = True
            yield part
        os.replace(part, path)
    except BaseException as error:
        if ours:
            part.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch's zip writer turns a full disk into a RuntimeError
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}); what was there before is as it was") from None


def save_checkpoint(path, **content):
    with whole_file(path) as part, open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path):
    """A run's folder or a checkpoint file -> its content. No code in the file is run. A file of weights, such as
    assets/demo.pt, is a checkpoint without the optimizer, which is then None. Raises OSError or ValueError."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; a run writes one before its first step")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size or archive.testzip():
                raise ValueError("a checksum or a size is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = {"optimizer": checkpoint.get("optimizer"),
                      **{key: checkpoint[key] for key in ("config", "model", "step", "seconds")}}
        checkpoint["config"] = {**{key: DEFAULTS[key] for key in RECIPE}, **checkpoint["config"]}  # of older runs, too
        check_config(checkpoint["config"])
        if not valid(checkpoint["step"], 0) or not valid(checkpoint["seconds"], 0.0):
            raise ValueError("its step or its time is no such thing")
        return checkpoint
    except Exception as error:  # torch has many ways to say it: pickle, zip, runtime, key, type and value errors
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason})") from None


def load_model(checkpoint, where):
    """The model of a loaded checkpoint, with its weights."""
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[:2][-1].strip()  # of PyTorch's many lines the second has the first difference
        raise ValueError(f"{where} does not fit its own config ({reason[:200]})") from None
    if not all_finite(model.state_dict()):
        raise ValueError(f"{where} holds weights that are not finite numbers")
    return model


def load_optimizer(optimizer, checkpoint, where):
    """Takes over Adam's running means; its settings are the config's."""
    try:
        state = checkpoint["optimizer"]["state"]
        for i, parameter in enumerate(optimizer.param_groups[0]["params"] if checkpoint["step"] else ()):
            first, second = state[i]["exp_avg"], state[i]["exp_avg_sq"]
            if not (first.shape == second.shape == parameter.shape and (second >= 0).all() and all_finite(state[i])
                    and state[i]["step"].shape == () and state[i]["step"] > 0):
                raise ValueError(f"the state of parameter {i}")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = repr(error).splitlines()[0]
        raise ValueError(f"{where} holds an optimizer's state that does not fit its model ({reason})") from None


def all_finite(state):
    """Whether all tensors of a state dict are, of nested ones too."""
    return all(all_finite(value) if isinstance(value, dict) else bool(value.isfinite().all())
               for value in state.values())


def read_log(content):
    """The rows of a log.jsonl's content, each with the place where it ends. What is no row is left out: a killed run's
    last line may be cut."""
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
            good = valid(row["step"], 0) and valid(row["loss"], 0.0) and valid(row["seconds"], 0.0)
        except (ValueError, KeyError, TypeError):
            good = False
        if good and line.endswith(b"\n"):
            yield end, row


@contextlib.contextmanager
def open_log(out, step):
    """Opens the log in a run's folder, cut behind its last row up to `step` (a killed run may have logged more than it
    saved, and half a line) -> a function that adds a row. Until it is closed no other process can train into the
    folder. If no checkpoint was written in the end, the folder is removed again."""
    if RANK > 0:
        yield lambda row: None
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / "log.jsonl"
    with open(path, "ab+", buffering=0) as file:
        if data.try_lock(file) is False:  # None: there are no locks here
            raise ValueError(f"another process is training into {out}/: wait for it, or choose another --out")
        file.seek(0)
        rows = list(read_log(file.read()))
        if rows and step < 0:
            raise ValueError(f"{out}/ holds the log of a run whose checkpoint.pt is gone: choose another --out")
        file.truncate(max((end for end, row in rows if row["step"] <= step), default=0))

        def add(row):
            line = json.dumps(row).encode() + b"\n"
            try:
                if file.write(line) < len(line):
                    raise OSError("the disk is full")
            except OSError as error:
                raise OSError(f"cannot write {path} ({error}); go on from the last checkpoint with --resume {out}"
                              ) from None

        try:
            yield add
        finally:
            if not (out / "checkpoint.pt").exists():
                with contextlib.suppress(OSError):  # Windows removes no open file
                    path.unlink()
                    out.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, processes
# ---------------------------------------------------------------------------------------------------------------------


def choose_device(name):
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    try:
        if torch.zeros(1, device=name).device.type in ("cuda", "cpu", "mps"):
            return torch.device(name)
        error = "it is none of cuda, cpu, mps"
    except (RuntimeError, AssertionError, NotImplementedError) as failure:
        error = str(failure).splitlines()[0]
    raise ValueError(f"--device {name} cannot be used here ({error})")


def choose_dtype(name, device):
    """bfloat16 where the hardware multiplies in it: elsewhere it would be emulated, and slow."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_features() & {"avx512_bf16", "amx_bf16"} else torch.float32


def cpu_features():
    """The names of what the CPU can do: from torch where it tells (all systems), else from Linux."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def keep_freed_memory():
    """Has the C library keep what is freed. Else Linux clears new pages for every large tensor: an eighth of a step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD: take all from the heap, never trim it
    except (OSError, AttributeError):
        pass  # another C library


def join_processes(config):
    """-> this process's device and dtype; under torchrun it meets the others, and each has a GPU of its own."""
    device = choose_device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if WORLD_SIZE > 1:  # the timeout: one may build a cache while the others wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return device, choose_dtype(config["dtype"], device)


def over_processes(value, op=dist.ReduceOp.SUM):
    """The sum (or another reduction) of a tensor over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(value, op)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def build_model(config):
    """The model that a run's config describes: {key of RECIPE: value}, and its task."""
    model = MODELS[config["task"]]
    return model(**{key: config[key] for key in MODEL_KEYS if key in inspect.signature(model).parameters})


def load_scenes(config, split):
    """A split of the run's dataset. The first process of each machine goes first: it builds the cache if need be."""
    count = config["train_count" if split == "train" else "eval_count"]
    keys = "resolution", "crop", "min_objects", "max_objects", "download"
    together = dist.is_initialized()  # not so when the figure is drawn, by the first process alone
    if together and LOCAL_RANK > 0:
        dist.barrier()
    scenes = data.load(config["data"], split, config["data_root"], count, **{key: config[key] for key in keys})
    if together and LOCAL_RANK == 0:
        dist.barrier()
    size = config["batch_size"]
    if split == "train" and len(scenes) < size:
        raise ValueError(f"--batch-size {size} is more than the {len(scenes)} training scenes there are")
    return scenes


def learning_rate(step, lr, warmup, decay_rate, decay_steps):
    """The official schedule: the warm-up is linear and the decay goes on during it; the first step has rate 0."""
    return lr * min(1, step / max(warmup, 1)) * decay_rate ** (step / decay_steps)


def own_parts(x, config):
    """A global batch [B, ...] -> this process's share of it, as --accumulate many tensors."""
    number = config["accumulate"]
    return x.chunk(WORLD_SIZE * number)[RANK * number:(RANK + 1) * number]


def training_setup(model, config, device):
    """-> model, on its device; forward, the same as training calls it: compiled and distributed; its optimizer."""
    model = model.to(device, memory_format=torch.channels_last)
    forward = torch.compile(model) if config["compile"] and device.type == "cuda" else model
    if WORLD_SIZE > 1:  # averages the gradients over the processes during backward
        forward = DistributedDataParallel(forward)
    return model, forward, torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, config["beta2"]), fused=True)


def noise(config, step, device):
    """The slots' initial noise [B, K, D] of a training step, the same after a resume, in this process's parts."""
    generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + step)
    x = torch.randn(config["batch_size"], config["num_slots"], config["slot_dim"], generator=generator)
    return own_parts(data.put(x, device), config)


def batches(config, scenes, step, device):
    """The training batches from a step on, in this process's parts: every epoch in a new order, which depends on seed
    and epoch alone."""
    size, per_epoch = config["batch_size"], len(scenes) // config["batch_size"]
    epoch, start = divmod(step, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(scenes), generator=generator)
        for i in range(start, per_epoch):
            yield [scenes.batch(index, device) for index in own_parts(order[i * size:(i + 1) * size], config)]
        epoch, start = epoch + 1, 0


def compute_loss(output, batch, slot_loss=0.0):
    """Mean squared error over batch, pixels and channels (section 2.2), or the set prediction's loss (section 2.3).

    With slot_loss w, (1 - w) * error of the sum + w * sum of the slots' own errors, each weighted by its mask. The
    second is never smaller: it adds what the slots disagree by where their masks overlap, so every pixel wants one
    owner."""
    if isinstance(output, SetPrediction):
        return hungarian_huber_loss(output.predictions, batch["target"])
    error = F.mse_loss(output.recon_combined, batch["image"])
    if slot_loss == 0:
        return error
    own = (output.masks * (output.recons - batch["image"][:, None]) ** 2).sum(dim=1).mean()
    return (1 - slot_loss) * error + slot_loss * own


@torch.no_grad()
def evaluate(model, config, scenes, device, dtype, num_iterations=None):
    """-> {"eval_loss", and "ari": mean FG-ARI where there are masks, or "ap": {threshold: AP}} over a whole split, each
    process a stretch of it."""
    values = {key: [] for key in ("eval_loss", "slot_shares", "ari", "predictions", "targets")}  # one per scene
    generator = torch.Generator().manual_seed(0)  # the same noise at every evaluation
    slots_noise = torch.randn(len(scenes), config["num_slots"], config["slot_dim"], generator=generator)
    own = torch.arange(len(scenes)).tensor_split(WORLD_SIZE)[RANK]
    for index in own.split(config["batch_size"] // (WORLD_SIZE * config["accumulate"])):
        if len(index) == 0:
            break  # fewer scenes than processes
        batch = scenes.batch(index, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = model(batch["image"], slots=model.slot_attention.init_slots(slots_noise[index].to(device)),
                           num_iterations=num_iterations)
        values["eval_loss"].append(compute_loss(output, batch).expand(len(index)))
        if isinstance(output, SetPrediction):
            values["predictions"].append(output.predictions)
            values["targets"].append(batch["target"])
            continue
        shares = output.masks.mean(dim=(2, 3, 4))                             # [B, K]; slots have no order: sort them
        values["slot_shares"].append(shares.sort(dim=1, descending=True).values)
        if "label" in batch:
            true_mask = F.one_hot(batch["label"].flatten(1).long(), 11)[..., 1:]  # [B, P, 10]: without the background
            values["ari"].append(adjusted_rand_index(true_mask, output.masks.flatten(2).transpose(1, 2)))
    everywhere = [{key: torch.cat(value).cpu() for key, value in values.items() if value}]
    if WORLD_SIZE > 1:
        everywhere *= WORLD_SIZE
        dist.all_gather_object(everywhere, everywhere[0])
    whole = {key: torch.cat([part[key] for part in everywhere if key in part]) for key in everywhere[0]}
    result = {"eval_loss": whole["eval_loss"].double().mean().item()}
    if "slot_shares" in whole:
        result["slot_shares"] = [round(share, 4) for share in whole["slot_shares"].double().mean(dim=0).tolist()]
    if "ari" in whole:
        result["ari"] = whole["ari"].double().mean().item()
    if "predictions" in whole:
        result["ap"] = {str(threshold): average_precision_clevr(whole["predictions"], whole["targets"], threshold)
                        for threshold in (math.inf, 1, 0.5, 0.25, 0.125)}
    return result


def describe(result):
    """An evaluation as people read it. The slots' shares of the pictures, from the largest in each to the smallest,
    show a failed run: all alike, or one has all."""
    names = {"eval_loss": "held-out loss", "ari": "FG-ARI", "slot_shares": "slots %", "ap": "AP % at inf/1/.5/.25/.125"}

    def show(value):
        many = value.values() if isinstance(value, dict) else value
        return f"{value:.4f}" if isinstance(value, float) else "/".join(f"{100 * part:.1f}" for part in many)

    return "  ".join(f"{names[key]} {show(value)}" for key, value in result.items())


def train_step(model, forward, optimizer, parts, config, step, dtype):
    """One step on this process's parts of a batch -> their mean loss, a tensor: reading its value waits for the device.

    forward: the model as it is called, compiled or distributed."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, *(config[k] for k in ("lr", "warmup", "decay_rate", "decay_steps")))
    slot_loss = config["slot_loss"] if step >= config["slot_loss_from"] else 0.0
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for i, (batch, slots_noise) in enumerate(zip(parts, noise(config, step, parts[0]["image"].device))):
        if WORLD_SIZE > 1:
            forward.require_backward_grad_sync = i == len(parts) - 1
        with torch.autocast(slots_noise.device.type, dtype, enabled=dtype != torch.float32):
            output = forward(batch["image"], slots=model.slot_attention.init_slots(slots_noise))
        loss = compute_loss(output, batch, slot_loss) / len(parts)
        loss.backward()
        total += loss.detach()
    if config["clip"]:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
    optimizer.step()
    return total


def clock_time(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def train(config, out, log, checkpoint=None):
    """Trains by a config ({key: value} of RECIPE and of the flags) into the folder `out` and its open log, from a
    checkpoint if given."""
    device, dtype = join_processes(config)
    torch.manual_seed(config["seed"])
    model = load_model(checkpoint, out) if checkpoint else build_model(config)
    model, forward, optimizer = training_setup(model, config, device)
    if checkpoint:
        load_optimizer(optimizer, checkpoint, out)
    step, seconds = (checkpoint["step"], checkpoint["seconds"]) if checkpoint else (0, 0.0)

    def diverged(what):
        return (f"{what} became NaN or infinite by step {step}; the checkpoint in {out}/ is from before. Try a smaller "
                f"--lr, --clip 1, or --dtype float32, from the start or with --resume {out}")

    def save():
        if not (all_finite(model.state_dict()) and all_finite(optimizer.state_dict()["state"])):
            raise ValueError(diverged("the weights or the optimizer's means"))
        if RANK == 0:
            save_checkpoint(out / "checkpoint.pt", config=config, model=model.state_dict(),
                            optimizer=optimizer.state_dict(), step=step, seconds=seconds)

    if not checkpoint:
        save()  # from here on a killed run can go on, even if it is killed while its cache is built
    try:
        scenes, held_out = load_scenes(config, "train"), load_scenes(config, "eval")
    except (OSError, ValueError):
        if not checkpoint and RANK == 0:  # nothing began
            (out / "checkpoint.pt").unlink()
        raise
    if config.setdefault("source", scenes.source) != scenes.source:
        raise ValueError(f"{out} was trained on {config['source']}, but here is {scenes.source}: see --data-root")
    scenes, held_out = scenes.to(device), held_out.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{config['data']}: {len(scenes):,} scenes, {len(held_out):,} held out; {parameters:,} parameters; "
        f"{device}{f' x {WORLD_SIZE}' * (WORLD_SIZE > 1)}, {str(dtype).removeprefix('torch.')}; writing to {out}/")
    if config["task"] == "object_discovery" and "label" not in held_out.arrays:
        say("this dataset has no masks, so there is no FG-ARI")

    stop = []  # the signal that asked for it
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signals.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in signals}

    result, total, since, clock = {}, torch.zeros((), device=device), step, time.perf_counter()
    for parts in batches(config, scenes, step, device):
        if step >= config["steps"]:
            break
        total += train_step(model, forward, optimizer, parts, config, step, dtype)
        step += 1

        at_eval = step % config["eval_every"] == 0 or step == config["steps"]
        stopped = over_processes(torch.tensor(max(stop, default=0)), dist.ReduceOp.MAX).item()  # all at the same step
        if not (at_eval or stopped or step % config["log_every"] == 0):
            continue  # the loss is read, and the device waited for, only where it is shown
        row = {"step": step, "loss": over_processes(total).item() / WORLD_SIZE / (step - since)}
        elapsed, images = time.perf_counter() - clock, (step - since) * config["batch_size"]
        seconds += elapsed
        row["seconds"] = round(seconds, 1)
        if at_eval:
            result = evaluate(model, config, held_out, device, dtype)
            row.update(result)
        for key in ("loss", "eval_loss"):
            if not math.isfinite(row.get(key, 0)):
                raise ValueError(diverged(key))
        log(row)  # before the checkpoint: what is logged too much is cut by a resumed run
        left = seconds / step * (config["steps"] - step)
        line = (f"step {step:,}/{config['steps']:,}  loss {row['loss']:.5f}  {images / elapsed:,.0f} images/s  "
                f"{clock_time(left)} left  {describe(result)}")
        if at_eval or on_terminal():
            say(f"\r{line:100}" if on_terminal() else line, end="\n" if at_eval else "")
        if at_eval or stopped:
            save()
        if stopped:
            say(f"\nstopped and saved; to go on: python train.py --resume {out}")
            sys.exit(128 + stopped)
        total.zero_()
        since, clock = step, time.perf_counter()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    say(f"trained in {clock_time(seconds)}")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark
# ---------------------------------------------------------------------------------------------------------------------


def benchmark(config):
    """Prints one JSON line: how long a training step takes with its data and without (on a batch that is already
    there), the same for the plain model (float32, NCHW, eager, PyTorch's usual layers), and matrix products for
    comparison. All are timed in turn, so that what else the machine does slows all alike. The model's floating point
    operations are those of the plain layers, but without the work that Decoder.first_layer saves."""
    config = {**config, "slot_loss_from": 0}  # the loss of most of the training
    device, dtype = join_processes(config)
    wait = getattr(torch, device.type).synchronize
    model, forward, optimizer = training_setup(build_model(config), config, device)
    plain = build_model(config).to(device)
    for module in plain.modules():
        if isinstance(module, torch.nn.ConvTranspose2d):
            module.forward = functools.partial(
                F.conv_transpose2d, weight=module.weight, bias=module.bias, stride=module.stride,
                padding=module.kernel_size[0] // 2, output_padding=module.stride[0] - 1)
    plain_optimizer = torch.optim.Adam(plain.parameters())
    count = min(config["train_count"], 2 * config["batch_size"])
    scenes = load_scenes({**config, "train_count": count}, "train").to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what drawing the scenes took is not the step's
    stream = batches(config, scenes, 0, device)
    parts = next(stream)
    plain_parts = [{**batch, "image": batch["image"].contiguous()} for batch in parts]
    timed = {
        "step": lambda: train_step(model, forward, optimizer, next(stream), config, 0, dtype),
        "step_without_data": lambda: train_step(model, forward, optimizer, parts, config, 0, dtype),
        "plain_step": lambda: train_step(plain, plain, plain_optimizer, plain_parts, config, 0, torch.float32)}

    for _ in range(3):
        timed["step"]()
    wait()
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = math.nan
        with contextlib.suppress(ImportError):
            import resource  # not on Windows
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    size = 2048 if device.type == "cpu" else 8192
    for name in ("bfloat16", "float32"):
        x = torch.randn(size, size, device=device, dtype=getattr(torch, name))
        timed[f"matmul_{name}"] = lambda x=x: x @ x
    with FlopCounterMode(display=False) as counter:
        timed["plain_step"]()
    if hasattr(plain, "decoder"):
        plain.decoder.first_layer = lambda slots: plain.decoder.cnn[0](plain.decoder.broadcast(slots).contiguous())
    repeat = 1 if device.type == "cpu" else 10  # a GPU works on while Python is ahead
    times = {key: [] for key in timed}
    for i in range(11):
        for key, call in timed.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            wait()
            times[key] += [(time.perf_counter() - start) / repeat] if i > 0 else []  # the first is warm-up

    median = {key: statistics.median(values) for key, values in times.items()}
    rate = {key: 2 * size ** 3 / median[f"matmul_{key}"] for key in ("bfloat16", "float32")}
    rate["model"] = counter.get_total_flops() / median["step"]
    if RANK == 0:
        print(json.dumps({
            "data": config["data"], "task": config["task"], "batch_size": config["batch_size"],
            "processes": WORLD_SIZE, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."), "compile": config["compile"], "torch": torch.__version__,
            "images_per_s": round(config["batch_size"] / median["step"], 2),
            "ms": {key: [round(1e3 * ms, 2) for ms in (median[key], min(x), max(x))] for key, x in times.items()},
            "plain_over_step": round(statistics.median(map(operator.truediv, times["plain_step"], times["step"])), 3),
            "peak_memory_gb": round(memory / 1e9, 2),
            "tflops": {key: round(value / 1e12, 4) for key, value in rate.items()},
            "share_of_matmul": {key: round(rate["model"] / rate[key], 3) for key in ("bfloat16", "float32")}}))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line that says what is wrong, in place of argparse's usage. Of many processes the first says it, and
        torchrun then ends the others."""
        if LOCAL_RANK > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 * LOCAL_RANK)
        with contextlib.suppress(OSError):  # nobody may be listening
            print(f"{self.prog}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)

    @contextlib.contextmanager
    def one_line_errors(self):
        """Says in one line what a person can do something about."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                self.error(f"torch.compile does not work here ({str(error).splitlines()[0]}): add --no-compile")
            if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            self.error("out of memory: in training --accumulate 2 (or more) takes each batch in parts, with the same "
                       "gradient, also of a run that has begun; a figure takes less with fewer scenes or slots")
        except KeyboardInterrupt:
            sys.exit(130)


def valid(value, example, largest=None):
    """Whether a value, typed or from a file, has its default's type and is in the range that makes sense."""
    if isinstance(example, tuple):
        return type(value) is tuple and 1 <= len(value) <= 16 and all(valid(part, 1, 16) for part in value)
    if type(value) is not type(example) or isinstance(example, (bool, str)):
        return type(value) is type(example)
    zero = example in (0, RECIPE["warmup"][0])  # makes sense where it is the default, and for the warm-up
    least = 0 if zero else 1 if isinstance(example, int) else sys.float_info.min
    return least <= value <= (largest or (10 ** 9 if isinstance(example, int) else sys.float_info.max))


def parse_value(example, largest=None):
    """The parser of a flag, from its default and its largest value."""
    kind = f"a {'whole ' * isinstance(example, int)}number that makes sense here"
    kind += f" ({largest:,} at most)" if largest else ""
    kind = "whole numbers from 1 to 16, such as 1,2,2,1" if isinstance(example, tuple) else kind

    def parse(text):
        try:
            value = tuple(int(part) for part in text.split(",")) if isinstance(example, tuple) else type(example)(text)
        except ValueError:
            value = None
        if not valid(value, example, largest):
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}")
        return value
    return parse


def check_config(config):
    """Raises ValueError for values, and pairs of them, that make no run."""
    for key, example in DEFAULTS.items():
        if not valid(config.get(key, example), example, LARGEST.get(key)):
            raise ValueError(f"{key} cannot be {str(config[key])[:50]!r}")
    task, name, low, high = (config[key] for key in ("task", "data", "min_objects", "max_objects"))
    if not (name in EXPERIMENTS.get(task, ()) and config["crop"] in ("paper", "official", "none")
            and valid(config["seed"], 0) and config.get("dtype", "auto") in DTYPES
            and isinstance(config.get("source", ""), str)):
        raise ValueError(f"there is no --task {task} for --data {name}, or no such crop, seed, dtype or source")
    if low > high or (name == "clevr_like" and high < 3):
        why = " (CLEVR's have 3 or more)" * (low <= high)
        raise ValueError(f"--min-objects {low} --max-objects {high} leaves no scene{why}")
    if task == "set_prediction" and config["num_slots"] > 16:
        raise ValueError(f"--num-slots {config['num_slots']}: the matching of set prediction takes 16 at most")


def flag(key):
    return "--" + key.replace("_", "-")


def make_parser():
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", choices=EXPERIMENTS, help="what to learn (object_discovery)")
    add("--data", choices=data.DATA, help="the experiment; without it the demo: --data tetrominoes --small")
    add("--small", action="store_true", help="a small model and a short schedule, for a CPU")
    add("--official-crop", action="store_true", help="crop CLEVR_v1.0 off centre, as the official code did")
    add("--out", help="the run's folder; runs/NAME or the next free name if not given")
    add("--resume", metavar="RUN", help="go on with this run")
    add("--eval", metavar="RUN", help="evaluate this run, for 1 to 8 iterations unless --num-iterations is given")
    add("--benchmark", action="store_true",
        help="time the training step: one line of JSON, in ms median, least and most")
    add("--seed", type=parse_value(0), help="of weights, order and noise (0)")
    add("--seeds", type=parse_value(0), nargs="+", metavar="SEED", help="one run after the other, into OUT-seed0 and "
        "so on, and their mean; the same command goes on after a stop")
    recipe = parser.add_argument_group("the recipe (in brackets: the paper's for CLEVR6)")
    for group, table in ((parser, RUNTIME), (recipe, RECIPE)):
        for key, (value, text) in table.items():
            kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {
                "type": parse_value(value, LARGEST.get(key)), "choices": DTYPES if key == "dtype" else None}
            group.add_argument(flag(key), default=argparse.SUPPRESS, help=f"{text} ({value})", **kind)
    return parser


def check_flags(args):
    """Raises ValueError for flags that are at odds."""
    if "" in (args.resume, args.eval, args.out):  # of an empty variable in a script
        raise ValueError("--resume, --eval and --out take a folder, not an empty text")
    mode = next((mode for mode in ("benchmark", "resume", "eval", "seeds") if vars(args)[mode]), None)
    odd = {"benchmark": ("resume", "eval", "seeds", "out"),
           "resume": ("eval", "seeds", "out", "seed", "small", "task", "official_crop"),
           "eval": ("seeds", "out", "seed", "small", "task", "official_crop", "log_every", "compile",
                    *(key for key in RECIPE if key not in EVAL_KEYS)),
           "seeds": ("seed",), None: ()}[mode]
    for key in odd:
        value = vars(args).get(key)
        if value is not None and value is not False:
            raise ValueError(f"{flag(key)} and --{mode} do not go together")
    if args.seeds and (len(set(args.seeds)) < len(args.seeds) or WORLD_SIZE > 1):
        raise ValueError("--seeds takes different seeds, and no torchrun: start that for each --seed")


def make_config(args, checkpoint=None):
    """The run's config: the paper's recipe, the experiment's differences from it, and over both what was typed; with a
    checkpoint, what that says in place of the recipe."""
    typed = {key: value for key, value in vars(args).items() if key in RECIPE or key in RUNTIME}
    config = dict(DEFAULTS)
    if checkpoint:
        typed.update({"data": args.data} if args.data else {})
        config.update({key: value for key, value in checkpoint["config"].items()
                       if not args.eval or key not in RUNTIME or key == "data_root"})  # another machine may evaluate
        fixed = [key for key in typed if key in (*MODEL_KEYS, "data") and typed[key] != config[key] and not args.eval]
        if fixed:
            raise ValueError(f"{flag(fixed[0])} cannot change when a run goes on (it has {config[fixed[0]]})")
        if typed.get("steps", checkpoint["step"]) < checkpoint["step"]:
            raise ValueError(f"--steps {typed['steps']}: the run is at step {checkpoint['step']:,} already")
    else:
        name, task, small = args.data or "tetrominoes", args.task or "object_discovery", args.small or not args.data
        if name not in EXPERIMENTS[task]:
            known = ", ".join(EXPERIMENTS[task])
            raise ValueError(f"there is no --task {task} for --data {name}; there is for {known}")
        config.update(EXPERIMENTS[task][name], **(SMALL[task][name] if small else {}))
        idle = [key for key in typed if key.startswith(("decoder", "pixel_shuffle", "slot_loss"))]
        if idle and task == "set_prediction":
            raise ValueError(f"{flag(idle[0])} does nothing in set prediction, which has no decoder")
        if args.official_crop and (name, task) != ("clevr", "object_discovery"):
            raise ValueError("--official-crop is for object discovery on CLEVR: --data clevr")
        crop = "none" if task == "set_prediction" else "official" if args.official_crop else "paper"
        config.update(data=name, task=task, seed=args.seed or 0, crop=crop)
    config.update(typed)
    check_config(config)
    size, pieces = config["batch_size"], WORLD_SIZE * config["accumulate"]
    if size % pieces:
        raise ValueError(f"--batch-size {size} cannot be shared out among {WORLD_SIZE} processes x "
                         f"{config['accumulate']} parts (--accumulate): it must be a multiple of {pieces}")
    return config


def train_and_draw(config, out, checkpoint=None):
    try:
        with open_log(out, checkpoint["step"] if checkpoint else -1) as log:
            train(config, out, log, checkpoint)
        if RANK == 0:
            import visualize  # not above: it imports this file
            visualize.main([str(out)])
            say(f"look at {out}/figure.png; evaluate with: python train.py --eval {out}")
    except KeyboardInterrupt:  # before the first step or after the last: the loop between has its own way
        say("stopped" + f"; to go on: python train.py --resume {out}" * (out / "checkpoint.pt").exists())
        sys.exit(130)


def train_seeds(args, name):
    """One run per seed, into NAME-seed0 and so on. Runs that are there already go on, or are taken as they are."""
    runs = {}

    def checkpoint_of(out):
        return load_checkpoint(out) if (out / "checkpoint.pt").exists() else None

    for args.seed in args.seeds:  # all are looked at before the first is trained; make_config reads the seed
        out, config = name.with_name(f"{name.name}-seed{args.seed}"), make_config(args)
        checkpoint = checkpoint_of(out)
        if checkpoint:
            for key in config:
                if key not in RUNTIME and checkpoint["config"][key] != config[key]:
                    raise ValueError(f"{out}/ holds a run with {key} = {checkpoint['config'][key]}, not {config[key]}: "
                                     "choose another --out")
        runs[out] = config
    for out, config in runs.items():
        checkpoint = checkpoint_of(out)
        if not (checkpoint and checkpoint["step"] >= config["steps"] and (out / "figure.png").exists()):
            train_and_draw(config, out, checkpoint)
    results = []
    for seed, out in zip(args.seeds, runs):
        rows = [row for _, row in read_log((out / "log.jsonl").read_bytes())]
        if not rows or "eval_loss" not in rows[-1]:
            raise ValueError(f"{out}/log.jsonl does not end with an evaluation: see --eval {out}")
        row = rows[-1]
        metrics = {"FG-ARI": row.get("ari"), "held-out loss": row["eval_loss"],
                   **{f"AP % at {key}": 100 * ap for key, ap in row.get("ap", {}).items()}}
        results.append({key: value for key, value in metrics.items() if value is not None})
        print(f"seed {seed}  " + "  ".join(f"{key} {value:.4f}" for key, value in results[-1].items()))
    for key in results[0]:
        values = torch.tensor([result[key] for result in results], dtype=torch.float64)
        std = values.std(correction=min(1, len(values) - 1))
        print(f"{key}: {values.mean():.4f} ± {std:.4f} over {len(values)} seeds")


def print_evaluation(args):
    """The generalisation of section 4.1: the metrics after each number of iterations, on any number of objects and
    slots."""
    checkpoint = load_checkpoint(args.eval)
    config = make_config(args, checkpoint)
    device, dtype = join_processes(config)
    scenes = load_scenes(config, "eval").to(device)
    model = load_model(checkpoint, args.eval).to(device, memory_format=torch.channels_last)
    model.slot_attention.implicit = False  # without gradients its last iteration is one like the others
    typed = vars(args)
    show = print if RANK == 0 else lambda *args, **kwargs: None
    show(f"{args.eval}, step {checkpoint['step']:,}: {len(scenes):,} held-out scenes of {scenes.source} with "
         f"{config['min_objects']} to {config['max_objects']} objects, {config['num_slots']} slots")
    for num_iterations in [typed["num_iterations"]] if "num_iterations" in typed else range(1, 9):
        result = evaluate(model, config, scenes, device, dtype, num_iterations=num_iterations)
        show(f"{num_iterations} iterations  {describe(result)}", flush=True)


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        check_flags(args)
        if args.eval:
            return print_evaluation(args)
        if args.benchmark:
            return benchmark(make_config(args))
        name = Path(args.out or Path("runs") / (args.data or "demo"))
        if args.seeds:
            return train_seeds(args, name)
        if not args.resume:
            out, number = name, 1
            while not args.out and any((out / file).exists() for file in ("checkpoint.pt", "log.jsonl")):
                number += 1
                out = name.with_name(f"{name.name}-{number}")
            if RANK == 0 and (out / "checkpoint.pt").exists():
                raise ValueError(f"{out}/ holds a run: go on with --resume {out}, or choose another --out")
            return train_and_draw(make_config(args), out)
        checkpoint, out = load_checkpoint(args.resume), Path(args.resume)
        if checkpoint["optimizer"] is None or (out.is_file() and out.name != "checkpoint.pt"):
            raise ValueError(f"{out} is a copy or weights only, to draw and to evaluate: a run goes on from its "
                             "checkpoint.pt")
        train_and_draw(make_config(args, checkpoint), out.parent if out.is_file() else out, checkpoint)


if __name__ == "__main__":
    main()
