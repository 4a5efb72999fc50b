"""The specification: what a reader may rely on. Run with: pytest

The first section compares with outputs of the official code (google-research/slot_attention) in
assets/golden.npz: TensorFlow 2.15.1, Keras 2.15.0, float32, a CPU. Its weights and inputs were
drawn as official_inputs draws them.
"""

import contextlib
import copy
import gzip
import inspect
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import data  # before torch, see there
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from PIL import EpsImagePlugin, Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import slot_attention as sa
import train
import visualize

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
SAMPLES = HERE.parent / "shared" / "samples"  # a little real data that the project does not carry
GOLDEN = np.load(ASSETS / "golden.npz")
parametrize = pytest.mark.parametrize
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 holds


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(ASSETS, "assets")  # commands name files in it
    monkeypatch.setattr(train, "catch_signals", list)  # Ctrl-C stays pytest's
    torch.manual_seed(0)
    as_in_a_new_process()


def as_in_a_new_process():
    data.folder_arrays.cache_clear()
    data.read_cache.cache_clear()


def golden(prefix):
    """Returns {key: tensor} of a golden case, without names."""
    return {key.removeprefix(f"{prefix}/"): torch.from_numpy(GOLDEN[key])
            for key in GOLDEN if key.startswith(f"{prefix}/") and "names" not in key}


def cases(kind, *others):
    """Returns the names of the golden cases of a kind."""
    return sorted({key.split("/")[0] for key in golden(kind)} - {*others})


def equal(a, b):
    """Returns whether two nested containers hold the same values, to the bit."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(np.array_equal(*pair) for pair in pairs)


# --- Equal to the official code -----------------------------------------------------------------

# The shapes of official variables, as Keras has them: the first whose pattern is in the name.
SHAPES = """\
slots_ 1 1 64
gru/bias 2 192
gru/ 64 192
dense/kernel 4 64
encoder_cnn/layer_with_weights-0/kernel 5 5 3 64
decoder_cnn/layer_with_weights-5/kernel 3 3 4 64
decoder_cnn/layer_with_weights-5/bias 4
slot_attention/mlp/layer_with_weights-0/kernel 64 128
slot_attention/mlp/layer_with_weights-0/bias 128
slot_attention/mlp/layer_with_weights-1/kernel 128 64
classifier/layer_with_weights-1/kernel 64 19
classifier/layer_with_weights-1/bias 19
cnn/.*kernel 5 5 64 64
kernel 64 64
. 64
"""


def official_shape(name):
    for line in SHAPES.splitlines():
        pattern, *shape = line.split()
        if re.search(pattern, name):
            return [int(size) for size in shape]


def official_inputs(names, num_slots):
    """Returns what the official code got: weights {name: array}, image and noise."""
    rng = np.random.RandomState(0)
    weights = {}
    for name in names:
        shape = official_shape(name)
        scale = 0.1
        if name.endswith("kernel"):
            transposed = name.startswith("decoder_cnn")
            fan_in = np.prod(shape) / shape[-2 if transposed else -1]
            if re.search("decoder_cnn.*-[0-3]/", name):  # stride 2
                fan_in /= 4
            scale = np.sqrt(2 / fan_in)
        weights[name] = np.float32(name.endswith("gamma") + scale * rng.standard_normal(shape))
    fine = np.float32(rng.uniform(-1, 1, (2, 128, 128, 3)))
    coarse = np.float32(rng.uniform(-1, 1, (2, 16, 16, 3))).repeat(8, 1).repeat(8, 2)
    image = 0.8 * coarse + 0.2 * fine
    noise = np.float32(rng.standard_normal((2, num_slots, 64)))
    return weights, torch.from_numpy(image).movedim(3, 1), torch.from_numpy(noise)


@parametrize("task, model_class, num_slots, count", [
    ("discovery", sa.SlotAttentionAutoEncoder, 7, 890_308),
    ("set_prediction", sa.SlotAttentionClassifier, 10, 380_755)])
def test_models_equal_official(task, model_class, num_slots, count):
    case = golden(task)
    weights, image, noise = official_inputs(GOLDEN[f"{task}/names"], num_slots)
    model = model_class(128, num_slots)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    sa.load_official_weights(model, weights)
    output = model(image, model.slot_attention.init_slots(noise))
    if task == "discovery":
        loss = F.mse_loss(output.recon_combined, image)
    else:
        loss = sa.hungarian_huber_loss(output.predictions, case["target"])
    assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    for key in case.keys() & {*output._fields}:
        ours = getattr(output, key).detach()
        if ours.dim() > 3:  # pictures: some of their pixels
            step = 128 // case[key].shape[-2]
            ours = ours[..., ::step, ::step].movedim(-3, -1)
        atol = {"masks": 1e-5, "predictions": 1e-5, "slots": 3e-5}.get(key, 1e-4)
        assert_allclose(ours, case[key], atol=atol)
    loss.backward()
    # Each parameter's place among the official variables: load these places as if weights.
    places = {name: 0 * weights[name] + i for i, name in enumerate(weights)}
    sa.load_official_weights(model, places)
    place = [int(p.max()) for p in model.parameters()]
    squares = [p.grad.square().sum() for p in model.parameters()]
    norms = np.bincount(place, squares) ** 0.5  # the GRU's two biases are one variable
    # That of norm_slots' beta is exactly 0, but for rounding.
    assert_allclose(norms, case["grad_norm"], rtol=3e-4, atol=1e-6)


@parametrize("name", cases("units", "grid"))
def test_layers_equal_tensorflow(name):
    case = golden(f"units/{name}")
    layer_class = sa.ConvTranspose2dSame if "deconv" in name else sa.Conv2dSame
    stride = 1 if "s1" in name else 2
    layer = layer_class(3, 4, len(case["kernel"]), stride)
    layer.weight.data = case["kernel"].permute(3, 2, 0, 1)
    layer.bias.data = case["bias"]
    y = layer(case["x"].movedim(3, 1))
    assert_close(y.movedim(1, 3), case["y"], rtol=0, atol=1e-13)


LIMITS = """\
slot_attention.slots_mu             65
slot_attention.slots_log_sigma      65
slot_attention.gru.weight_ih       256
slot_attention.project_q.weight    128
encoder.cnn.2.weight              3200
decoder.cnn.0.weight              3200
mlp_classifier.0.weight            128
"""


def test_initialisation_is_keras():
    """Uniform up to sqrt(6 / (inputs + outputs)); the GRU's own kernel orthogonal; biases 0."""
    parameters = {}
    for model_class in sa.MODELS.values():
        parameters.update(model_class(128, 7).named_parameters())
    for line in LIMITS.splitlines():
        name, fans = line.split()
        largest = parameters[name].abs().max().item()
        assert 0.93 < largest / (6 / int(fans)) ** 0.5 <= 1, name
    recurrent = parameters["slot_attention.gru.weight_hh"]
    assert_close(recurrent.T @ recurrent, torch.eye(64))
    assert not any(p.any() for name, p in parameters.items() if name.endswith("bias"))


@parametrize("task", sa.MODELS)
def test_learning_rate_equals_official(task):
    case = golden(f"schedule/{task.removeprefix('object_')}")
    config = config_of(f"--data clevr --task {task}")
    for kind in ("", "fine_"):
        ours = [train.learning_rate(int(step), config) for step in case[f"{kind}steps"]]
        assert_allclose(ours, case[f"{kind}lr"], rtol=1e-5, atol=1e-12)


