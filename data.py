"""The datasets of the paper, real and generated, as uint8 batches on the device; and the project's files.

Real: DeepMind's multi_object_datasets (TFRecord files, read without TensorFlow) and the original CLEVR_v1.0.
Generated: look-alikes of Tetrominoes, Multi-dSprites and CLEVR, with masks and factors, that need no download.
"""

import contextlib
import gzip
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from PIL import Image

try:
    import fcntl
except ImportError:  # Windows: there two processes can build one cache, or train into one folder, at a time
    fcntl = None

# --- Scenes: what every dataset becomes, and the one way to a batch --------------------------------------------------


class Scenes:
    """One split of a dataset, in memory, mapped from the cache, or on the GPU.

    images [n, H, W, 3] uint8; labels [n, H, W] uint8: the entity that each pixel belongs to, 0 = background (None where
    there are no masks); targets [n, 10, 19] float32: see clevr_target. source: what they are, in words."""

    def __init__(self, images, labels=None, targets=None, source=""):
        arrays = {"image": images, "label": labels, "target": targets}
        self.arrays = {key: torch.as_tensor(array) for key, array in arrays.items() if array is not None}
        self.source = source

    def __len__(self):
        return len(self.arrays["image"])

    def to(self, device):
        """Moves the split to a GPU, if it fits there beside the model: then no batch waits for a copy."""
        size = sum(array.nbytes for array in self.arrays.values())
        if torch.device(device).type == "cuda" and size < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.arrays = {key: array.to(device) for key, array in self.arrays.items()}
        return self

    def batch(self, index, device="cpu"):
        """index [B] -> image [B, 3, H, W] float32 in [-1, 1], and of what the dataset has, label [B, H, W] uint8 and
        target [B, 10, 19]; all on the device."""
        index = put(index, self.arrays["image"].device)
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


def load(name, split, root="data", count=None, resolution=None, crop="paper", min_objects=0, max_objects=10):
    """The "train" or "eval" split of a dataset of DATA -> Scenes: its first `count` scenes with a number of objects in
    the range (of generated Multi-dSprites those in the range of the first `count`). The two splits share no scene.

    Real files are looked for under `root` and decoded once, into a cache beside them. Without them Tetrominoes and
    Multi-dSprites (on grey) are generated. crop, for CLEVR: "paper", the central square; "official", the window that
    the official code cuts out of CLEVR_v1.0; "none", the whole picture, made square. Raises OSError or ValueError."""
    stem, train_count, full_resolution = DATA[name]
    root, resolution = Path(root), resolution or full_resolution
    file, folder = root / f"{stem}.tfrecords", root / "CLEVR_v1.0"
    if file.exists():
        source, sources, scenes = stem, [file], tfrecords_scenes(file, resolution, crop)
    elif name == "clevr" and folder.exists():
        source, sources = folder.name, list(folder.glob("scenes/*.json"))
        scenes = clevr_v1_scenes(folder, resolution, crop)
    elif name in ("clevr", "multi_dsprites_on_colored"):
        raise FileNotFoundError(f"no {file} (see the README, Data); --data clevr_like and multi_dsprites need no files")
    else:
        return generate(name, split, root, count or train_count, resolution, crop, min_objects, max_objects)
    arrays = cached(root / "cache" / f"{source}-{resolution}-{crop}.pt", sources, scenes)
    index = choose(arrays.pop("objects"), split, train_count, count, min_objects, max_objects)
    arrays = {key: array[index] for key, array in arrays.items()}
    return Scenes(arrays["image"], arrays.get("label"), arrays.get("target"), source)


