"""Draws what a trained model sees: the paper's Figure 3, and more.

    python visualize.py                           the newest run under runs/; before there is one the demo's weights
    python visualize.py RUN                       a run's folder, or a file of weights
    python visualize.py RUN RUN RUN               one sheet: the decompositions of each
    python visualize.py RUN --images a.png b.jpg  your own pictures
    python visualize.py RUN --out iterations.gif  the iterations, animated
    python visualize.py RUN --figure curve        the training curve
    python visualize.py RUN --figure clip         slots carried through a clip of moving Tetrominoes
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import data
from slot_attention import SlotAttentionClassifier, load_model, minimum_cost_matching

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.animation import PillowWriter  # noqa: E402

DEMO = Path(__file__).resolve().parent / "assets" / "demo.pt"
TAB20 = plt.get_cmap("tab20").colors
# The slots' colours in every figure: strong ones, then their lighter twins, no greys; then again.
COLORS = torch.tensor([color for color in TAB20[::2] + TAB20[1::2] if len(set(color)) > 1]).repeat(9, 1)

# ---------------------------------------------------------------------------------------------------------------------
# Figures: of a model's outputs on a batch
# ---------------------------------------------------------------------------------------------------------------------


def to_rgb(picture):
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in [0, 1]."""
    return (picture.float() / 2 + 0.5).clamp(0, 1).movedim(-3, -1)


def colored(weights):
    """Weights [K, H, W] that sum to 1 over the slots -> [H, W, 3], each slot in its colour."""
    return torch.einsum("khw,kc->hwc", weights.float(), COLORS[:len(weights)]).clamp(0, 1)


def decomposition_row(image, output, i):
    """Scene i: image, reconstruction, coloured masks, then each slot's picture where its mask is, on white."""
    masks = output.masks[i, :, 0]                                             # [K, H, W]
    slots = 1 + masks[..., None] * (to_rgb(output.recons[i]) - 1)             # [K, H, W, 3]
    return [to_rgb(image), to_rgb(output.recon_combined[i]), colored(masks), *slots]


def attention_row(image, output, i):
    """Scene i: image, reconstruction, coloured attention, then each slot's attention over the image."""
    attn, overlays = attention_over(image, output.attn[i, -1])
    return [to_rgb(image), to_rgb(output.recon_combined[i]), colored(attn), *overlays]


def attention_over(image, attn):
    """image [3, H, W], attn [K, h, w] -> attn [K, H, W], each cell a block of pixels (nothing is smoothed), and the
    grey image tinted with each slot's colour where its attention is [K, H, W, 3]."""
    attn = F.interpolate(attn[None].float(), image.shape[1:], mode="nearest-exact")[0]
    grey = to_rgb(image).mean(-1, keepdim=True) * 0.6 + 0.2                   # [H, W, 1]
    return attn, grey + attn[..., None] * (COLORS[:len(attn), None, None] - grey)


def figure_3(name, labels, frames, outputs, parts):
    """frames: images [B, 3, H, W] at each step, outputs: the model's at each step, labels of the B scenes -> blocks for
    `draw`: (a) every scene at the end; the first at each step: (b) attention, (c) decomposition."""
    word = "frame" if parts == "clip" else "iteration"
    every = [(labels[i], decomposition_row(image, outputs[-1], i)) for i, image in enumerate(frames[-1])]
    attention, steps = ([(f"{word} {t + 1}", row(frames[t][0], output, 0)) for t, output in enumerate(outputs)]
                        for row in (attention_row, decomposition_row))
    blocks = {"a": (f"(a) Decomposition: {name}", "masks", every),
              "b": ("(b) Attention at each iteration", "attention", attention),
              "c": ("(c) Decomposition after each iteration", "masks", steps),
              "clip": ("Slots carried from frame to frame", "masks", steps)}
    return [blocks[part] for part in ([parts] if parts == "clip" else parts)]


def draw(blocks, figure=None):
    """blocks: (title, head of the third column, [(label, pictures [H, W, 3])]) each -> a figure, one under the other.
    The first three pictures of a row are of the whole scene; then comes one per slot, framed in its colour."""
    columns = max(len(pictures) for _, _, rows in blocks for _, pictures in rows)
    heights = [len(rows) + 0.6 for _, _, rows in blocks]
    figure = figure or plt.figure(figsize=(1.1 * columns + 0.6, 1.1 * sum(heights)), layout="constrained")
    figure.clear()
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (title, head, rows), part in zip(blocks, parts):
        part.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = part.subplots(len(rows), columns, squeeze=False)
        heads = ["image", "reconstruction", head] + [f"slot {k + 1}" for k in range(columns - 3)]
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], frame_on=False, box_aspect=1)
        for row, (label, pictures) in zip(axes, rows):
            row[0].set_ylabel(label, fontsize=9)
            for k, (axis, picture) in enumerate(zip(row, pictures)):
                axis.imshow(picture.numpy(), interpolation="nearest")
                axis.set_frame_on(True)
                if k >= 3:
                    axis.spines[:].set(color=COLORS[k - 3].tolist(), linewidth=2)
        for axis, text, _ in zip(axes[0], heads, rows[0][1]):
            axis.set_title(text, fontsize=9)
    return figure


