"""Slot Attention in PyTorch: "Object-Centric Learning with Slot Attention", Locatello et al., 2020.

In float32, masks and predicted sets (to 1e-5), other outputs (to 1e-4), losses (to 1e-6 of their
value) and norms of gradients (to 3e-4) equal those of the official TensorFlow code.
Section and equation numbers are the paper's (https://arxiv.org/abs/2006.15055). Of its symbols, D
and D_slots are both D here, and D_inputs is D_in:

    B  images in a batch      N  input features, h * w of the encoder's grid
    K  slots                  D  size of a slot (D_in: of an input feature)
    T  iterations             H, W  size of an image (h, w: of a grid)

Attention is [K, N] here, and [N, K] in the paper.
"""

import functools
import math
import re
from collections import namedtuple
from itertools import accumulate, combinations

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- Slot Attention (section 2.1) ---------------------------------------------------------------


class SlotAttention(nn.Module):
    """Slot Attention (Algorithm 1): K slots compete for N inputs, over T iterations.

    num_slots: K. dim: D. num_iterations: T. mlp_hidden_size: of the MLP that updates the slots.
    inputs_dim: D_in, D if not given. eps: added to the attention before the weighted mean.
    implicit: the slots' gradient goes through the last iteration only (Chang et al., arXiv
        2207.00787), and from there straight to the initial slots (Jia et al., arXiv 2210.08990).
        A loss on attn[:, t] skips the iterations before t, too.
    learned_queries: each slot has a learned mean of its own (Jia et al.); the noise is still added.
    If your code uses autocast, switch it off around this module, as the models below do, with
    torch.autocast(device_type, enabled=False): softmax and mean need float32's precision.
    """

    def __init__(
        self,
        num_slots,
        dim,
        num_iterations=3,
        mlp_hidden_size=128,
        inputs_dim=None,
        eps=1e-8,
        implicit=False,
        learned_queries=False,
    ):
        super().__init__()
        self.num_slots = num_slots
        self.dim = dim
        self.num_iterations = num_iterations
        self.eps = eps
        self.implicit = implicit
        inputs_dim = inputs_dim or dim

        self.slots_mu = nn.Parameter(torch.empty(1, num_slots if learned_queries else 1, dim))
        self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, dim))
        self.norm_inputs = nn.LayerNorm(inputs_dim, eps=1e-3)  # Keras' epsilon; PyTorch's is 1e-5
        self.norm_slots = nn.LayerNorm(dim, eps=1e-3)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-3)
        self.project_q = nn.Linear(dim, dim, bias=False)
        self.project_k = nn.Linear(inputs_dim, dim, bias=False)
        self.project_v = nn.Linear(inputs_dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_hidden_size),
            nn.ReLU(),
            nn.Linear(mlp_hidden_size, dim),
        )

        # Keras' initialisation: keras_init below, repeated so that this class can be pasted alone.
        for name, parameter in self.named_parameters():
            if name == "gru.weight_hh":
                nn.init.orthogonal_(parameter)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
        for parameter in (self.slots_log_sigma, self.slots_mu):
            nn.init.xavier_uniform_(parameter[0])  # Keras counts 1 input, D outputs in [1, 1, D]
        if learned_queries:  # means ~ N(0, 1), noise times 1/e: the slots start apart
            nn.init.normal_(self.slots_mu)
            nn.init.constant_(self.slots_log_sigma, -1)

    def init_slots(self, noise):
        """Returns initial slots [B, K, D] ~ N(mu, sigma) from standard normal noise [B, K, D].

        sigma holds a standard deviation for each of the D features.
        """
        K = noise.shape[1]
        mu = self.slots_mu.repeat(1, K, 1)[:, :K]  # one mean for all, or learned ones in turn
        return mu + self.slots_log_sigma.exp() * noise

    def forward(self, inputs, slots=None, num_slots=None, num_iterations=None):
        """Returns slots [B, K, D] and attn [B, T, K, N], the attention of each iteration.

        inputs [B, N, D_in]; slots [B, K, D]: the initial slots. If they are not given, num_slots
        are sampled. num_slots and num_iterations: K and T; None or 0: as in the constructor. attn
        sums to 1 over the slots: it is the softmax, before it is normalised over the inputs.
        """
        dtype = self.slots_mu.dtype  # inputs and slots may come in bfloat16
        inputs = self.norm_inputs(inputs.to(dtype))                     # [B, N, D_in]
        k = self.project_k(inputs)                                      # [B, N, D]
        v = self.project_v(inputs)                                      # [B, N, D]
        if slots is None:
            shape = len(inputs), num_slots or self.num_slots, self.dim
            slots = self.init_slots(torch.randn(shape, device=k.device))
        slots = slots.to(dtype)                                         # [B, K, D]
        init = slots
        attns = []
        for _ in range(num_iterations or self.num_iterations):
            if self.implicit:
                # Not in the paper. Straight-through: the same value, but its gradient skips the
                # iterations before and goes to init.
                slots = slots.detach() + (init - init.detach())
            slots_prev = slots
            q = self.project_q(self.norm_slots(slots)) * self.dim ** -0.5   # [B, K, D]
            attn = (q @ k.mT).softmax(dim=1)                            # [B, K, N]; equation 1
            weights = attn + self.eps                                   # as in Algorithm 1
            weights = weights / weights.sum(dim=2, keepdim=True)        # weighted mean: equation 2
            updates = weights @ v                                       # [B, K, D]
            slots = self.gru(updates.flatten(0, 1), slots_prev.flatten(0, 1))   # [B * K, D]
            slots = slots.view_as(slots_prev)                           # [B, K, D]
            slots = slots + self.mlp(self.norm_mlp(slots))
            attns.append(attn)
        return slots, torch.stack(attns, dim=1)