def choose(objects, split, train_count, count=None, min_objects=0, max_objects=10):
    """Numbers of objects [n] -> indices: the first `train_count` scenes are for training, those after them for
    evaluation (of a file with no more than those the last fifth), and of these the first `count` in the range."""
    n = len(objects)
    border = train_count if n > train_count else n - max(1, n // 5)
    index = torch.arange(border) if split == "train" else torch.arange(border, n)
    index = index[(objects[index] >= min_objects) & (objects[index] <= max_objects)][:count]
    if len(index) == 0:
        raise ValueError(f"the {split} split has no scene with {min_objects} to {max_objects} objects")
    return index


# --- CLEVR -----------------------------------------------------------------------------------------------------------

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
    for i, e in enumerate(np.flatnonzero(scene["size"])):  # not background, not padding
        target[i, :3] = (np.array([scene["x"][e], scene["y"][e], scene["z"][e]]) + 3) / 6  # IndexError: over 10 objects
        words = {key: names[int(scene[key][e]) - 1] for key, names in CLEVR_CODES.items()}
        target[i, 3:18] = [words[key] == name for key, names in CLEVR_TARGETS.items() for name in names]
        target[i, 18] = 1
    if not (np.abs(target[:, :3]) < 10).all():  # not a number, either
        raise ValueError("its coordinates are not CLEVR's")
    return target


def clevr_v1_scenes(folder, resolution, crop):
    """The scenes of the original CLEVR_v1.0 (480 x 320 PNGs, no masks): of its split train, then of val."""
    jobs = []
    for part in ("train", "val"):
        file = folder / f"scenes/CLEVR_{part}_scenes.json"
        if part == "val" and not file.exists():
            say(f"no {file}: the last fifth of the training scenes is held out instead")
            continue
        with reading(file):
            for scene in json.loads(file.read_bytes())["scenes"]:
                objects = scene["objects"]
                factors = {key: [0] + [names.index(o[key]) + 1 for o in objects]  # the background is first
                           for key, names in CLEVR_CODES.items()}
                places = [(0, 0, 0)] + [o["3d_coords"] for o in objects]
                factors["x"], factors["y"], factors["z"] = zip(*places, strict=True)
                jobs.append((folder / "images" / part / Path(scene["image_filename"]).name, clevr_target(factors)))

    def read(job):
        path, target = job
        image = resize(read_png(path), resolution, crop)
        return {"image": image[None], "target": target[None], "objects": np.uint8([target[:, 18].sum()])}

    yield from on_all_cores(read, jobs)


def read_png(path):
    """One of CLEVR_v1.0's pictures -> [H, W, 3] uint8, without the alpha channel."""
    with reading(path):
        Image.open(path, formats=["PNG"]).verify()  # the checksums, which reading the pixels leaves out
        return np.array(Image.open(path, formats=["PNG"]).convert("RGB"))


def resize(picture, resolution, crop="none"):
    """Crops and resizes as the official code does: [H, W, 3] uint8 bilinear without antialiasing, [H, W] uint8 (labels)
    to the nearest pixel -> [resolution, resolution(, 3)] uint8."""
    size = picture.shape[:2]
    if crop != "none":
        if size not in CLEVR_CROP:
            raise ValueError(f"a picture of {size[0]} x {size[1]} pixels is not CLEVR's, whose crop is known")
        top, bottom, left, right = CLEVR_CROP[(240, 320) if crop == "official" else size]
        picture = picture[top:bottom, left:right]
    x = torch.tensor(np.atleast_3d(picture)).permute(2, 0, 1)[None].float()               # [1, C, h, w]
    mode = "bilinear" if picture.ndim == 3 else "nearest-exact"
    x = F.interpolate(x, (resolution, resolution), mode=mode)[0].permute(1, 2, 0).round().byte().numpy()
    return x if picture.ndim == 3 else x[:, :, 0]


# --- TensorFlow's file formats, without TensorFlow: TFRecord (DeepMind's multi_object_datasets) and checkpoint -------

TFRECORDS = {  # name -> image [H, W, 3]; mask as stored; whether the entities come third there
    "tetrominoes": ((35, 35, 3), (4, 35, 35), False),
    "multi_dsprites_colored_on_grayscale": ((64, 64, 3), (64, 64, 6), True),
    "multi_dsprites_colored_on_colored": ((64, 64, 3), (64, 64, 5), True),
    "clevr_with_masks": ((240, 320, 3), (11, 240, 320), False),
}


def tfrecords_scenes(file, resolution, crop):
    """The scenes of one of DeepMind's files; of CLEVR's all, of the others' million the first 65,000."""
    is_clevr = file.stem.startswith("clevr")
    crop, limit = (crop, None) if is_clevr else ("none", 65_000)
    for scene in read_tfrecords(file, file.stem, limit):
        label = scene["mask"].argmax(0).astype(np.uint8)
        with reading(file):
            arrays = {"image": resize(scene["image"], resolution, crop)[None],
                      "label": resize(label, resolution, crop)[None],
                      "objects": np.uint8([round(float(scene["visibility"].sum())) - 1])}  # it counts the background
            if is_clevr:
                arrays["target"] = clevr_target(scene)[None]
        yield arrays


def read_tfrecords(path, name, limit=None):
    """The scenes of one of DeepMind's GZIP TFRecord files, one dict of arrays each, in the file's order.

    name: a key of TFRECORDS, with or without "_train". -> image [H, W, 3] uint8; mask [E, H, W] uint8 0/1, background
    first; the factors as stored, [E] or [E, 3], float32 or uint8. Raises ValueError for a damaged file or another."""
    image_shape, mask_shape, entities_third = TFRECORDS[name.removesuffix("_train")]
    number = 0
    with reading(path), gzip.open(path) as file:
        while number != limit and (header := file.read(12)):
            length = int.from_bytes(checked(header[:8], header[8:]), "little")
            scene = parse_example(file.read(length + 4)[:-4])
            mask = scene["mask"].reshape(mask_shape) != 0
            scene["mask"] = (mask.transpose(2, 0, 1) if entities_third else mask).astype(np.uint8)
            scene["image"] = scene["image"].reshape(image_shape)
            for key, array in scene.items():
                if array.size == 3 * len(scene["mask"]):
                    scene[key] = array.reshape(-1, 3)
            yield scene
            number += 1
        while file.read(2 ** 24):  # whatever the limit: GZIP's checksum is at the file's end
            pass
        if number == 0:
            raise EOFError("it holds no record")


def parse_example(record):
    """A serialised tf.train.Example -> {feature: flat array, uint8 or float32}."""
    scene = {}
    for entry in protobuf(protobuf(memoryview(record))[1][0])[1]:
        entry = protobuf(entry)
        name, feature = bytes(entry[1][0]).decode(), protobuf(entry[2][0])
        if 1 in feature:  # a BytesList of single bytes, each a message of its own: field 1, length 1, the byte
            array = np.frombuffer(feature[1][0], np.uint8).reshape(-1, 3)
            if (array[:, :2] != (10, 1)).any():
                raise ValueError("its byte strings are not single bytes")
            scene[name] = array[:, 2]
        else:
            scene[name] = np.frombuffer(protobuf(feature[2][0])[1][0], "<f4")
    return scene


def read_tf_checkpoint(prefix):
    """{key: float32 array} of a TensorFlow 2 checkpoint of one shard. PREFIX.index is a LevelDB table, uncompressed, of
    BundleEntry messages (tensor_bundle.proto), which say where in PREFIX.data-00000-of-00001 each array lies."""
    index, data = Path(f"{prefix}.index").read_bytes(), Path(f"{prefix}.data-00000-of-00001").read_bytes()

    def block(place):
        """The (key, value) pairs of one block: of each key what differs from the key before is stored."""
        offset, place = varint(place)
        end = offset + varint(place)[0] + 1
        buffer = checked(index[offset:end], index[end:end + 4])
        key, restarts = b"", int.from_bytes(buffer[-5:-1], "little")
        buffer = buffer[:len(buffer) - 5 - 4 * restarts]
        while buffer:
            shared, buffer = varint(buffer)
            unshared, buffer = varint(buffer)
            length, buffer = varint(buffer)
            key = key[:shared] + buffer[:unshared]
            yield key.decode(), buffer[unshared:unshared + length]
            buffer = buffer[unshared + length:]

    arrays = {}
    with reading(f"{prefix}.index"):
        _, footer = varint(index[-48:])  # first the place of the metaindex, two numbers that nobody needs
        _, footer = varint(footer)
        for _, place in block(footer):
            for key, value in block(place):
                entry = protobuf(value)
                if key and entry.get(1) == [1]:  # "" is the header; dtype 1 is float32
                    shape = [protobuf(dim).get(1, [0])[0] for dim in protobuf(entry[2][0]).get(2, [])]
                    offset, size = entry.get(4, [0])[0], entry[5][0]
                    array = checked(data[offset:offset + size], entry[6][0])
                    arrays[key] = np.frombuffer(array, "<f4").reshape(shape)
    return arrays


def protobuf(buffer):
    """A protobuf message -> {field: [values]}: numbers, or bytes still to be decoded."""
    fields = {}
    while buffer:
        tag, buffer = varint(buffer)
        if tag & 7 == 0:
            value, buffer = varint(buffer)
        else:
            size, buffer = (4, buffer) if tag & 7 == 5 else varint(buffer)  # four bytes, or the length first
            if size > len(buffer):
                raise ValueError("a message ends too early")
            value, buffer = buffer[:size], buffer[size:]
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def varint(buffer):
    """protobuf's variable-length number at the start of a buffer -> the number, the rest of the buffer."""
    number = 0
    for i in range(10):
        number |= (buffer[i] & 127) << 7 * i
        if buffer[i] < 128:
            return number, buffer[i + 1:]
    raise ValueError("a number has no end")


def checked(buffer, checksum):
    """A buffer whose checksum is right: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in buffer:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != int.from_bytes(checksum, "little"):
        raise ValueError("a checksum is wrong")
    return buffer


CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ 0x82F63B78 * (crc & 1) for crc in CRC_TABLE]

# --- Files: whole or absent, and none runs code ----------------------------------------------------------------------


def say(line, end="\n"):
    """A message on stderr, of the first process alone. A closed terminal or pipe is no reason to stop."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(line, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """What a person can mend, a file or a value, ends the program in one line, with exit code 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(2)


def lock(file, wait=False):
    """Locks an open file until it is closed or its process ends -> False if another process has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # a file system may have no locks
    return True


def open_log(path, text):
    """Opens and locks a run's log, and writes it anew from its checkpoint's: a killed run logged more than it saved."""
    if os.environ.get("RANK", "0") != "0":
        return open(os.devnull, "wb")
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "ab", buffering=0)
    if not lock(log):
        raise ValueError(f"another process is training into {path.parent}/: wait for it, or choose another --out")
    log.truncate(0)
    log.write(text.encode())
    return log


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary Path, which replaces `path` at the end: a kill, a full disk or an error leaves that alone."""
    part = path.with_name(f"part-{path.name}")  # the suffix stays: it says a figure's format
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise OSError(f"cannot write {path} ({str(error).splitlines()[0]}); what was there before is kept") from None
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path):
    """Turns whatever a damaged file raises into a ValueError of one line that names the file."""
    try:
        yield
    except Exception as error:  # PIL, torch and zipfile have many ways to say it
        if isinstance(error, OSError) and error.filename:  # missing, or not to be read
            raise
        raise ValueError(f"{path} is damaged or of another kind ({error!r:.100}); a cache can be deleted") from None


