"""Slot Attention in PyTorch: "Object-Centric Learning with Slot Attention", Locatello et al., NeurIPS 2020.

It computes what the official TensorFlow code computes: outputs, losses and gradients. Section and equation numbers are
those of the paper, https://arxiv.org/abs/2006.15055. Shapes are written in its symbols:

    B  images in a batch    N  input features, h * w of the encoder's grid      D  size of a slot (D_in: of an input)
    K  slots                T  iterations of attention                          H, W  size of an image (h, w: of a grid)
"""

import functools
import inspect
import math
import re
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Slot Attention (section 2.1)
# ---------------------------------------------------------------------------------------------------------------------


class SlotAttention(nn.Module):
    """Slot Attention (Algorithm 1). A call can change K and T.

    num_slots: K. dim: D. num_iterations: T. inputs_dim: D_in, D if not given.
    implicit: the gradient is that of the last iteration alone (Chang et al., 2022), and passes straight through it to
        the initial slots (Jia et al., 2023). learned_queries: each slot has a mean of its own (Jia et al., 2023)."""

    def __init__(self, num_slots, dim, num_iterations=3, mlp_hidden_size=128, inputs_dim=None, eps=1e-8,
                 implicit=False, learned_queries=False):
        super().__init__()
        self.num_slots, self.dim, self.num_iterations = num_slots, dim, num_iterations
        self.eps, self.implicit = eps, implicit
        inputs_dim = inputs_dim or dim

        self.slots_mu = nn.Parameter(torch.empty(1, num_slots if learned_queries else 1, dim))
        self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, dim))
        self.norm_inputs = nn.LayerNorm(inputs_dim, eps=1e-3)                 # Keras' epsilon
        self.norm_slots = nn.LayerNorm(dim, eps=1e-3)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-3)
        self.project_q = nn.Linear(dim, dim, bias=False)
        self.project_k = nn.Linear(inputs_dim, dim, bias=False)
        self.project_v = nn.Linear(inputs_dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_hidden_size), nn.ReLU(), nn.Linear(mlp_hidden_size, dim))

        for name, parameter in self.named_parameters():                       # as Keras initialises them
            if name == "gru.weight_hh":
                nn.init.orthogonal_(parameter)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
        limit = (6 / (1 + dim)) ** 0.5                                        # Glorot's for Keras' shape [1, 1, D]
        nn.init.uniform_(self.slots_log_sigma, -limit, limit)
        nn.init.uniform_(self.slots_mu, -limit, limit)
        if learned_queries:                                                   # means further apart than their noise
            nn.init.normal_(self.slots_mu)
            nn.init.constant_(self.slots_log_sigma, -1)

    def init_slots(self, noise):
        """Standard normal noise [B, K, D] -> initial slots [B, K, D] ~ N(mu, sigma)."""
        mu = self.slots_mu.repeat(1, noise.shape[1], 1)[:, :noise.shape[1]]   # [1, K, D]: more slots than means share
        return mu + self.slots_log_sigma.exp() * noise

    def forward(self, inputs, slots=None, num_slots=None, num_iterations=None):
        """inputs [B, N, D_in], initial slots [B, K, D] (random if not given) -> slots [B, K, D], attn [B, T, K, N].

        attn is each iteration's softmax over the slots, before it is normalised over the inputs."""
        inputs = self.norm_inputs(inputs)                                     # [B, N, D_in]
        k, v = self.project_k(inputs), self.project_v(inputs)                 # [B, N, D]
        if slots is None:
            noise = self.slots_mu.new_empty(len(k), num_slots or self.num_slots, self.dim).normal_()
            slots = self.init_slots(noise)                                    # [B, K, D]
        init, attns = slots, []
        with torch.autocast(k.device.type, enabled=False):                    # the iterations stay in float32
            k, v = k.to(slots.dtype), v.to(slots.dtype)
            for _ in range(num_iterations or self.num_iterations):
                if self.implicit:
                    slots = slots.detach() + (init - init.detach())           # its value; the gradient goes to init
                slots_prev = slots
                q = self.project_q(self.norm_slots(slots)) * self.dim ** -0.5                # [B, K, D]
                attn = (q @ k.transpose(1, 2)).softmax(dim=1)                 # [B, K, N]; eq. 1: the slots compete
                weights = attn + self.eps
                weights = weights / weights.sum(dim=2, keepdim=True)          # eq. 2: a weighted mean over the inputs
                updates = weights @ v                                         # [B, K, D]
                slots = self.gru(updates.flatten(0, 1), slots_prev.flatten(0, 1)).view_as(slots_prev)
                slots = slots + self.mlp(self.norm_mlp(slots))                # [B, K, D]
                attns.append(attn)
        return slots, torch.stack(attns, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The models (sections 2.2 and 2.3)
# ---------------------------------------------------------------------------------------------------------------------


class Decomposition(NamedTuple):
    """Images taken apart. Pictures are in [-1, 1] as the images, not clipped; masks sum to 1 over the slots."""

    recon_combined: torch.Tensor  # [B, 3, H, W]
    recons: torch.Tensor          # [B, K, 3, H, W]
    masks: torch.Tensor           # [B, K, 1, H, W]
    slots: torch.Tensor           # [B, K, D]
    attn: torch.Tensor            # [B, T, K, h, w]


class SlotAttentionAutoEncoder(nn.Module):
    """Object discovery (section 2.2): image -> slots -> a picture and a mask of each slot -> their sum.

    The defaults are the paper's CLEVR6 model (resolution 128; 890,308 parameters with any K). For Multi-dSprites (64)
    and Tetrominoes (35): encoder_channels=32, decoder_channels=32, decoder_strides=(1, 1, 1).
    resolution: (H, W), or one number for both."""

    def __init__(self, resolution, num_slots, num_iterations=3, slot_dim=64, mlp_hidden_size=128, implicit=False,
                 learned_queries=False, encoder_channels=64, encoder_strides=(1, 1, 1, 1),
                 decoder_channels=64, decoder_strides=(2, 2, 2, 2, 1), decoder_kernel=5, pixel_shuffle=1):
        super().__init__()
        resolution = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, slot_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size, implicit=implicit,
                                            learned_queries=learned_queries)
        self.decoder = Decoder(resolution, slot_dim, decoder_channels, decoder_strides, decoder_kernel, pixel_shuffle)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """image [B, 3, H, W] in [-1, 1]; initial slots [B, K, D], K and T may be given -> Decomposition."""
        x = self.encoder(image)                                               # [B, N, D]
        slots, attn = self.slot_attention(x, slots, num_slots, num_iterations)
        x = self.decoder(slots.flatten(0, 1))                                 # [B * K, 4, H, W]
        x = x.to(slots.dtype).unflatten(0, slots.shape[:2])                   # [B, K, 4, H, W]
        recons, masks = x.split([3, 1], dim=2)
        masks = masks.softmax(dim=1)                                          # over the slots
        recon_combined = (recons * masks).sum(dim=1)                          # [B, 3, H, W]
        return Decomposition(recon_combined, recons, masks, slots, attn.unflatten(-1, self.encoder.grid_size))


