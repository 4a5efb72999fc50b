"""The datasets of the paper, real and generated, as uint8 batches on the device.

Real: DeepMind's multi_object_datasets (TFRecord files, read without TensorFlow) and the original CLEVR_v1.0.
Generated: look-alikes of each, made in seconds and in need of no download, with masks and factors.
"""

import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

# ---------------------------------------------------------------------------------------------------------------------
# Scenes: what every dataset becomes, and the one way to a batch
# ---------------------------------------------------------------------------------------------------------------------


class Scenes:
    """One split of a dataset: uint8 arrays, in memory or mapped from the cache, or on the GPU.

    image [n, H, W, 3] uint8; label [n, H, W] uint8, the entity that each pixel belongs to, 0 = background (None for the
    original CLEVR, which has no masks); target [n, 10, 19] float32 (CLEVR only, see `clevr_target`).
    index: which of them make up the split; all if not given."""

    def __init__(self, image, label=None, target=None, index=None):
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
        return Scenes(**{key: array[self.index].to(device) for key, array in self.arrays.items()})

    def batch(self, index, device="cpu"):
        """index [B] within the split -> image [B, 3, H, W] float32 in [-1, 1], channels last in memory; and of what the
        dataset has, label [B, H, W] uint8 and target [B, 10, 19]; all on the device."""
        index = self.index[index]
        batch = {key: array[index.to(array.device)].to(device, non_blocking=True) for key, array in self.arrays.items()}
        batch["image"] = batch["image"].permute(0, 3, 1, 2).float().mul_(2 / 255).sub_(1)
        return batch


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

    Real files are looked for under `root` and decoded once, into a cache beside them. Without them every set but "clevr" is
    generated. count: so many scenes at most. min_objects, max_objects: only scenes with so many objects.
    crop, for CLEVR: "paper", the central square; "official", the window that the official code cuts out of CLEVR_v1.0;
    "none", the whole picture, made square (the set prediction task).
    Raises OSError or ValueError, with a line that says what to do."""
    stem, train_count, full_resolution = DATA[name]
    root, resolution = Path(root), resolution or full_resolution
    file = stem and root / f"{stem}.tfrecords"
    if name == "clevr" and not file.exists():
        return load_clevr_v1(split, root, count, resolution, crop, min_objects, max_objects, download)
    if file is None or not file.exists():
        return generate(name, split, root, count or train_count, resolution, crop, min_objects, max_objects)

    def prepare(scene):
        return {"image": resize(scene["image"], resolution, crop if name == "clevr" else "none"),
                "label": resize(scene["mask"].argmax(0).astype(np.uint8), resolution, crop if name == "clevr" else "none"),
                "objects": np.uint8(round(scene["visibility"].sum()) - 1),  # visibility counts the background
                **({"target": clevr_target(scene)} if name == "clevr" else {})}

    limit = 100_000 if name == "clevr" else train_count + 5_000  # the two others have a million
    arrays = cached(root / "cache" / f"{name}-{resolution}", [str(file), stamp(file), resolution, crop],
                    islice(read_tfrecords(file, stem), limit), prepare)
    return Scenes(**arrays, index=choose(arrays.pop("objects"), split, train_count, count, min_objects, max_objects))


def choose(objects, split, train_count, count, min_objects, max_objects):
    """The indices of a split: the first `train_count` scenes are for training, those after them for evaluation (of a file
    of fewer scenes the last fifth), and of these the first `count` with a number of `objects` [n] in the range."""
    n = len(objects)
    border = min(train_count, n - max(1, n // 5))
    index = np.arange(border) if split == "train" else np.arange(border, n)
    index = index[(objects[index] >= min_objects) & (objects[index] <= max_objects)][:count]
    if len(index) == 0:
        raise ValueError(f"the {split} split has no scene with {min_objects} to {max_objects} objects")
    return index


# ---------------------------------------------------------------------------------------------------------------------
# DeepMind's multi_object_datasets: TFRecord files, without TensorFlow
# ---------------------------------------------------------------------------------------------------------------------

TFRECORDS = {  # name -> image [H, W, 3]; mask as stored; whether the entities come third there
    "tetrominoes": ((35, 35, 3), (4, 35, 35), False),
    "multi_dsprites_colored_on_grayscale": ((64, 64, 3), (64, 64, 6), True),
    "multi_dsprites_colored_on_colored": ((64, 64, 3), (64, 64, 5), True),
    "clevr_with_masks": ((240, 320, 3), (11, 240, 320), False),
}


def read_tfrecords(path, name):
    """The scenes of one of DeepMind's GZIP TFRecord files, one dict of arrays each, in the file's order.

    name: a key of TFRECORDS; "_train" after it is ignored. -> image [H, W, 3] uint8; mask [E, H, W] uint8 0/1, background
    first; the factors as stored, [E] or [E, 3], float32 or uint8. One record is in memory at a time.
    A length's checksum is checked; of the content GZIP's own is (a record's second checksum is not: in Python it would
    cost more than all the rest). Raises ValueError naming file and record where the file is truncated, damaged or another.
    """
    image_shape, mask_shape, entities_third = TFRECORDS[name.removesuffix("_train")]
    number = 0
    try:
        with gzip.open(path) as file:
            while header := file.read(12):
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
    except (ValueError, KeyError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, record {number}: damaged, cut short or not {name} ({error}); get the file again") from None
    if number == 0:
        raise ValueError(f"{path} holds no record; get the file again")


def parse_example(record):
    """A serialised tf.train.Example -> {feature: flat array}, uint8 of a BytesList of single bytes, float32 of a FloatList.
    """
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
            if byte < 128:
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
# Rows and columns of the central square, by the picture's size: the paper's, and the physically equal one of CLEVR_v1.0.
CLEVR_CROP = {(240, 320): (29, 221, 64, 256), (320, 480): (24, 312, 96, 384)}


def clevr_target(scene):
    """The factors of one scene as in clevr_with_masks (background first, codes from 1) -> target [10, 19] float32:
    (3d_coords + 3) / 6, one-hot size, material, shape and colour, 1 for a real object; rows of zeros after them."""
    target = np.zeros((10, 19), np.float32)
    objects = np.flatnonzero(scene["size"])  # neither background nor padding
    for row, e in enumerate(objects):
        target[row, :3] = (np.array([scene["x"][e], scene["y"][e], scene["z"][e]]) + 3) / 6
        start = 3
        for key, names in CLEVR_TARGETS.items():
            target[row, start + names.index(CLEVR_CODES[key][int(scene[key][e]) - 1])] = 1
            start += len(names)
        target[row, 18] = 1
    return target


def load_clevr_v1(split, root, count, resolution, crop, min_objects, max_objects, download):
    """The original CLEVR_v1.0 (480 x 320 PNGs and scenes files, no masks): the splits train and val, one after the other."""
    folder = next((f for f in (root / "CLEVR_v1.0", root / "clevr" / "CLEVR_v1.0") if f.exists()), None)
    if folder is None and download:
        say(f"downloading CLEVR_v1.0 into {root / 'clevr'}: 18 GB, and as much again to unpack")
        torchvision.datasets.CLEVRClassification(root, download=True)
        folder = root / "clevr" / "CLEVR_v1.0"
    if folder is None:
        raise FileNotFoundError(
            f"no CLEVR in {root}/: put clevr_with_masks_train.tfrecords there (10.5 GB, with masks; from {BUCKET}/"
            "clevr_with_masks/), or add --download to fetch CLEVR_v1.0 (18 GB, no masks); --data clevr_like needs no files")

    scenes, stamps = [], []
    for part in ("train", "val"):
        file = folder / "scenes" / f"CLEVR_{part}_scenes.json"
        if part == "train" or file.exists():
            try:
                scenes += [(folder / "images" / part / scene["image_filename"], scene["objects"])
                           for scene in json.loads(file.read_text())["scenes"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: damaged or not a CLEVR scenes file ({error})") from None
            stamps.append(stamp(file))

    def prepare(scene):
        path, objects = scene
        try:
            image = torchvision.io.decode_image(torchvision.io.read_file(str(path)), torchvision.io.ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(f"{path}: missing, or damaged ({str(error).splitlines()[0]})") from None
        factors = {key: [0] + [names.index(o[key]) + 1 for o in objects] for key, names in CLEVR_CODES.items()}
        factors.update({axis: [0] + [o["3d_coords"][i] for o in objects] for i, axis in enumerate("xyz")})
        return {"image": resize(image.permute(1, 2, 0).numpy(), resolution, crop),
                "objects": np.uint8(len(objects)), "target": clevr_target({k: np.array(v) for k, v in factors.items()})}

    arrays = cached(root / "cache" / f"clevr_v1-{resolution}", [str(folder), *stamps, resolution, crop], scenes, prepare)
    objects = arrays.pop("objects")
    return Scenes(**arrays, index=choose(objects, split, DATA["clevr"][1], count, min_objects, max_objects))


def resize(picture, resolution, crop="none"):
    """Crops and resizes as the official code does: [H, W, 3] uint8 bilinear without antialiasing, [H, W] uint8 (labels) to
    the nearest pixel -> [resolution, resolution(, 3)] uint8."""
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
    print(line, end=end, file=sys.stderr, flush=True)


def stamp(file):
    """Changes when the file does."""
    stat = Path(file).stat()
    return [stat.st_size, stat.st_mtime_ns]


def cached(folder, settings, scenes, prepare):
    """Maps {key: [n, ...]} from FOLDER-HASH, which is made first if need be from prepare(scene) -> {key: array} of every
    scene, on all cores. The hash is of the settings: another source or setting is another folder.
    A folder is complete or does not exist: it is written under another name, and renamed at the end."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = folder.with_name(f"{folder.name}-{digest}")
    if not folder.exists():
        say(f"building the cache {folder} (once)")
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write_cache(part, scenes, prepare)
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {}
        for key, (dtype, shape) in meta.items():
            file = folder / f"{key}.bin"
            if file.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
                raise ValueError(f"{file.name} has the wrong size")
            arrays[key] = np.memmap(file, dtype, "c", shape=tuple(shape))
        return arrays
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the cache {folder} is damaged ({error}): delete it, and it will be built again") from None