# --- The models (sections 2.2 and 2.3) ----------------------------------------------------------


AutoEncoderOutput = namedtuple("AutoEncoderOutput", "recon_combined recons masks slots attn")
SetPrediction = namedtuple("SetPrediction", "predictions slots attn")


class SlotAttentionAutoEncoder(nn.Module):
    """Object discovery (section 2.2): an image becomes slots, each slot a picture and a mask.

    resolution: (H, W), or one number for both. The defaults are the paper's CLEVR6 model (at 128,
    K = 7; 890,308 parameters). For Multi-dSprites (64, K = 6) and Tetrominoes (35, K = 4) the paper
    has encoder_channels=32, encoder_dim=32, decoder_channels=32, decoder_strides=(1, 1, 1) (235,812
    parameters). encoder_dim: D_in. Encoder and Decoder have a convolution for each of their
    strides. The other arguments are those of SlotAttention and Decoder.
    """

    def __init__(
        self,
        resolution,
        num_slots,
        num_iterations=3,
        slot_dim=64,
        mlp_hidden_size=128,
        implicit=False,
        learned_queries=False,
        encoder_channels=64,
        encoder_strides=(1, 1, 1, 1),
        encoder_dim=64,
        decoder_channels=64,
        decoder_strides=(2, 2, 2, 2, 1),
        decoder_kernel=5,
        pixel_shuffle=1,
    ):
        super().__init__()
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, encoder_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size,
                                            encoder_dim, implicit=implicit,
                                            learned_queries=learned_queries)
        self.decoder = Decoder(resolution, slot_dim, decoder_channels, decoder_strides,
                               decoder_kernel, pixel_shuffle)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """Returns an AutoEncoderOutput for image [B, 3, H, W] in [-1, 1].

        recon_combined [B, 3, H, W]: the image again, the sum of recons * masks over the slots;
        recons [B, K, 3, H, W]: the slots' pictures, on the image's scale, not clipped;
        masks [B, K, 1, H, W]: sum to 1 over the slots; slots [B, K, D]; attn [B, T, K, h, w].
        The arguments slots, num_slots and num_iterations are as in SlotAttention.forward.
        """
        features = self.encoder(image)                                  # [B, N, D_in]
        with no_autocast(features):
            slots, attn = self.slot_attention(features, slots, num_slots, num_iterations)
        decoded = self.decoder(slots.flatten(0, 1)).to(slots.dtype)     # [B * K, 4, H, W]
        decoded = decoded.unflatten(0, slots.shape[:2])                 # [B, K, 4, H, W]
        recons, alpha = decoded.split([3, 1], dim=2)
        masks = alpha.softmax(dim=1)                                    # over the slots
        recon_combined = (recons * masks).sum(dim=1)                    # [B, 3, H, W]
        return AutoEncoderOutput(recon_combined, recons, masks, slots,
                                 attn.unflatten(-1, self.encoder.grid_size))


