"""The scripts under launch: help, options and the calls they make of gcloud and SLURM."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_cloud import CREATE, LAUNCH, MAIN, ODD, SLICE, Cloud, tpu_words, words

from flip_jax.main import parse

PAGE = LAUNCH.parent / "docs" / "scale.md"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Started by a user; the others are sourced, or run on a worker or in a job.
COMMANDS = [s for s in SCRIPTS if s.stem not in ("common", "worker", "gpu_job")]
PLACE = ["--zone=zone-a", "--project=my project"]
DESCRIBED = ["tpu-vm", "describe", "my slice", "--format=value(state)", *PLACE]
QUEUE_DESCRIBED = [
    *("queued-resources", "describe", "my slice", "--format=value(state.state)"),
    *PLACE,
]
CREATED = [
    *("tpu-vm", "create", "my slice", "--accelerator-type=v6e-256", "--version=v2-alpha-tpuv6e"),
    *PLACE,
]
DELETED = ["tpu-vm", "delete", "my slice", "--quiet", *PLACE]
QUEUE_CREATED = ["queued-resources", "create", "my slice", "--accelerator-type=v6e-256"]
QUEUE_DELETED = ["queued-resources", "delete", "my slice", "--force", "--quiet", *PLACE]


def on_workers(*command, node="my slice", worker="all"):
    """The ssh call of a command of worker.sh."""
    shell = ["bash", "flip_jax/launch/worker.sh", *command]
    return ["tpu-vm", "ssh", node, f"--worker={worker}", shell, *PLACE]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    command = ["shellcheck", *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.stem)
def test_help_tells_every_option(script, cloud):
    helped = cloud.run(script.stem, "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert f"launch/{script.name} --" in helped.stdout and "Exit status" in helped.stdout
    told = helped.stdout
    if script.stem == "tpu_loop":  # it points to these
        told += "".join(cloud.run(other, "--help").stdout for other in ("tpu_create", "tpu_setup"))
    options = re.search(r'^parse "(.*?)" "(.*?)"', script.read_text(), re.DOTALL | re.MULTILINE)
    names = " ".join(options.groups()).replace("\\\n", "").split()
    assert [name for name in names if f"--{name}" not in told] == []


WRONG = {
    "tpu_create": [(SLICE, "--type is missing"), ((*SLICE, "--type=v9"), "--type=v9: no runtime")],
    "tpu_setup": [
        (SLICE[2:], "--name is missing; give it, or set TPU_NAME"),
        ((*SLICE, "--copy=faces"), "--copy=faces needs the --bucket that it is in"),
    ],
    "tpu_preflight": [(SLICE, "the arguments of flip_jax.main are missing; give them after --")],
    "tpu_run": [
        (SLICE, "the arguments of flip_jax.main are missing"),
        ((*SLICE, "--config=c"), "unknown argument --config"),
        ((*SLICE, "stray"), "unknown argument stray"),
        ((*SLICE, "--run", "a/b", *MAIN), "--run=a/b: must be the name of a folder"),
    ],
    "tpu_status": [((*SLICE, "--lines", "x"), "--lines=x: must be a whole number")],
    "tpu_stop": [((*SLICE, "--grace"), "--grace needs a value")],
    "tpu_delete": [
        (SLICE[:2], "--zone is missing"),
        ((*SLICE, "--slices=0"), "must be at least 1"),
    ],
    "tpu_loop": [
        (CREATE, "the arguments of flip_jax.main are missing"),
        ((*SLICE, *MAIN), "--type is missing"),
    ],
    "gpu_run": [(("--nodes=2", "--gpus=8", *MAIN), "--cpus is missing; see --help")],
}


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.stem)
def test_wrong_options_are_named(script, cloud):
    for arguments, message in WRONG[script.stem]:
        done = cloud.run(script.stem, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{script.name}: ") and message in done.stderr
    assert cloud.calls() == []


CALLS = {
    ("tpu_create", *CREATE): [CREATED],
    ("tpu_create", *CREATE, "--spot", "--create-flag=--description=a b", "--runtime=r"): [
        [*CREATED[:4], "--spot", "--version=r", "--description=a b", *PLACE]
    ],
    ("tpu_create", *CREATE, "--queued", "--reserved"): [
        [
            *(*QUEUE_CREATED, "--reserved", "--node-id=my slice"),
            *("--runtime-version=v2-alpha-tpuv6e", *PLACE),
        ],
        QUEUE_DESCRIBED,
    ],
    ("tpu_create", *CREATE, "--slices=2"): [
        [
            *(*QUEUE_CREATED, "--node-count=2", "--node-prefix=my slice"),
            *("--runtime-version=v2-alpha-tpuv6e", *PLACE),
        ],
        QUEUE_DESCRIBED,
    ],
    ("tpu_preflight", *SLICE, "--", *ODD): [on_workers("preflight", *ODD)],
    ("tpu_run", *SLICE, "--run", "a run", "--", *ODD): [on_workers("start", "a run", *ODD)],
    ("tpu_run", *SLICE, "--slices=2", "--follow", *MAIN): [
        on_workers("start", "train", *MAIN[1:], node="my slice-0"),
        on_workers("start", "train", *MAIN[1:], node="my slice-1"),
        on_workers("follow", "train", node="my slice-0", worker="0"),
    ],
    ("tpu_status", *SLICE, "--lines=9"): [DESCRIBED, on_workers("status", "train", "9")],
    ("tpu_status", *SLICE, "--queued"): [
        *(QUEUE_DESCRIBED, DESCRIBED, on_workers("status", "train", "5"))
    ],
    ("tpu_stop", *SLICE, "--grace=7"): [on_workers("stop", "train", "7")],
    ("tpu_delete", *SLICE): [DELETED],
    ("tpu_delete", *SLICE, "--queued"): [QUEUE_DELETED],
}


@pytest.mark.parametrize("line", CALLS, ids=lambda line: " ".join((line[0], *line[7:9])))
def test_the_calls_are_those_that_a_dry_run_shows(line, cloud):
    dry = cloud.run(line[0], "--dry-run", *line[1:])
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    shown = [words(one)[1:] for one in dry.stdout.splitlines() if one.startswith("gcloud ")]
    assert [tpu_words(call) for call in shown] == CALLS[line]

    cloud.states(tpu_vm=["READY"], queued_resources=["ACTIVE"], run=["running"])
    done = cloud.run(*line)
    assert done.returncode == 0, done.stderr
    made = cloud.calls()
    if "--slices=2" in line:  # at once, in any order
        made.sort(key=CALLS[line].index)
    assert made == CALLS[line]


@pytest.mark.parametrize("script", sorted({line[0] for line in CALLS} | {"tpu_setup"}))
def test_the_status_of_gcloud_passes_through(script, cloud):
    action = {"tpu_create": "create", "tpu_delete": "delete", "tpu_setup": "scp"}.get(script, "ssh")
    (cloud.fake / "fail").write_text(f"{action} 9")
    cloud.states(tpu_vm=["READY"])
    more = {"tpu_create": CREATE[-2:], "tpu_run": MAIN, "tpu_preflight": MAIN}
    done = cloud.run(script, *SLICE, *more.get(script, ()))
    assert done.returncode == 9
    assert "ERROR: no quota" in done.stderr
    assert f"gcloud compute tpus tpu-vm {action} failed with status 9" in done.stderr


def test_names_may_come_from_the_environment(cloud):
    cloud.states(queued_resources=["ACTIVE"], tpu_vm=["READY"], run=["running"])
    done = cloud.run("tpu_status", TPU_NAME="n", TPU_ZONE="z", TPU_SLICES="2")
    assert done.returncode == 0
    calls = cloud.calls()
    assert [call[2] for call in calls if call[1] == "describe"] == ["n", "n-0", "n-1"]
    assert all(call[-1] == "--zone=z" for call in calls)


def test_a_queue_is_waited_for(cloud):
    queued = ("tpu_create", *CREATE, "--queued", "--poll=0")
    cloud.states(queued_resources=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = cloud.run(*queued)
    assert done.returncode == 0
    assert done.stdout.split()[2::3] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.states(queued_resources=["ACCEPTED"])
    done = cloud.run(*queued, "--timeout=0")
    assert done.returncode == 3 and "ACCEPTED after 0 min and stays in the queue" in done.stderr
    cloud.states(queued_resources=["ACCEPTED", "FAILED"])
    done = cloud.run(*queued)
    assert done.returncode == 4 and "the queued resource my slice is FAILED" in done.stderr


def test_workers_of_a_slice_that_is_not_ready_are_not_asked(cloud):
    cloud.states(tpu_vm=["PREEMPTED"])
    done = cloud.run("tpu_status", *SLICE)
    assert (done.returncode, done.stdout) == (0, "slice: PREEMPTED (TPU VM my slice)\n")
    assert cloud.calls() == [DESCRIBED]


def test_a_gpu_job_runs_one_process_per_node(cloud, tmp_path):
    shown = cloud.run("gpu_run", "--nodes=2", "--gpus=8", "--cpus=64", "--dry-run", *MAIN)
    assert shown.returncode == 0
    cloud.program("sbatch", '#!/bin/bash\nprintf "%q " sbatch "$@"\nexit 5\n')
    python = str(tmp_path / "a python")
    arguments = ("--nodes=2", "--gpus=8", "--cpus=64", "--sbatch-flag=--partition=a b")
    done = cloud.run("gpu_run", *arguments, "--python", python, "--", *ODD)
    assert done.returncode == 5
    call = words(done.stdout)
    job = call.index(f"{cloud.root}/launch/gpu_job.sh")
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64"} < {*call}
    assert call[job - 1] == "--partition=a b"
    assert call[job + 1 :] == [str(cloud.root), python, *ODD]


def test_the_job_starts_the_processes_where_main_finds_them(cloud, tmp_path):
    show = 'printf "%q " "$@" "$FLIP_JAX_COORDINATOR" "$FLIP_JAX_PROCESSES" "$FLIP_JAX_PROCESS"'
    cloud.program("python", f"#!/bin/bash\n{show}\necho\nexit $([[ $2 != $FAILING ]]; echo $?)\n")
    cloud.program("scontrol", "#!/bin/bash\nprintf '%s\\n' node-a node-b\n")
    tasks = 'for rank in 0 1; do SLURM_PROCID=$rank "$@" || exit; done'
    cloud.program("srun", f"#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n{tasks}\n")
    job = {"JOB_ID": "123456", "JOB_NODELIST": "node-[a-b]", "JOB_NUM_NODES": "2"}
    slurm = {f"SLURM_{name}": value for name, value in job.items()} | {"SLURM_CPUS_PER_TASK": "8"}
    line = ("gpu_job", str(cloud.root), str(cloud.fake / "bin" / "python"), *ODD)
    done = cloud.run(*line, **slurm, FAILING="-")
    assert done.returncode == 0, done.stderr
    assert [words(printed) for printed in done.stdout.splitlines()] == [
        ["-m", module, *ODD, "node-a:26913", "2", rank]
        for module in ("flip_jax.preflight", "flip_jax.main")
        for rank in "01"
    ]
    done = cloud.run(*line, **slurm, FAILING="flip_jax.preflight")
    assert done.returncode == 1
    assert "flip_jax.main" not in done.stdout


def page_commands():
    """The lines of the shell blocks of docs/scale.md, and the variables that they export."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    exported = [words(line)[1:] for line in lines if line.startswith("export TPU_")]
    return lines, dict(word.split("=") for line in exported for word in line)


def test_the_page_shows_lines_that_work(cloud, monkeypatch):
    monkeypatch.chdir(LAUNCH.parent)
    lines, environment = page_commands()
    shown = set()
    for line in lines:
        program, *arguments = words(line)
        if program.startswith("launch/"):
            shown.add(program)
            done = cloud.run(Path(program).stem, "--dry-run", *arguments, **environment)
            assert done.returncode == 0, line + done.stderr
            assert done.stdout
        if "--" in arguments:
            parse(arguments[arguments.index("--") + 1 :])
        if arguments[:2] in (["-m", "flip_jax.main"], ["-m", "flip_jax.preflight"]):
            parse(arguments[2:])
    assert shown == {f"launch/{script.name}" for script in COMMANDS}