class SetPrediction(NamedTuple):
    predictions: torch.Tensor     # [B, K, 19] in [0, 1]
    slots: torch.Tensor           # [B, K, D]
    attn: torch.Tensor            # [B, T, K, h, w]


class SlotAttentionClassifier(nn.Module):
    """Set prediction (section 2.3): image -> slots -> the properties of one object per slot.

    The defaults are the paper's CLEVR10 model (resolution 128, K = 10; 380,755 parameters). A prediction is:
    (3d_coords + 3) / 6 (3 features), size (2), material (2), shape (3), colour (8), real object or padding (1)."""

    def __init__(self, resolution, num_slots, num_iterations=3, slot_dim=64, mlp_hidden_size=128, implicit=False,
                 learned_queries=False, encoder_channels=64, encoder_strides=(1, 2, 2, 1)):
        super().__init__()
        resolution = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, slot_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size, implicit=implicit,
                                            learned_queries=learned_queries)
        self.mlp_classifier = nn.Sequential(nn.Linear(slot_dim, slot_dim), nn.ReLU(), nn.Linear(slot_dim, 19))
        keras_init(self.mlp_classifier)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """image [B, 3, H, W] in [-1, 1]; initial slots [B, K, D], K and T may be given -> SetPrediction."""
        x = self.encoder(image)                                               # [B, N, D]
        slots, attn = self.slot_attention(x, slots, num_slots, num_iterations)
        predictions = self.mlp_classifier(slots).to(slots.dtype).sigmoid()    # [B, K, 19]
        return SetPrediction(predictions, slots, attn.unflatten(-1, self.encoder.grid_size))