class SlotAttentionClassifier(nn.Module):
    """Set prediction (section 2.3): an image becomes slots, each slot the properties of one object.

    The defaults are the paper's CLEVR10 model (resolution 128, K = 10; 380,755 parameters).
    A prediction is: (3d_coords + 3) / 6 (3 features), size (2), material (2), shape (3), colour
    (8), real object or padding (1).
    """

    def __init__(
        self,
        resolution,
        num_slots,
        num_iterations=3,
        slot_dim=64,
        mlp_hidden_size=128,
        implicit=False,
        learned_queries=False,
        encoder_channels=64,
        encoder_strides=(1, 2, 2, 1),
        encoder_dim=64,
    ):
        super().__init__()
        self.encoder = Encoder(resolution, encoder_channels, encoder_strides, encoder_dim)
        self.slot_attention = SlotAttention(num_slots, slot_dim, num_iterations, mlp_hidden_size,
                                            encoder_dim, implicit=implicit,
                                            learned_queries=learned_queries)
        self.mlp_classifier = nn.Sequential(
            nn.Linear(slot_dim, slot_dim),
            nn.ReLU(),
            nn.Linear(slot_dim, 19),
        )
        keras_init(self.mlp_classifier)

    def forward(self, image, slots=None, num_slots=None, num_iterations=None):
        """Returns a SetPrediction for image [B, 3, H, W] in [-1, 1].

        predictions [B, K, 19] in [0, 1]: an object per slot; slots [B, K, D]; attn [B, T, K, h, w].
        The arguments slots, num_slots and num_iterations are as in SlotAttention.forward.
        """
        features = self.encoder(image)                                  # [B, N, D_in]
        with no_autocast(features):
            slots, attn = self.slot_attention(features, slots, num_slots, num_iterations)
        predictions = self.mlp_classifier(slots).to(slots.dtype).sigmoid()   # [B, K, 19]
        return SetPrediction(predictions, slots, attn.unflatten(-1, self.encoder.grid_size))


