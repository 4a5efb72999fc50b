"""Slot Attention in PyTorch. It computes what the official TensorFlow code computes.

"Object-Centric Learning with Slot Attention", Locatello et al., NeurIPS 2020, https://arxiv.org/abs/2006.15055.
Section, equation and algorithm numbers below are those of the paper. Shapes are written in its symbols:

    B  images in a batch    N  input features, h * w of the encoder's grid      D  size of a slot (D_in: of an input)
    K  slots                T  iterations of attention                          H, W  size of an image (h, w: of a grid)

Contents: SlotAttention (Algorithm 1), the two models (2.2, 2.3), the layers they are made of, losses and metrics, the
official weights.
"""

import functools
import math
import re
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Slot Attention (section 2.1)
# ---------------------------------------------------------------------------------------------------------------------


LayerNorm = functools.partial(nn.LayerNorm, eps=1e-3)  # Keras' epsilon


class SlotAttention(nn.Module):
    """The Slot Attention module (section 2.1, Algorithm 1). No parameter depends on K or T: both can change at call
    time.

    num_slots: K. dim: D, the size of a slot. num_iterations: T. inputs_dim: the inputs' size, D if not given.
    implicit: the one-step gradient (Chang, Griffiths, Levine, 2022). T iterations without gradient, to come near a
        fixed point, then one more with it, in the memory of one. The gradient of that step's input is passed unchanged
        to the initial slots (straight through; Jia, Liu, Huang, 2023), so that mu and sigma still learn.
    learned_queries: each slot has a mu of its own (Jia, Liu, Huang). Slots beyond num_slots start from the first ones'.
    """

    def __init__(self, num_slots, dim, num_iterations=3, mlp_hidden_size=128, inputs_dim=None, eps=1e-8,
                 implicit=False, learned_queries=False):
        super().__init__()
        check_sizes(num_slots=num_slots, dim=dim, num_iterations=num_iterations, mlp_hidden_size=mlp_hidden_size)
        self.num_slots, self.dim, self.num_iterations = num_slots, dim, num_iterations
        self.eps, self.implicit = eps, implicit
        inputs_dim = inputs_dim or dim

        self.norm_inputs = LayerNorm(inputs_dim)
        self.norm_slots = LayerNorm(dim)
        self.norm_mlp = LayerNorm(dim)

        self.slots_mu = nn.Parameter(torch.empty(1, num_slots if learned_queries else 1, dim))  # 1: shared by all slots
        self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, dim))

        self.project_q = nn.Linear(dim, dim, bias=False)
        self.project_k = nn.Linear(inputs_dim, dim, bias=False)
        self.project_v = nn.Linear(inputs_dim, dim, bias=False)

        self.gru = nn.GRUCell(dim, dim)
        self.mlp = mlp(dim, mlp_hidden_size, dim)
        self.apply(keras_init)

    def init_slots(self, noise):
        """Standard normal noise [B, K, D] -> initial slots [B, K, D] ~ N(mu, sigma)."""
        mu = self.slots_mu.repeat(1, noise.shape[1], 1)[:, :noise.shape[1]]   # [1, K, D]
        return mu + self.slots_log_sigma.exp() * noise

    def iterate(self, slots, k, v):
        """One iteration of Algorithm 1: slots [B, K, D], k and v [B, N, D] -> slots, attn [B, K, N]."""
        slots_prev = slots
        q = self.project_q(self.norm_slots(slots)) * self.dim ** -0.5         # [B, K, D]

        attn = (q @ k.transpose(1, 2)).softmax(dim=1)                         # [B, K, N]; eq. 1: the slots compete
        weights = attn + self.eps
        weights = weights / weights.sum(dim=2, keepdim=True)                  # eq. 2: weighted mean over the inputs
        updates = weights @ v                                                 # [B, K, D]

        slots = self.gru(updates.flatten(0, 1), slots_prev.flatten(0, 1)).view_as(slots_prev)
        slots = slots + self.mlp(self.norm_mlp(slots))                        # [B, K, D]
        return slots, attn

    def forward(self, inputs, slots=None, num_slots=None, num_iterations=None):
        """inputs [B, N, D_in]; slots [B, K, D]: the initial ones, drawn at random if not given, num_slots of them.
        -> slots [B, K, D] and the attention of every iteration, attn [B, T, K, N] (T + 1 with `implicit`): the softmax
        over the slots, before it is normalised over the inputs."""
        inputs = self.norm_inputs(inputs)                                     # [B, N, D_in]
        k, v = self.project_k(inputs), self.project_v(inputs)                 # [B, N, D]
        if slots is None:
            shape = len(k), num_slots or self.num_slots, self.dim
            slots = self.init_slots(torch.randn(shape, device=k.device, dtype=self.slots_mu.dtype))
        num_iterations = self.num_iterations if num_iterations is None else num_iterations

        attns = []
        with torch.autocast(k.device.type, enabled=False):                    # the iterations stay in float32
            k, v = k.to(slots.dtype), v.to(slots.dtype)
            if self.implicit:
                init, slots = slots, slots.detach()
                with torch.no_grad():
                    for _ in range(num_iterations):
                        slots, attn = self.iterate(slots, k, v)
                        attns.append(attn)
                slots = slots + (init - init.detach())                        # straight through
                num_iterations = 1                                            # the one with gradient
            for _ in range(num_iterations):
                slots, attn = self.iterate(slots, k, v)
                attns.append(attn)
        return slots, torch.stack(attns, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The models of sections 2.2 and 2.3
# ---------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """CNN, position embedding, LayerNorm, MLP (appendix E): image [B, 3, H, W] -> features [B, N, D_in], N = h * w.

    resolution: (H, W). strides: one 5x5 convolution each. grid_size: (h, w), what the strides leave of (H, W)."""

    def __init__(self, resolution, channels, strides, dim_out):
        super().__init__()
        check_sizes(resolution=resolution, encoder_channels=channels, encoder_strides=strides, dim_out=dim_out)
        layers, dim_in, self.grid_size = [], 3, resolution
        for stride in strides:
            layers += [Conv2dSame(dim_in, channels, 5, stride), nn.ReLU()]
            dim_in, self.grid_size = channels, tuple(math.ceil(size / stride) for size in self.grid_size)
        self.cnn = nn.Sequential(*layers)
        self.pos = SoftPositionEmbed(channels, self.grid_size)
        self.layer_norm = LayerNorm(channels)
        self.mlp = mlp(channels, dim_out, dim_out)

    def forward(self, image):
        x = self.cnn(image)                                                   # [B, C, h, w]
        x = self.pos(x.permute(0, 2, 3, 1))                                   # [B, h, w, C]
        return self.mlp(self.layer_norm(x.flatten(1, 2)))                     # [B, N, D_in]


class Decoder(nn.Module):
    """Spatial broadcast decoder (section 2.2, appendix E): each slot alone is copied to every cell of a grid, gets a
    position embedding, and is decoded to an RGB picture and a mask logit: slots [M, D] -> [M, 4, H, W], M = B * K.

    strides: one transposed convolution each, then a 3x3 one to the 4 channels. At stride 1 a transposed convolution is
    a convolution with the kernel flipped, so that is what stands here. pixel_shuffle r: all layers work at 1/r of the
    resolution, and each cell of the last becomes r x r pixels (not in the paper; fast on CPUs)."""

    def __init__(self, resolution, dim, channels, strides, kernel_size=5, pixel_shuffle=1):
        super().__init__()
        check_sizes(resolution=resolution, slot_dim=dim, decoder_channels=channels, decoder_strides=strides,
                    decoder_kernel=kernel_size, pixel_shuffle=pixel_shuffle)
        if kernel_size % 2 == 0 or kernel_size < max(strides):                # no symmetric, or negative, padding
            raise ValueError(f"decoder_kernel must be odd and no less than the strides {strides}; got {kernel_size}")
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

        same_cut = None                                                       # for first_layer
        if strides[0] == 1 and min(self.grid_size) >= kernel_size:
            def cut(size):  # a number from 0 to k - 1 for how the border cuts the kernel at each place
                place, half = torch.arange(size), kernel_size // 2
                return place.clamp(max=half) + (place - (size - 1 - half)).clamp(min=0)
            rows, cols = map(cut, self.grid_size)
            same_cut = F.one_hot((rows[:, None] * kernel_size + cols).flatten(), kernel_size ** 2).float()
        self.register_buffer("same_cut", same_cut, persistent=False)          # [h * w, k * k]

    def forward(self, slots):
        x = self.first_layer(slots)                                           # [M, C, h, w]
        for layer in list(self.cnn)[1:]:
            x = layer(x)
        return x[:, :, :self.resolution[0], :self.resolution[1]]              # [M, 4, H, W]

    def broadcast(self, slots):
        """slots [M, D] -> [M, D, h, w]: each on every cell of the grid, with the position embedding."""
        return self.pos(slots[:, None, None, :].expand(-1, *self.grid_size, -1)).permute(0, 3, 1, 2)

    def first_layer(self, slots):
        """The first convolution of the broadcast slots: conv(broadcast(slots)), but at stride 1 with less work.

        A convolution is linear: conv(slot + position) = conv(slot) + conv(position). The second is the same for all
        slots. The first is constant but near the border, where it depends on how many rows and columns of the kernel
        the zero padding cuts off. A k x k map shows each case once, and is copied to all places of the same cut: by a
        product with zeros and ones, whose gradient is faster than that of an index."""
        conv = self.cnn[0]
        if self.same_cut is None:
            return conv(self.broadcast(slots))                                # [M, C, h, w]
        k = conv.kernel_size[0]
        x = conv(slots[:, :, None, None].expand(-1, -1, k, k))                # [M, C, k, k]
        x = self.same_cut @ x.permute(0, 2, 3, 1).flatten(1, 2)               # [M, h * w, C]
        x = x.unflatten(1, self.grid_size).permute(0, 3, 1, 2)                # [M, C, h, w]
        position = self.broadcast(torch.zeros_like(slots[:1]))                # [1, D, h, w]
        return x + F.conv2d(position, conv.weight, padding=k // 2)


class Decomposition(NamedTuple):
    """What the auto-encoder returns. Pictures on the images' scale, not clipped; masks sum to 1 over the slots."""

    recon_combined: torch.Tensor  # [B, 3, H, W]
    recons: torch.Tensor          # [B, K, 3, H, W]
    masks: torch.Tensor           # [B, K, 1, H, W]
    slots: torch.Tensor           # [B, K, D]
    attn: torch.Tensor            # [B, T, K, h, w], see SlotAttention


class SlotAttentionAutoEncoder(nn.Module):
    """Object discovery (section 2.2): image -> slots -> one picture and mask per slot -> their sum.

    The defaults are the paper's CLEVR6 model (resolution 128; 890,308 parameters with any K). For Multi-dSprites (64)
    and Tetrominoes (35): encoder_channels=32, decoder_channels=32, decoder_strides=(1, 1, 1).
    resolution: (H, W), or one number for both. Raises ValueError for sizes that make no model."""

    def __init__(self, resolution, num_slots, num_iterations=3, slot_dim=64, mlp_hidden_size=128, implicit=False,
                 learned_queries=False, encoder_channels=64, encoder_strides=(1, 1, 1, 1),
                 decoder_channels=64, decoder_strides=(2, 2, 2, 2, 1), decoder_kernel=5, pixel_shuffle=1):
        super().__init__()
        resolution = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, dim_out=slot_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size, implicit=implicit,
                                            learned_queries=learned_queries)
        self.decoder = Decoder(resolution, slot_dim, decoder_channels, decoder_strides, decoder_kernel, pixel_shuffle)
        self.apply(keras_init)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """image [B, 3, H, W] in [-1, 1]; initial slots [B, K, D], K and T may be given -> Decomposition."""
        x = self.encoder(image)                                               # [B, N, D_in]
        slots, attn = self.slot_attention(x, slots, num_slots, num_iterations)
        return Decomposition(*self.decode(slots), slots, attn.unflatten(-1, self.encoder.grid_size))

    def decode(self, slots):
        """slots [B, K, D] -> recon_combined [B, 3, H, W], recons [B, K, 3, H, W], masks [B, K, 1, H, W]."""
        x = self.decoder(slots.flatten(0, 1)).unflatten(0, slots.shape[:2])   # [B, K, 4, H, W]
        recons, masks = x.to(slots.dtype).split([3, 1], dim=2)
        masks = masks.softmax(dim=1)                                          # over the slots
        return (recons * masks).sum(dim=1), recons, masks


