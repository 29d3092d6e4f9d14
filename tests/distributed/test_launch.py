"""What docs/launch.md tells users to type, and the files to copy beside it, as far as one machine can show it.

Two agents of torchrun on loopback stand for two machines, small scripts for Slurm's commands, and the environment that
an Indexed Job gives for Kubernetes. A real cluster has not been tried.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from gemmule.train.checkpoint import checkpoints
from runs import (
    STEADY,
    assert_same_curve,
    final_weights,
    gemmule,
    overrides,
    steps_done,
    timeless_metrics,
    wait_until,
    workers,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
CHANGES = overrides(*STEADY, "train.steps=60")


def documented(beginning: str) -> list[str]:
    """Return the words of the one command of the page that begins so."""
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(rf"^    ({re.escape(beginning)} .*)$", page, re.MULTILINE)
    return shlex.split(command)


def exported() -> dict[str, object]:
    """Return the variables that the page sets for several machines."""
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^    export (\w+)=(\S+)$", page, re.MULTILINE))


def given(words: list[str], **values: object) -> list[str]:
    """Return a command with other values of options that it has."""
    words = list(words)
    for name, value in values.items():
        words[words.index("--" + name.replace("_", "-")) + 1] = str(value)
    return words


def trains(words: list[str], recipe: Path, run: Path, *changes: str) -> list[str]:
    """Return a command that trains another recipe into another folder, with some settings changed."""
    place = words.index("train") + 1
    return [*given([*words[:place], str(recipe), *words[place + 1 :]], out=run), *CHANGES, *overrides(*changes)]


def on_two_machines(recipe: Path, run: Path, *changes: str) -> list[str]:
    """Return the documented command of several machines, for two of one process each, which meet at a free port."""
    words = trains(documented("torchrun --nnodes"), recipe, run, *changes)
    return given(words, nnodes=2, nproc_per_node=1, rdzv_endpoint=f"localhost:{free_port()}")


def free_port() -> int:
    """Find a port that nobody listens on, among those that systems do not hand out by themselves."""
    for port in range(20_000 + os.getpid() % 5_000, 30_000):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def write_program(file: Path, lines: str) -> None:
    """Write a script and make it a program."""
    file.write_text(lines, encoding="utf-8")
    file.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with the programs that a user has on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    return folder


@contextmanager
def started(
    words: list[str], programs: Path, environment: Mapping[str, object] | None = None, folder: Path | None = None
) -> "Iterator[subprocess.Popen[str]]":
    """Start a command with these programs on the path; neither it nor its workers outlive the block."""
    chosen = exported() if environment is None else environment
    variables = {name: str(value) for name, value in chosen.items()}
    variables = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
    with subprocess.Popen(words, env=variables, cwd=folder, stderr=subprocess.PIPE, text=True, errors="replace") as one:
        try:
            yield one
        finally:
            left = [*workers(one.pid), one.pid] if one.poll() is None else []
            for process in left:
                os.kill(process, signal.SIGKILL)


def expect_success(*processes: "subprocess.Popen[str]") -> str:
    """Wait until all have ended well; return what they told."""
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)
    return "\n".join(told)


def expect_saved(run: Path, *processes: "subprocess.Popen[str]") -> None:
    """Wait until all have ended for the signal they got; the step that they say is saved, is."""
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode for process in processes)
    ((step, again),) = re.findall(r"stopped after step (\d+), which is saved; resume with:  (.*)", "\n".join(told))
    assert checkpoints(run)[0].name == f"step-{int(step):08d}"
    assert "--resume" in again


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The run of one process, by the documented command."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert gemmule(*trains(documented("gemmule train"), tiny_recipe, run)[1:]).code == 0
    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The run of two processes on one machine, by the documented command."""
    folder = tmp_path_factory.mktemp("straight")
    words = given(documented("torchrun --standalone"), nproc_per_node=2)
    write_program(folder / "torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    with started(trains(words, tiny_recipe, folder / "run"), folder) as process:
        expect_success(process)
    return folder / "run"


def assert_same_run(run: Path, straight: Path) -> None:
    """Two processes do the same arithmetic wherever they are."""
    assert final_weights(run) == final_weights(straight)
    assert timeless_metrics(run) == timeless_metrics(straight)


def test_processes_of_one_machine_learn_what_one_does(straight: Path, alone: Path) -> None:
    assert_same_curve(straight, alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_two_machines_learn_what_one_process_does(
    tiny_recipe: Path, tmp_path: Path, programs: Path, alone: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    words = on_two_machines(tiny_recipe, run, f"parallel.strategy={strategy}")
    with started(words, programs) as one, started(words, programs) as other:
        expect_success(one, other)
    assert_same_curve(run, alone)


@pytest.mark.parametrize("where", [0, 1])
def test_machines_whose_process_is_killed_start_again_together(
    tiny_recipe: Path, tmp_path: Path, programs: Path, straight: Path, where: int
) -> None:
    run = tmp_path / "run"
    words = on_two_machines(tiny_recipe, run, "parallel.strategy=ddp")
    words.remove("--resume")  # not all of the torchruns may know that there was a run before; one is enough
    with started(words, programs) as one, started(words, programs) as other:
        wait_until(lambda: len(checkpoints(run)) > 0)
        os.kill(workers((one, other)[where].pid)[0], signal.SIGKILL)
        told = expect_success(one, other)
    assert re.search(r"resuming from .*step-\d+, after step", told)
    assert_same_run(run, straight)


def test_a_machine_that_is_lost_is_replaced(tiny_recipe: Path, tmp_path: Path, programs: Path, straight: Path) -> None:
    run = tmp_path / "run"
    words = on_two_machines(tiny_recipe, run, "parallel.strategy=ddp")
    with ExitStack() as stack:
        keeper = stack.enter_context(started(words, programs))
        wait_until(lambda: not connection_refused(words))  # it keeps the list of those that are there
        lost = stack.enter_context(started(words, programs))
        wait_until(lambda: len(checkpoints(run)) > 0)
        (process,) = workers(lost.pid)
        for victim in (lost.pid, process):
            os.kill(victim, signal.SIGKILL)
        told = expect_success(keeper, stack.enter_context(started(words, programs)))
    assert re.search(r"resuming from .*step-\d+, after step", told)
    assert_same_run(run, straight)


def connection_refused(words: list[str]) -> bool:
    host, _, port = words[words.index("--rdzv-endpoint") + 1].partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def test_a_signal_to_every_machine_saves(tiny_recipe: Path, tmp_path: Path, programs: Path, straight: Path) -> None:
    run = tmp_path / "run"
    words = on_two_machines(tiny_recipe, run, "parallel.strategy=ddp")
    with started(words, programs) as one, started(words, programs) as other:
        wait_until(lambda: steps_done(run) >= 4)
        for agent in (one, other):
            agent.send_signal(signal.SIGTERM)
        expect_saved(run, one, other)
    with started(words, programs) as one, started(words, programs) as other:
        expect_success(one, other)
    assert_same_run(run, straight)


def test_a_signal_to_one_machine_saves_on_all_and_they_wait_for_another(
    tiny_recipe: Path, tmp_path: Path, programs: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    words = on_two_machines(tiny_recipe, run, "parallel.strategy=ddp")
    with ExitStack() as stack:
        keeper = stack.enter_context(started(words, programs))
        wait_until(lambda: not connection_refused(words))
        drained = stack.enter_context(started(words, programs))
        wait_until(lambda: steps_done(run) >= 4)
        drained.send_signal(signal.SIGTERM)
        drained.communicate(timeout=300)
        saved = checkpoints(run)[0].name.removeprefix("step-")
        told = expect_success(keeper, stack.enter_context(started(words, programs)))
    assert f"after step {int(saved)}" in told
    assert_same_run(run, straight)


# Slurm's commands: srun starts a task on each node, and kills all of them if it is asked to end itself.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -KILL $(cat "$SLURM_TEST/tasks")' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" &
    echo $! >> "$SLURM_TEST/tasks"
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo localhost; done ;;
"requeue $SLURM_JOB_ID") touch "$SLURM_TEST/requeued" ;;
*) echo "scontrol $*?" >&2; exit 1 ;;
esac
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$SLURM_TEST/tasks")
"""


@pytest.fixture
def slurm(tmp_path: Path, programs: Path) -> dict[str, object]:
    """What Slurm sets for a job of two nodes without GPUs; its commands are on the path."""
    for name, lines in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        write_program(programs / name, lines)
    job = 40_000 + free_port() - 20_000  # the script makes that port of it
    return {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_NTASKS": 2,
        "SLURM_TEST": tmp_path,
    }


def slurm_words(recipe: Path, run: Path) -> list[str]:
    return ["bash", str(LAUNCH / "slurm.sh"), str(recipe), str(run), *CHANGES]


def test_the_slurm_script_trains(
    tiny_recipe: Path, tmp_path: Path, programs: Path, slurm: dict[str, object], straight: Path
) -> None:
    run = tmp_path / "run"
    with started(slurm_words(tiny_recipe, run), programs, slurm) as job:
        expect_success(job)
    assert not (tmp_path / "requeued").exists()
    assert_same_run(run, straight)


def test_the_slurm_script_saves_before_the_time_limit_and_goes_on_in_the_queue(
    tiny_recipe: Path, tmp_path: Path, programs: Path, slurm: dict[str, object], straight: Path
) -> None:
    run = tmp_path / "run"
    with started(slurm_words(tiny_recipe, run), programs, slurm) as job:
        wait_until(lambda: steps_done(run) >= 4)
        job.send_signal(signal.SIGUSR1)  # --signal=B:USR1, to the script alone
        expect_saved(run, job)
    assert (tmp_path / "requeued").exists()
    (tmp_path / "tasks").unlink()
    with started(slurm_words(tiny_recipe, run), programs, slurm | {"SLURM_RESTART_COUNT": 1}) as job:
        assert "resuming from" in expect_success(job)
    assert_same_run(run, straight)


def test_the_slurm_script_does_not_queue_what_failed(
    tiny_recipe: Path, tmp_path: Path, programs: Path, slurm: dict[str, object]
) -> None:
    words = [*slurm_words(tiny_recipe, tmp_path / "run"), *overrides("train.steps=0")]
    with started(words, programs, slurm) as job:
        _, told = job.communicate(timeout=300)
    assert job.returncode != 0
    assert "train.steps = 0: must be a whole number from 1 to 1,000,000,000" in told
    assert not (tmp_path / "requeued").exists()


def test_the_pods_of_the_manifest_train_and_save(
    tiny_recipe: Path, tmp_path: Path, programs: Path, straight: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    manifest = (LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8")
    service, job = yaml.safe_load_all(manifest)
    pods, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # What the names that pods find each other by hang on.
    assert pods["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    bash, option, script = container["command"]
    assert f"--rdzv-endpoint {first}:29500" in script
    assert pods["completions"] == pods["parallelism"] == int(re.findall(r"--nnodes (\d+)", script)[0])
    fixed = {entry["name"]: entry.get("value", "127.0.0.1") for entry in container["env"]}
    assert int(fixed["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["data"] == container["workingDir"], "recipe, data and run lie where all pods see them"

    # Here are no GPUs and no names of pods; the recipe is brought along.
    (tmp_path / "recipe.toml").write_text(tiny_recipe.read_text(encoding="utf-8"), encoding="utf-8")
    script = script.replace(f"{first}:29500", f"localhost:{free_port()}").replace("per-node gpu", "per-node 1").rstrip()
    words = [bash, option, f"{script} {shlex.join(CHANGES)}"]
    environments = [fixed | {"JOB_COMPLETION_INDEX": index} for index in range(2)]
    run = tmp_path / "runs" / "recipe"
    with ExitStack() as stack:
        one, other = (stack.enter_context(started(words, programs, each, tmp_path)) for each in environments)
        wait_until(lambda: steps_done(run) >= 4)
        for container_process in (one, other):  # the Job is suspended or deleted
            container_process.send_signal(signal.SIGTERM)
        expect_saved(run, one, other)
    with ExitStack() as stack:
        expect_success(*(stack.enter_context(started(words, programs, each, tmp_path)) for each in environments))
    assert_same_run(run, straight)
