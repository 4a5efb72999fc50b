"""Slot Attention in PyTorch: "Object-Centric Learning with Slot Attention", Locatello et al., NeurIPS 2020.

By default outputs, losses and gradients equal those of the official TensorFlow code. Section and equation numbers, and
the symbols in shapes, are the paper's, https://arxiv.org/abs/2006.15055:

    B  images in a batch    N  input features, h * w of the encoder's grid   D  size of a slot (D_in: of an input)
    K  slots                T  iterations of attention                       H, W  size of an image (h, w: of a grid)"""

import functools
import inspect
import math
import re
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Slot Attention (section 2.1) ------------------------------------------------------------------------------------


class SlotAttention(nn.Module):
    """Slot Attention (Algorithm 1). A call can change K and T.

    num_slots: K. dim: D. num_iterations: T. inputs_dim: D_in, D if not given.
    implicit: the gradient is that of the last iteration alone (Chang et al., 2022), and passes straight through it to
        the initial slots (Jia et al., 2023). learned_queries: each slot has a mean of its own (Jia et al., 2023).
    query_scale: a factor of the queries' initial weights, 1 in the paper. At 3 attention starts sharper, and fewer runs
        share out the picture by place, in strips."""

    def __init__(self, num_slots, dim, num_iterations=3, mlp_hidden_size=128, inputs_dim=None, eps=1e-8,
                 implicit=False, learned_queries=False, query_scale=1.0):
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
        self.project_q.weight.data *= query_scale
        limit = (6 / (1 + dim)) ** 0.5                                        # Glorot's for Keras' shape [1, 1, D]
        nn.init.uniform_(self.slots_log_sigma, -limit, limit)
        nn.init.uniform_(self.slots_mu, -limit, limit)
        if learned_queries:                                                   # means further apart than their noise
            nn.init.normal_(self.slots_mu)
            nn.init.constant_(self.slots_log_sigma, -1)

    def init_slots(self, noise):
        """Standard normal noise [B, K, D] -> initial slots [B, K, D] ~ N(mu, sigma)."""
        mu = self.slots_mu.repeat(1, noise.shape[1], 1)[:, :noise.shape[1]]   # [1, K, D]: one mean, or a few, repeated
        return mu + self.slots_log_sigma.exp() * noise

    def forward(self, inputs, slots=None, num_slots=None, num_iterations=None):
        """inputs [B, N, D_in], initial slots [B, K, D] (random if not given) -> slots [B, K, D], attn [B, T, K, N],
        which is each iteration's softmax over the slots, before it is normalised over the inputs."""
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
                    slots = slots.detach() + (init - init.detach())           # value: slots; gradient: straight to init
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


# --- The models (sections 2.2 and 2.3) -------------------------------------------------------------------------------


class Decomposition(NamedTuple):
    """Images taken apart. Pictures have the images' range, [-1, 1], unclipped; masks sum to 1 over the slots."""
    recon_combined: torch.Tensor  # [B, 3, H, W]
    recons: torch.Tensor          # [B, K, 3, H, W]
    masks: torch.Tensor           # [B, K, 1, H, W]
    slots: torch.Tensor           # [B, K, D]
    attn: torch.Tensor            # [B, T, K, h, w]


class SlotAttentionAutoEncoder(nn.Module):
    """Object discovery (section 2.2): image -> slots -> a picture and a mask of each slot -> their sum.

    resolution: (H, W), or one number for both. The defaults are the paper's for CLEVR6 (128; 890,308 parameters); for
    Multi-dSprites (64) and Tetrominoes (35): encoder_channels=32, decoder_channels=32, decoder_strides=(1, 1, 1)."""

    def __init__(self, resolution, num_slots, num_iterations=3, slot_dim=64, mlp_hidden_size=128, implicit=False,
                 learned_queries=False, encoder_channels=64, encoder_strides=(1, 1, 1, 1), query_scale=1.0,
                 decoder_channels=64, decoder_strides=(2, 2, 2, 2, 1), decoder_kernel=5, pixel_shuffle=1):
        super().__init__()
        resolution = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, slot_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size, implicit=implicit,
                                            learned_queries=learned_queries, query_scale=query_scale)
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
                 learned_queries=False, encoder_channels=64, encoder_strides=(1, 2, 2, 1), query_scale=1.0):
        super().__init__()
        resolution = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, slot_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size, implicit=implicit,
                                            learned_queries=learned_queries, query_scale=query_scale)
        self.mlp_classifier = nn.Sequential(nn.Linear(slot_dim, slot_dim), nn.ReLU(), nn.Linear(slot_dim, 19))
        keras_init(self.mlp_classifier)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """image [B, 3, H, W] in [-1, 1]; initial slots [B, K, D], K and T may be given -> SetPrediction."""
        x = self.encoder(image)                                               # [B, N, D]
        slots, attn = self.slot_attention(x, slots, num_slots, num_iterations)
        predictions = self.mlp_classifier(slots).to(slots.dtype).sigmoid()    # [B, K, 19]
        return SetPrediction(predictions, slots, attn.unflatten(-1, self.encoder.grid_size))


