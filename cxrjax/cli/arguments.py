"""The words of the program: every verb with its options, apart from the work, whose libraries take seconds to load."""

import argparse
import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cxrjax import __version__
from cxrjax.cli import explain as explaining
from cxrjax.cli.prepare import add_arguments, count
from cxrjax.planning import benchmark

STUDIES = ("resolution", "fhrnet", "transfer", "attention_fusion", "sequential_cnn")
EPILOG = "`cxrjax VERB --help` says more. Every verb takes --json FILE (- for standard output) and --debug."


def parser(run: Mapping[str, Callable[[argparse.Namespace], Any]]) -> argparse.ArgumentParser:
    """All verbs; `run` has the function of each, which becomes `arguments.run`."""
    made = argparse.ArgumentParser(
        prog="cxrjax", description="Chest X-ray classifiers at full resolution.", epilog=EPILOG, allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=f"cxrjax {__version__}")
    verbs = made.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )  # fmt: skip
        sub.set_defaults(run=run[name])
        sub.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = verb("demo", "the main job on the embedded phantom data, from rendering to the report")
    demo.add_argument("--workdir", type=Path, help="where everything goes (default: runs/demo, or runs/demo-full)")
    demo.add_argument("--full", action="store_true", help="also at 256 and 512 px, with several seeds")

    prepare = verb("prepare", "turn a source of radiographs into sharded records, at one size or several")
    add_arguments(prepare)

    train = verb("train", "train one config; goes on by itself where it was stopped")
    _add_config(train)
    train.add_argument(
        "--profile", type=_steps, metavar="steps=A:B",
        help="trace steps A to B into WORKDIR/profile, for TensorBoard's profiler and Perfetto (ui.perfetto.dev); of "
        "several processes the first",
    )  # fmt: skip
    _add_processes(train)

    evaluate = verb("evaluate", "predictions, scores with intervals, and a page for one run")
    _add_run(evaluate)
    evaluate.add_argument("--batch", type=count, help="images at once; default: the config's evaluate.batch")
    _add_processes(evaluate)
    evaluate.add_argument("--resamples", type=int, help="bootstrap resamples of patients; default: the config's")

    score = verb("score", "the same scores for anyone's predictions")
    score.add_argument(
        "--predictions", type=Path, required=True, help="CSV or Parquet with an id and prob_<finding> columns"
    )
    score.add_argument("--labels", type=Path, help="CSV or Parquet with labels, or NIH's Data_Entry_2017 table")
    score.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap resamples of patients (default: 1000; 0: no intervals)"
    )
    score.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")

    predict = verb("predict", "probabilities for image files; those that cannot be used are named")
    predict.add_argument(
        "directory", type=Path, metavar="RUN", help="the directory of a trained run, or of converted weights"
    )
    predict.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE",
        help="files or folders; .npy: float N x H x W x C, prepared as the network expects",
    )  # fmt: skip
    predict.add_argument("--size", type=int, default=0, help="side in px; default: the one trained at")
    predict.add_argument("--batch", type=int, default=16, help="images at once (default: 16)")
    predict.add_argument("--out", type=Path, help="write a table, .csv, .csv.gz or .parquet, which score reads")
    predict.add_argument(
        "--passes", type=int, metavar="T",
        help="Monte Carlo dropout, where the network has dropout (default: as on validation, else 100); 0: none, "
        "uncertainty is then the entropy of the probabilities",
    )  # fmt: skip
    predict.add_argument(
        "--uncertain", type=float, metavar="X", help="flag images above this; default: chosen on validation by evaluate"
    )
    predict.add_argument("--overlays", type=Path, metavar="DIR", help="write Grad-CAM overlays, DIR/FINDING/IMAGE.png")
    predict.add_argument(
        "--findings", default="", metavar="A,B,...",
        help="of the overlays, on every image; default: those above their thresholds",
    )  # fmt: skip
    predict.epilog = (
        "The table has the probability of each finding, the calibrated one where `cxrjax evaluate RUN` fitted "
        "temperatures on validation, the uncertainty, and whether that is above the threshold chosen there. Exit code "
        "1: some files could not be used; all others were."
    )

    explain = verb("explain", "where a trained network looks: effective receptive field, or saliency maps")
    _add_run(explain)
    explaining.add_arguments(explain)
    _add_processes(explain, "; the first explains, on its own devices")

    models = verb("models", "the networks: parameters, feature maps, receptive fields, GFLOPs, inputs")
    models.add_argument("names", nargs="*", metavar="NAME", help="all feature maps of these; default: a line for each")
    models.add_argument("--size", type=int, default=224, help="side of the images in px (default: 224)")
    models.add_argument("--classes", type=int, default=14, help="number of findings (default: 14)")
    models.epilog = (
        "GFLOPs: two per multiply-add of the convolutions and matrix products of one image's forward pass. field: side "
        "of the theoretical receptive field."
    )

    study = verb("study", "several runs and one report")
    study.add_argument(
        "what", choices=STUDIES, metavar="WHAT",
        help="resolution: a run of each size, in each fold, and their ensembles; fhrnet, transfer, attention_fusion or "
        "sequential_cnn: the arms of a published system, compared with each other and with its paper",
    )  # fmt: skip
    study.add_argument(
        "--only", default="", metavar="NAME",
        help="resolution: train one run and nothing else, as a job of its own, in WORKDIR/runs/NAME, such as "
        "1024px-fold3; many such jobs may share a WORKDIR. Without it, what is missing is trained, and all is gathered",
    )  # fmt: skip
    _add_config(study, required=False)
    _add_processes(study, "; all train and predict, the first explains and reports")

    plan = verb("plan", "whether the training step fits a machine that need not be here, and what bounds it")
    _add_recipe(plan, required=True)
    plan.add_argument(
        "--device", required=True, metavar="D", help="h200, h100, a100-80, a100-40, v5e, v5p or v6e"
    )  # fmt: skip
    plan.add_argument(
        "--mesh", default="", metavar="data=D,space=S",
        help="devices that share a batch, and devices that share the rows of an image (default: the config's)",
    )  # fmt: skip
    plan.add_argument(
        "--batch", type=int, metavar="N", help="images of a step, over all devices (default: the config's)"
    )
    plan.add_argument("--largest", action="store_true", help="find the largest batch that fits: several compilations")
    plan.add_argument(
        "--sweep", action="store_true",
        help="a table of sizes, meshes and ways of recomputing, N images (default 1) for each part of `data`",
    )  # fmt: skip
    plan.add_argument("--sizes", type=count, nargs="+", metavar="PX", help="of --sweep (default: 512 1024 2048)")
    plan.add_argument(
        "--meshes", nargs="+", default=[], metavar="data=D,space=S",
        help="of --sweep (default: one device, rows over 4 and 8, 2 x 4, 4 x 2, 8 x 1)",
    )  # fmt: skip
    plan.add_argument(
        "--remats", nargs="+", choices=("none", "layer", "block", "full"), help="of --sweep (default: the config's)"
    )
    plan.add_argument(
        "--estimate", action="store_true", help="from the traced step, without the compiler of the device"
    )

    measured = verb("bench", "speed and memory of training and inference on this machine's device")
    _add_recipe(measured, required=False, otherwise="none")
    benchmark.add_arguments(measured)

    weights = verb("weights", "published PyTorch or safetensors weights, converted strictly")
    weights.add_argument("what", choices=("convert",), help="convert: to weights.safetensors and card.json")
    weights.add_argument("file", type=Path, metavar="FILE", help="safetensors, or what torch.save wrote; never run")
    weights.add_argument("--arch", required=True, metavar="NAME", help="the network that the weights are of")
    weights.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the converted weights go")
    weights.add_argument("--head", choices=("keep", "drop"), default="keep", help="the file's outputs (default: keep)")
    weights.add_argument(
        "--labels", default="", metavar="A,B,...", help="names of the outputs, or a file with one a line"
    )
    weights.add_argument("--inputs", metavar="NAME", help="what the weights expect: imagenet, unit, grey or xrv")
    weights.add_argument("--channels", type=int, choices=(1,), help="fold the first convolution to 1 channel")
    weights.add_argument(
        "--option", type=_option, action="append", default=[], metavar="KEY=VALUE", help="of the network; repeatable"
    )
    return made