def write_cache(folder, scenes, prepare):
    files, meta, count, start = {}, {}, 0, time.time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is over scenes; PyTorch's own under it would only add strife
    try:
        with ThreadPoolExecutor(threads) as pool:
            scenes = iter(scenes)
            while batch := list(islice(scenes, 16 * threads)):
                for arrays in pool.map(prepare, batch):
                    for key, array in arrays.items():
                        array = np.asarray(array)
                        if key not in files:
                            files[key] = open(folder / f"{key}.bin", "wb")
                            meta[key] = [str(array.dtype), array.shape]
                        files[key].write(array.tobytes())
                    count += 1
                if sys.stderr.isatty():
                    say(f"\r{count:,} scenes, {count / (time.time() - start):,.0f}/s", end="")
    finally:
        torch.set_num_threads(threads)
        for file in files.values():
            file.close()
    meta = {key: [dtype, [count, *shape]] for key, (dtype, shape) in meta.items()}
    (folder / "meta.json").write_text(json.dumps(meta))
    say(f"\r{count:,} scenes in {time.time() - start:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Generated scenes
# ---------------------------------------------------------------------------------------------------------------------

SPLIT_SEEDS = {"train": 1, "eval": 2}  # of the generated sets: the splits are the same in every run


def generate(name, split, root, count, resolution, crop, min_objects, max_objects):
    """Scenes by the law of a dataset, from the functions below."""
    seed = SPLIT_SEEDS[split]
    if name == "tetrominoes":
        say(f"tetrominoes: no file in {root}/, so {count:,} scenes are generated by the same law")
        scenes = make_tetrominoes(count, seed)
        return Scenes(scenes["image"], scenes["mask"].argmax(1).astype(np.uint8))
    raise ValueError(f"{name}: not here yet")


# The 19 orientations of I, O, L, J, T, S and Z: four cells each, rows from top to bottom.
TETROMINOES = [[(row, col) for row, line in enumerate(piece.split("/")) for col, cell in enumerate(line) if cell == "#"]
               for piece in """####  #/#/#/#  ##/##
                               #./#./##  ###/#..  ##/.#/.#  ..#/###
                               .#/.#/##  #../###  ##/#./#.  ###/..#
                               ###/.#.  .#/##/.#  .#./###  #./##/#.
                               .##/##.  #./##/.#  ##./.##  .#/##/#.""".split()]
TETROMINO_CELLS = np.array(TETROMINOES)  # [19, 4, 2]
TETROMINO_COLORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
TETROMINO_TILE = np.array([[191, 255, 255, 255, 223]] + 3 * [[127, 159, 159, 159, 191]] + [[95, 63, 63, 63, 127]])


def make_tetrominoes(count, seed):
    """Scenes by the law of DeepMind's Tetrominoes: three pieces of 19 orientations and six colours, at any pixel where
    they lie inside 35 x 35 and do not overlap, on black. The same (count, seed) gives the same scenes.

    -> image [n, 35, 35, 3] uint8; mask [n, 4, 35, 35] uint8 0/1, background first; factors of float32 with the background
    first: shape [n, 4] (1 to 19 in the order of TETROMINOES), x, y [n, 4] (centre of the piece's bounding box, in pixels),
    color [n, 4, 3] (RGB, 0/1), visibility [n, 4] (1: all are there)."""
    rng = np.random.default_rng(seed)
    piece, corner = np.empty((count, 3), int), np.empty((count, 3, 2), int)
    todo = np.arange(count)
    while len(todo):  # draw three pieces at once, until none overlap: uniform over the scenes that are allowed
        piece[todo] = rng.integers(len(TETROMINOES), size=(len(todo), 3))
        extent = 5 * (TETROMINO_CELLS.max(axis=1) + 1)[piece[todo]]                # [m, 3, 2]
        corner[todo] = rng.integers(35 - extent + 1)
        cells = corner[todo][:, :, None] + 5 * TETROMINO_CELLS[piece[todo]]        # [m, 3, 4, 2], each cell's top left
        gaps = np.abs(cells[:, [0, 0, 1], :, None] - cells[:, [1, 2, 2], None, :])  # [m, 3 pairs, 4, 4, 2]
        todo = todo[(gaps < 5).all(axis=-1).any(axis=(1, 2, 3))]
    color = TETROMINO_COLORS[rng.integers(len(TETROMINO_COLORS), size=(count, 3))]
    image, mask = draw_tetrominoes(piece, corner, color)

    def with_background(values, background):
        return np.concatenate([np.full_like(values[:, :1], background), values], axis=1).astype(np.float32)

    center = corner + (5 * (TETROMINO_CELLS.max(axis=1) + 1)[piece] - 1) / 2
    return {"image": image, "mask": mask, "shape": with_background(piece + 1, 0), "color": with_background(color, 0),
            "x": with_background(center[..., 1], 0), "y": with_background(center[..., 0], 0),
            "visibility": np.ones((count, 4), np.float32)}


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