def read_file(path, mmap=False):
    """A checkpoint, file of weights or cache (.pt) -> its content; mmap: mapped, not copied. No code in it is run."""
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load checks no checksums
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def cached(path, sources, scenes):
    """Scenes, an iterator of {key: array [m, ...]} -> {key: tensor [n, ...]} of all, from the file at `path`; it is
    built if it is not there, or a source came since, whatever its date. Of several processes one builds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as file:
        lock(file, wait=True)
        if not path.exists() or any(path.stat().st_mtime < source.stat().st_ctime for source in sources):
            say(f"building {path} (once)")
            blocks = []
            for block in scenes:
                blocks.append(block)
                if len(blocks) % 100 == 0:
                    say(f"{sum(len(block['image']) for block in blocks):,} scenes", end="\r")
            if not any(len(block["image"]) for block in blocks):
                raise ValueError("there is no scene, or none with --min-objects to --max-objects")
            # What is joined is let go: the pictures of all of CLEVR, twice, are 10 GB.
            content = {key: torch.from_numpy(np.concatenate([block.pop(key) for block in blocks]))
                       for key in list(blocks[0])}
            with whole_file(path) as part:
                torch.save(content, part)
    return read_file(path, mmap=True)


def on_all_cores(function, jobs):
    """function(job) of each job, in order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each core has a job of its own: PyTorch's threads in it would only get in the way
    try:
        with ThreadPoolExecutor(cores) as pool:
            yield from pool.map(function, jobs)
    finally:
        torch.set_num_threads(threads)