def save_gif(movie, path):
    """movie: blocks for `draw` at each step -> an animated GIF, which rests on its end."""
    figure, writer = draw(movie[0]), PillowWriter(fps=2)
    with writer.saving(figure, path, dpi=100):
        for blocks in movie + 3 * movie[-1:]:
            draw(blocks, figure)
            writer.grab_frame()


def figure_set_prediction(images, output, target=None):
    """-> for each scene the image, with the slots' numbers where they place their objects, then each slot's attention
    and what it predicts."""
    pred, K, size = output.predictions.float(), output.predictions.shape[1], np.array(images.shape[:1:-1])
    matched = torch.zeros_like(pred)                                          # [B, K, 19], each prediction's target
    if target is not None:
        rows, cols = minimum_cost_matching((pred[:, None] - target[:, :, None]).square().mean(-1))
        scenes = torch.arange(len(pred))[:, None]
        matched[scenes, cols] = target[scenes, rows]

    def place(coords):  # [..., 3] as predicted -> column and row in the resized picture, seen from CLEVR's mean camera
        return data.project((6 * coords - 3).numpy())[..., :2] * size / (480, 320)

    figure, axes = plt.subplots(len(images), K + 1, squeeze=False, figsize=(1.3 * K + 2.6, 2.3 * len(images)),
                                width_ratios=[2] + K * [1], layout="constrained")
    figure.suptitle("Where each slot sees its object, its attention, what it predicts. Rings: true places; ✓ nearer "
                    "than 1, and all attributes right; ✗ not so; – no object", fontsize=10)
    for i, (whole, *row) in enumerate(axes):
        whole.imshow(to_rgb(images[i]).numpy())
        if target is not None:
            whole.scatter(*place(target[i, target[i, :, 18] > 0.5, :3]).T, s=130, facecolors="none", edgecolors="white")
        overlays = attention_over(images[i], output.attn[i, -1])[1]
        for k, (axis, overlay, p, t) in enumerate(zip(row, overlays, pred[i], matched[i])):
            words, right, start = [], 6 * (p[:3] - t[:3]).norm() < 1, 3
            for names in data.CLEVR_TARGETS.values():
                said = p[start:start + len(names)].argmax()
                words.append(names[said])
                right = right and t[start + said] == 1
                start += len(names)
            sign = "✓" if right else "✗"
            if p[18] < 0.5:
                words, sign = ["no object"], "–"
            else:
                whole.text(*place(p[:3]), k + 1, fontsize=6, ha="center", va="center", color="white",
                           bbox=dict(boxstyle="circle,pad=0.2", color=COLORS[k].tolist()))
            axis.imshow(overlay.numpy(), interpolation="nearest")
            axis.set_title(f"slot {k + 1} {sign if target is not None else ''}", fontsize=8)
            axis.set_xlabel("\n".join(words), fontsize=7)
            axis.spines[:].set(color=COLORS[k].tolist(), linewidth=2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlim=(-0.5, size[0] - 0.5), ylim=(size[1] - 0.5, -0.5))
    return figure


def figure_curve(logs):
    """{name: rows of log.jsonl} -> loss above, and FG-ARI or AP below, against steps."""
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8.7, 5.2), layout="constrained")
    for (name, rows), color in zip(logs.items(), COLORS.tolist()):
        evaluations = [row for row in rows if "eval_loss" in row]
        upper.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=color, linewidth=0.6, alpha=0.6,
                   label=f"{name}: loss ({rows[-1]['seconds'] / 60:.1f} minutes)")
        metrics = [key for key in evaluations[-1] if key.startswith(("eval_loss", "ari", "ap_"))]
        for metric, style in zip(metrics, ("o-", "o-", "s--", "^-.", "v:", "D:")):
            axis = upper if metric == "eval_loss" else lower
            axis.plot([row["step"] for row in evaluations], [row[metric] for row in evaluations], style, color=color,
                      markersize=3, label=f"{name}: {metric}")
    upper.set(yscale="log")
    lower.set(xlabel="steps", ylim=(None, 1))
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def number(kind, low, high):
    """The type of a flag: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f"number from {low} to {high}"  # argparse shows it
    return parse


def read_checkpoint(run):
    """A run's folder or a file of weights -> its checkpoint. Raises OSError or ValueError."""
    path = Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)
    checkpoint = data.read_file(path)
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("config"), dict)):
        raise ValueError(f"{path} is no checkpoint of this project")
    return checkpoint


