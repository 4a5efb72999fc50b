"""The specification: what a reader may rely on. The first part compares with outputs of the official TensorFlow code,
kept in assets/golden.npz. Run with: pytest"""

import inspect
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import rgb_to_hsv
from numpy.testing import assert_allclose, assert_array_equal
from PIL import EpsImagePlugin, Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import data
import slot_attention as sa
import train
import visualize

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
SAMPLES = HERE.parent / "shared" / "samples"  # a little real data that the project does not carry
GOLDEN = np.load(ASSETS / "golden.npz")

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 holds


def golden(prefix):
    return {key.removeprefix(prefix + "/"): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix + "/")}


def equal(a, b):
    """Whether two nested containers hold the same values, to the bit."""
    return all(np.array_equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def cases(kind, *others):
    """The names of the golden cases of a kind."""
    return sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith(f"{kind}/")} - set(others))


# --- Equal to the official code --------------------------------------------------------------------------------------

KEY = "network/layer_with_weights-0/{}/.ATTRIBUTES/VARIABLE_VALUE"  # of a variable in the official checkpoints
SHAPES = {  # of the official variables, as Keras has them: the first whose pattern is in the name
    "slots_": (1, 1, 64), "gru/bias": (2, 192), "gru/": (64, 192), "dense/kernel": (4, 64),
    "encoder_cnn/layer_with_weights-0/kernel": (5, 5, 3, 64),
    "decoder_cnn/layer_with_weights-5/kernel": (3, 3, 4, 64), "decoder_cnn/layer_with_weights-5/bias": (4,),
    "slot_attention/mlp/layer_with_weights-0/kernel": (64, 128), "slot_attention/mlp/layer_with_weights-0/bias": (128,),
    "slot_attention/mlp/layer_with_weights-1/kernel": (128, 64),
    "classifier/layer_with_weights-1/kernel": (64, 19), "classifier/layer_with_weights-1/bias": (19,),
    "cnn/.*kernel": (5, 5, 64, 64), "kernel": (64, 64), "": (64,)}


def official_shape(name):
    return next(shape for pattern, shape in SHAPES.items() if re.search(pattern, name))


def official_case(task, num_slots):
    """-> what the official code gave, and what it got: weights {name: array}, image and noise."""
    case, rng, weights = golden(task), np.random.RandomState(0), {}
    for name, sums in zip(case["names"].tolist(), case["sums"]):
        shape = official_shape(name)
        fan_in = np.prod(shape[:-1])
        if name.startswith("decoder_cnn") and name.endswith("kernel"):
            fan_in = shape[0] * shape[1] * shape[-1] / (1 if name.split("-")[1][0] in "45" else 4)
        scale = np.sqrt(2 / fan_in) if name.endswith("kernel") else 0.1
        weight = (name.endswith("gamma") + scale * rng.standard_normal(shape)).astype(np.float32)
        assert_allclose([weight.sum(dtype=float), np.abs(weight).sum(dtype=float)], sums, rtol=1e-6, atol=1e-4)
        weights[name] = weight
    fine = rng.uniform(-1, 1, (2, 128, 128, 3)).astype(np.float32)
    coarse = rng.uniform(-1, 1, (2, 16, 16, 3)).repeat(8, 1).repeat(8, 2).astype(np.float32)
    image = (0.8 * coarse + 0.2 * fine).astype(np.float32)
    assert_allclose(image[:, ::16, ::16], case["image_probe"], atol=1e-7)
    noise = rng.standard_normal((2, num_slots, 64)).astype(np.float32)
    assert_allclose(noise[:, :, :4], case["noise_probe"], atol=1e-7)
    return case, weights, torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(noise)


def check_gradients(model, case):
    """The norm of each official variable's gradient. Loading their numbers tells whose a parameter is."""
    names = case["names"].tolist()
    numbers = {name: np.full(official_shape(name), i, np.float32) for i, name in enumerate(names)}
    marked, norms = type(model)(128, model.slot_attention.num_slots), np.zeros(len(names))
    sa.load_official_weights(marked, numbers)
    for parameter, mark in zip(model.parameters(), marked.parameters()):
        i = int(mark.flatten()[0])
        norms[i] = np.hypot(norms[i], parameter.grad.double().norm().item())
    zero = names.index("slot_attention/norm_slots/beta")  # exactly 0, but for rounding
    assert norms[zero] < 1e-4
    assert_allclose(np.delete(norms, zero), np.delete(case["grad_norm"], zero), rtol=3e-4)


def test_autoencoder_equals_official():
    case, weights, image, noise = official_case("discovery", 7)
    model = sa.SlotAttentionAutoEncoder(128, 7)
    assert sum(p.numel() for p in model.parameters()) == 890_308
    sa.load_official_weights(model, {KEY.format(name): value for name, value in weights.items()})
    output = model(image, slots=model.slot_attention.init_slots(noise))
    loss = F.mse_loss(output.recon_combined, image)
    loss.backward()
    assert output.attn.shape == (2, 3, 7, 128, 128)
    assert_allclose(output.slots.detach(), case["slots"], atol=3e-5)
    assert_allclose(output.masks.detach().movedim(2, -1)[:, :, ::8, ::8], case["masks"], atol=1e-5)
    assert_allclose(output.recons.detach().movedim(2, -1)[:, :, ::16, ::16], case["recons"], atol=1e-4)
    assert_allclose(output.recon_combined.detach().movedim(1, -1)[:, ::8, ::8], case["recon_combined"], atol=1e-4)
    assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    check_gradients(model, case)


def test_classifier_equals_official():
    case, weights, image, noise = official_case("set_prediction", 10)
    model = sa.SlotAttentionClassifier(128, 10)
    assert sum(p.numel() for p in model.parameters()) == 380_755
    sa.load_official_weights(model, weights)
    output = model(image, slots=model.slot_attention.init_slots(noise))
    loss = sa.hungarian_huber_loss(output.predictions, torch.from_numpy(case["target"]))
    loss.backward()
    assert_allclose(output.predictions.detach(), case["predictions"], atol=1e-5)
    assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    check_gradients(model, case)