# --- The layers of both models, as Keras has them: PyTorch's differ in padding, initialisation and epsilon -----------


class Encoder(nn.Module):
    """A CNN with a 5x5 convolution for each of the strides, position embedding, LayerNorm, MLP (appendix E):
    image [B, 3, H, W] -> features [B, N, D], N = h * w."""

    def __init__(self, resolution, channels, strides, dim):
        super().__init__()
        self.grid_size = tuple(math.ceil(size / math.prod(strides)) for size in resolution)
        layers = []
        for stride in strides:
            layers += [Conv2dSame(channels if layers else 3, channels, 5, stride), nn.ReLU()]
        self.cnn = nn.Sequential(*layers)
        self.pos = SoftPositionEmbed(channels, self.grid_size)
        self.layer_norm = nn.LayerNorm(channels, eps=1e-3)
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))
        keras_init(self)

    def forward(self, image):
        x = self.cnn(image.contiguous())       # [B, C, h, w], in the weights' memory format
        x = self.pos(x).flatten(2).transpose(1, 2)                            # [B, N, C]
        return self.mlp(self.layer_norm(x))                                   # [B, N, D]


class Decoder(nn.Module):
    """Spatial broadcast decoder (section 2.2, appendix E): slots [M, D] -> picture, mask logit [M, 4, H, W], M = B * K.
    Each slot alone is copied to every cell of a grid and gets a position embedding. strides: one transposed convolution
    each (at stride 1 that is a convolution with the kernel flipped), then a 3x3 one. pixel_shuffle r: each cell of the
    last map becomes r x r pixels (not in the paper; fast on CPUs)."""

    def __init__(self, resolution, dim, channels, strides, kernel_size=5, pixel_shuffle=1):
        super().__init__()
        self.resolution = resolution
        self.grid_size = tuple(math.ceil(size / (math.prod(strides) * pixel_shuffle)) for size in resolution)
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
        if isinstance(self.cnn[0], Conv2dSame):                               # stride 1: no need to broadcast
            x = self.cnn[1:](self.first_convolution(slots))
        else:
            x = self.cnn(self.pos(slots[:, :, None, None].expand(-1, -1, *self.grid_size)))
        return x[:, :, :self.resolution[0], :self.resolution[1]]              # [M, 4, H, W]

    def first_convolution(self, slots):
        """slots [M, D] -> cnn[0] of the broadcast slots [M, C, h, w]: conv(slot + position) = conv(slot) +
        conv(position). A slot is constant over the grid: conv(slot) is the slot times the kernel's taps in the grid."""
        conv, k = self.cnn[0], self.cnn[0].kernel_size[0]
        position = conv(self.pos(slots.new_zeros(1, slots.shape[1], *self.grid_size)))               # [1, C, h, w]
        inside = F.unfold(slots.new_ones(1, 1, *self.grid_size), k, padding=k // 2)[0].T  # [h * w, k * k]: tap inside?
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
        return y + self.bias.to(y.dtype).view(-1, 1, 1)                       # apart: oneDNN's bias gradient is slow


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


# --- Losses and metrics ----------------------------------------------------------------------------------------------


def adjusted_rand_index(true_mask, pred_mask):
    """Adjusted Rand index (section 4.1), as in DeepMind's multi_object_datasets but 1 where that is NaN (0/0).

    true_mask [B, P, Gt]: one-hot, 0/1 or 0/255; points (pixels) of all zeros are ignored, so drop the background's
    group for FG-ARI. pred_mask [B, P, Gp]: scores; a point belongs to the largest. -> [B], 1 = equal, 0 = chance."""
    n_ij = pred_mask.new_zeros(len(true_mask), true_mask.shape[2], pred_mask.shape[2], dtype=torch.int64)
    image = torch.arange(len(n_ij), device=n_ij.device)[:, None]
    counted = (true_mask > 0).any(dim=2).long()                               # [B, P]
    n_ij.index_put_((image, true_mask.argmax(dim=2), pred_mask.argmax(dim=2)), counted, accumulate=True)   # [B, Gt, Gp]
    counts = n_ij, n_ij.sum(dim=2), n_ij.sum(dim=1), n_ij.sum(dim=(1, 2))[:, None]
    # ordered pairs of points that share a group: in both segmentations, in the true, in the predicted; and all pairs
    both, true, pred, total = ((count * (count - 1)).flatten(1).sum(dim=1).float() for count in counts)  # [B]
    expected = true * (pred / total.clamp(min=1))
    maximum = (true + pred) / 2
    return torch.where(maximum == expected, 1.0, (both - expected) / (maximum - expected))


def minimum_cost_matching(cost):
    """scipy.optimize.linear_sum_assignment of a whole batch: cost [B, n, m] -> rows (ascending), cols [B, min(n, m)].
    A dynamic programme: best[S] is the least cost of matching the first |S| rows to the set S of columns. Its table
    has 2^max(n, m) rows: ValueError above 16."""
    n, m = cost.shape[1:]
    if n > m:
        cols, rows = minimum_cost_matching(cost.transpose(1, 2))
        rows, order = rows.sort(dim=1)
        return rows, cols.gather(1, order)
    if m > 16:
        raise ValueError(f"matching takes 16 elements at most, not {m}")
    cost = cost.detach().float().permute(1, 2, 0).contiguous()                # [n, m, B]
    best = cost.new_zeros(2 ** m, cost.shape[2])                              # [2^m, B]
    choice = torch.zeros_like(best, dtype=torch.int64)                        # the last row's column in that matching
    for row in range(n):
        subsets, members = subsets_of(m, row + 1, cost.device)                # [L], [L, row + 1]
        options = best[subsets[:, None] - (1 << members)] + cost[row, members]               # [L, row + 1, B]
        best[subsets], chosen = options.min(dim=1)
        choice[subsets] = members.gather(1, chosen)
    subset = subsets[best[subsets].argmin(dim=0)]                             # [B]: of n columns, the cheapest
    cols = subset.new_empty(len(subset), n)                                   # [B, n]
    for row in reversed(range(n)):
        cols[:, row] = choice.gather(0, subset[None])[0]
        subset = subset - (1 << cols[:, row])
    return torch.arange(n, device=cost.device).expand_as(cols), cols


@functools.lru_cache(maxsize=64)  # copying it to a GPU anew would make each step wait
def subsets_of(m, size, device):
    """The L subsets of range(m) with `size` members: as numbers, a bit for each member, [L], and as lists [L, size]."""
    members = torch.tensor(list(combinations(range(m), size)))
    return (1 << members).sum(dim=1).to(device), members.to(device)


def hungarian_huber_loss(pred, target):
    """The set prediction loss (section 2.3): Huber (delta 1, mean over the features) between each target and the
    prediction that the cheapest matching gives it, summed over the set, averaged over the batch.

    pred [B, K, F], target [B, M, F] -> scalar. Padding (rows of zeros) is a target too; spare predictions are free."""
    cost = F.huber_loss(*torch.broadcast_tensors(pred[:, None], target[:, :, None]), reduction="none").mean(dim=3)
    rows, cols = minimum_cost_matching(cost)                                  # cost [B, M, K]; both [B, min(M, K)]
    return cost[torch.arange(len(cost), device=cost.device)[:, None], rows, cols].sum(dim=1).mean()


def average_precision_clevr(pred, target, distance_threshold=math.inf):
    """Average precision of predicted CLEVR objects (section 4.2), over a whole evaluation set at once: in order of
    falling confidence (the last feature) each prediction claims the nearest real object of its image with equal size,
    material, shape and colour. It is a hit if it is nearer than the threshold and the first to claim that object.

    pred [B, K, 19], target [B, M, 19], a threshold in CLEVR's units (-3 to 3) -> float, NaN without real objects."""
    order = pred[..., 18].argsort(dim=1, descending=True, stable=True)
    pred = pred.gather(1, order[..., None].expand_as(pred))                   # the most confident of an image first
    real = target[..., 18] > 0.5                                              # [B, M]
    same = real[:, None]
    for start, end in ((3, 5), (5, 7), (7, 10), (10, 18)):                    # of equal size, material, shape, colour
        same = same & (pred[:, :, None, start:end].argmax(-1) == target[:, None, :, start:end].argmax(-1))  # [B, K, M]
    distance = 6 * (pred[:, :, None, :3] - target[:, None, :, :3]).norm(dim=-1)
    distance, nearest = torch.where(same, distance, math.inf).min(dim=2, keepdim=True)                   # [B, K, 1]
    claims = torch.zeros_like(same).scatter(2, nearest, distance < distance_threshold)                   # [B, K, M]
    hits = (claims & (claims.cumsum(dim=1) == 1)).any(dim=2)                  # [B, K]

    order = pred[..., 18].flatten().argsort(descending=True, stable=True)     # all predictions of all images, [B * K]
    hits = hits.flatten()[order].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
    precision = precision.flip(0).cummax(0).values.flip(0)                    # the best at this or a higher recall
    return ((hits * precision).sum() / real.sum()).item()                     # a hit adds 1 / real.sum() to the recall


# --- Weights ---------------------------------------------------------------------------------------------------------

MODELS = {"object_discovery": SlotAttentionAutoEncoder, "set_prediction": SlotAttentionClassifier}


def build_model(config):
    """The model of config["task"], with those values of the mapping that its constructor takes."""
    model = MODELS[config["task"]]
    return model(**{key: config[key] for key in inspect.signature(model).parameters if key in config})


def load_model(checkpoint):
    """A run's checkpoint or a file of weights, as data.read_file returns it -> its model. Else: ValueError."""
    try:
        config, weights = checkpoint["config"], checkpoint["model"]
        if config.get("learned_queries"):                                     # as many as in training, not as now asked
            config = {**config, "num_slots": weights["slot_attention.slots_mu"].shape[1]}
        model = build_model(config)
        model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]                           # PyTorch's has many lines
        raise ValueError(f"no checkpoint of this project, or damaged ({type(error).__name__}: {reason})") from None
    return model


