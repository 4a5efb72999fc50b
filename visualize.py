"""Draws what a trained model sees: the paper's Figure 3, and more.

    python visualize.py [RUN ...]                 Figure 3: scenes (a), attention (b) and masks (c)
                                                  by iteration; of several runs only (a)
    python visualize.py RUN --figure row          one row per scene, with attention by iteration
    python visualize.py RUN --figure curve        the training curves, of several runs as well
    python visualize.py RUN --images a.png b.jpg  your own pictures
    python visualize.py RUN --figure clip --images 1.png 2.png ...
                                                  a video: each frame's slots start from
                                                  those of the frame before

RUN is a run's folder or a file of weights [assets/tetrominoes.pt]. A model for set prediction has a
figure of its own. Figures are written into the run's folder; for weights, or several runs, into
the current one.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import data  # before torch, see there
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from data import InputError
from slot_attention import WeightsError, attributes, load_model

WEIGHTS = Path(__file__).parent / "assets/tetrominoes.pt"
# The slots' colours, repeated; the first are Okabe and Ito's, which colour-blind people can tell.
COLORS = to_rgba_array((
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442 "
    "navy saddlebrown limegreen darkviolet teal").split() * 100)[:, :3]

# --- Load ---------------------------------------------------------------------------------------


def read_run(path):
    """Returns the checkpoint in a run's folder, or the content of a file of weights, as a dict.

    Its "config" has task and arguments of the model as well. A file of weights may be somebody
    else's, so of its config only the name of the dataset (of data.FILES, else ""), the crop and the
    numbers of objects are taken. Raises InputError if there is no such file, or none of this
    project.
    """
    file = f"{path}/checkpoint.pt" if os.path.isdir(path) else path
    checkpoint = data.read_file(file)
    with data.reading(file):  # whatever is missing
        config = checkpoint["config"]
        if file == path:
            config = {key: config[key] for key in "data crop min_objects max_objects".split()}
            if config["data"] not in data.FILES:  # a folder: nobody else chooses what is read
                config["data"] = ""
        checkpoint["config"] = {"task": checkpoint["task"], **checkpoint["arguments"], **config}
    return checkpoint


def load_run(path):
    """Returns a run's model, for evaluation without gradients, and its checkpoint (read_run)."""
    checkpoint = read_run(path)
    return load_model(checkpoint).eval().requires_grad_(False), checkpoint


def load_split(config, split, count=None):
    """Returns a split of a run's dataset as Scenes: at most `count`, if its config does not say."""
    return data.load(
        config["data"], split, config.get("data_root", "data"),
        config.get(f"{split}_count", count), config["resolution"], config["crop"],
        config["min_objects"], config["max_objects"], config.get("masks"))


def load_batch(checkpoint, images, count):
    """Returns a batch of the user's pictures, or of `count` held-out scenes of the run's dataset.

    image [B, 3, H, W] in [-1, 1], maybe target [B, 10, 19]; see data.Scenes. A picture becomes its
    central square; one of CLEVR's own, for a model of CLEVR, is cropped as in training.
    """
    config = checkpoint["config"]
    resolution = config["resolution"]
    if images:
        pictures = []
        for path in images:
            picture = data.read_picture(path)
            array = np.array(picture)
            if config["data"] in ("clevr", "clevr_like") and array.shape[:2] in data.CLEVR_CROP:
                array = data.resize(data.cropped(array, config["crop"]), resolution)
            else:
                array = data.square(picture, resolution)
            pictures.append(array)
        return data.Scenes(np.stack(pictures)).batch(range(len(pictures)))

    scenes = load_split(config, "eval", count)
    return scenes.batch(range(min(count, len(scenes))))


# --- Compute ------------------------------------------------------------------------------------
# A figure has rows: a label, and a list of cells. A cell is (head, picture [H, W, 3] in [0, 1],
# colour of its frame). First come the cells of the whole scene, framed in black, then one for each
# slot, framed in its colour.


def to_rgb(picture):
    """Converts a tensor [..., 3, H, W] in [-1, 1] to an array [..., H, W, 3] in [0, 1]."""
    return (picture / 2 + 0.5).clamp(0, 1).movedim(-3, -1).numpy(force=True)