# --- Generated scenes ------------------------------------------------------------------------------------------------

GENERATORS = 2  # another number whenever they draw other scenes: it is in the names of their caches


def generate(name, split, root, count, resolution, crop, min_objects, max_objects):
    """Scenes drawn by the rules of a dataset, through the cache, as `load`. The splits are the same in every run."""
    if name != "clevr_like":
        say(f"no {DATA[name][0]}.tfrecords in {root}/: {count:,} {split} scenes are generated by the same rules")
        if resolution != DATA[name][2]:
            raise ValueError(f"generated {name} come in one size: leave --resolution out")
    seed, size = 1 if split == "train" else 2, 32 if name == "clevr_like" else 1_000

    def draw(start):
        number, key = min(size, count - start), (seed, start)
        if name == "clevr_like":
            scenes = make_clevr_like(number, key, resolution, max(min_objects, 3), max_objects, crop != "none")
        else:
            make = make_tetrominoes if name == "tetrominoes" else make_multi_dsprites
            scenes = make(number, key)
        scenes["label"] = scenes["mask"].argmax(1).astype(np.uint8)
        objects = scenes["visibility"].sum(1) - 1
        keep = (objects >= min_objects) & (objects <= max_objects)
        return {key: scenes[key][keep] for key in ("image", "label", "target") if key in scenes}

    path = root / "cache" / f"{name}{GENERATORS}-{split}-{count}-{resolution}-{crop}-{min_objects}-{max_objects}.pt"
    arrays = cached(path, [], on_all_cores(draw, range(0, count, size)))
    return Scenes(arrays["image"], arrays["label"], arrays.get("target"), source=f"generated {name}")


# The 19 orientations of I, O, L, J, T, S and Z, rows from top to bottom.
TETROMINOES = """####     #/#/#/#  ##/##
                 #./#./## ###/#..  ##/.#/.# ..#/###  .#/.#/## #../###  ##/#./#. ###/..#
                 ###/.#.  .#/##/.# .#./###  #./##/#. .##/##.  #./##/.# ##./.##  .#/##/#.""".split()
TETROMINO_CELLS = np.array([np.argwhere([[cell == "#" for cell in line] for line in piece.split("/")])
                            for piece in TETROMINOES])  # [19, 4, 2]
TETROMINO_EXTENT = 5 * (TETROMINO_CELLS.max(axis=1) + 1)  # [19, 2], height and width in pixels
TETROMINO_COLORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
TETROMINO_TILE = np.array([[191, 255, 255, 255, 223]] + 3 * [[127, 159, 159, 159, 191]] + [[95, 63, 63, 63, 127]])


