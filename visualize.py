"""Draws what a trained model sees: the paper's Figure 3, and more.

    python visualize.py [RUN ...]                 a run's folder, or a file of weights: Figure 3; of several part (a)
    python visualize.py RUN --images a.png b.jpg  your own pictures
    python visualize.py RUN --figure curve        the training curve, of several runs as well
    python visualize.py RUN --figure clip         slots carried through a clip of moving Tetrominoes, or of --images
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import data
from slot_attention import SlotAttentionClassifier, load_model

WEIGHTS = Path(__file__).resolve().parent / "assets" / "tetrominoes.pt"
NAMES = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442 navy saddlebrown lime darkviolet teal".split()
COLORS = torch.tensor(to_rgba_array(NAMES)[:, :3]).float().repeat(9, 1)   # the slots'; first Okabe and Ito's


def to_rgb(picture):
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in [0, 1]."""
    return (picture.float() / 2 + 0.5).clamp(0, 1).movedim(-3, -1)


def attention_over(image, attn):
    """image [3, H, W], attn [K, h, w] -> attn [K, H, W], and the grey image tinted by it in each slot's colour."""
    attn = F.interpolate(attn[None].float(), image.shape[1:], mode="nearest-exact")[0]
    grey = to_rgb(image).mean(-1, keepdim=True) * 0.6 + 0.2                   # [H, W, 1]
    return attn, grey + attn[..., None] * (COLORS[:len(attn), None, None] - grey)


def scene_row(image, output, i, attention=False):
    """Scene i: image, reconstruction, all masks in the slots' colours, each slot's masked picture or its attention."""
    weights = output.masks[i, :, 0]                                           # [K, H, W], over K they sum to 1
    slots = 1 + weights[..., None] * (to_rgb(output.recons[i]) - 1)           # [K, H, W, 3]
    if attention:
        weights, slots = attention_over(image, output.attn[i, -1])
    shares = torch.einsum("khw,kc->hwc", weights.float(), COLORS[:len(weights)]).clamp(0, 1)
    return [to_rgb(image), to_rgb(output.recon_combined[i]), shares, *slots]


def figure_3(name, images, outputs, parts="abc"):
    """images [B, 3, H, W], outputs {iterations: Decomposition} -> blocks for `draw`: (a) all, (b), (c) the first."""
    scenes = [(f"scene {i + 1}", scene_row(image, outputs[max(outputs)], i)) for i, image in enumerate(images)]
    steps = [(f"iteration {t}", output) for t, output in outputs.items()]
    attention = [(label, scene_row(images[0], output, 0, attention=True)) for label, output in steps]
    decomposition = [(label, scene_row(images[0], output, 0)) for label, output in steps]
    blocks = {"a": (f"(a) Decomposition: {name}" if "b" in parts else name, scenes),
              "b": ("(b) Attention at each iteration", attention),
              "c": ("(c) Decomposition after each iteration", decomposition)}
    return [blocks[part] for part in parts]


def show(axis, picture, color="black"):
    """A picture [H, W, 3] in a frame."""
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=color, linewidth=2)


def draw(blocks, figure=None):
    """blocks: (title, [(label, pictures [H, W, 3])]) each -> a figure, one under the other. The first three pictures of
    a row are of the whole scene; then comes one per slot, framed in its colour."""
    columns = max(len(pictures) for _, rows in blocks for _, pictures in rows)
    heights = [len(rows) + 0.6 for _, rows in blocks]
    heads = ["image", "reconstruction", "all masks"] + [f"slot {k + 1}" for k in range(columns - 3)]
    figure = figure or Figure(figsize=(1.1 * columns + 0.6, 1.1 * sum(heights)), layout="constrained")
    figure.clear()
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (title, rows), part in zip(blocks, parts):
        part.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = part.subplots(len(rows), columns, squeeze=False)
        for axis, head in zip(axes[0], heads):
            axis.set_title(head, fontsize=9)
        for row, (label, pictures) in zip(axes, rows):
            row[0].set_ylabel(label, fontsize=9)
            for axis, picture, color in zip(row, pictures, 3 * ["black"] + COLORS.tolist()):
                show(axis, picture, color)
            for axis in row[len(pictures):]:  # of another run with more slots
                axis.set_visible(False)
    return figure


