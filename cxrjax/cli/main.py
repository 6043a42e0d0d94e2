"""The verbs: each does its work in the package and returns what `--json` writes. Their words are in `words`."""

import argparse
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from cxrjax.cli import explain as explaining
from cxrjax.cli.arguments import parser
from cxrjax.cli.prepare import options
from cxrjax.config import load
from cxrjax.console import progress_bar, print_text, stderr, stdout
from cxrjax.errors import CxrError, out_of_memory
from cxrjax.files import write_text


class Rows(list):
    """A result of many rows, and why those that `failed` are not whole."""

    def __init__(self, rows: Sequence[Any], failed: dict[str, str]):
        super().__init__(rows)
        self.failed = failed


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb; the value is the exit code: 0 only on success, 128 + n when signal n stopped the work."""
    program = parser(RUN)
    words = sys.argv[1:] if words is None else words
    overrides = [word for word in words if word.startswith("--config.")]
    arguments, unknown = program.parse_known_args([word for word in words if word not in overrides])
    if unknown:
        program.error(f"unknown argument {unknown[0]}; see cxrjax {arguments.verb} --help")
    if overrides and not hasattr(arguments, "config"):
        program.error(f"cxrjax {arguments.verb} takes no {overrides[0].partition('=')[0]}")
    arguments.overrides = overrides
    if not arguments.debug:
        _quiet()
    # With --json - standard output holds the JSON and nothing else.
    elsewhere = _on_stderr() if arguments.json == "-" else nullcontext()
    try:
        with elsewhere:
            result = arguments.run(arguments)
        if arguments.json and result is not None:  # of several processes the first has the result
            _write_json(arguments.json, result)
        _others("leave")
        failed = result.get("failed") if isinstance(result, dict) else getattr(result, "failed", None)
        return _fail(_failures(failed), 1) if failed else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if arguments.debug:
            raise
        if asked := out_of_memory(error):
            return _exhausted(arguments, asked)
        if isinstance(error, CxrError) and hasattr(error, "number"):  # a signal, and all stop at the same step
            _others("leave")
        return _fail(*_explain_error(error))


@contextmanager
def _on_stderr() -> Iterator[None]:
    """What is printed meanwhile goes to standard error: also by libraries that are not Python, as Gloo is."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _exhausted(arguments: argparse.Namespace, asked: str) -> int:
    """A device without enough memory: what needs less, and for training what the plan says of it."""
    from cxrjax.distributed.runtime import first
    from cxrjax.planning import oom_advice

    code = _fail(f"out of device memory ({asked} asked for); what needs less: {oom_advice.mend(arguments)}", 1)
    _others("go")  # they end as well, with this one or for the same reason
    if arguments.verb == "train" and first():
        with suppress(KeyboardInterrupt):
            oom_advice.advise(arguments)
    return code