class SetPrediction(NamedTuple):
    predictions: torch.Tensor  # [B, K, 19] in [0, 1]
    slots: torch.Tensor        # [B, K, D]
    attn: torch.Tensor         # [B, T, K, h, w]


class SlotAttentionClassifier(nn.Module):
    """Set prediction (section 2.3): image -> slots -> the properties of one object per slot.

    The defaults are the paper's CLEVR10 model (resolution 128, K = 10; 380,755 parameters). A prediction is:
    coordinates (3, as (3d_coords + 3) / 6), size (2), material (2), shape (3), colour (8), real object or padding
    (1)."""

    def __init__(self, resolution, num_slots, num_iterations=3, slot_dim=64, mlp_hidden_size=128, implicit=False,
                 learned_queries=False, encoder_channels=64, encoder_strides=(1, 2, 2, 1), num_outputs=19):
        super().__init__()
        resolution = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, dim_out=slot_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size, implicit=implicit,
                                            learned_queries=learned_queries)
        self.mlp_classifier = mlp(slot_dim, slot_dim, num_outputs)
        self.apply(keras_init)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """image [B, 3, H, W] in [-1, 1]; initial slots [B, K, D], K and T may be given -> SetPrediction."""
        x = self.encoder(image)                                               # [B, N, D_in]
        slots, attn = self.slot_attention(x, slots, num_slots, num_iterations)
        predictions = self.mlp_classifier(slots).to(slots.dtype).sigmoid()            # [B, K, 19]
        return SetPrediction(predictions, slots, attn.unflatten(-1, self.encoder.grid_size))


