"""The datasets of the paper, real and generated, as uint8 batches on the device.

Real: DeepMind's multi_object_datasets (TFRecord files, read without TensorFlow) and the original CLEVR_v1.0.
Generated: look-alikes of Tetrominoes, Multi-dSprites and CLEVR, with masks and factors, that need no download.
"""

import contextlib
import functools
import gzip
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

try:
    import fcntl
except ImportError:  # Windows: there processes cannot see each other's caches and runs in the making
    fcntl = None

# ---------------------------------------------------------------------------------------------------------------------
# Scenes: what every dataset becomes, and the one way to a batch
# ---------------------------------------------------------------------------------------------------------------------


class Scenes:
    """One split of a dataset: uint8 arrays, in memory or mapped from the cache, or on the GPU.

    image [n, H, W, 3] uint8; label [n, H, W] uint8, the entity that each pixel belongs to, 0 = background (None for the
    original CLEVR, which has no masks); target [n, 10, 19] float32 (CLEVR only, see `clevr_target`).
    index: which of them make up the split; all if not given. source: what they are, in words."""

    def __init__(self, image, label=None, target=None, index=None, source=""):
        self.source = source
        self.arrays = {"image": image, "label": label, "target": target}
        self.arrays = {key: torch.as_tensor(array) for key, array in self.arrays.items() if array is not None}
        self.index = torch.arange(len(image)) if index is None else torch.as_tensor(index)

    def __len__(self):
        return len(self.index)

    def to(self, device):
        """Moves the split to a device, if it fits there beside the model: then no batch waits for a copy."""
        size = sum(array[0].numel() * array.element_size() * len(self) for array in self.arrays.values())
        if torch.device(device).type != "cuda" or size > 0.5 * torch.cuda.mem_get_info(device)[0]:
            return self
        arrays = {key: array[self.index].to(device) for key, array in self.arrays.items()}
        return Scenes(**arrays, source=self.source)

    def batch(self, index, device="cpu"):
        """index [B] within the split -> image [B, 3, H, W] float32 in [-1, 1], channels last in memory; and of what the
        dataset has, label [B, H, W] uint8 and target [B, 10, 19]; all on the device."""
        index = put(self.index[index], self.arrays["image"].device)
        batch = {key: put(array[index], device) for key, array in self.arrays.items()}
        batch["image"] = batch["image"].permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)
        return batch


def put(x, device):
    """A tensor on a device; to CUDA by way of pinned memory, since else the copy waits for all the work there."""
    pinned = torch.device(device).type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


# dataset -> (the official file's name without its end, the first scenes of it that are for training, resolution)
DATA = {
    "tetrominoes": ("tetrominoes_train", 60_000, 35),
    "multi_dsprites": ("multi_dsprites_colored_on_grayscale", 60_000, 64),
    "multi_dsprites_on_colored": ("multi_dsprites_colored_on_colored", 60_000, 64),
    "clevr": ("clevr_with_masks_train", 70_000, 128),
    "clevr_like": (None, 70_000, 128),
}
BUCKET = "https://storage.googleapis.com/multi-object-datasets"


def load(name, split, root="data", count=None, resolution=None, crop="paper", min_objects=0, max_objects=10,
         download=False):
    """The "train" or "eval" split of a dataset of DATA -> Scenes. The two share no scene.

    Real files are looked for under `root` and decoded once, into a cache beside them. Without them Tetrominoes and
    Multi-dSprites (on grey) are generated. count: so many scenes at most. min_objects, max_objects: only scenes with so
    many objects. crop, for CLEVR: "paper", the central square; "official", the window that the official code cuts out
    of CLEVR_v1.0; "none", the whole picture, made square (the set prediction task).
    Raises OSError or ValueError, with a line that says what to do."""
    stem, train_count, full_resolution = DATA[name]
    root, resolution = Path(root), resolution or full_resolution
    file = root / f"{stem}.tfrecords"
    if stem and file.exists():
        source, jobs, prepare = tfrecords_source(name, file, resolution, crop)
    elif name == "clevr":
        source, jobs, prepare = clevr_v1_source(root, resolution, crop, download)
    else:
        return generate(name, split, root, count or train_count, resolution, crop, min_objects, max_objects)
    arrays = cached(root / "cache" / f"{name}-{resolution}", [*source, resolution, crop], jobs, prepare)
    objects = arrays.pop("objects")
    index = choose(objects, split, train_count, count, min_objects, max_objects)
    return Scenes(**arrays, index=index, source=Path(source[0]).name)