def make_tetrominoes(count, seed):
    """Scenes by the rules of DeepMind's Tetrominoes: three pieces of 19 orientations and six colours, at any pixel
    where they lie inside 35 x 35 and do not overlap, on black. The same (count, seed) gives the same scenes.

    -> image [n, 35, 35, 3] uint8; mask [n, 4, 35, 35] uint8 0/1; factors [n, 4]: shape (1 to 19), x, y (the bounding
    box's left and top pixel), visibility (1: all are there); color [n, 4, 3] (RGB, 0/1). The background is first."""
    rng = np.random.default_rng(seed)
    piece, corner = np.empty((count, 3), int), np.empty((count, 3, 2), int)
    todo = np.arange(count)
    while len(todo):  # draw three pieces at once, until none overlap: uniform over the scenes that are allowed
        piece[todo] = rng.integers(len(TETROMINOES), size=(len(todo), 3))
        corner[todo] = rng.integers(35 - TETROMINO_EXTENT[piece[todo]] + 1)               # [m, 3, 2]
        cells = corner[todo][:, :, None] + 5 * TETROMINO_CELLS[piece[todo]]               # [m, 3, 4, 2]
        gaps = np.abs(cells[:, [0, 0, 1], :, None] - cells[:, [1, 2, 2], None, :])        # [m, 3 pairs, 4, 4, 2]
        todo = todo[(gaps < 5).all(axis=-1).any(axis=(1, 2, 3))]
    color = TETROMINO_COLORS[rng.integers(len(TETROMINO_COLORS), size=(count, 3))]
    image, mask = draw_tetrominoes(piece, corner, color)
    factors = {"shape": piece + 1, "color": color, "x": corner[..., 1], "y": corner[..., 0]}
    factors = {key: np.insert(value, 0, 0, axis=1) for key, value in factors.items()}
    return {"image": image, "mask": mask, **factors, "visibility": np.ones((count, 4))}


def draw_tetrominoes(piece, corner, color):
    """piece [n, 3] (0 to 18), corner [n, 3, 2] (top, left), color [n, 3, 3] -> image and mask, as make_tetrominoes."""
    count = len(corner)
    image, label = np.zeros((count, 35, 35, 3), np.uint8), np.zeros((count, 35, 35), np.uint8)
    cells = (corner[:, :, None] + 5 * TETROMINO_CELLS[piece])[..., None, None]            # [n, 3, 4, 2, 1, 1]
    scenes, pixels = np.arange(count)[:, None, None, None], np.arange(5)
    for p in range(3):
        rows, cols = cells[:, p, :, 0] + pixels[:, None], cells[:, p, :, 1] + pixels      # [n, 4, 5, 1], [n, 4, 1, 5]
        image[scenes, rows, cols] = TETROMINO_TILE[:, :, None] * color[:, p, None, None, None]
        label[scenes, rows, cols] = p + 1
    return image, (label[:, None] == np.arange(4, dtype=np.uint8)[:, None, None]).view(np.uint8)


def make_moving_tetrominoes(frames, seed, speed=2.0):
    """A clip that begins with such a scene. Each piece moves `speed` pixels a frame in a direction of its own, is
    thrown back by the border, and passes over or under the others. -> image [F, 35, 35, 3] uint8"""
    scene, rng = make_tetrominoes(1, seed), np.random.default_rng(seed)
    piece = scene["shape"][:, 1:] - 1                                                     # [1, 3]
    start = np.stack([scene["y"], scene["x"]], axis=-1)[:, 1:]                            # [1, 3, 2]
    angle = rng.uniform(0, 2 * np.pi, (1, 3))
    way = np.arange(frames)[:, None, None] * speed * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    room = 35 - TETROMINO_EXTENT[piece]
    corner = np.abs((start + way + room) % (2 * room) - room)                             # [F, 3, 2], a triangle wave
    return draw_tetrominoes(piece, corner.round().astype(int), scene["color"][:, 1:])[0]


DSPRITES_SCALES, DSPRITES_ORIENTATIONS = np.linspace(0.5, 1, 6), np.linspace(0, 2 * np.pi, 40)