def check_sizes(**sizes):
    """Raises ValueError unless every size is a positive whole number, or a tuple of some."""
    for name, size in sizes.items():
        numbers = size if isinstance(size, (tuple, list)) else (size,)
        if not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"{name} must be positive, in whole numbers; got {size}")


# ---------------------------------------------------------------------------------------------------------------------
# Layers as Keras has them. PyTorch's defaults differ in padding, initialisation and epsilon: the usual way for a port
# to be silently wrong.
# ---------------------------------------------------------------------------------------------------------------------


class Conv2dSame(nn.Conv2d):
    """Conv2d with TensorFlow's "SAME" padding: the output has ceil(size / stride) rows and columns. An odd pixel of
    padding goes below and to the right. [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]."""

    def forward(self, x):
        pads = []
        for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = pads
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, self.weight, self.bias, self.stride, (top, left))


class ConvTranspose2dSame(nn.ConvTranspose2d):
    """ConvTranspose2d aligned as in TensorFlow "SAME": [B, C_in, H, W] -> [B, C_out, stride * H, stride * W].
    PyTorch's usual `padding=2, output_padding=1` (5x5, stride 2) gives the same map shifted by one pixel.
    Where the size asks for an odd padding, a row and column of zeros before the kernel make it even: cheaper than to
    cut the output. The bias is added apart: its gradient inside the layer takes longer than all the rest (oneDNN)."""

    def forward(self, x):
        odd = (self.kernel_size[0] - self.stride[0]) % 2
        weight = F.pad(self.weight, (odd, 0, odd, 0)) if odd else self.weight
        x = F.conv_transpose2d(x, weight, None, self.stride, padding=(weight.shape[-1] - self.stride[0]) // 2)
        return x + self.bias.to(x.dtype).view(-1, 1, 1)


class SoftPositionEmbed(nn.Module):
    """Adds a learned linear map of each position's distances to the four borders (appendix E).

    x [B, h, w, C] -> [B, h, w, C]"""

    def __init__(self, hidden_size, resolution):
        super().__init__()
        self.dense = nn.Linear(4, hidden_size)
        self.register_buffer("grid", build_grid(resolution), persistent=False)

    def forward(self, x):
        return x + self.dense(self.grid).to(x.dtype)


def build_grid(resolution):
    """(h, w) -> [1, h, w, 4]: row, column, 1 - row, 1 - column, each from 0 to 1 inclusive."""
    rows, cols = torch.meshgrid(*(torch.linspace(0, 1, size) for size in resolution), indexing="ij")
    grid = torch.stack([rows, cols], dim=-1)
    return torch.cat([grid, 1 - grid], dim=-1)[None]


def mlp(dim_in, dim_hidden, dim_out):
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim_out))