# ---------------------------------------------------------------------------------------------------------------------
# The layers of both models, as Keras has them: PyTorch's differ in padding, initialisation and epsilon
# ---------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """CNN, position embedding, LayerNorm, MLP (appendix E): image [B, 3, H, W] -> features [B, N, D], N = h * w.

    resolution: (H, W). strides: one 5x5 convolution each. grid_size: (h, w)."""

    def __init__(self, resolution, channels, strides, dim):
        super().__init__()
        layers, channels_in, self.grid_size = [], 3, resolution
        for stride in strides:
            layers += [Conv2dSame(channels_in, channels, 5, stride), nn.ReLU()]
            channels_in = channels
            self.grid_size = tuple(math.ceil(size / stride) for size in self.grid_size)
        self.cnn = nn.Sequential(*layers)
        self.pos = SoftPositionEmbed(channels, self.grid_size)
        self.layer_norm = nn.LayerNorm(channels, eps=1e-3)
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))
        keras_init(self)

    def forward(self, image):
        x = self.cnn(image.contiguous())       # [B, C, h, w], in memory as the weights: channels_last if they are
        x = self.pos(x).flatten(2).transpose(1, 2)                            # [B, N, C]
        return self.mlp(self.layer_norm(x))                                   # [B, N, D]


class Decoder(nn.Module):
    """Spatial broadcast decoder (section 2.2, appendix E): each slot alone is copied to every cell of a grid, gets a
    position embedding, and is decoded to a picture and a mask logit: slots [M, D] -> [M, 4, H, W], M = B * K.

    strides: one transposed convolution each (at stride 1 that is a convolution with the kernel flipped), then a 3x3
    one. pixel_shuffle r: each cell of the last map becomes r x r pixels (not in the paper; fast on CPUs)."""

    def __init__(self, resolution, dim, channels, strides, kernel_size=5, pixel_shuffle=1):
        super().__init__()
        self.resolution = resolution
        scale = math.prod(strides) * pixel_shuffle
        self.grid_size = tuple(math.ceil(size / scale) for size in resolution)
        self.pos = SoftPositionEmbed(dim, self.grid_size)
        layers = []
        for stride in strides:
            conv = Conv2dSame if stride == 1 else ConvTranspose2dSame
            layers += [conv(dim, channels, kernel_size, stride), nn.ReLU()]
            dim = channels
        layers.append(Conv2dSame(dim, 4 * pixel_shuffle ** 2, 3))
        if pixel_shuffle > 1:
            layers.append(nn.PixelShuffle(pixel_shuffle))
        self.cnn = nn.Sequential(*layers)
        keras_init(self)

    def forward(self, slots):
        if isinstance(self.cnn[0], Conv2dSame):                               # the same as below with less work
            x = self.cnn[1:](self.first_convolution(slots))
        else:
            x = self.cnn(self.pos(slots[:, :, None, None].expand(-1, -1, *self.grid_size)))
        return x[:, :, :self.resolution[0], :self.resolution[1]]              # [M, 4, H, W]

    def first_convolution(self, slots):
        """slots [M, D] -> cnn[0] of the broadcast slots [M, C, h, w]: conv(slot + position) = conv(slot) +
        conv(position). A slot is constant over the grid: conv(slot) is the slot times the kernel's taps in the grid."""
        conv, k = self.cnn[0], self.cnn[0].kernel_size[0]
        position = conv(self.pos(slots.new_zeros(1, slots.shape[1], *self.grid_size)))               # [1, C, h, w]
        inside = F.unfold(slots.new_ones(1, 1, *self.grid_size), k, padding=k // 2)[0].T             # [h * w, k * k]
        taps = slots @ conv.weight.permute(1, 2, 3, 0).flatten(1)                                    # [M, k * k * C]
        x = inside @ taps.unflatten(1, (k * k, -1))                                                  # [M, h * w, C]
        return x.unflatten(1, self.grid_size).permute(0, 3, 1, 2) + position


class Conv2dSame(nn.Conv2d):
    """Conv2d with TensorFlow's "SAME" padding, where an odd pixel of padding goes below and to the right:
    [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]."""

    def forward(self, x):
        k, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=k // 2)
        pad_h, pad_w = (max((math.ceil(size / stride) - 1) * stride + k - size, 0) for size in x.shape[2:])
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        return F.conv2d(x, self.weight, self.bias, stride)


class ConvTranspose2dSame(nn.ConvTranspose2d):
    """ConvTranspose2d aligned as TensorFlow's "SAME": [B, C_in, H, W] -> [B, C_out, stride * H, stride * W].
    (PyTorch's usual `padding=2, output_padding=1` for 5x5 and stride 2 is the same map shifted by one pixel.)"""

    def forward(self, x):
        k, stride = self.kernel_size[0], self.stride[0]
        y = F.conv_transpose2d(x, self.weight, None, stride, padding=(k - stride) // 2)
        y = y[:, :, :stride * x.shape[2], :stride * x.shape[3]]
        return y + self.bias.view(-1, 1, 1)                                   # apart: oneDNN's gradient of it is slow


class SoftPositionEmbed(nn.Module):
    """Adds a learned linear map of each cell's distances to the four borders (appendix E): [B, C, h, w] -> the same."""

    def __init__(self, channels, grid_size):
        super().__init__()
        self.dense = nn.Linear(4, channels)
        rows, cols = torch.meshgrid(*(torch.linspace(0, 1, size) for size in grid_size), indexing="ij")
        grid = torch.stack([rows, cols, 1 - rows, 1 - cols], dim=-1)[None]    # [1, h, w, 4]
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):                    # bfloat16 rounds a position to 1/256
            position = self.dense(self.grid)                                  # [1, h, w, C]
        return x + position.permute(0, 3, 1, 2)


def keras_init(module):
    """Keras' default initialisation: kernels Glorot-uniform, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        elif "bias" in name:
            nn.init.zeros_(parameter)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------------------------------


def adjusted_rand_index(true_mask, pred_mask):
    """Adjusted Rand index of two segmentations (section 4.1), as DeepMind's multi_object_datasets computes it.

    true_mask [B, P, Gt]: one-hot, 0/1 or 0/255; points (pixels) of all zeros are ignored, so drop the background's
    group for FG-ARI. pred_mask [B, P, Gp]: any scores; a point belongs to the largest. -> [B], 1 = equal, 0 = chance.
    Where DeepMind's code gives NaN (0/0), this gives 1."""
    groups = true_mask.shape[2], pred_mask.shape[2]
    cell = true_mask.argmax(dim=2) * groups[1] + pred_mask.argmax(dim=2)                 # [B, P], in the flattened n_ij
    n_ij = torch.zeros(len(cell), groups[0] * groups[1], dtype=torch.int64, device=cell.device)
    n_ij.scatter_add_(1, cell, (true_mask > 0).any(dim=2).long())
    n_ij = n_ij.view(-1, *groups)                                                        # [B, Gt, Gp]

    def pairs(count):  # ordered pairs of points in one group
        return (count * (count - 1)).flatten(1).sum(dim=1).float()

    a, b, n = pairs(n_ij.sum(dim=2)), pairs(n_ij.sum(dim=1)), pairs(n_ij.sum(dim=(1, 2))[:, None])       # [B]
    expected = a * (b / n.clamp(min=1))
    maximum = (a + b) / 2
    return torch.where(maximum == expected, 1.0, (pairs(n_ij) - expected) / (maximum - expected))


def minimum_cost_matching(cost):
    """The exact minimum-cost assignment, as scipy.optimize.linear_sum_assignment, but of a whole batch on its device.

    cost [B, n, m] -> rows, cols [B, min(n, m)], rows in ascending order. A dynamic programme: best[S] is the least cost
    of matching the first |S| rows to the set S of columns. It takes 2^max(n, m) steps: ValueError above 16."""
    n, m = cost.shape[1:]
    if n > m:
        cols, rows = minimum_cost_matching(cost.transpose(1, 2))
        rows, order = rows.sort(dim=1)
        return rows, cols.gather(1, order)
    if m > 16:
        raise ValueError(f"matching takes 16 elements at most, not {m}")
    cost = cost.detach().float().permute(1, 2, 0).contiguous()                # [n, m, B]
    best = cost.new_zeros(2 ** m, cost.shape[2])                              # [2^m, B]
    choice = torch.zeros(2 ** m, cost.shape[2], dtype=torch.int64, device=cost.device)
    for row in range(n):
        subsets, members = subsets_of(m, row + 1, cost.device)                # [L], [L, row + 1]
        options = best[subsets[:, None] - (1 << members)] + cost[row, members]               # [L, row + 1, B]
        best[subsets], chosen = options.min(dim=1)
        choice[subsets] = members.gather(1, chosen)
    subset = subsets[best[subsets].argmin(dim=0)]                             # [B]: of n columns, the cheapest
    cols = []
    for row in range(n):                                                      # from the last row back to the first
        cols.append(choice.gather(0, subset[None])[0])
        subset = subset - (1 << cols[-1])
    cols = torch.stack(cols[::-1], dim=1)
    return torch.arange(n, device=cost.device).expand_as(cols), cols


@functools.lru_cache(maxsize=64)  # copying it to a GPU anew would make each step wait
def subsets_of(m, size, device):
    """The L subsets of range(m) with `size` members: as numbers, a bit for each member, [L], and as lists [L, size]."""
    members = torch.tensor(list(combinations(range(m), size)))
    return (1 << members).sum(dim=1).to(device), members.to(device)


def hungarian_huber_loss(pred, target):
    """The set prediction loss (section 2.3): Huber (delta 1, mean over the features) between each target and the
    prediction that the cheapest matching gives it, summed over the set, averaged over the batch.

    pred [B, K, F], target [B, M, F] -> scalar. Padding (rows of zeros) is matched and costs like any target;
    predictions in excess are free."""
    cost = F.huber_loss(*torch.broadcast_tensors(pred[:, None], target[:, :, None]), reduction="none").mean(dim=3)
    rows, cols = minimum_cost_matching(cost)                                  # cost [B, M, K]; both [B, min(M, K)]
    return cost[torch.arange(len(cost), device=cost.device)[:, None], rows, cols].sum(dim=1).mean()


def average_precision_clevr(pred, target, distance_threshold=math.inf):
    """Average precision of predicted CLEVR objects (section 4.2), over a whole evaluation set at once.

    pred [B, K, 19], target [B, M, 19] (see SlotAttentionClassifier); distance_threshold in CLEVR's units (coordinates
    from -3 to 3). -> float, NaN without real objects. In order of falling confidence (the last feature) each prediction
    takes the nearest real object of its image with equal size, material, shape and colour: a hit, if it is nearer than
    the threshold and not taken before. There is no second choice."""
    same = target[:, None, :, 18] > 0.5                                       # [B, 1, M], real objects
    for start, end in ((3, 5), (5, 7), (7, 10), (10, 18)):                    # of equal size, material, shape, colour
        same = same & (pred[:, :, None, start:end].argmax(-1) == target[:, None, :, start:end].argmax(-1))  # [B, K, M]
    distance = 6 * (pred[:, :, None, :3] - target[:, None, :, :3]).norm(dim=-1)
    distance, nearest = torch.where(same, distance, math.inf).min(dim=2)      # [B, K]

    order = pred[..., 18].flatten().argsort(descending=True, stable=True)     # all predictions of all images, [B * K]
    objects = nearest + target.shape[1] * torch.arange(len(pred), device=pred.device)[:, None]
    objects, close = objects.flatten()[order], (distance < distance_threshold).flatten()[order]
    rank = torch.arange(len(order), device=pred.device)
    taken_by = torch.full((len(pred) * target.shape[1],), len(order), device=pred.device)   # the first rank, if any
    taken_by.scatter_reduce_(0, objects[close], rank[close], "amin")
    hits = (close & (taken_by[objects] == rank)).double().cumsum(0)

    recall = hits / (target[..., 18] > 0.5).sum()
    precision = (hits / (rank + 1)).flip(0).cummax(0).values.flip(0)          # the best at this or a higher recall
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

MODELS = {"object_discovery": SlotAttentionAutoEncoder, "set_prediction": SlotAttentionClassifier}


def build_model(config):
    """The model of config["task"], with those values of the mapping that its constructor takes."""
    model = MODELS[config["task"]]
    return model(**{key: config[key] for key in inspect.signature(model).parameters if key in config})


def load_model(checkpoint):
    """The model of a run's checkpoint or of a file of weights, a mapping with "config" and "model" as data.read_file
    returns it. Raises ValueError for anything else."""
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]                           # PyTorch's has many lines
        raise ValueError(f"no checkpoint of this project, or damaged ({type(error).__name__}: {reason})") from None
    return model