def figure_set_prediction(images, output, target=None):
    """Of each slot its attention, and as predicted: place (3), size (2), material (2), shape (3), color (8), object."""
    def place(coords):  # [..., 3] as predicted -> column and row in the resized picture, seen from CLEVR's mean camera
        return data.project((6 * coords - 3).numpy())[..., :2] * size / (480, 320)
    K, size, names = output.predictions.shape[1], np.array(images.shape[:1:-1]), data.CLEVR_TARGETS.values()
    figure = Figure(figsize=(1.3 * K + 2.6, 2.6 * len(images)), layout="constrained")
    figure.suptitle("Where each slot sees its object (rings: true places), its attention, what it predicts")
    axes = figure.subplots(len(images), K + 1, squeeze=False, width_ratios=[2] + K * [1])
    for i, (whole, *row) in enumerate(axes):
        show(whole, to_rgb(images[i]))
        if target is not None:
            whole.scatter(*place(target[i, target[i, :, 18] > 0.5, :3]).T, s=130, facecolors="none", edgecolors="white")
        _, overlays = attention_over(images[i], output.attn[i, -1])
        for k, (axis, overlay, pred) in enumerate(zip(row, overlays, output.predictions[i].float())):
            show(axis, overlay, COLORS[k].tolist())
            words = ["no object"]
            if pred[18] > 0.5:
                words = [values[score.argmax()] for values, score in zip(names, pred[3:18].split([2, 2, 3, 8]))]
                whole.text(*place(pred[:3]), k + 1, fontsize=6, ha="center", va="center", color="white", clip_on=True,
                           bbox={"boxstyle": "circle,pad=0.2", "color": COLORS[k].tolist()})
            axis.set(title=f"slot {k + 1}", xlabel="\n".join(words))
    return figure


def figure_curve(runs):
    """Of each run the loss, and FG-ARI or AP, against steps."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for run, color in zip(runs, COLORS.tolist()):
        rows = [json.loads(line) for line in read_checkpoint(run).get("log", "").splitlines()]
        evaluations = [row for row in rows if "eval_loss" in row]
        if not evaluations:
            raise ValueError(f"{run} has no log with an evaluation")
        keys = [key for key in evaluations[-1] if key.startswith(("loss", "eval_loss", "ari", "ap_"))]
        for key, style in zip(keys, ("-", "o:", "o-", "s--", "^-.", "v:", "D:")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis = upper if "loss" in key else lower
            axis.plot(*zip(*points), style, color=color, linewidth=1, markersize=3, label=f"{run}: {key}")
    upper.set(ylabel="loss", yscale="log")
    lower.set(ylabel="FG-ARI or AP", xlabel="steps", ylim=(None, 1))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


# --- Command line ----------------------------------------------------------------------------------------------------


def number(kind, low, high):
    """The type of a flag: an int or a float from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
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
    """-> [B, 3, H, W] in [-1, 1]: the central square (of CLEVR's pictures what the model was trained on), on white."""
    pictures = []
    for path in paths:
        with data.reading(path), Image.open(path, formats=("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")) as file:
            if file.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            picture = ImageOps.exif_transpose(file).convert("RGBA")  # none of these formats runs programs
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        clevr = config["data"].startswith("clevr") and picture.size[::-1] in data.CLEVR_CROP
        picture = picture if clevr else ImageOps.fit(picture, 2 * [config["resolution"]], Image.Resampling.BOX)
        pictures.append(data.resize(np.array(picture), config["resolution"], config["crop"] if clevr else "none"))
    return data.Scenes(np.stack(pictures)).batch(torch.arange(len(pictures)))["image"]