def keras_init(module):
    """Keras' default initialisation, for `Module.apply`: Glorot-uniform, recurrent kernels orthogonal, biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GRUCell):
        nn.init.xavier_uniform_(module.weight_ih)  # over the three gates as one matrix
        nn.init.orthogonal_(module.weight_hh)
        nn.init.zeros_(module.bias_ih)
        nn.init.zeros_(module.bias_hh)
    elif isinstance(module, SlotAttention):
        limit = math.sqrt(6 / (1 + module.dim))  # Glorot of a [1, 1, D] variable, with Keras' fans 1 and D
        nn.init.uniform_(module.slots_mu, -limit, limit)
        nn.init.uniform_(module.slots_log_sigma, -limit, limit)
        if module.slots_mu.shape[1] > 1:  # learned queries start apart, by more than the noise
            nn.init.normal_(module.slots_mu)
            nn.init.constant_(module.slots_log_sigma, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------------------------------


def adjusted_rand_index(true_mask, pred_mask):
    """Adjusted Rand index of two segmentations (section 4.1), as DeepMind's multi_object_datasets computes it.

    true_mask [B, P, Gt]: one-hot, 0/1 or 0/255; points (pixels) of all zeros are ignored, so drop the background's
    group for FG-ARI. pred_mask [B, P, Gp]: any scores; a point belongs to the largest. -> [B], 1 = equal, 0 = chance.
    Where DeepMind's code gives NaN (0/0: at most one object, all in one predicted group; fewer than two points), this
    gives 1, since the two groupings are equal there."""
    groups = true_mask.shape[2], pred_mask.shape[2]
    cell = true_mask.argmax(dim=2) * groups[1] + pred_mask.argmax(dim=2)                 # [B, P], of the table n_ij
    n_ij = torch.zeros(len(cell), groups[0] * groups[1], dtype=torch.int64, device=cell.device)
    n_ij.scatter_add_(1, cell, (true_mask > 0).any(dim=2).long())
    n_ij = n_ij.view(-1, *groups)                                                        # [B, Gt, Gp]
    a, b, n = n_ij.sum(dim=2), n_ij.sum(dim=1), n_ij.sum(dim=(1, 2))
    together = (n_ij * (n_ij - 1)).sum(dim=(1, 2)).float()           # ordered pairs of points that share both groups,
    a_pairs, b_pairs = (a * (a - 1)).sum(dim=1).float(), (b * (b - 1)).sum(dim=1).float()  # the true, the predicted one
    expected = a_pairs * (b_pairs / (n * (n - 1)).clamp(min=1))
    maximum = (a_pairs + b_pairs) / 2
    return torch.where(maximum == expected, 1.0, (together - expected) / (maximum - expected))


def minimum_cost_matching(cost):
    """The exact minimum-cost assignment, as scipy.optimize.linear_sum_assignment but for a whole batch and on its
    device.

    cost [B, n, m] -> rows, cols [B, min(n, m)], rows in ascending order. A dynamic programme over the subsets of the
    larger side: best[S] is the least cost of giving the first |S| rows the columns S. Work and memory grow as
    2^max(n, m): made for some ten slots. Between equal costs any may be returned. Raises ValueError above 16."""
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
        subsets, members = subsets_of(m, row + 1, cost.device)                                 # [L], [L, row + 1]
        options = best[subsets[:, None] - (1 << members)] + cost[row, members]                 # [L, row + 1, B]
        best[subsets], chosen = options.min(dim=1)
        choice[subsets] = members.gather(1, chosen)
    subset = subsets[best[subsets].argmin(dim=0)]                             # [B]: of n columns, the cheapest
    cols = []
    for row in range(n):                                                      # from the last row back to the first
        cols.append(choice.gather(0, subset[None])[0])
        subset = subset - (1 << cols[-1])
    cols = torch.stack(cols[::-1], dim=1)
    return torch.arange(n, device=cost.device).expand_as(cols), cols


@functools.lru_cache(maxsize=64)  # to copy it to a GPU anew would make each step wait
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

    pred [B, K, 19], target [B, M, 19] (see SlotAttentionClassifier); distance_threshold in CLEVR's units of length
    (coordinates from -3 to 3); infinite or, as in the official code, -1: none. -> float.
    In the order of falling confidence (the last feature; of equals the first) each prediction takes the nearest real
    object of its image with equal size, material, shape and colour: a hit, if it is nearer than the threshold and not
    taken before. There is no second choice. NaN if there are no real objects."""
    threshold = math.inf if distance_threshold < 0 else distance_threshold
    same = target[:, None, :, 18] > 0.5                                       # [B, 1, M], real objects, and of these
    for start, end in ((3, 5), (5, 7), (7, 10), (10, 18)):                    # its size, material, shape and colour
        same = same & (pred[:, :, None, start:end].argmax(-1) == target[:, None, :, start:end].argmax(-1))  # [B, K, M]
    distance = 6 * (pred[:, :, None, :3] - target[:, None, :, :3]).norm(dim=-1)
    distance, nearest = torch.where(same, distance, math.inf).min(dim=2)                       # [B, K]

    order = pred[..., 18].flatten().argsort(descending=True, stable=True)     # all predictions of all images, [B * K]
    objects = nearest + target.shape[1] * torch.arange(len(pred), device=pred.device)[:, None]
    objects, close = objects.flatten()[order], (distance < threshold).flatten()[order]
    rank = torch.arange(len(order), device=pred.device)
    taken_by = torch.full((len(pred) * target.shape[1],), len(order), device=pred.device)      # the first rank, if any
    taken_by.scatter_reduce_(0, objects[close], rank[close], "amin")
    hits = (close & (taken_by[objects] == rank)).double().cumsum(0)

    recall = hits / (target[..., 18] > 0.5).sum()
    precision = (hits / (rank + 1)).flip(0).cummax(0).values.flip(0)          # the best at this or a higher recall
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