def make_multi_dsprites(count, seed):
    """Scenes after DeepMind's Multi-dSprites, colored_on_grayscale: 2 to 5 sprites (6 scales, 40 orientations, 32 x 32
    positions), the later over the earlier, on grey. The same (count, seed) gives the same scenes.

    -> image [n, 64, 64, 3] uint8; mask [n, 6, 64, 64] uint8 0/1, background first; factors [n, 6], padded with zeros:
    shape (1 square, 2 ellipse, 3 heart), scale, orientation (radians), x, y (0 to 1), visibility; color [n, 6, 3]."""
    rng = np.random.default_rng(seed)
    there = np.arange(5) < rng.integers(2, 6, (count, 1))                                 # [n, 5]
    shape, scale, turn, row, col = (rng.integers(size, size=(count, 5)) for size in (3, 6, 40, 32, 32))
    hsv = np.stack([rng.random((count, 5)), *rng.uniform(0.5, 1, (2, count, 5))], axis=-1)
    palette = np.concatenate([rng.random((count, 1, 1)).repeat(3, 2), hsv_to_rgb(hsv)], axis=1)        # [n, 6, 3]

    label, pixels = np.zeros((count, 64, 64), np.uint8), np.arange(64) - 16
    for s in range(5):  # the painter's order
        angle, size = DSPRITES_ORIENTATIONS[turn[:, s, None, None]], 12 * DSPRITES_SCALES[scale[:, s, None, None]]
        y, x = pixels[:, None] - row[:, s, None, None], pixels - col[:, s, None, None]    # [n, 64, 1], [n, 1, 64]
        u = (np.cos(angle) * x + np.sin(angle) * y) / size                                # [n, 64, 64]
        v = (np.cos(angle) * y - np.sin(angle) * x) / size
        square = np.maximum(np.abs(u), np.abs(v)) < 0.8
        ellipse = u ** 2 + (v / 0.6) ** 2 < 1
        heart = u ** 2 + (-1.2 * v + 0.1 - 0.75 * np.sqrt(np.abs(u))) ** 2 < 0.9
        label[np.choose(shape[:, s, None, None], [square, ellipse, heart]) & there[:, s, None, None]] = s + 1
    image = (palette * 255).round().astype(np.uint8)[np.arange(count)[:, None, None], label]

    factors = {"shape": shape + 1, "scale": DSPRITES_SCALES[scale], "orientation": DSPRITES_ORIENTATIONS[turn],
               "x": col / 31, "y": row / 31}
    factors = {key: np.insert(np.where(there, value, 0), 0, 0, axis=1) for key, value in factors.items()}
    visibility = np.insert(there, 0, True, axis=1)
    return {"image": image, "mask": (label[:, None] == np.arange(6, dtype=np.uint8)[:, None, None]).view(np.uint8),
            **factors, "visibility": visibility.astype(float), "color": palette * visibility[..., None]}


# --- CLEVR look-alike, ray-cast --------------------------------------------------------------------------------------

# By code; 0 is no object. A size is a radius, half a height, half a side; a color is linear albedo.
CLEVR_SIZES = np.array([1, 0.7, 0.35], np.float32)
CLEVR_COLORS = np.array([[255, 255, 255], [173, 35, 35], [41, 208, 208], [29, 105, 20], [42, 75, 215], [129, 74, 25],
                         [87, 87, 87], [129, 38, 192], [255, 238, 51]])
# Six limits of each solid, in which |ball * point| <= 1 and on each axis |box * point| <= 1 (0: no limit): sphere,
# cylinder, cube whose corners a ball cuts off. Their radii squared, and 1% more.
CLEVR_SOLIDS = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0.62, 0.62, 0.62, 1, 1, 1]])
CLEVR_REACH = np.array([-np.inf, 1.01, 2.02, 2.63])
# The mean camera, aimed at the origin, and its focal length (pixels of the 480 x 320 frame) fit the pixel_coords of
# CLEVR_v1.0; power of key, fill and back lamp and ambient light fit bare ground.
CLEVR_CAMERA, CLEVR_FOCAL = np.array([7.481, -6.508, 5.344]), 525
CLEVR_LAMPS = np.array([[6.447, -2.905, 4.258], [-4.671, -4.014, 3.011], [-1.168, 2.646, 5.816]])
CLEVR_POWER, CLEVR_AMBIENT = np.array([[5.75, 5.32, 4.63], [1.20, 1.31, 1.66], [2.60, 2.54, 2.49]]), 0.135


def camera_axes(camera):
    """Right, down and ahead of a camera [3] that is aimed at the origin: [3, 3]."""
    ahead = -camera / np.linalg.norm(camera)
    right = np.array([ahead[1], -ahead[0], 0]) / np.hypot(ahead[0], ahead[1])
    return np.stack([right, np.cross(ahead, right), ahead])


def project(points, camera=CLEVR_CAMERA):
    """CLEVR's 3d_coords [..., 3] -> column, row (in the 480 x 320 frame), depth [..., 3], seen from `camera` [3]."""
    view = (points - camera) @ camera_axes(camera).T
    return np.concatenate([view[..., :2] / view[..., 2:] * CLEVR_FOCAL + (240, 160), view[..., 2:]], -1)


def pixel_centers(top, bottom, left, right, rows, columns):
    """A part of the frame, divided into pixels -> column and row in the frame of centers [R, 2]."""
    y = top + (torch.arange(rows) + 0.5) * (bottom - top) / rows
    x = left + (torch.arange(columns) + 0.5) * (right - left) / columns
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], 1)


def dot(a, b):
    return (a * b).sum(-1, keepdim=True)


def apply(matrix, vector):
    return (matrix * vector[:, None]).sum(2)