def test_official_checkpoint_is_read_without_tensorflow():
    """TensorFlow 2.21 wrote assets/ckpt-500, from RandomState(0) in the order of sorted names."""
    arrays = data.read_tf_checkpoint("assets/ckpt-500")
    rng = np.random.RandomState(0)
    for key in sorted(arrays):
        assert_array_equal(arrays[key], np.float32(rng.standard_normal(arrays[key].shape)))
        arrays[key.replace(".ATTR", ".OPTIMIZER_SLOT/optimizer/m/.ATTR")] = 0
    arrays["step"] = 500
    small = dict(slot_dim=4, mlp_hidden_size=8, encoder_channels=4, encoder_dim=4,
                 decoder_channels=4, decoder_strides=(2, 1))
    model = sa.SlotAttentionAutoEncoder(16, 3, encoder_strides=(1, 2), **small)
    sa.load_official_weights(model, arrays)
    for strides in ((1,), (1, 2, 2)):
        model = sa.SlotAttentionAutoEncoder(16, 3, encoder_strides=strides, **small)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(sa.WeightsError, match="another model"):
            sa.load_official_weights(model, arrays)
        assert equal(before, model.state_dict())


# --- What the paper says of it ------------------------------------------------------------------


def random_case():
    """Returns a module, inputs and initial slots or noise of more slots, in float64."""
    module = sa.SlotAttention(3, 16, learned_queries=True).double()
    return module, torch.randn(2, 30, 16).double(), torch.randn(2, 5, 16).double()


def test_slot_attention_is_algorithm_1():
    """In float64, where 1e-8 counts; its layers are compared with the official code above."""
    module, inputs, noise = random_case()
    slots, attn = module(inputs, module.init_slots(noise))
    x = module.norm_inputs(inputs)
    s = module.slots_mu[:, [0, 1, 2, 0, 1]] + module.slots_log_sigma.exp() * noise  # in turn
    for t in range(3):
        q = module.project_q(module.norm_slots(s))
        a = (q @ module.project_k(x).mT / 4).softmax(1)                     # [B, K, N]
        assert_close(attn[:, t], a)
        updates = F.normalize(a + 1e-8, 1, 2) @ module.project_v(x)         # a weighted mean
        s = module.gru(updates.flatten(0, 1), s.flatten(0, 1)).view_as(s)
        s = s + module.mlp(module.norm_mlp(s))
    assert_close(slots, s, rtol=0, atol=1e-12)


@parametrize("device", ["cpu", "meta"])
@parametrize("model_class", sa.MODELS.values())
def test_slots_and_iterations_change_at_test_time(model_class, device):
    """And under autocast, attention and positions stay in float32."""
    with torch.device(device), torch.autocast("cpu", torch.bfloat16):
        model = model_class((15, 12), 4)
        output = model(torch.zeros(2, 3, 15, 12), num_slots=6, num_iterations=5)
        position = model.encoder.pos(torch.zeros(1).bfloat16())
    assert output.attn.shape[:3] == (2, 5, 6)
    assert output.attn.dtype == position.dtype == torch.float32


def test_proposition_1():
    """Slots are equivariant to the order of the initial slots, and invariant to the inputs'."""
    module, inputs, init = random_case()
    slots, attn = module(inputs, init)
    assert_close(module(inputs.flip(1), init.flip(1)), (slots.flip(1), attn.flip(2, 3)))


