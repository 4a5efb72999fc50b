"""Draws what a trained model sees: the paper's Figure 3, and more.

    python visualize.py                           the newest run under runs/; before there is one the demo's weights
    python visualize.py RUN                       a run's folder, or a file of weights
    python visualize.py RUN RUN RUN               one sheet, as in the paper: a row for each
    python visualize.py RUN --images a.png b.jpg  your own pictures
    python visualize.py RUN --out iterations.gif  the iterations, animated
    python visualize.py RUN --figure curve        the training curve
    python visualize.py RUN --figure clip         slots carried through a clip of moving Tetrominoes
    python visualize.py --official PREFIX --images a.png   the official CLEVR weights
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps  # Pillow comes with matplotlib

import data
import train
from data import say
from slot_attention import load_official_weights, minimum_cost_matching

matplotlib.use("Agg")
matplotlib.rc("savefig", dpi=120)
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend that needs no screen
from matplotlib.animation import PillowWriter  # noqa: E402

# A run of `python train.py --seed 0` without its optimizer:
# c = torch.load("runs/demo/checkpoint.pt"); del c["optimizer"]; torch.save(c, "assets/demo.pt")
DEMO = Path(__file__).resolve().parent / "assets" / "demo.pt"
# The slots', the same in every figure: tab10's, then their lighter twins, without the greys; after 18 from the start.
TAB20 = plt.get_cmap("tab20").colors
COLORS = torch.tensor([TAB20[k] for k in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5, 7, 9, 11, 13, 17, 19)]).repeat(57, 1)
WIDTH, CELL = 8.7, 1.15  # of a figure and, at most, of a picture in it, in inches

# ---------------------------------------------------------------------------------------------------------------------
# Pictures of slots
# ---------------------------------------------------------------------------------------------------------------------


def to_rgb(picture):
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in [0, 1]."""
    return (picture.float() / 2 + 0.5).clamp(0, 1).movedim(-3, -1)


def colored(weights):
    """Weights [K, H, W] that sum to 1 over the slots -> [H, W, 3], each slot in its colour."""
    return torch.einsum("khw,kc->hwc", weights, COLORS[:len(weights)]).clamp(0, 1)


def attention_over(image, attn):
    """image [3, H, W], attn [K, h, w] -> attn [K, H, W], each cell a block of pixels (nothing is smoothed), and for
    each slot the grey image tinted with its colour [K, H, W, 3]."""
    attn = F.interpolate(attn[None].float(), image.shape[1:], mode="nearest-exact")[0]        # [K, H, W]
    grey = to_rgb(image).mean(-1, keepdim=True) * 0.6 + 0.2                                    # [H, W, 1]
    return attn, grey + attn[..., None] * (COLORS[:len(attn), None, None] - grey)


def attention_row(output, i, image):
    """Scene i: image, reconstruction, coloured attention, then each slot's attention over the image."""
    attn, overlays = attention_over(image, output.attn[i, -1])
    return [to_rgb(image), to_rgb(output.recon_combined[i]), colored(attn), *overlays]


def decomposition_row(output, i, image):
    """Scene i: image, reconstruction, coloured masks, then each slot's picture where its mask is, on white."""
    masks = output.masks[i, :, 0]                                                             # [K, H, W]
    slots = 1 + masks[..., None] * (to_rgb(output.recons[i]) - 1)
    return [to_rgb(image), to_rgb(output.recon_combined[i]), colored(masks), *slots]


@torch.no_grad()
def follow(model, frames, noise, num_iterations):
    """Carries slots through a video: each frame starts from the slots of the frame before, the first from the noise.

    frames: images [B, 3, H, W], noise [B, K, D] -> the model's output for each frame. One image T times, at one
    iteration a frame, gives the output after each of T iterations."""
    outputs, slots = [], model.slot_attention.init_slots(noise)
    for frame in frames:
        outputs.append(model(frame, slots=slots, num_iterations=num_iterations))
        slots = outputs[-1].slots
    return outputs