def no_autocast(x):
    """Returns a context without autocast on the device of x."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # such as meta: there is none to switch off
        device = "cpu"
    return torch.autocast(device, enabled=False)


# --- The layers, as Keras has them: PyTorch's differ in padding, initialisation and epsilon -----


class Encoder(nn.Module):
    """A CNN with a 5x5 convolution per stride, position embedding, LayerNorm, MLP (appendix E).

    image [B, 3, H, W] -> features [B, N, D_in], N = h * w.
    """

    def __init__(self, resolution, channels, strides, features_dim):
        super().__init__()
        self.grid_size = [math.ceil(size / math.prod(strides)) for size in to_pair(resolution)]
        layers = []
        in_channels = 3
        for stride in strides:
            layers += [Conv2dSame(in_channels, channels, 5, stride), nn.ReLU()]
            in_channels = channels
        self.cnn = nn.Sequential(*layers)
        self.pos = SoftPositionEmbed(channels, self.grid_size)
        self.layer_norm = nn.LayerNorm(channels, eps=1e-3)
        self.mlp = nn.Sequential(
            nn.Linear(channels, features_dim),
            nn.ReLU(),
            nn.Linear(features_dim, features_dim),
        )
        keras_init(self)  # of all layers above: load pretrained ones after it

    def forward(self, image):
        x = self.cnn(image)                                             # [B, C, h, w]
        x = self.pos(x).flatten(2).mT                                   # [B, N, C]
        return self.mlp(self.layer_norm(x))                             # [B, N, D_in]


class Decoder(nn.Module):
    """Spatial broadcast decoder (section 2.2, appendix E), applied to each slot by itself.

    slots [M, D] -> a picture and a mask's logit [M, 4, H, W], M = B * K. A slot is copied to every
    cell of a grid and gets a position embedding. Then come one transposed convolution per stride
    (at stride 1 a plain one, which is the same with its kernel stored flipped) and a 3x3 one.
    pixel_shuffle r: all maps are smaller by r, and each cell of the last one becomes r x r pixels
    (not in the paper; fast on CPUs).
    """

    def __init__(self, resolution, dim, channels, strides, kernel_size=5, pixel_shuffle=1):
        super().__init__()
        self.resolution = to_pair(resolution)
        scale = math.prod(strides) * pixel_shuffle
        self.grid_size = [math.ceil(size / scale) for size in self.resolution]
        self.pos = SoftPositionEmbed(dim, self.grid_size)
        layers = []
        in_channels = dim
        for stride in strides:
            conv = Conv2dSame if stride == 1 else ConvTranspose2dSame
            layers += [conv(in_channels, channels, kernel_size, stride), nn.ReLU()]
            in_channels = channels
        self.cnn = nn.Sequential(
            *layers,
            Conv2dSame(in_channels, 4 * pixel_shuffle ** 2, 3),
            nn.PixelShuffle(pixel_shuffle),
        )
        keras_init(self)

    def forward(self, slots):
        conv = self.cnn[0]
        if type(conv) is Conv2dSame:
            x = self.convolve_broadcast(conv, slots)                    # the same, but faster
        else:
            x = conv(self.pos(slots[:, :, None, None]))                 # [M, C, h, w]
        x = self.cnn[1:](x)
        H, W = self.resolution
        return x[..., :H, :W]               # [M, 4, H, W]; the grid's size was rounded up

    def convolve_broadcast(self, conv, slots):
        """Returns conv(pos(slots)) [M, C, h, w] in a third of the time.

        A slot is the same in every cell of the grid. So away from the border, every cell gets the
        same sum over the kernel's k * k taps; near it, the taps outside the grid are missing. pos
        adds the same map to every slot. If you change pos, delete this method, and in forward take
        the branch that calls conv.
        """
        k, _ = conv.kernel_size
        taps = torch.einsum("md,cdt->mct", slots, conv.weight.flatten(2))   # [M, C, k * k]
        position = self.pos(slots.new_zeros(1, 1, 1, 1))                # [1, D, h, w]
        ones = torch.ones_like(position[:, :1])                         # [1, 1, h, w]
        inside = F.unfold(ones, k, padding=k // 2)[0]                   # [k * k, h * w], 0 or 1
        x = (taps @ inside).unflatten(2, self.grid_size)                # [M, C, h, w]
        return x + conv(position)                                       # conv is linear


def to_pair(resolution):
    """Returns (H, W) of one number for both, or of (H, W)."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