def load_pictures(paths, config):
    """Pictures of any size -> [B, 3, H, W] in [-1, 1]: the central square (of one of CLEVR's size the crop of the
    model's training), resized as in training; white under what is transparent."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path, formats=("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")) as file:  # none runs programs
                picture = ImageOps.exif_transpose(file).convert("RGBA")
        except Exception as error:  # Pillow has many ways to say it
            raise ValueError(f"--images {path}: no picture that can be read ({error})") from None
        picture = np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
        height, width = picture.shape[:2]
        if config["data"].startswith("clevr") and (height, width) in data.CLEVR_CROP:
            pictures.append(data.resize(picture, config["resolution"], config["crop"]))
            continue
        side = min(height, width)
        picture = picture[(height - side) // 2:, (width - side) // 2:][:side, :side]
        pictures.append(data.resize(picture, config["resolution"]))
    return data.Scenes(np.stack(pictures)).batch(torch.arange(len(pictures)))["image"]


def make_curve(runs):
    logs = {}
    for run in runs:
        rows = [json.loads(line) for line in read_checkpoint(run).get("log", "").splitlines()]
        if not any("eval_loss" in row for row in rows):
            raise ValueError(f"{run} has no log with an evaluation")
        logs[Path(run).name] = rows
    return figure_curve(logs).savefig


@torch.no_grad()
def make_figure(args, runs):
    """-> a function that writes the figure to a path."""
    blocks, movie = [], []
    for run in runs:
        checkpoint = read_checkpoint(run)
        model, config, target = load_model(checkpoint), checkpoint["config"], None
        if args.figure == "clip":
            if (config["task"], config["resolution"]) != ("object_discovery", 35):
                raise ValueError(f"--figure clip shows Tetrominoes of 35 x 35, which {run} is not for")
            clip = data.Scenes(data.make_moving_tetrominoes(args.count or 8, args.seed))
            images = clip.batch(torch.arange(len(clip)))["image"]
        elif args.images:
            images = load_pictures(args.images, config)
        else:
            keys = "eval_count", "resolution", "crop", "min_objects", "max_objects"
            root = args.data_root or config["data_root"]
            scenes = data.load(config["data"], "eval", root, *(config[key] for key in keys))
            batch = scenes.batch(torch.arange(min(args.count or 4, len(scenes))))
            images, target = batch["image"], batch.get("target")
        K, T = args.num_slots or config["num_slots"], args.num_iterations or config["num_iterations"]
        noise = torch.randn(len(images), K, config["slot_dim"], generator=torch.Generator().manual_seed(args.seed))
        slots = model.slot_attention.init_slots(noise)                        # [B, K, D]
        if isinstance(model, SlotAttentionClassifier):
            return figure_set_prediction(images, model(images, slots, num_iterations=T), target).savefig
        if args.figure == "clip":  # each frame starts from the slots of the one before
            frames, outputs, slots = images[:, None], [], slots[:1]
            for frame in frames:
                outputs.append(model(frame, slots, num_iterations=T))
                slots = outputs[-1].slots
        else:
            frames, outputs = T * [images], [model(images, slots, num_iterations=t) for t in range(1, T + 1)]
        names = [Path(path).stem[-14:] for path in args.images or ()] or [f"scene {i + 1}" for i in range(len(images))]
        blocks += figure_3(config["data"], names, frames, outputs, args.figure if len(runs) == 1 else "a")
        movie = [figure_3(config["data"], names, frames[:t], outputs[:t], "a") for t in range(1, len(outputs) + 1)]
    return (lambda path: save_gif(movie, path)) if str(args.out).endswith(".gif") else draw(blocks).savefig


def main(argv=None):
    parser = argparse.ArgumentParser("visualize.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="runs' folders, or files of weights; the newest run if not given")
    parser.add_argument("--figure", choices=("a", "b", "c", "abc", "curve", "clip"), default="abc",
                        help="parts of Figure 3 (abc), the training curve, or slots carried through a clip")
    parser.add_argument("--count", type=number(int, 1, 100), help="held-out scenes (4), or frames of the clip (8)")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="draw these pictures instead")
    parser.add_argument("--num-slots", type=number(int, 1, 100), help="other than in training")
    parser.add_argument("--num-iterations", type=number(int, 1, 100), help="other than in training")
    parser.add_argument("--data-root", help="where the real files are, if not where training found them")
    parser.add_argument("--seed", type=number(int, 0, 1e9), default=0, help="of the slots' initial noise")
    parser.add_argument("--out", help="the picture, animated if .gif; else figure.png in the run's folder, or here")
    args = parser.parse_args(argv)
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    runs = args.run or [str(path.parent) for path in newest] or [str(DEMO)]
    folder = Path(runs[0]) if len(runs) == 1 and Path(runs[0]).is_dir() else Path()
    out = Path(args.out or folder / ("curve.png" if args.figure == "curve" else "figure.png"))
    with data.one_line_errors():
        write = make_curve(runs) if args.figure == "curve" else make_figure(args, runs)
        with data.whole_file(out) as part:
            write(part)
    plt.close("all")
    data.say(f"drew {out}")


if __name__ == "__main__":
    main()