def figure_blocks(subjects, panels):
    """subjects: of each run (labels of its scenes [B], frames, outputs of `follow`); panels: of a, b, c, clip -> blocks
    for `draw`. (a) shows every scene at the end, the others the first scene of each run through time."""
    blocks = []
    for panel in panels:
        if panel == "a":
            rows = [(labels[i], decomposition_row(outputs[-1], i, image))
                    for labels, frames, outputs in subjects for i, image in enumerate(frames[-1])]
            blocks.append(("(a) Decomposition", "masks", rows))
            continue
        title, head, pictures = {"b": ("(b) Attention at each iteration", "attention", attention_row),
                                 "c": ("(c) Decomposition after each iteration", "masks", decomposition_row),
                                 "clip": ("Slots carried from frame to frame", "masks", decomposition_row)}[panel]
        for labels, frames, outputs in subjects:
            rows = [(f"{'frame' if panel == 'clip' else 'iteration'} {t + 1}", pictures(output, 0, frame[0]))
                    for t, (frame, output) in enumerate(zip(frames, outputs))]
            blocks.append((title + (f": {labels[0]}" if len(subjects) > 1 else ""), head, rows))
    return blocks


def draw(blocks, figure=None):
    """blocks: (title, head of the third column, [(label, pictures [H, W, 3])]) each -> a figure, one under the other.
    The first three pictures of a row are of the whole scene; then comes one per slot, framed in its colour."""
    columns = max(len(pictures) for _, _, rows in blocks for _, pictures in rows)
    cell = min(CELL, WIDTH / columns)
    heights, font = [len(rows) + 0.65 / cell for _, _, rows in blocks], 9 * (cell / CELL) ** 0.75
    figure = figure or plt.figure(figsize=(cell * columns + 0.6, cell * sum(heights) + 0.1), layout="constrained")
    figure.clear()
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (title, head, rows), part in zip(blocks, parts):
        part.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = part.subplots(len(rows), columns, squeeze=False)
        for k, axis in enumerate(axes[0]):
            axis.set_title(("image", "reconstruction", head)[k] if k < 3 else f"slot {k - 2}", fontsize=font)
        for row, (label, pictures) in zip(axes, rows):
            row[0].set_ylabel(label, fontsize=font)
            for k, axis in enumerate(row):
                axis.set(xticks=[], yticks=[], frame_on=k < len(pictures), box_aspect=1)
                if k < len(pictures):
                    axis.imshow(pictures[k].numpy(), interpolation="nearest")
                if k >= 3:
                    axis.spines[:].set(color=COLORS[k - 3].tolist(), linewidth=2)
    return figure


def save_gif(subjects, step, out):
    """Every scene through time as an animated GIF, which rests on its end."""
    movie = []
    for t in range(1, 1 + max(len(frames) for _, frames, _ in subjects)):
        until_t = [(labels, frames[:t], outputs[:t]) for labels, frames, outputs in subjects]
        (_, head, rows), = figure_blocks(until_t, "a")
        movie.append([(f"{step} {t}", head, rows)])
    figure, writer = draw(movie[0]), PillowWriter(fps=2)
    with writer.saving(figure, out, dpi=100):
        for blocks in movie + 3 * movie[-1:]:
            draw(blocks, figure)
            writer.grab_frame()


