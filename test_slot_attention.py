"""The specification: what a reader may rely on. Run with: pytest

Most of it compares with outputs of the official TensorFlow code, kept in assets/golden.npz: models whose weights and
inputs come from a recipe (`official_case`), metrics, single layers and learning rates.
"""

import ast
import gzip
import inspect
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
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import slot_attention as sa
import train
import visualize

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
SAMPLES = HERE.parent / "shared" / "samples"  # a little real data that the project does not carry
real_data = pytest.mark.skipif(not SAMPLES.exists(), reason="the real scenes are not in the project")
GOLDEN = np.load(ASSETS / "golden.npz")

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 holds


def golden(prefix):
    return {key.removeprefix(prefix + "/"): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix + "/")}


def cases(kind, *others):
    """The names of the golden cases of a kind."""
    return sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith(f"{kind}/")} - set(others))


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the official code
# ---------------------------------------------------------------------------------------------------------------------


def official_shape(name):
    """The shape of an official variable, as Keras has it."""
    layer, last = name.rsplit("/", 1)
    if last in ("slots_mu", "slots_log_sigma"):
        return 1, 1, 64
    kernels = {"encoder_cnn/layer_with_weights-0": (5, 5, 3, 64), "decoder_cnn/layer_with_weights-5": (3, 3, 4, 64),
               "slot_attention/mlp/layer_with_weights-0": (64, 128),
               "slot_attention/mlp/layer_with_weights-1": (128, 64),
               "mlp_classifier/layer_with_weights-1": (64, 19), "slot_attention/gru": (64, 192)}
    kernel = kernels.get(layer) or ((5, 5, 64, 64) if "cnn" in layer else (4, 64) if "pos" in layer else (64, 64))
    if last in ("kernel", "recurrent_kernel"):
        return kernel
    if layer == "slot_attention/gru":
        return 2, 192
    return (kernel[-2] if layer.startswith("decoder_cnn") else kernel[-1],)


def official_case(task, num_slots):
    """Weights {official name: array}, image [2, 3, 128, 128] and noise [2, K, 64], redrawn as for the official code."""
    case, rng, weights = golden(task), np.random.RandomState(0), {}
    for name, (total, absolute) in zip(case["names"].tolist(), case["sums"]):
        shape = official_shape(name)
        z = rng.standard_normal(shape)
        fan_in = np.prod(shape[:-1])
        if name.startswith("decoder_cnn") and name.endswith("kernel"):
            fan_in = shape[0] * shape[1] * shape[-1] / (1 if name.split("-")[1][0] in "45" else 4)
        scale = np.sqrt(2 / fan_in) if name.endswith("kernel") else 0.1
        weights[name] = (name.endswith("gamma") + scale * z).astype(np.float32)
        np.testing.assert_allclose([weights[name].sum(dtype=float), np.abs(weights[name]).sum(dtype=float)],
                                   [total, absolute], rtol=1e-6, atol=1e-4)
    fine = rng.uniform(-1, 1, (2, 128, 128, 3)).astype(np.float32)
    coarse = rng.uniform(-1, 1, (2, 16, 16, 3)).repeat(8, 1).repeat(8, 2).astype(np.float32)
    image = (0.8 * coarse + 0.2 * fine).astype(np.float32)
    np.testing.assert_allclose(image[:, ::16, ::16], case["image_probe"], atol=1e-7)
    noise = rng.standard_normal((2, num_slots, 64)).astype(np.float32)
    np.testing.assert_allclose(noise[:, :, :4], case["noise_probe"], atol=1e-7)
    return case, weights, torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(noise)


def gradient_norms(model, names):
    """The L2 norm of each official variable's gradient: its parameters here are found by loading the names' numbers."""
    ours = {}
    marked = type(model)(128, model.slot_attention.num_slots)
    sa.load_official_weights(marked,
                             {name: np.full(official_shape(name), i, np.float32) for i, name in enumerate(names)})
    for (_, parameter), mark in zip(model.named_parameters(), marked.parameters()):
        i = int(mark.flatten()[0])
        ours[i] = ours.get(i, 0) + parameter.grad.double().square().sum().item()
    return np.sqrt([ours[i] for i in range(len(names))])


def check_gradients(model, case):
    norms = gradient_norms(model, case["names"].tolist())
    zero = case["names"].tolist().index("slot_attention/norm_slots/beta")  # exactly 0, but for rounding
    assert norms[zero] < 1e-4
    keep = np.arange(len(norms)) != zero
    np.testing.assert_allclose(norms[keep], case["grad_norm"][keep], rtol=3e-4)


def test_autoencoder_equals_official():
    case, weights, image, noise = official_case("discovery", 7)
    model = sa.SlotAttentionAutoEncoder(128, 7)
    assert sum(p.numel() for p in model.parameters()) == 890_308
    keys = {f"network/layer_with_weights-0/{name}/.ATTRIBUTES/VARIABLE_VALUE": value for name, value in weights.items()}
    sa.load_official_weights(model, keys)
    output = model(image, slots=model.slot_attention.init_slots(noise))
    loss = F.mse_loss(output.recon_combined, image)
    loss.backward()
    assert output.attn.shape == (2, 3, 7, 128, 128)
    np.testing.assert_allclose(output.slots.detach(), case["slots"], atol=3e-5)
    np.testing.assert_allclose(output.masks.detach().movedim(2, -1)[:, :, ::8, ::8], case["masks"], atol=1e-5)
    np.testing.assert_allclose(output.recons.detach().movedim(2, -1)[:, :, ::16, ::16], case["recons"], atol=1e-4)
    np.testing.assert_allclose(output.recon_combined.detach().movedim(1, -1)[:, ::8, ::8], case["recon_combined"],
                               atol=1e-4)
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    check_gradients(model, case)


def test_classifier_equals_official():
    case, weights, image, noise = official_case("set_prediction", 10)
    model = sa.SlotAttentionClassifier(128, 10)
    assert sum(p.numel() for p in model.parameters()) == 380_755
    sa.load_official_weights(model, weights)
    output = model(image, slots=model.slot_attention.init_slots(noise))
    loss = sa.hungarian_huber_loss(output.predictions, torch.from_numpy(case["target"]))
    loss.backward()
    np.testing.assert_allclose(output.predictions.detach(), case["predictions"], atol=1e-5)
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    check_gradients(model, case)