class ClevrScene:
    """One scene, and what R rays see in it. Its E entities begin with the ground."""

    def __init__(self, factors, camera, lamps):
        there = factors["visibility"] > 0
        x, y, angle, size, shape, color, material = (
            factors[key][there] for key in ("x", "y", "rotation", "size", "shape", "color", "material"))
        size, cos, sin, zero = CLEVR_SIZES[size], np.cos(angle), np.sin(angle), np.zeros_like(angle)
        turn = np.stack([cos, sin, zero, -sin, cos, zero, zero, zero, zero + 1], 1).reshape(-1, 3, 3)
        solid = (CLEVR_SOLIDS[shape] / size[:, None])[:, :, None] * np.tile(turn, (1, 2, 1))  # [E, 6, 3]
        arrays = (camera, camera_axes(camera), lamps, CLEVR_POWER, CLEVR_COLORS[color] / 255, material == 2,
                  np.stack([x, y, size], 1), CLEVR_REACH[shape] * size ** 2, solid)
        (self.camera, self.axes, self.lamps, self.power, self.albedo, self.metal, self.center, self.reach,
         self.solid) = (torch.as_tensor(array, dtype=torch.float32) for array in arrays)

    def camera_rays(self, pixel):
        """Pixels [R, 2] -> the origins and unit directions [R, 3] of the rays through them."""
        right, down, ahead = self.axes
        x, y = ((pixel - pixel.new_tensor([240, 160])) / CLEVR_FOCAL).split(1, 1)
        direction = F.normalize(x * right + y * down + ahead, dim=1)
        return self.camera.expand_as(direction), direction

    def intersect(self, origin, direction):
        """How far rays go before each solid (inf: past it), and then inside it: [R, E] each."""
        # A closer look only at the Q pairs of a ray and a solid whose bounding sphere it meets.
        along = direction @ self.center.T - dot(origin, direction)                 # [R, E]
        square = dot(origin, origin) - 2 * origin @ self.center.T + dot(self.center, self.center).T
        ray, entity = ((along > 0) & (square - along ** 2 < self.reach)).nonzero(as_tuple=True)
        p, q = apply(self.solid[entity], origin[ray] - self.center[entity]).split(3, 1)     # [Q, 3] each
        d, e = apply(self.solid[entity], direction[ray]).split(3, 1)
        # In the ball from when to when |p + time * d| = 1; in the box |q + time * e| = 1, by axis.
        a, b, c = dot(d, d).clamp(min=1e-9), dot(p, d), dot(p, p) - 1
        root = (b ** 2 - a * c).clamp(min=0).sqrt()
        one, other = (-1 - q) / e, (1 - q) / e
        enter = torch.cat([(-b - root) / a, torch.minimum(one, other)], 1).amax(1)
        leave = torch.cat([(-b + root) / a, torch.maximum(one, other)], 1).amin(1)
        hit = (enter > 0.001) & (enter < leave)  # not the solid whose surface a ray begins on
        before, inside = torch.full_like(along, torch.inf), torch.zeros_like(along)
        before[ray, entity] = torch.where(hit, enter, torch.inf)
        inside[ray, entity] = torch.where(hit, leave - enter, 0)
        return before, inside

    def shade(self, origin, direction, mirrors=True):
        """What rays see: linear color [R, 3] and entity [R]. mirrors=False: metal as rubber."""
        distance, _ = self.intersect(origin, direction)
        distance[:, 0] = origin[:, 2] / (-direction[:, 2]).clamp(min=0.001)  # sky: far ground
        distance, entity = distance.min(1)
        position = origin + distance[:, None] * direction
        # Of the surface |ball * point| ** 16 + sum((box * point) ** 16) = 1: edges look round.
        p, q = apply(self.solid[entity], position - self.center[entity]).split(3, 1)
        gradient = torch.cat([p * dot(p, p) ** 7, q ** 15], 1)                     # [R, 6]
        normal = F.normalize(apply(self.solid[entity].mT, gradient), dim=1)
        normal[entity == 0] = normal.new_tensor([0, 0, 1])
        mirrored = direction - 2 * dot(direction, normal) * normal
        sky = torch.exp(-direction[:, 2:].clamp(min=0) / 0.07)  # it darkens from the horizon up
        light = CLEVR_AMBIENT * torch.where(entity[:, None] > 0, 1, sky)
        gloss = 0
        for lamp, power in zip(self.lamps, self.power):
            to_lamp = lamp - position
            distance = dot(to_lamp, to_lamp).sqrt()
            to_lamp = to_lamp / distance
            # Soft shadows: lamps have a size, so where a solid is thin, they look over its edge.
            before, inside = self.intersect(position, to_lamp)
            power = power * (1 - 2 * inside / before).amin(1, keepdim=True).clamp(min=0)
            power = power * dot(to_lamp, F.normalize(lamp, dim=0)).clamp(min=0)  # the lamps face the origin
            light = light + power * dot(to_lamp, normal).clamp(min=0) / distance ** 2
            gloss = gloss + power * dot(to_lamp, mirrored).clamp(min=0) ** 100
        color = self.albedo[entity] * light
        if mirrors:
            metal = self.metal[entity] > 0
            seen, _ = self.shade(position[metal], mirrored[metal], mirrors=False)
            color[metal] = self.albedo[entity[metal]] * (seen + gloss[metal] + 0.2 * light[metal])
        return color, entity

    def render(self, window, resolution):
        """A window of the frame as for `pixel_centers` -> image [H, W, 3] uint8, entity [H, W]."""
        pixel = pixel_centers(*window, resolution, resolution)
        color, entity = self.shade(*self.camera_rays(pixel))
        picture = color.clamp(max=1) ** (1 / 2.2)
        # Antialiasing: three rays for each pixel that differs from a neighbor.
        grid = picture.T.view(3, resolution, resolution)
        edge = (F.max_pool2d(grid, 3, 1, 1) + F.max_pool2d(-grid, 3, 1, 1) > 0.25).any(0).flatten()
        size = (pixel[-1] - pixel[0]) / (resolution - 1)
        pixel = pixel[edge, None] + size * pixel.new_tensor([[-1, 0], [0, 1], [1, -1]]) / 3  # [r, 3, 2]
        color, _ = self.shade(*self.camera_rays(pixel.flatten(0, 1)))
        picture[edge] = color.view(-1, 3, 3).clamp(max=1).mean(1) ** (1 / 2.2)
        image = (255 * picture).round().byte().view(resolution, resolution, 3)
        return image.numpy(), entity.view(resolution, resolution).numpy()