def load_official_weights(model, variables):
    """Loads the official TensorFlow weights into a model. If they are of another: ValueError, and nothing is loaded.

    variables: a mapping of the checkpoint's keys, or of their middle ("slot_attention/slots_mu"), to arrays."""
    rules = {r"^network/layer_with_weights-0/|/\.ATTRIBUTES/VARIABLE_VALUE$": "",   # their names -> ours, in this order
             r"layer_with_weights-(\d+)": lambda match: str(2 * int(match[1])),     # each second layer is a ReLU
             r"^(encoder|decoder)_": r"\1.", r"^(mlp|layer_norm)/": r"encoder.\1.", "/": ".",
             r"gru\.kernel": "gru.weight_ih", "recurrent_kernel": "weight_hh", "kernel|gamma": "weight", "beta": "bias"}
    state, layers = {}, dict(model.named_modules())
    for key in variables:
        name = key
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        if "." not in name or "optimizer" in name.lower():                    # the step, Adam's averages
            continue
        value = torch.tensor(variables[key])
        if ".gru." in name:
            z, r, h = value.chunk(3, dim=-1)                                  # Keras' order of the gates
            value = torch.cat([r, z, h], dim=-1)                              # PyTorch's
        if value.dim() == 4:
            value = value.permute(3, 2, 0, 1)                                 # [k, k, in, out] -> [out, in, k, k]
            if name.startswith("decoder") and isinstance(layers.get(name.removesuffix(".weight")), Conv2dSame):
                value = value.transpose(0, 1).flip(2, 3)                      # theirs is transposed, ours not
        elif "weight" in name:
            value = value.t()
        state[name] = value
    bias = "slot_attention.gru.bias"
    if bias in state:                                                         # [2, 3 * D]
        state[f"{bias}_ih"], state[f"{bias}_hh"] = state.pop(bias)
    theirs = {(name, value.shape) for name, value in state.items()}
    ours = {(name, parameter.shape) for name, parameter in model.named_parameters()}
    if theirs != ours:
        raise ValueError(f"the official weights are of another model: they differ in {min(theirs ^ ours)[0]}")
    model.load_state_dict(state)