@pytest.mark.parametrize("name", cases("units", "grid"))
def test_layers_equal_tensorflow(name):
    case = golden(f"units/{name}")
    kind, k, stride = name.split("_")[0], int(name.split("_")[1][1:]), int(name.split("_")[2][1:])
    layer = (sa.Conv2dSame if kind == "conv" else sa.ConvTranspose2dSame)(3, 4, k, stride).double()
    layer.weight.data = torch.from_numpy(case["kernel"]).permute(3, 2, 0, 1)
    layer.bias.data = torch.from_numpy(case["bias"])
    y = layer(torch.from_numpy(case["x"]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(y.detach(), case["y"], atol=1e-13)


def test_grid_equals_official():
    for name, grid in golden("units/grid").items():
        ours = sa.SoftPositionEmbed(8, [int(size) for size in name.split("x")]).grid
        np.testing.assert_allclose(ours, grid, atol=1e-7)


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
        np.testing.assert_allclose(attn[:, t].detach(), a.transpose(0, 2, 1), atol=1e-13)
        weights = (a + 1e-8) / (a + 1e-8).sum(1, keepdims=True)
        updates = weights.transpose(0, 2, 1) @ v                              # [B, K, D]
        gx = updates @ p["gru.weight_ih"].T + p["gru.bias_ih"]
        gh = s @ p["gru.weight_hh"].T + p["gru.bias_hh"]
        r, z = sigmoid(gx[..., :D] + gh[..., :D]), sigmoid(gx[..., D:2 * D] + gh[..., D:2 * D])
        s = z * s + (1 - z) * np.tanh(gx[..., 2 * D:] + r * gh[..., 2 * D:])
        h = norm(s, "norm_mlp") @ p["mlp.0.weight"].T + p["mlp.0.bias"]
        s = s + np.maximum(h, 0) @ p["mlp.2.weight"].T + p["mlp.2.bias"]
    np.testing.assert_allclose(slots.detach(), s, atol=1e-12)


def test_initialisation_is_keras():
    torch.manual_seed(0)
    model = sa.SlotAttentionAutoEncoder(128, 7)
    limits = {"slot_attention.slots_mu": (6 / 65) ** 0.5, "slot_attention.gru.weight_ih": (6 / 256) ** 0.5,
              "encoder.cnn.2.weight": (6 / 3200) ** 0.5, "decoder.cnn.0.weight": (6 / 3200) ** 0.5,
              "slot_attention.project_q.weight": (6 / 128) ** 0.5}
    for name, limit in limits.items():
        largest = model.get_parameter(name).abs().max().item()
        assert 0.93 * limit < largest <= limit, name
    recurrent = model.slot_attention.gru.weight_hh
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(64))
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert all(m.eps == 1e-3 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


@pytest.mark.parametrize("task", ["discovery", "set_prediction"])
def test_learning_rate_equals_official(task):
    case = golden(f"schedule/{task}")
    _, config, _ = train.parse(["--data", "clevr", "--task", task.replace("discovery", "object_discovery")])
    for steps, rates in ((case["steps"], case["lr"]), (case["fine_steps"], case["fine_lr"])):
        ours = [train.learning_rate(int(step), config) for step in steps]
        np.testing.assert_allclose(ours, rates, rtol=1e-5, atol=1e-12)


def test_official_checkpoint_is_read_without_tensorflow(tmp_path):
    """assets/ckpt-500 was written by TensorFlow 2.21, from RandomState(0) in the order of the sorted names."""
    arrays = data.read_tf_checkpoint(ASSETS / "ckpt-500")
    rng = np.random.RandomState(0)
    for key in sorted(arrays):
        np.testing.assert_array_equal(arrays[key], rng.standard_normal(arrays[key].shape).astype(np.float32))
    small = dict(slot_dim=4, mlp_hidden_size=8, encoder_channels=4, encoder_strides=(1, 2), decoder_channels=4,
                 decoder_strides=(2, 1))
    model = sa.SlotAttentionAutoEncoder(16, 3, **small)
    of_adam = {f"{key.removesuffix('/.ATTRIBUTES/VARIABLE_VALUE')}/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE":
               value for key, value in arrays.items()}
    sa.load_official_weights(model, {**arrays, **of_adam, "step": 500})
    mu = arrays["network/layer_with_weights-0/slot_attention/slots_mu/.ATTRIBUTES/VARIABLE_VALUE"]
    np.testing.assert_array_equal(model.slot_attention.slots_mu.detach(), mu)
    np.savez(tmp_path / "weights.npz", **arrays)
    other = sa.SlotAttentionAutoEncoder(16, 3, **small)
    sa.load_official_weights(other, np.load(tmp_path / "weights.npz"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for key, value in ("slot_dim", 8), ("encoder_strides", (1,)), ("encoder_strides", (1, 2, 2)):
        other = sa.SlotAttentionAutoEncoder(16, 3, **{**small, key: value})
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match="another model"):
            sa.load_official_weights(other, arrays)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# What the paper says of it
# ---------------------------------------------------------------------------------------------------------------------


def test_proposition_1():
    """Slots are equivariant to a permutation of the initial slots, and invariant to one of the inputs."""
    torch.manual_seed(0)
    module = sa.SlotAttention(5, 16).double()
    inputs, init = torch.randn(2, 30, 16).double(), torch.randn(2, 5, 16).double()
    slots, attn = module(inputs, slots=init)
    of_slots, of_inputs = torch.randperm(5), torch.randperm(30)
    permuted, permuted_attn = module(inputs[:, of_inputs], slots=init[:, of_slots])
    torch.testing.assert_close(permuted, slots[:, of_slots])
    torch.testing.assert_close(permuted_attn, attn[:, :, of_slots][..., of_inputs])


@pytest.mark.parametrize("implicit", [False, True])
def test_gradient_reaches_mu_and_sigma(implicit):
    torch.manual_seed(0)
    module = sa.SlotAttention(5, 16, implicit=implicit)
    module(torch.randn(2, 30, 16))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        if name != "norm_slots.bias":  # shifts all slots' queries alike: no effect
            assert parameter.grad.abs().max() > 0, name


def test_the_class_alone_is_the_module():
    """Copied into a notebook, with nothing but torch around it."""
    scope = {"torch": torch, "nn": nn}
    exec(inspect.getsource(sa.SlotAttention), scope)
    torch.manual_seed(0)
    ours = sa.SlotAttention(3, 8, inputs_dim=6)
    torch.manual_seed(0)
    pasted, inputs, init = scope["SlotAttention"](3, 8, inputs_dim=6), torch.randn(2, 9, 6), torch.randn(2, 3, 8)
    assert torch.equal(pasted(inputs, init)[0], ours(inputs, init)[0])


def test_implicit_is_the_last_iteration_with_gradient():
    torch.manual_seed(0)
    module = sa.SlotAttention(5, 16, num_iterations=4).double()
    inputs, init = torch.randn(2, 30, 16).double(), torch.randn(2, 5, 16).double().requires_grad_()
    unrolled, unrolled_attn = module(inputs, init)
    before = module(inputs, init, num_iterations=3)[0].detach().requires_grad_()
    last, _ = module(inputs, before, num_iterations=1)
    module.implicit = True
    slots, attn = module(inputs, init)
    torch.testing.assert_close(slots, unrolled)
    torch.testing.assert_close(attn, unrolled_attn)
    weights = [module.gru.weight_ih, module.project_k.weight]
    torch.testing.assert_close(torch.autograd.grad(slots.sum(), [init, *weights]),
                               torch.autograd.grad(last.sum(), [before, *weights]))  # straight through to init


def test_memory_of_the_one_step_gradient_does_not_grow():
    """The tensors that are alive for the backward pass, after 2 and 8 iterations, but for attn itself."""
    def alive(implicit, num_iterations):
        module, kept = sa.SlotAttention(4, 16, implicit=implicit), {}

        def pack(x):
            kept[x.data_ptr()] = x
            return x.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            slots, _ = module(torch.randn(2, 100, 16), num_iterations=num_iterations)
        nodes, todo = set(), [slots.grad_fn]
        while todo:
            node = todo.pop()
            if node and node not in nodes:
                nodes.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(nodes)

    assert alive(True, 8) == alive(True, 2)
    assert alive(False, 8) > 2 * alive(False, 2)


def test_learned_queries_give_each_slot_a_mean_of_its_own():
    module = sa.SlotAttention(3, 8, learned_queries=True)
    slots = module.init_slots(torch.zeros(2, 5, 8))  # two more than were trained: they start from the first two again
    assert torch.equal(slots[0], module.slots_mu[0, [0, 1, 2, 0, 1]]) and torch.equal(slots[0], slots[1])


def test_slots_and_iterations_change_at_test_time():
    model = sa.SlotAttentionAutoEncoder((32, 48), 4)
    image = torch.randn(2, 3, 32, 48)
    output = model(image, num_slots=6, num_iterations=5)
    assert output.masks.shape == (2, 6, 1, 32, 48) and output.attn.shape == (2, 5, 6, 32, 48)
    torch.testing.assert_close(output.masks.sum(1), torch.ones(2, 1, 32, 48))
    assert model(image, slots=output.slots).slots.shape == output.slots.shape


@pytest.mark.parametrize("size", [35, 12, 5, 3])
def test_first_convolution_by_linearity_is_the_convolution(size):
    torch.manual_seed(0)
    decoder = sa.Decoder((size, size + 2), 8, 6, (1, 1)).double()
    nn.init.normal_(decoder.cnn[0].bias)
    slots = torch.randn(3, 8).double().requires_grad_()
    fast = decoder.first_convolution(slots)
    plain = decoder.cnn[0](decoder.pos(slots[:, :, None, None].expand(-1, -1, size, size + 2)))
    torch.testing.assert_close(fast, plain)
    weight, inputs = torch.randn_like(plain), [slots, *decoder.cnn[0].parameters(), *decoder.pos.parameters()]
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), inputs),
                    torch.autograd.grad((plain * weight).sum(), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implicit", [False, True])
def test_models_compile_whole(implicit):
    """torch.compile traces each model as one graph, under autocast too: what a GPU runs. (Its code generator is left
    out: it takes minutes on a CPU.)"""
    torch.manual_seed(0)
    image, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8)
    small = dict(slot_dim=8, implicit=implicit, encoder_channels=8)
    for model in (sa.SlotAttentionAutoEncoder(16, 3, **small, decoder_channels=8, decoder_strides=(1, 2)),
                  sa.SlotAttentionClassifier(16, 3, **small)):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            gradients = []
            for call in (model, compiled):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    output = call(image, slots=model.slot_attention.init_slots(noise))
                gradients.append(torch.autograd.grad(output[0].square().sum(), list(model.parameters())))
            largest = max(gradient.abs().max().item() for gradient in gradients[0])
            for a, b in zip(*gradients):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("ari"))
