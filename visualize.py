"""Draws what a trained model sees: the paper's Figure 3.

    python visualize.py                  the newest run under runs/; before there is one, the demo's weights in assets/
    python visualize.py RUN              a run's folder, or a checkpoint file
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

import data
import train
from data import say
from slot_attention import minimum_cost_matching

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend that needs no screen

# A run of `python train.py --seed 0` without its optimizer: c = torch.load("runs/demo/checkpoint.pt"); del c["optimizer"];
# torch.save(c, "assets/demo.pt")
DEMO = Path(__file__).resolve().parent / "assets" / "demo.pt"
BACKGROUND = 1.0  # slot pictures stand on white, as in the paper


def slot_colors(num_slots):
    """[K, 3] in 0 to 1: one colour per slot, the same in every panel."""
    colors = plt.get_cmap("tab10" if num_slots <= 10 else "tab20").colors
    return torch.tensor([colors[k % len(colors)] for k in range(num_slots)])


def to_rgb(picture):
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in [0, 1]."""
    return (picture.float() / 2 + 0.5).clamp(0, 1).movedim(-3, -1)


def colored(weights, colors):
    """Weights [K, H, W] that sum to 1 over the slots -> [H, W, 3], each slot in its colour."""
    return torch.einsum("khw,kc->hwc", weights.float(), colors).clamp(0, 1)


def over_image(weights, image, colors):
    """One slot after the other: its weights [K, H, W] in its colour, over the greyed image [3, H, W] -> [K, H, W,
    3]."""
    grey = to_rgb(image).mean(-1, keepdim=True) * 0.6 + 0.2                   # [H, W, 1]
    weights = weights[..., None].float()                                      # [K, H, W, 1]
    return (1 - weights) * grey + weights * colors[:, None, None]


def decomposition_row(output, i, image, colors):
    """Image, reconstruction, coloured masks, then each slot's picture where its mask is: Figure 3 (a) and (c)."""
    masks = output.masks[i, :, 0]                                             # [K, H, W]
    slots = to_rgb(output.recons[i]) * masks[..., None] + (1 - masks[..., None]) * BACKGROUND
    return [to_rgb(image), to_rgb(output.recon_combined[i]), colored(masks, colors), *slots]