def choose(objects, split, train_count, count, min_objects, max_objects):
    """The indices of a split: the first `train_count` scenes are for training, those after them for evaluation (of a
    file with no more than those the last fifth), and of these the first `count` with a number of `objects` [n] in the
    range."""
    n = len(objects)
    border = train_count if n > train_count else n - max(1, n // 5)
    index = np.arange(border) if split == "train" else np.arange(border, n)
    index = index[(objects[index] >= min_objects) & (objects[index] <= max_objects)][:count]
    if len(index) == 0:
        raise ValueError(f"the {split} split has no scene with {min_objects} to {max_objects} objects")
    return index


def tfrecords_source(name, file, resolution, crop):
    """-> what the file is, its numbered scenes (read when the cache is built), and what makes arrays of one."""
    stem, window = file.stem, crop if name == "clevr" else "none"

    def prepare(numbered):
        number, scene = numbered
        try:
            return {"image": resize(scene["image"], resolution, window)[None],
                    "label": resize(scene["mask"].argmax(0).astype(np.uint8), resolution, window)[None],
                    "objects": np.uint8([round(float(scene["visibility"].sum())) - 1]),  # with the background
                    **({"target": clevr_target(scene)[None]} if name == "clevr" else {})}
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise ValueError(f"{file}, record {number}: damaged or not {stem} ({error!r}); get the file again"
                             ) from None

    limit = None if name == "clevr" else DATA[name][1] + 5_000  # the others have a million, more than anyone waits for
    return [str(file), stamp(file)], enumerate(read_tfrecords(file, stem, limit)), prepare


# ---------------------------------------------------------------------------------------------------------------------
# DeepMind's multi_object_datasets: TFRecord files, without TensorFlow
# ---------------------------------------------------------------------------------------------------------------------

TFRECORDS = {  # name -> image [H, W, 3]; mask as stored; whether the entities come third there
    "tetrominoes": ((35, 35, 3), (4, 35, 35), False),
    "multi_dsprites_colored_on_grayscale": ((64, 64, 3), (64, 64, 6), True),
    "multi_dsprites_colored_on_colored": ((64, 64, 3), (64, 64, 5), True),
    "clevr_with_masks": ((240, 320, 3), (11, 240, 320), False),
}


def read_tfrecords(path, name, limit=None):
    """The scenes of one of DeepMind's GZIP TFRecord files, one dict of arrays each, in the file's order.

    name: a key of TFRECORDS; "_train" after it is ignored. limit: the first so many. -> image [H, W, 3] uint8; mask
    [E, H, W] uint8 0/1, background first; the factors as stored, [E] or [E, 3], float32 or uint8. One record is in
    memory at a time. The content is checked by GZIP's own checksum: at the end of the file, so it is read up to there
    whatever the limit. Raises ValueError naming file and record where the file is truncated, damaged or another."""
    image_shape, mask_shape, entities_third = TFRECORDS[name.removesuffix("_train")]
    number = 0
    try:
        with gzip.open(path) as file:
            while number != limit and (header := file.read(12)):
                if len(header) < 12 or masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
                    raise ValueError("its length is damaged")
                length = int.from_bytes(header[:8], "little")
                if length > 2 ** 24:
                    raise ValueError(f"it claims {length} bytes, no scene of these sets does")
                record = file.read(length + 4)
                if len(record) < length + 4:
                    raise EOFError("the file ends within it")
                scene = parse_example(memoryview(record)[:-4])
                mask = scene["mask"].reshape(mask_shape) != 0
                scene["mask"] = (mask.transpose(2, 0, 1) if entities_third else mask).astype(np.uint8)
                scene["image"] = scene["image"].reshape(image_shape)
                for key, array in scene.items():
                    if array.size == 3 * len(scene["mask"]):
                        scene[key] = array.reshape(-1, 3)
                yield scene
                number += 1
            if number == limit:
                say(f"reading {path} on to the checksum at its end")
            while file.read(2 ** 24):
                pass
    except (ValueError, KeyError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, record {number}: damaged, cut short or not {name} ({error}); get the file again"
                         ) from None
    if number == 0:
        raise ValueError(f"{path} holds no record; get the file again")


def parse_example(record):
    """A serialised tf.train.Example -> {feature: flat array}, uint8 of a BytesList of single bytes, float32 of a
    FloatList."""
    scene = {}
    (_, features), = messages(record)
    for _, entry in messages(features):
        (_, key), (_, feature) = messages(entry)
        (kind, values), = messages(feature)
        if kind == 1:  # every byte is a message of its own: field 1 (0x0a), length 1, the byte
            array = np.frombuffer(values, np.uint8).reshape(-1, 3)
            if (array[:, :2] != (10, 1)).any():
                raise ValueError("its byte strings are not single bytes")
            array = array[:, 2]
        else:
            (_, packed), = messages(values)
            array = np.frombuffer(packed, "<f4")
        scene[bytes(key).decode()] = array
    return scene


def messages(buffer):
    """The (field, bytes) pairs of a protobuf message that has only length-delimited fields, as all of Example's are."""
    fields, pos = [], 0
    while pos < len(buffer):
        tag, pos = buffer[pos], pos + 1
        size = shift = 0
        while True:
            byte, pos = buffer[pos], pos + 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                break
        if tag & 7 != 2 or pos + size > len(buffer):
            raise ValueError("it is no tf.train.Example")
        fields.append((tag >> 3, buffer[pos:pos + size]))
        pos += size
    return fields


def masked_crc32c(buffer):
    """TFRecord's checksum: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in buffer:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------------------
# CLEVR
# ---------------------------------------------------------------------------------------------------------------------

# Codes of clevr_with_masks, from 1 (0 = background or padding).
CLEVR_CODES = {"size": ["large", "small"], "material": ["rubber", "metal"], "shape": ["sphere", "cylinder", "cube"],
               "color": ["red", "cyan", "green", "blue", "brown", "gray", "purple", "yellow"]}
# The order inside the set prediction's targets, the official code's (from TensorFlow Datasets).
CLEVR_TARGETS = {"size": ["small", "large"], "material": ["rubber", "metal"], "shape": ["cube", "sphere", "cylinder"],
                 "color": ["gray", "blue", "brown", "yellow", "red", "green", "purple", "cyan"]}
# Rows and columns of the central square by the picture's size: the paper's; the physically equal one of CLEVR_v1.0.
CLEVR_CROP = {(240, 320): (29, 221, 64, 256), (320, 480): (24, 312, 96, 384)}


def clevr_target(scene):
    """The factors of one scene as in clevr_with_masks (background first, codes from 1) -> target [10, 19] float32:
    (3d_coords + 3) / 6, one-hot size, material, shape and colour, 1 for a real object; rows of zeros after them."""
    target = np.zeros((10, 19), np.float32)
    objects = np.flatnonzero(scene["size"])  # neither background nor padding
    if len(objects) > 10:
        raise ValueError(f"{len(objects)} objects, where CLEVR has 10 at most")
    for row, e in enumerate(objects):
        target[row, :3] = (np.array([scene["x"][e], scene["y"][e], scene["z"][e]]) + 3) / 6
        start = 3
        for key, names in CLEVR_TARGETS.items():
            target[row, start + names.index(CLEVR_CODES[key][int(scene[key][e]) - 1])] = 1
            start += len(names)
        target[row, 18] = 1
    if not (np.abs(target[:, :3]) < 10).all():  # not a number, either
        raise ValueError("its coordinates are not CLEVR's")
    return target


def clevr_v1_source(root, resolution, crop, download):
    """As tfrecords_source, for the original CLEVR_v1.0 (480 x 320 PNGs and scenes files, no masks): its splits train
    and val, one after the other."""
    folder = next((f for f in (root / "CLEVR_v1.0", root / "clevr" / "CLEVR_v1.0") if f.exists()), None)
    if folder is None and download:
        part, folder = root / "CLEVR_v1.0.part", root / "CLEVR_v1.0"
        say(f"downloading CLEVR_v1.0 into {part}: 18 GB, and as much again to unpack")
        shutil.rmtree(part / "clevr" / "CLEVR_v1.0", ignore_errors=True)  # half unpacked; what was fetched is kept
        try:
            torchvision.datasets.CLEVRClassification(part, download=True)
        except (RuntimeError, zipfile.BadZipFile) as error:
            raise OSError(f"the download failed ({error}): start it again") from None
        (part / "clevr" / "CLEVR_v1.0").rename(folder)
        shutil.rmtree(part, ignore_errors=True)
    if folder is None:
        raise FileNotFoundError(
            f"no CLEVR in {root}/: put clevr_with_masks_train.tfrecords there (10.5 GB, with masks; from {BUCKET}/"
            "clevr_with_masks/), or add --download to fetch CLEVR_v1.0 (18 GB, no masks); --data clevr_like needs no "
            "files")

    train, val = (folder / "scenes" / f"CLEVR_{part}_scenes.json" for part in ("train", "val"))
    files = [train, val] if val.exists() else [train]

    def read_scenes():
        for file in files:
            try:
                number = -1
                for number, scene in enumerate(json.loads(file.read_bytes())["scenes"]):
                    objects = scene["objects"]
                    factors = {key: [0] + [names.index(o[key]) + 1 for o in objects]  # the background comes first
                               for key, names in CLEVR_CODES.items()}
                    factors.update({axis: [0] + [0.0 + o["3d_coords"][i] for o in objects]  # 0.0: of no text
                                    for i, axis in enumerate("xyz")})
                    path = folder / "images" / file.name.split("_")[1] / Path(scene["image_filename"]).name
                    yield path, clevr_target({key: np.array(values) for key, values in factors.items()})
                if number < 0:
                    raise ValueError("it has no scenes")
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
                    RecursionError) as error:
                raise ValueError(f"{file}, scene {max(number, 0)}: damaged or not a CLEVR scenes file "
                                 f"({type(error).__name__}: {error})") from None

    def prepare(scene):
        path, target = scene
        return {"image": resize(read_png(path), resolution, crop)[None],
                "objects": target[:, 18].sum(keepdims=True).astype(np.uint8), "target": target[None]}

    return [str(folder), *map(stamp, files)], read_scenes(), prepare


def read_png(path):
    """One of CLEVR_v1.0's pictures -> [320, 480, 3] uint8, without the alpha channel."""
    try:
        content, pos = path.read_bytes(), 8
        size = tuple(int.from_bytes(content[i:i + 4], "big") for i in (20, 16))
        if size not in CLEVR_CROP:  # before memory is taken for it
            raise ValueError("it is no PNG of 480 x 320 pixels")
        while pos < len(content):  # PIL leaves out the checksums of the pixels
            end = pos + 12 + int.from_bytes(content[pos:pos + 4], "big")
            if zlib.crc32(content[pos + 4:end - 4]) != int.from_bytes(content[end - 4:end], "big"):
                raise ValueError("a checksum is wrong")
            pos = end
        return np.array(torchvision.datasets.folder.default_loader(path))
    except Exception as error:  # PIL has many ways to say it
        raise ValueError(f"{path}: missing or damaged ({str(error).splitlines()[0]})") from None


def resize(picture, resolution, crop="none"):
    """Crops and resizes as the official code does: [H, W, 3] uint8 bilinear without antialiasing, [H, W] uint8 (labels)
    to the nearest pixel -> [resolution, resolution(, 3)] uint8."""
    size = picture.shape[:2]
    if crop != "none":
        if size not in CLEVR_CROP:
            raise ValueError(f"a picture of {size[0]} x {size[1]} pixels is not CLEVR's, whose crop is known")
        top, bottom, left, right = CLEVR_CROP[(240, 320) if crop == "official" else size]
        picture = picture[top:bottom, left:right]
    if picture.shape[:2] == (resolution, resolution):
        return picture
    x = torch.from_numpy(np.ascontiguousarray(picture)).float()
    if picture.ndim == 2:
        return F.interpolate(x[None, None], (resolution, resolution), mode="nearest-exact")[0, 0].byte().numpy()
    x = F.interpolate(x.permute(2, 0, 1)[None], (resolution, resolution), mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0).round().byte().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The cache: what is slow to decode or to draw, once
# ---------------------------------------------------------------------------------------------------------------------


def say(line, end="\n"):
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first
        with contextlib.suppress(OSError):  # a closed terminal or pipe is no reason to stop
            print(line, end=end, file=sys.stderr, flush=True)


def on_terminal():
    return sys.stderr is not None and sys.stderr.isatty()


def stamp(file):
    """Changes when the file does."""
    stat = Path(file).stat()
    return [stat.st_size, stat.st_mtime_ns]


def cores():
    """Of this process: torch.get_num_threads() is 1 under torchrun."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def try_lock(file, wait=False):
    """Locks an open file. -> True: done, until it is closed or the process ends, however it ends; False: another
    process has it; None: this system has no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None


def cached(folder, settings, jobs, prepare):
    """Maps {key: [n, ...]} from FOLDER-HASH, which is made first if need be from prepare(job) -> {key: array [m, ...]}
    of every job, on all cores. The hash is of the settings: another source or setting is another folder.
    A folder is complete or does not exist: it is written under another name, and renamed at the end. Of several
    processes that need it one builds, the others wait. At each use its checksums are checked."""
    digest = hashlib.sha256(json.dumps(["crc32", *settings]).encode()).hexdigest()[:8]  # crc32: the format's version
    folder = folder.with_name(f"{folder.name}-{digest}")
    lock = f"{folder}.lock"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob("*.part"):  # NAME.PID.part of a killed build; a living one has NAME.lock
            with contextlib.suppress(OSError):  # another person's
                with open(f"{str(stale).rsplit('.', 2)[0]}.lock", "w") as other:
                    if try_lock(other):
                        shutil.rmtree(stale, ignore_errors=True)
        with open(lock, "w") as file:
            if try_lock(file) is False:
                say(f"another process is building the cache {folder}: waiting for it")
                try_lock(file, wait=True)
            if not folder.exists():
                build_cache(folder, jobs, prepare)
        with contextlib.suppress(OSError):
            os.unlink(lock)  # who still waits for it finds the folder (after a failure it builds: the file stays)
    try:
        content, check = (folder / "meta.json").read_bytes().splitlines()
        if zlib.crc32(content) != int(check):
            raise ValueError("the checksum of meta.json is wrong")
        arrays = {}
        for key, (dtype, shape, sums) in json.loads(content).items():
            file = folder / f"{key}.bin"
            if checksums(file) != sums:
                raise ValueError(f"the checksum of {file.name} is wrong")
            arrays[key] = np.memmap(file, dtype, "c", shape=tuple(shape))
        return arrays
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the cache {folder} is damaged ({error}): delete it, and it will be built again") from None


def checksums(file, block=2 ** 26):
    """CRC-32 of each block of a file, on all cores: a few seconds for the largest cache, and it warms the disk's."""
    content = np.memmap(file, np.uint8, "r")
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(zlib.crc32, (content[i:i + block] for i in range(0, len(content), block))))