@torch.no_grad()
@parametrize("autocast", [False, True])
def test_the_class_alone_is_the_module(autocast):
    """Copied into a notebook, with nothing but torch around it; on any device, for any dtype."""
    scope = {"torch": torch, "nn": nn}
    exec(inspect.getsource(sa.SlotAttention), scope)
    pasted = scope["SlotAttention"](3, 8)
    module = sa.SlotAttention(3, 8)
    pasted.load_state_dict(module.state_dict())
    inputs = torch.randn(2, 9, 8).bfloat16()
    init = torch.randn(2, 3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        same = module(inputs.float(), init.float())
        assert_close(pasted(inputs, init), same, rtol=0, atol=0)
    pasted.to("meta")(inputs.to("meta"))


def test_implicit_is_the_last_iteration_with_gradient():
    module, inputs, init = random_case()
    init.requires_grad_()
    unrolled = module(inputs, init)
    before = module(inputs, init, num_iterations=2)[0].detach().requires_grad_()
    last, _ = module(inputs, before, num_iterations=1)
    module.implicit = True
    slots, attn = module(inputs, init)
    assert_close((slots, attn), unrolled)
    weights = [module.gru.weight_ih, module.project_k.weight]
    assert_close(torch.autograd.grad(slots.sum(), [init, *weights]),
                 torch.autograd.grad(last.sum(), [before, *weights]))  # straight through to init


@parametrize("size", [35, 5, 3])
def test_first_convolution_by_linearity_is_the_convolution(size):
    decoder = sa.Decoder((size, size + 2), 8, 6, (1, 1)).double()
    conv = decoder.cnn[0]
    nn.init.normal_(conv.bias)
    slots = torch.randn(3, 8).double().requires_grad_()
    fast = decoder.convolve_broadcast(conv, slots)
    plain = conv(decoder.pos(slots[..., None, None]))
    assert_close(fast, plain)
    inputs = [slots, *conv.parameters(), *decoder.pos.parameters()]
    assert_close(*(torch.autograd.grad(y.norm(), inputs) for y in (fast, plain)))


@parametrize("case", cases("ari", "noisy_fg_mask255", "small_fg_mask255"))
def test_ari_equals_official(case):
    """Where the official code gives NaN, ours gives 1; masks of 0/255 score as those of 0/1."""
    case = golden(f"ari/{case}")
    for scale in (1, 255):
        ours = sa.adjusted_rand_index(scale * case["true"], case["pred"])
        assert_close(ours, case["score"].nan_to_num(1.0), rtol=0, atol=1e-5)


@parametrize("case", cases("hungarian"))
def test_hungarian_loss_equals_official(case):
    case = golden(f"hungarian/{case}")
    pred = case["pred"].requires_grad_()
    loss = sa.hungarian_huber_loss(pred, case["target"])
    loss.backward()
    assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    assert_allclose(pred.grad, case["grad_pred"], atol=1e-7)


@parametrize("n, m", [(6, 6), (4, 6), (1, 5)])
def test_matching_equals_brute_force(n, m):
    cost = torch.randn(20, n, m).double()
    orders = torch.tensor([*itertools.permutations(range(m), n)])
    best = cost[:, torch.arange(n), orders].sum(2).amin(1)
    for matrices in (cost, cost.mT):
        rows, cols = sa.minimum_cost_matching(matrices)
        ours = matrices[torch.arange(20)[:, None], rows, cols].sum(1)
        assert_allclose(ours, best, rtol=1e-6)


@parametrize("case", cases("ap", "thresholds", "helper"))
def test_average_precision_equals_official(case):
    """A threshold of -1 is none."""
    case = golden(f"ap/{case}")
    for threshold, precision in zip(GOLDEN["ap/thresholds"], case["ap"]):
        ours = sa.average_precision_clevr(case["pred"], case["target"], threshold)
        assert_allclose(ours, precision, atol=1e-6)


# --- Data ---------------------------------------------------------------------------------------


def arrays_of(scenes):
    """Returns a split's arrays; image [n, H, W, 3] as it was before it became a batch."""
    batch = scenes.batch(torch.arange(len(scenes)))
    batch["image"] = ((batch["image"] + 1) * 127.5).round().byte().movedim(1, 3)
    return {key: value.numpy() for key, value in batch.items()}


@parametrize("name", [name for name in data.FILES if name != "clevr_like"])
def test_tfrecords_equal_tensorflow(name):
    """Also after a storage client has inflated them; not with a wrong checksum at their end."""
    sample = Path(data.FILES[name].file).stem.removesuffix("_train") + "_sample"
    expected = dict(np.load(f"assets/tfrecords/{sample}.npz"))
    expected["mask"] = np.uint8(expected["mask"][..., 0] != 0)
    content = Path(f"assets/tfrecords/{sample}.tfrecords").read_bytes()
    for stored in (content, gzip.decompress(content)):
        Path("file").write_bytes(stored)
        scenes = list(data.read_tfrecords("file", name))
        for key, wanted in expected.items():
            assert_array_equal([scene[key] for scene in scenes], wanted, strict=True)
    Path("file").write_bytes(content[:-8] + bytes(8))
    with pytest.raises(data.InputError, match="file"):
        list(data.read_records("file", 1))


def test_a_real_file_is_read_trained_on_and_drawn(capsys, refused):
    """tetrominoes_mini is DeepMind's (google-deepmind/deepmind-research, Apache 2.0)."""
    file = "assets/tfrecords/tetrominoes_mini.tfrecords"
    scenes = list(data.read_tfrecords(file, "tetrominoes"))
    images, masks = (np.stack([scene[key] for scene in scenes]) for key in ("image", "mask"))
    assert_array_equal(masks.sum(1), 1)
    assert_array_equal(masks[:, 0] == 0, images.any(3))
    colors = np.concatenate([scene["color"][1:] for scene in scenes])
    assert_array_equal(np.unique(colors, axis=0), np.unique(data.TETROMINO_COLORS, axis=0))
    os.mkdir("data")
    shutil.copy(file, "data/tetrominoes_tetrominoes_train.tfrecords")  # as browsers name it
    run_and_draw(f"{TINY} --steps 1 --out run")
    assert "generated" not in capsys.readouterr().err
    assert "--data-root" in refused("--resume run --data-root other")
    assert score("tetrominoes", data.Scenes(images, masks.argmax(1)))["fg_ari"] > 0.99


@parametrize("n, train_count, border", [
    (100_000, 70_000, 70_000), (70_000, 70_000, 69_680), (57, 60_000, 52), (9, np.inf, 8)])
def test_splits(n, train_count, border):
    """The paper's count trains, what comes after it evaluates; if nothing does, a random tenth."""
    splits = [np.flatnonzero(data.in_split(n, split, train_count)) for split in ("train", "eval")]
    together = np.concatenate(splits)
    assert_array_equal(np.sort(together), np.arange(n))
    assert len(splits[0]) == border
    assert (np.diff(together) > 0).all() == (n > train_count)


def test_masks_and_images_are_cropped_alike():
    """clevr_with_masks: crop as in the paper, number of objects by visibility, targets."""
    shutil.copy("assets/tfrecords/clevr_with_masks_sample.tfrecords",
                "clevr_with_masks_train.tfrecords")
    stored = np.load("assets/tfrecords/clevr_with_masks_sample.npz")
    image = stored["image"][:, 29:221, 64:256]
    label = stored["mask"][:, :, 29:221, 64:256, 0].argmax(1)
    for split, most, index in (
            ("train", 5, [0]), ("train", 260, [0, 2]), ("eval", 260, [1])):
        arrays = arrays_of(data.load("clevr", split, ".", resolution=192, max_objects=most))
        assert_array_equal(arrays["image"], image[index])
        assert_array_equal(arrays["label"], label[index])
        assert_array_equal(arrays["target"][:, :, 18].sum(1), np.array([3, 6, 10])[index])
    assert_array_equal(data.resize_nearest(label[0], 96), label[0, 1::2, 1::2])
    os.utime("clevr_with_masks_train.tfrecords", (0, 0))
    data.load("clevr", "train", ".", resolution=192)
    assert cache_count() == 2  # it is another file now


def test_pictures_of_clevr_v1_have_a_crop_of_their_own():
    picture = np.arange(320 * 480).reshape(320, 480)
    assert_array_equal(data.cropped(picture, "paper"), picture[24:312, 96:384])
    assert_array_equal(data.cropped(picture, "official"), picture[29:221, 64:256])


OBJECTS = """[
    {"size": "large", "material": "rubber", "shape": "sphere", "color": "yellow",
     "3d_coords": [-3, 0, 0.7], "pixel_coords": [1, 2, 3], "rotation": 0},
    {"size": "small", "material": "metal", "shape": "cube", "color": "gray",
     "3d_coords": [3, 1.5, 0.35], "pixel_coords": [1, 2, 3], "rotation": 0}
]"""
# small large, rubber metal, cube sphere cylinder,
# gray blue brown yellow red green purple cyan, real
TARGETS = """
0  .5 .6166667  0 1  1 0  0 1 0  0 0 0 1 0 0 0 0  1
1 .75 .5583333  1 0  0 1  1 0 0  1 0 0 0 0 0 0 0  1
"""


def clevr_v1(count):
    """Makes a tiny CLEVR_v1.0 in the real layout, of red pictures with two objects each."""
    os.makedirs("CLEVR_v1.0/images/train")
    os.mkdir("CLEVR_v1.0/scenes")
    scenes = []
    for i in range(count):
        name = f"CLEVR_train_{i:06}.png"
        Image.new("RGBA", (480, 320), (i, 0, 0)).save(f"CLEVR_v1.0/images/train/{name}")
        scenes.append({"image_filename": name, "objects": json.loads(OBJECTS)})
    Path("CLEVR_v1.0/scenes/CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))


def test_clevr_v1_is_read_and_trained_on():
    clevr_v1(20)
    arrays = arrays_of(data.load("clevr", "train", ".", resolution=32))
    assert len(arrays["image"]) == 18
    target = arrays["target"][5, :2].flatten()
    assert_allclose(target, np.float32(TARGETS.split()), rtol=1e-6)
    assert not arrays["target"][:, 2:].any()
    flags = ("--data clevr --data-root . --encoder-channels 8 --batch-size 2 --steps 1 "
             "--resolution 32 --device cpu")
    run(f"{flags} --decoder-strides 2 2 1 --decoder-channels 8 --out a")
    assert "fg_ari" not in log_of("a")[-1]
    run_and_draw(f"{flags} --task set_prediction --out b")
    assert {"ap_inf", "ap_0.125"} <= log_of("b")[-1].keys()


@parametrize("make, n, size, least, most", [
    (data.make_tetrominoes, 500, 35, 3, 3), (data.make_multi_dsprites, 500, 64, 2, 5),
    (data.make_clevr_like, 6, 128, 3, 10)])
def test_generated_scenes_follow_the_rules(make, n, size, least, most):
    scenes = make(n, 0)
    image = scenes["image"]
    label = scenes["label"]
    assert image.shape == (*label.shape, 3) == (n, size, size, 3)
    assert {*scenes["objects"]} <= {*range(least, most + 1)}
    assert (label.max((1, 2)) <= scenes["objects"]).all()
    assert equal(make(n, 0), scenes) and not equal(make(n, 1)["image"], image)


def test_tetrominoes_are_whole_and_anywhere():
    scenes = data.make_tetrominoes(2000, 0)
    pieces = scenes["label"][:, None] == np.arange(1, 4)[:, None, None]
    assert_array_equal(pieces.sum((2, 3)), 100)  # none over another
    assert_array_equal(scenes["image"].any(3), pieces.any(1))
    assert {*pieces.any(3).argmax(2).flat} == {*range(31)}  # any pixel, no grid


def test_clevr_like_scenes_obey_clevrs_generator():
    scenes = data.make_clevr_like(12, 0, resolution=96, min_objects=8, max_objects=8, crop=False)
    target = scenes["target"][:, :8]
    place = 6 * target[..., :2] - 3
    radius = target[..., 3:5] @ [0.35, 0.7]
    assert_allclose(6 * target[..., 2] - 3, radius, atol=1e-6)
    assert np.abs(place).max() <= 3
    distance = np.linalg.norm(place[:, :, None] - place[:, None], axis=3)
    gap = distance - radius[..., None] - radius[:, None]
    assert 0.25 <= (gap + 9 * np.eye(8)).min() < 0.5
    seen = (scenes["label"][..., None] == np.arange(9)).mean((1, 2)).min()
    assert seen * 320 * 240 > 100  # 200, decided on a coarser map


# --- A folder of pictures -----------------------------------------------------------------------

RED = 255, 0, 0
BLUE = 0, 0, 255


def ugly_folder():
    """Makes pictures as people have them, red above and blue below."""
    os.makedirs("own/ä b/.hidden")
    picture = Image.new("RGB", (30, 20), RED)
    picture.paste(BLUE, (0, 10, 30, 20))
    for name in ("ä b/c d.PNG", "ä b/.hidden/a.png", ".b.png"):
        picture.save(f"own/{name}")
    picture.convert("CMYK").save("own/cmyk.jpg")
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned back
    picture.transpose(Image.ROTATE_90).save("own/exif.jpg", exif=exif)
    picture.save("own/first.gif", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    palette = picture.convert("P")
    palette.save("own/palette.png", transparency=palette.getpixel((0, 0)))
    Image.new("RGB", (1, 1), BLUE).save("own/tiny.png")
    square = picture.resize((5, 5), Image.NEAREST)
    square.crop((-398, 0, 402, 5)).save("own/wide.png")  # black on both sides
    Path("own/note.txt").touch()
    with contextlib.suppress(OSError):  # not everybody may, on Windows
        os.symlink(".", "own/circle")


def test_a_folder_as_people_have_it(monkeypatch):
    ugly_folder()
    monkeypatch.setattr(data, "in_split", lambda n, *others: np.full(n, True))

    def images():
        return arrays_of(data.load("own", "train", resolution=4))["image"].astype(int)

    upper = np.array([RED, RED, RED, (255, 255, 255), BLUE, RED, RED])  # cmyk, exif, first ...
    assert np.abs(images()[:, 0] - upper[:, None]).max() < 5
    assert np.abs(images()[:, 3] - BLUE).max() < 5
    as_in_a_new_process()
    Image.new("RGB", (1, 1), RED).save("own/tiny.png")
    assert (images()[4] == RED).all()


def test_own_pictures_train_as_the_same_arrays(refused, monkeypatch, capsys):
    ugly_folder()

    def mine(split):
        return data.Scenes(arrays_of(data.load("own", split, resolution=16))["image"])

    monkeypatch.setitem(data.DATASETS, "mine", mine)
    flags = f"{TINY} --batch-size 2 --resolution 16"
    run_and_draw(f"{flags} --data own --out a")
    run(f"{flags} --data mine --out b")
    assert log_of("a") == log_of("b")
    assert "--batch-size 32" in refused("--data own --small")
    as_in_a_new_process()
    shutil.copy("own/tiny.png", "own/new.png")  # other pictures would be held out
    assert "trained on own" in refused("--resume a --steps 7")
    run("--eval a")
    assert "trained on own" in capsys.readouterr().err


def test_masks_are_entities_by_value():
    label = np.uint8(range(60)).reshape(6, 10) % 14
    label[0, 3] = 255
    mask = Image.fromarray(label)
    os.mkdir("own")
    os.mkdir("masks")
    for name in "ab":
        Image.new("RGB", (10, 6)).save(f"own/{name}.jpg")
        mask.save(f"masks/{name}.png")
        mask.putpalette(bytes(range(256)) * 3)  # b's
    for split in ("train", "eval"):
        arrays = arrays_of(data.load("own", split, resolution=6, masks="masks"))
        assert_array_equal(arrays["label"], [label[:, 2:8]])
    run(f"{TINY} --data own --masks masks --batch-size 1 --resolution 8 --out run")
    assert "fg_ari" in log_of("run")[-1]
    Image.fromarray(label > 7).save("bits.png")
    assert_array_equal(data.read_mask("bits.png", (10, 6)), label[:, 2:8] > 7)


def test_fg_ari_of_many_entities_and_of_pixels_left_out():
    label = torch.tensor([[[1, 1, 12, 12, 12, 0, 255]]]).byte()
    masks = F.one_hot(torch.tensor([1, 1, 1, 0, 0, 0, 1])).T.reshape(1, 2, 1, 1, 7)
    score = train.foreground_ari(label, masks)
    # Of 10 pairs 2 are together in both, 4 in each, by chance 1.6: (2 - 1.6) / (4 - 1.6).
    assert_allclose(score, 1 / 6, rtol=1e-6)


def spoil_a_checksum(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:-16] + bytes(4) + content[-12:])  # that of the pixels


@parametrize("path, spoil", [
    ("own/a.jpg", lambda path: Image.new("I;16", (10, 6)).save(path, "PNG")),
    ("own/a.jpg", lambda path: os.truncate(path, 300)),
    ("masks/a.png", lambda path: Image.new("L", (9, 6)).save(path)),
    ("masks/a.png", lambda path: Image.new("RGB", (10, 6)).save(path)),
    ("masks/a.png", spoil_a_checksum),
    ("masks/a.png", os.remove)])
def test_unfit_pictures_and_masks_are_named(refused, path, spoil):
    other = path.replace("a.", "b.")
    os.mkdir("own")
    os.mkdir("masks")
    for file in ("own/a.jpg", "own/b.jpg", "masks/a.png", "masks/b.png"):
        Image.new("L", (10, 6)).save(file)
    spoil(path)
    spoil(other)
    line = refused("--data own --masks masks --small")
    assert str(Path(path)) in line and str(Path(other)) in line  # all at once


# --- The cache ----------------------------------------------------------------------------------


def cache_count():
    return len(list(Path().rglob("*.zip")))


def some_scenes(count):
    for i in range(count):
        yield {"image": np.zeros((64, 64, 3), np.uint8), "objects": i}


def test_a_cache_follows_its_sources(monkeypatch):
    def build(*sources):
        data.cached("mine", Path(), map(Path, sources), some_scenes(3), 3)
        return cache_count()

    for name in "ab":
        Path(name).touch()
    assert build("a") == build("a") == 1
    os.utime("a", (0, 0))
    assert build("a") == 2
    os.truncate("a", 1)
    os.utime("a", (0, 0))
    assert build("a") == 3
    assert build("a", "b") == 4
    monkeypatch.setattr(data, "CACHE_VERSION", -1)
    assert build("a", "b") == 5


def test_scenes_are_written_as_they_come():
    """So a cache of any size takes little memory to build."""
    def watched():
        for i, scene in enumerate(some_scenes(50)):
            part, = Path("cache").glob("part-*")
            assert part.stat().st_size >= 12_288 * (i - 1)
            with open("cache/lock") as file:  # no other process may build it meanwhile
                assert not data.fcntl or not data.lock(file)
            yield scene

    data.cached("mine", Path(), [], watched(), 50)
    jobs = iter(range(100_000))
    results = data.in_threads(str, jobs)
    assert next(results) == "0" and next(jobs) < 5_000
    results.close()


def test_a_data_folder_that_cannot_be_written(capsys):
    """A folder stands where the lock would be: permissions do not stop root."""
    os.makedirs("shared/cache")
    shutil.copy("assets/tfrecords/tetrominoes_mini.tfrecords",
                "shared/tetrominoes_train.tfrecords")
    data.load("tetrominoes", "train", "shared")
    os.remove("shared/cache/lock")
    os.mkdir("shared/cache/lock")
    capsys.readouterr()
    data.load("tetrominoes", "train", "shared")  # its cache is there
    assert not capsys.readouterr().err
    data.load("tetrominoes", "train", "shared", resolution=9)
    assert str(Path("shared/cache")) in capsys.readouterr().err
    assert list(Path("data/cache").glob("*.zip"))


def test_checksums_are_verified_once_in_a_process(monkeypatch):
    verified = []
    monkeypatch.setattr(zipfile.ZipFile, "testzip",  # None: nothing is wrong
                        lambda archive: verified.append(Path(archive.filename).parent.name))
    run_and_draw(f"{TINY} --steps 1 --out run")  # loads, evaluates, draws
    assert verified.count("cache") == 2


# --- Training, evaluation, figures --------------------------------------------------------------

TINY = ("--data tetrominoes --small --train-count 16 --eval-count 8 --batch-size 8 --steps 6 "
        "--eval-every 3 --log-every 1 --dtype float32 --device cpu --encoder-channels 8 "
        "--decoder-channels 8 --slot-dim 8 --threads 1")


def config_of(flags):
    return train.parse(flags.split())[1]


def run_and_draw(flags):
    train.main(flags.split())


def run(flags):
    """Trains, and leaves out the figure at the end: it takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "main", lambda argv: None)
        run_and_draw(flags)


def log_of(run):
    """Returns the rows of a run's log, but for times."""
    rows = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["images_per_s"]
    return rows


def same(a, b):
    """Returns whether two runs have the same weights, optimizers and log, to the bit."""
    runs = [{**visualize.read_run(run), "config": 0, "seconds": 0} for run in (a, b)]
    return equal(*runs) and log_of(a) == log_of(b)


@pytest.fixture
def refused(capsys):
    """A function that returns the one line with which a command ends, after exit code 2."""
    def refused(flags, main=train.main):
        capsys.readouterr()  # what was said before
        code = 0
        try:
            main(flags.split())
        except SystemExit as stop:  # pytest.raises would keep the run's log open, and locked
            code = stop.code
        errors = capsys.readouterr().err
        assert code == 2, errors
        return errors.splitlines()[-1]

    return refused


def test_training_repeats_resumes_and_evaluates(capsys):
    flags = f"{TINY} --learned-queries --muon none --slot-loss 0"  # these depend on --steps
    run(f"{flags} --out whole")
    run(f"{flags} --steps 3 --out parts")
    with open("parts/log.jsonl", "a") as log:  # a killed run has logged more than it saved
        log.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    visualize.draw_curves(["parts"])
    run("--resume parts --steps 6")  # from the middle of the second epoch
    assert same("whole", "parts")
    rows = log_of("whole")
    assert [row["step"] for row in rows] == list(range(1, 7))
    run("--eval whole")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]).items() <= {**rows[-1], "num_iterations": 10}.items()
    run("--eval whole --num-slots 5")
    assert "5 slots" in capsys.readouterr().out