class Conv2dSame(nn.Conv2d):
    """Conv2d with TensorFlow's "SAME" padding: an odd pixel of padding goes below and to the right.

    It takes Conv2d's first four arguments only, and square kernels.
    [B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)].
    """

    def forward(self, x):
        k, _ = self.kernel_size
        stride, _ = self.stride
        if stride == 1:  # the same as below, without a copy
            return F.conv2d(x, self.weight, self.bias, padding="same")
        padding = []
        for size in reversed(x.shape[2:]):  # in F.pad's order
            total = max(k - (size % stride or stride), 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class ConvTranspose2dSame(nn.ConvTranspose2d):
    """ConvTranspose2d aligned as TensorFlow's "SAME", with the same four arguments.

    The kernel must be at least as large as the stride.
    [B, C_in, H, W] -> [B, C_out, stride * H, stride * W]. (PyTorch's usual `padding=2,
    output_padding=1` for 5x5 and stride 2 gives the same map shifted by one pixel.)
    """

    def forward(self, x):
        k, _ = self.kernel_size
        stride, _ = self.stride
        padding, extra = divmod(k - stride, 2)
        y = F.conv_transpose2d(x, self.weight, None, stride, padding)
        y = F.pad(y, (0, -extra, 0, -extra))  # not by slices: their gradient loses channels_last
        return y + self.bias.to(y.dtype).view(-1, 1, 1)  # added separately: faster on CPUs


class SoftPositionEmbed(nn.Module):
    """Adds a learned linear map of each cell's distances to the four borders (appendix E).

    x [B, C, h, w], or [B, C, 1, 1], which is broadcast. Returns [B, C, h, w].
    """

    def __init__(self, channels, grid_size):
        super().__init__()
        self.dense = nn.Linear(4, channels)
        axes = [torch.linspace(0, 1, size) for size in grid_size]
        rows, cols = torch.meshgrid(axes, indexing="ij")
        grid = torch.stack([rows, cols, 1 - rows, 1 - cols], dim=-1)    # [h, w, 4]
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, x):
        with no_autocast(x):  # bfloat16 would round a position to 1/256
            position = self.dense(self.grid)                            # [h, w, C]
        return x + position.permute(2, 0, 1)


