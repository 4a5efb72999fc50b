"""Datasets, real and generated, as batches on the device; and the files of the project.

Real: DeepMind's multi_object_datasets (TFRecord files, read without TensorFlow), the original
CLEVR_v1.0, anybody's folder of pictures. Generated, with masks: Tetrominoes, Multi-dSprites and
synthetic CLEVR, which need no download.
"""

import gzip
import hashlib
import json
import os
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from zipfile import ZipFile

# Before torch is imported: OpenMP's threads busy-wait after each loop, which stalls training when
# other processes are busy.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba_array
from PIL import Image, ImageOps
from torchvision.transforms import functional as TF

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None


class InputError(ValueError):
    """Something that the user gave cannot be used: a file, a folder, a flag. Shown as one line."""


# --- Scenes: what every dataset becomes, and the one way to a batch -----------------------------


class Scenes:
    """One split of a dataset.

    images [n, H, W, 3] uint8. labels [n, H, W] uint8: the entity that each pixel belongs to,
    0 = background, 255 = left out of the score; None if there are no masks. targets [n, ...]: of
    CLEVR [n, 10, 19] float32, see clevr_target. The arrays may be mapped from a file. index: the
    scenes of the split; all if not given. source: what they are, in words.
    """

    def __init__(self, images, labels=None, targets=None, index=None, source="your own"):
        if np.asarray(images).dtype != np.uint8:
            raise TypeError("images must be uint8, 0 to 255")
        self.arrays = {"image": images, "label": labels, "target": targets}
        self.index = np.arange(len(images)) if index is None else index
        self.source = source

    def __len__(self):
        return len(self.index)

    def batch(self, index, device="cpu", keys=("image", "label", "target")):
        """Returns the scenes `index` [B] of the split as a dict of tensors on a device, by key.

        image [B, 3, H, W] float32 in [-1, 1]; label [B, H, W] uint8 and target [B, 10, 19] where
        the dataset has them.
        """
        index = self.index[np.asarray(index)]
        batch = {key: to_device(torch.as_tensor(array[index]), device)
                 for key, array in self.arrays.items() if key in keys and array is not None}
        batch["image"] = batch["image"].movedim(3, 1).float().mul_(2 / 255).sub_(1)
        return batch


def to_device(x, device):
    """Copies a tensor to a device; to a GPU from pinned memory, so that nothing waits for it."""
    if "cuda" in str(device):
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# train: how many scenes are for training; resolution: height and width of the images. Of official
# files: file: its path on the server (see generate); masks: their shape in it, the shortest axis is
# that of the entities; used: how many of its first scenes.
Dataset = namedtuple("Dataset", "train resolution file masks used", defaults=[None] * 3)
FILES = {
    "tetrominoes": Dataset(
        60_000, 35, "tetrominoes/tetrominoes_train.tfrecords", (4, 35, 35), 65_000),
    "multi_dsprites": Dataset(
        60_000, 64, "multi_dsprites/multi_dsprites_colored_on_grayscale.tfrecords",
        (64, 64, 6), 65_000),
    "multi_dsprites_on_colored": Dataset(
        60_000, 64, "multi_dsprites/multi_dsprites_colored_on_colored.tfrecords",
        (64, 64, 5), 65_000),
    "clevr": Dataset(
        70_000, 128, "clevr_with_masks/clevr_with_masks_train.tfrecords",
        (11, 240, 320), 100_000),
    "clevr_like": Dataset(70_000, 128),  # it is always generated
}
DATASETS = {}  # your own: a name, and a function that returns Scenes of "train" or "eval"


def load(name, split, root="data", count=None, resolution=None, crop="paper", min_objects=0,
         max_objects=254, masks=None):
    """Returns the "train" or "eval" split of a dataset as Scenes. The splits share no scene.

    name: of FILES or DATASETS, or a folder of pictures. A function of DATASETS gets the split
        alone, and nothing below applies.
    root: the folder of the official files. They are decoded once, into root/cache. Without them
        Tetrominoes and Multi-dSprites (on grey) are generated.
    count: at most so many scenes. Of generated ones, another count may give other scenes.
    crop, of CLEVR: "paper", the central square; "official", the off-centre window that the
        official code cuts out of CLEVR_v1.0; "none", the whole picture, made square.
    min_objects, max_objects: only scenes with so many objects.
    masks: the folder with the masks of a folder of pictures.
    Raises InputError.
    """
    if name in DATASETS:
        return DATASETS[name](split)
    if not name:
        raise InputError("no dataset is named (weights come without their folder): name one with "
                         "--data, or draw pictures with --images")
    if masks and name in FILES:
        raise InputError(f"--masks is for a folder of pictures, not for {name}")
    root = Path(root)
    dataset = FILES.get(name, Dataset(np.inf, 128))
    resolution = resolution or dataset.resolution
    if name not in FILES:
        path = Path(name).resolve()
        objects, arrays = folder_arrays(
            path, root, resolution, masks and Path(masks).resolve())
    elif path := dataset.file and find(dataset.file, root):
        if path.is_dir():
            sources = path.glob("scenes/*.json")
            scenes = clevr_v1_scenes(path, resolution, crop)
            total = 85_000
        else:
            sources = [path]
            scenes = tfrecord_scenes(path, dataset, resolution, crop)
            total = dataset.used
        objects, arrays = cached(
            f"{path.name}-{resolution}-{crop}", root, sources, scenes, total)
    else:
        count = count or (dataset.train if split == "train" else 320)
        objects, arrays = generate(
            name, split, root, count, resolution, crop, min_objects, max_objects)
    source = f"generated {name}"
    chosen = (objects >= min_objects) & (objects <= max_objects)
    if path:  # not generated: one set, of which a split is a part
        source = f"{path.name.removesuffix('.tfrecords')} ({len(objects):,})"
        chosen &= in_split(len(objects), split, dataset.train)
    index = np.flatnonzero(chosen)[:count]
    if len(index) == 0:
        raise InputError(f"{name} has no {split} scene with {min_objects} to {max_objects} objects "
                         "(--min-objects, --max-objects)")
    return Scenes(arrays["image"], arrays.get("label"), arrays.get("target"), index, source)