def test_a_run_is_saved_every_ten_minutes(monkeypatch):
    saved = []
    monkeypatch.setattr(train, "SAVE_EVERY", 1e-9)
    monkeypatch.setattr(train, "save", lambda *arguments: saved.append(arguments[-3]))
    run(f"{TINY} --steps 3 --eval-every 3 --out run")
    assert saved == [1, 2, 3]


def test_what_a_resumed_run_takes_from_where(monkeypatch, capsys):
    run(f"{TINY} --steps 1 --muon none --clip 0.001 --threads 0 --out run")
    monkeypatch.setattr(train, "DEVICES", ["cuda", "cpu"])  # as on a machine with a GPU
    _, config, checkpoint = train.parse("--resume run --clip 0.5".split())
    assert (config.device, config.clip, config.slot_dim) == ("cpu", 0.5, 8)
    assert config.threads  # as many as were idle
    train.set_up(config)
    assert "--device cuda" in capsys.readouterr().err
    assert config_of("--eval run").device == "cuda"
    adam, = checkpoint["optimizers"]
    assert adam["param_groups"][0]["lr"] == 0  # the official step 0
    norms = [state["exp_avg"].norm() for state in adam["state"].values()]
    assert_allclose(np.linalg.norm(norms), 0.1 * 0.001, rtol=1e-3)  # the gradient was clipped