@torch.no_grad()
def figure_set_prediction(model, images, target, noise, num_iterations):
    """images [B, 3, H, W], target [B, 10, 19] or None -> a figure: for each scene the image, with the slots' numbers
    where they place their objects, then each slot's attention over it and what it predicts."""
    output = model(images, slots=model.slot_attention.init_slots(noise), num_iterations=num_iterations)
    pred, colors, size = output.predictions, COLORS[:noise.shape[1]].tolist(), images.shape[2:]
    matched = torch.zeros_like(pred)                                          # [B, K, 19], each prediction's target
    if target is not None:
        cost = (pred[:, None] - target[:, :, None]).square().mean(-1)         # [B, target, pred]
        rows, cols = minimum_cost_matching(cost)
        scenes = torch.arange(len(pred))[:, None]
        matched[scenes, cols] = target[scenes, rows]

    def place(coords):  # [..., 3] as predicted -> column and row in the squashed picture, of CLEVR's mean camera
        return data.project((6 * coords - 3).numpy())[..., :2] * np.array([size[1] / 480, size[0] / 320])

    half = (len(colors) + 1) // 2  # the slots stand in two rows beside the image
    cell = min(CELL, WIDTH / (2 + half))
    figure = plt.figure(figsize=(cell * (2 + half), 2 * (cell + 0.6) * len(images) + 0.6), layout="constrained")
    title = "Set prediction: where each slot sees its object, its attention, what it predicts and how sure it is"
    if target is not None:
        title += "\nRings: true places. ✓ the matched object is so, and nearer than 1; ✗ not so; – rightly no object"
    figure.suptitle(title, fontsize=9)
    grid = figure.add_gridspec(2 * len(images), 2 + half)
    for i, image in enumerate(images):
        whole = figure.add_subplot(grid[2 * i:2 * i + 2, :2], title=f"scene {i + 1}")
        whole.imshow(to_rgb(image).numpy(), interpolation="nearest")
        if target is not None:
            true = target[i, target[i, :, 18] > 0.5, :3]
            whole.scatter(*place(true).T, s=130, facecolors="none", edgecolors="white")
        for k, (p, t, overlay) in enumerate(zip(pred[i], matched[i], attention_over(image, output.attn[i, -1])[1])):
            axis = figure.add_subplot(grid[2 * i + k // half, 2 + k % half])
            axis.imshow(overlay.numpy(), interpolation="nearest")
            axis.spines[:].set(color=colors[k], linewidth=2)
            words, right, start = [], t[18] > 0.5 and 6 * (p[:3] - t[:3]).norm() < 1, 3
            for names in data.CLEVR_TARGETS.values():
                said, wanted = (x[start:start + len(names)].argmax() for x in (p, t))
                words, right, start = words + [names[said]], right and said == wanted, start + len(names)
            if p[18] < 0.5:
                sign, caption = "–" if t[18] < 0.5 else "✗", "no object"
            else:
                sign, caption = "✓" if right else "✗", "{0} {3}\n{1} {2}\n".format(*words) + f"{p[18]:.0%}"
                whole.text(*place(p[:3]), k + 1, fontsize=6, color="white" if sum(colors[k]) < 1.9 else "black",
                           ha="center", va="center", bbox=dict(boxstyle="circle,pad=0.2", color=colors[k]))
            axis.set_title(f"slot {k + 1} {sign if target is not None else ''}", fontsize=8)
            axis.set_xlabel(caption, fontsize=7)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[], xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
    return figure


def figure_curve(runs):
    """The log.jsonl of each run -> loss, and FG-ARI or AP if there is one, against steps and, of one run, minutes."""
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(WIDTH, 5.2), layout="constrained")
    for i, run in enumerate(runs):
        if not run.exists():
            raise FileNotFoundError(f"there is no {run}")
        log = (run if run.is_dir() else run.parent) / "log.jsonl"
        rows = [{**row, **{f"AP {key}": ap for key, ap in row.get("ap", {}).items()}} for _, row in
                train.read_log(log.read_bytes())]
        evals = [row for row in rows if "eval_loss" in row]
        if not evals:
            raise ValueError(f"{log}: no log of a training run with an evaluation")
        steps, minutes = [0] + [row["step"] for row in rows], [0] + [row["seconds"] / 60 for row in rows]
        folder = log.resolve().parent.name.replace("$", r"\$")
        name, color = f"{folder} ({minutes[-1]:.1f} minutes)", plt.cm.viridis(i / max(len(runs), 2))
        loss = [row["loss"] for row in rows]
        upper.plot(steps[1:], loss, color=color, linewidth=0.6, label=f"{name}: loss, as trained on")
        metrics = [key for key in evals[-1] if key == "ari" or key.startswith("AP")]
        for key, style in zip(["eval_loss", *metrics], ("o-", "o-", "o--", "o-.", "o:", "o")):
            axis, label = (lower, key.replace("ari", "FG-ARI")) if key in metrics else (upper, "loss, held out")
            axis.plot([row["step"] for row in evals], [row.get(key, np.nan) for row in evals], style, color=color,
                      markersize=3, label=f"{name}: {label}")
    upper.set(yscale="log", xlim=(0, max(line.get_xdata()[-1] for line in upper.lines)))
    lower.set(xlabel="steps", ylim=(None, 1))
    if len(runs) == 1 and minutes[-1] > 0:
        steps, minutes = steps + [2 * steps[-1]], minutes + [2 * minutes[-1]]  # interp stops at the end, ticks don't
        scales = (lambda x: np.interp(x, steps, minutes)), (lambda x: np.interp(x, minutes, steps))
        upper.secondary_xaxis("top", functions=scales).set_xlabel("minutes")
    for axis in filter(lambda axis: axis.lines, (upper, lower)):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def newest_run():
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        say("no run under runs/: drawn with assets/demo.pt, the weights of a run of python train.py --seed 0")
    return runs[-1].parent if runs else DEMO


def load(run, official):
    """A run, or the prefix of the official weights (the paper's CLEVR6 model) -> config, model."""
    if not official:
        checkpoint = train.load_checkpoint(run)
        return checkpoint["config"], train.load_model(checkpoint, run)
    config = dict(train.DEFAULTS, data="clevr", task="object_discovery", crop="official")
    model = train.build_model(config)
    try:
        load_official_weights(model, official)
    except Exception as error:  # of files from elsewhere: zip and pickle errors among them
        raise ValueError(f"--official {official}: {error}") from None
    return config, model


def load_pictures(paths, config):
    """Pictures of any mode and size -> [B, 3, H, W] in [-1, 1]: the central square (of one of CLEVR's size the crop of
    the model's training), resized as in training; white under what is transparent."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path, formats=("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")) as file:  # no programs
                picture = ImageOps.exif_transpose(file)
            if picture.mode == "F":
                raise ValueError("its pixels are floats: save it with 8 or 16 bits")
            if picture.mode.startswith("I"):  # 16 bits, which convert would clip
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).round().astype(np.uint8))
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = np.array(Image.alpha_composite(white, picture).convert("RGB"))
        except Exception as error:  # Pillow has many ways to say it
            raise ValueError(f"--images {path}: no picture that can be read ({error})") from None
        height, width = picture.shape[:2]
        known = config["data"].startswith("clevr") and (height, width) in data.CLEVR_CROP
        if not known:
            side = min(height, width)
            picture = picture[(height - side) // 2:, (width - side) // 2:][:side, :side]
        pictures.append(data.resize(picture, config["resolution"], config["crop"] if known else "none"))
    return data.Scenes(np.stack(pictures)).batch(torch.arange(len(pictures)))["image"]


def make_parser():
    parser = train.Parser(prog="visualize.py", description=__doc__.split("\n\n")[0])
    add, number = parser.add_argument, train.parse_value(1, 100)
    add("run", nargs="*", help="a run's folder, or a file of weights; the newest under runs/ if not given")
    add("--figure", choices=("a", "b", "c", "all", "curve", "clip"),
        help="parts of Figure 3 (all for one run, a for several), the training curve, or slots carried through a clip")
    add("--count", type=number, help="held-out scenes (4; of several runs one each), or frames of the clip (8)")
    add("--images", nargs="+", metavar="FILE", help="draw these pictures instead")
    add("--official", metavar="PREFIX", help="the official CLEVR weights, a TensorFlow checkpoint or an .npz file")
    add("--num-slots", type=number, help="other than in training")
    add("--num-iterations", type=number, help="other than in training")
    add("--data-root", help="where the real files are, if not where training found them")
    add("--seed", type=train.parse_value(0), default=0, help="of the slots' initial noise")
    add("--out", help="the picture's path, animated if .gif; else figure.png (curve.png) in the run's folder, or here")
    return parser


def make_figure(args, runs, animated):
    """Draws what was asked for -> a function that writes it to a path."""
    if args.figure == "curve":
        return figure_curve(runs).savefig
    subjects, panel = [], args.figure or ("all" if len(runs) == 1 else "a")
    for run in runs:
        config, model = load(run, args.official)
        model.slot_attention.implicit = False  # without gradients its last iteration is one like the others
        num_iterations = args.num_iterations or config["num_iterations"] + config["implicit"]  # T, or T + 1 as trained
        target = None
        if panel == "clip":
            if (config["data"], config["task"], config["resolution"]) != ("tetrominoes", "object_discovery", 35):
                raise ValueError(f"--figure clip shows moving Tetrominoes of 35 x 35, but {run} is of {config['data']}")
            clip = data.Scenes(data.make_moving_tetrominoes(1, args.count or 8, seed=args.seed)["image"][0])
            frames = list(clip.batch(torch.arange(len(clip)))["image"][:, None])
        elif args.images:  # a still picture is a clip of T equal frames, at one iteration a frame
            frames = num_iterations * [load_pictures(args.images, config)]
        else:
            root = args.data_root or config["data_root"]
            scenes = train.load_scenes({**config, "data_root": root, "download": False}, "eval")
            batch = scenes.batch(torch.arange(min(args.count or (4 if len(runs) == 1 else 1), len(scenes))))
            frames, target = num_iterations * [batch["image"]], batch.get("target")
        generator = torch.Generator().manual_seed(args.seed)
        shape = len(frames[0]), args.num_slots or config["num_slots"], config["slot_dim"]
        noise = torch.randn(shape, generator=generator)
        if config["task"] == "set_prediction":
            if len(runs) > 1:
                raise ValueError(f"{run} is of set prediction, which is drawn one run at a time")
            return figure_set_prediction(model, frames[0], target, noise, num_iterations).savefig
        outputs = follow(model, frames, noise, num_iterations if panel == "clip" else 1)
        names = [Path(path).stem.replace("$", r"\$") for path in args.images or ()]
        names = names or [f"scene {i + 1}" for i in range(len(noise))]
        names = [name if len(name) < 16 else f"…{name[-14:]}" for name in names]
        labels = names if len(runs) == 1 else len(noise) * [config["data"]]
        subjects.append((labels, frames, outputs))
    if animated:
        return lambda path: save_gif(subjects, "Frame" if panel == "clip" else "Iteration", path)
    return draw(figure_blocks(subjects, "abc" if panel == "all" else [panel])).savefig


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        special = args.figure in ("curve", "clip")
        if args.official and (args.run or special or not (args.images or args.data_root)):
            raise ValueError("--official draws Figure 3 of --images, or of CLEVR under --data-root, and takes no run")
        idle = {"images": ("count", "data_root"), "clip": ("images", "data_root"),
                "curve": ("images", "data_root", "count", "num_slots", "num_iterations")}
        for key in idle.get(args.figure if special else "images" if args.images else None, ()):
            if getattr(args, key):
                what = f"--figure {args.figure}" if special else "--images"
                raise ValueError(f"{what} takes no {train.flag(key)}")
        runs = [Path(run) for run in args.run] or [DEMO if args.official else newest_run()]
        folder = runs[0] if runs[0].is_dir() else runs[0].parent if runs[0].name == "checkpoint.pt" else Path()
        name = "curve.png" if args.figure == "curve" else "figure.png"
        out = Path(args.out) if args.out else (folder if len(runs) == 1 else Path()) / name
        out = out if out.suffix else out.with_suffix(".png")
        if out.suffix == ".gif" and args.figure in ("b", "c", "curve"):
            raise ValueError(f"{out}: --figure {args.figure} does not move; a .gif shows --figure a or clip")
        save = make_figure(args, runs, animated=out.suffix == ".gif")
        with train.whole_file(out) as part:
            save(part)
        plt.close("all")
        say(f"drew {out}")


if __name__ == "__main__":
    main()