def draw_clevr_scene(rng, number):
    """By the rules of CLEVR's generator: factors [11] (background first), camera [3] and the ClevrScene of them. As
    there, all begins anew if an object finds no place or shows under 200 pixels of 240 x 320."""
    camera, lamps = CLEVR_CAMERA + rng.uniform(-0.5, 0.5, 3), CLEVR_LAMPS + rng.uniform(-1, 1, (3, 3))
    x, y = camera[:2] / np.hypot(camera[0], camera[1])
    ahead_and_aside = np.array([[x, -y], [y, x]])
    factors = {key: rng.integers(1, len(names) + 1, number, np.uint8) for key, names in CLEVR_CODES.items()}
    size, place = CLEVR_SIZES[factors["size"]], np.zeros((number, 2), np.float32)
    for i in range(number):
        trials = rng.uniform(-3, 3, (50, 2))
        step = trials[:, None] - place[:i]                                         # [50, i, 2]
        gap = np.linalg.norm(step, axis=2) - size[:i] - size[i]
        fits = ((gap > 0.25) & (np.abs(step @ ahead_and_aside) > 0.4).all(2)).all(1)
        if not fits.any():
            return draw_clevr_scene(rng, number)
        place[i] = trials[fits.argmax()]
    factors.update(x=place[:, 0], y=place[:, 1], z=size, rotation=np.float32(rng.uniform(0, 360, number)))
    factors = {key: np.pad(values, (1, 10 - number)) for key, values in factors.items()}
    factors["visibility"] = np.float32(np.arange(11) <= number)
    scene = ClevrScene(factors, camera, lamps)
    distance, _ = scene.intersect(*scene.camera_rays(pixel_centers(0, 320, 0, 480, 40, 60)))
    distance[:, 0] = 100  # the ground, behind all objects
    seen = torch.bincount(distance.argmin(1), minlength=number + 1)
    if seen.min() < 200 / (240 * 320) * len(distance):
        return draw_clevr_scene(rng, number)
    return factors, camera, scene


def make_clevr_like(count, seed, resolution=128, min_objects=3, max_objects=10, crop=True):
    """Scenes after CLEVR (Johnson et al. 2017), in the layout of DeepMind's CLEVR with masks. Scene i depends on seed,
    numbers of objects and i, not on count. crop: the central square, in which objects may be cut or missing, as object
    discovery sees them; else the whole frame, made square.

    -> image [n, H, W, 3] uint8; mask [n, 11, H, W] uint8 0/1, background first; target [n, 10, 19], see clevr_target;
    factors [n, 11], padded with zeros: x, y, z (3d_coords), rotation (0 to 360; drawn as if in radians, as CLEVR does),
    visibility (1: is there), size, material, shape, color (from 1 as in CLEVR_CODES); pixel_coords [n, 11, 3]: column
    and row of the center in the picture, whose pixel j spans [j, j + 1], and depth."""
    if not 1 <= min_objects <= max_objects <= 10:
        raise ValueError(f"need 1 <= min_objects <= max_objects <= 10, got {min_objects} and {max_objects}")
    top, bottom, left, right = window = CLEVR_CROP[320, 480] if crop else (0, 320, 0, 480)
    scenes = []
    for i in range(count):
        rng = np.random.default_rng((*np.atleast_1d(seed), i))
        factors, camera, scene = draw_clevr_scene(rng, rng.integers(min_objects, max_objects + 1))
        image, entity = scene.render(window, resolution)
        coords = project(np.stack([factors["x"], factors["y"], factors["z"]], 1), camera)    # [11, 3]
        coords = (coords - (left, top, 0)) * (resolution / (right - left), resolution / (bottom - top), 1)
        coords[factors["shape"] == 0] = 0
        scenes.append({"image": image, "mask": np.uint8(entity == np.arange(11)[:, None, None]), **factors,
                       "pixel_coords": np.float32(coords), "target": clevr_target(factors)})
    return {key: np.stack([scene[key] for scene in scenes]) for key in scenes[0]}
