"""The tests: pytest test_slot_attention.py

Most of them compare with outputs of the official TensorFlow code, kept in assets/golden.npz: models whose weights and
inputs come from a recipe (`official_case`), metrics, single layers and learning rates.
"""

import gzip
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import slot_attention as sa
import train
import visualize
from visualize import plt

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
SAMPLES = HERE.parent / "shared" / "samples"  # a little real data that the project does not carry
GOLDEN = np.load(ASSETS / "golden.npz")

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 holds


def golden(prefix):
    return {key.removeprefix(prefix + "/"): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix + "/")}


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


@pytest.mark.parametrize("name",
                         sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith("units/")} - {"grid"}))
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
        np.testing.assert_allclose(sa.build_grid([int(size) for size in name.split("x")]), grid, atol=1e-7)


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


@pytest.mark.parametrize("task, recipe", [("discovery", (4e-4, 10_000, 0.5, 100_000)),
                                          ("set_prediction", (4e-4, 1_000, 0.5, 50_000))])
def test_learning_rate_equals_official(task, recipe):
    case = golden(f"schedule/{task}")
    for steps, rates in ((case["steps"], case["lr"]), (case["fine_steps"], case["fine_lr"])):
        ours = [train.learning_rate(int(step), *recipe) for step in steps]
        np.testing.assert_allclose(ours, rates, rtol=1e-5, atol=1e-12)


def test_official_checkpoint_is_read_without_tensorflow(tmp_path):
    """assets/ckpt-500 was written by TensorFlow 2.21, from RandomState(0) in the order of the sorted names."""
    arrays = sa.read_tf_checkpoint(ASSETS / "ckpt-500")
    rng = np.random.RandomState(0)
    for key in sorted(arrays):
        assert key.startswith("network/layer_with_weights-0/")
        np.testing.assert_array_equal(arrays[key], rng.standard_normal(arrays[key].shape).astype(np.float32))
    small = dict(slot_dim=4, mlp_hidden_size=8, encoder_channels=4, encoder_strides=(1, 2), decoder_channels=4,
                 decoder_strides=(2, 1))
    model = sa.SlotAttentionAutoEncoder(16, 3, **small)
    sa.load_official_weights(model, ASSETS / "ckpt-500")
    mu = arrays["network/layer_with_weights-0/slot_attention/slots_mu/.ATTRIBUTES/VARIABLE_VALUE"]
    np.testing.assert_array_equal(model.slot_attention.slots_mu.detach(), mu)
    np.savez(tmp_path / "weights.npz", **arrays)
    other = sa.SlotAttentionAutoEncoder(16, 3, **small)
    sa.load_official_weights(other, tmp_path / "weights.npz")
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)

    other = sa.SlotAttentionAutoEncoder(16, 3, **{**small, "slot_dim": 8})
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="another model"):
        sa.load_official_weights(other, arrays)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
    with pytest.raises(ValueError, match="has no encoder_cnn/layer_with_weights-1"):
        sa.load_official_weights(sa.SlotAttentionAutoEncoder(16, 3, **{**small, "encoder_strides": (2,)}), arrays)
    slots_of_adam = {f"{key.removesuffix('/.ATTRIBUTES/VARIABLE_VALUE')}/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/"
                     "VARIABLE_VALUE": value for key, value in arrays.items()}
    rest = {"optimizer/beta_1/.ATTRIBUTES/VARIABLE_VALUE": 0.9, "step/.ATTRIBUTES/VARIABLE_VALUE": 500}
    sa.load_official_weights(model, {**arrays, **slots_of_adam, **rest})


def test_damaged_official_checkpoint_is_refused(tmp_path):
    parts = [".index", ".data-00000-of-00001"]
    whole = {part: Path(f"{ASSETS / 'ckpt-500'}{part}").read_bytes() for part in parts}
    rng = np.random.default_rng(0)
    good = sa.read_tf_checkpoint(ASSETS / "ckpt-500")
    for trial in range(100):
        damaged = dict(whole)
        part = parts[trial % 2]
        content = bytearray(whole[part])
        if trial % 4 < 2:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        else:
            del content[rng.integers(len(content)):]
        damaged[part] = bytes(content)
        for name, content in damaged.items():
            (tmp_path / f"ckpt{name}").write_bytes(content)
        try:
            arrays = sa.read_tf_checkpoint(tmp_path / "ckpt")
        except ValueError as error:
            assert "ckpt.index" in str(error)
        else:  # the damage hit what nobody reads: the metaindex, padding, the step counter
            assert all(np.array_equal(arrays[key], good[key]) for key in good)


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


def test_implicit_is_one_more_iteration_with_gradient():
    torch.manual_seed(0)
    module = sa.SlotAttention(5, 16, num_iterations=3).double()
    inputs, init = torch.randn(2, 30, 16).double(), torch.randn(2, 5, 16).double()
    unrolled, _ = module(inputs, slots=init, num_iterations=4)
    before, _ = module(inputs, slots=init)
    expected = torch.autograd.grad(module(inputs, slots=before.detach(), num_iterations=1)[0].sum(),
                                   module.gru.weight_ih)
    module.implicit = True
    slots, attn = module(inputs, slots=init)
    torch.testing.assert_close(slots, unrolled)
    assert attn.shape[1] == 4
    torch.testing.assert_close(torch.autograd.grad(slots.sum(), module.gru.weight_ih), expected)


def test_learned_queries_give_each_slot_a_mean_of_its_own():
    module = sa.SlotAttention(3, 8, learned_queries=True)
    assert module.slots_mu.shape == (1, 3, 8)
    slots = module.init_slots(torch.zeros(2, 5, 8))  # two more than were trained: they start from the first two again
    assert torch.equal(slots[0], module.slots_mu[0, [0, 1, 2, 0, 1]]) and torch.equal(slots[0], slots[1])
    module(torch.randn(2, 6, 8))[0].square().sum().backward()
    assert (module.slots_mu.grad.abs().sum(2) > 0).all()


def test_slots_and_iterations_change_at_test_time():
    model = sa.SlotAttentionAutoEncoder(32, 4)
    image = torch.randn(2, 3, 32, 32)
    output = model(image, num_slots=6, num_iterations=5)
    assert output.masks.shape == (2, 6, 1, 32, 32) and output.attn.shape == (2, 5, 6, 32, 32)
    torch.testing.assert_close(output.masks.sum(1), torch.ones(2, 1, 32, 32))
    again = model(image, slots=output.slots)
    assert again.slots.shape == output.slots.shape


@pytest.mark.parametrize("resolution, kernel", [(35, 5), (12, 3), (5, 5), (6, 5)])
def test_first_decoder_layer_taken_apart_is_the_same(resolution, kernel):
    torch.manual_seed(0)
    decoder = sa.Decoder((resolution, resolution + 2), 8, 6, (1, 1), kernel).double()
    torch.nn.init.normal_(decoder.cnn[0].bias)
    slots = torch.randn(3, 8).double().requires_grad_()
    fast = decoder.first_layer(slots)
    copies = slots[:, None, None].expand(-1, resolution, resolution + 2, -1)
    plain = decoder.cnn[0](decoder.pos(copies).permute(0, 3, 1, 2))
    torch.testing.assert_close(fast, plain)
    weight = torch.randn_like(plain)
    inputs = [slots, *decoder.cnn[0].parameters(), *decoder.pos.parameters()]
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), inputs),
                    torch.autograd.grad((plain * weight).sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_constructor_refuses_sizes_that_make_no_model():
    for bad in (dict(resolution=0), dict(num_slots=0), dict(slot_dim=-1), dict(decoder_strides=(2, 0)),
                dict(decoder_kernel=4), dict(decoder_kernel=1), dict(encoder_channels=1.5), dict(encoder_strides=()),
                dict(decoder_strides=())):
        with pytest.raises(ValueError, match="must be"):
            sa.SlotAttentionAutoEncoder(**{"resolution": 32, "num_slots": 4, **bad})


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


@pytest.mark.parametrize("case", sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith("ari/")}))
def test_ari_equals_official(case):
    """Where the official code gives NaN, ours gives 1; masks of 0/255 score as those of 0/1."""
    true, pred, score = (torch.from_numpy(GOLDEN[f"ari/{case}/{key}"]) for key in ("true", "pred", "score"))
    if case.endswith("mask255"):
        name = case.removesuffix("_mask255") + ("_mask01" if "small" in case else "")
        score = torch.from_numpy(GOLDEN[f"ari/{name}/score"])
    torch.testing.assert_close(sa.adjusted_rand_index(true, pred), score.nan_to_num(1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith("hungarian/")}))
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


@pytest.mark.parametrize("case", sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith("ap/")}
                                        - {"thresholds", "helper"}))
def test_average_precision_equals_official(case):
    case = golden(f"ap/{case}")
    for threshold, expected in zip(GOLDEN["ap/thresholds"], case["ap"]):
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