def load_official_weights(model, variables):
    """Loads the official TensorFlow variables into a SlotAttentionAutoEncoder or SlotAttentionClassifier.

    variables: a mapping from the checkpoint's keys ("network/layer_with_weights-0/slot_attention/slots_mu/.ATTRIBUTES/
    VARIABLE_VALUE", or the part "slot_attention/slots_mu") to arrays: data.read_tf_checkpoint's, or an open .npz file.
    Raises ValueError, and leaves the model as it was, if a variable is missing, in excess or of another shape."""
    keys = {key.removeprefix("network/layer_with_weights-0/").removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): key
            for key in variables}
    arrays = {name: np.asarray(variables[key]) for name, key in keys.items()
              if "/" in name and "optimizer" not in name.lower()}
    state, used = {}, set()
    for name, parameter in model.named_parameters():
        layer, kind = name.rsplit(".", 1)
        # encoder.cnn.2 -> encoder_cnn/layer_with_weights-1; encoder.mlp.0 -> mlp/layer_with_weights-0
        path = re.sub(r"\.(\d+)$", lambda match: f"/layer_with_weights-{int(match[1]) // 2}", layer)
        path = re.sub(r"^(encoder|decoder)\.(cnn|pos)", r"\1_\2", path).removeprefix("encoder.").replace(".", "/")
        keras = {"weight": "kernel", "weight_ih": "kernel", "weight_hh": "recurrent_kernel", "bias_ih": "bias",
                 "bias_hh": "bias"}
        if isinstance(model.get_submodule(layer), nn.LayerNorm):
            keras = {"weight": "gamma", "bias": "beta"}
        official = f"{path}/{keras.get(kind, kind)}"
        if official not in arrays:
            raise ValueError(f"the official weights have no {official}: they are of another model")
        array = arrays[official]
        if kind in ("bias_ih", "bias_hh"):
            array = array[("bias_ih", "bias_hh").index(kind)]
        if path.endswith("gru"):
            z, r, h = np.split(array, 3, axis=-1)                             # Keras' gates, in the last axis
            array = np.concatenate([r, z, h], axis=-1).T                      # PyTorch's, in the first
        elif kind == "weight" and array.ndim == 2:
            array = array.T
        elif array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)                               # [k, k, in, out] -> [out, in, k, k]
            if layer.startswith("decoder") and isinstance(model.get_submodule(layer), Conv2dSame):
                array = array.swapaxes(0, 1)[:, :, ::-1, ::-1]                # transposed there, not so here
        if array.shape != parameter.shape:
            raise ValueError(f"the official {official} does not fit {name}: it is of another model")
        state[name] = torch.tensor(np.ascontiguousarray(array))
        used.add(official)
    if arrays.keys() - used:
        raise ValueError(f"the model has no {min(arrays.keys() - used)}: the official weights are of another model")
    model.load_state_dict(state)