def keras_init(module):
    """Initialises a module as Keras does by default: kernels Glorot-uniform, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        elif "bias" in name:
            nn.init.zeros_(parameter)


# --- Losses and metrics -------------------------------------------------------------------------


def adjusted_rand_index(true_mask, pred_mask):
    """Returns the adjusted Rand index (section 4.1) of each image, [B]: 1 = equal, 0 = chance.

    true_mask [B, P, Gt]: one-hot, 0/1 or 0/255. Points (pixels) of all zeros are ignored: leave out
    the background's group for FG-ARI. pred_mask [B, P, Gp]: scores; a point belongs to the largest.
    As in DeepMind's multi_object_datasets, but 1 where that gives NaN (0/0). Call it outside
    autocast, which would round the counts. train.foreground_ari takes a model's masks and labels.
    """
    true = (true_mask > 0).float()                                      # [B, P, Gt]
    pred = F.one_hot(pred_mask.argmax(dim=2), pred_mask.shape[2]).float()
    n_ij = (true.mT @ pred).long()                                      # [B, Gt, Gp]: in both

    def pairs(count):
        return (count * (count - 1)).flatten(1).sum(dim=1).float()      # [B], ordered pairs

    true_pairs = pairs(n_ij.sum(dim=2))                                 # in one true group
    pred_pairs = pairs(n_ij.sum(dim=1))                                 # in one predicted group
    all_pairs = pairs(n_ij.sum(dim=(1, 2), keepdim=True))
    expected = true_pairs * (pred_pairs / all_pairs)
    maximum = (true_pairs + pred_pairs) / 2
    ari = (pairs(n_ij) - expected) / (maximum - expected)
    return ari.nan_to_num(1.0)  # 0/0: no pairs, or one group in both


def minimum_cost_matching(cost):
    """Returns rows and cols, [B, min(n, m)] each, of the cheapest matchings.

    cost [B, n, m], n and m at most 16 (else ValueError). SciPy's linear_sum_assignment takes one
    matrix at a time, on the CPU, so that a GPU would wait for it at each step. By dynamic
    programming: best[S] is the least cost of matching the first |S| rows to the set S of columns,
    the minimum over c in S of best[S without c] + cost[|S| - 1, c]. The choices are then followed
    back from the best set. A set is a number with a bit for each member.
    """
    n, m = cost.shape[1:]
    if n > m:
        cols, rows = minimum_cost_matching(cost.mT)
        return rows, cols
    if m > 16:
        raise ValueError(f"matching takes 16 elements at most, not {m}")
    cost = cost.detach().float().permute(1, 2, 0).contiguous()          # [n, m, B]
    best = cost.new_zeros(2 ** m, cost.shape[2])                        # [2^m, B]
    choice = torch.zeros_like(best, dtype=torch.int64)                  # the last row's column
    for row in range(n):
        subsets, members = subsets_of(m, row + 1, cost.device)          # [L], [L, row + 1]
        without = subsets[:, None] - (1 << members)                     # [L, row + 1]
        options = best[without] + cost[row, members]                    # [L, row + 1, B]
        best[subsets], chosen = options.min(dim=1)
        choice[subsets] = members.gather(1, chosen)
    subset = subsets[best[subsets].argmin(dim=0)]                       # [B]
    cols = subset.new_empty(len(subset), n)                             # [B, n]
    for row in reversed(range(n)):
        cols[:, row] = choice.gather(0, subset[None])[0]
        subset = subset - (1 << cols[:, row])
    return torch.arange(n, device=cost.device).expand_as(cols), cols


@functools.lru_cache(maxsize=64)  # copying the tables to a GPU anew would stall each step
def subsets_of(m, size, device):
    """Returns the L subsets of range(m) of a size, as numbers [L] and as lists [L, size]."""
    members = torch.tensor(list(combinations(range(m), size)), device=device)
    return (1 << members).sum(dim=1), members


def hungarian_huber_loss(pred, target):
    """Returns the set prediction loss (section 2.3), a scalar, of pred [B, K, C], target [B, M, C].

    The Huber loss (delta 1, mean over the features) between each target and the prediction that the
    cheapest matching assigns to it, summed over the set, averaged over the batch. Padding (rows of
    zeros) is a target too; predictions left over cost nothing.
    """
    pairs = torch.broadcast_tensors(pred[:, None], target[:, :, None])  # [B, M, K, C] each
    cost = F.huber_loss(*pairs, reduction="none").mean(dim=3)           # [B, M, K]
    rows, cols = minimum_cost_matching(cost)                            # [B, min(M, K)]
    image = torch.arange(len(cost), device=cost.device)[:, None]
    return cost[image, rows, cols].sum(dim=1).mean()


def average_precision_clevr(pred, target, distance_threshold=math.inf):
    """Returns the average precision of predicted CLEVR objects (section 4.2), a float.

    pred [B, K, 19], target [B, M, 19]: a whole evaluation set at once. distance_threshold: in
    CLEVR's units (its coordinates go from -3 to 3); inf, or -1 as in the official code, is none.
    In order of falling confidence (the last feature), each prediction claims the nearest real
    object of its image with the same size, material, shape and colour. It is a hit if that object
    is nearer than the threshold and not yet claimed. NaN if there is no real object.
    """
    if distance_threshold == -1:
        distance_threshold = math.inf
    confidence = pred[..., 18]                                          # [B, K]
    order = confidence.flatten().argsort(descending=True, stable=True)
    rank = 1 + order.argsort().view_as(confidence)                      # [B, K]
    real = target[..., 18] > 0.5                                        # [B, M]
    pred = pred[:, :, None]                                             # [B, K, 1, 19]
    target = target[:, None]                                            # [B, 1, M, 19]
    same = (attributes(pred) == attributes(target)).all(dim=3)          # [B, K, M]
    distance = 6 * (pred[..., :3] - target[..., :3]).norm(dim=3)
    distance = torch.where(same & real[:, None], distance, math.inf)    # [B, K, M]
    nearest = F.one_hot(distance.argmin(dim=2), real.shape[1]) > 0
    claims = nearest & (distance < distance_threshold)                  # [B, K, M]
    first = torch.where(claims, rank[..., None], math.inf).amin(dim=1)  # [B, M], inf: no claim

    ranks = sorted(first[real].tolist())  # of the hits
    precisions = [hits / rank for hits, rank in enumerate(ranks, start=1)]
    best = accumulate(reversed(precisions), max)  # at this recall or a higher one
    return sum(best) / len(ranks) if ranks else math.nan


def attributes(objects):
    """Returns the most probable size, material, shape and colour of objects [..., 19]: [..., 4]."""
    scores = objects[..., 3:18].split([2, 2, 3, 8], dim=-1)
    return torch.stack([score.argmax(dim=-1) for score in scores], dim=-1)


# --- Weights ------------------------------------------------------------------------------------

MODELS = {"object_discovery": SlotAttentionAutoEncoder, "set_prediction": SlotAttentionClassifier}


class WeightsError(ValueError):
    """Weights that are not this model's, or no weights of this project at all."""