def slot_cells(head, weights, pictures, background):
    """Yields a cell of a background in all slots' colours, then one of each slot's picture on it.

    weights [K, h, w] sum to 1 over the slots. pictures [K, H, W, 3], or the slots' plain colours
    [K, 3]. background [H, W, 1 or 3].
    """
    weights = F.interpolate(weights[:, None], background.shape[:2], mode="nearest-exact")
    weights = weights.movedim(1, 3).numpy(force=True)                   # [K, H, W, 1]
    colored = sum(weight * color for weight, color in zip(weights, COLORS))
    yield head, background * colored, "black"
    for k, (weight, picture) in enumerate(zip(weights, pictures)):
        yield f"slot {k + 1}", background + weight * (picture - background), COLORS[k]


def mask_cells(image, output, i=0):
    """Returns the cells of scene i: image [3, H, W], reconstruction, all masks, slots on white."""
    image = to_rgb(image)
    slots = slot_cells("all masks", output.masks[i, :, 0], to_rgb(output.recons[i]),
                       np.ones_like(image))
    return [
        ("image", image, "black"),
        ("reconstruction", to_rgb(output.recon_combined[i]), "black"),
        *slots,
    ]


def attention_cells(image, attn, head="attention"):
    """Yields the cells of attn [K, h, w], of all slots and of each, over the image in grey."""
    grey = 0.4 * to_rgb(image).mean(2, keepdims=True) + 0.6             # [H, W, 1]
    return slot_cells(head, attn, COLORS, grey)


# --- Draw ---------------------------------------------------------------------------------------


def draw(rows, height=1.65):
    """Returns a Figure of rows, each `height` inches high. A title is drawn where it changes."""
    columns = max(len(cells) for _, cells in rows)
    figure = Figure((1.6 * columns, height * len(rows)), layout="constrained")
    heads = {}
    for i, (label, cells) in enumerate(rows):
        for k, (head, picture, color) in enumerate(cells):
            axis = figure.add_subplot(len(rows), columns, i * columns + k + 1)
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[], ylabel="" if k else label)
            axis.spines[:].set_color(color)
            axis.spines[:].set_linewidth(2)
            if heads.get(k) != head:
                axis.set_title(head)
            heads[k] = head
    return figure


def show_masks(images, output):
    """Returns a Figure, as Figure 3 (a), of images [B, 3, H, W] in [-1, 1] and their output."""
    return draw(scene_rows("scene", images, output))


def draw_objects(batch, output):
    """Returns a Figure of a SetPrediction: each slot's attention, and the object that it predicts.

    Numbers stand where the slots see their objects, rings where the true ones are.
    """
    rows = [
        ("", [("image", to_rgb(image), "black"), *attention_cells(image, attn)])
        for image, attn in zip(batch["image"], output.attn[:, -1])]
    figure = draw(rows, 2.6)
    axes = np.reshape(figure.axes, (len(rows), -1))                     # [B, 2 + K]
    size = batch["image"].shape[-1]
    for i, (whole, _, *each) in enumerate(axes):
        if "target" in batch:
            target = batch["target"][i]
            real = target[target[:, 18] > 0.5]
            whole.plot(*place(real, size), "wo", fillstyle="none", markersize=13)
        for k, prediction in enumerate(output.predictions[i]):
            words = ["no object"]
            if prediction[18] > 0.5:
                chosen = zip(data.CLEVR_TARGETS, attributes(prediction))
                words = [names[index] for names, index in chosen]
                circle = {"boxstyle": "circle,pad=0.2", "color": COLORS[k]}
                whole.text(*place(prediction, size), k + 1, color="white", size=7,
                           ha="center", va="center", bbox=circle)
            each[k].set_xlabel("\n".join(words))
    return figure


def place(objects, size):
    """Returns where CLEVR's mean camera sees objects [..., 19]: columns, rows of size x size."""
    pixel = data.project(6 * objects[..., :3].numpy(force=True) - 3)              # of 480 x 320
    return (pixel / (480, 320) * size - 0.5).T


def draw_curves(runs):
    """Returns a Figure of each run's losses, and FG-ARI or AP, against steps."""
    figure = Figure((9, 6), layout="constrained")
    losses, scores = figure.subplots(2, sharex=True)
    losses.set(ylabel="loss (training: including the slot loss)", yscale="log")
    scores.set(ylabel="FG-ARI or AP", xlabel="steps")
    for run in runs:
        with data.reading(f"{run}/log.jsonl"), open(f"{run}/log.jsonl") as log:
            rows = [json.loads(line) for line in log if line.endswith("\n")]  # not cut by a kill
        for key in "loss eval_loss fg_ari ap_inf ap_1 ap_0.5 ap_0.25 ap_0.125".split():
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis = losses if "loss" in key else scores
            if points:
                axis.plot(*zip(*points), marker=".", label=f"{run}: {key}")
    figure.legend(loc="outside right upper")
    return figure