@pytest.mark.parametrize("name", data.TFRECORDS)
def test_tfrecords_equal_tensorflow(name):
    expected = np.load(ASSETS / "tfrecords" / f"{name}_sample.npz")
    scenes = list(data.read_tfrecords(ASSETS / "tfrecords" / f"{name}_sample.tfrecords", name))
    assert len(scenes) == len(expected["image"])
    for i, scene in enumerate(scenes):
        assert set(scene) == set(expected.files)
        for key, array in scene.items():
            wanted = expected[key][i, ..., 0] != 0 if key == "mask" else expected[key][i]
            assert array.shape == wanted.shape and (array.dtype == np.uint8 or array.dtype == np.float32)
            np.testing.assert_array_equal(array, wanted)


def test_splits():
    """The paper's counts for training, and what comes after them for evaluation; of a short file the last fifth."""
    for n, train_count, border in ((100_000, 70_000, 70_000), (85_000, 70_000, 70_000), (65_000, 60_000, 60_000),
                                   (70_000, 70_000, 56_000), (48, 70_000, 39), (2, 70_000, 1)):
        objects = np.arange(n) % 8 + 3
        train_split, held_out = (data.choose(objects, split, train_count, None, 0, 10) for split in ("train", "eval"))
        np.testing.assert_array_equal(np.concatenate([train_split, held_out]), np.arange(n))
        assert len(train_split) == border
    first = data.choose(objects := np.arange(100) % 8 + 3, "train", 60, 9, 3, 6)
    np.testing.assert_array_equal(first, np.flatnonzero(objects <= 6)[:9])
    with pytest.raises(ValueError, match="no scene with 11 to 12"):
        data.choose(objects, "eval", 60, None, 11, 12)


@pytest.mark.parametrize("name", ["tetrominoes", "clevr_with_masks"])
def test_damaged_tfrecords_are_refused(tmp_path, name):
    whole = (ASSETS / "tfrecords" / f"{name}_sample.tfrecords").read_bytes()
    raw, path, rng = gzip.decompress(whole), tmp_path / "damaged.tfrecords", np.random.default_rng(0)

    def refused(content, record=None):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path) + (f", record {record}" if record is not None else "")):
            list(data.read_tfrecords(path, name))

    refused(b"")
    refused(b"no gzip")
    refused(gzip.compress(b""))
    refused(gzip.compress(raw[:5]), record=0)
    refused(gzip.compress(raw[:-7]), record=len(np.load(ASSETS / "tfrecords" / f"{name}_sample.npz")["image"]) - 1)
    refused(gzip.compress((2 ** 40).to_bytes(8, "little") + data.masked_crc32c((2 ** 40).to_bytes(8, "little"))
                          .to_bytes(4, "little") + raw[12:]), record=0)
    for _ in range(10):
        refused(whole[:rng.integers(1, len(whole))])
        flipped = bytearray(whole)
        flipped[rng.integers(10, len(whole))] ^= 1 << rng.integers(8)
        refused(bytes(flipped))
        flipped = bytearray(raw)
        flipped[rng.integers(12)] ^= 1 << rng.integers(8)  # a length, or its checksum
        refused(gzip.compress(bytes(flipped), 1), record=0)
    path.write_bytes(whole)
    assert len(list(data.read_tfrecords(path, name, limit=2))) == 2
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # GZIP's checksum, at the end: what comes before the limit may be what is damaged
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="CRC"):
        list(data.read_tfrecords(path, name, limit=2))
    other = "tetrominoes" if name != "tetrominoes" else "multi_dsprites_colored_on_colored"
    with pytest.raises(ValueError, match="not " + other):
        path.write_bytes(whole)
        list(data.read_tfrecords(path, other))


def test_tetrominoes_follow_the_law():
    scenes = data.make_tetrominoes(2000, 0)
    image, mask = scenes["image"], scenes["mask"]
    assert image.shape == (2000, 35, 35, 3) and mask.shape == (2000, 4, 35, 35)
    assert image.dtype == mask.dtype == np.uint8
    assert (mask.sum(1) == 1).all() and (mask[:, 1:].sum((2, 3)) == 100).all()  # whole, inside, and none over another
    assert (image[mask[:, 0] == 1] == 0).all()
    assert len({tuple(map(tuple, cells)) for cells in data.TETROMINOES}) == 19
    assert set(scenes["shape"][:, 1:].flatten()) == set(range(1, 20)) and (scenes["shape"][:, 0] == 0).all()
    assert len(np.unique(scenes["color"][:, 1:].reshape(-1, 3), axis=0)) == 6
    rows = np.arange(35)
    top, bottom = (np.where(mask[:, 1:].any(3), rows, fill) for fill in (99, -1))
    np.testing.assert_allclose((top.min(2) + bottom.max(2)) / 2, scenes["y"][:, 1:])
    assert set(np.unique(top.min(2))) == set(range(31))  # any pixel, no grid
    again = data.make_tetrominoes(2000, 0)
    assert all((again[key] == scenes[key]).all() for key in scenes)
    assert (data.make_tetrominoes(2000, 1)["image"] != image).any()