def test_ari_equals_official(case):
    """Where the official code gives NaN, ours gives 1; masks of 0/255 score as those of 0/1."""
    true, pred, score = (torch.from_numpy(GOLDEN[f"ari/{case}/{key}"]) for key in ("true", "pred", "score"))
    if case.endswith("mask255"):
        name = case.removesuffix("_mask255") + ("_mask01" if "small" in case else "")
        score = torch.from_numpy(GOLDEN[f"ari/{name}/score"])
    torch.testing.assert_close(sa.adjusted_rand_index(true, pred), score.nan_to_num(1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", cases("hungarian"))
def test_hungarian_loss_equals_official(case):
    case = golden(f"hungarian/{case}")
    pred = torch.from_numpy(case["pred"]).requires_grad_()
    loss = sa.hungarian_huber_loss(pred, torch.from_numpy(case["target"]))
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    np.testing.assert_allclose(pred.grad, case["grad_pred"], atol=1e-7)


@pytest.mark.parametrize("n, m", [(1, 1), (3, 3), (6, 6), (4, 6), (6, 4), (1, 5)])
def test_matching_equals_brute_force(n, m):
    cost = torch.from_numpy(np.random.default_rng(0).normal(size=(20, n, m)))
    rows, cols = sa.minimum_cost_matching(cost)
    assert rows.shape == cols.shape == (20, min(n, m)) and (rows.diff(dim=1) > 0).all()
    for b in range(20):
        assert len(set(cols[b].tolist())) == min(n, m)
        c = cost[b] if n <= m else cost[b].T
        best = min(sum(c[i, j] for i, j in enumerate(p)) for p in permutations(range(max(n, m)), min(n, m)))
        torch.testing.assert_close(cost[b, rows[b], cols[b]].sum(), best, rtol=1e-6, atol=1e-6)


def test_matching_takes_twelve_and_refuses_many():
    rng = np.random.default_rng(0)
    order = torch.from_numpy(rng.permuted(np.arange(12)[None].repeat(5, 0), axis=1))
    cost = 1 - F.one_hot(order, 12).float() + 0.5 * torch.from_numpy(rng.random((5, 12, 12)))
    cost.scatter_(2, order[..., None], 0)
    assert torch.equal(sa.minimum_cost_matching(cost)[1], order)
    with pytest.raises(ValueError, match="16"):
        sa.minimum_cost_matching(torch.zeros(1, 17, 17))


@pytest.mark.parametrize("case", cases("ap", "thresholds", "helper"))
def test_average_precision_equals_official(case):
    case = golden(f"ap/{case}")
    for threshold, expected in zip([np.inf, *GOLDEN["ap/thresholds"][1:]], case["ap"]):
        ours = sa.average_precision_clevr(torch.from_numpy(case["pred"]), torch.from_numpy(case["target"]), threshold)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_average_precision_of_a_whole_set_takes_seconds():
    rng = np.random.default_rng(0)
    target = np.zeros((15_000, 10, 19), np.float32)
    target[..., :3] = rng.random((15_000, 10, 3))
    for start, size in ((3, 2), (5, 2), (7, 3), (10, 8)):
        target[..., start:start + size] = np.eye(size)[rng.integers(size, size=(15_000, 10))]
    target[..., 18] = np.arange(10) < rng.integers(3, 11, (15_000, 1))
    start = time.perf_counter()
    assert sa.average_precision_clevr(torch.from_numpy(target), torch.from_numpy(target), 0.125) > 0.999
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.TFRECORDS)
def test_tfrecords_equal_tensorflow(name):
    expected = np.load(ASSETS / "tfrecords" / f"{name}_sample.npz")
    scenes = list(data.read_tfrecords(ASSETS / "tfrecords" / f"{name}_sample.tfrecords", name))
    assert len(scenes) == len(expected["image"])
    for i, scene in enumerate(scenes):
        assert set(scene) == set(expected.files)
        for key, array in scene.items():
            wanted = expected[key][i, ..., 0] != 0 if key == "mask" else expected[key][i]
            assert array.dtype == np.uint8 or array.dtype == np.float32
            np.testing.assert_array_equal(array, wanted, strict=key != "mask")


def test_splits():
    """The paper's counts for training, and what comes after them for evaluation; of a short file the last fifth."""
    for n, train_count, border in ((100_000, 70_000, 70_000), (65_000, 60_000, 60_000), (70_000, 70_000, 56_000),
                                   (48, 70_000, 39), (2, 70_000, 1)):
        objects = torch.arange(n) % 8 + 3
        splits = [data.choose(objects, split, train_count) for split in ("train", "eval")]
        assert torch.equal(torch.cat(splits), torch.arange(n)) and len(splits[0]) == border
    objects = torch.arange(100) % 8 + 3
    first = data.choose(objects, "train", 60, 9, 3, 6)
    assert torch.equal(first, (objects <= 6).nonzero()[:9, 0])
    with pytest.raises(ValueError, match="no scene with 11 to 12"):
        data.choose(objects, "eval", 60, None, 11, 12)


def test_masks_and_images_are_cropped_alike(tmp_path):
    """clevr_with_masks: crop as in the paper, CLEVR6 by visibility, targets; and a cache that follows its source."""
    for name in ("clevr_with_masks_train", "multi_dsprites_colored_on_grayscale", "tetrominoes_train"):
        sample = ASSETS / "tfrecords" / f"{name.removesuffix('_train')}_sample.tfrecords"
        (tmp_path / f"{name}.tfrecords").write_bytes(sample.read_bytes())
    expected = np.load(ASSETS / "tfrecords" / "clevr_with_masks_sample.npz")
    objects = expected["visibility"].reshape(len(expected["image"]), -1).sum(1) - 1
    for most in (10, 6):
        try:
            scenes = data.load("clevr", "train", tmp_path, resolution=192, max_objects=most)
        except ValueError as error:
            assert "no scene" in str(error) and not (objects[:2] <= most).any()
            continue
        index = np.flatnonzero(objects[:2] <= most)
        batch = scenes.batch(torch.arange(len(scenes)))
        image = ((batch["image"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        np.testing.assert_array_equal(image, expected["image"][index, 29:221, 64:256])
        np.testing.assert_array_equal(batch["label"], expected["mask"][index, :, 29:221, 64:256, 0].argmax(1))
        np.testing.assert_array_equal(batch["target"][:, :, 18].sum(1), objects[index])
    for name in ("tetrominoes", "multi_dsprites"):
        assert len(data.load(name, "train", tmp_path)) == 5 and len(data.load(name, "eval", tmp_path)) == 1
    cache, = (tmp_path / "cache").glob("tetrominoes*")
    written = cache.stat().st_mtime_ns
    data.load("tetrominoes", "train", tmp_path)
    assert cache.stat().st_mtime_ns == written
    os.utime(cache, (1, 1))
    data.load("tetrominoes", "train", tmp_path)
    assert cache.stat().st_mtime_ns >= written


def clevr_v1(folder, count=12):
    """A tiny CLEVR_v1.0 of generated pictures in the real layout -> its folder's parent, and the scenes."""
    made, scenes = data.make_clevr_like(count, 0, resolution=32, crop=False), []
    for part in ("images/train", "scenes"):
        (folder / "CLEVR_v1.0" / part).mkdir(parents=True)
    for i, image in enumerate(made["image"]):
        name = f"CLEVR_train_{i:06}.png"
        picture = Image.fromarray(image).resize((480, 320), Image.NEAREST).convert("RGBA")
        picture.save(folder / "CLEVR_v1.0/images/train" / name)
        objects = [{"3d_coords": [float(made[axis][i, e]) for axis in "xyz"], "rotation": 0.0,
                    **{key: names[made[key][i, e] - 1] for key, names in data.CLEVR_CODES.items()}}
                   for e in range(1, 11) if made["visibility"][i, e]]
        scenes.append({"image_filename": name, "objects": objects})
    (folder / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return folder, made


def test_clevr_v1_is_read(tmp_path, capsys):
    root, made = clevr_v1(tmp_path)
    counts = (made["visibility"].sum(1) - 1).astype(int)
    scenes, held_out = (data.load("clevr", split, root, resolution=32, crop="none") for split in ("train", "eval"))
    assert (len(scenes), len(held_out)) == (10, 2) and "last fifth" in capsys.readouterr().err
    six = data.load("clevr", "train", root, resolution=32, crop="none", max_objects=6)
    assert len(six) == (counts[:10] <= 6).sum()
    batch = scenes.batch(torch.arange(4))
    ours = (batch["image"] / 2 + 0.5).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(ours - made["image"][:4]).mean() < 1  # the PNGs are the pictures blown up
    wanted = [data.clevr_target({key: made[key][i] for key in made}) for i in range(4)]
    np.testing.assert_allclose(batch["target"], wanted, atol=1e-6)


def test_targets_have_the_official_order():
    scene = {"size": [0, 1, 2], "material": [0, 1, 2], "shape": [0, 1, 3], "color": [0, 8, 6], "x": [0, -3, 3],
             "y": [0, 0, 1.5], "z": [0, 0.7, 0.35]}
    target = data.clevr_target({key: np.array(values) for key, values in scene.items()})
    # small, large | rubber, metal | cube, sphere, cylinder | gray, blue, brown, yellow, red, green, purple, cyan | real
    np.testing.assert_allclose(target[0], [0, .5, 3.7 / 6, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(target[1], [1, .75, 3.35 / 6, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], rtol=1e-6)
    assert not target[2:].any()


@pytest.mark.parametrize("make, resolution, entities, least, most", [
    (data.make_tetrominoes, 35, 4, 3, 3), (data.make_multi_dsprites, 64, 6, 2, 5), (data.make_clevr_like, 128, 11, 3, 10)])
def test_generated_scenes_follow_the_rules(make, resolution, entities, least, most):
    n = 8 if make == data.make_clevr_like else 500
    scenes = make(n, 0)
    image, mask, objects = scenes["image"], scenes["mask"], scenes["visibility"].sum(1) - 1
    assert image.shape == (n, resolution, resolution, 3) and mask.shape == (n, entities, resolution, resolution)
    assert image.dtype == mask.dtype == np.uint8 and (mask.sum(1) == 1).all()
    assert objects.min() >= least and objects.max() <= most and len(set(objects)) > (least < most)
    assert (mask.any((2, 3)) <= scenes["visibility"]).all()
    again, other = make(n, 0), make(n, 1)
    assert all((again[key] == scenes[key]).all() for key in scenes) and (other["image"] != image).any()


def test_tetrominoes_are_whole_and_anywhere():
    scenes = data.make_tetrominoes(2000, 0)
    image, mask = scenes["image"], scenes["mask"]
    assert (mask[:, 1:].sum((2, 3)) == 100).all() and (image[mask[:, 0] == 1] == 0).all()  # none over another
    assert set(scenes["shape"][:, 1:].flatten()) == set(range(1, 20))
    assert len(np.unique(scenes["color"][:, 1:].reshape(-1, 3), axis=0)) == 6
    top = np.where(mask[:, 1:].any(3), np.arange(35), 99).min(2)
    np.testing.assert_array_equal(top, scenes["y"][:, 1:])
    assert set(top.flatten()) == set(range(31))  # any pixel, no grid


@real_data
def test_real_tetrominoes_are_drawn_to_the_pixel():
    real = np.load(SAMPLES / "tetrominoes" / "real_3.npz")
    known = [sorted(map(tuple, cells)) for cells in data.TETROMINO_CELLS.tolist()]
    for image, mask in zip(real["image"], real["mask"] > 0):
        pieces, corners, colors = [], [], []
        for piece in mask[1:]:
            rows, cols = np.nonzero(piece)
            corners.append((rows.min(), cols.min()))
            pieces.append(known.index(sorted(set(zip((rows - rows.min()) // 5, (cols - cols.min()) // 5)))))
            colors.append(image[piece].max(0) > 0)
        ours, ours_mask = data.draw_tetrominoes(np.array([pieces]), np.array([corners]), np.array([colors]))
        np.testing.assert_array_equal(ours[0], image)
        np.testing.assert_array_equal(ours_mask[0], mask)


def test_multi_dsprites_stand_where_their_factors_say():
    scenes = data.make_multi_dsprites(500, 0)
    mask, there, n = scenes["mask"], scenes["visibility"], np.arange(500)
    assert mask[:, 1:].any((2, 3))[there[:, 1:] > 0].mean() > 0.97
    color = (scenes["color"] * 255).round()[n[:, None, None], mask.argmax(1)]
    assert np.abs(color - scenes["image"]).max() <= 1 and (scenes["color"][:, 0].std(1) < 1e-6).all()
    assert len(np.unique(scenes["scale"])) == 7 and len(np.unique(scenes["orientation"])) == 40
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
    np.testing.assert_allclose(scenes["z"][:, 1:], radius, atol=1e-6)
    for key, names in data.CLEVR_CODES.items():
        assert set(scenes[key][:, 1:][there]) <= set(range(1, len(names) + 1)) and not scenes[key][:, 1:][~there].any()
    place = np.stack([scenes["x"], scenes["y"]], 2)[:, 1:]
    assert np.abs(place).max() <= 3
    pairs = there[:, :, None] & there[:, None] & ~np.eye(10, dtype=bool)
    gap = np.linalg.norm(place[:, :, None] - place[:, None], axis=3) - radius[:, :, None] - radius[:, None]
    assert 0.25 <= gap[pairs].min() < 0.5
    seen = scenes["mask"][:, 1:].mean((2, 3))[there] * 320 * 240
    assert seen.min() > 100  # 200, decided on a coarser map
    rows, cols, errors, hues = np.arange(96)[:, None] + 0.5, np.arange(96) + 0.5, [], []
    for i, e in zip(*np.nonzero(there)):
        mask = scenes["mask"][i, e + 1]
        column, row = scenes["pixel_coords"][i, e + 1, :2]
        errors.append(np.hypot((mask * cols).sum() / mask.sum() - column, (mask * rows).sum() / mask.sum() - row))
        if scenes["material"][i, e + 1] == 1 and scenes["color"][i, e + 1] != 6:  # rubber, not gray
            colors = scenes["image"][i][mask > 0].mean(0), data.CLEVR_COLORS[scenes["color"][i, e + 1]]
            ours, wanted = (data.hsv_to_rgb.__globals__["rgb_to_hsv"](color / 255)[0] for color in colors)
            hues.append(abs((ours - wanted + 0.5) % 1 - 0.5))
    assert np.median(errors) < 1.5 and len(hues) > 20 and np.median(hues) < 0.03 and max(hues) < 0.1
    fewer = data.make_clevr_like(3, 0, resolution=96, min_objects=8, crop=False)
    assert all((fewer[key] == scenes[key][:3]).all() for key in fewer)


@real_data
def test_camera_and_crop_agree_with_real_clevr():
    scenes = json.loads((SAMPLES / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json").read_text())["scenes"]
    objects = [o for scene in scenes for o in scene["objects"]]
    pixels = np.array([o["pixel_coords"][:2] for o in objects])
    error = data.project(np.array([o["3d_coords"] for o in objects]))[:, :2] - pixels
    assert np.abs(error).mean() < 3.5 and np.abs(error.mean(0)).max() < 2  # the cameras' jitter, and no offset
    inside = [((pixels >= (left, top)) & (pixels < (right, bottom))).all(1).mean()
              for top, bottom, left, right in (data.CLEVR_CROP[320, 480], data.CLEVR_CROP[240, 320])]
    assert inside[0] > 0.85 and inside[1] < 0.65  # the physically equal window, and the official off-centre one


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------

TINY = ("--data tetrominoes --small --train-count 64 --eval-count 8 --batch-size 8 --steps 6 --eval-every 3 "
        "--log-every 1 --dtype float32 --device cpu --encoder-channels 8 --decoder-channels 8 --slot-dim 8").split()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def log_of(run):
    rows = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a, b):
    """Whether two checkpoints hold the same weights, optimizer and log, to the bit."""
    for part in ("model", "optimizer", "step"):
        leaves = [torch.utils._pytree.tree_leaves(checkpoint[part]) for checkpoint in (a, b)]
        if not all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves, strict=True)):
            return False
    return True


def refused(capsys, main, flags):
    """One line on stderr (the last; what was said before is no error), exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and not any("Traceback" in line for line in lines), lines
    return lines[-1]


def test_training_repeats_resumes_and_draws(capsys):
    for out in ("whole", "again"):
        train.main([*TINY, "--out", out])
    rows = log_of("whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and log_of("again") == rows
    assert all(-1 <= rows[i]["ari"] <= 1 for i in (2, 5)) and Path("whole/figure.png").stat().st_size > 10_000
    train.main([*TINY, "--steps", "3", "--out", "parts"])
    with open("parts/log.jsonl", "a") as log:  # a killed run has logged more than it saved, and half a line
        log.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    train.main(["--resume", "parts", "--steps", "6"])
    assert log_of("parts") == rows
    whole, again, parts = (visualize.read_checkpoint(run) for run in ("whole", "again", "parts"))
    assert same(whole, again) and same(whole, parts)

    capsys.readouterr()
    train.main(["--eval", "whole", "--num-slots", "5"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "5 slots" in first and [json.loads(line)["num_iterations"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_saves_first(number):
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--steps", "100000", "--eval-every", "100000"]
    process = subprocess.Popen([*command, "--out", "run"], stderr=subprocess.PIPE, text=True)
    wait_for_log("run", 3)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "--resume" in errors
    assert visualize.read_checkpoint("run")["step"] == log_of("run")[-1]["step"]


def wait_for_log(run, rows):
    deadline = time.time() + 200
    while time.time() < deadline and not (Path(run, "log.jsonl").exists() and len(log_of(run)) > rows):
        time.sleep(0.1)


def test_accumulated_gradient_is_the_same():
    states = []
    for parts in "14":
        train.main([*TINY, "--steps", "2", "--clip", "0", "--slot-loss-from", "0", "--accumulate", parts, "--out", parts])
        states.append(visualize.read_checkpoint(parts)["optimizer"]["state"])  # its means are of the gradients
    for i, state in states[0].items():
        torch.testing.assert_close(state["exp_avg"], states[1][i]["exp_avg"], rtol=1e-4, atol=1e-8)
    for a, b in zip(log_of("1"), log_of("4")):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)


def test_two_processes_train_as_one_and_resume_as_one():
    """Two processes, then a signal, then one process, against one process all along."""
    flags = [*TINY, "--eval-every", "10", "--accumulate", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(HERE / "train.py"), *flags, "--steps", "100000", "--out", "many"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_log("many", 20)
    process.terminate()
    errors = process.communicate(timeout=200)[1]
    assert errors.count("stopped and saved") == 1 and errors.count("64 scenes") == 1, errors
    saved = visualize.read_checkpoint("many")["step"]
    assert [row["step"] for row in log_of("many")] == list(range(1, saved + 1))
    last = ["--steps", str(saved + 3)]
    train.main(["--resume", "many", *last])
    train.main([*flags, *last, "--out", "one"])
    assert len(log_of("many")) == len(log_of("one")) == saved + 3
    for a, b in zip(log_of("one"), log_of("many")):
        assert a.keys() == b.keys()  # rounding errors grow with the steps
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5 if a["step"] <= 20 else 1e-3)


def test_train_on_the_original_clevr(tmp_path):
    clevr_v1(tmp_path, count=20)
    flags = "--data clevr --data-root . --encoder-channels 8 --batch-size 2 --steps 2 --resolution 32".split()
    train.main([*flags, "--decoder-strides", "2,2,1", "--decoder-channels", "8", "--max-objects", "10", "--out", "a"])
    assert "ari" not in log_of("a")[-1] and Path("a/figure.png").exists()
    train.main([*flags, "--task", "set_prediction", "--out", "b"])
    assert {"ap_inf", "ap_1", "ap_0.125"} <= log_of("b")[-1].keys() and Path("b/figure.png").stat().st_size > 10_000


def test_every_experiment_makes_a_model():
    for task, name in train.EXPERIMENTS:
        for small in ([], ["--small"]):
            _, config, _ = train.parse(["--task", task, "--data", name, *small])
            image = torch.zeros(1, 3, config.resolution, config.resolution)
            assert torch.isfinite(sa.build_model(vars(config))(image)[0]).all()


def test_benchmark_prints_one_line(capsys):
    train.main([*TINY, "--benchmark", "--accumulate", "2"])
    line = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(line["images_per_s"], 8 / line["ms"][0] * 1e3, rtol=0.02)
    assert line["ms"][2] >= line["ms"][0] >= line["ms"][1] > 0


def test_bfloat16_only_where_the_hardware_multiplies_in_it(monkeypatch):
    for text, expected in (("flags: fma avx512_bf16", True), ("flags: amx_bf16", True), ("flags: avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        assert train.has_bfloat16(torch.device("cpu")) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The weights that come with the code, and figures
# ---------------------------------------------------------------------------------------------------------------------


def found_alone(model, iterations=5):
    """Of the objects in the real CLEVR pictures with at most six: the share whose slot (that at the object's centre) is
    neither the largest nor that of another object in view. By hand: python -c "import test_slot_attention as t;
    print(t.found_alone(t.sa.load_model(t.data.read_file('assets/clevr_like.pt'))))" """
    scenes = json.loads((SAMPLES / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json").read_text())["scenes"]
    top, bottom, left, right = data.CLEVR_CROP[320, 480]
    size, alone, number = model.decoder.resolution[0], 0, 0
    for scene in (scene for scene in scenes if len(scene["objects"]) <= 6):
        picture = data.read_png(SAMPLES / "CLEVR_v1.0/images/train" / scene["image_filename"])
        image = data.Scenes(data.resize(picture, size, "paper")[None]).batch(torch.arange(1))["image"]
        noise = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            owner = model(image, model.slot_attention.init_slots(noise), num_iterations=iterations).masks[0, :, 0].argmax(0)
        pixels = np.array([o["pixel_coords"][:2] for o in scene["objects"]])
        pixels = pixels[((pixels >= (left, top)) & (pixels < (right, bottom))).all(1)]
        cols, rows = ((pixels - (left, top)) * size / (bottom - top)).astype(int).T
        slots, largest = owner[rows, cols].tolist(), owner.flatten().bincount().argmax().item()
        alone += sum(slots.count(slot) == 1 and slot != largest for slot in slots)
        number += len(slots)
    return alone / number


@real_data
def test_shipped_weights_take_real_clevr_apart():
    assert found_alone(sa.load_model(data.read_file(ASSETS / "clevr_like.pt"))) > 0.8


def evaluation_of(file, scenes):
    checkpoint = data.read_file(ASSETS / file)
    config = train.argparse.Namespace(**checkpoint["config"])
    return train.evaluate(sa.load_model(checkpoint), config, scenes, torch.device("cpu"), torch.float32)


def test_shipped_weights_take_scenes_apart_that_they_never_saw():
    scenes = data.make_tetrominoes(128, 12345)
    assert evaluation_of("demo.pt", data.Scenes(scenes["image"], scenes["mask"].argmax(1).astype(np.uint8)))["ari"] > 0.9
    scenes = data.make_clevr_like(8, 12345, 64, max_objects=6)
    assert evaluation_of("clevr_like.pt", data.Scenes(scenes["image"], scenes["mask"].argmax(1)))["ari"] > 0.75
    config = data.read_file(ASSETS / "set_prediction.pt")["config"]
    scenes = data.make_clevr_like(16, 12345, config["resolution"], crop=False)
    targets = np.stack([data.clevr_target({key: scenes[key][i] for key in scenes}) for i in range(16)])
    assert evaluation_of("set_prediction.pt", data.Scenes(scenes["image"], targets=targets))["ap_inf"] > 0.5


def test_figures_of_all_kinds(capsys):
    demo = str(visualize.DEMO)
    train.main([*TINY, "--steps", "3", "--num-slots", "5", "--out", "run"])
    shutil.rmtree("run/figure.png", ignore_errors=True)
    visualize.main(["run", demo, "--count", "2"])  # one sheet for several runs, here
    wide, high = Image.open("figure.png").size
    assert wide > 600 and 0.3 < high / wide < 0.9  # four rows of eight
    Image.new("RGB", (480, 320), "blue").save("own.png")
    for flags in ("", "run --figure curve", f"{demo} --figure clip --count 3 --out clip.png", f"{demo} --figure b --num-slots 6",
                  f"{demo} --images own.png", f"{ASSETS / 'clevr_like.pt'} --images own.png --figure a",
                  f"{ASSETS / 'set_prediction.pt'} --images own.png"):
        visualize.main(flags.split())
        drawn = Path(capsys.readouterr().err.strip().splitlines()[-1].removeprefix("drew "))
        assert drawn.stat().st_size > 5_000
    visualize.main([demo, "--count", "1", "--num-iterations", "3", "--out", "a.gif"])
    assert Image.open("a.gif").n_frames == 3
    for flags, message in [(f"{demo} --figure curve", "log"), (f"{demo} --out nowhere/a.png", "nowhere"), (f"{demo} --out a.xyz", "xyz"),
                           ("typo", "typo"), (f"{demo} --num-slots x", "--num-slots")]:
        assert message in refused(capsys, visualize.main, flags.split()), flags
        assert not list(Path().rglob("part-*")), flags


def test_own_pictures(capsys):
    config = {"data": "tetrominoes", "task": "object_discovery", "resolution": 8, "crop": "paper"}
    grey = Image.new("L", (30, 20), 100)
    pictures = {"grey.png": grey, "rgb.jpg": grey.convert("RGB"), "palette.gif": grey.convert("P"),
                "cmyk.jpg": grey.convert("CMYK"), "la.png": grey.convert("LA"), "tiny.png": grey.resize((1, 1))}
    for name, picture in pictures.items():
        picture.save(name)
    images = visualize.load_pictures(pictures, config)
    torch.testing.assert_close(images, torch.full((6, 3, 8, 8), 100 * 2 / 255 - 1), rtol=0, atol=0.02)
    Image.new("RGBA", (20, 30), (255, 0, 0, 0)).save("clear.png")  # all transparent
    assert (visualize.load_pictures(["clear.png"], config) == 1).all()
    framed = Image.new("RGB", (40, 20), "red")
    framed.paste("blue", (10, 0, 30, 20))
    framed.save("framed.png")
    blue = visualize.load_pictures(["framed.png"], config)
    assert (blue[:, 2] == 1).all() and (blue[:, 0] == -1).all()  # the central square, and nothing beside it
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("rgb.jpg").read_bytes()[:300])
    for name in ("text.png", "cut.png", "missing.png", "."):
        assert name in refused(capsys, visualize.main, [str(visualize.DEMO), "--images", name])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing lost and no code run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--data nothing", "nothing"), ("--steps 0", "--steps"), ("--steps 1.5", "--steps"), ("--lr nan", "--lr"),
    ("--lr -1", "--lr"), ("--lr inf", "--lr"), ("--batch-size x", "--batch-size"), ("--num-slots 99999999", "--num-slots"),
    ("--encoder-strides 1,0", "--encoder-strides"), ("--encoder-strides 1,,1", "--encoder-strides"),
    ("--decoder-strides 7", "strides"), ("--unknown 1", "unknown"), ("--beta2 1", "--beta2"),
    ("--slot-loss 1.1", "--slot-loss"), ("--seed -1", "--seed"), ("--device nowhere", "--device"),
    ("--dtype half", "--dtype"), ("--data clevr --data-root nowhere", "clevr_like"),
    ("--data multi_dsprites_on_colored --data-root nowhere", "no nowhere/multi_dsprites"),
    ("--task set_prediction --data tetrominoes", "--task"), ("--task set_prediction", "--task"),
    ("--task set_prediction --data clevr_like --num-slots 17", "16"), ("--resume nowhere", "nowhere"),
    ("--eval nowhere", "nowhere"), ("--resume x --eval y", "--eval"), ("--resume x --out y", "--out"),
    (f"--resume {ASSETS / 'demo.pt'}", "--resume"), (f"--eval {ASSETS / 'demo.pt'} --slot-dim 16", "size mismatch"),
    ("--train-count 8 --batch-size 64 --eval-count 8", "--batch-size"), ("--batch-size 10 --accumulate 4", "--accumulate"),
    ("--resolution 64", "--resolution"), ("--min-objects 4 --max-objects 6", "--max-objects"),
    ("--data clevr_like --max-objects 2", "max_objects"), ("--data multi_dsprites --resolution 32", "--resolution")])
def test_bad_flags(capsys, tmp_path, flags, message):
    assert message in refused(capsys, train.main, flags.split())
    assert not list(Path().rglob("checkpoint.pt"))


def test_a_folder_holds_one_run(capsys):
    train.main([*TINY, "--steps", "1", "--out", "run"])
    content = Path("run/checkpoint.pt").read_bytes()
    assert "holds a run" in refused(capsys, train.main, [*TINY, "--out", "run"])
    with open("run/log.jsonl", "a") as file:
        assert data.lock(file)
        assert "another process" in refused(capsys, train.main, ["--resume", "run", "--steps", "2"])
    assert Path("run/checkpoint.pt").read_bytes() == content


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(capsys, monkeypatch):
    train.main([*TINY, "--steps", "3", "--out", "run"])
    before = Path("run/checkpoint.pt").read_bytes()
    flags = ["--resume", "run", "--steps", "60", "--lr", "1e12", "--clip", "0", "--eval-every", "60"]
    shutil.copytree("run", "copy")
    assert "NaN" in refused(capsys, train.main, flags)
    step = torch.optim.Adam.step

    def spoil(self, *args):
        step(self, *args)
        self.state[self.param_groups[0]["params"][0]]["exp_avg"][0] = float("inf")  # no loss shows this

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    assert "by step 4" in refused(capsys, train.main, ["--resume", "copy", "--steps", "4"])
    assert Path("run/checkpoint.pt").read_bytes() == Path("copy/checkpoint.pt").read_bytes() == before


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    def mistaken(*args):
        raise ValueError("of a researcher")

    monkeypatch.setattr(train, "compute_loss", mistaken)
    with pytest.raises(ValueError, match="of a researcher"):
        train.main([*TINY, "--out", "run"])


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_no_file_runs_code(capsys, tmp_path, monkeypatch):
    for content in (Evil(), {"config": Evil(), "model": {}}, {"config": {}, "model": Evil()}):
        for zipped in (True, False):
            torch.save(content, "evil.pt", _use_new_zipfile_serialization=zipped)
            assert "evil.pt" in refused(capsys, visualize.main, ["evil.pt"])
        Path("evil.pt").write_bytes(pickle.dumps(content))
        assert "evil.pt" in refused(capsys, train.main, ["--eval", "evil.pt"])
    assert not Path("evil").exists()
    pickle.loads(Path("evil.pt").read_bytes())  # the code is real
    assert Path("evil").exists()

    Path("gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'it_ran'}\n")  # Pillow hands PostScript to Ghostscript
    Path("gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (50, 40)).save("photo.png", format="EPS")
    assert "photo.png" in refused(capsys, visualize.main, [str(visualize.DEMO), "--images", "photo.png"])
    assert not Path("it_ran").exists()
    with pytest.raises(OSError), Image.open("photo.png") as picture:
        picture.load()
    assert Path("it_ran").exists()  # the danger is real


def test_full_disk_loses_nothing():
    """A limit on the size of files stands for a full disk: for the figure, the checkpoint and the cache."""
    train.main([*TINY, "--steps", "3", "--out", "run"])
    before = {name: Path("run", name).read_bytes() for name in ("figure.png", "checkpoint.pt")}
    code = f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {str(HERE)!r})
        import train, visualize
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
        for main, flags in ((visualize.main, ["run"]), (train.main, ["--resume", "run", "--steps", "6"]),
                            (train.main, {[*TINY, "--eval-count", "9", "--out", "new"]!r})):
            try: main(flags)
            except SystemExit as stop: assert stop.code == 2"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and not re.search("Traceback|Exception", result.stderr), result.stderr
    lines = [line for line in result.stderr.splitlines() if "cannot write" in line]
    assert len(lines) == 3 and all(name in line for name, line in zip((*before, "-9-"), lines)), lines
    assert all(Path("run", name).read_bytes() == content for name, content in before.items())
    assert not list(Path().rglob("part-*"))
    train.main(["--resume", "run", "--steps", "6"])
    assert [row["step"] for row in log_of("run")] == [1, 2, 3, 4, 5, 6]


def test_nobody_need_read_the_messages():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--steps", "3", "--out", "run"]
    assert subprocess.run(command, stderr=writer, stdout=subprocess.DEVNULL).returncode == 0
    os.close(writer)


# ---------------------------------------------------------------------------------------------------------------------
# Kill it anywhere; damaged files. Both take a count: the suite runs few, by hand many:
#     python -c "import test_slot_attention as t, pathlib; print(t.kill_anywhere(pathlib.Path('/tmp/kill'), 20))"
# ---------------------------------------------------------------------------------------------------------------------

# One process imports torch and forks a child for each run. What kills: the clock, or the n-th os.replace, by which
# caches, checkpoints and figures come into being, before or after it.
KILLER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import train

for line in sys.stdin:
    delay, number, after, argv = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        replace, calls = os.replace, []
        def counted(*args):
            calls.append(args)
            if len(calls) == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = counted
        train.main(argv)
        os._exit(0)
    if delay:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def kill_anywhere(folder, kills, seed=0):
    """Kills training so often; --resume goes on each time, and the end is that of an unbroken run, to the bit. -> how
    many kills fell before there was a checkpoint, and after."""
    rng, fell, rounds = random.Random(seed), Counter(), 0
    folder.mkdir(exist_ok=True)
    killer = subprocess.Popen([sys.executable, "-c", KILLER], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)

    def run(argv, delay=0, number=0, after=False):
        killer.stdin.write(json.dumps([delay, number, after, argv]) + "\n")
        killer.stdin.flush()
        return int(killer.stdout.readline())

    def flags(name):
        return [*TINY, "--steps", "12", "--eval-every", "2", "--data-root", str(folder / f"data-{name}"), "--out",
                str(folder / name)]

    start = time.perf_counter()
    assert run(flags("whole")) == 0
    duration = time.perf_counter() - start
    while sum(fell.values()) < kills:
        name, done = str(rounds), False
        out = folder / name
        while not done:
            new = not (out / "checkpoint.pt").exists()
            how = {"delay": rng.uniform(0, duration)} if rng.random() < 0.5 else {"number": rng.randint(1, 6),
                                                                                 "after": rng.random() < 0.5}
            how = how if sum(fell.values()) < kills else {}
            status = run(flags(name) if new else ["--resume", str(out)], **how)
            assert status in (0, signal.SIGKILL), status
            done = status == 0
            fell["before" if new else "after"] += not done
        assert same(visualize.read_checkpoint(out), visualize.read_checkpoint(folder / "whole"))
        assert log_of(out) == log_of(folder / "whole") and (out / "figure.png").stat().st_size > 10_000
        assert not list(folder.rglob("part-*"))
        rounds += 1
    killer.stdin.close()
    return fell


def test_killed_anywhere_it_goes_on(tmp_path):
    kill_anywhere(tmp_path, 5)


def damaged(content, rng):
    """Bytes with some damage, as disks, networks and people do it."""
    kind, content = rng.randrange(7), bytearray(content)
    place, size = rng.randrange(len(content)), rng.randint(1, 64)
    if kind < 3:
        for _ in range(kind + 1):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del content[place:]
    elif kind == 4:
        content[place:place + size] = bytes(size)
    elif kind == 5:
        content[place:place + size] = rng.randbytes(size)
    else:
        content = rng.choice([b"", b"text", b"\x1f\x8b", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"{}", b"[]", b"null",
                              rng.randbytes(5000)])
    return bytes(content)


def damaged_files(folder, count, seed=0):
    """Reads so many damaged files: each is refused, in one line that names it, or read as it was. -> how many of each
    kind were refused and read."""
    rng, seen = random.Random(seed), Counter()
    train.main([*TINY, "--steps", "1", "--data-root", str(folder), "--out", str(folder / "run")])
    cache = next((folder / "cache").glob("*eval*.pt"))
    clevr, _ = clevr_v1(folder, count=2)
    png = next((clevr / "CLEVR_v1.0/images/train").iterdir())
    scenes_file = clevr / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json"
    records, ckpt = folder / "tetrominoes.tfrecords", folder / "ckpt"
    records.write_bytes((ASSETS / "tfrecords/tetrominoes_sample.tfrecords").read_bytes())
    forged_records = folder / "forged.tfrecords"
    forged_records.write_bytes(records.read_bytes())
    for end in (".index", ".data-00000-of-00001"):
        Path(f"{ckpt}{end}").write_bytes(Path(f"{ASSETS / 'ckpt-500'}{end}").read_bytes())

    def forged(content, rng):  # the file's checksum is right, only what the record says is wrong
        raw = bytearray(gzip.decompress(content))
        end = 12 + int.from_bytes(raw[:8], "little")
        for _ in range(rng.randint(1, 3)):  # the protobuf's tags and lengths are at the front, the factors' at the end
            raw[rng.choice([rng.randrange(60), rng.randrange(end), rng.randrange(end - 300, end)])] ^= 1 << rng.randrange(8)
        return gzip.compress(bytes(raw), 1)

    def odd_json(content, rng):
        content = json.loads(content)
        scene = rng.choice(content["scenes"])
        thing = rng.choice(scene["objects"])
        place, key = rng.choice([(content, "scenes"), (scene, "objects"), (thing, rng.choice(list(thing))),
                                 (scene["objects"], 0), (content["scenes"], 1)])
        place[key] = rng.choice([None, "pink", -1, 1e400, float("nan"), 10 ** 400, [], {}, [0, 0], True, [1e9, 0, 0]])
        return json.dumps(content).encode()

    files = {  # kind -> file, what damages it, what reads it, whether what is read must be as it was
        "checkpoint": (folder / "run/checkpoint.pt", damaged, data.read_file, True),
        "cache": (cache, damaged, data.read_file, True),
        "records": (records, damaged, lambda path: list(data.read_tfrecords(path, "tetrominoes", limit=4)), True),
        "forged records": (forged_records, forged, lambda path: list(data.read_tfrecords(path, "tetrominoes")), False),
        "picture": (png, damaged, data.read_png, True),
        "scenes file": (scenes_file, damaged, lambda path: list(data.clevr_v1_scenes(clevr / "CLEVR_v1.0", 8, "none")),
                        False),
        "odd scenes file": (scenes_file, odd_json,
                            lambda path: list(data.clevr_v1_scenes(clevr / "CLEVR_v1.0", 8, "none")), False),
        "TF index": (Path(f"{ckpt}.index"), damaged, lambda path: data.read_tf_checkpoint(ckpt), True),
        "TF data": (Path(f"{ckpt}.data-00000-of-00001"), damaged, lambda path: data.read_tf_checkpoint(ckpt), True)}
    whole = {kind: read(path) for kind, (path, _, read, _) in files.items()}
    for number in range(count):
        kind = list(files)[number % len(files)]
        path, damage, read, must_be_same = files[kind]
        good = path.read_bytes()
        path.write_bytes(damage(good, rng))
        try:
            content = read(path)
        except (ValueError, OSError) as error:
            seen[kind, "refused"] += 1
            assert len(str(error).splitlines()) == 1 and path.stem in str(error) or "CLEVR" in str(error), (kind, error)
        else:
            seen[kind, "read"] += 1
            if must_be_same:  # the damage hit what nobody reads: padding, a name, the time in a header
                flat, flat_whole = (torch.utils._pytree.tree_leaves(x) for x in (content, whole[kind]))
                assert all(np.array_equal(a, b) for a, b in zip(flat, flat_whole, strict=True)), kind
        path.write_bytes(good)
    return seen


def test_damaged_files_are_refused(tmp_path):
    seen = damaged_files(tmp_path, 180)
    assert sum(number for (_, what), number in seen.items() if what == "refused") > 110, seen


# ---------------------------------------------------------------------------------------------------------------------
# The project
# ---------------------------------------------------------------------------------------------------------------------


def test_imports_run_upwards_only():
    below = {"slot_attention": set(), "data": set(), "visualize": {"slot_attention", "data"},
             "train": {"slot_attention", "data", "visualize"}}
    for name, allowed in below.items():
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert set(names) & set(below) <= allowed, f"{name}.py imports {names}"


def test_the_readme_names_what_there_is():
    """Its names such as `SlotAttention.forward` in slot_attention.py, and its files."""
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", text)
    assert len(links) > 20
    modules = {"slot_attention": sa, "data": data, "train": train, "visualize": visualize,
               "test_slot_attention": sys.modules[__name__]}
    for name, module in links:
        thing = modules[module]
        for part in name.split("."):
            assert hasattr(thing, part), f"README.md: {module}.py has no {name}"
            thing = getattr(thing, part)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (HERE / target).exists(), f"README.md links to {target}, which is not there"