def _add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    _add_recipe(parser, required=required)
    parser.add_argument("--workdir", type=Path, required=True, help="the directory of the run; made if absent")


def _add_recipe(parser: argparse.ArgumentParser, *, required: bool, otherwise: str = "the study's own") -> None:
    parser.add_argument(
        "--config", required=required, metavar="F[:ARG]",
        help="a recipe's file, or the name of one of configs/" + ("" if required else f" (default: {otherwise})"),
    )  # fmt: skip
    parser.epilog = (
        "--config.KEY=VALUE changes one key of the recipe, for example --config.train.epochs=3. The keys: " + _keys()
    )


def _add_processes(parser: argparse.ArgumentParser, sharing: str = "") -> None:
    group = parser.add_argument_group("several processes", f"each is given the same words but for --process{sharing}")
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT",
        help="process 0; auto: SLURM, Open MPI or a TPU pod says it, and the numbers too",
    )  # fmt: skip
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="K", help="which of them this is, from 0")
    group.add_argument(
        "--join-timeout", type=count, default=300, metavar="S", help="seconds to wait for all (default: 300)"
    )


def _keys() -> str:
    from cxrjax.config import default, flatten

    return ", ".join(flatten(default()))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="the directory of a trained run")
    parser.add_argument("--split", default="test", help="train, validation or test (default: test)")
    parser.add_argument("--data-dir", type=Path, help="where the prepared data lie now; default: where they were")
    parser.add_argument(
        "--mesh", metavar="data=D,space=S",
        help="devices that share a batch, and that share the rows of an image (default: as in training if there are "
        "enough, else each takes whole images)",
    )  # fmt: skip


def _steps(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"steps=([0-9]+):([0-9]+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not steps=A:B with two numbers, such as steps=10:15")
    first, last = map(int, found.groups())
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r}: steps count from 1, and the second must not be before the first")
    return first, last


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