def _quiet() -> None:
    """Libraries' own remarks are for developers; what they raise is reported here, in one line."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda _: None  # of Orbax's threads, when the error is under way already


_BROKEN_OFF = r"[A-Z_]+: .*(Gloo|NCCL|oordination service)"
"""What XLA says of a collective that failed; outside of compiled steps JAX raises it as a ValueError."""


def _explain_error(error: Exception) -> tuple[str, int]:
    if isinstance(error, CxrError):
        return str(error), 128 + getattr(error, "number", 1 - 128)
    if type(error).__name__ == "JaxRuntimeError" or re.match(_BROKEN_OFF, str(error)):  # JAX, slow to load, is there
        from cxrjax.distributed.runtime import lost, several

        if several():
            return str(lost(error)), 1
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(cause):
            named = getattr(cause, "filename", None) or next(iter(re.findall(r'"(/[^"]+)"', str(cause))), None)
            where = f" (writing {named})" if named else ""
            return f"the disk is full{where}: free some space and give the same command again, it goes on", 1
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 1
    return f"a fault of cxrjax itself, {type(error).__name__}: {error}; --debug shows where", 1


def _failures(failed: dict[str, str]) -> str:
    """Parts of the work that could not be done, while the rest was."""
    return "; ".join([f"{len(failed)} could not be used", *list(failed.values())[:5]])


def _fail(message: str, code: int) -> int:
    stderr.print(f"cxrjax: {' '.join(message.split())}", style="red" if code < 128 else "yellow", soft_wrap=True)
    return code


def _write_json(file: str, result: Any) -> None:
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(file), text)


def _keep_compiled(directory: Path) -> None:
    from cxrjax.distributed.runtime import keep_compiled

    keep_compiled(directory / "cache")


def _demo(arguments: argparse.Namespace) -> Any:
    from cxrjax.cli.demo import demo

    recipe = "demo_full" if arguments.full else "demo"
    directory = arguments.workdir or Path("runs") / recipe.replace("_", "-")
    _keep_compiled(directory)
    return demo(directory, recipe=recipe)


def _prepare(arguments: argparse.Namespace) -> Any:
    from tfds_builders.prepare import prepare_sizes

    made = prepare_sizes(
        arguments.dataset, arguments.size, source=arguments.source, data_dir=arguments.data_dir,
        allow_missing=arguments.allow_missing, workers=arguments.workers, repair=arguments.repair,
        beam=arguments.beam_options if arguments.beam else None, **options(arguments),
    )  # fmt: skip
    for prepared in made:
        done = "was prepared before" if prepared.reused else f"prepared in {prepared.seconds:.0f} s"
        print_text(
            f"{prepared.images:,} images of {prepared.patients:,} patients, {prepared.bytes / 1e6:,.0f} MB, {done}: "
            f"{prepared.directory}\nfingerprint {prepared.fingerprint}"
        )
    results = [{**vars(prepared), "directory": str(prepared.directory)} for prepared in made]
    return results[0] if len(results) == 1 else results


def _train(arguments: argparse.Namespace) -> Any:
    from cxrjax.distributed.runtime import first
    from cxrjax.metrics.auc import mean_auroc
    from cxrjax.train.stages import train_stages

    config = load(arguments.config, arguments.overrides)
    _join(arguments)
    _keep_compiled(arguments.workdir)
    progress = train_stages(config, arguments.workdir, mean_auroc, profile=arguments.profile)
    best = (
        ""
        if progress.best is None
        else f", best {config.train.watch} {abs(progress.best):.4f} at step {progress.best_step}"
    )
    early = ", stopped early" if progress.stopped_early else ""
    waiting = "" if progress.data_wait is None else f", {progress.data_wait:.1%} of the time waiting for data"
    print_text(f"trained {progress.step} steps{early}{best}{waiting}: {arguments.workdir}")
    result = {"directory": str(arguments.workdir), **vars(progress), "data_wait": progress.data_wait}
    return result if first() else None


def _join(arguments: argparse.Namespace) -> None:
    """Find the other processes, if there are any."""
    from cxrjax.distributed.runtime import start

    start(
        arguments.coordinator, arguments.processes, arguments.process, timeout=arguments.join_timeout,
        asks=arguments.verb in ("train", "study"),
    )  # fmt: skip


def _evaluate(arguments: argparse.Namespace) -> Any:
    from cxrjax.distributed.mesh import mesh_of
    from cxrjax.runs.evaluate_run import evaluate_run

    _join(arguments)
    _keep_compiled(arguments.run_directory)
    return evaluate_run(
        arguments.run_directory, part=arguments.split, data_dir=arguments.data_dir, resamples=arguments.resamples,
        batch=arguments.batch, mesh=mesh_of(arguments.mesh) if arguments.mesh else None,
    )  # fmt: skip


def _score(arguments: argparse.Namespace) -> Any:
    from cxrjax.metrics.score_files import score_files
    from cxrjax.report.tables import terminal

    scores = score_files(arguments.predictions, arguments.labels, resamples=arguments.resamples, seed=arguments.seed)
    rows = scores.rows()
    stdout.print(terminal({"AUROC": rows}, [row["finding"] for row in rows if row["finding"] != "mean"]))
    return scores.as_dict()


def _predict(arguments: argparse.Namespace) -> Any:
    from cxrjax.runs.predict_run import predict_files

    return predict_files(
        arguments.directory, arguments.images, size=arguments.size, batch=arguments.batch, passes=arguments.passes,
        threshold=arguments.uncertain, out=arguments.out, overlays=arguments.overlays,
        findings=_labels(arguments.findings),
    )  # fmt: skip


def _explain(arguments: argparse.Namespace) -> Any:
    from cxrjax.distributed.runtime import in_first

    _join(arguments)
    _keep_compiled(arguments.run_directory)
    return in_first(lambda: explaining.explain(arguments))


def _models(arguments: argparse.Namespace) -> Any:
    from cxrjax.planning.model_summary import detail, entries, overview

    listed = entries(arguments.names, size=arguments.size, classes=arguments.classes)
    for table in map(detail, listed) if arguments.names else [overview(listed)]:
        stdout.print(table)
    return [each.as_dict() for each in listed]


def _study(arguments: argparse.Namespace) -> Any:
    spec = arguments.config or arguments.what
    _join(arguments)
    _keep_compiled(arguments.workdir)
    if arguments.what == "resolution":
        from cxrjax.studies.resolution.study import resolution

        return resolution(spec, arguments.overrides, arguments.workdir, arguments.only)
    if arguments.only:
        raise CxrError(f"--only is for the study of resolution; that of {arguments.what} trains its arms in turn")
    from cxrjax.studies.system_study import arms

    return arms(arguments.what, spec, arguments.overrides, arguments.workdir)


def _plan(arguments: argparse.Namespace) -> Any:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a device; the target's compiler needs none
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from cxrjax.planning.sweep import run

    return run(arguments)


def _bench(arguments: argparse.Namespace) -> Any:
    from cxrjax.planning import benchmark

    wanted = benchmark.cases(arguments.cases, arguments.dtypes, arguments.remats, arguments.steps, arguments.mesh)
    if arguments.config:
        wanted.append(benchmark.Case.of(load(arguments.config, arguments.overrides), arguments.steps))
    if not wanted:
        raise CxrError("nothing to measure: name ARCH:SIZE:BATCH, such as densenet121:1024:8, or --config F")
    measured = []
    with progress_bar("measuring", len(wanted), unit="cases") as advance:
        for row in benchmark.rows(wanted, inference=arguments.inference):
            measured.append(row)
            advance()
    failed = benchmark.failures(measured)
    for case, error in failed.items():
        print_text(f"{case}: {error}")
    if all("error" in row for row in measured):
        raise CxrError("nothing could be measured")
    stdout.print(benchmark.table(measured))
    return Rows(measured, failed)


def _weights(arguments: argparse.Namespace) -> Any:
    from cxrjax.weights import convert

    report = convert(
        arguments.file, arguments.arch, arguments.out, head=arguments.head, labels=_labels(arguments.labels),
        inputs=arguments.inputs, channels=arguments.channels, options=dict(arguments.option),
    )  # fmt: skip
    for line in report.lines():
        print_text(line)
    return report.as_dict()


def _labels(text: str) -> list[str]:
    """Names separated by commas, or the lines of a file."""
    try:
        if text and "," not in text and Path(text).is_file():
            return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # one long name
            raise
    return [label.strip() for label in text.split(",")] if text else []


RUN = {
    "demo": _demo,
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "score": _score,
    "predict": _predict,
    "explain": _explain,
    "models": _models,
    "study": _study,
    "plan": _plan,
    "bench": _bench,
    "weights": _weights,
}


def _others(end: str) -> None:
    """What `parallel.runtime` says to other processes, if there are any, before this one ends: `leave` or `go`."""
    if runtime := sys.modules.get("cxrjax.distributed.runtime"):  # which is loaded, with JAX, by verbs that need it
        getattr(runtime, end)()


def entry() -> None:
    """The program. A failure ends it at once: threads of a write that failed would go on to complain at length."""
    try:
        code = main()
    except Exception as error:  # --debug
        traceback.print_exception(error)
        code = _explain_error(error)[1]
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        _others("go")
        os._exit(code)


if __name__ == "__main__":
    entry()
