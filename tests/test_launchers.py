"""The launch scripts, with stand-ins for the commands of the cluster."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from cxrjax.cli.main import make_parser
from cxrjax.config import load_config
from cxrjax.distributed.mesh import check_divides

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def parse(command: list[str]):
    """Parse the arguments after `cxrjax` with its own parser."""
    return make_parser().parse_known_args(command[command.index("cxrjax") + 1 :])[0]


@pytest.fixture
def cluster(tmp_path):
    """`cluster(code) -> (environment, log)`: an `srun` that logs its arguments and exits with `code`."""

    def make(code: int):
        log = tmp_path / "log"
        for name, status in (("srun", code), ("scontrol", 0)):
            file = tmp_path / name
            file.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {log}\necho >> {log}\nexit {status}\n')
            file.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}, log

    return make


@pytest.mark.parametrize(("code", "requeue"), [(0, []), (143, ["scontrol requeue 7 "]), (1, [])])
def test_slurm_starts_the_run_and_requeues_it_when_it_was_stopped(cluster, code, requeue):
    environment, log = cluster(code)
    script = ["bash", str(SCRIPTS / "slurm.sbatch"), "resolution:2048", "my runs/a", "--config.mesh.space=4"]
    ended = subprocess.run(script, env=environment, check=False)
    assert ended.returncode == (1 if code == 1 else 0)
    first, *rest = log.read_text().splitlines()
    assert rest == requeue
    arguments = parse(shlex.split(first))
    assert (arguments.config, str(arguments.workdir)) == ("resolution:2048", "my runs/a")
    assert arguments.coordinator == "auto"


def test_slurm_and_the_pod_script_start_studies_too(cluster):
    environment, log = cluster(0)
    environment |= {"COMMAND": "study resolution", "DRY_RUN": "1"}
    subprocess.run(["bash", str(SCRIPTS / "slurm.sbatch"), "resolution", "runs/s"], env=environment, check=True)
    script = ["bash", str(SCRIPTS / "tpu_pod.sh"), "pod", "resolution", "runs/s"]
    printed = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    command = shlex.split(printed)
    for started in (log.read_text(), command[command.index("--command") + 1]):
        arguments = parse(shlex.split(started))
        assert (arguments.command, arguments.what, arguments.coordinator) == ("study", "resolution", "auto")
        assert (arguments.config, str(arguments.workdir)) == ("resolution", "runs/s")


def test_slurm_without_arguments_prints_its_usage(cluster):
    ended = subprocess.run(
        ["bash", str(SCRIPTS / "slurm.sbatch")], env=cluster(0)[0], capture_output=True, text=True, check=False
    )
    assert ended.returncode
    assert "usage: sbatch" in ended.stderr


def test_a_dry_run_of_the_pod_script_prints_the_command():
    script = ["bash", str(SCRIPTS / "tpu_pod.sh"), "pod", "resolution:1024", "runs/it's mine", "--config.mesh.space=2"]
    environment = {**os.environ, "DRY_RUN": "1", "ZONE": "here"}
    printed = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    command = shlex.split(printed)
    assert command[-2:] == ["--zone", "here"]
    arguments = parse(shlex.split(command[command.index("--command") + 1]))
    assert (str(arguments.workdir), arguments.coordinator) == ("runs/it's mine", "auto")


def test_the_numbers_of_the_jobset_agree():
    jobset = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    command = [text.replace("$(JOB_COMPLETION_INDEX)", "0") for text in (*container["command"], *container["args"])]
    arguments = parse(command)
    assert arguments.processes == job["parallelism"] == job["completions"]
    name = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
    assert arguments.coordinator == f"{name}:{container['ports'][0]['containerPort']}"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_the_jobs_of_the_jobset_follow_the_schema_of_kubernetes():
    jobset = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    [workers] = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": workers["name"]}, **workers["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["port"] = 8476  # not ports
    with pytest.raises(kubernetes_validate.ValidationError, match="'port' was unexpected"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def examples() -> dict[str, tuple[int, list[str]]]:
    """Return the documented uses of the scripts: the number of devices and the arguments of the run."""
    readme = (SCRIPTS.parent / "README.md").read_text()
    matches = {name: re.search(rf"^{start}.*?(?= +#)", readme, re.MULTILINE) for name, start in
               (("sbatch in README", "sbatch"), ("tpu_pod.sh in README", "scripts/tpu_pod"))}  # fmt: skip
    comments = {name: re.sub(r"\\\n#", "", (SCRIPTS / name).read_text()) for name in ("slurm.sbatch", "tpu_pod.sh")}
    matches |= {name: re.search(r"^# +(?:sbatch|ZONE=).*", text, re.MULTILINE) for name, text in comments.items()}
    [job] = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    runs = {name: shlex.split(match[0]) for name, match in matches.items() if match} | {"jobset": container["args"]}
    return {name: (32 if name == "jobset" else 16 if "sbatch" in name else 256, run) for name, run in runs.items()}


@pytest.mark.parametrize("name", ["sbatch in README", "tpu_pod.sh in README", "slurm.sbatch", "tpu_pod.sh", "jobset"])
def test_documented_runs_fit_their_machines(name):
    devices, arguments = examples()[name]
    (recipe,) = {text for text in arguments if "resolution:2048" in text}
    overrides = [text.removeprefix("--config.") for text in arguments if text.startswith("--config.")]
    config = load_config(recipe.removeprefix("--config="), overrides)
    space, data = config.mesh.space, devices // config.mesh.space
    check_divides("the batch", config.train.batch_size, "data", data)
    check_divides("the rows", config.data.image_size, "space", space)
