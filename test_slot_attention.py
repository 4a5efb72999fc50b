"""The tests: pytest test_slot_attention.py

Most of them compare with outputs of the official TensorFlow code, kept in assets/golden.npz: models whose weights and
inputs come from a recipe (`official_case`), metrics, single layers and learning rates.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import slot_attention as sa
import train
import visualize

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
SAMPLES = HERE.parent / "shared" / "samples"  # a little real data that the project does not carry
GOLDEN = np.load(ASSETS / "golden.npz")

torch.set_num_threads(min(2, os.cpu_count()))


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
               "slot_attention/mlp/layer_with_weights-0": (64, 128), "slot_attention/mlp/layer_with_weights-1": (128, 64),
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
    sa.load_official_weights(marked, {name: np.full(official_shape(name), i, np.float32) for i, name in enumerate(names)})
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
    np.testing.assert_allclose(output.recon_combined.detach().movedim(1, -1)[:, ::8, ::8], case["recon_combined"], atol=1e-4)
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


@pytest.mark.parametrize("name", sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith("units/")} - {"grid"}))
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
    expected = torch.autograd.grad(module(inputs, slots=before.detach(), num_iterations=1)[0].sum(), module.gru.weight_ih)
    module.implicit = True
    slots, attn = module(inputs, slots=init)
    torch.testing.assert_close(slots, unrolled)
    assert attn.shape[1] == 4
    torch.testing.assert_close(torch.autograd.grad(slots.sum(), module.gru.weight_ih), expected)


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
    plain = decoder.cnn[0](decoder.pos(slots[:, None, None].expand(-1, resolution, resolution + 2, -1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(fast, plain)
    weight = torch.randn_like(plain)
    inputs = [slots, *decoder.cnn[0].parameters(), *decoder.pos.parameters()]
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), inputs), torch.autograd.grad((plain * weight).sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_constructor_refuses_sizes_that_make_no_model():
    for bad in (dict(resolution=0, num_slots=4), dict(resolution=32, num_slots=0), dict(resolution=32, num_slots=4, slot_dim=-1)):
        with pytest.raises(ValueError, match="must be positive"):
            sa.SlotAttentionAutoEncoder(**bad)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted({key.split("/")[1] for key in GOLDEN.files if key.startswith("ari/")}))
def test_ari_equals_official(case):
    """Where the official code gives NaN, ours gives 1; masks of 0/255 score as those of 0/1."""
    true, pred, score = (torch.from_numpy(GOLDEN[f"ari/{case}/{key}"]) for key in ("true", "pred", "score"))
    if case.endswith("mask255"):
        score = torch.from_numpy(GOLDEN[f"ari/{case.removesuffix('_mask255') + ('_mask01' if 'small' in case else '')}/score"])
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