@torch.no_grad()
def figure_3(model, images, noise, num_iterations, panels="abc"):
    """images [B, 3, H, W] in [-1, 1], noise [B, K, D] for the initial slots -> a matplotlib figure.

    (a) every image taken apart; (b) the attention of the first image at each iteration, each cell of the feature map
    drawn as a block of pixels (nearest); (c) its decomposition after each iteration."""
    num_slots, size = noise.shape[1], images.shape[2:]
    colors = slot_colors(num_slots)
    slots = model.slot_attention.init_slots(noise)
    steps = [model(images, slots=slots, num_iterations=t + 1) for t in range(num_iterations)]
    output, first = steps[-1], images[0]

    rows = {
        "a": [(f"scene {i + 1}", decomposition_row(output, i, image, colors)) for i, image in enumerate(images)],
        "b": [], "c": [(f"iteration {t + 1}", decomposition_row(step, 0, first, colors)) for t, step in enumerate(steps)]}
    for t in range(num_iterations):
        attn = F.interpolate(output.attn[0, t][None].float(), size, mode="nearest-exact")[0]      # [K, H, W]
        rows["b"].append((f"iteration {t + 1}", [to_rgb(first), None, colored(attn, colors), *over_image(attn, first, colors)]))
    titles = {"a": "(a) Decomposition", "b": "(b) Attention at each iteration", "c": "(c) Decomposition after each iteration"}

    columns = 3 + num_slots
    heights = [len(rows[panel]) + 0.55 for panel in panels]
    figure = plt.figure(figsize=(1.15 * columns + 0.6, 1.15 * sum(heights) + 0.1), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, part in zip(panels, parts):
        part.suptitle(titles[panel], x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = part.subplots(len(rows[panel]), columns, squeeze=False)
        heads = ["image", "" if panel == "b" else "reconstruction", "attention" if panel == "b" else "masks"]
        for axis, head in zip(axes[0], heads + [f"slot {k + 1}" for k in range(num_slots)]):
            axis.set_title(head, fontsize=9)
        for row, (label, pictures) in zip(axes, rows[panel]):
            row[0].set_ylabel(label, fontsize=9)
            for k, (axis, picture) in enumerate(zip(row, pictures)):
                axis.set(xticks=[], yticks=[])
                if picture is None:
                    axis.axis("off")
                    continue
                axis.imshow(picture.numpy(), interpolation="nearest")
                if k >= 3:  # the frame is the legend: the slot's colour
                    for spine in axis.spines.values():
                        spine.set(color=colors[k - 3].tolist(), linewidth=2)
    return figure


@torch.no_grad()
def figure_set_prediction(model, batch, noise, num_iterations):
    """batch {image [B, 3, H, W], target [B, 10, 19]} -> a figure with one row per scene: the image with the true
    objects' places (rings), then for each slot its attention (blocks of the feature map), the place it predicts (cross)
    and what.

    Green: the matched object has these properties and is nearer than 1. Red: not so. Grey: the slot says "no
    object"."""
    images, target = batch["image"], batch["target"]
    output = model(images, slots=model.slot_attention.init_slots(noise), num_iterations=num_iterations)
    pred, colors = output.predictions, slot_colors(noise.shape[1])
    rows, cols = minimum_cost_matching(F.mse_loss(*torch.broadcast_tensors(pred[:, None], target[:, :, None]), reduction="none")
                                       .mean(-1))                             # [B, target, pred]
    matched = torch.zeros(pred.shape).scatter_(1, cols[..., None].expand(-1, -1, 19), target.gather(1, rows[..., None].expand(
        -1, -1, 19)))                                                         # [B, K, 19], each prediction's target
    attn = F.interpolate(output.attn[:, -1].float(), images.shape[2:], mode="nearest-exact")

    def places(coords):  # of the mean camera, in the squashed picture
        return data.project((6 * coords - 3).numpy())[..., :2] * np.array(images.shape[:1:-1]) / (480, 320)

    count, num_slots = noise.shape[:2]
    figure, axes = plt.subplots(count, 1 + num_slots, squeeze=False, layout="constrained",
                                figsize=(1.15 * (1 + num_slots) + 0.3, 1.75 * count + 0.4))
    figure.suptitle("Set prediction: properties and attention of each slot   (green: right, red: wrong, grey: no object)",
                    fontsize=10)
    for i, row in enumerate(axes):
        row[0].imshow(to_rgb(images[i]).numpy(), interpolation="nearest")
        row[0].set_title(f"scene {i + 1}", fontsize=8)
        row[0].scatter(*places(target[i, target[i, :, 18] > 0.5, :3]).T, s=40, facecolors="none", edgecolors="white", linewidths=1)
        for k, axis in enumerate(row[1:]):
            axis.imshow(over_image(attn[i], images[i], colors)[k].numpy(), interpolation="nearest")
            axis.set_title(f"slot {k + 1}", fontsize=8)
            p, t, caption = pred[i, k], matched[i, k], "no object"
            color = "grey" if t[18] < 0.5 else "red"
            if p[18] >= 0.5:
                words, right, start = [], t[18] > 0.5 and (p[:3] - t[:3]).norm() * 6 < 1, 3
                for names in data.CLEVR_TARGETS.values():
                    words.append(names[p[start:start + len(names)].argmax()])
                    right = right and p[start:start + len(names)].argmax() == t[start:start + len(names)].argmax()
                    start += len(names)
                size, material, shape, hue = words
                caption, color = f"{size} {hue}\n{material} {shape}\n{p[18]:.0%}", "green" if right else "red"
                axis.scatter(*places(p[:3]), marker="x", s=30, color="black", linewidths=1.5)
            axis.set_xlabel(caption, fontsize=6.5, color=color)
        for axis in row:
            axis.set(xticks=[], yticks=[], xlim=(-0.5, images.shape[3] - 0.5), ylim=(images.shape[2] - 0.5, -0.5))
    return figure


def newest_run():
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        say("no run under runs/, so these are the weights that come with the code: python train.py --seed 0, four minutes")
    return runs[-1].parent if runs else DEMO


def default_out(run):
    """The folder of a run; for a file of weights the current one."""
    return (run if run.is_dir() else run.parent if run.name == "checkpoint.pt" else Path()) / "figure.png"


def main(argv=None):
    parser = train.Parser(prog="visualize.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?", help="a run's folder, or a file of weights; the newest under runs/ if not given")
    parser.add_argument("--figure", choices=("a", "b", "c", "all"), default="all", help="which parts of Figure 3")
    parser.add_argument("--count", type=train.parse_value(1), default=4, help="scenes in part (a), from the held-out split")
    parser.add_argument("--num-slots", type=train.parse_value(1), help="other than in training")
    parser.add_argument("--num-iterations", type=train.parse_value(1), help="other than in training")
    parser.add_argument("--data-root", help="where the real files are, if not where training found them")
    parser.add_argument("--seed", type=train.parse_value(0), default=0, help="of the slots' initial noise")
    parser.add_argument("--out", help="the picture's path; figure.png in the run's folder, or here, if not given")
    args = parser.parse_args(argv)
    try:
        run = Path(args.run or newest_run())
        checkpoint = train.load_checkpoint(run)
        config = checkpoint["config"]
        model = train.load_model(checkpoint, run)
        model.slot_attention.implicit = False  # without gradients its last iteration is one like the others
        scenes = train.load_scenes({**config, "data_root": args.data_root or config["data_root"], "download": False}, "eval")
        count = min(args.count, len(scenes))
        batch = scenes.batch(torch.arange(count))
        generator = torch.Generator().manual_seed(args.seed)
        num_slots = args.num_slots or config["num_slots"]
        num_iterations = args.num_iterations or config["num_iterations"] + config["implicit"]
        noise = torch.randn(count, num_slots, config["slot_dim"], generator=generator)
        if config["task"] == "set_prediction":
            figure = figure_set_prediction(model, batch, noise, num_iterations)
        else:
            figure = figure_3(model, batch["image"], noise, num_iterations, "abc" if args.figure == "all" else args.figure)
        out = Path(args.out) if args.out else default_out(run)
        figure.savefig(out, dpi=120)
        say(f"drew {out}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