@pytest.mark.parametrize("name", cases("units", "grid"))
def test_layers_equal_tensorflow(name):
    case = golden(f"units/{name}")
    kind, k, stride, _ = name.split("_")
    layer = (sa.Conv2dSame if kind == "conv" else sa.ConvTranspose2dSame)(3, 4, int(k[1:]), int(stride[1:])).double()
    layer.weight.data = torch.from_numpy(case["kernel"]).permute(3, 2, 0, 1)
    layer.bias.data = torch.from_numpy(case["bias"])
    y = layer(torch.from_numpy(case["x"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_allclose(y.detach(), case["y"], atol=1e-13)
    for size, grid in golden("units/grid").items():
        assert_allclose(sa.SoftPositionEmbed(8, [int(n) for n in size.split("x")]).grid, grid, atol=1e-7)


def test_slot_attention_equals_algorithm_1_in_numpy():
    torch.manual_seed(0)
    B, N, K, D, T = 2, 20, 4, 8, 3
    module = sa.SlotAttention(K, D, T, mlp_hidden_size=16, inputs_dim=6).double()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    inputs, noise = torch.randn(B, N, 6).double(), torch.randn(B, K, D).double()
    slots, attn = module(inputs, slots=module.init_slots(noise))
    p = {name: value.detach().numpy() for name, value in module.named_parameters()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = norm(inputs.numpy(), "norm_inputs")
    k, v = x @ p["project_k.weight"].T, x @ p["project_v.weight"].T
    s = p["slots_mu"] + np.exp(p["slots_log_sigma"]) * noise.numpy()
    for t in range(T):
        q = norm(s, "norm_slots") @ p["project_q.weight"].T
        logits = k @ q.transpose(0, 2, 1) / np.sqrt(D)                        # [B, N, K]
        a = np.exp(logits - logits.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        assert_allclose(attn[:, t].detach(), a.transpose(0, 2, 1), atol=1e-13)
        weights = (a + 1e-8) / (a + 1e-8).sum(1, keepdims=True)
        updates = weights.transpose(0, 2, 1) @ v                              # [B, K, D]
        gx = updates @ p["gru.weight_ih"].T + p["gru.bias_ih"]
        gh = s @ p["gru.weight_hh"].T + p["gru.bias_hh"]
        r, z = sigmoid(gx[..., :D] + gh[..., :D]), sigmoid(gx[..., D:2 * D] + gh[..., D:2 * D])
        s = z * s + (1 - z) * np.tanh(gx[..., 2 * D:] + r * gh[..., 2 * D:])
        h = norm(s, "norm_mlp") @ p["mlp.0.weight"].T + p["mlp.0.bias"]
        s = s + np.maximum(h, 0) @ p["mlp.2.weight"].T + p["mlp.2.bias"]
    assert_allclose(slots.detach(), s, atol=1e-12)


def test_initialisation_is_keras():
    torch.manual_seed(0)
    model = sa.SlotAttentionAutoEncoder(128, 7)
    limits = {"slot_attention.slots_mu": 6 / 65, "slot_attention.slots_log_sigma": 6 / 65,
              "slot_attention.gru.weight_ih": 6 / 256, "slot_attention.project_q.weight": 6 / 128,
              "encoder.cnn.2.weight": 6 / 3200, "decoder.cnn.0.weight": 6 / 3200}
    for name, squared in limits.items():
        assert 0.93 < model.get_parameter(name).abs().max().item() / squared ** 0.5 <= 1, name
    recurrent = model.slot_attention.gru.weight_hh
    assert_close(recurrent.T @ recurrent, torch.eye(64))
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert all(m.eps == 1e-3 for m in model.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize("task", ["discovery", "set_prediction"])
def test_learning_rate_equals_official(task):
    case = golden(f"schedule/{task}")
    _, config, _ = train.parse(["--data", "clevr", "--task", task.replace("discovery", "object_discovery")])
    for steps, rates in ((case["steps"], case["lr"]), (case["fine_steps"], case["fine_lr"])):
        assert_allclose([train.learning_rate(int(step), config) for step in steps], rates, rtol=1e-5, atol=1e-12)


def test_official_checkpoint_is_read_without_tensorflow():
    """assets/ckpt-500 was written by TensorFlow 2.21, from RandomState(0) in the order of the sorted names."""
    arrays = data.read_tf_checkpoint(ASSETS / "ckpt-500")
    rng = np.random.RandomState(0)
    for key in sorted(arrays):
        assert_array_equal(arrays[key], rng.standard_normal(arrays[key].shape).astype(np.float32))
    small = dict(slot_dim=4, mlp_hidden_size=8, encoder_channels=4, encoder_strides=(1, 2), decoder_channels=4,
                 decoder_strides=(2, 1))
    model = sa.SlotAttentionAutoEncoder(16, 3, **small)
    of_adam = {key.replace("/.ATTR", "/.OPTIMIZER_SLOT/optimizer/m/.ATTR"): arrays[key] for key in arrays}
    sa.load_official_weights(model, {**arrays, **of_adam, "step": 500})
    assert_array_equal(model.slot_attention.slots_mu.detach(), arrays[KEY.format("slot_attention/slots_mu")])
    for key, value in ("slot_dim", 8), ("encoder_strides", (1,)), ("encoder_strides", (1, 2, 2)):
        other = sa.SlotAttentionAutoEncoder(16, 3, **{**small, key: value})
        before = [parameter.clone() for parameter in other.parameters()]
        with pytest.raises(ValueError, match="another model"):
            sa.load_official_weights(other, arrays)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


# --- What the paper says of it ---------------------------------------------------------------------------------------


def test_proposition_1():
    """Slots are equivariant to a permutation of the initial slots, and invariant to one of the inputs."""
    torch.manual_seed(0)
    module = sa.SlotAttention(5, 16).double()
    inputs, init = torch.randn(2, 30, 16).double(), torch.randn(2, 5, 16).double()
    slots, attn = module(inputs, slots=init)
    of_slots, of_inputs = torch.randperm(5), torch.randperm(30)
    permuted, permuted_attn = module(inputs[:, of_inputs], slots=init[:, of_slots])
    assert_close(permuted, slots[:, of_slots])
    assert_close(permuted_attn, attn[:, :, of_slots][..., of_inputs])


def test_the_class_alone_is_the_module():
    """Copied into a notebook, with nothing but torch around it."""
    scope = {"torch": torch, "nn": nn}
    exec(inspect.getsource(sa.SlotAttention), scope)
    pasted, ours = scope["SlotAttention"](3, 8, inputs_dim=6), sa.SlotAttention(3, 8, inputs_dim=6)
    pasted.load_state_dict(ours.state_dict())
    inputs, init = torch.randn(2, 9, 6), torch.randn(2, 3, 8)
    assert torch.equal(pasted(inputs, init)[0], ours(inputs, init)[0])


def graph_of(node, found):
    """All the nodes that a backward pass goes through, and so what is kept in memory for it."""
    if node and node not in found:
        found.add(node)
        for parent, _ in node.next_functions:
            graph_of(parent, found)
    return found


def test_implicit_is_the_last_iteration_with_gradient():
    torch.manual_seed(0)
    module = sa.SlotAttention(5, 16, num_iterations=4).double()
    inputs, init = torch.randn(2, 30, 16).double(), torch.randn(2, 5, 16).double().requires_grad_()
    unrolled = module(inputs, init)
    before = module(inputs, init, num_iterations=3)[0].detach().requires_grad_()
    last, _ = module(inputs, before, num_iterations=1)
    module.implicit = True
    slots, attn = module(inputs, init)
    assert_close((slots, attn), unrolled)
    assert len(graph_of(slots.grad_fn, set())) < len(graph_of(last.grad_fn, set())) + 5
    weights = [module.gru.weight_ih, module.project_k.weight]
    assert_close(torch.autograd.grad(slots.sum(), [init, *weights]),
                 torch.autograd.grad(last.sum(), [before, *weights]))  # straight through to init


def test_slots_and_iterations_change_at_test_time():
    model, image = sa.SlotAttentionAutoEncoder((32, 48), 4, learned_queries=True), torch.randn(2, 3, 32, 48)
    output = model(image, num_slots=6, num_iterations=5)
    assert output.masks.shape == (2, 6, 1, 32, 48) and output.attn.shape == (2, 5, 6, 32, 48)
    assert_close(output.masks.sum(1), torch.ones(2, 1, 32, 48))
    init = model.slot_attention.init_slots(torch.zeros(1, 6, 64))  # two more than have a mean of their own
    assert torch.equal(init, model.slot_attention.slots_mu[:, [0, 1, 2, 3, 0, 1]])


@pytest.mark.parametrize("size", [35, 12, 5, 3])
def test_first_convolution_by_linearity_is_the_convolution(size):
    torch.manual_seed(0)
    decoder = sa.Decoder((size, size + 2), 8, 6, (1, 1)).double()
    nn.init.normal_(decoder.cnn[0].bias)
    slots = torch.randn(3, 8).double().requires_grad_()
    fast = decoder.first_convolution(slots)
    plain = decoder.cnn[0](decoder.pos(slots[:, :, None, None].expand(-1, -1, size, size + 2)))
    assert_close(fast, plain)
    weight, inputs = torch.randn_like(plain), [slots, *decoder.cnn[0].parameters(), *decoder.pos.parameters()]
    assert_close(torch.autograd.grad((fast * weight).sum(), inputs),
                 torch.autograd.grad((plain * weight).sum(), inputs))


def test_models_compile_whole():
    """torch.compile traces each model as one graph, under autocast (on a GPU too, if its GRU, another one, allows)."""
    image, init, small = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8), dict(slot_dim=8, encoder_channels=8)
    for model in (sa.SlotAttentionAutoEncoder(16, 3, 2, **small, decoder_channels=8, decoder_strides=(1, 2)),
                  sa.SlotAttentionClassifier(16, 3, 2, **small, implicit=True)):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            ours, output = model(image, init)[0], compiled(image, init)[0]
        assert_close(output, ours, rtol=0.02, atol=0.02)
        output.sum().backward()


@pytest.mark.parametrize("case", cases("ari"))
def test_ari_equals_official(case):
    """Where the official code gives NaN, ours gives 1; masks of 0/255 score as those of 0/1."""
    true, pred, score = (torch.from_numpy(GOLDEN[f"ari/{case}/{key}"]) for key in ("true", "pred", "score"))
    if case.endswith("mask255"):
        name = case.removesuffix("_mask255") + ("_mask01" if "small" in case else "")
        score = torch.from_numpy(GOLDEN[f"ari/{name}/score"])
    assert_close(sa.adjusted_rand_index(true, pred), score.nan_to_num(1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", cases("hungarian"))
def test_hungarian_loss_equals_official(case):
    case = golden(f"hungarian/{case}")
    pred = torch.from_numpy(case["pred"]).requires_grad_()
    loss = sa.hungarian_huber_loss(pred, torch.from_numpy(case["target"]))
    loss.backward()
    assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    assert_allclose(pred.grad, case["grad_pred"], atol=1e-7)


@pytest.mark.parametrize("n, m", [(1, 1), (3, 3), (6, 6), (4, 6), (6, 4), (1, 5)])
def test_matching_equals_brute_force(n, m):
    cost = torch.from_numpy(np.random.default_rng(0).normal(size=(20, n, m)))
    rows, cols = sa.minimum_cost_matching(cost)
    assert rows.shape == cols.shape == (20, min(n, m)) and (rows.diff(dim=1) > 0).all()
    for b in range(20):
        assert len(set(cols[b].tolist())) == min(n, m)
        c = cost[b] if n <= m else cost[b].T
        orders = itertools.permutations(range(max(n, m)), min(n, m))
        best = min(sum(c[i, j] for i, j in enumerate(order)) for order in orders)
        assert_close(cost[b, rows[b], cols[b]].sum(), best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", cases("ap", "thresholds", "helper"))
def test_average_precision_equals_official(case):
    case = golden(f"ap/{case}")
    for threshold, expected in zip([np.inf, *GOLDEN["ap/thresholds"][1:]], case["ap"]):
        ours = sa.average_precision_clevr(torch.from_numpy(case["pred"]), torch.from_numpy(case["target"]), threshold)
        assert_allclose(ours, expected, atol=1e-6)


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "catch_signals", list)  # Ctrl-C stays pytest's


@pytest.mark.parametrize("name", data.TFRECORDS)
def test_tfrecords_equal_tensorflow(name):
    expected = np.load(ASSETS / f"tfrecords/{name}_sample.npz")
    scenes = list(data.read_tfrecords(ASSETS / f"tfrecords/{name}_sample.tfrecords", name))
    assert len(scenes) == len(expected["image"])
    for i, scene in enumerate(scenes):
        assert set(scene) == set(expected.files)
        for key, array in scene.items():
            wanted = np.uint8(expected[key][i, ..., 0] != 0) if key == "mask" else expected[key][i]
            assert_array_equal(array, wanted, strict=True)


def test_splits():
    """The paper's counts for training, and what comes after them for evaluation; of a short file the last fifth."""
    for n, train_count, border in ((100_000, 70_000, 70_000), (70_000, 70_000, 56_000), (48, 60_000, 39)):
        objects = torch.arange(n) % 8 + 3
        splits = [data.choose(objects, split, train_count) for split in ("train", "eval")]
        assert torch.equal(torch.cat(splits), torch.arange(n)) and len(splits[0]) == border
    assert torch.equal(data.choose(objects, "train", 60, 9, 3, 6), (objects <= 6).nonzero()[:9, 0])
    with pytest.raises(ValueError, match="no scene with 11 to 12"):
        data.choose(objects, "eval", 60, None, 11, 12)


def test_masks_and_images_are_cropped_alike():
    """clevr_with_masks: crop as in the paper, number of objects by visibility, targets."""
    shutil.copy(ASSETS / "tfrecords/clevr_with_masks_sample.tfrecords", "clevr_with_masks_train.tfrecords")
    expected, objects = np.load(ASSETS / "tfrecords/clevr_with_masks_sample.npz"), np.array([3, 6, 10])
    for split, most, index in (("train", 6, [0, 1]), ("train", 5, [0]), ("eval", 10, [2])):
        scenes = data.load("clevr", split, ".", resolution=192, max_objects=most)
        batch = scenes.batch(torch.arange(len(scenes)))
        image = ((batch["image"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        assert_array_equal(image, expected["image"][index, 29:221, 64:256])
        assert_array_equal(batch["label"], expected["mask"][index, :, 29:221, 64:256, 0].argmax(1))
        assert_array_equal(batch["target"][:, :, 18].sum(1), objects[index])
    assert_array_equal(data.resize(batch["label"][0].numpy(), 96), batch["label"][0, 1::2, 1::2])  # the nearest
    picture = np.random.default_rng(0).integers(256, size=(320, 480, 3), dtype=np.uint8)  # of CLEVR_v1.0's size
    assert_array_equal(data.resize(picture, 288, "paper"), picture[24:312, 96:384])
    assert_array_equal(data.resize(picture, 192, "official"), picture[29:221, 64:256])
    cache, = Path("cache").glob("*.pt")
    os.utime("clevr_with_masks_train.tfrecords", (0, 0))  # it came now, whatever date it bears
    for written, stays in ((2e9, True), (1, False)):  # newer and older than the file that it was made of
        os.utime(cache, (written, written))
        data.load("clevr", "train", ".", resolution=192)
        assert (cache.stat().st_mtime == written) == stays


def clevr_v1(count):
    """A tiny CLEVR_v1.0 of generated pictures in the real layout, here -> the scenes."""
    made, scenes, folder = data.make_clevr_like(count, 0, resolution=32, crop=False), [], Path("CLEVR_v1.0")
    for part in ("images/train", "scenes"):
        (folder / part).mkdir(parents=True)
    for i, image in enumerate(made["image"]):
        name = f"CLEVR_train_{i:06}.png"
        Image.fromarray(image).resize((480, 320), Image.NEAREST).convert("RGBA").save(folder / "images/train" / name)
        objects = [{"3d_coords": [float(made[axis][i, e]) for axis in "xyz"], "rotation": 0.0,
                    **{key: names[made[key][i, e] - 1] for key, names in data.CLEVR_CODES.items()}}
                   for e in range(1, 11) if made["visibility"][i, e]]
        scenes.append({"image_filename": name, "objects": objects})
    (folder / "scenes/CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return made


def test_clevr_v1_is_read_and_trained_on(capsys):
    made = clevr_v1(20)
    scenes, held_out = (data.load("clevr", split, ".", resolution=32, crop="none") for split in ("train", "eval"))
    assert (len(scenes), len(held_out)) == (16, 4) and "last fifth" in capsys.readouterr().err
    batch = scenes.batch(torch.arange(4))
    ours = (batch["image"] / 2 + 0.5).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(ours - made["image"][:4]).mean() < 1  # the PNGs are the pictures blown up
    assert_allclose(batch["target"], made["target"][:4], atol=1e-6)

    flags = "--data clevr --data-root . --encoder-channels 8 --batch-size 2 --steps 2 --resolution 32 --device cpu"
    run(f"{flags} --decoder-strides 2 2 1 --decoder-channels 8 --max-objects 10 --out a")
    train.main(f"{flags} --task set_prediction --out b".split())
    assert "ari" not in log_of("a")[-1] and {"ap_inf", "ap_1", "ap_0.125"} <= log_of("b")[-1].keys()
    assert Path("b/figure.png").stat().st_size > 10_000


def test_targets_have_the_official_order():
    scene = {"size": [0, 1, 2], "material": [0, 1, 2], "shape": [0, 1, 3], "color": [0, 8, 6], "x": [0, -3, 3],
             "y": [0, 0, 1.5], "z": [0, 0.7, 0.35]}
    target = data.clevr_target({key: np.array(values) for key, values in scene.items()})
    # small, large | rubber, metal | cube, sphere, cylinder | gray, blue, brown, yellow, red, green, purple, cyan | real
    assert_allclose(target[0], [0, .5, 3.7 / 6, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1], rtol=1e-6)
    assert_allclose(target[1], [1, .75, 3.35 / 6, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], rtol=1e-6)
    assert not target[2:].any()


@pytest.mark.parametrize("make, n, resolution, entities, least, most", [
    (data.make_tetrominoes, 500, 35, 4, 3, 3), (data.make_multi_dsprites, 500, 64, 6, 2, 5),
    (data.make_clevr_like, 6, 128, 11, 3, 10)])
def test_generated_scenes_follow_the_rules(make, n, resolution, entities, least, most):
    scenes, again, other = make(n, 0), make(n, 0), make(n, 1)
    image, mask, objects = scenes["image"], scenes["mask"], scenes["visibility"].sum(1) - 1
    assert image.shape == (n, resolution, resolution, 3) and mask.shape == (n, entities, resolution, resolution)
    assert image.dtype == mask.dtype == np.uint8 and (mask.sum(1) == 1).all()
    assert objects.min() >= least and objects.max() <= most and len(set(objects)) > (least < most)
    assert (mask.any((2, 3)) <= scenes["visibility"]).all()
    assert equal(again, scenes) and (other["image"] != image).any()


def test_tetrominoes_are_whole_and_anywhere():
    scenes = data.make_tetrominoes(2000, 0)
    image, mask = scenes["image"], scenes["mask"]
    assert (mask[:, 1:].sum((2, 3)) == 100).all() and (image[mask[:, 0] == 1] == 0).all()  # none over another
    assert set(scenes["shape"][:, 1:].flatten()) == set(range(1, 20))
    assert len(np.unique(scenes["color"][:, 1:].reshape(-1, 3), axis=0)) == 6
    top = np.where(mask[:, 1:].any(3), np.arange(35), 99).min(2)
    assert_array_equal(top, scenes["y"][:, 1:])
    assert set(top.flatten()) == set(range(31))  # any pixel, no grid


def test_multi_dsprites_stand_where_their_factors_say():
    scenes = data.make_multi_dsprites(500, 0)
    mask, there, n = scenes["mask"], scenes["visibility"], np.arange(500)
    assert mask[:, 1:].any((2, 3))[there[:, 1:] > 0].mean() > 0.97
    color = (scenes["color"] * 255).round()[n[:, None, None], mask.argmax(1)]
    assert np.abs(color - scenes["image"]).max() <= 1 and (scenes["color"][:, 0].std(1) < 1e-6).all()
    last = there.sum(1).astype(int) - 1  # no sprite stands before the last one
    whole = mask[n, last]
    for key, axis in (("x", 1), ("y", 2)):
        center = (whole.sum(axis) * np.arange(64)).sum(1) / whole.sum((1, 2))
        error = np.abs(center - (16 + 31 * scenes[key][n, last]))
        assert error[scenes["shape"][n, last] < 3].max() < 0.6 and error.max() < 4  # a heart is not symmetric


def test_clevr_like_scenes_obey_clevrs_generator():
    scenes = data.make_clevr_like(12, 0, resolution=96, min_objects=8, crop=False)
    there = scenes["visibility"][:, 1:] > 0
    radius = np.array([0, 0.7, 0.35])[scenes["size"][:, 1:]]
    assert_allclose(scenes["z"][:, 1:], radius, atol=1e-6)
    place = np.stack([scenes["x"], scenes["y"]], 2)[:, 1:]
    pairs = there[:, :, None] & there[:, None] & ~np.eye(10, dtype=bool)
    gap = np.linalg.norm(place[:, :, None] - place[:, None], axis=3) - radius[:, :, None] - radius[:, None]
    assert 0.25 <= gap[pairs].min() < 0.5 and np.abs(place).max() <= 3
    hues = []
    for i, e in zip(*np.nonzero(there)):
        mask, code = scenes["mask"][i, e + 1], scenes["color"][i, e + 1]
        assert mask.mean() * 320 * 240 > 100  # 200, decided on a coarser map
        if scenes["material"][i, e + 1] == 1 and code != 6:  # rubber, not gray
            ours, wanted = scenes["image"][i][mask > 0].mean(0), data.CLEVR_COLORS[code]
            hues.append((rgb_to_hsv(ours / 255) - rgb_to_hsv(wanted / 255))[0])
    hues = np.abs((np.array(hues) + 0.5) % 1 - 0.5)
    assert len(hues) > 20 and np.median(hues) < 0.03 and max(hues) < 0.1


# --- Training, evaluation, figures -----------------------------------------------------------------------------------

TINY = ("--data tetrominoes --small --train-count 16 --eval-count 8 --batch-size 8 --steps 6 --eval-every 3 "
        "--log-every 1 --dtype float32 --device cpu --encoder-channels 8 --decoder-channels 8 --slot-dim 8")


def run(flags):
    """Trains, and leaves out the figure at the end: it takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "main", lambda argv: None)
        train.main(flags.split())


def log_of(run):
    rows = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a, b):
    """Whether two runs have the same weights, optimizer and log, to the bit."""
    ours, theirs = ({**visualize.read_checkpoint(run), "config": None, "seconds": None, "log": None} for run in (a, b))
    return equal(ours, theirs) and log_of(a) == log_of(b)


def refused(capsys, main, flags):
    """One line on stderr (the last; what was said before is no error), exit code 2 -> the line."""
    capsys.readouterr()
    code = None
    try:
        main(flags.split())
    except SystemExit as stop:  # pytest.raises would keep the run's log open, and locked
        code = stop.code
    errors = capsys.readouterr().err
    assert code == 2 and "Traceback" not in errors, errors
    return errors.splitlines()[-1]


def test_training_repeats_resumes_draws_and_evaluates(capsys):
    flags = f"{TINY} --learned-queries --muon none --slot-loss 0"  # Muon and slot loss depend on --steps
    train.main(f"{flags} --out whole".split())
    run(f"{flags} --out again")
    run(f"{flags} --steps 3 --out parts")
    with open("parts/log.jsonl", "a") as log:  # a killed run has logged more than it saved, and half a line
        log.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    run("--resume parts --steps 6")  # from the middle of the second epoch
    assert same("whole", "again") and same("whole", "parts")
    rows = log_of("whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(-1 <= rows[i]["ari"] <= 1 for i in (2, 5))
    assert Path("whole/figure.png").stat().st_size > 10_000
    capsys.readouterr()
    run("--eval whole --num-slots 5")
    first, *lines = capsys.readouterr().out.splitlines()
    assert "5 slots" in first and [json.loads(line)["num_iterations"] for line in lines] == list(range(1, 11))
    run(f"{TINY} --benchmark --accumulate 2")
    assert json.loads(capsys.readouterr().out)["images_per_s"] > 0


def wait_for_log(process, run, rows):
    log, deadline = Path(run, "log.jsonl"), time.time() + 200
    while not (log.exists() and log.read_text().count("\n") > rows):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_saves_first(number):
    flags = f"{TINY} --steps 9999 --eval-every 9999 --log-every 300 --out run"
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags.split()], stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # not as under nohup
    process.stderr.close()  # nobody reads its messages any more, as when a terminal is closed
    wait_for_log(process, "run", 0)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert visualize.read_checkpoint("run")["step"] == log_of("run")[-1]["step"] < 600  # at once, not at the next line


def test_accumulated_gradient_is_the_same():
    for parts in "14":
        run(f"{TINY} --steps 2 --muon none --clip 0 --accumulate {parts} --out {parts}")
    one, four = (visualize.read_checkpoint(parts)["optimizer"]["state"] for parts in "14")  # means of the gradients
    assert_close(one, four, rtol=1e-3, atol=1e-8)
    assert_allclose([row["loss"] for row in log_of("1")], [row["loss"] for row in log_of("4")], rtol=1e-6)
    run(f"{TINY} --steps 1 --muon none --clip 0 --train-iterations 2 --out fewer")
    assert log_of("fewer")[0]["loss"] != log_of("1")[0]["loss"]


def test_what_a_resumed_run_takes_from_where(monkeypatch):
    run(f"{TINY} --steps 1 --muon none --clip 0.001 --out run")
    monkeypatch.setattr(train, "DEVICES", ["cuda", "cpu"])  # as on a machine with a GPU
    _, config, checkpoint = train.parse("--resume run --clip 0.5 --dtype bfloat16".split())  # in another layout
    *_, optimizer = train.set_up(config, checkpoint)
    assert config.device == "cpu" and config.clip == 0.5
    means = {parameter: state["exp_avg"] for parameter, state in optimizer.state.items()}
    assert all(mean.stride() == parameter.stride() for parameter, mean in means.items())
    assert_allclose(sum(mean.square().sum() for mean in means.values()) ** 0.5, 0.1 * 0.001, rtol=1e-3)  # clipped


def test_processes_share_each_batch_out(monkeypatch):
    _, config, _ = train.parse(f"{TINY} --accumulate 2".split())
    scenes = train.load_scenes(config, "train")
    drawn = []
    for processes in 1, 2:
        monkeypatch.setattr(train, "WORLD_SIZE", processes)
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(train, "RANK", rank)
            parts += next(train.batches(config, scenes, 1, "cpu"))
        drawn.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    assert equal(*drawn)


def test_two_processes_train_as_one_and_resume_as_one():
    """Two processes, then a signal, then one process, against one process all along."""
    flags = f"{TINY} --muon none --slot-loss 0 --eval-every 10 --accumulate 2"
    command = f"-m torch.distributed.run --standalone --nproc_per_node=2 {HERE / 'train.py'} {flags}"
    process = subprocess.Popen([sys.executable, *command.split(), "--steps", "9999", "--out", "many"], text=True,
                               stderr=subprocess.PIPE)
    wait_for_log(process, "many", 10)
    process.terminate()
    errors = process.communicate(timeout=200)[1]
    assert errors.count("stopped and saved") == 1 and errors.count("16 scenes") == 1, errors
    saved = visualize.read_checkpoint("many")["step"]
    run(f"--resume many --steps {saved + 3}")
    run(f"{flags} --steps {saved + 3} --out one")
    for a, b in zip(log_of("one"), log_of("many"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]  # rounding errors grow with the steps
        assert_allclose(b["loss"], a["loss"], rtol=1e-5 if a["step"] <= 20 else 1e-3)


def test_muon_makes_every_direction_equally_fast():
    """The update of a hidden matrix has singular values near 1, whatever the gradient's; all else is Adam's."""
    _, config, _ = train.parse(["--small", "--data", "tetrominoes"])
    model = sa.build_model(vars(config))
    optimizer, before = train.Muon(model, "all"), [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # at Adam's rate of 0.001
    matrices = {id(parameter) for parameter in optimizer.hidden}
    assert train.learning_rate(config.steps // 4, config) == 0.75 * config.lr  # to 0 at the end
    assert len(matrices) == 14 and id(model.encoder.cnn[0].weight) not in matrices
    assert len(train.Muon(model, "encoder").hidden) == 11  # not the decoder's three
    for (name, parameter), old in zip(model.named_parameters(), before):
        update = (parameter - old).detach()
        if id(parameter) in matrices:
            values = torch.linalg.svdvals(update.flatten(1)) / 0.01 / max(1, len(update) / update[0].numel()) ** 0.5
            assert 0.5 < values.quantile(0.1) and values.max() < 1.3, name  # the smallest take more steps
        else:
            assert_close(update.abs().median(), torch.tensor(0.001), rtol=0.01, atol=0)  # but where eps counts


def test_slot_loss_leaves_each_pixel_to_one_slot():  # here of a white and a black one, where the picture is grey
    config, recons = train.parse(["--small"])[1], torch.tensor([1.0, -1]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
    for share, progress, loss in (0.5, 0, 0), (0.5, 0.5, 0.25 + 0.0035 * 0.5 ** 3.5), (1, 0, 1), (1, 1, 1.0035035):
        masks = torch.tensor([share, 1.0 - share]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 4, 4)
        output = sa.Decomposition((masks * recons).sum(1), recons, masks, None, None)
        assert_close(train.compute_loss(output, {"image": 0 * recons[:, 0]}, config, progress).item(), float(loss))


def test_every_experiment_makes_a_model():
    for task, name in train.EXPERIMENTS:
        for small in ([], ["--small"]):
            _, config, _ = train.parse(["--task", task, "--data", name, *small])
            model = sa.build_model(vars(config))
            assert torch.isfinite(model(torch.zeros(1, 3, config.resolution, config.resolution))[0]).all()
            scale = model.slot_attention.project_q.weight.abs().max() / (6 / (2 * config.slot_dim)) ** 0.5
            assert 0.9 < scale / config.query_scale <= 1


@pytest.mark.skipif(not SAMPLES.exists(), reason="needs real CLEVR pictures, which the project does not carry")
def test_real_objects_have_a_slot_of_their_own():
    """Of those in pictures of at most six: the slot at the object's centre is not the largest, nor another object's."""
    model = sa.load_model(data.read_file(ASSETS / "clevr_like.pt")).requires_grad_(False)
    scenes = json.loads((SAMPLES / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json").read_text())["scenes"]
    (top, bottom, left, _), size, alone = data.CLEVR_CROP[320, 480], model.decoder.resolution[0], []
    config = {"data": "clevr", "task": "object_discovery", "resolution": size, "crop": "paper"}
    for scene in (scene for scene in scenes if len(scene["objects"]) <= 6):
        path = SAMPLES / "CLEVR_v1.0/images/train" / scene["image_filename"]
        init = model.slot_attention.init_slots(torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0)))
        owner = model(visualize.load_pictures([path], config), init, num_iterations=5).masks[0, :, 0].argmax(0)
        pixels = (np.array([o["pixel_coords"][:2] for o in scene["objects"]]) - (left, top)) * size / (bottom - top)
        cols, rows = pixels[((pixels >= 0) & (pixels < size)).all(1)].astype(int).T
        slots, largest = owner[rows, cols].tolist(), owner.flatten().bincount().argmax().item()
        alone += [slots.count(slot) == 1 and slot != largest for slot in slots]
    assert np.mean(alone) > 0.97, (len(alone), np.mean(alone))


def test_shipped_weights_take_scenes_apart_that_they_never_saw():
    for file, made, metric, least in (
            ("tetrominoes.pt", data.make_tetrominoes(128, 12345), "ari", 0.97),
            ("multi_dsprites.pt", data.make_multi_dsprites(64, 12345), "ari", 0.6),
            ("clevr_like.pt", data.make_clevr_like(8, 12345, 64, max_objects=6), "ari", 0.75),
            ("set_prediction.pt", data.make_clevr_like(16, 12345, 128, crop=False), "ap_inf", 0.7)):
        checkpoint = data.read_file(ASSETS / file)
        config = train.argparse.Namespace(**checkpoint["config"])
        scenes = data.Scenes(made["image"], made["mask"].argmax(1).astype(np.uint8), made.get("target"))
        result = train.evaluate(sa.load_model(checkpoint), config, scenes, torch.device("cpu"), torch.float32)
        assert result[metric] > least, (file, result)


def test_figures_of_all_kinds(capsys):
    file = visualize.WEIGHTS
    run(f"{TINY} --steps 3 --num-slots 5 --out run")
    Image.new("RGB", (480, 320), "blue").save("own.png")
    for flags in ("", f"run {file} --count 2", "run --figure curve", f"{file} --figure clip --count 3 --out clip",
                  f"{file} --figure b --num-slots 6", f"{ASSETS / 'clevr_like.pt'} --images own.png --figure a",
                  f"{ASSETS / 'set_prediction.pt'} --images own.png", f"{file} --num-iterations 3 --out a.gif"):
        visualize.main(flags.split())
        assert Path(capsys.readouterr().err.split()[-1]).stat().st_size > 5_000
    assert Image.open("a.gif").n_frames == 3
    for flags, message in [("typo", "typo"), (f"{file} --figure curve", "log"), (f"{file} --out no/a.png", "no/a.png"),
                           (f"{file} --out a.xyz", "xyz"), ("a" * 300, "aa"), (f"{file} --num-slots x", "--num-slots")]:
        assert message in refused(capsys, visualize.main, flags), flags
        assert not list(Path().rglob("part-*")), flags


def test_own_pictures(capsys):
    config = {"data": "tetrominoes", "task": "object_discovery", "resolution": 8, "crop": "paper"}
    grey = Image.new("L", (30, 20), 100)
    pictures = {"grey.png": grey, "rgb.jpg": grey.convert("RGB"), "palette.gif": grey.convert("P"),
                "cmyk.jpg": grey.convert("CMYK"), "la.png": grey.convert("LA"), "tiny.png": grey.resize((1, 1))}
    for name, picture in pictures.items():
        picture.save(name)
    images = visualize.load_pictures(pictures, config)
    assert_close(images, torch.full((6, 3, 8, 8), 100 * 2 / 255 - 1), rtol=0, atol=0.02)
    wide = Image.new("RGBA", (40, 20), (255, 0, 0, 0))  # of its central square the left half is blue, the right clear
    wide.paste("blue", (10, 0, 20, 20))
    wide.save("wide.png")
    assert visualize.load_pictures(["wide.png"], config)[0, :, 0, ::7].tolist() == [[-1, 1], [-1, 1], [1, 1]]
    Path("cut.png").write_bytes(Path("rgb.jpg").read_bytes()[:300])
    grey.convert("I;16").save("16bit.png")
    for name in ("cut.png", "16bit.png", "missing.png", "."):
        assert name in refused(capsys, visualize.main, f"{visualize.WEIGHTS} --images {name}")


# --- Bad input: one line, exit code 2, nothing lost and no code run --------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--data nothing", "nothing"), ("--steps 0", "--steps"), ("--steps 1.5", "--steps"), ("--lr nan", "--lr"),
    ("--batch-size x", "--batch-size"), ("--encoder-strides 1 0", "--encoder-strides"), ("--unknown 1", "unknown"),
    ("--slot-loss 1.1", "--slot-loss"), ("--seed -1", "--seed"), ("--device nowhere", "--device"),
    ("--data clevr --data-root nowhere", "clevr_like"), ("--task set_prediction", "--task"),
    ("--data multi_dsprites_on_colored --data-root nowhere", "no nowhere/multi_dsprites"),
    ("--task set_prediction --data clevr_like --num-slots 17", "16"), ("--resume nowhere", "nowhere"),
    ("--eval nowhere", "nowhere"), ("--resume x --eval y", "--eval"), ("--resume x --out y", "--out"),
    (f"--resume {visualize.WEIGHTS}", "--resume"), (f"--eval {visualize.WEIGHTS} --slot-dim 16", "size mismatch"),
    ("--train-count 8 --batch-size 64 --eval-count 8", "--batch-size"), ("--resolution 64", "--resolution"),
    ("--batch-size 10 --accumulate 4", "--accumulate"), ("--min-objects 4 --train-count 9", "--max-objects"),
    ("--data clevr_like --max-objects 2", "max_objects"), ("--data multi_dsprites --resolution 32", "--resolution"),
    ("--num-slots 101", "--num-slots"), ("--resume=", "checkpoint.pt"), ("--eval=", "checkpoint.pt"),
    ("--task set_prediction --data clevr_like --crop paper", "--crop"), (f"--out {'a' * 300}", "aaa")])
def test_bad_flags(capsys, flags, message):
    assert message in refused(capsys, train.main, flags)
    assert not list(Path().rglob("checkpoint.pt"))


def test_a_folder_holds_one_run(capsys):
    run(f"{TINY} --steps 1 --out run")
    content = Path("run/checkpoint.pt").read_bytes()
    assert "holds a run" in refused(capsys, train.main, f"{TINY} --out run")
    assert "--muon" in refused(capsys, train.main, "--resume run --muon none")
    with open("run/log.jsonl", "a") as file:
        assert data.lock(file)
        assert "another process" in refused(capsys, train.main, "--resume run --steps 2")
    assert Path("run/checkpoint.pt").read_bytes() == content


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(capsys, monkeypatch):
    run(f"{TINY} --steps 3 --out run")
    before = Path("run/checkpoint.pt").read_bytes()
    line = refused(capsys, train.main, "--resume run --steps 60 --lr 1e12 --eval-every 60")
    assert "NaN" in line and "by step 60" not in line  # it does not wait until it would save
    assert "by step 4" in refused(capsys, train.main, "--resume run --steps 4 --lr 1e12")  # the weights are finite
    step = torch.optim.Adam.step

    def spoil(self, *args):
        step(self, *args)
        self.state[self.param_groups[0]["params"][0]]["exp_avg"][0] = float("inf")  # no loss shows this

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    assert "by step 4" in refused(capsys, train.main, "--resume run --steps 4")
    assert Path("run/checkpoint.pt").read_bytes() == before


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_no_file_runs_code(capsys, monkeypatch):
    for content in (Evil(), {"config": Evil(), "model": {}}, {"config": {}, "model": Evil()}):
        torch.save(content, "new.pt")
        torch.save(content, "old.pt", _use_new_zipfile_serialization=False)
        Path("pickle.pt").write_bytes(pickle.dumps(content))
        for name in ("new.pt", "old.pt", "pickle.pt"):
            assert name in refused(capsys, visualize.main, name)
    assert not Path("evil").exists()
    pickle.loads(Path("pickle.pt").read_bytes())
    assert Path("evil").exists()  # the danger is real
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: os.mkdir("it_ran"))  # it gets PostScript
    Image.new("RGB", (50, 40)).save("photo.png", format="EPS")
    assert "photo.png" in refused(capsys, visualize.main, f"{visualize.WEIGHTS} --images photo.png")
    assert not Path("it_ran").exists()
    with pytest.raises(Exception):
        Image.open("photo.png").load()
    assert Path("it_ran").exists()  # this danger, too


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_loses_nothing(capsys):
    """A limit on the size of files stands for a full disk: for the figure, the checkpoint and the cache."""
    train.main(f"{TINY} --steps 3 --out run".split())
    before = {name: Path("run", name).read_bytes() for name in ("figure.png", "checkpoint.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for main, flags, name in ((visualize.main, "run", "figure.png"),
                              (train.main, "--resume run --steps 6", "checkpoint.pt"),
                              (train.main, f"{TINY} --eval-count 9 --out new", "-9-")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            line = refused(capsys, main, flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot write" in line and name in line
    assert all(Path("run", name).read_bytes() == content for name, content in before.items())
    assert not list(Path().rglob("part-*"))
    run("--resume run --steps 6")
    assert len(log_of("run")) == 6


# --- Kill it anywhere; damaged files. By hand many: MANY=100 python -m pytest -k "killed or damaged" -----------------

MANY = int(os.environ.get("MANY", 1))


def kill_anywhere(count):
    """Kills training by the clock, so many times; what --resume makes of it is equal, to the bit."""
    torch.set_num_threads(1)  # a forked process has no other
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # imports what else each run would import, for seconds
    visualize.make_figure = lambda args, runs: lambda path: path.write_bytes(bytes(9_999))  # nor is this drawn
    rng, kills, flags = random.Random(0), 0, f"{TINY} --steps 12 --eval-every 2 --train-count 24"

    def exit_code(flags, kill_after=0.0):
        child = os.fork()
        if child == 0:
            train.main(flags.split())
            os._exit(0)
        if kill_after:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.wait()[1])

    start = time.perf_counter()
    assert exit_code(f"{flags} --out whole") == 0
    duration = time.perf_counter() - start
    for out in map(str, itertools.count()):
        killed = True
        while killed:
            begun = Path(out, "checkpoint.pt").exists()
            what = f"--resume {out}" if begun else f"{flags} --data-root {out}-data --out {out}"
            code = exit_code(what, rng.uniform(0, duration))
            assert code in (0, -signal.SIGKILL)
            killed = code != 0
            kills += killed
        assert same(out, "whole") and Path(out, "figure.png").stat().st_size == 9_999
        assert not list(Path().rglob("part-*"))
        if kills >= count:
            break


def test_killed_anywhere_it_goes_on():
    """In a process of its own, that has no threads yet and so can be forked."""
    code = f"import test_slot_attention; test_slot_attention.kill_anywhere({10 * MANY})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,  # CUDA cannot be forked
                            env={**os.environ, "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-3000:]


def damaged(content, rng):
    """Bytes with some damage, as disks, networks and people do it."""
    place, size = rng.randrange(len(content)), rng.randint(1, 64)
    start, rest = content[:place], content[place + size:]
    flipped = bytes([content[place] ^ 1 << rng.randrange(8)])
    other = rng.choice([b"", b"text", b"\x1f\x8b", b"PK\x03\x04", b"{}", b"[]", b"null", rng.randbytes(5000)])
    return rng.choice([start + flipped + content[place + 1:], start, start + bytes(size) + rest,
                       start + rng.randbytes(size) + rest, other])


def test_damaged_files_are_refused():
    """In one line that names the file; or they are read as they were."""
    run(f"{TINY} --steps 1 --data-root . --out run")
    clevr_v1(2)
    for name in ("tfrecords/tetrominoes_sample.tfrecords", "ckpt-500.index", "ckpt-500.data-00000-of-00001"):
        shutil.copy(ASSETS / name, ".")
    records = Path("tetrominoes_sample.tfrecords").read_bytes()
    Path("end.tfrecords").write_bytes(records[:-8] + bytes(8))  # GZIP's checksum, far behind what is asked for
    with pytest.raises(ValueError, match="end.tfrecords"):
        list(data.read_tfrecords("end.tfrecords", "tetrominoes", 1))
    folder, rng = Path("CLEVR_v1.0"), random.Random(0)
    for file, read, exact in (  # exact: what is read must be as it was
            ("run/checkpoint.pt", data.read_file, True),
            (next(Path("cache").glob("*eval*")), data.read_file, True),
            ("tetrominoes_sample.tfrecords", lambda path: list(data.read_tfrecords(path, "tetrominoes", 4)), True),
            (folder / "images/train/CLEVR_train_000000.png", data.read_png, True),
            (next(folder.glob("scenes/*")), lambda path: list(data.clevr_v1_scenes(folder, 8, "none")), False),
            ("ckpt-500.index", lambda path: data.read_tf_checkpoint("ckpt-500"), True),
            ("ckpt-500.data-00000-of-00001", lambda path: data.read_tf_checkpoint("ckpt-500"), True)):
        path, refusals = Path(file), 0
        good, whole = path.read_bytes(), read(path)
        for _ in range(25 * MANY):
            path.write_bytes(damaged(good, rng))
            try:
                assert equal(read(path), whole) or not exact, file
            except (ValueError, OSError) as error:
                refusals += 1
                assert "\n" not in str(error) and re.search(f"{path.stem}|CLEVR", str(error)), (file, error)
        assert refusals > 5 * MANY, file
        path.write_bytes(good)


# --- The project -----------------------------------------------------------------------------------------------------


def test_imports_run_upwards_only():
    below = {"slot_attention": set(), "data": set(), "visualize": {"slot_attention", "data"},
             "train": {"slot_attention", "data", "visualize"}}
    for name, allowed in below.items():
        imported = re.findall(r"^\s*(?:import|from) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE)
        assert set(imported) & set(below) <= allowed, f"{name}.py imports {imported}"


def test_the_readme_names_what_there_is():
    """Its names such as `SlotAttention.forward` in slot_attention.py, and its files."""
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", text)
    assert len(links) > 20
    for name, module in links:
        thing = sys.modules[module]
        for part in name.split("."):
            thing = getattr(thing, part)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (HERE / target).exists(), f"README.md links to {target}, which is not there"