# ---------------------------------------------------------------------------------------------------------------------
# Official weights (google-research/google-research, slot_attention/README.md says where they are)
# ---------------------------------------------------------------------------------------------------------------------


def load_official_weights(model, variables):
    """Loads the official TensorFlow checkpoint's variables into a SlotAttentionAutoEncoder or SlotAttentionClassifier.

    variables: a mapping from the checkpoint's keys ("network/layer_with_weights-0/slot_attention/slots_mu/.ATTRIBUTES/
    VARIABLE_VALUE", or only the part "slot_attention/slots_mu") to arrays, or the path to an .npz file of it, or the
    prefix of a TensorFlow checkpoint ("object_discovery/ckpt-500", for ckpt-500.index and
    ckpt-500.data-00000-of-00001). Raises ValueError, and leaves the model as it was, if a variable is missing, of
    another shape, or in excess (strides leave no trace in the variables: whether those are right cannot be seen)."""
    if isinstance(variables, (str, Path)):
        variables = read_npz(variables) if str(variables).endswith(".npz") else read_tf_checkpoint(variables)
    keys = {key.removeprefix("network/layer_with_weights-0/").removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): key
            for key in variables}
    state, taken = model.state_dict(), set()

    def take(ours, theirs, convert=lambda array: array):
        if theirs not in keys:
            raise ValueError(f"the official weights have no {theirs}: they are of another model")
        array = torch.tensor(np.ascontiguousarray(convert(variables[keys[theirs]])))
        if array.shape != state[ours].shape:
            raise ValueError(f"the official {theirs} gives {tuple(array.shape)} for {ours} {tuple(state[ours].shape)}: "
                             "it is of another model")
        state[ours] = array
        taken.add(theirs)

    def gates(array):  # Keras: z, r, h in the last axis; PyTorch: r, z, n in the first
        z, r, h = np.split(np.asarray(array), 3, axis=-1)
        return np.concatenate([r, z, h], axis=-1).T

    for name, module in model.named_modules():
        # encoder.cnn.2 -> encoder_cnn/layer_with_weights-1; encoder.mlp.0 -> mlp/layer_with_weights-0
        path = re.sub(r"\.(\d+)$", lambda m: f"/layer_with_weights-{int(m[1]) // 2}", name)
        path = re.sub(r"^(encoder|decoder)\.(cnn|pos)", r"\1_\2", path).removeprefix("encoder.").replace(".", "/")
        if isinstance(module, SlotAttention):
            take(f"{name}.slots_mu", f"{path}/slots_mu")
            take(f"{name}.slots_log_sigma", f"{path}/slots_log_sigma")
        elif isinstance(module, nn.GRUCell):
            take(f"{name}.weight_ih", f"{path}/kernel", gates)
            take(f"{name}.weight_hh", f"{path}/recurrent_kernel", gates)
            take(f"{name}.bias_ih", f"{path}/bias", lambda array: gates(array[0]))
            take(f"{name}.bias_hh", f"{path}/bias", lambda array: gates(array[1]))
        elif isinstance(module, nn.LayerNorm):
            take(f"{name}.weight", f"{path}/gamma")
            take(f"{name}.bias", f"{path}/beta")
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            if isinstance(module, nn.Linear):
                convert = np.transpose                                        # [in, out] -> [out, in]
            elif path.startswith("decoder") and isinstance(module, nn.Conv2d):
                convert = lambda a: np.transpose(a[::-1, ::-1], (2, 3, 0, 1))  # noqa: E731  a transposed one's, flipped
            else:  # [k, k, in, out] -> [out, in, k, k]; a transposed one's: [k, k, out, in] -> [in, out, k, k]
                convert = lambda a: np.transpose(a, (3, 2, 0, 1))              # noqa: E731
            take(f"{name}.weight", f"{path}/kernel", convert)
            if module.bias is not None:
                take(f"{name}.bias", f"{path}/bias")
    excess = [key for key in keys if "/" in key and key not in taken and "optimizer" not in key.lower()]
    if excess:
        raise ValueError(f"the model has no {excess[0]}: the official weights are of another model")
    model.load_state_dict(state)