@pytest.mark.skipif(not SAMPLES.exists(), reason="the real scenes are not in the project")
def test_real_tetrominoes_are_drawn_to_the_pixel():
    real = np.load(SAMPLES / "tetrominoes" / "real_3.npz")
    known = [sorted(cells) for cells in data.TETROMINOES]
    for image, mask in zip(real["image"], real["mask"] > 0):
        pieces, corners, colors = [], [], []
        for piece in mask[1:]:
            rows, cols = np.nonzero(piece)
            corners.append((rows.min(), cols.min()))
            cells = sorted({(int(r - rows.min()) // 5, int(c - cols.min()) // 5) for r, c in zip(rows, cols)})
            pieces.append(known.index(cells))
            colors.append(image[piece].max(0) > 0)
        ours, ours_mask = data.draw_tetrominoes(np.array([pieces]), np.array([corners]), np.array([colors]))
        np.testing.assert_array_equal(ours[0], image)
        np.testing.assert_array_equal(ours_mask[0], mask)


def test_multi_dsprites_follow_the_law():
    scenes = data.make_multi_dsprites(500, 0)
    image, mask, there = scenes["image"], scenes["mask"], scenes["visibility"]
    assert image.shape == (500, 64, 64, 3) and mask.shape == (500, 6, 64, 64) and (mask.sum(1) == 1).all()
    assert set(there.sum(1)) == {3, 4, 5, 6}
    assert (mask.any((2, 3)) <= (there > 0)).all() and mask[:, 1:].any((2, 3))[there[:, 1:] > 0].mean() > 0.97
    color = (scenes["color"] * 255).round()[np.arange(500)[:, None, None], mask.argmax(1)]
    assert np.abs(color - image).max() <= 1
    assert (scenes["color"][:, 0].std(1) < 1e-6).all()
    assert len(np.unique(scenes["scale"][:, 1:][there[:, 1:] > 0])) == 6
    assert len(np.unique(scenes["orientation"][:, 1:][there[:, 1:] > 0])) == 40
    last, all_of_them = there.sum(1).astype(int) - 1, np.arange(500)  # no sprite stands before the last one
    whole = mask[all_of_them, last]
    for key, axis in (("x", 1), ("y", 2)):
        center = (whole.sum(axis) * np.arange(64)).sum(1) / whole.sum((1, 2))
        error = np.abs(center - (16 + 31 * scenes[key][all_of_them, last]))
        assert error[scenes["shape"][all_of_them, last] < 3].max() < 0.6 and error.max() < 4  # a heart is not symmetric
    again = data.make_multi_dsprites(500, 0)
    assert all((again[key] == scenes[key]).all() for key in scenes)


def test_clevr_like_follows_the_law():
    scenes = data.make_clevr_like(8, 0, resolution=64)
    image, mask, there = scenes["image"], scenes["mask"], scenes["visibility"][:, 1:] > 0
    assert image.shape == (8, 64, 64, 3) and mask.shape == (8, 11, 64, 64) and (mask.sum(1) == 1).all()
    assert there.sum(1).min() >= 3 and there.sum(1).max() <= 10
    for key, codes in (("size", 2), ("material", 2), ("shape", 3), ("color", 8)):
        assert set(scenes[key][:, 1:][there]) <= set(range(1, codes + 1)) and not scenes[key][:, 1:][~there].any()
    assert np.abs(scenes["x"]).max() <= 3
    assert set(scenes["z"][:, 1:][there].round(2)) == {np.float32(0.7), np.float32(0.35)}
    # a small sphere's centre is where its mask is, if nothing stands before it
    rows, cols = np.arange(64)[:, None] + 0.5, np.arange(64) + 0.5
    errors = []
    for i, e in zip(*np.nonzero(mask[:, 1:].sum((2, 3)) > 20)):
        m = mask[i, e + 1]
        errors.append(np.hypot((m * cols).sum() / m.sum() - scenes["pixel_coords"][i, e + 1, 0],
                               (m * rows).sum() / m.sum() - scenes["pixel_coords"][i, e + 1, 1]))
    assert np.median(errors) < 0.6
    again = data.make_clevr_like(5, 0, resolution=64)
    assert all((again[key] == scenes[key][:5]).all() for key in ("image", "mask", "x"))
    few = data.make_clevr_like(8, 1, resolution=32, min_objects=7, max_objects=8, crop=False)
    assert set(few["visibility"].sum(1)) <= {8, 9}


def test_clevr_like_keeps_clevrs_distances_and_colours():
    drawn = data._draw(np.random.default_rng(0), np.full(32, 10))
    radius = np.array([0, 0.7, 0.35])[drawn["size"]]
    place = np.stack([drawn["x"], drawn["y"]], 2)
    step = (place[:, :, None] - place[:, None])[:, ~np.eye(10, dtype=bool)]                       # [32, 90, 2]
    gap = np.hypot(*step.T).T - (radius[:, :, None] + radius[:, None])[:, ~np.eye(10, dtype=bool)]
    assert 0.25 <= gap.min() < 0.4
    ahead = -drawn["camera"][:, :2] / np.hypot(*drawn["camera"][:, :2].T)[:, None]
    aside = ahead[:, ::-1] * (1, -1)
    for axis in (ahead, aside):
        assert 0.399 < np.abs((step * axis[:, None]).sum(2)).min() < 0.45

    scenes = data.make_clevr_like(16, 0, resolution=96, crop=False)
    mask, there = scenes["mask"][:, 1:], scenes["visibility"][:, 1:] > 0
    seen = mask.mean((2, 3))[there] * 320 * 240
    assert 150 < seen.min() < 400  # 200, decided on a coarser map
    errors = []
    for i, e in zip(*np.nonzero(there & (scenes["material"][:, 1:] == 1) & (scenes["color"][:, 1:] != 6))):  # not gray
        hue, saturation, _ = matplotlib.colors.rgb_to_hsv(scenes["image"][i][mask[i, e] > 0].mean(0) / 255)
        wanted = matplotlib.colors.rgb_to_hsv(np.array(data._COLORS[scenes["color"][i, e + 1] - 1]) / 255)[0]
        errors.append(abs((hue - wanted + 0.5) % 1 - 0.5))
    assert len(errors) > 20 and np.median(errors) < 0.03 and max(errors) < 0.1


@pytest.mark.skipif(not SAMPLES.exists(), reason="the real scenes are not in the project")
def test_camera_and_crop_agree_with_real_clevr():
    scenes = json.loads((SAMPLES / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json").read_text())["scenes"]
    objects = [o for scene in scenes for o in scene["objects"]]
    points, pixels = np.array([o["3d_coords"] for o in objects]), np.array([o["pixel_coords"][:2] for o in objects])
    error = data.project(points)[:, :2] - pixels
    assert np.abs(error).mean() < 3.5 and np.abs(error.mean(0)).max() < 2  # the cameras' jitter, and no offset
    inside = []
    for top, bottom, left, right in (data.CLEVR_CROP[320, 480], data.CLEVR_CROP[240, 320]):
        inside.append(((pixels >= (left, top)) & (pixels < (right, bottom))).all(1).mean())
    assert inside[0] > 0.85 and inside[1] < 0.65  # the physically equal window, and the official off-centre one


def clevr_v1(folder, count=12, seed=0):
    """A tiny CLEVR_v1.0 of generated pictures in the real layout -> its path and scenes."""
    made, scenes = data.make_clevr_like(count, seed, resolution=32, crop=False), []
    for part in ("images/train", "scenes"):
        (folder / "CLEVR_v1.0" / part).mkdir(parents=True)
    for i, image in enumerate(made["image"]):
        name = f"CLEVR_train_{i:06}.png"
        picture = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), (320, 480)).byte()[0]
        plt.imsave(folder / "CLEVR_v1.0/images/train" / name,
                   picture.permute(1, 2, 0).numpy())  # RGBA, as the real ones
        objects = [{"3d_coords": [float(made[a][i, e]) for a in "xyz"], "rotation": 0.0, "pixel_coords": [0, 0, 0],
                    **{key: names[made[key][i, e] - 1] for key, names in data.CLEVR_CODES.items()}}
                   for e in range(1, 11) if made["visibility"][i, e]]
        scenes.append({"image_filename": name, "objects": objects})
    (folder / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return folder, made


def test_clevr_v1_is_read(tmp_path, capsys):
    root, made = clevr_v1(tmp_path)
    counts = (made["visibility"].sum(1) - 1).astype(int)
    scenes = data.load("clevr", "train", root, resolution=32, crop="none")
    held_out = data.load("clevr", "eval", root, resolution=32, crop="none")
    assert len(scenes) + len(held_out) == 12 and set(scenes.index.tolist()).isdisjoint(held_out.index.tolist())
    six = data.load("clevr", "train", root, resolution=32, crop="none", max_objects=6)
    assert len(six) == (counts[:len(scenes)] <= 6).sum()
    batch = scenes.batch(torch.arange(4))
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].is_contiguous(memory_format=torch.channels_last)
    ours = (batch["image"] / 2 + 0.5).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(ours - made["image"][:4]).mean() < 1  # the PNGs are the pictures blown up
    wanted = [data.clevr_target({key: made[key][i] for key in made}) for i in range(4)]
    np.testing.assert_allclose(batch["target"], wanted, atol=1e-6)


def test_targets_have_the_official_order():
    scene = {"size": [0, 1, 2], "material": [0, 1, 2], "shape": [0, 1, 3], "color": [0, 8, 6], "x": [0, -3, 3],
             "y": [0, 0, 1.5],
             "z": [0, 0.7, 0.35]}
    target = data.clevr_target({key: np.array(values) for key, values in scene.items()})
    # small, large | rubber, metal | cube, sphere, cylinder | gray, blue, brown, yellow, red, green, purple, cyan | real
    np.testing.assert_allclose(target[0], [0, .5, 3.7 / 6, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(target[1], [1, .75, 3.35 / 6, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], rtol=1e-6)
    assert not target[2:].any()


def test_masks_and_images_are_cropped_alike(tmp_path):
    """The masks file: crop as in the paper, evaluation after training, CLEVR6 by visibility, the cache rebuilt on a
    change."""
    for name in ("clevr_with_masks_train", "multi_dsprites_colored_on_grayscale", "tetrominoes_train"):
        source = ASSETS / "tfrecords" / f"{name.removesuffix('_train')}_sample.tfrecords"
        (tmp_path / f"{name}.tfrecords").write_bytes(source.read_bytes())
    expected = np.load(ASSETS / "tfrecords" / "clevr_with_masks_sample.npz")
    scenes = data.load("clevr", "train", tmp_path, resolution=192)
    batch = scenes.batch(torch.arange(len(scenes)))
    for i, index in enumerate(scenes.index.tolist()):
        ours = ((batch["image"][i] + 1) * 127.5).round().byte().permute(1, 2, 0)
        np.testing.assert_array_equal(ours, expected["image"][index, 29:221, 64:256])
        np.testing.assert_array_equal(batch["label"][i], expected["mask"][index, :, 29:221, 64:256, 0].argmax(0))
    for name in ("tetrominoes", "multi_dsprites"):
        assert len(data.load(name, "train", tmp_path)) == 5 and len(data.load(name, "eval", tmp_path)) == 1
    folders = len(list((tmp_path / "cache").iterdir()))
    data.load("tetrominoes", "train", tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == folders
    os.utime(tmp_path / "tetrominoes_train.tfrecords", (1, 1))
    data.load("tetrominoes", "train", tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == folders + 1


def test_cache_is_whole_or_not_there(tmp_path):
    root, _ = clevr_v1(tmp_path)
    (root / "CLEVR_v1.0/images/train/CLEVR_train_000007.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="CLEVR_train_000007.png"):
        data.load("clevr", "train", root, resolution=32)
    assert not [file for file in (root / "cache").iterdir() if file.is_dir()]
    (root / "CLEVR_v1.0/images/train/CLEVR_train_000007.png").unlink()
    with pytest.raises(ValueError, match="CLEVR_train_000007.png: missing"):
        data.load("clevr", "train", root, resolution=32)
    data.load("multi_dsprites", "eval", root, count=3)
    file, = (root / "cache").glob("*/label.bin")
    good = file.read_bytes()
    for bad, message in ((good[:-1], "checksum of label.bin"), (b"", "damaged"),
                         (good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], "checksum of label.bin")):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=message + ".*delete it"):
            data.load("multi_dsprites", "eval", root, count=3)
    file.write_bytes(good)
    meta = file.with_name("meta.json")
    meta.write_text(meta.read_text().replace("[3, 64", "[2, 64"))
    with pytest.raises(ValueError, match="checksum of meta.json"):
        data.load("multi_dsprites", "eval", root, count=3)


def test_two_builds_of_one_cache(tmp_path):
    """The second waits for the first; what a killed build left is removed, what a living one writes is not."""
    def load():
        return data.load("multi_dsprites", "eval", tmp_path, count=3).arrays["image"].numpy().copy()

    expected, (folder,) = load(), (tmp_path / "cache").iterdir()
    folder.rename(tmp_path / "good")
    living, dead = (folder.with_name(name) for name in (f"{folder.name}.1.part", "other-0000.1.part"))
    living.mkdir()
    dead.mkdir()
    with open(f"{folder}.lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        assert data.try_lock(lock)
        second = pool.submit(load)
        time.sleep(0.5)
        assert not second.done() and living.exists() and not dead.exists()
        (tmp_path / "good").rename(folder)  # the first has built it
        lock.close()
        np.testing.assert_array_equal(second.result(60), expected)
    (tmp_path / "cache" / "another-0000.1.part").mkdir()
    data.load("multi_dsprites", "eval", tmp_path, count=2)
    assert not list((tmp_path / "cache").glob("*.part"))


# ---------------------------------------------------------------------------------------------------------------------
# Training, resuming, figures, bad input
# ---------------------------------------------------------------------------------------------------------------------

TINY = ("--data tetrominoes --small --train-count 64 --eval-count 8 --batch-size 8 --steps 6 --eval-every 3 "
        "--log-every 1 --dtype float32 --device cpu --no-compile --encoder-channels 8 --decoder-channels 8 "
        "--slot-dim 8").split()


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_training_repeats_resumes_and_draws(tmp_path, capsys):
    whole, again, parts = (tmp_path / name for name in ("whole", "again", "parts"))
    train.main([*TINY, "--out", str(whole)])
    rows = log_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(-1 <= rows[i]["ari"] <= 1 for i in (2, 5)) and (whole / "figure.png").stat().st_size > 10_000
    train.main([*TINY, "--out", str(again)])
    assert without_times(log_of(again)) == without_times(rows)

    train.main([*TINY, "--steps", "3", "--out", str(parts)])
    with open(parts / "log.jsonl", "a") as log:  # a killed run has logged more than it saved, and half a line
        log.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    train.main(["--resume", str(parts), "--steps", "6", "--device", "cpu", "--no-compile", "--dtype", "float32",
                "--log-every", "1"])
    assert without_times(log_of(parts)) == without_times(rows)
    weights = [train.load_checkpoint(run)["model"] for run in (whole, again, parts)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and torch.equal(value, weights[2][name]), name

    capsys.readouterr()
    train.main(["--eval", str(whole), "--device", "cpu", "--dtype", "float32", "--num-slots", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert "5 slots" in lines[0] and len(lines) == 9 and all("FG-ARI" in line for line in lines[1:])
    for figure in "abc":
        visualize.main([str(whole / "checkpoint.pt"), "--figure", figure, "--num-slots", "6", "--num-iterations", "2",
                        "--count", "2", "--out", str(tmp_path / f"{figure}.png")])
        assert (tmp_path / f"{figure}.png").stat().st_size > 5_000


def test_the_weights_that_come_with_the_code(tmp_path, monkeypatch, capsys):
    """Before any run they draw Figure 3 into the current folder; they can be evaluated, but no run goes on from
    them."""
    monkeypatch.chdir(tmp_path)
    visualize.main([])
    assert "no run" in capsys.readouterr().err and (tmp_path / "figure.png").stat().st_size > 50_000
    assert (ASSETS / "demo.pt").stat().st_size < 1e6
    train.main(["--eval", str(ASSETS / "demo.pt"), "--eval-count", "128", "--num-iterations", "4", "--device", "cpu",
                "--dtype", "float32"])
    assert float(capsys.readouterr().out.split()[-1]) > 0.9
    assert "weights only" in refused(capsys, train.main, ["--resume", str(ASSETS / "demo.pt")])
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_first(tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--steps", "100000", "--eval-every", "100000", "--out",
               str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not ((out / "log.jsonl").exists() and len(log_of(out)) > 3):
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert "--resume" in process.stderr.read()
    assert train.load_checkpoint(out)["step"] == log_of(out)[-1]["step"]


def test_a_gpu_is_named_with_its_number(monkeypatch):
    """torch.cuda.set_device takes no "cuda" without one. (There is no GPU here: what is asked of it is faked.)"""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *args, device: SimpleNamespace(device=torch.device(device)))
        assert train.choose_device("cuda") == torch.device("cuda:0")
        patch.setattr(train, "LOCAL_RANK", 3)
        assert train.choose_device("cuda") == torch.device("cuda:3")


def test_bfloat16_only_where_the_cpu_multiplies_in_it(monkeypatch):
    cpu = torch.device("cpu")
    cpuinfo = train.cpu_features() & {"avx512_bf16", "amx_bf16"}
    with monkeypatch.context() as patch:  # an older torch: Linux says the same
        patch.delattr(torch.cpu, "get_capabilities", raising=False)
        if Path("/proc/cpuinfo").exists():
            assert train.cpu_features() & {"avx512_bf16", "amx_bf16"} == cpuinfo
    for there, expected in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx512_f", torch.float32)):
        told = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False, there: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
        assert train.choose_dtype("auto", cpu) == expected
    assert train.choose_dtype("bfloat16", cpu) == torch.bfloat16 and train.choose_dtype("float32", cpu) == torch.float32


def test_memory_of_the_one_step_gradient_does_not_grow():
    """The bytes that are kept for the backward pass, after 1 and 8 iterations."""
    def saved(implicit, num_iterations):
        module, kept = sa.SlotAttention(4, 16, implicit=implicit), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.update({x.data_ptr(): x.nbytes}), x)[1],
                                                      lambda x: x):
            slots, _ = module(torch.randn(2, 100, 16), num_iterations=num_iterations)
        return sum(kept.values())
    assert saved(True, 8) == saved(True, 1)
    assert saved(False, 8) > 2 * saved(False, 1)


def test_benchmark_prints_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--benchmark", "--accumulate", "2"])
    line = json.loads(capsys.readouterr().out)
    least = min(line["ms"]["step"])
    assert line["ms"]["step"][0] >= least > 0 and line["peak_memory_gb"] > 0
    np.testing.assert_allclose(line["images_per_s"], 8 / line["ms"]["step"][0] * 1e3, rtol=0.02)
    np.testing.assert_allclose(line["share_of_matmul"]["float32"],
                               line["tflops"]["model"] / line["tflops"]["float32"],
                               atol=0.02, rtol=0.1)
    assert not list(tmp_path.iterdir())


def test_accumulated_gradient_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "main", lambda argv: None)
    flags, states = [*TINY, "--steps", "2", "--clip", "0", "--slot-loss-from", "0"], []
    for parts in "14":
        train.main([*flags, "--accumulate", parts, "--out", str(tmp_path / parts)])
        states.append(train.load_checkpoint(tmp_path / parts)["optimizer"]["state"])  # its means are of the gradients
    for i, state in states[0].items():
        torch.testing.assert_close(state["exp_avg"], states[1][i]["exp_avg"], rtol=1e-4, atol=1e-8)
    for a, b in zip(*(log_of(tmp_path / parts) for parts in "14")):
        np.testing.assert_allclose([b["loss"], b.get("eval_loss", 0)], [a["loss"], a.get("eval_loss", 0)], rtol=1e-6)


def test_two_processes_train_as_one_and_resume_as_one(tmp_path, monkeypatch):
    """Two processes, then a signal, then one process, against one process all along."""
    monkeypatch.setattr(visualize, "main", lambda argv: None)
    one, many = tmp_path / "one", tmp_path / "many"
    flags = [*TINY, "--eval-count", "9", "--eval-every", "10", "--accumulate", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(HERE / "train.py"),
               *flags, "--steps", "100000", "--out", str(many)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while time.time() < deadline and not ((many / "log.jsonl").exists() and len(log_of(many)) >= 20):
        time.sleep(0.1)
    process.terminate()
    errors = process.communicate(timeout=300)[1]
    assert errors.count("stopped and saved") == 1 and errors.count("tetrominoes: 64 scenes") == 1, errors
    saved = train.load_checkpoint(many)["step"]
    assert [row["step"] for row in log_of(many)] == list(range(1, saved + 1))
    last = ["--steps", str(saved + 3)]
    train.main(["--resume", str(many), *last, "--device", "cpu", "--no-compile", "--dtype", "float32", "--log-every",
                "1"])
    train.main([*flags, *last, "--out", str(one)])
    assert len(log_of(many)) == len(log_of(one)) == saved + 3
    for a, b in zip(log_of(one), log_of(many)):
        assert a.keys() == b.keys()
        for key in ("loss", "eval_loss", "ari"):  # rounding errors grow with the steps
            tolerance = (1e-5 if a["step"] <= 20 else 1e-3) * (10 if key == "ari" else 1)
            np.testing.assert_allclose(b.get(key, 0), a.get(key, 0), rtol=tolerance, atol=1e-6,
                                       err_msg=f"{key} {a['step']}")


def test_world_size_must_divide_the_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    assert "multiple of 6" in refused(capsys, train.main, [*TINY, "--accumulate", "2", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_train_on_the_original_clevr(tmp_path):
    root, _ = clevr_v1(tmp_path, count=20)
    flags = ("--data clevr --resolution 32 --decoder-strides 2,2,1 --encoder-channels 8 --decoder-channels 8 "
             "--batch-size 2 --steps 2 --device cpu --no-compile").split()
    train.main([*flags, "--data-root", str(root), "--max-objects", "10", "--out", str(tmp_path / "run")])
    assert "ari" not in log_of(tmp_path / "run")[-1] and (tmp_path / "run" / "figure.png").exists()


def test_train_set_prediction(tmp_path):
    root, _ = clevr_v1(tmp_path, count=20)
    flags = ("--data clevr --task set_prediction --resolution 32 --encoder-channels 8 --batch-size 4 --steps 2 "
             "--device cpu "
             "--no-compile").split()
    train.main([*flags, "--data-root", str(root), "--out", str(tmp_path / "run")])
    assert set(log_of(tmp_path / "run")[-1]["ap"]) == {"inf", "1", "0.5", "0.25", "0.125"}
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000


def refused(capsys, main, flags):
    """One line on stderr, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_shipped_weights_take_scenes_apart_that_they_never_saw():
    scenes = data.make_clevr_like(8, 12345, 64, max_objects=6)
    held_out = data.Scenes(scenes["image"], scenes["mask"].argmax(1).astype(np.uint8))
    checkpoint = train.load_checkpoint(ASSETS / "clevr_like.pt")
    model = train.load_model(checkpoint, "clevr_like.pt")
    assert train.evaluate(model, checkpoint["config"], held_out, torch.device("cpu"), torch.float32)["ari"] > 0.8
    scenes = data.make_clevr_like(16, 12345, 128, crop=False)
    target = np.stack([data.clevr_target({key: scenes[key][i] for key in scenes}) for i in range(16)])
    checkpoint = train.load_checkpoint(ASSETS / "set_prediction.pt")
    model = train.load_model(checkpoint, "set_prediction.pt")
    held_out = data.Scenes(scenes["image"], target=target)
    assert train.evaluate(model, checkpoint["config"], held_out, torch.device("cpu"), torch.float32)["ap"]["inf"] > 0.5


def test_every_experiment_has_a_small_recipe():
    for task, table in train.EXPERIMENTS.items():
        for name in table:
            for small in ([], ["--small"]):
                config = train.make_config(train.make_parser().parse_args(["--task", task, "--data", name, *small]))
                model, size = train.build_model(config), config["resolution"]
                assert torch.isfinite(model(torch.zeros(1, 3, size, size))[0]).all()
            assert config["steps"] <= 12_000 and set(train.SMALL[task]) == set(table)


@pytest.mark.parametrize("flags, message", [
    ("--data nothing", "nothing"), ("--steps 0", "--steps"), ("--lr nan", "--lr"), ("--lr -1", "--lr"),
    ("--lr inf", "--lr"),
    ("--batch-size x", "--batch-size"), ("--encoder-strides 1,0", "--encoder-strides"), ("--unknown 1", "unknown"),
    ("--data clevr --data-root /nowhere", "--download"), ("--data tetrominoes --task set_prediction", "clevr_like"),
    ("--task set_prediction --data tetrominoes", "--task"), ("--resume /nowhere", "no checkpoint"),
    ("--eval /nowhere", "no checkpoint"),
    ("--data multi_dsprites_on_colored --data-root /nowhere", "no multi_dsprites"),
    ("--train-count 8 --batch-size 64 --eval-count 8", "--batch-size"), ("--device nowhere", "--device"),
    ("--device meta", "--device"),
    ("--min-objects 5 --max-objects 4", "--min-objects"), ("--data clevr_like --max-objects 2", "3 or more"),
    ("--task set_prediction --data clevr_like --num-slots 17", "16"), ("--resume x --eval y", "--eval"),
    ("--resume x --out y", "--out"),
    ("--resume x --small", "--small"), ("--resume x --seed 1", "--seed"),
    ("--resume x --task set_prediction", "--task"),
    ("--eval x --lr 1", "--lr"), ("--eval x --out y", "--out"), ("--eval x --steps 3", "--steps"),
    ("--eval x --resolution 64", "--resolution"), ("--resume x --seed 0", "--seed"), ("--resume=", "empty"),
    ("--task set_prediction --data clevr_like --decoder-kernel 3", "--decoder-kernel"),
    ("--data clevr_like --official-crop", "--official-crop"), ("--seeds 0 0", "different"),
    ("--seeds 0 --seed 1", "--seed"), ("--seeds 0 --resume x", "--seeds"), ("--seeds x", "--seeds"),
    ("--resolution 64", "--resolution"),
    ("--min-objects 4 --max-objects 6", "--max-objects"), ("--decoder-kernel 4", "decoder_kernel"),
    ("--decoder-strides 7", "strides"),
    ("--data multi_dsprites --resolution 32", "--resolution"), ("--batch-size 10 --accumulate 4", "--accumulate")])
def test_bad_flags(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = flags.split()
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bad_numbers_for_every_flag(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, (value, _) in {**train.RECIPE, **train.RUNTIME, "seed": (0, ""), "seeds": (0, "")}.items():
        if isinstance(value, (bool, str)):
            continue
        bad = ["-1", "nan", "inf", "x", "", "1e400", "0x"] + ["0"] * (value not in (0, train.RECIPE["warmup"][0]))
        bad += ["1.5", "99999999999"] * isinstance(value, int)
        bad += ["1,,1", "99", "1," * 20 + "1"] * isinstance(value, tuple)
        bad += ["1.1"] * (key in ("beta2", "decay_rate", "slot_loss"))
        for text in bad:
            flag = "--" + key.replace("_", "-")
            assert f"argument {flag}: " in refused(capsys, train.main, [f"{flag}={text}"])
    for flags in (["--count", "0"], ["--count", "1000000"], ["--num-slots", "-1"], ["--num-iterations", "0"],
                  ["--seed", "x"],
                  ["--num-slots", "1000000000"], ["--figure", "z"], ["/nowhere"]):
        assert flags[0] in refused(capsys, visualize.main, flags)
    assert not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL_FOLDER"],))


def test_bad_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    run = tmp_path / "run"
    train.main([*TINY, "--steps", "1", "--out", str(run)])
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    path = tmp_path / "bad.pt"
    content = (run / "checkpoint.pt").read_bytes()
    for bad in (b"", b"text", content[:1000], content[:-1000], pickle.dumps(Evil()),
                pickle.dumps({**good, "config": Evil()})):
        path.write_bytes(bad)
        assert str(path) in refused(capsys, visualize.main, [str(path)])
        assert str(path) in refused(capsys, train.main, ["--eval", str(path)])
    for bad in (Evil(), [1, 2], {"model": 1}, {**good, "config": {}}, {**good, "model": {}},
                {**good, "config": {**good["config"], "slot_dim": 16}}):
        torch.save(bad, path)
        assert str(path) in refused(capsys, visualize.main, [str(path)])
    for old in (True, False):  # PyTorch's two formats
        torch.save({**good, "step": Evil()}, path, _use_new_zipfile_serialization=not old)
        assert str(path) in refused(capsys, train.main, ["--eval", str(path)])
    assert not (tmp_path / "evil").exists()
    torch.load(path, weights_only=False)  # the code is real
    assert (tmp_path / "evil").exists()

    def changed(content, keys, value):
        content = dict(content)
        content[keys[0]] = changed(content[keys[0]], keys[1:], value) if keys[1:] else value
        return content

    odd = [None, "x", -1, 1.5, float("nan"), 10 ** 9 + 1, [1], (), (0,), {}, b"x"]
    for key, was in good["config"].items():
        for value in odd:
            if not (isinstance(value, str) and isinstance(was, str) or isinstance(was, float) and value == 1.5):
                with pytest.raises((ValueError, TypeError)):
                    train.check_config({**good["config"], key: value})
    cases = [(["config", "num_slots"], 10 ** 9), (["config", "task"], "x"), (["config", "dtype"], "load"),
             (["config", "data"], None),
             (["config"], None), (["model"], {}), (["optimizer"], {}), (["optimizer"], [1])]
    cases += [([key], value) for key in ("step", "seconds") for value in odd
              if key == "step" or not isinstance(value, float)]
    name = "slot_attention.slots_mu"
    weight = good["model"][name]
    cases += [(["model", name], value)
              for value in (None, 1.0, "x", weight[0, 0, :3], weight * float("nan"), weight / 0, [weight],
                            weight.expand(10 ** 6, 10 ** 6, 8), (weight,))]
    cases += [(["optimizer", "state"], value) for value in ({}, None, [1], {0: {}}, {i: None for i in range(99)})]
    for key, values in good["optimizer"]["state"][0].items():
        cases += [(["optimizer", "state", 0, key], value)
                  for value in (None, "x", values[None, None, None], -1 - values.abs(), values * float("nan"), {},
                                torch.ones(3))
                  if key != "exp_avg" or value is None or isinstance(value, (str, dict)) or value.shape != values.shape]
    for keys, value in cases:
        torch.save(changed(good, keys, value), run / "checkpoint.pt")
        message = refused(capsys, train.main, ["--resume", str(run), "--steps", "2"])
        assert str(run) in message, (keys, value, message)
    (run / "checkpoint.pt").write_bytes(content)
    assert "holds a run" in refused(capsys, train.main, [*TINY, "--out", str(run)])
    assert "slot-dim" in refused(capsys, train.main, ["--resume", str(run), "--slot-dim", "16"])
    (run / "copy.pt").write_bytes(content)
    assert "checkpoint.pt" in refused(capsys, train.main, ["--resume", str(run / "copy.pt")])
    train.main(["--resume", str(run), "--steps", "2"])
    assert "step 2 already" in refused(capsys, train.main, ["--resume", str(run), "--steps", "1"])
    with open(run / "log.jsonl", "a") as file:
        assert data.try_lock(file)
        assert "another process" in refused(capsys, train.main, ["--resume", str(run), "--steps", "3"])


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*TINY, "--steps", "3", "--out", str(out)])
    assert "lr" in refused_last(capsys,
                                ["--resume", str(out), "--steps", "60", "--lr", "1e30", "--clip", "0", "--device",
                                 "cpu",
                                         "--no-compile", "--dtype", "float32"])
    assert train.load_checkpoint(out)["step"] == 3


def test_too_little_memory_is_one_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "compute_loss", lambda *args: torch.empty(10 ** 15))
    assert "--accumulate" in refused_last(capsys, [*TINY, "--steps", "3", "--out", str(out)])
    monkeypatch.undo()
    train.main(["--resume", str(out), "--accumulate", "2"])
    assert train.load_checkpoint(out)["step"] == 3


def refused_last(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def test_following_one_image_is_iterating():
    torch.manual_seed(0)
    model, image, noise = sa.SlotAttentionAutoEncoder(16, 3), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 64)
    outputs = visualize.follow(model, 3 * [image], noise, num_iterations=1)
    whole = model(image, slots=model.slot_attention.init_slots(noise), num_iterations=3)
    torch.testing.assert_close(outputs[-1].masks, whole.masks)
    torch.testing.assert_close(torch.cat([output.attn for output in outputs], 1), whole.attn)


def test_moving_tetrominoes_follow_the_law():
    clips = data.make_moving_tetrominoes(20, 12, 0)
    image, label = clips["image"], clips["label"]
    assert image.shape == (20, 12, 35, 35, 3) and label.shape == (20, 12, 35, 35)
    assert all(((label == e).sum((2, 3)) == 100).all() for e in (1, 2, 3))  # whole, inside, and none over another
    assert (image[label == 0] == 0).all() and (image[label > 0].max(1) > 0).all()
    rows, cols = np.arange(35)[:, None], np.arange(35)
    for e in (1, 2, 3):
        centre = np.stack([((label == e) * along).sum((2, 3)) / 100 for along in (rows, cols)], -1)
        step = np.abs(np.diff(centre, axis=1))
        assert step.max() <= 3.01 and step.sum(1).max(1).min() > 0  # two pixels, rounded; and each one moves
    np.testing.assert_array_equal(data.make_moving_tetrominoes(20, 12, 0)["image"], image)


def share_kept(count, length, seed=0):
    """Of `count` clips of moving Tetrominoes, by the demo's weights: the share of objects whose slot (the one with most
    of it in its mask) is that of the frame before, and mean FG-ARI; {slots carried, new noise in each frame}.
    The README's figures: python -c "import test_slot_attention as t; print(t.share_kept(64, 12))" """
    checkpoint = train.load_checkpoint(visualize.DEMO)
    model = train.load_model(checkpoint, visualize.DEMO)
    model.slot_attention.implicit = False
    clips = data.make_moving_tetrominoes(count, length, seed)
    frames = [data.Scenes(image).batch(torch.arange(count))["image"] for image in clips["image"].swapaxes(0, 1)]
    noise = torch.randn(length, count, 4, 64, generator=torch.Generator().manual_seed(seed))
    fresh = [visualize.follow(model, [frame], x, 4)[0] for frame, x in zip(frames, noise)]
    result = {}
    for name, outputs in ("carried", visualize.follow(model, frames, noise[0], 4)), ("fresh", fresh):
        objects = F.one_hot(torch.from_numpy(clips["label"]).long().flatten(2))[..., 1:]         # [B, F, P, 3]
        masks = torch.stack([output.masks for output in outputs], 1).flatten(3)                  # [B, F, K, P]
        owner = (masks @ objects.float()).argmax(2)                                              # [B, F, 3]
        ari = sa.adjusted_rand_index(objects.flatten(0, 1), masks.flatten(0, 1).transpose(1, 2)).mean().item()
        result[name] = (owner[:, 1:] == owner[:, :-1]).float().mean().item(), ari
    return result


def test_carried_slots_keep_their_objects():
    result = share_kept(16, 6)
    assert result["carried"][0] > 0.97 and result["carried"][1] > 0.93 and result["fresh"][0] < 0.4, result


def altered(image, rng):
    """uint8 pictures -> {name: the same with less contrast (about mid-grey), darker, or with noise}. The README's
    picture is of these as PNGs: python visualize.py assets/demo.pt --figure a --images *.png"""
    x = image / 255
    changed = {"original": x, **{f"contrast {c}": 0.5 + c * (x - 0.5) for c in (0.75, 0.5, 0.25)},
               **{f"brightness {b}": b * x for b in (0.9, 0.75, 0.5)},
               **{f"noise {s}": x + s * rng.standard_normal(x.shape) for s in (0.05, 0.1, 0.2, 0.3)}}
    return {name: (255 * y.clip(0, 1)).round().astype(np.uint8) for name, y in changed.items()}


def ari_of_altered_scenes(count):
    """FG-ARI of the demo's weights on altered held-out scenes. The README's figures are of 512 scenes:
    python -c "import test_slot_attention as t; print(t.ari_of_altered_scenes(512))" """
    checkpoint = train.load_checkpoint(visualize.DEMO)
    model, config = train.load_model(checkpoint, visualize.DEMO), {**checkpoint["config"], "accumulate": 1}
    model.slot_attention.implicit = False
    scenes = train.load_scenes({**config, "eval_count": count}, "eval").arrays
    return {name: train.evaluate(model, config, data.Scenes(image, scenes["label"]), torch.device("cpu"),
                                 torch.float32, 4)["ari"]
            for name, image in altered(scenes["image"].numpy(), np.random.default_rng(0)).items()}


def test_the_demo_stands_noise_but_not_darkness():
    ari = ari_of_altered_scenes(64)
    assert ari["original"] > 0.9 and ari["noise 0.1"] > 0.85 and ari["contrast 0.75"] > 0.75, ari
    assert ari["brightness 0.5"] < 0.4, ari


def test_pictures_of_any_mode_and_size(tmp_path, capsys):
    config = {"data": "tetrominoes", "resolution": 8, "crop": "paper"}
    grey = Image.new("L", (30, 20), 100)
    clear = Image.new("RGBA", (20, 30), (255, 0, 0, 0))  # all transparent
    sixteen = Image.fromarray(np.full((20, 30), 100 * 257, np.uint16))
    pictures = {"grey.png": grey, "rgb.jpg": grey.convert("RGB"), "rgba.png": grey.convert("RGBA"),
                "palette.gif": grey.convert("P"),
                "cmyk.jpg": grey.convert("CMYK"), "la.png": grey.convert("LA"), "sixteen.png": sixteen,
                "tiny.png": grey.resize((1, 1)),
                "clear.png": clear, "bits.png": Image.new("1", (9, 9), 1)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    images = visualize.load_pictures([tmp_path / name for name in pictures], config)
    assert images.shape == (10, 3, 8, 8)
    torch.testing.assert_close(images[:8], torch.full((8, 3, 8, 8), 100 * 2 / 255 - 1), rtol=0, atol=0.02)
    assert (images[8:] == 1).all()
    framed = Image.new("RGB", (40, 20), "red")
    framed.paste("blue", (10, 0, 30, 20))
    framed.save(tmp_path / "framed.png")
    blue = visualize.load_pictures([tmp_path / "framed.png"], config)
    assert (blue[:, 2] == 1).all() and (blue[:, 0] == -1).all()  # the central square, and nothing beside it
    clevr = visualize.load_pictures([tmp_path / "framed.png"], {**config, "data": "clevr", "crop": "none"})
    assert clevr.shape == (1, 3, 8, 8)

    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "floats.tiff")
    for name in ("text.png", "cut.png", "floats.tiff", "missing.png", "."):
        path = str(tmp_path / name)
        assert path in refused(capsys, visualize.main, [str(visualize.DEMO), "--images", path])


def test_figures_of_all_kinds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo, run = str(visualize.DEMO), tmp_path / "run"
    train.main([*TINY, "--steps", "3", "--num-slots", "5", "--out", str(run)])
    visualize.main([str(run), "--figure", "curve"])
    assert (run / "curve.png").stat().st_size > 10_000
    visualize.main([str(run), demo, "--count", "2"])  # one sheet for several runs, here
    wide, high = Image.open("figure.png").size
    assert wide > 800 and 0.4 < high / wide < 0.7  # four rows of eight
    visualize.main([demo, "--count", "1", "--num-iterations", "3", "--out", "a.gif"])
    assert Image.open("a.gif").n_frames == 3
    visualize.main([demo, "--figure", "clip", "--count", "3", "--out", "clip.png"])
    Image.new("RGB", (50, 40), "blue").save("own.png")
    case, weights, *_ = official_case("discovery", 7)
    np.savez("official.npz", **{f"network/layer_with_weights-0/{name}/.ATTRIBUTES/VARIABLE_VALUE": value
                                for name, value in weights.items()})
    visualize.main("--official official.npz --images own.png --num-slots 2 --num-iterations 1 --figure a "
                   "--out official.png".split())
    config, model = visualize.load(None, "official.npz")
    assert model.slot_attention.num_slots == 7 and config["crop"] == "official"
    np.testing.assert_array_equal(model.slot_attention.slots_mu.detach(), weights["slot_attention/slots_mu"])
    assert all(Path(name).stat().st_size > 5_000 for name in ("clip.png", "official.png"))

    for flags, message in [(f"{demo} --figure curve", "log.jsonl"), ("--official official.npz", "--images"),
                           ("--official x --images own.png", "x"),
                           (f"{demo} --official official.npz --images own.png", "takes no run"),
                           (f"{demo} --figure clip --images own.png", "--images"),
                           (f"{demo} --out nowhere/a.png", "nowhere"), (f"{demo} --out nowhere/a.gif", "nowhere"),
                           (f"{demo} --out a.xyz", "xyz"),
                           (f"{demo} --figure b --out b.gif", "does not move"),
                           (f"{demo} --images own.png --count 2", "--count"),
                           (f"{demo} --figure curve --num-slots 3", "--num-slots"), ("typo --figure curve", "typo")]:
        with pytest.raises(SystemExit) as stop:
            visualize.main(flags.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1], flags
        assert not list(tmp_path.glob("part-*")), flags


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------

README = HERE / "README.md"


def right_lines(text):
    """A text with each link like [`SlotAttention.iterate`](slot_attention.py#L1) set to the line that it names: where
    the last name is defined (after the class before it), or else the nearest line that begins with these words."""
    def link(match):
        name, file, old = match[1], match[2], int(match[3])
        lines, owner = (HERE / file).read_text().splitlines(), 0
        *classes, last = name.split(".") if re.fullmatch(r"[A-Z]\w*\.\w+", name) else [name]
        pattern = rf"\s*(def|class) {last}\b|{last} = " if re.fullmatch(r"\w+", last) else r"\s*" + re.escape(last)
        for part in classes:
            owner = next((i for i, line in enumerate(lines) if re.match(rf"class {part}\b", line)), len(lines))
        found = [i for i, line in enumerate(lines, 1) if i > owner and re.match(pattern, line)]
        assert found, f"README.md: {file} has no `{name}`"
        return f"[`{name}`]({file}#L{found[0] if classes else min(found, key=lambda i: abs(i - old))})"
    return re.sub(r"\[`([^`]+)`\]\(([\w.]+\.py)#L(\d+)\)", link, text)


def test_the_readme_points_to_the_right_lines():
    old, new = README.read_text().splitlines(), right_lines(README.read_text()).splitlines()
    assert sum("#L" in line for line in old) > 20
    stale = [f"{a}\n-> {b}" for a, b in zip(old, new) if a != b]
    assert not stale, ("README.md: lines have moved. To set all: python -c 'import test_slot_attention as t; "
                       "t.README.write_text(t.right_lines(t.README.read_text()))'\n" + "\n".join(stale))
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text()):
        assert (HERE / target).exists(), f"README.md links to {target}, which is not there"


def test_nan_in_the_weights_is_not_saved(tmp_path, capsys, monkeypatch):
    """The loss of a step is of the weights before it: after the last step only the weights themselves can tell."""
    out, step = tmp_path / "run", torch.optim.Adam.step
    train.main([*TINY, "--steps", "3", "--out", str(out)])
    before = (out / "checkpoint.pt").read_bytes()

    def spoil(self, *args):
        step(self, *args)
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[self.param_groups[0]["params"][0]][name][0] = float("inf")  # no loss shows this

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    assert "became NaN or infinite by step 4" in refused_last(capsys, ["--resume", str(out), "--steps", "4"])
    assert (out / "checkpoint.pt").read_bytes() == before


def test_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files stands for a full disk: for the figure, the checkpoint and the log."""
    out = tmp_path / "run"
    train.main([*TINY, "--steps", "3", "--out", str(out)])
    before = {name: (out / name).read_bytes() for name in ("figure.png", "checkpoint.pt")}
    go_on = ["--resume", str(out), "--steps", "6"]
    code = f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {str(HERE)!r})
        import train, visualize
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for main, flags, size in ((visualize.main, [{str(out)!r}], 20_000), (train.main, {go_on!r}, 20_000),
                                  (train.main, {go_on!r}, {(out / "log.jsonl").stat().st_size + 10})):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
            try: main(flags)
            except SystemExit as stop: assert stop.code == 2"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and not re.search("Traceback|Exception", result.stderr), result.stderr
    last = [line for line in result.stderr.splitlines() if "cannot write" in line]
    assert len(last) == 3 and all(name in line for name, line in zip((*before, "log.jsonl"), last)), last
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert not list(out.glob("part-*"))
    train.main(go_on)
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_with_what_it_began_with(tmp_path, capsys):
    """Its log, also without a checkpoint or with a damaged line; its data; and nobody who reads its messages."""
    out, root = tmp_path / "run", tmp_path / "data"
    train.main([*TINY, "--steps", "3", "--data-root", str(root), "--out", str(out)])
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    (out / "log.jsonl").write_bytes(lines[0] + b"\0\0\0\n" + lines[2])  # a middle line is lost, the others stay
    train.main(["--resume", str(out), "--steps", "4"])
    assert [row["step"] for _, row in train.read_log((out / "log.jsonl").read_bytes())] == [1, 3, 4]
    root.mkdir()
    (root / "tetrominoes_train.tfrecords").write_bytes((ASSETS / "tfrecords/tetrominoes_sample.tfrecords").read_bytes())
    before = (out / "checkpoint.pt").read_bytes()
    assert "generated tetrominoes" in refused_last(capsys, ["--resume", str(out), "--steps", "5", "--batch-size", "1"])
    assert (out / "checkpoint.pt").read_bytes() == before
    (out / "checkpoint.pt").unlink()
    log = (out / "log.jsonl").read_bytes()
    assert "checkpoint.pt is gone" in refused_last(capsys, [*TINY, "--out", str(out)])
    assert (out / "log.jsonl").read_bytes() == log
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--steps", "3", "--out", str(tmp_path / "unheard")]
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run(command, stderr=writer, stdout=subprocess.DEVNULL).returncode == 0
    os.close(writer)
    assert train.load_checkpoint(tmp_path / "unheard")["step"] == 3


def test_no_picture_runs_a_program(tmp_path, capsys, monkeypatch):
    """Pillow goes by a file's content, and hands PostScript to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'it_ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png", format="EPS")
    with pytest.raises(OSError), Image.open(tmp_path / "photo.png") as picture:
        picture.load()
    assert (tmp_path / "it_ran").exists()  # the danger is real
    (tmp_path / "it_ran").unlink()
    flags = [str(ASSETS / "demo.pt"), "--images", str(tmp_path / "photo.png"), "--out", str(tmp_path / "a.png")]
    assert "photo.png" in refused(capsys, visualize.main, flags)
    assert not (tmp_path / "it_ran").exists()


def test_seeds_with_a_log_that_is_gone(tmp_path, capsys):
    flags = [*TINY, "--steps", "3", "--out", str(tmp_path / "run"), "--seeds", "4"]
    train.main(flags)
    (tmp_path / "run-seed4" / "log.jsonl").write_bytes(b"")
    assert "does not end with an evaluation" in refused_last(capsys, flags)


def test_seeds_are_runs_and_go_on(tmp_path, capsys):
    flags = [*TINY, "--steps", "3", "--out", str(tmp_path / "run")]
    train.main([*flags, "--seed", "4"])
    train.main([*flags, "--seeds", "4"])
    capsys.readouterr()
    train.main([*flags, "--seeds", "4", "5"])
    shown = capsys.readouterr()
    assert "seed4/" not in shown.err  # is there already
    rows = [log_of(tmp_path / name)[-1] for name in ("run", "run-seed4", "run-seed5")]
    assert rows[0]["ari"] == rows[1]["ari"] != rows[2]["ari"]
    wanted = np.array([row["ari"] for row in rows[1:]])
    assert f"FG-ARI: {wanted.mean():.4f} ± {wanted.std(ddof=1):.4f} over 2 seeds" in shown.out
    assert "lr" in refused(capsys, train.main, [*flags, "--seeds", "4", "--lr", "1"])


# ---------------------------------------------------------------------------------------------------------------------
# Kill it anywhere; damaged files. Both take a count: the suite runs few, by hand many:
#     python -c "import test_slot_attention as t, pathlib; t.kill_anywhere(pathlib.Path('/tmp/kill'), 20)"
# ---------------------------------------------------------------------------------------------------------------------

# One process imports torch and forks a child for each run. What kills: the clock, or the n-th call of a function.
KILLER = """
import io, json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import data, train, visualize

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def on_call(owner, name, number, before=die):
    function, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            before(*args)
        return function(*args, **kwargs)
    setattr(owner, name, counted)

def half_a_checkpoint(content, file):
    whole = io.BytesIO()
    torch.save(content, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) * number // 4])
    file.flush()
    die()

def half_a_figure(self, path):
    path.write_bytes(b"half")
    die()

for line in sys.stdin:
    kind, number, delay, argv = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if kind == "cache":
            on_call(data, ("make_multi_dsprites", "checksums", "build_cache")[number % 3], 1 + number // 3)
        if kind == "checkpoint":
            calls = (torch, "save", number, half_a_checkpoint), (os, "fsync", number), (os, "replace", number)
            on_call(*calls[number % 3])
        if kind == "figure":
            calls = (visualize, "make_figure", 1), (visualize.plt.Figure, "savefig", 1, half_a_figure)
            on_call(*calls[number % 2])
        train.main(argv)
        os._exit(0)
    if kind == "clock":
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def kill_anywhere(folder, kills, seed=0):
    """Kills training so often; --resume goes on each time, and the end is that of an unbroken run, to the bit. -> where
    the kills fell."""
    rng, fell, rounds = random.Random(seed), Counter(), 0
    flags = ("--data multi_dsprites --small --train-count 64 --eval-count 8 --batch-size 8 --steps 12 --eval-every 2 "
             "--log-every 1 --dtype float32 --device cpu --no-compile --encoder-channels 8 --decoder-channels 8 "
             "--slot-dim 8").split()
    killer = subprocess.Popen([sys.executable, "-c", KILLER], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)

    def run(argv, kind=None, number=0, delay=0):
        killer.stdin.write(json.dumps([kind, number, delay, argv]) + "\n")
        killer.stdin.flush()
        return int(killer.stdout.readline())

    whole = folder / "whole"
    start = time.perf_counter()
    assert run([*flags, "--data-root", str(folder / "data"), "--out", str(whole)]) == 0
    duration = time.perf_counter() - start
    expected = train.load_checkpoint(whole)
    while sum(fell.values()) < kills:
        out, root = folder / f"killed{rounds}", folder / f"data{rounds}"
        rounds += 1
        for turn in range(100):
            kinds = ("cache", "checkpoint", "clock", "figure", "cache", "clock", "checkpoint", "end")
            kind = "end" if sum(fell.values()) >= kills else kinds[turn % 8]
            if kind == "cache":
                shutil.rmtree(root / "cache", ignore_errors=True) if turn else None
            new = not (out / "checkpoint.pt").exists()
            status = run([*flags, "--data-root", str(root), "--out", str(out)] if new else ["--resume", str(out)], kind,
                         rng.randint(1, 3), rng.uniform(0, duration / 2))
            assert status in (0, signal.SIGKILL), status
            if status == 0:
                break
            fell[kind] += 1
            if kind == "cache" or (out / "checkpoint.pt").exists():  # it is written before the cache
                train.load_checkpoint(out)
        ours = train.load_checkpoint(out)
        for part in ("model", "optimizer"):
            ours_flat, expected_flat = (torch.utils._pytree.tree_leaves(content[part]) for content in (ours, expected))
            assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b
                       for a, b in zip(ours_flat, expected_flat, strict=True))
        assert ours["step"] == 12 and without_times(log_of(out)) == without_times(log_of(whole))
        assert (out / "figure.png").stat().st_size > 10_000
        assert not [path for path in [*out.rglob("*"), *root.rglob("*")]
                    if "part" in path.name or path.suffix == ".lock"]
    killer.stdin.close()
    killer.wait()
    return fell


def test_killed_anywhere_it_goes_on(tmp_path):
    assert set(kill_anywhere(tmp_path, 5)) == {"cache", "checkpoint", "clock", "figure"}


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
    """Reads so many damaged files: each is refused, in one line that names it and in little time, or read as it was.
    -> how many of each kind, refused and read."""
    rng, seen = random.Random(seed), Counter()
    train.main([*TINY, "--steps", "1", "--out", str(folder / "run")])
    data.load("multi_dsprites", "eval", folder, count=3)
    cache, = (folder / "cache").iterdir()
    clevr, _ = clevr_v1(folder, count=2)
    samples = {name: (ASSETS / "tfrecords" / f"{name}_sample.tfrecords").read_bytes()
               for name in ("tetrominoes", "multi_dsprites_colored_on_colored")}
    np.savez(folder / "weights.npz", a=np.arange(99.0), b=np.ones((3, 4)))
    (folder / "tf").mkdir()
    for end in (".index", ".data-00000-of-00001"):
        (folder / f"tf/ckpt{end}").write_bytes(Path(f"{ASSETS / 'ckpt-500'}{end}").read_bytes())

    def read_checkpoint():
        checkpoint = train.load_checkpoint(folder / "run")
        train.load_model(checkpoint, folder / "run")
        return checkpoint

    def read_records():
        return list(data.read_tfrecords(folder / "tetrominoes.tfrecords", "tetrominoes", limit=9))

    def forged(content, rng):  # the file's checksum is right, only what the record says is wrong
        raw = bytearray(gzip.decompress(content))
        length = int.from_bytes(raw[:8], "little")
        end = 12 + length
        for _ in range(rng.randint(1, 3)):  # the protobuf's tags and lengths are at the front, the factors' at the end
            raw[rng.choice([rng.randrange(12, 60), rng.randrange(12, end),
                            rng.randrange(end - 300, end)])] ^= 1 << rng.randrange(8)
        return gzip.compress(bytes(raw), 1)

    def other(content, rng):
        return samples["multi_dsprites_colored_on_colored"]

    def read_forged():
        scenes = data.load("tetrominoes", "train", folder / "forged", resolution=35)
        return scenes.batch(torch.arange(len(scenes)))

    (folder / "forged").mkdir()
    for path in (folder / "tetrominoes.tfrecords", folder / "forged" / "tetrominoes_train.tfrecords"):
        path.write_bytes(samples["tetrominoes"])
    png = next((clevr / "CLEVR_v1.0/images/train").iterdir())
    scenes_file = clevr / "CLEVR_v1.0/scenes/CLEVR_train_scenes.json"

    def odd_json(content, rng):
        content = json.loads(content)
        scene = rng.choice(content["scenes"])
        thing = rng.choice(scene["objects"])
        odd = rng.choice([None, "pink", -1, 1e400, float("nan"), 10 ** 400, [], {}, [0, 0], ["0", "0", "0"], True,
                          [1e9, 0, 0], "../../x"])
        place = rng.choice([(content, "scenes"), (scene, "objects"), (scene, "image_filename"),
                            (thing, rng.choice(list(thing))),
                            (scene["objects"], 0), (content["scenes"], 1)])
        place[0][place[1]] = odd
        if rng.random() < 0.2:
            scene["objects"] = [thing] * 11
        return json.dumps(content).encode()

    def read_clevr():
        for stale in (clevr / "cache").glob("clevr-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return data.load("clevr", "train", clevr, resolution=8, crop="none").arrays

    def read_cache():
        return data.load("multi_dsprites", "eval", folder, count=3).arrays

    kinds = [("checkpoint", folder / "run/checkpoint.pt", damaged, read_checkpoint, True),
             *((f"cache {path.name}", path, damaged, read_cache, True) for path in sorted(cache.iterdir())),
             ("records", folder / "tetrominoes.tfrecords", damaged, read_records, True),
             ("records, forged", folder / "forged/tetrominoes_train.tfrecords", forged, read_forged, False),
             ("records, other set", folder / "tetrominoes.tfrecords", other, read_records, True),
             ("picture", png, damaged, lambda: data.read_png(png), True),
             ("scenes file", scenes_file, damaged, read_clevr, False),
             ("scenes file, odd", scenes_file, odd_json, read_clevr, False),
             ("npz", folder / "weights.npz", damaged, lambda: sa.read_npz(folder / "weights.npz"), True),
             *((f"TF {path.suffix}", path, damaged, lambda: sa.read_tf_checkpoint(folder / "tf/ckpt"), True)
               for path in sorted((folder / "tf").iterdir()))]
    whole = {kind: read() for kind, _, _, read, _ in kinds}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        kind, path, damage, read, same = kinds[number % len(kinds)]
        good = path.read_bytes()
        bad = damage(good, rng)
        path.write_bytes(bad)
        start = time.process_time()
        try:
            content = read()
        except (ValueError, OSError) as error:
            seen[kind, "refused"] += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 600, error
            named = {"cache": cache, "TF": folder / "tf/ckpt"}.get(kind.split()[0], path)
            assert str(named) in str(error) or kind.startswith("scenes") and "CLEVR_" in str(error), (kind, error)
        else:
            seen[kind, "read"] += 1
            if same:  # the damage hit what nobody reads: padding, a name, the time in a header
                flat, flat_whole = (torch.utils._pytree.tree_leaves(x) for x in (content, whole[kind]))
                assert all(np.array_equal(a, b) for a, b in zip(flat, flat_whole, strict=True)), kind
        assert time.process_time() - start < 10, kind
        path.write_bytes(good)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 500_000  # kB
    return seen


def test_damaged_files_are_refused(tmp_path):
    seen = damaged_files(tmp_path, 120)
    assert sum(seen.values()) == 120 and sum(number for (_, what), number in seen.items() if what == "refused") > 80