@torch.no_grad()
def make_figure(args, runs):
    """-> a function that writes the figure to a path."""
    blocks = []
    for run in runs:
        checkpoint = read_checkpoint(run)
        model, config = load_model(checkpoint), checkpoint["config"]
        if args.images:
            batch = {"image": load_pictures(args.images, config)}
        elif args.figure == "clip":
            if config["resolution"] != 35:
                raise ValueError(f"--figure clip shows Tetrominoes of 35 x 35, which {run} is not for; try --images")
            batch = data.Scenes(data.make_moving_tetrominoes(args.count, args.seed)).batch(torch.arange(args.count))
        else:
            keys = "data_root", "eval_count", "resolution", "crop", "min_objects", "max_objects"
            scenes = data.load(config["data"], "eval", *(config[key] for key in keys))
            batch = scenes.batch(torch.arange(min(args.count, len(scenes))))
        images, target = batch["image"], batch.get("target")
        K, T = args.num_slots or config["num_slots"], args.num_iterations or config["num_iterations"]
        noise = torch.randn(len(images), K, config["slot_dim"], generator=torch.Generator().manual_seed(args.seed))
        slots = model.slot_attention.init_slots(noise)                        # [B, K, D]
        if isinstance(model, SlotAttentionClassifier):
            return figure_set_prediction(images, model(images, slots, num_iterations=T), target).savefig
        if args.figure == "clip":
            rows, slots = [], slots[:1]
            for t, frame in enumerate(images):
                output = model(frame[None], slots, num_iterations=T)
                rows.append((f"frame {t + 1}", scene_row(frame, output, 0)))
                slots = output.slots  # where the next frame starts
            blocks.append(("Slots carried from frame to frame", rows))
        else:
            outputs = {t: model(images, slots, num_iterations=t) for t in (1, 2, 3, 5, T) if t <= T}
            blocks += figure_3(config["data"], images, outputs, args.figure if len(runs) == 1 else "a")
    if not str(args.out).endswith(".gif"):
        return draw(blocks).savefig
    title, rows = blocks[-1]  # animated, a row at a time
    figure = draw([(title, rows[:1])])
    movie = FuncAnimation(figure, lambda t: draw([(title, rows[t:t + 1])], figure), len(rows))
    return lambda path: movie.save(path, writer="pillow", fps=2)


def main(argv=None):
    parser = argparse.ArgumentParser("visualize.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="folders or files of weights (of set prediction one); else the newest")
    parser.add_argument("--figure", choices=("a", "b", "c", "abc", "curve", "clip"), default="abc", help="what to draw")
    parser.add_argument("--count", type=number(int, 1, 100), default=4, help="held-out scenes, or frames of the clip")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="draw these pictures instead")
    parser.add_argument("--num-slots", type=number(int, 1, 100), help="other than in training")
    parser.add_argument("--num-iterations", type=number(int, 1, 100), help="other than in training")
    parser.add_argument("--seed", type=number(int, 0, 1e9), default=0, help="of the slots' initial noise")
    parser.add_argument("--out", help="default: figure.png in the run's folder; a .gif shows the last part row by row")
    args = parser.parse_args(argv)
    newest = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    runs = args.run or [str(path.parent) for path in newest] or [str(WEIGHTS)]
    with data.one_line_errors():
        folder = Path(runs[0]) if len(runs) == 1 and Path(runs[0]).is_dir() else Path()
        out = Path(args.out or folder / ("curve.png" if args.figure == "curve" else "figure.png"))
        out = out.with_suffix(out.suffix or ".png")
        write = figure_curve(runs).savefig if args.figure == "curve" else make_figure(args, runs)
        with data.whole_file(out) as part:
            write(part)
    data.say(f"drew {out}")


if __name__ == "__main__":
    main()