def test_random_draws_stay_what_they_were():
    """Results depend on them."""
    config = config_of(f"{TINY} --seed 1")
    scenes = train.load_scenes(config, "train")
    batch, = train.micro_batches(3, config, scenes)
    torch.manual_seed(1_000_003 + 3)
    assert equal(batch["noise"], torch.randn(8, 4, 8))
    torch.manual_seed(1_000_003 + 1)
    assert equal(batch["image"], scenes.batch(torch.randperm(16)[8:])["image"])


@contextlib.contextmanager
def started(*command):
    """Starts a Python process, in a group of which nothing is left afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, *command], env=environment, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()  # torchrun ends its processes, which are in other groups
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def in_a_process_that_can_be_forked(code):
    """Runs code of this file in a process that has no threads, and without CUDA."""
    with started("-c", f"import test_slot_attention as t; {code}") as process:
        _, errors = process.communicate(timeout=200 * MANY)
    assert process.returncode == 0, errors[-3000:]


def fork(flags, stderr=2):
    """Starts training in a copy of this process. Returns its number."""
    child = os.fork()
    if not child:
        os.dup2(stderr, 2)
        run_and_draw(flags)
        os._exit(0)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path, lines=0):
    """Waits until a file is there, and has so many lines."""
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stop_by_signals():
    torch.set_num_threads(1)
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads its messages, as when a terminal is closed
    for number in train.SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # not as under nohup
        out = Path(f"run-{number}")
        child = fork(f"{TINY} --steps 9999 --eval-every 9999 --log-every 50 --out {out}", writer)
        wait_for(out / "log.jsonl", 1)
        os.kill(child, number)
        assert exit_code(child) == 128 + number
        step = visualize.read_run(out)["step"]
        assert step == log_of(out)[-1]["step"] < 100  # at once, not at the next line of the log

    def evaluate(*args):
        Path("evaluating").touch()
        time.sleep(600)

    train.evaluate = evaluate
    child = fork(f"{TINY} --eval-every 1 --out long")
    wait_for(Path("evaluating"))
    os.kill(child, signal.SIGINT)
    time.sleep(1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == -signal.SIGINT


@POSIX
def test_a_signal_saves_first_and_a_second_one_stops_at_once():
    in_a_process_that_can_be_forked("t.stop_by_signals()")


@POSIX
def test_two_processes_train_as_one_and_resume_as_one():
    """Two, with micro-batches, then a signal to one, then one, against one process all along."""
    flags = f"{TINY} --muon none --slot-loss 0 --eval-every 10"
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 -m train"
    command += f" {flags} --accumulate 2 --steps 9999 --out many"
    with started(*command.split()) as process:
        wait_for(Path("many/log.jsonl"), 11)
        # SIGTERM to the second process alone, or, where there is no pkill, to torchrun.
        if os.system(f"pkill -n -P {process.pid}"):
            process.terminate()
        _, errors = process.communicate(timeout=100)
    assert errors.count("stopped and saved") == errors.count("16 scenes of") == 1
    steps = visualize.read_run("many")["step"] + 3
    run(f"--resume many --steps {steps}")
    run(f"{flags} --steps {steps} --out one")
    for a, b in zip(log_of("one"), log_of("many"), strict=True):
        assert a["step"] == b["step"]
        rtol = 1e-5 if a["step"] <= 20 else 1e-3  # rounding errors grow with the steps
        assert_allclose(b["loss"], a["loss"], rtol=rtol)


@parametrize("cpuinfo, fast", [
    ("GenuineIntel avx512_bf16", False), ("GenuineIntel avx512_bf16 amx_bf16", True),
    ("AuthenticAMD avx2", False), ("AuthenticAMD\navx512_bf16", True)])
def test_bfloat16_is_used_where_it_is_fast(monkeypatch, cpuinfo, fast):
    monkeypatch.setattr(Path, "exists", lambda path: True)  # macOS has no such file
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    autocast = train.set_up(train.Config(device="cpu", threads=1))
    with autocast:
        assert torch.is_autocast_enabled("cpu") == fast


def test_processes_on_gpus_can_sum_on_the_cpu_as_well(monkeypatch):
    """Signals are counted there; without a name, PyTorch takes the GPU's backend alone."""
    started = []
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train.dist, "init_process_group", started.append)
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    train.set_up(train.Config(device="cuda", dtype="float32"))
    backends = train.dist.distributed_c10d.BackendConfig(started[-1]).get_device_backend_map()
    assert backends == {"cpu": "gloo", "cuda": "nccl"}