def find(file, root):
    """Returns the path of an official file in root, or of CLEVR_v1.0's folder instead; or None.

    A browser saves FOLDER/name as FOLDER_name; other programs keep the folder.
    """
    names = [Path(file).name]
    if "clevr" in file:
        names.append("CLEVR_v1.0")
    for name in names:
        for pattern in (name, f"*_{name}", f"*/{name}"):
            for path in root.glob(pattern):
                return path


def in_split(n, split, train_count):
    """Returns which of n scenes are in a split, as booleans [n].

    The first train_count train, the others evaluate. If there are no others, a random tenth
    evaluates, at most 320 scenes.
    """
    train = np.arange(n) < train_count
    if train.all():
        held_out = min(320, n // 10 or 1)
        train[np.random.default_rng(0).permutation(n)[-held_out:]] = False
    return train == (split == "train")


# --- A folder of pictures -----------------------------------------------------------------------

PICTURES = ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .gif".split()
FORMATS = "PNG JPEG GIF BMP TIFF WEBP PPM".split()  # not EPS: that runs a program


@lru_cache  # once in a run
def folder_arrays(folder, root, resolution, masks):
    """Returns all pictures under a folder, sorted by name, through the cache; see cached."""
    files = []
    others = []
    with reading(folder):
        for path in sorted(folder.rglob("*")):
            hidden = "/." in f"/{path.relative_to(folder).as_posix()}"
            if path.is_file() and not hidden and masks not in path.parents:
                (files if path.suffix.lower() in PICTURES else others).append(path)
    if not files:
        raise InputError(f"{folder} is not a folder with pictures ({' '.join(PICTURES)}; those in "
                         "--masks are left out; call it from the folder where the run began), and "
                         f"none of the datasets ({', '.join([*FILES, *DATASETS])})")
    if others:
        say(f"{len(others)} other files left out: {', '.join(path.name for path in others[:5])}")

    def mask_of(path):
        return masks / path.relative_to(folder).with_suffix(".png")

    unusable = []

    def read(path):
        try:
            picture = read_picture(path)
            scene = {"image": square(picture, resolution), "objects": 0}
            if masks:
                label = read_mask(mask_of(path), picture.size)
                scene["label"] = resize_nearest(label, resolution)
                scene["objects"] = len(np.setdiff1d(label, (0, 255)))
            return scene
        except InputError as error:
            unusable.append(str(error))

    def scenes():
        yield from filter(None, in_threads(read, files))
        if unusable:  # all at once, so that nobody has to start again for each
            raise InputError(f"{len(unusable)} unusable: {'; '.join(unusable[:20])}")

    sources = files + [mask_of(path) for path in files if masks]
    objects, arrays = cached(f"{folder.name}-{resolution}", root, sources, scenes(), len(files))
    if masks and not objects.any():
        raise InputError(f"the masks in {masks} have no entity: count these from 1 (0 is the "
                         "background, 255 is left out)")
    few = (objects < 2).sum()
    if masks and few:
        say(f"{few:,} of {len(files):,} pictures have fewer than two entities: their FG-ARI is 0 "
            "or 1 (--min-objects 2 leaves them out, also of training)")
    return objects, arrays


def open_picture(path):
    """Opens a picture with PIL. Verifies its checksums, which loading it does not look at."""
    Image.open(path, formats=FORMATS).verify()
    return Image.open(path, formats=FORMATS)


def read_picture(path):
    """Returns a picture as an RGB image of PIL: upright, the first frame, transparency on white."""
    with reading(path), open_picture(path) as file:
        if file.mode[0] in "IF":
            raise InputError(f"{path}: more than 8 bits a channel; convert it to 8")
        picture = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def square(picture, resolution):
    """Returns the central square of a PIL image, antialiased: [resolution, resolution, 3] uint8."""
    picture = TF.center_crop(picture, min(picture.size))
    return np.array(TF.resize(picture, resolution))


def read_mask(path, size):
    """Returns the central square of a mask, [h, h] uint8. size: its picture's (W, H)."""
    with reading(path), open_picture(path) as mask:
        if mask.format != "PNG" or mask.mode not in ("1", "L", "P"):
            raise InputError(f"{path}: a mask is a grey or palette PNG of at most 8 bits, not a "
                             f"{mask.format} of mode {mask.mode}")
        if mask.size != size:
            raise InputError(f"{path}: the mask has {mask.size} pixels, its picture {size}")
        return np.array(TF.center_crop(mask, min(size)), np.uint8)


# --- CLEVR --------------------------------------------------------------------------------------

CLEVR_CODES = {  # by their numbers in clevr_with_masks; 0 (-) is the background, or padding
    "size": "- large small".split(),
    "material": "- rubber metal".split(),
    "shape": "- sphere cylinder cube".split(),
    "color": "- red cyan green blue brown gray purple yellow".split(),
}
CLEVR_TARGETS = [  # their order in the targets of set prediction, from TensorFlow Datasets
    "small large".split(),
    "rubber metal".split(),
    "cube sphere cylinder".split(),
    "gray blue brown yellow red green purple cyan".split(),
]
CLEVR_CROP = {  # the central square, rows and columns, by the picture's height and width
    (240, 320): np.s_[29:221, 64:256],  # the paper's
    (320, 480): np.s_[24:312, 96:384],  # the same part of the picture in CLEVR_v1.0
}


def clevr_target(scene):
    """Returns the target [10, 19] float32 of a scene's factors, as they are in clevr_with_masks.

    A row is: (3d_coords + 3) / 6, one-hot size, material, shape and colour, 1 for a real object.
    Rows of zeros follow. Raises ValueError or IndexError if these are not a CLEVR scene's factors.
    """
    columns = [(scene[axis] + 3) / 6 for axis in "xyz"]
    for key, names in zip(CLEVR_CODES, CLEVR_TARGETS):
        words = np.array(CLEVR_CODES[key])[scene[key]]
        columns += [words == name for name in names]
    real = scene["size"] > 0  # neither background nor padding
    target = np.zeros((10, 19), np.float32)
    target[:sum(real)] = np.transpose([*columns, real])[real]  # ValueError for more than 10
    if not abs(target).max() < 10:  # also for NaN
        raise ValueError("its coordinates are not CLEVR's")
    return target


def clevr_v1_scenes(folder, resolution, crop):
    """Yields the scenes of the original CLEVR_v1.0 (480 x 320, no masks): of train, then of val."""
    jobs = []
    for part in ("train", "val"):
        file = folder / f"scenes/CLEVR_{part}_scenes.json"
        if part == "val" and not file.exists():  # then some of the others are held out
            continue
        with reading(file):
            for scene in json.loads(file.read_bytes())["scenes"]:
                path = folder / f"images/{part}/{Path(scene['image_filename']).name}"
                objects = scene["objects"]
                factors = {key: np.array([names.index(o[key]) for o in objects])
                           for key, names in CLEVR_CODES.items()}
                factors.update(zip("xyz", np.transpose([o["3d_coords"] for o in objects])))
                jobs.append((path, clevr_target(factors)))

    def read(job):
        path, target = job
        with reading(path):
            picture = cropped(np.array(read_picture(path)), crop)
        image = resize(picture, resolution)
        return {"image": image, "target": target, "objects": target[:, 18].sum()}

    yield from in_threads(read, jobs)  # lazily: with a cache, not even the JSON is read


def cropped(picture, crop):
    """Returns the part [h, w, ...] of one of CLEVR's pictures [H, W, ...]; crop as in load."""
    if crop == "none":
        return picture
    size = picture.shape[:2]
    if size not in CLEVR_CROP:
        raise ValueError(f"{size[0]} x {size[1]} pixels are not CLEVR's, whose crop is known")
    return picture[CLEVR_CROP[(240, 320) if crop == "official" else size]]


def resize(picture, resolution):
    """Resizes [H, W, 3] uint8 as the official code does, bilinear, not antialiased; to uint8."""
    x = torch.tensor(picture).movedim(2, 0)
    return TF.resize(x, [resolution, resolution], antialias=False).movedim(0, 2).numpy()


def resize_nearest(labels, resolution):
    """Resizes [H, W, ...] to the nearest pixels."""
    centers = 2 * np.arange(resolution) + 1  # of the new pixels, in half pixels
    nearest = [centers * size // (2 * resolution) for size in labels.shape[:2]]
    return labels[np.ix_(*nearest)]


# --- TensorFlow's file formats, without TensorFlow ----------------------------------------------


def tfrecord_scenes(path, dataset, resolution, crop):
    """Yields the scenes of one of DeepMind's files, cropped and resized; crop is CLEVR's alone."""
    is_clevr = "clevr" in dataset.file
    crop = crop if is_clevr else "none"

    def decode(record):
        decoded = {}
        with reading(path):
            scene = decode_scene(record, dataset.masks)
            if is_clevr:
                decoded["target"] = clevr_target(scene)
        decoded["image"] = resize(cropped(scene["image"], crop), resolution)
        mask = cropped(scene["mask"].transpose(1, 2, 0), crop)                  # [h, w, E]
        decoded["label"] = np.uint8(resize_nearest(mask, resolution).argmax(2))
        decoded["objects"] = round(scene["visibility"].sum()) - 1  # not the background
        return decoded

    return in_threads(decode, read_records(path, dataset.used))


def read_tfrecords(path, name):
    """Yields the scenes of one of DeepMind's TFRecord files, a dict of arrays each, in their order.

    name: a key of FILES. image [H, W, 3] uint8; mask [E, H, W] uint8 0/1, background first; the
    factors as stored, [E] or [E, 3], float32 or uint8. Raises InputError if the file is damaged, or
    another one.
    """
    with reading(path):
        for record in read_records(path):
            yield decode_scene(record, FILES[name].masks)


def read_records(path, limit=None):
    """Yields the records of a TFRecord file as bytes, the first `limit` of them.

    A gzip file is read to its end, where its checksum is. Of a file that is not compressed, only
    the checksums of the records' lengths are verified: in Python, the others would take hours.
    """
    with reading(path), open(path, "rb") as raw:
        compressed = raw.peek(2).startswith(b"\x1f\x8b")
        file = gzip.open(raw) if compressed else raw
        count = 0
        while count != limit and (header := file.read(12)):
            length = int.from_bytes(checked(header), "little")
            record = file.read(length + 4)[:-4]
            if len(record) != length:
                raise EOFError("a record ends too early")
            yield record
            count += 1
        if count == 0:
            raise EOFError("it holds no record")
        if compressed:
            say(f"reading {path} to its end, where its checksum is")
            while file.read(2 ** 24):
                say(f"{raw.tell() / os.path.getsize(path):.0%}", renew=True)


def decode_scene(record, shape):
    """Returns the scene of a record as a dict, see read_tfrecords.

    shape: that of its masks as stored; the shortest axis is that of the entities.
    """
    scene = parse_example(record)
    mask = np.moveaxis(scene["mask"].reshape(shape), np.argmin(shape), 0)
    scene["mask"] = mask.clip(max=1)                                            # [E, H, W]
    scene["image"] = scene["image"].reshape(*mask.shape[1:], 3)
    for key, array in scene.items():
        if array.size == 3 * len(mask):  # a colour or a place of each entity
            scene[key] = array.reshape(-1, 3)
    return scene


def parse_example(record):
    """Returns {feature: flat array, uint8 or float32} of a serialised tf.train.Example."""
    scene = {}
    features = message(memoryview(record))[1]
    for _, entry in protobuf(features):
        name, feature = message(entry).values()
        (kind, values), = protobuf(feature)
        if kind == 1:  # a BytesList of single bytes: of each the tag, the length 1, the byte
            array = np.frombuffer(values, np.uint8).reshape(-1, 3)[:, 2]
        else:  # a FloatList
            array = np.frombuffer(message(values)[1], "<f4")
        scene[bytes(name).decode()] = array
    return scene


def read_tf_checkpoint(prefix):
    """Returns {key: float32 array} of a TensorFlow 2 checkpoint of one shard.

    PREFIX.index is a LevelDB table, uncompressed, of BundleEntry messages (tensor_bundle.proto),
    which say where in PREFIX.data-00000-of-00001 each array lies. Raises InputError.
    """
    arrays = {}
    path = Path(f"{prefix}.index")
    with reading(path):
        index = path.read_bytes()
        data = Path(f"{prefix}.data-00000-of-00001").read_bytes()
        if not index.endswith(b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"):
            raise ValueError("it does not end as a table does")
        footer = index[-48:]
        for _ in range(2):  # the place of the metaindex, an offset and a size: nobody needs it
            _, footer = varint(footer)
        for _, place in table_block(index, footer):
            for key, value in table_block(index, place):
                entry = message(value)
                if not key or entry[1] != 1:  # the header, or not float32
                    continue
                shape = [message(dim)[1] for _, dim in protobuf(entry[2])]
                offset = entry.get(4, 0)
                array = checked(data[offset:offset + entry[5]] + entry[6])
                arrays[key] = np.frombuffer(array, "<f4").reshape(shape)
    return arrays


def table_block(table, place):
    """Yields the (key, value) pairs of one block of a LevelDB table, at an (offset, size)."""
    offset, place = varint(place)
    size, _ = varint(place)
    block = checked(table[offset:offset + size + 5])
    restarts = int.from_bytes(block[-5:-1], "little")
    block = block[:-5 - 4 * restarts]
    key = b""
    while block:
        shared, block = varint(block)  # bytes of the key that are as in the key before
        unshared, block = varint(block)
        length, block = varint(block)
        key = key[:shared] + block[:unshared]
        block = block[unshared:]
        yield key.decode(), block[:length]
        block = block[length:]


def message(buffer):
    """Returns {field: value} of a protobuf message without repeated fields, see protobuf."""
    return dict(protobuf(buffer))


def protobuf(buffer):
    """Yields (field, value) of a protobuf message: a number, or bytes still to be decoded."""
    while buffer:
        tag, buffer = varint(buffer)
        wire_type = tag & 7
        if wire_type == 0:
            value, buffer = varint(buffer)
        else:
            size = 4
            if wire_type != 5:
                size, buffer = varint(buffer)
            value = buffer[:size]
            buffer = buffer[size:]
        yield tag >> 3, value


def varint(buffer):
    """Returns protobuf's variable-length number at the start of a buffer, and the rest of it."""
    first = buffer[0]
    rest = buffer[1:]
    if first < 128:
        return first, rest
    number, rest = varint(rest)
    return number << 7 | first & 127, rest


def checked(buffer):
    """Returns bytes without the four of their masked CRC-32C at the end, if it is right.

    Else raises ValueError.
    """
    content = buffer[:-4]
    crc = 0xFFFFFFFF
    for byte in content:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if masked != int.from_bytes(buffer[-4:], "little"):
        raise ValueError("a checksum is wrong")
    return content


CRC_TABLE = range(256)
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ 0x82F63B78 * (crc & 1) for crc in CRC_TABLE]

# --- The cache: scenes decoded or generated once, mapped from a file ----------------------------

CACHE_VERSION = 5  # change it whenever any dataset is decoded or generated in another way


def cached(name, root, sources, scenes, total):
    """Returns all scenes from the cache; builds it if need be.

    They are the numbers of objects [n], and {key: array [n, ...]}, mapped from the file. It lies in
    root/cache, or, if nothing can be written there, in data/cache. Of several processes, one builds
    it and the others wait.
    sources: the files that the scenes come from: when one of them changes, there is another cache.
    scenes: an iterator of dicts {"image": [H, W, 3], "objects": their number, ...}, each written
        as it comes; the iterator is left alone if the cache is there. total: how many are expected.
    """
    sources = sorted(sources)
    missing = [str(path) for path in sources if not path.exists()]
    if missing:
        raise InputError(f"{len(missing)} files are missing: {'; '.join(missing[:20])}")
    files = []
    for path in sources:
        stat = path.stat()
        files.append((os.path.relpath(path, sources[0]), stat.st_size, stat.st_mtime_ns))
    key = hashlib.sha256(repr((CACHE_VERSION, files)).encode()).hexdigest()[:8]
    for folder in (root / "cache", Path("data/cache")):
        path = folder / f"{name}-{key}.zip"
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "lock", "w") as file:
                    if not lock(file):
                        say(f"waiting for another process that writes into {folder} (maybe of "
                            "this run)")
                        lock(file, wait=True)
                    if not path.exists():  # another process may have built it meanwhile
                        write_cache(path, scenes, total)
            return read_cache(path)
        except OSError as error:
            say(f"{folder} cannot be written: {error}")
    raise InputError("there is no folder to write the cache to: run from one that can be written")


def write_cache(path, scenes, total):
    """Writes scenes as they come: the member "records" of a zip file, not compressed."""
    say(f"writing about {total:,} scenes into {path} (only the first time)")
    objects = []
    with whole_file(path) as file, ZipFile(file, "w") as archive:
        with archive.open("records", "w", force_zip64=True) as stream:
            start = file.tell()
            for scene in scenes:
                objects.append(int(scene.pop("objects")))
                for array in scene.values():  # a scene's side by side
                    stream.write(array.tobytes())
                renew = len(objects) % 10_000 > 0  # every ten thousand, one stays
                say(f"{len(objects):,} of about {total:,} scenes", renew)
        if not objects:
            raise InputError(f"there is no scene to build {path} from")
        fields = [(key, array.dtype.str, array.shape) for key, array in scene.items()]
        about = {"start": start, "fields": fields, "objects": objects}
        archive.writestr("about.json", json.dumps(about))


@lru_cache  # its checksums are verified once in a run
def read_cache(path):
    """Returns the numbers of objects in a cache's scenes, and its arrays, mapped."""
    with reading(f"{path} (it can be deleted)"), ZipFile(path) as archive:
        say(f"verifying {path}", renew=True)
        if RANK == 0 and archive.testzip():
            raise ValueError("a checksum is wrong")
        about = json.loads(archive.read("about.json"))
        fields = [tuple(field) for field in about["fields"]]
        objects = np.array(about["objects"])
        records = np.memmap(path, fields, "r", about["start"], len(objects))
    return objects, {key: records[key] for key in records.dtype.names}


def in_threads(function, jobs):
    """Yields function(job) of each job, in order, from a thread for each core.

    At most two jobs a thread are waiting, so memory stays small.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in each job
    workers = min(os.cpu_count(), 16)  # of more, most would wait for Python's lock
    results = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            for job in jobs:
                results.append(pool.submit(function, job))
                if len(results) > 2 * workers:
                    yield results.pop(0).result()
            for result in results:
                yield result.result()
    finally:
        torch.set_num_threads(threads)


# --- Files: whole or absent, and none runs code -------------------------------------------------

RANK = int(os.environ.get("RANK", 0))  # set by torchrun


def say(line, renew=False):
    """Prints a message on stderr, from the first process alone.

    renew: a line that the next message replaces, on a terminal; elsewhere it is not printed.
    """
    terminal = sys.stderr.isatty()
    if RANK or (renew and not terminal):
        return
    with suppress(OSError):  # a closed terminal or pipe is no reason to stop
        print("\r\x1b[K" * terminal + line, end="" if renew else "\n", file=sys.stderr, flush=True)


def duration(seconds):
    """Returns a duration in the unit that a person would use."""
    for unit, size in ("days", 86_400), ("h", 3_600), ("min", 60):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def one_line_errors(other):
    """Ends the program with one line and exit code 2 after an InputError, or an error of `other`.

    Under `python -X dev` the traceback is shown, also that of what a damaged file raised.
    """
    try:
        yield
    except (InputError, other) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before training, which saves first
        sys.exit(130)


@contextmanager
def reading(path):
    """Turns whatever a missing or damaged file raises into an InputError that names it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # PIL, torch and zipfile have many ways to say it
        damage = f"damaged, or of the wrong kind: {error!r:.100} (python -X dev shows where)"
        reason = getattr(error, "strerror", None) or damage
        if isinstance(error, EOFError):
            reason = "it ends too early: was its download interrupted?"
        raise InputError(f"{path}: {reason}") from error


@contextmanager
def whole_file(path):
    """Opens a new file that takes the place of `path` at the end, when it is whole.

    A kill, a full disk or an error leaves what was there before.
    """
    part = path.with_name(f"part-{RANK}-{path.name}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); what was there before is kept") from error
    finally:
        with suppress(OSError):
            part.unlink()


def lock(file, wait=False):
    """Locks an open file until it is closed. Returns False if another process has the lock."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system may have no locks
        pass
    return True


def read_file(path):
    """Returns the content of a checkpoint or a file of weights (.pt). No code in it is run."""
    with reading(path), ZipFile(path) as archive:
        if archive.testzip():  # torch.load verifies no checksums
            raise ValueError("a checksum is wrong")
        return torch.load(path, "cpu", weights_only=True)


# --- Generated scenes ---------------------------------------------------------------------------
# They are cached: if you change what they look like, change CACHE_VERSION as well.


def generate(name, split, root, count, resolution, crop, min_objects, max_objects):
    """Returns scenes drawn by the rules of a dataset, through the cache; see load and cached.

    The splits come from seeds 1 and 2 in every run, so do not test a model on scenes of seed 1.
    """
    dataset = FILES[name]
    makers = {
        "tetrominoes": make_tetrominoes,
        "multi_dsprites": make_multi_dsprites,
        "clevr_like": make_clevr_like,
    }
    cache = f"{name}-{split}-{count}"
    size = 1_000  # scenes are made so many at a time
    options = ()
    if name == "clevr_like":
        max_objects = min(max_objects, 10)
        cache += f"-{resolution}-{crop}-{min_objects}-{max_objects}"
        size = 32
        options = resolution, min_objects or 3, max_objects, crop != "none"
    elif name not in makers:
        path = root / Path(dataset.file).name
        raise InputError(f"there is no {path} (--data clevr_like and --data multi_dsprites need no "
                         f"file). To fetch it: curl -fL --create-dirs -C - -o {path} "
                         f"https://storage.googleapis.com/multi-object-datasets/{dataset.file}")
    elif resolution != dataset.resolution:
        raise InputError(f"generated {name} exist only at --resolution {dataset.resolution}")
    else:
        say(f"{count:,} generated scenes for {split} (no {Path(dataset.file).name} in {root}/)")

    seed = 1 if split == "train" else 2

    def scenes():  # one after the other: threads would wait for Python's lock
        for start in range(0, count, size):
            made = makers[name](min(size, count - start), (seed, start), *options)
            for scene in zip(*made.values()):
                yield dict(zip(made, scene))

    return cached(cache, root, [], scenes(), count)


# The 19 orientations of I, O, L, J, T, S and Z: row and column of each of their four cells.
TETROMINOES = np.loadtxt("""
    0 0  0 1  0 2  0 3   # I
    0 0  1 0  2 0  3 0
    0 0  0 1  1 0  1 1   # O
    0 0  1 0  2 0  2 1   # L
    0 0  0 1  0 2  1 0
    0 0  0 1  1 1  2 1
    0 2  1 0  1 1  1 2
    0 1  1 1  2 0  2 1   # J
    0 0  1 0  1 1  1 2
    0 0  0 1  1 0  2 0
    0 0  0 1  0 2  1 2
    0 0  0 1  0 2  1 1   # T
    0 1  1 0  1 1  2 1
    0 1  1 0  1 1  1 2
    0 0  1 0  1 1  2 0
    0 1  0 2  1 0  1 1   # S
    0 0  1 0  1 1  2 1
    0 0  0 1  1 1  1 2   # Z
    0 1  1 0  1 1  2 0
""".splitlines(), int).reshape(19, 4, 2)
TETROMINO_TILE = np.loadtxt("""
    191 255 255 255 223
    127 159 159 159 191
    127 159 159 159 191
    127 159 159 159 191
     95  63  63  63 127
""".splitlines(), int)  # a cell's brightness, with its bevel, measured on real scenes
TETROMINO_COLORS = np.loadtxt("""
    1 0 0
    0 1 0
    0 0 1
    1 1 0
    1 0 1
    0 1 1
""".splitlines(), np.uint8)


def make_tetrominoes(count, seed):
    """Returns scenes by the rules of DeepMind's Tetrominoes, as a dict of arrays.

    Three pieces, of 19 orientations and six colours, are placed uniformly on black, inside 35 x 35
    and without overlap. The same (count, seed) gives the same scenes. image [n, 35, 35, 3] uint8;
    label [n, 35, 35] uint8, 0 = background, 1 to 3; objects [n], the number of pieces.
    """
    rng = np.random.default_rng(seed)
    light = np.zeros((count, 3, 35, 35), np.uint8)  # of each piece alone
    # The same memory as [n, 3, 31, 31, 5, 5]: the square that begins at a row and a column.
    tiles = np.lib.stride_tricks.sliding_window_view(light, (5, 5), (2, 3), writeable=True)
    todo = np.arange(count)
    while len(todo):  # all three pieces anew until none overlap: each allowed scene is as likely
        cells = 5 * rng.choice(TETROMINOES, (len(todo), 3))                     # [t, 3, 4, 2]
        cells += rng.integers(31 - cells.max(2, keepdims=True))
        light[todo] = 0
        top, left = cells.T                                                     # [4, 3, t] each
        tiles[todo, [[0], [1], [2]], top, left] = TETROMINO_TILE
        covered = light[todo].any(1)
        todo = todo[covered.sum((1, 2)) < 300]  # fewer than the pixels of three pieces
    color = rng.choice(TETROMINO_COLORS, (count, 3))
    return {
        "image": np.einsum("nkhw,nkc->nhwc", light, color, optimize=True),  # none overlap
        "label": np.einsum("nkhw,k->nhw", light > 0, np.uint8([1, 2, 3])),
        "objects": np.full(count, 3),
    }


def make_multi_dsprites(count, seed):
    """Returns scenes after DeepMind's Multi-dSprites, colored_on_grayscale, as a dict of arrays.

    2 to 5 sprites (6 scales, 40 orientations, 32 x 32 positions) of any colour, the later over the
    earlier, on grey. The same (count, seed) gives the same scenes. image [n, 64, 64, 3] uint8;
    label [n, 64, 64] uint8, 0 = background, 1 to 5; objects [n], the number of sprites.
    """
    rng = np.random.default_rng(seed)
    objects = rng.integers(2, 6, count)
    size = (count, 5)
    shape = rng.choice(3, size)
    scale = rng.choice(np.linspace(0.5, 1, 6), size)
    orientation = rng.choice(np.linspace(0, 2 * np.pi, 40), size)
    row, col = 16 + rng.choice(32, (2, *size))
    color = rng.random((*size, 3))  # real scenes have dark and pale sprites, too
    grey = rng.random((count, 1))
    palette = 255 * np.insert(color, 0, grey, 1)                                # [n, 6, 3]

    # The picture is a part of the complex plane, x + 1j * y.
    center = col + 1j * row
    turn = np.exp(-1j * orientation) / (12 * scale)
    pixels = np.arange(64)
    plane = pixels + 1j * pixels[:, None]                                       # [64, 64]
    label = np.zeros((count, 64, 64), np.uint8)
    for i in range(count):
        for k in range(objects[i]):
            on_sprite = (plane - center[i, k]) * turn[i, k]
            u = on_sprite.real
            v = on_sprite.imag
            inside = [
                np.maximum(abs(u), abs(v)) < 0.8,                               # square
                u ** 2 + (v / 0.6) ** 2 < 1,                                    # ellipse
                u ** 2 + (0.1 - 1.2 * v - 0.75 * abs(u) ** 0.5) ** 2 < 0.9,     # heart
            ]
            label[i, inside[shape[i, k]]] = k + 1  # the later over the earlier
    return {
        "image": np.uint8(palette.round())[np.arange(count)[:, None, None], label],
        "label": label,
        "objects": objects,
    }


# --- Synthetic CLEVR, ray-cast ------------------------------------------------------------------

# The sizes and colors of CLEVR_CODES, in their order; the first is that of no object. A size is the
# radius of a sphere or half the side of a cube; a color is a linear albedo.
CLEVR_SIZES = np.float32([1, 0.7, 0.35])
CLEVR_COLORS = to_rgba_array(
    "#ffffff #ad2323 #29d0d0 #1d6914 #2a4bd7 #814a19 #575757 #8126c0 #ffee33".split())[:, :3]
# A solid of size 1 is where |ball * point| <= 1 and, on each axis, |box * point| <= 1. 0: no limit.
# A ball of radius 1.61 cuts off the cube's corners. reach is the square of the solid's radius, and
# 1 % more; 0 for the ground, which shade intersects by itself.
CLEVR_SOLIDS = np.loadtxt("""
#   ground  sphere  cylinder  cube
    0       1       1         0.62   # ball, x
    0       1       1         0.62   #       y
    0       1       0         0.62   #       z
    0       0       0         1      # box, x
    0       0       0         1      #      y
    0       0       1         1      #      z
    0       1.01    2.02      2.63   # reach
""".splitlines())
# The mean camera, aimed at the origin, and its focal length (pixels of the 480 x 320 frame) fit the
# pixel_coords of CLEVR_v1.0; the power of key, fill and back lamp and the ambient light fit bare
# ground there.
CLEVR_FRAME = np.s_[0:320, 0:480]
CLEVR_CAMERA = np.array([7.481, -6.508, 5.344])
CLEVR_FOCAL = 525
CLEVR_LAMPS, CLEVR_POWER = np.hsplit(np.loadtxt("""
     6.447 -2.905 4.258   5.75 5.32 4.63
    -4.671 -4.014 3.011   1.20 1.31 1.66
    -1.168  2.646 5.816   2.60 2.54 2.49
""".splitlines()), 2)  # a lamp: x, y, z; red, green, blue
CLEVR_AMBIENT = 0.135


def make_clevr_like(count, seed, resolution=128, min_objects=3, max_objects=10, crop=True):
    """Returns scenes after CLEVR (Johnson et al., 2017), as DeepMind's CLEVR with masks has them.

    Scene i depends on seed, numbers of objects and i, not on count. crop: the central square, in
    which objects may be cut or missing, as object discovery sees them; else the whole frame, made
    square. image [n, H, W, 3] uint8; label [n, H, W] uint8, 0 = background, 1 to 10; objects [n],
    their number; target [n, 10, 19], see clevr_target. Raises InputError if not
    1 <= min_objects <= max_objects <= 10.
    """
    if not 1 <= min_objects <= max_objects <= 10:
        raise InputError("synthetic CLEVR needs 1 <= min_objects <= max_objects <= 10, not "
                         f"{min_objects} and {max_objects} (--min-objects, --max-objects)")
    window = CLEVR_CROP[320, 480] if crop else CLEVR_FRAME
    scenes = []
    for i in range(count):
        rng = np.random.default_rng(np.append(seed, i))
        number = rng.integers(min_objects, max_objects + 1)
        factors, scene = draw_clevr_scene(rng, number)
        image, label = scene.render(window, resolution)
        scenes.append((image, label, number, clevr_target(factors)))
    arrays = map(np.stack, zip(*scenes))
    return dict(zip(("image", "label", "objects", "target"), arrays))


def draw_clevr_scene(rng, number):
    """Draws a scene by the rules of CLEVR's generator: its factors, and a ClevrScene of them.

    The factors are arrays [1 + number], of the ground and the objects. As there, it starts over if
    an object finds no place, or shows under 200 pixels of 240 x 320.
    """
    camera = CLEVR_CAMERA + rng.uniform(-0.5, 0.5, 3)
    lamps = CLEVR_LAMPS + rng.uniform(-1, 1, (3, 3))
    x, y, _ = camera_axes(camera)[0]  # to the right
    factors = {
        key: rng.integers(1, len(names), number, np.uint8)
        for key, names in CLEVR_CODES.items()
    }
    size = CLEVR_SIZES[factors["size"]]
    place = np.zeros((number, 2), np.float32)
    for i in range(number):
        trials = rng.uniform(-3, 3, (50, 2))
        step = trials[:, None] - place[:i]                                      # [50, i, 2]
        apart = np.linalg.norm(step, axis=2) - size[:i] - size[i] > 0.25        # [50, i]
        apart &= abs(step @ [[x, -y], [y, x]]).min(2) > 0.4  # aside and ahead
        fitting = trials[apart.all(1)]
        if not len(fitting):
            return draw_clevr_scene(rng, number)
        place[i] = fitting[0]
    factors["x"], factors["y"] = place.T
    factors["z"] = size
    factors["rotation"] = np.float32(rng.uniform(0, 360, number))  # used as radians, as in CLEVR
    factors = {
        key: np.insert(values, 0, 0)  # the ground
        for key, values in factors.items()
    }
    scene = ClevrScene(camera, lamps, **factors)
    pixel = pixel_centers(CLEVR_FRAME, 40, 60)  # a ray for 32 pixels of 240 x 320
    before, _ = scene.intersect(*scene.camera_rays(pixel))
    # Where a ray misses all, all are equal, and argmin gives the first, the ground.
    seen = before.argmin(1).bincount(minlength=number + 1)
    if 32 * seen.min() < 200:
        return draw_clevr_scene(rng, number)
    return factors, scene


def camera_axes(camera):
    """Returns right, down and ahead of a camera [3] that is aimed at the origin: [3, 3]."""
    ahead = -camera / np.linalg.norm(camera)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(ahead, right), ahead])


def project(points):
    """Returns column and row (in the 480 x 320 frame) of 3d_coords [..., 3]: [..., 2]."""
    view = (points - CLEVR_CAMERA) @ camera_axes(CLEVR_CAMERA).T
    return view[..., :2] / view[..., 2:] * CLEVR_FOCAL + (240, 160)


def pixel_centers(window, *counts):
    """Returns row and column [R, 2] of the centers of so many rows and columns in a window."""
    axes = [
        part.start + torch.arange(0.5, count) * (part.stop - part.start) / count
        for part, count in zip(window, counts)]
    return torch.cartesian_prod(*axes)


def dot(a, b):
    """Returns the inner products of vectors [..., 3]: [..., 1]."""
    return (a * b).sum(-1, keepdim=True)


def transform(matrix, vector):
    """Returns matrix @ vector, of matrices [Q, m, 3] and vectors [Q, 3]: [Q, m]."""
    return (matrix @ vector[..., None])[..., 0]


class ClevrScene:
    """One scene, and what R rays see in it. Its E entities: the ground, and objects."""

    def __init__(self, camera, lamps, x, y, z, rotation, size, material, shape, color):
        size = CLEVR_SIZES[size]
        cos = np.cos(rotation)
        sin = np.sin(rotation)
        zero = 0 * cos
        turn = np.array([  # [3, 6, E], onto the axes of each solid, for the ball and for the box
            [cos, -sin, zero] * 2,
            [sin, cos, zero] * 2,
            [zero, zero, zero + 1] * 2,
        ])
        arrays = {
            "camera": camera,
            "axes": camera_axes(camera),
            "lamps": lamps,
            "power": CLEVR_POWER,
            "albedo": CLEVR_COLORS[color],                                      # [E, 3]
            "metal": material == 2,                                             # [E]
            "center": np.column_stack([x, y, z]),                               # [E, 3]
            "reach": CLEVR_SOLIDS[6, shape] * size ** 2,                        # [E]
            "solid": (CLEVR_SOLIDS[:6, shape] / size * turn).T,                 # [E, 6, 3]
        }
        for name, array in arrays.items():
            setattr(self, name, torch.tensor(array.tolist()))

    def camera_rays(self, pixel):
        """Returns origins and unit directions, [R, 3] each, of the rays through pixels [R, 2]."""
        right, down, ahead = self.axes
        y, x = ((pixel - torch.tensor([160, 240])) / CLEVR_FOCAL).hsplit(2)
        direction = F.normalize(x * right + y * down + ahead)
        return self.camera.expand_as(direction), direction

    def intersect(self, origin, direction):
        """Returns the distances along rays at which they enter and leave each solid: [2, R, E].

        Both are 1e9 for rays that miss it.
        """
        # Only the Q pairs of a ray and a solid that it may hit are computed. It meets the bounding
        # sphere if along ** 2 > |origin - center| ** 2 - reach; one that begins in the sphere and
        # leads away from the center counts as a miss.
        along = direction @ self.center.T - dot(origin, direction)              # [R, E]
        tangent = (torch.cdist(origin, self.center) ** 2 - self.reach).clamp(0).sqrt()
        ray, entity = torch.where(along > tangent)
        solid = self.solid[entity]
        position = origin[ray] - self.center[entity]
        # In the ball from when to when |p + time * d| = 1; in the box |q + time * e| = 1, by axis.
        p, q = transform(solid, position).hsplit(2)                             # [Q, 3] each
        d, e = transform(solid, direction[ray]).hsplit(2)
        a = dot(d, d).clamp(1e-9)
        b = dot(p, d)
        c = dot(p, p) - 1
        root = (b ** 2 - a * c).clamp(0).sqrt()
        one, other = (
            torch.hstack([(side * root - b) / a, (side - q) / e])               # [Q, 4]
            for side in (-1, 1))
        enter = one.minimum(other).amax(1)
        leave = one.maximum(other).amin(1)
        hit = (enter > 0.001) & (enter < leave)  # not the solid on whose surface the ray begins
        times = torch.full((2, *along.shape), 1e9)
        times[:, ray, entity] = torch.stack([enter, leave]).where(hit, 1e9)
        return times

    def shade(self, origin, direction, mirrors=True):
        """Returns what rays see: linear colour [R, 3], entity [R]. mirrors=False: no metal."""
        before, _ = self.intersect(origin, direction)
        descent = -direction[:, 2:]
        before[:, :1] = origin[:, 2:] / descent.clamp(0.001)  # the sky is far ground
        distance, entity = before.min(1)
        position = origin + distance[:, None] * direction
        # The normal of |ball * point| ** 16 + sum((box * point) ** 16) = 1: edges look round.
        solid = self.solid[entity]
        p, q = transform(solid, position - self.center[entity]).hsplit(2)
        gradient = torch.hstack([p * dot(p, p) ** 7, q ** 15])                  # [R, 6]
        normal = F.normalize(transform(solid.mT, gradient))
        normal[entity == 0, 2] = 1  # the ground's is up
        mirrored = direction - 2 * dot(direction, normal) * normal
        sky = (descent.clamp(max=0) / 0.07).exp()  # it darkens from the horizon up
        sky[entity > 0] = 1
        light = CLEVR_AMBIENT * sky
        gloss = 0
        for lamp, power in zip(self.lamps, self.power):
            to_lamp = lamp - position
            length = dot(to_lamp, to_lamp).sqrt()
            to_lamp /= length
            # Soft shadows: lamps have a size, so where a solid is thin, they look over its edge.
            enter, leave = self.intersect(position, to_lamp)
            shadow = 2 * ((leave - enter) / enter).amax(1, keepdim=True)
            aim = F.normalize(lamp, dim=0)  # at the origin
            beam = power * (1 - shadow).clamp(0) * dot(to_lamp, aim).clamp(0)
            light = light + beam * dot(to_lamp, normal).clamp(0) / length ** 2
            gloss += beam * dot(to_lamp, mirrored).clamp(0) ** 100
        if mirrors:
            metal = self.metal[entity]
            seen, _ = self.shade(position[metal], mirrored[metal], False)
            brushed = 0.2 + 0.35 * normal[metal, 2:] ** 8  # brushed tops gather light from around
            light[metal] = seen + gloss[metal] + brushed * light[metal]
        return self.albedo[entity] * light, entity

    def render(self, window, resolution):
        """Returns image [H, W, 3] and label [H, W], both uint8, of a window of the frame."""
        pixel = pixel_centers(window, resolution, resolution)
        color, entity = self.shade(*self.camera_rays(pixel))
        picture = color.clamp(max=1).view(resolution, resolution, 3) ** (1 / 2.2)
        # Antialiasing: three rays for each pixel that differs from a neighbor.
        grid = picture.movedim(2, 0)
        contrast = F.max_pool2d(grid, 3, 1, 1) + F.max_pool2d(-grid, 3, 1, 1)
        edge = (contrast > 0.25).any(0)
        size = (pixel[-1] - pixel[0]) / (resolution - 1)
        offset = torch.tensor([[0, -1], [1, 0], [-1, 1]])
        pixel = pixel[edge.flatten(), None] + size * offset / 3                 # [r, 3, 2]
        color, _ = self.shade(*self.camera_rays(pixel.flatten(0, 1)))           # [3 * r, 3]
        picture[edge] = color.clamp(max=1).view(-1, 3, 3).mean(1) ** (1 / 2.2)
        image = (255 * picture).round().byte()
        label = entity.byte().view(resolution, resolution)
        return image.numpy(), label.numpy()