def draw_runs(args):
    """Returns the Figure that --figure names, of one or several runs."""
    if args.figure == "curve":
        return draw_curves(args.runs)
    several = len(args.runs) > 1
    rows = []
    for run in args.runs:
        model, checkpoint = load_run(run)
        batch = load_batch(checkpoint, args.images, args.count)
        images = batch["image"]
        is_set = checkpoint["task"] == "set_prediction"
        if is_set and (several or args.figure):
            raise InputError("runs of set prediction are drawn one at a time, without --figure")
        model = partial(model, num_slots=args.num_slots, num_iterations=args.num_iterations)
        torch.manual_seed(0)
        if args.figure == "clip":
            rows += clip_rows(model, images)
            continue
        output = model(images)
        if is_set:
            return draw_objects(batch, output)
        if args.figure == "row":
            rows += wide_rows(images, output)
        elif several:
            rows += scene_rows(Path(run).name.removesuffix(".pt"), images, output)
        else:
            rows += scene_rows("(a) scene", images, output)
            rows += iteration_rows(model, images, output.attn.shape[1])
    return draw(rows)


def scene_rows(label, images, output):
    """Returns a row for each image, as in part (a) of Figure 3."""
    return [(f"{label} {i + 1}", mask_cells(image, output, i)) for i, image in enumerate(images)]


def iteration_rows(model, images, T):
    """Yields parts (b) and (c) of Figure 3: scene 1, attention and masks by iteration, up to T."""
    masks = []
    for t in range(1, T + 1):
        if t in (1, 2, 3, 5, T):
            torch.manual_seed(0)  # the initial slots of (a): the noise is of the whole batch
            output = model(images, num_iterations=t)
            cells = mask_cells(images[0], output)
            attention = attention_cells(images[0], output.attn[0, -1])
            yield f"(b) iteration {t}", [*cells[:2], *attention]
            masks.append((f"(c) iteration {t}", cells))
    yield from masks


def wide_rows(images, output):
    """Yields a row for each image, with its attention over the iterations."""
    T = output.attn.shape[1]
    for i, image in enumerate(images):
        attention = [
            next(attention_cells(image, attn, f"attention,\niteration {t}"))  # of all slots
            for t, attn in enumerate(output.attn[i], start=1)
            if t in (1, 2, 3, T)]
        cells = mask_cells(image, output, i)
        yield "", cells[:2] + attention + cells[2:]


def clip_rows(model, frames):
    """Yields a row a frame. The slots of a frame are the initial slots of the next."""
    slots = None
    for i, frame in enumerate(frames):
        output = model(frame[None], slots)
        slots = output.slots
        yield f"frame {i + 1}", mask_cells(frame, output)


# --- Command line -------------------------------------------------------------------------------


def positive(text):
    """Returns a flag's value, a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", default=[WEIGHTS])
    add("--figure", choices="row curve clip".split(), help="other than Figure 3, see above")
    add("--images", nargs="+", metavar="FILE", help="draw these pictures instead")
    add("--count", type=positive, default=4, help="held-out scenes to draw [4]")
    add("--num-slots", type=positive, help="slots [as in training]")
    add("--num-iterations", type=positive, help="iterations [as in evaluation]")
    add("--out", type=Path, help="[figure.png, row.png, curve.png, clip.png or images.png]")
    args = parser.parse_args(argv)
    with data.one_line_errors(WeightsError):
        run, *others = args.runs
        folder = "" if others or os.path.isfile(run) else run
        name = args.figure or ("images" if args.images else "figure")
        out = args.out or Path(folder, f"{name}.png")
        figure = draw_runs(args)
        kind = out.suffix[1:]
        if kind not in figure.canvas.get_supported_filetypes():
            raise InputError(f"--out {out}: {kind!r} is not a known kind of file")
        with data.whole_file(out) as file:
            figure.savefig(file, format=kind)
        data.say(f"drew {out}")


if __name__ == "__main__":
    main()