def read_npz(path):
    """{key: array}. No code in the file is run. Raises OSError or ValueError."""
    try:
        with np.load(path) as file:
            if not file.files:  # of a damaged directory
                raise ValueError
            return dict(file)
    except Exception as error:  # numpy has many ways to say it: zip, zlib, key, type, memory and end-of-file errors
        if isinstance(error, OSError) and error.filename:  # missing, or not to be read
            raise
        raise ValueError(f"{path} is damaged or no .npz file ({type(error).__name__})") from None


def read_tf_checkpoint(prefix):
    """{key: float32 array} of a TensorFlow 2 checkpoint of one shard, without TensorFlow.

    PREFIX.index is a LevelDB table, uncompressed, of BundleEntry messages
    (tensorflow/core/protobuf/tensor_bundle.proto) that say where in PREFIX.data-00000-of-00001 each array lies. Every
    checksum is checked. Raises OSError for a missing file, ValueError for a damaged one."""
    index, data = Path(f"{prefix}.index").read_bytes(), Path(f"{prefix}.data-00000-of-00001").read_bytes()

    def checked(buffer, crc, what):
        crc = (int.from_bytes(crc, "little") - 0xA282EAD8) & 0xFFFFFFFF       # the format stores checksums "masked"
        if crc32c(buffer) != (crc >> 17 | crc << 15) & 0xFFFFFFFF:
            raise ValueError(f"the checksum of {what} is wrong")
        return buffer

    def block(offset, size):
        """The (key, value) pairs of one block: of each key what differs from the key before is stored."""
        buffer = checked(index[offset:offset + size + 1], index[offset + size + 1:offset + size + 5], "a block")
        if buffer[-1] != 0:
            raise ValueError("its blocks are compressed, which this reader does not know")
        pos, key, end = 0, b"", size - 4 - 4 * int.from_bytes(buffer[size - 4:size], "little")
        while pos < end:
            (shared, unshared, length), pos = varints(buffer, 3, pos)
            key = key[:shared] + buffer[pos:pos + unshared]
            yield key.decode(), buffer[pos + unshared:pos + unshared + length]
            pos += unshared + length

    arrays = {}
    try:
        if len(index) < 48 or index[-8:] != bytes.fromhex("57fb808b247547db"):
            raise ValueError("it is not a TensorFlow checkpoint's index, or is cut short")
        places, _ = varints(index[-48:], 4)                                   # the metaindex block's, the index block's
        for _, place in block(*places[2:]):
            for key, value in block(*varints(place, 2)[0]):
                entry = protobuf(value)
                if key and entry.get(1) == [1]:                               # "" is the header; dtype 1 is float32
                    shape = [protobuf(dim).get(1, [0])[0] for dim in protobuf(entry[2][0]).get(2, [])]
                    offset, size = entry.get(4, [0])[0], entry[5][0]
                    array = checked(data[offset:offset + size], entry[6][0], key)
                    arrays[key] = np.frombuffer(array, "<f4").reshape(shape)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{prefix}.index: damaged or not a checkpoint ({error})") from None
    return arrays


def varints(buffer, count, pos=0):
    """So many of protobuf's variable-length numbers, from a position on -> [numbers], the position after them."""
    numbers = []
    for _ in range(count):
        number = shift = 0
        while shift < 70:  # ten bytes make 64 bits
            byte = buffer[pos]
            number |= (byte & 127) << shift
            pos, shift = pos + 1, shift + 7
            if byte < 128:
                break
        else:
            raise ValueError("a number has no end")
        numbers.append(number)
    return numbers, pos


def protobuf(buffer):
    """A protobuf message -> {field: [values]}: numbers, or bytes still to be decoded."""
    fields, pos = {}, 0
    while pos < len(buffer):
        (tag,), pos = varints(buffer, 1, pos)
        if tag & 7 == 0:
            (value,), pos = varints(buffer, 1, pos)
        else:
            length = {1: 8, 5: 4}.get(tag & 7)
            if length is None:
                (length,), pos = varints(buffer, 1, pos)
            value, pos = buffer[pos:pos + length], pos + length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def crc32c(buffer):
    crc = 0xFFFFFFFF
    for byte in buffer:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ 0x82F63B78 * (crc & 1) for crc in CRC_TABLE]