def build_cache(folder, jobs, prepare):
    say(f"building the cache {folder} (once)")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_cache(part, jobs, prepare)
        part.rename(folder)
    except OSError as error:
        if not folder.exists():  # else, where there are no locks, another process was faster, with the same result
            raise OSError(f"cannot build the cache {folder} ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_cache(folder, jobs, prepare):
    files, shapes, count, start, threads = {}, {}, 0, time.time(), torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is over scenes; PyTorch's own under it would only add strife
    try:
        with ThreadPoolExecutor(cores()) as pool:
            jobs = iter(jobs)
            while batch := list(islice(jobs, 8 * cores())):
                for arrays in pool.map(prepare, batch):
                    for key, array in arrays.items():
                        if key not in files:
                            files[key] = open(folder / f"{key}.bin", "wb")
                            shapes[key] = [str(array.dtype), array.shape[1:]]
                        files[key].write(np.ascontiguousarray(array))
                    count += len(array)
                if on_terminal():
                    say(f"\r{count:,} scenes, {count / (time.time() - start):,.0f}/s", end="")
    finally:
        torch.set_num_threads(threads)
        for file in files.values():
            file.close()
    if count == 0:
        raise ValueError("there is no scene, or none with so many objects (--min-objects, --max-objects)")
    meta = json.dumps({key: [dtype, [count, *shape], checksums(folder / f"{key}.bin")]
                       for key, (dtype, shape) in shapes.items()})
    (folder / "meta.json").write_text(f"{meta}\n{zlib.crc32(meta.encode())}\n")
    say(f"\r{count:,} scenes in {time.time() - start:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Generated scenes
# ---------------------------------------------------------------------------------------------------------------------

GENERATORS = 1  # another number, if ever they draw other scenes: old caches are then not used


def generate(name, split, root, count, resolution, crop, min_objects, max_objects):
    """Scenes by the law of a dataset: Tetrominoes anew each time (seconds), the others by way of the cache."""
    seed, size = 1 if split == "train" else 2, 32  # the splits are the same in every run
    source = f"generated {name}"
    if name == "tetrominoes":
        if resolution != 35 or not min_objects <= 3 <= max_objects:
            raise ValueError("generated Tetrominoes are of 35 x 35 pixels with 3 objects: leave --resolution, "
                             "--min-objects and --max-objects out")
        say(f"tetrominoes: no file in {root}/, so {count:,} {split} scenes are generated by the same law")
        scenes = make_tetrominoes(count, seed)
        return Scenes(scenes["image"], scenes["mask"].argmax(1).astype(np.uint8), source=source)
    if name == "multi_dsprites_on_colored":
        raise FileNotFoundError(f"no {DATA[name][0]}.tfrecords in {root}/ (from {BUCKET}/multi_dsprites/); "
                                "--data multi_dsprites needs no files")
    if name == "multi_dsprites" and resolution != 64:
        raise ValueError(f"generated Multi-dSprites are of 64 x 64 pixels, not {resolution}: leave --resolution out")
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"  # other threads ask for 0
    rendering = contextlib.nullcontext() if device == "cpu" else threading.Semaphore(4)  # few threads fit on one GPU

    def prepare(start):
        number = min(size, count - start)
        if name == "clevr_like":
            with rendering:
                scenes = make_clevr_like(number, (seed, start), resolution, max(min_objects, 3), max_objects,
                                         crop != "none", device)
            target = {"target": np.stack([clevr_target({k: v[i] for k, v in scenes.items()}) for i in range(number)])}
        else:
            scenes, target = make_multi_dsprites(number, (seed, start)), {}
            objects = scenes["visibility"].sum(1) - 1
            keep = (objects >= min_objects) & (objects <= max_objects)
            scenes = {key: scenes[key][keep] for key in ("image", "mask")}
        return {"image": scenes["image"], "label": scenes["mask"].argmax(1).astype(np.uint8), **target}

    if name == "multi_dsprites":
        say(f"multi_dsprites: no {DATA[name][0]}.tfrecords in {root}/, so {count:,} {split} scenes are look-alikes")
    settings = [GENERATORS, name, split, count, resolution, crop, min_objects, max_objects]
    folder = root / "cache" / f"{name}-{split}-{resolution}"
    return Scenes(**cached(folder, settings, range(0, count, size), prepare), source=source)


# ---------------------------------------------------------------------------------------------------------------------
# Tetrominoes
# ---------------------------------------------------------------------------------------------------------------------

# The 19 orientations of I, O, L, J, T, S and Z: four cells each, rows from top to bottom.
TETROMINOES = [[(row, col) for row, line in enumerate(piece.split("/")) for col, cell in enumerate(line) if cell == "#"]
               for piece in """####  #/#/#/#  ##/##
                               #./#./##  ###/#..  ##/.#/.#  ..#/###
                               .#/.#/##  #../###  ##/#./#.  ###/..#
                               ###/.#.  .#/##/.#  .#./###  #./##/#.
                               .##/##.  #./##/.#  ##./.##  .#/##/#.""".split()]
TETROMINO_CELLS = np.array(TETROMINOES)  # [19, 4, 2]
TETROMINO_EXTENT = 5 * (TETROMINO_CELLS.max(axis=1) + 1)  # [19, 2], height and width in pixels
TETROMINO_COLORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
TETROMINO_TILE = np.array([[191, 255, 255, 255, 223]] + 3 * [[127, 159, 159, 159, 191]] + [[95, 63, 63, 63, 127]])


def make_tetrominoes(count, seed):
    """Scenes by the law of DeepMind's Tetrominoes: three pieces of 19 orientations and six colours, at any pixel where
    they lie inside 35 x 35 and do not overlap, on black. The same (count, seed) gives the same scenes.

    -> image [n, 35, 35, 3] uint8; mask [n, 4, 35, 35] uint8 0/1, background first; factors of float32 with the
    background first: shape [n, 4] (1 to 19 in the order of TETROMINOES), x, y [n, 4] (centre of the piece's bounding
    box, in pixels), color [n, 4, 3] (RGB, 0/1), visibility [n, 4] (1: all are there)."""
    rng = np.random.default_rng(seed)
    piece, corner = np.empty((count, 3), int), np.empty((count, 3, 2), int)
    todo = np.arange(count)
    while len(todo):  # draw three pieces at once, until none overlap: uniform over the scenes that are allowed
        piece[todo] = rng.integers(len(TETROMINOES), size=(len(todo), 3))
        corner[todo] = rng.integers(35 - TETROMINO_EXTENT[piece[todo]] + 1)       # [m, 3, 2]
        todo = todo[tetrominoes_overlap(piece[todo], corner[todo])]
    color = TETROMINO_COLORS[rng.integers(len(TETROMINO_COLORS), size=(count, 3))]
    image, mask = draw_tetrominoes(piece, corner, color)

    def with_background(values, background):
        return np.concatenate([np.full_like(values[:, :1], background), values], axis=1).astype(np.float32)

    center = corner + (TETROMINO_EXTENT[piece] - 1) / 2
    return {"image": image, "mask": mask, "shape": with_background(piece + 1, 0), "color": with_background(color, 0),
            "x": with_background(center[..., 1], 0), "y": with_background(center[..., 0], 0),
            "visibility": np.ones((count, 4), np.float32)}


def make_moving_tetrominoes(count, frames, seed, speed=2.0):
    """Clips that begin with such scenes: each piece moves `speed` pixels a frame, straight on in a direction of its
    own, until the border or another piece throws it back. -> image [n, F, 35, 35, 3] uint8, label [n, F, 35, 35] uint8,
    0 = background."""
    scenes = make_tetrominoes(count, seed)
    piece = scenes["shape"][:, 1:].astype(int) - 1
    extent = TETROMINO_EXTENT[piece]                                               # [n, 3, 2]
    corner = np.stack([scenes["y"], scenes["x"]], axis=-1)[:, 1:] - (extent - 1) / 2
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, (count, 3))
    step = speed * np.stack([np.sin(angle), np.cos(angle)], axis=-1)               # [n, 3, 2]
    image, label = np.empty((count, frames, 35, 35, 3), np.uint8), np.empty((count, frames, 35, 35), np.uint8)
    for t in range(frames):
        image[:, t], mask = draw_tetrominoes(piece, corner.round().astype(int), scenes["color"][:, 1:])
        label[:, t] = mask.argmax(axis=1)
        for p in range(3):  # one after the other: a move that would leave the frame or meet a piece is a turn instead
            moved = corner.copy()
            moved[:, p] += step[:, p]
            outside = (moved < 0) | (moved > 35 - extent)
            moved[outside] = corner[outside]
            hit = tetrominoes_overlap(piece, moved.round())
            moved[hit] = corner[hit]
            step[outside] *= -1
            step[hit, p] *= -1
            corner = moved
    return {"image": image, "label": label}


def tetrominoes_overlap(piece, corner):
    """piece [n, 3], corner [n, 3, 2], as for draw_tetrominoes -> [n] bool."""
    cells = corner[:, :, None] + 5 * TETROMINO_CELLS[piece]                        # [n, 3, 4, 2], each cell's top left
    gaps = np.abs(cells[:, [0, 0, 1], :, None] - cells[:, [1, 2, 2], None, :])     # [n, 3 pairs, 4, 4, 2]
    return (gaps < 5).all(axis=-1).any(axis=(1, 2, 3))


def draw_tetrominoes(piece, corner, color):
    """piece [n, 3] (0 to 18), corner [n, 3, 2] (row, column of the bounding box's top left), color [n, 3, 3] (0/1)
    -> image [n, 35, 35, 3] uint8, mask [n, 4, 35, 35] uint8 0/1, background first."""
    count = len(piece)
    image, label = np.zeros((count, 35, 35, 3), np.uint8), np.zeros((count, 35, 35), np.uint8)
    cells = corner[:, :, None] + 5 * TETROMINO_CELLS[piece]                        # [n, 3, 4, 2]
    scenes, pixels = np.arange(count)[:, None, None], np.arange(5)
    for p in range(3):
        tiles = (TETROMINO_TILE[None, :, :, None] * color[:, p, None, None]).astype(np.uint8)  # [n, 5, 5, 3]
        for c in range(4):
            rows = cells[:, p, c, 0, None, None] + pixels[:, None]
            cols = cells[:, p, c, 1, None, None] + pixels
            image[scenes, rows, cols] = tiles
            label[scenes, rows, cols] = p + 1
    return image, (label[:, None] == np.arange(4, dtype=np.uint8)[:, None, None]).view(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Multi-dSprites
# ---------------------------------------------------------------------------------------------------------------------

DSPRITES_SCALES, DSPRITES_ORIENTATIONS = np.linspace(0.5, 1, 6), np.linspace(0, 2 * np.pi, 40)


def make_multi_dsprites(count, seed):
    """Scenes after DeepMind's Multi-dSprites, colored_on_grayscale: 2 to 5 sprites (square, ellipse, heart; 6 scales,
    40 orientations, 32 x 32 positions) on a grey background, the later over the earlier. Hue is uniform, saturation and
    value are from 0.5 to 1. The same (count, seed) gives the same scenes.

    -> image [n, 64, 64, 3] uint8; mask [n, 6, 64, 64] uint8 0/1, background first; factors of float32, padded with
    zeros: shape (1 square, 2 ellipse, 3 heart), scale, orientation (radians), x, y (0 to 1), visibility (1: is there)
    [n, 6], color [n, 6, 3] (RGB, 0 to 1)."""
    rng = np.random.default_rng(seed)
    number = rng.integers(2, 6, count)
    shape, scale, turn, row, col = (rng.integers(size, size=(count, 5)) for size in (3, 6, 40, 32, 32))
    hue, saturation, value = rng.random((count, 5, 1)), *rng.uniform(0.5, 1, (2, count, 5, 1))
    fade = np.abs((hue * 6 - np.array([3, 2, 4])) % 6 - 3)                         # HSV to RGB: a triangle wave each
    fade = np.clip(np.stack([fade[..., 0] - 1, 2 - fade[..., 1], 2 - fade[..., 2]], -1), 0, 1)
    color = value * (1 - saturation * (1 - fade))
    grey = rng.random((count, 1)).repeat(3, 1)

    there = np.arange(5) < number[:, None]
    label, pixels, stencils = np.zeros((count, 64, 64), np.uint8), np.arange(64), dsprites_stencils()
    for s in range(5):  # the painter's order; a stencil is centred in 128 x 128, its window's place sets the sprite's
        rows, cols = pixels - (row[:, s, None] + 16) + 64, pixels - (col[:, s, None] + 16) + 64
        stencil = stencils[shape[:, s], scale[:, s], turn[:, s]]
        drawn = stencil[np.arange(count)[:, None, None], rows[:, :, None], cols[:, None, :]]
        label[drawn & there[:, s, None, None]] = s + 1
    palette = np.concatenate([grey[:, None], color], axis=1)                       # [n, 6, 3]
    image = (palette * 255).round().astype(np.uint8)[np.arange(count)[:, None, None], label]

    def factor(values, background=0):
        return np.concatenate([np.full((count, 1), background), np.where(there, values, 0)], axis=1).astype(np.float32)

    return {"image": image, "mask": (label[:, None] == np.arange(6, dtype=np.uint8)[:, None, None]).view(np.uint8),
            "shape": factor(shape + 1), "scale": factor(DSPRITES_SCALES[scale]),
            "orientation": factor(DSPRITES_ORIENTATIONS[turn]), "visibility": factor(1, 1),
            "x": factor(col / 31), "y": factor(row / 31),
            "color": (palette * factor(1, 1)[..., None]).astype(np.float32)}


@functools.cache
def dsprites_stencils():
    """[3 shapes, 6 scales, 40 orientations, 128, 128] bool, each sprite in the middle."""
    y, x = np.meshgrid(np.arange(128) - 64, np.arange(128) - 64, indexing="ij")
    cos, sin = np.cos(DSPRITES_ORIENTATIONS)[:, None, None], np.sin(DSPRITES_ORIENTATIONS)[:, None, None]
    stencils = []
    for scale in DSPRITES_SCALES:
        u, v = (cos * x + sin * y) / (12 * scale), (cos * y - sin * x) / (12 * scale)         # [40, 128, 128]
        square = np.maximum(np.abs(u), np.abs(v)) < 0.8
        ellipse = u ** 2 + (v / 0.6) ** 2 < 1
        heart = u ** 2 + (-1.2 * v + 0.1 - 0.75 * np.sqrt(np.abs(u))) ** 2 < 0.9
        stencils.append([square, ellipse, heart])
    return np.array(stencils).swapaxes(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# CLEVR look-alike, ray-cast
# ---------------------------------------------------------------------------------------------------------------------

# CLEVR's tables; codes count from 1. Its renderer takes the colours for linear albedo, hence the pastel look.
_SIZES = (0.7, 0.35)  # large, small: radius, half height, half side
_COLORS = ((173, 35, 35), (41, 208, 208), (29, 105, 20), (42, 75, 215),  # red, cyan, green, blue
           (129, 74, 25), (87, 87, 87), (129, 38, 192), (255, 238, 51))  # brown, gray, purple, yellow
_SPHERE, _CYLINDER, _CUBE = 1, 2, 3
# Mean camera, aimed at the origin; focal length and size of the frame in pixels: CLEVR_v1.0's pixel_coords fit these.
_CAMERA, _FOCAL, _FRAME = (7.481, -6.508, 5.344), 525.0, (480, 320)
_CROP = (96, 24, 384, 312)  # left, top, right, bottom of the object-discovery crop in that frame
# Square key, fill and back lamps: mean place; power per channel and ambient light are fitted to real bare ground.
_LAMPS = ((6.447, -2.905, 4.258), (-4.671, -4.014, 3.011), (-1.168, 2.646, 5.816))
_POWER = ((5.75, 5.32, 4.63), (1.20, 1.31, 1.66), (2.60, 2.54, 2.49))
_LAMP_SIDE, _AMBIENT = 0.8, 0.135


def _unit(vector):
    return vector / (vector * vector).sum(0).sqrt().clamp(min=1e-8)


def _turned(vector, cos, sin):
    return torch.stack((cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1], vector[2]))


def _surface(point, core, bevel, cylinder):
    """Signed distance [Q] and outward normal [3,Q] of boxes with rounded edges, at points [3,Q] of the object's frame.

    A sphere is such a box with a core of no size; a cylinder is one in the coordinates (radius, 0, height).
    """
    radius = (point[0] * point[0] + point[1] * point[1]).sqrt().clamp(min=1e-6)
    along = torch.stack((torch.where(cylinder, radius, point[0].abs()),
                         torch.where(cylinder, 0, point[1].abs()), point[2].abs())) - core
    outside, deepest = along.clamp(min=0), along.amax(0)
    length = (outside * outside).sum(0).sqrt()
    normal = torch.where(length > 0, outside / length.clamp(min=1e-8), (along == deepest).float())
    side = torch.where(cylinder, normal[0] * point[:2] / radius, normal[:2] * point[:2].sign())
    return length + deepest.clamp(max=0) - bevel, torch.cat((side, normal[2:] * point[2:].sign()))


def _offsets(world, scene, origin, own):
    """Vectors [3,N,K] from points [3,N] to all objects, their squares [N,K], and which are met (not `own` [N])."""
    offset = world["centre"][:, scene] - origin[:, :, None]
    met = (world["bound"][scene] > 0) & (torch.arange(offset.shape[2], device=own.device) != own[:, None])
    return offset, (offset * offset).sum(0), met


def _pairs(world, scene, offsets, direction, spread=0):
    """The (ray, object) pairs that pass the object's bounding sphere, which the ray's spread per length enlarges.

    Returns ray [Q], object (slot [Q] and index over all scenes [Q]), length [Q] of the ray up to the point nearest to
    the centre, its start and direction [3,Q] in the object's frame, and the object's _surface parameters and bound.
    """
    offset, square, met = offsets
    along = (offset * direction[:, :, None]).sum(0)
    reach = world["bound"][scene] + spread * along
    ray, slot = ((along > 0) & (square < along * along + reach * reach) & met).nonzero(as_tuple=True)
    item = scene[ray] * world["bound"].shape[1] + slot
    cos, sin = world["turn"][:, item]
    shape = world["core"][item], world["bevel"][item], world["cylinder"][item]
    return (ray, slot, item, along[ray, slot], _turned(-offset[:, ray, slot], cos, -sin),
            _turned(direction[:, ray], cos, -sin), shape, world["bound"].flatten()[item])


def _nearest(world, scene, offsets, direction):
    """First object that each ray hits: distance [N] (inf: none), slot [N] and outward normal [3,N]."""
    ray, slot, item, along, start, step, shape, bound = _pairs(world, scene, offsets, direction)
    time = (along - bound).clamp(min=0)
    # The distance to a convex body is convex along a ray, so Newton's method from outside never overshoots.
    for _ in range(7):
        distance, normal = _surface(start + time * step, *shape)
        slope = (normal * step).sum(0)
        time = time - torch.where(slope < 0, distance / slope.clamp(max=-1e-3), 0)
    time = torch.where((distance < 2e-3) & (slope < 0), time, torch.inf)
    best = torch.full_like(direction[0], torch.inf).scatter_reduce(0, ray, time, "amin")
    first = (time < torch.inf) & (time == best[ray])
    chosen, normals = torch.zeros_like(scene), torch.zeros_like(direction)
    chosen[ray[first]] = slot[first]
    normals[:, ray[first]] = _turned(normal[:, first], *world["turn"][:, item[first]])
    return best, chosen, normals


def _blocked(world, scene, offsets, to_lamp, far):
    """Share [N] of a lamp that objects hide: one ray per point, soft by how closely it passes each object."""
    spread = 0.5 * _LAMP_SIDE / far
    ray, _, _, along, start, step, shape, bound = _pairs(world, scene, offsets, to_lamp, spread[:, None])
    low, high = (along - bound).clamp(min=0), along + bound
    for _ in range(6):  # bisect for the closest approach: the slope of a convex function changes its sign once
        middle = (low + high) / 2
        distance, normal = _surface(start + middle * step, *shape)
        ahead = (normal * step).sum(0) < 0
        low, high = torch.where(ahead, middle, low), torch.where(ahead, high, middle)
    part = (0.5 - 0.5 * distance / (spread[ray] * middle).clamp(min=1e-3)).clamp(0, 1)
    return torch.zeros_like(far).scatter_reduce(0, ray, part * part * (3 - 2 * part), "amax")


def _radiance(world, scene, origin, direction, own=None, haze=0.07):
    """Linear colour [3,N] and entity [N] (0 ground, from 1 objects) seen along rays [3,N] of the scenes [N].

    Rays with `own` are reflections in that object: metal that they meet looks like rubber, and the light ground blurs
    into the dark sky over an elevation of `haze`.
    """
    start = _offsets(world, scene, origin, torch.full_like(scene, -1) if own is None else own)
    time, slot, normal = _nearest(world, scene, start, direction)
    solid = time < torch.inf
    item, mine = scene * world["bound"].shape[1] + slot, torch.where(solid, slot, -1)
    time = torch.where(solid, time, (-origin[2] / direction[2].clamp(max=-1e-3)).clamp(max=100))
    position = origin + time * direction
    normal[2] = torch.where(solid, normal[2], 1)

    # Ambient light, less what the other objects hide (as spheres), and light that the ground throws back.
    offset, square, met = offsets = _offsets(world, scene, position, mine)
    hidden = (offset * normal[:, :, None]).sum(0).clamp(min=0) * met / (square * square.sqrt()).clamp(min=1e-4)
    hidden = (hidden * world["size"][scene].square()).sum(1)
    hidden = (hidden * (0.2 + 1.8 * hidden)).clamp(max=0.9)  # less, as they are not black; more nearby: they are wider
    height = (position[2] / world["size"].flatten()[item].clamp(min=0.1)).clamp(0, 1)
    bounce = 0.11 * (1 - normal[2]) * (1 + normal[2].clamp(max=0) * (1 - height))  # none right under an object
    light = (_AMBIENT / 2 * (1 - hidden) * (1 + normal[2]) + bounce).repeat(3, 1)
    lamps = []
    for lamp, power in zip(world["lamps"], _POWER):
        to_lamp = lamp[:, scene] - position
        far = (to_lamp * to_lamp).sum(0).sqrt()
        to_lamp = to_lamp / far
        aim = (_unit(lamp)[:, scene] * to_lamp).sum(0).clamp(min=0)  # the lamps face the origin
        glare = (1 - _blocked(world, scene, offsets, to_lamp, far)) * aim * light.new_tensor(power)[:, None]
        light += glare / far.square() * (normal * to_lamp).sum(0).clamp(min=0)
        lamps.append((to_lamp, far, glare))
    albedo = torch.where(solid, world["albedo"][:, item], 1)  # the ground's is part of the lamps' power
    sky = 0.012 + 0.12 * torch.exp(-direction[2].clamp(min=0) / haze)
    color = torch.where(solid | (direction[2] < 0), albedo * light, sky)

    if own is None:  # metal: mirror the scene, then add the lamps' streaks (CLEVR's metal is spun about z) and images
        at = (solid & world["metal"].flatten()[item]).nonzero()[:, 0]
        normal, direction, out = normal[:, at], direction[:, at], -offset[:, at, slot[at]]
        ring = _unit(torch.stack((-out[1], out[0], torch.zeros_like(out[0]))))
        cross = torch.linalg.cross(normal, ring, dim=0)
        # Tops and upper rims, but of a ball only the pole, gather light from all around, in two wedges.
        ball = (world["core"] == 0)[item[at]]
        top = torch.where(ball, 50 * normal[2] - 49, 3 * normal[2]).clamp(0, 1)
        haze = 0.07 + top * (0.5 + 0.6 * (direction * cross).sum(0).abs())
        mirror = direction - 2 * (normal * direction).sum(0) * normal
        glow, _ = _radiance(world, scene[at], position[:, at], mirror, slot[at], haze)
        for to_lamp, far, glare in lamps:
            half = _unit(to_lamp[:, at] - direction)
            narrow, wide, up = ((half * axis).sum(0).square() for axis in (ring, cross, normal))
            streak = 3 / (up + narrow / 0.14 ** 2 + wide / 0.3 ** 2).square() / far[at].square()
            glow += glare[:, at] * (streak + 1.8 * torch.exp(350 * (up - 1)))
        color[:, at] = albedo[:, at] * glow
    return color, torch.where(solid, slot + 1, 0)


def _world(scenes, device):
    """The renderer's tensors, from the numpy arrays [B,10] of _layout; K is the largest number of objects here."""
    most = int((scenes["shape"] > 0).sum(1).max())
    of = {k: torch.as_tensor(v if k in ("camera", "lamps") else v[:, :most], device=device) for k, v in scenes.items()}
    sphere, cylinder = of["shape"] == _SPHERE, of["shape"] == _CYLINDER
    size = torch.tensor((0,) + _SIZES, device=device)[of["size"].long()]
    bevel = size * torch.where(sphere, 1, torch.where(cylinder, 0.06, 0.19))
    camera = of["camera"].T  # [3,B]
    forward = _unit(-camera)
    right = _unit(torch.stack((forward[1], -forward[0], torch.zeros_like(forward[0]))))
    angle = of["rotation"].flatten()  # CLEVR draws degrees, but its renderer takes them for radians
    return {"camera": camera, "axes": (right, torch.linalg.cross(right, forward, dim=0), forward),
            "lamps": of["lamps"].permute(1, 2, 0).contiguous(), "centre": torch.stack((of["x"], of["y"], of["z"])),
            "size": size, "bound": size * torch.where(sphere, 1, torch.where(cylinder, 2, 3)).sqrt(),
            "core": (size - bevel).flatten(), "bevel": bevel.flatten(), "cylinder": cylinder.flatten(),
            "turn": torch.stack((angle.cos(), angle.sin())), "metal": of["material"] == 2,
            "albedo": torch.tensor(((0, 0, 0),) + _COLORS, device=device)[of["color"].long().flatten()].T / 255}


def _camera_rays(world, scene, column, row):
    """Origins and unit directions [3,N] of the rays through points of the 480x320 frame."""
    right, up, forward = (axis[:, scene] for axis in world["axes"])
    column, row = (column - _FRAME[0] / 2) / _FOCAL, (row - _FRAME[1] / 2) / _FOCAL
    return world["camera"][:, scene], _unit(forward + column * right - row * up)


def _pixels(world, window, width, height):
    """Scene, column and row in the frame [B*height*width] of the centres of all pixels, and a pixel's size."""
    counts = world["camera"].shape[1], height, width
    scene, row, column = (g.flatten() for g in torch.meshgrid(
        *(torch.arange(n, device=world["camera"].device) for n in counts), indexing="ij"))
    wide, high = (window[2] - window[0]) / width, (window[3] - window[1]) / height
    return scene, window[0] + (column + 0.5) * wide, window[1] + (row + 0.5) * high, wide, high


def _srgb(linear):
    return 1.055 * linear.clamp(0.0031308, 1) ** (1 / 2.4) - 0.055


def _render(scenes, window, resolution, device):
    """Pictures [B,H,W,3] uint8 and entities at the pixels' centres [B,H,W]."""
    world = _world(scenes, device)
    scene, column, row, wide, high = _pixels(world, window, resolution, resolution)
    color, entity = _radiance(world, scene, *_camera_rays(world, scene, column, row))
    # Antialias with four more rays per pixel, but only where a pixel differs from a neighbour.
    tone = torch.cat((_srgb(color), entity[None])).view(4, -1, resolution, resolution)
    edge = torch.zeros_like(tone[0], dtype=torch.bool)
    for axis in (1, 2):
        jump = (tone.diff(dim=axis + 1).abs() > 0.07).any(0)
        edge.narrow(axis, 0, resolution - 1).logical_or_(jump)
        edge.narrow(axis, 1, resolution - 1).logical_or_(jump)
    edge = edge.flatten().nonzero()[:, 0]
    color[:, edge] = 0
    for dx, dy in ((-0.15, -0.45), (0.45, -0.15), (-0.45, 0.15), (0.15, 0.45)):
        rays = _camera_rays(world, scene[edge], column[edge] + dx * wide, row[edge] + dy * high)
        color[:, edge] += _radiance(world, scene[edge], *rays)[0].clamp(max=1) / 4
    image = (_srgb(color) * 255).round().to(torch.uint8).view(3, -1, resolution, resolution)
    return image.permute(1, 2, 3, 0).cpu().numpy(), entity.view(-1, resolution, resolution).cpu().numpy()


def _layout(rng, number):
    """Draws scenes [B] with the given numbers of objects, and whether all found a place, as numpy arrays."""
    count, real = len(number), np.arange(10) < number[:, None]
    scenes = {key: np.where(real, rng.integers(1, codes + 1, (count, 10)), 0).astype(np.uint8)
              for key, codes in (("size", 2), ("material", 2), ("shape", 3), ("color", 8))}
    scenes["camera"] = np.float32(_CAMERA + rng.uniform(-0.5, 0.5, (count, 3)))
    scenes["lamps"] = np.float32(_LAMPS + rng.uniform(-1, 1, (count, 3, 3)))
    size = np.array((0,) + _SIZES)[scenes["size"]]
    ahead = -scenes["camera"][:, :2] / np.linalg.norm(scenes["camera"][:, :2], axis=1, keepdims=True)
    axes = np.stack((ahead, ahead[:, ::-1] * (1, -1)), 2)  # [B,2,2]: the camera's directions on the ground
    place, good = np.zeros((count, 10, 2)), np.ones(count, bool)
    for slot in range(number.max()):
        trial = rng.uniform(-3, 3, (count, 50, 2))
        step = trial[:, :, None] - place[:, None, :slot]  # [B,50,slot,2]
        gap = np.linalg.norm(step, axis=3) - size[:, None, :slot] - size[:, slot, None, None]
        fits = ((gap >= 0.25) & (np.abs(step @ axes[:, None]) >= 0.4).all(3)).all(2)
        place[:, slot] = trial[np.arange(count), fits.argmax(1)]
        good &= fits.any(1) | ~real[:, slot]
    for key, value in (("x", place[..., 0]), ("y", place[..., 1]), ("z", size),
                       ("rotation", rng.uniform(0, 360, (count, 10)))):
        scenes[key] = np.where(real, value, 0).astype(np.float32)
    return scenes, good


def _visible(scenes):
    """Whether every object of scenes [B] shows at least 200 pixels of 320x240; always decided on the CPU."""
    world, (wide, high) = _world(scenes, "cpu"), (72, 48)  # counted on a small map of the frame
    scene, column, row = _pixels(world, (0, 0) + _FRAME, wide, high)[:3]
    origin, direction = _camera_rays(world, scene, column, row)
    time, slot, _ = _nearest(world, scene, _offsets(world, scene, origin, torch.full_like(scene, -1)), direction)
    seen = torch.bincount((scene * 10 + slot)[time < torch.inf], minlength=len(scenes["x"]) * 10).view(-1, 10).numpy()
    return ((seen >= 200 * wide * high / (320 * 240)) | (scenes["shape"] == 0)).all(1)


def _draw(rng, number):
    """Scenes [B] with the given numbers of objects that obey the rules: rejection sampling, several tries at a time."""
    scenes, todo = {}, np.arange(len(number))
    while len(todo):
        tries = np.resize(todo, len(number))
        part, good = _layout(rng, number[tries])
        rows, first = np.unique(tries[good], return_index=True)
        part = {key: value[good][first] for key, value in part.items()}
        seen = _visible(part) if len(rows) else good[:0]
        for key, value in part.items():
            scenes.setdefault(key, np.zeros((len(number), *value.shape[1:]), value.dtype))[rows[seen]] = value[seen]
        todo = np.setdiff1d(todo, rows[seen])
    return scenes


def project(points, camera=_CAMERA):
    """CLEVR's 3d_coords [..., 3] -> column, row (pixels of the 480 x 320 frame) and depth [..., 3], as a camera at
    `camera` [..., 3] sees them; the mean camera if not given, whose error in CLEVR_v1.0 is a few pixels."""
    camera = np.asarray(camera)
    forward = -camera / np.linalg.norm(camera, axis=-1, keepdims=True)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    axes = np.stack((right, np.cross(forward, right), forward), -1)  # right, down, ahead
    view = ((points - camera)[..., None, :] @ axes)[..., 0, :]
    return np.concatenate((view[..., :2] / view[..., 2:] * _FOCAL + np.array(_FRAME) / 2, view[..., 2:]), -1)


def make_clevr_like(count, seed, resolution=128, min_objects=3, max_objects=10, crop=True, device="cpu"):
    """Scenes after CLEVR (Johnson et al. 2017), in the layout of DeepMind's CLEVR with masks; E = 11 entities.

    Cubes, cylinders and spheres of two sizes, two materials and eight colours on a grey ground, placed by the rules of
    CLEVR's generator and ray-cast with its camera and lamps: a look-alike of the data set, not a part of it.
    crop=True shows the part of the 480x320 frame used for object discovery (rows 24:312, columns 96:384); objects may
    be cut or, though present, outside. crop=False squashes the whole frame into the square. Scene i depends on the
    seed, the numbers of objects and i, not on count. `device` is where pictures are rendered.

    Returns a dict of numpy arrays, entity 0 = background, padded with zeros:
      image [n,H,W,3] uint8; mask [n,11,H,W] uint8 0/1, the visible parts, each pixel in exactly one entity;
      x, y, z [n,11] float32 in CLEVR's units (x, y in [-3, 3]); rotation [n,11] float32 as stored by CLEVR: 0..360,
      drawn as degrees, but rendered as radians; pixel_coords [n,11,3] float32: column and row of the object's centre
      in pixels of the returned picture (pixel j spans [j, j + 1]), depth; visibility [n,11] float32, 1 = exists;
      size (1 large, 2 small), material (1 rubber, 2 metal), shape (1 sphere, 2 cylinder, 3 cube), color (1 red, 2 cyan,
      3 green, 4 blue, 5 brown, 6 gray, 7 purple, 8 yellow) [n,11] uint8.
    """
    if not 1 <= min_objects <= max_objects <= 10:
        raise ValueError(f"need 1 <= min_objects <= max_objects <= 10, got {min_objects} and {max_objects}")
    drawn, block = [], 32  # scenes that share a random generator
    for start in range(0, count, block):
        rng = np.random.default_rng((*np.atleast_1d(seed), start))
        drawn.append(_draw(rng, rng.integers(min_objects, max_objects + 1, block)))
    scenes = {key: np.concatenate([part[key] for part in drawn])[:count] for key in drawn[0]}

    window = _CROP if crop else (0, 0) + _FRAME
    image = np.empty((count, resolution, resolution, 3), np.uint8)
    mask = np.empty((count, 11, resolution, resolution), np.uint8)
    batch = max(1, (2 ** 16 if torch.device(device).type == "cpu" else 2 ** 21) // resolution ** 2)
    for start in range(0, count, batch):
        part = {key: value[start:start + batch] for key, value in scenes.items()}
        image[start:start + batch], entity = _render(part, window, resolution, device)
        mask[start:start + batch] = entity[:, None] == np.arange(11)[:, None, None]

    camera, exists = scenes.pop("camera"), scenes["shape"] > 0
    del scenes["lamps"]
    coords = project(np.stack([scenes[key] for key in "xyz"], 2), camera[:, None])
    scale = resolution / np.array((window[2] - window[0], window[3] - window[1]))
    coords = np.concatenate(((coords[..., :2] - window[:2]) * scale, coords[..., 2:]), 2) * exists[..., None]
    padded = {key: np.pad(value, ((0, 0), (1, 0))) for key, value in scenes.items()}
    return {"image": image, "mask": mask, **padded,
            "pixel_coords": np.pad(coords, ((0, 0), (1, 0), (0, 0))).astype(np.float32),
            "visibility": np.pad(exists, ((0, 0), (1, 0)), constant_values=True).astype(np.float32)}