def test_muon_makes_every_direction_equally_fast():
    """A hidden matrix moves with singular values near 1, whatever its gradient's; else Adam."""
    config = config_of("--small")
    assert train.learning_rate(config.steps // 4, config) == 0.75 * config.lr  # to 0 at the end
    model = train.build_model(config)
    optimizers = *train.muon_and_adam(model, "encoder"), *train.muon_and_adam(model, "all")
    encoders, _, hidden, others = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    assert (len(encoders), len(hidden)) == (11, 14)  # without, with the decoder's three
    assert {*hidden, *others} == {*model.parameters()}
    muon = optimizers[2]
    muon.param_groups[0]["lr"] = 0.001
    for parameter in hidden:
        parameter.data.zero_()
        parameter.grad = torch.randn_like(parameter)
        muon.step()
        parameter.grad = None
        update = parameter.detach().flatten(1)
        scale = 0.01 * max(1, update.shape[0] / update.shape[1]) ** 0.5
        values = torch.linalg.svdvals(update) / scale
        assert 0.5 < values.quantile(0.1) and values.max() < 1.3  # the smallest take longer


@parametrize("share, progress, loss", [
    (0.5, 0, 0.0), (0.5, 0.5, 0.25 + 0.0035 * 0.5 ** 3.5), (1.0, 1, 1.0035035)])
def test_slot_loss_leaves_each_pixel_to_one_slot(share, progress, loss):
    """Here to one of a white and of a black one, where the picture is grey."""
    recons = torch.ones(1, 2, 3, 4, 4)
    recons[:, 1] = -1
    masks = torch.full((1, 2, 1, 4, 4), share)
    masks[:, 1] = 1 - share
    image = (masks * recons).sum(1)
    output = sa.AutoEncoderOutput(image, recons, masks, None, None)
    ours = train.add_slot_loss(image.square().mean(), output, 0 * image, 0.5, progress)
    assert_close(ours.item(), loss)


NOT_IN_THE_PAPER = ("--no-implicit --no-learned-queries --train-iterations 0 --query-scale 1 "
                    "--decoder-kernel 5 --pixel-shuffle 1 --clip 0 --muon none --slot-loss 0")


def test_every_recipe_makes_a_model_and_has_a_folder_of_its_own():
    for name in ("", *train.RECIPES):
        flags = name.replace("-small", " --small").replace("-set", " --task set")
        args, config, _ = train.parse(f"--data {flags}".split() if name else [])
        assert args.out == Path("runs", name or "demo")
        if name and "small" not in name:
            assert config == config_of(f"--data {flags} {NOT_IN_THE_PAPER}")
        model = train.build_model(config).cpu()
        assert model(torch.zeros(1, 3, config.resolution, config.resolution))[0].isfinite().all()
        if name in ("multi_dsprites", "tetrominoes"):  # counted by hand, from appendix E
            assert sum(parameter.numel() for parameter in model.parameters()) == 235_812
        largest = model.slot_attention.project_q.weight.abs().max()
        assert 0.9 < largest / (3 / config.slot_dim) ** 0.5 / config.query_scale <= 1


def with_five_noises(file, images):
    """Yields the masks of pictures [n, H, W, 3], by the weights in assets/, from five seeds."""
    model, _ = visualize.load_run(f"assets/{file}.pt")
    scenes = data.Scenes(np.stack([data.resize(image, 64) for image in images]))
    for seed in range(5):
        torch.manual_seed(seed)
        yield model(scenes.batch(scenes.index)["image"]).masks


REAL = pytest.mark.skipif(not SAMPLES.exists(), reason="needs data that the project does not carry")


@REAL
@parametrize("file, sample, least", [
    ("multi_dsprites", "multi_dsprites/on_grayscale_5.npz", 0.9),
    ("clevr_like", "clevr_with_masks/clevr6_16.npz", 0.95)])
def test_shipped_weights_take_real_scenes_apart(file, sample, least):
    """The README's means."""
    arrays = np.load(SAMPLES / sample)
    labels = torch.tensor(np.stack([data.resize_nearest(label, 64) for label in arrays["label"]]))
    masks = with_five_noises(file, arrays["image"])
    assert np.mean([train.foreground_ari(labels, mask).mean() for mask in masks]) > least


@REAL
def test_real_objects_have_slots_of_their_own():
    """Such a slot owns the centre of this object, of no other one, and is not the largest."""
    folder = SAMPLES / "CLEVR_v1.0"
    scenes = data.clevr_v1_scenes(folder, 64, "paper")
    images = [scene["image"] for scene in scenes if scene["objects"] <= 6]
    scenes = json.loads((folder / "scenes/CLEVR_train_scenes.json").read_bytes())["scenes"]
    objects = [scene["objects"] for scene in scenes if len(scene["objects"]) <= 6]
    alone = []
    for masks in with_five_noises("clevr_like", images):
        for things, owner in zip(objects, masks[:, :, 0].argmax(1)):
            centers = [thing["pixel_coords"][:2] for thing in things]
            cells = np.int64((np.array(centers) - (96, 24)) // 4.5)
            inside = cells[((cells >= 0) & (cells < 64)).all(1)]
            slots = [owner[row, col].item() for col, row in inside]
            alone += [slots.count(slot) == 1 and slot != owner.flatten().mode()[0]
                      for slot in slots]
    assert np.mean(alone) > 0.96


def score(file, scenes):
    """Returns what the weights in assets/ make of Scenes."""
    path = f"assets/{file}.pt"
    config = config_of(f"--eval {path} --device cpu")
    model, _ = visualize.load_run(path)
    return train.evaluate(model, config, scenes, contextlib.nullcontext())


@REAL
def test_shipped_weights_predict_real_objects():
    scenes = list(data.clevr_v1_scenes(SAMPLES / "CLEVR_v1.0", 128, "none"))
    images, targets = (np.stack([scene[key] for scene in scenes])
                       for key in ("image", "target"))
    assert score("set_prediction", data.Scenes(images, None, targets))["ap_inf"] > 0.88


@parametrize("file, make, metric, least", [
    ("tetrominoes", lambda: data.make_tetrominoes(128, 12345), "fg_ari", 0.97),
    ("multi_dsprites", lambda: data.make_multi_dsprites(64, 12345), "fg_ari", 0.85),
    ("clevr_like", lambda: data.make_clevr_like(8, 12345, 64, max_objects=6), "fg_ari", 0.9),
    ("set_prediction", lambda: data.make_clevr_like(16, 12345, crop=False), "ap_inf", 0.8)])
def test_shipped_weights_take_scenes_apart_that_they_never_saw(file, make, metric, least):
    made = make()
    scenes = data.Scenes(made["image"], made["label"], made.get("target"))
    assert score(file, scenes)[metric] > least


WEIGHTS = "assets/tetrominoes.pt"
FIGURES = f"""
run --count 2
run --figure curve
{WEIGHTS} --figure row --count 1 --num-iterations 3
{WEIGHTS} --figure clip --images own.png own.png --out clip.pdf
assets/clevr_like.pt --images own.png --num-slots 5
assets/set_prediction.pt --images own.png --num-iterations 1
"""


def test_figures_of_all_kinds(capsys):
    run(f"{TINY} --steps 3 --num-slots 5 --out run")
    Image.new("RGB", (480, 320), "blue").save("own.png")
    for flags in FIGURES.splitlines():  # the first line: the weights that come with the code
        visualize.main(flags.split())
        assert Path(capsys.readouterr().err.split()[-1]).stat().st_size > 5_000


def test_a_clip_goes_on_from_the_slots_of_the_frame_before():
    """The same frame twice is one frame with twice the iterations."""
    model, _ = visualize.load_run(WEIGHTS)
    model.slot_attention.num_iterations = 2
    frames = data.Scenes(data.make_tetrominoes(1, 0)["image"]).batch([0, 0])["image"]
    torch.manual_seed(0)
    _, (_, cells) = visualize.clip_rows(model, frames)
    torch.manual_seed(0)
    recon = model(frames[:1], num_iterations=4).recon_combined[0]
    assert_allclose(cells[1][1], visualize.to_rgb(recon), atol=1e-5)


# --- Bad input: one line, exit code 2, nothing lost and no code run -----------------------------

WRONG = f"""\
train.py --data nothing                                          | nothing
train.py --data {'a' * 300}                                      | aaa
train.py --steps 0                                               | --steps
train.py --steps 1.5                                             | --steps
train.py --lr nan                                                | --lr
train.py --batch-size x                                          | --batch-size
train.py --encoder-strides 1 0                                   | --encoder-strides
train.py --unknown 1                                             | unknown
train.py --slot-loss -1                                          | --slot-loss
train.py --seed -1                                               | --seed
train.py --device nowhere                                        | --device
train.py --data clevr --data-root nowhere                        | clevr_like
train.py --data multi_dsprites_on_colored --data-root nowhere    | nowhere/
train.py --task set_prediction                                   | --task
train.py --task set_prediction --data clevr_like --num-slots 17  | 16
train.py --task set_prediction --data clevr_like --crop paper    | --crop
train.py --resume nowhere                                        | nowhere
train.py --resume=                                               | No such
train.py --eval nowhere                                          | nowhere
train.py --eval=                                                 | No such
train.py --resume x --eval y                                     | --eval
train.py --resume x --out y                                      | --out
train.py --data . --masks .                                      | --masks
train.py --resume {WEIGHTS}                                      | --resume
train.py --eval {WEIGHTS} --small                                | --small
train.py --eval {WEIGHTS} --slot-dim 16                          | another model
train.py --train-count 8 --batch-size 64 --eval-count 8          | --batch-size
train.py --batch-size 10 --accumulate 4                          | --accumulate
train.py --min-objects 4 --train-count 9                         | --max-objects
train.py --data clevr_like --max-objects 2                       | max_objects
train.py --resolution 64                                         | --resolution
train.py --data multi_dsprites --resolution 32                   | --resolution
train.py --out {'a' * 300} --train-count 32 --eval-count 1       | aaa
visualize.py nowhere                                             | nowhere
visualize.py {'a' * 300}                                         | aaa
visualize.py {WEIGHTS} --figure curve                            | log
visualize.py {WEIGHTS} --out no/a.png                            | no
visualize.py {WEIGHTS} --out {'a' * 300}.png                     | aaa
visualize.py {WEIGHTS} --out {WEIGHTS}/a.png                     | cannot write
visualize.py {WEIGHTS} --out a.xyz                               | xyz
visualize.py {WEIGHTS} --count 0                                 | --count
visualize.py {WEIGHTS} --num-slots x                             | --num-slots
"""


@parametrize("line", WRONG.splitlines())
def test_wrong_flags(refused, line):
    command, message = line.split(" | ")
    file, flags = command.split(maxsplit=1)
    main = sys.modules[file.removesuffix(".py")].main
    assert message in refused(flags, main)
    assert not [*Path().rglob("checkpoint.pt"), *Path().rglob("part-*")]


@parametrize("error", [ValueError, IndexError, MemoryError])
@parametrize("owner, name", [
    (data.DATASETS, "tetrominoes"), (data, "make_tetrominoes"), (sa.Encoder, "forward"),
    (visualize, "draw")])
def test_a_mistake_in_code_keeps_its_traceback(monkeypatch, owner, name, error):
    def mistake(*args, **others):
        raise error("of one's own")

    patch = monkeypatch.setitem if owner is data.DATASETS else monkeypatch.setattr
    patch(owner, name, mistake)
    with pytest.raises(error, match="of one's own"):
        run_and_draw(f"{TINY} --steps 1 --out run")


def weights_from_anybody(key, **values):
    weights = data.read_file(WEIGHTS)
    weights[key].update(values)
    torch.save(weights, "theirs.pt")


def test_a_misspelt_argument_is_an_error(refused):
    weights_from_anybody("arguments", num_slot=4)
    assert "num_slot" in refused("--eval theirs.pt")
    with pytest.raises(TypeError, match="num_slot"):
        visualize.main(["theirs.pt"])


def test_weights_from_anybody_choose_no_folder():
    weights_from_anybody("config", data_root="20000", eval_count=20_000)
    visualize.main("theirs.pt --count 1".split())
    run("--eval theirs.pt --eval-count 8")
    assert not list(Path().rglob("*20000*"))  # neither folder nor cache


def test_weights_from_anybody_choose_no_pictures(refused):
    weights_from_anybody("config", data=os.getcwd())
    assert "--images" in refused("theirs.pt", visualize.main)


def test_a_folder_holds_one_run(refused):
    run(f"{TINY} --steps 1 --out run")
    content = Path("run/checkpoint.pt").read_bytes()
    assert "holds a run" in refused(f"{TINY} --out run")
    assert "--muon" in refused("--resume run --muon none")
    if data.fcntl:
        with open("run/log.jsonl", "a") as file:
            assert data.lock(file)
            assert "another process" in refused("--resume run --steps 2")
    assert Path("run/checkpoint.pt").read_bytes() == content


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(refused, monkeypatch):
    run(f"{TINY} --steps 3 --out run")
    before = Path("run/checkpoint.pt").read_bytes()
    line = refused("--resume run --steps 60 --lr 1e12 --eval-every 60")
    assert "NaN" in line and "by step 60" not in line  # it does not wait until it would save
    assert "by step 4" in refused("--resume run --steps 4 --lr 1e12")  # the weights are finite
    step = torch.optim.Adam.step

    def spoil(self, *args):
        step(self, *args)
        state, *_ = self.state.values()
        state["exp_avg"][0] = torch.inf  # no loss shows this

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    assert "by step 4" in refused("--resume run --steps 4")
    assert Path("run/checkpoint.pt").read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_no_file_runs_code(refused, monkeypatch):
    content = {"model": Evil()}
    torch.save(content, "new.pt")
    torch.save(content, "old.pt", _use_new_zipfile_serialization=False)
    Path("pickle.pt").write_bytes(pickle.dumps(content))
    for name in ("new.pt", "old.pt", "pickle.pt"):
        assert name in refused(name, visualize.main)
    assert not Path("evil").exists()
    # PIL gives PostScript to a program:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: os.mkdir("ran"))
    Image.new("RGB", (50, 40)).save("photo.png", format="EPS")
    assert "photo.png" in refused(f"{WEIGHTS} --images photo.png", visualize.main)
    assert not Path("ran").exists()
    with pytest.raises(Exception):
        Image.open("photo.png").load()
    assert Path("ran").exists()  # the danger is real


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_loses_nothing(refused):
    """A limit on the size of files stands for it: for figure, checkpoint, cache and log."""
    resource = pytest.importorskip("resource")
    run_and_draw(f"{TINY} --steps 3 --out run")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Path("run/log.jsonl").stat().st_size
    for flags, main, size in (
            ("run", visualize.main, 20_000),
            ("--resume run --steps 6", train.main, 20_000),
            (f"{TINY} --eval-count 9 --out new", train.main, 20_000),
            ("--resume run --steps 4", train.main, log)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert "cannot write" in refused(flags, main)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(path.read_bytes().startswith(content) for path, content in before.items())
    assert not list(Path().rglob("part-*"))
    run("--resume run --steps 6")
    assert len(log_of("run")) == 6


# --- Kill it anywhere; damage files. By hand: MANY=100 python -m pytest -k "killed or damaged" ---

MANY = int(os.environ.get("MANY", 1))


def kill_anywhere(count):
    """Kills training by the clock; what --resume makes of it is the same, to the bit."""
    torch.set_num_threads(1)  # a copy of this process has no other
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # what each copy would import, for seconds
    visualize.Figure().savefig("imports.png")
    visualize.draw_runs = lambda args: visualize.Figure()
    rng = random.Random(0)
    flags = f"{TINY} --steps 12 --eval-every 2 --train-count 24"
    start = time.perf_counter()
    assert exit_code(fork(f"{flags} --out whole")) == 0
    seconds = time.perf_counter() - start
    kills = 0
    whole = 0
    while kills < count or whole == 0:
        what = f"{flags} --data-root {whole}-data --out {whole}"
        if Path(f"{whole}/checkpoint.pt").exists():
            what = f"--resume {whole}"
        child = fork(what)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        assert code in (0, -signal.SIGKILL)
        if code:
            kills += 1
        else:
            assert same(str(whole), "whole")
            Image.open(f"{whole}/figure.png").load()
            whole += 1


@POSIX
def test_killed_anywhere_it_resumes():
    in_a_process_that_can_be_forked("t.kill_anywhere(10 * t.MANY)")


def damaged(content, rng):
    """Returns bytes with some damage, as disks, networks and people do it."""
    place = rng.randrange(len(content))
    size = rng.randint(1, 64)
    start = content[:place]
    rest = content[place + size:]
    flipped = bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:]
    other = rng.choice(b"|text|\x1f\x8b|PK\x03\x04|{}|[]|null".split(b"|"))
    return rng.choice([start, start + flipped, start + bytes(size) + rest,
                       start + rng.randbytes(size) + rest, other])


@parametrize("file, read", [
    ("run/checkpoint.pt", data.read_file),
    ("cache/*eval*.zip", data.read_cache.__wrapped__),
    ("tetrominoes_sample.tfrecords", lambda path: list(data.read_tfrecords(path, "tetrominoes"))),
    ("CLEVR_v1.0/*/*/*0.png", data.read_picture),
    ("CLEVR_v1.0/*/*.json", lambda path: list(data.clevr_v1_scenes(path.parents[1], 8, "none"))),
    ("ckpt-500.index", lambda path: data.read_tf_checkpoint("ckpt-500")),
    ("ckpt-500.data-00000-of-00001", lambda path: data.read_tf_checkpoint("ckpt-500"))])
def test_damaged_files_are_refused(file, read):
    """In one line that names the file; or they are read as they were."""
    run(f"{TINY} --steps 1 --data-root . --out run")
    clevr_v1(2)
    for name in ("assets/tfrecords/tetrominoes_sample.tfrecords", *ASSETS.glob("ckpt-500.*")):
        shutil.copy(name, ".")
    path, = Path().glob(file)
    rng = random.Random(0)
    good = path.read_bytes()
    whole = copy.deepcopy(read(path))  # not mapped from the file
    refusals = 0
    for _ in range(25 * MANY):
        path.write_bytes(damaged(good, rng))
        try:
            assert equal(read(path), whole) or path.suffix == ".json"  # which has no checksum
        except data.InputError as error:
            refusals += 1
            assert "\n" not in str(error) and re.search(f"{path.stem}|CLEVR", str(error))
    assert refusals > 5 * MANY


# --- The project --------------------------------------------------------------------------------


@parametrize("module, others", [
    (sa, "data|visualize|train"), (data, "slot|visualize|train"), (visualize, "train")])
def test_imports_run_upwards_only(module, others):
    assert not re.search(rf"(?m)^\s*(import|from) ({others})", inspect.getsource(module))


README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readme_runs(monkeypatch):
    """Its Python, in order, in one scope."""
    monkeypatch.setattr(data, "DATASETS", {})
    monkeypatch.setattr(sys, "argv", "mine.py --data mine --steps 2".split())
    blocks = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert blocks.count("\n") > 15
    exec(blocks, {})
    assert Path("runs/mine/figure.png").exists()


def test_the_readme_names_what_there_is():
    """The names in its table "From the paper to the code", and its links."""
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    names = re.findall(r"`(\w[\w.]*)`(?=[^|\n]*\|$)", table, re.MULTILINE)
    assert len(names) > 15
    for name in names:
        eval(name, {**vars(sa), **vars(data), **vars(visualize), **vars(train), **globals()})
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (HERE / target).exists(), target