def load_model(checkpoint):
    """Returns the model of a run's checkpoint, or of a file of weights, as data.read_file reads it.

    Raises WeightsError if it is neither.
    """
    try:
        model_class = MODELS[checkpoint["task"]]
        arguments = dict(checkpoint["arguments"])
        weights = dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError("not a checkpoint, or weights, of this project") from error
    model = model_class(**arguments)
    load_weights(model, weights)
    return model


def load_weights(model, weights):
    """Loads {name: tensor} into a model. Raises WeightsError, and loads nothing, if they differ."""
    ours = model.state_dict()
    for name in sorted({*ours, *weights}, key=str):
        here = getattr(ours.get(name), "shape", "unknown")
        there = getattr(weights.get(name), "shape", "missing")
        if here != there:
            raise WeightsError(f"the weights are of another model: {name} is {there} in them, and "
                               f"{here} in this one")
    model.load_state_dict(weights)


# Patterns in the official code's names, and what stands there in ours:
# encoder_cnn/layer_with_weights-1/kernel becomes encoder.cnn.2.weight.
OFFICIAL_NAMES = [
    (r"^network/layer_with_weights-0/|/\.ATTRIBUTES/VARIABLE_VALUE$", ""),
    (r"layer_with_weights-(\d+)", lambda match: str(2 * int(match[1]))),  # ReLUs between
    (r"^(encoder|decoder)_", r"\1."),
    (r"^(mlp|layer_norm)/", r"encoder.\1."),
    (r"/", "."),
    (r"gru\.kernel", "gru.weight_ih"),
    (r"gru\.recurrent_kernel", "gru.weight_hh"),
    (r"kernel|gamma", "weight"),
    (r"beta", "bias"),
]


def load_official_weights(model, variables):
    """Loads the official TensorFlow weights. Raises WeightsError, as load_weights, if they differ.

    variables: a mapping of the checkpoint's keys, or of their middle ("slot_attention/slots_mu"),
    to arrays, as data.read_tf_checkpoint returns it. Its other variables (Adam's) are left out.
    """
    layers = dict(model.named_modules())
    weights = {}
    for name, value in variables.items():
        for pattern, replacement in OFFICIAL_NAMES:
            name = re.sub(pattern, replacement, name)
        if "." not in name or "optimizer" in name:  # the step, Adam's averages
            continue
        value = torch.tensor(value)
        if ".gru." in name:
            z, r, h = value.chunk(3, dim=-1)                            # Keras' order of the gates
            value = torch.cat([r, z, h], dim=-1)                        # PyTorch's
        if value.dim() == 4:
            # [k, k, in, out] to [out, in, k, k]; of transposed ones, both have in and out swapped.
            value = value.permute(3, 2, 0, 1)
            layer = layers.get(name.removesuffix(".weight"))
            if name.startswith("decoder") and isinstance(layer, Conv2dSame):
                value = value.transpose(0, 1).flip(2, 3)  # at stride 1, not transposed here
        elif "weight" in name:
            value = value.t()
        if name.endswith("gru.bias"):                                   # [2, 3 * D]
            weights[name + "_ih"], weights[name + "_hh"] = value
        else:
            weights[name] = value
    load_weights(model, weights)
