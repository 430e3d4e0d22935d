"""Setup, run, stop and loop: what the workers of a played slice do (fake_cloud.py)."""

import re
import subprocess
import time

import pytest
from fake_cloud import CREATE, LAUNCH, MAIN, ODD, SLICE, Cloud, tpu_words, words

from flip_jax import train

LOOP = ("tpu_loop", *CREATE, "--poll=0", "--backoff=0", *MAIN)
SET_UP = ("setup", "check", "start")


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for home in cloud.homes:  # whatever still runs there
        (home / "end").write_text("0")


def python_calls(home):
    return [words(line) for line in (home / "python_calls").read_text().splitlines()]


def test_setup_brings_the_commit(cloud):
    homes = cloud.add_workers(2)
    done = cloud.run("tpu_setup", *SLICE)
    assert done.returncode == 0, done.stderr
    head = cloud.git("rev-parse", "HEAD")
    for home in homes:
        assert f"{home.name}: flip_jax {head}" in done.stdout
        assert (home / "flip_jax" / ".commit").read_text() == f"{head}\n"
        assert (home / "flip_jax" / "code.py").read_text() == "committed"
        _, environment, install, _ = python_calls(home)
        assert environment == ["-m", "venv", f"{home}/flip_jax_env"]
        assert install[:2] == ["-m", "pip"] and install[-1] == f"{home}/flip_jax[tpu]"

    (cloud.root / "code.py").write_text("changed")
    (cloud.root / "new.py").touch()
    done = cloud.run("tpu_setup", *SLICE)
    assert done.returncode == 1
    assert "there are uncommitted changes; commit them, or add --allow-dirty:" in done.stderr
    assert " M code.py" in done.stderr and "?? new.py" in done.stderr

    done = cloud.run("tpu_setup", *SLICE, "--allow-dirty")
    assert done.returncode == 0, done.stderr
    assert (homes[1] / "flip_jax" / "code.py").read_text() == "changed"
    assert not (homes[1] / "flip_jax" / "new.py").exists()
    assert (homes[1] / "flip_jax" / ".commit").read_text() == f"{head}-dirty\n"
    # Neither the files here nor the repository were touched.
    assert cloud.git("status", "--porcelain") == "M code.py\n?? new.py"
    assert cloud.git("stash", "list") == ""


def test_setup_gets_a_newer_python_where_the_image_has_an_old_one(cloud):
    (home,) = cloud.add_workers(1)
    done = cloud.run("tpu_setup", *SLICE, PYTHON_TOO_OLD="1")
    assert done.returncode == 0, done.stderr
    assert ["-m", "pip", "install", "--quiet", "--user", "uv"] in python_calls(home)
    assert (home / "flip_jax_env" / "bin" / "python").is_file()


def test_setup_mounts_the_bucket(cloud):
    (home,) = cloud.add_workers(1)
    for name in ("sudo", "gcsfuse"):
        cloud.program(name, f'#!/bin/bash\nprintf "%q " {name} "$@" >>"$HOME/mounts"\n')
    cloud.program("mountpoint", "#!/bin/bash\nexit 1\n")
    done = cloud.run("tpu_setup", *SLICE, "--bucket", "a-bucket", "--copy", "my faces")
    assert done.returncode == 0, done.stderr
    made = (home / "mounts").read_text()
    assert made.startswith("sudo mkdir -p /mnt/a-bucket sudo chown ")
    assert re.search(r"gcsfuse --implicit-dirs --rename-dir-limit=\d+ a-bucket /mnt/a-bucket", made)
    copied = (home / "copied").read_text()
    assert copied == f"storage rsync --recursive gs://a-bucket/my faces {home}/data/my faces"
    assert f"gs://a-bucket/my faces is {home}/data/my faces" in done.stdout


def states(cloud):
    answer = cloud.run("tpu_status", *SLICE, "--lines=0")
    assert answer.returncode == 0, answer.stderr
    return sorted(re.findall(r"^state: (.*) \((.*), run train", answer.stdout, re.MULTILINE))


def wait_for_states(cloud, *expected):
    deadline = time.monotonic() + 60
    while (found := states(cloud)) != [(s, f"w {n}") for n, s in enumerate(expected)]:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.fixture
def running(cloud):
    """A slice of two workers with a run on them."""
    cloud.add_workers(2)
    cloud.states(tpu_vm=["READY"])
    assert cloud.run("tpu_setup", *SLICE).returncode == 0
    assert states(cloud) == [("none", "w 0"), ("none", "w 1")]
    done = cloud.run("tpu_run", *SLICE, "--", *ODD)
    assert done.returncode == 0, done.stderr
    return cloud


def first_lines(home):
    """The log, once the run has begun to write it."""
    deadline = time.monotonic() + 60
    while "training" not in (text := (home / "flip_jax_runs" / "train" / "log").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return text


def test_a_run_is_started_watched_and_stopped(running):
    wait_for_states(running, "running", "running")
    for home in running.homes:
        assert python_calls(home)[-1] == ["-m", "flip_jax.main", *ODD]
        assert first_lines(home) == f"training auto in {home}/flip_jax\n"
    for script, *more in (
        ("tpu_run", "--run=other", *MAIN),
        ("tpu_setup",),
        ("tpu_preflight", *MAIN),
    ):
        refused = running.run(script, *SLICE, *more)
        assert refused.returncode == 1
        assert re.search(r"w 1: run train is process \d+; end it with", refused.stderr)

    done = running.run("tpu_stop", *SLICE)
    assert done.returncode == 0, done.stderr
    assert states(running) == [("stopped", "w 0"), ("stopped", "w 1")]
    assert running.run("tpu_stop", *SLICE).returncode == 0
    shown = running.run("tpu_status", *SLICE, "--lines=1").stdout
    assert shown.count("stopped: step 7 is saved") == 2

    done = running.run("tpu_preflight", *SLICE, *MAIN)
    assert (done.returncode, done.stdout) == (0, "preflight auto\n" * 2)
    assert running.run("tpu_run", *SLICE, *MAIN).returncode == 0
    wait_for_states(running, "running", "running")
    for home in running.homes:  # the earlier log is kept
        assert len(list((home / "flip_jax_runs" / "train").glob("log.*"))) == 1


def test_a_run_that_does_not_heed_sigterm_is_killed(cloud):
    (home,) = cloud.add_workers(1)
    (home / "deaf").touch()
    cloud.states(tpu_vm=["READY"])
    assert cloud.run("tpu_setup", *SLICE).returncode == 0
    assert cloud.run("tpu_run", *SLICE, *MAIN).returncode == 0
    first_lines(home)
    done = cloud.run("tpu_stop", *SLICE, "--grace=1")
    assert done.returncode == 0
    assert "w 0: killed; what came after the last checkpoint is lost" in done.stderr
    assert states(cloud) == [("stopped", "w 0")]


def test_a_run_that_cannot_save_did_not_stop_but_fail(cloud):
    (home,) = cloud.add_workers(1)
    cloud.states(tpu_vm=["READY"])
    assert cloud.run("tpu_setup", *SLICE).returncode == 0
    assert cloud.run("tpu_run", *SLICE, *MAIN, SAVING="1").returncode == 0
    first_lines(home)
    assert cloud.run("tpu_stop", *SLICE).returncode == 0
    assert states(cloud) == [("failed 1", "w 0")]


def test_how_a_run_ended_is_told_apart(running):
    wait_for_states(running, "running", "running")
    first, second = running.homes
    (first / "end").write_text("0")
    (second / "end").write_text("1")
    wait_for_states(running, "done", "failed 1")

    (first / "end").unlink()
    (second / "end").unlink()
    assert running.run("tpu_run", *SLICE, *MAIN).returncode == 0
    wait_for_states(running, "running", "running")
    folders = [home / "flip_jax_runs" / "train" for home in running.homes]
    first_lines(first)
    # A signal that tpu_stop.sh did not send, as at a preemption.
    subprocess.run(["kill", "-TERM", (folders[0] / "pid").read_text().strip()], check=True)
    wait_for_states(running, "interrupted", "running")
    # What a reboot leaves: neither process nor exit status.
    (folders[0] / "status").unlink()
    wait_for_states(running, "lost", "running")


def test_a_run_stopped_early_says_so_in_these_words():
    phrase = re.search("^STOPPED_EARLY='(.*)'", (LAUNCH / "worker.sh").read_text(), re.MULTILINE)
    with open(train.__file__) as source:
        assert f'log.info("{phrase[1]} %d is saved' in source.read()


def test_following_ends_with_the_run(running):
    wait_for_states(running, "running", "running")
    assert running.run("tpu_stop", *SLICE).returncode == 0
    for home in running.homes:
        (home / "end").write_text("6")
    done = running.run("tpu_run", *SLICE, "--follow", *MAIN)
    assert done.returncode == 6
    assert done.stdout.endswith("state: failed 6 (w 0, run train)\n")
    assert f"training auto in {running.homes[0]}/flip_jax" in done.stdout


def steps(cloud):
    """The calls as words: look, create, delete, stop, setup, check, start."""
    names = {"describe": "look", "create": "create", "delete": "delete", "scp": "setup"}
    actions = {"status": "ask", "stop": "stop", "preflight": "check", "start": "start"}
    found = []
    for call in cloud.calls():
        if call[1] == "ssh":
            found += [actions[call[4][2]]] if call[4][2] in actions else []  # unpacking: in setup
        else:
            found.append(names[call[1]])
    return found


def test_the_loop_survives_a_preemption(cloud):
    cloud.states(
        tpu_vm=["ABSENT", "READY", "PREEMPTED", "READY"], run=["running,running", "done,done"]
    )
    done = cloud.run(*LOOP)
    assert done.returncode == 0, done.stderr
    assert steps(cloud) == [
        *("look", "create", *SET_UP),
        *("look", "ask", "look", "delete", "create", *SET_UP),
        *("look", "ask"),
    ]
    assert "slice: gone, run: " in done.stdout and "new start 1 of 20 in 0 s" in done.stdout


def test_the_loop_survives_the_preemption_of_a_queued_resource(cloud):
    cloud.states(
        queued_resources=["ABSENT", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"],
        tpu_vm=["ABSENT", "READY", "PREEMPTED", "ABSENT", "READY"],
        run=["running", "done"],
    )
    line = list(LOOP)
    line.insert(1, "--queued")
    done = cloud.run(*line)
    assert done.returncode == 0, done.stderr
    assert [call[:3] for call in cloud.calls()].count(
        ["queued-resources", "delete", "my slice"]
    ) == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("slice: ")] == [
        *("slice: absent, run: not known", "slice: ready, run: running"),
        *(
            "slice: coming, run: not known",
            "slice: gone, run: not known",
            "slice: ready, run: done",
        ),
    ]


def test_the_loop_starts_again_what_was_interrupted_or_lost(cloud):
    runs = ["none", "interrupted,done", "done,lost", "running,failed 134", "done,done"]
    cloud.states(tpu_vm=["READY"], run=runs)
    done = cloud.run(*LOOP)
    assert done.returncode == 0, done.stderr
    assert steps(cloud) == ["look", "ask", "stop", *SET_UP] * 4 + ["look", "ask"]
    assert "new start 3 of 20" in done.stdout


def test_the_loop_creates_nothing_where_setup_would_refuse(cloud):
    cloud.states(tpu_vm=["ABSENT"])
    (cloud.root / "code.py").write_text("changed")
    done = cloud.run(*LOOP)
    assert done.returncode == 1
    assert "there are uncommitted changes; commit them first:\n M code.py" in done.stderr
    assert steps(cloud) == ["look"]


def test_the_loop_takes_over_a_run_that_is_going_on(cloud):
    cloud.states(tpu_vm=["READY", "BROKEN", "REPAIRING", "READY"], run=["running", "stopped"])
    done = cloud.run(*LOOP)
    assert done.returncode == 0, done.stderr
    assert steps(cloud) == ["look", "ask", "look", "look", "look", "ask"]


def test_the_loop_ends_where_trying_again_is_no_use(cloud):
    cloud.states(tpu_vm=["READY"], run=["none", "failed 1"])
    done = cloud.run(*LOOP)
    assert done.returncode == 1 and "the run ended twice with status 1" in done.stderr
    assert steps(cloud).count("start") == 2

    cloud.states(run=["lost"])
    done = cloud.run(*LOOP[:-3], "--retries=2", *MAIN)
    assert done.returncode == 1 and "gave up after 2 new starts" in done.stderr
    assert steps(cloud).count("start") == 3

    cloud.states(tpu_vm=["BROKEN"])
    done = cloud.run(*LOOP)
    assert done.returncode == 1 and "cannot look at the slice" in done.stderr
    assert steps(cloud) == ["look"]


def test_a_start_that_fails_is_tried_again(cloud):
    (cloud.fake / "fail").write_text("scp 9")
    cloud.states(tpu_vm=["READY"], run=["none"])
    done = cloud.run(*LOOP[:-3], "--retries=1", *MAIN)
    assert done.returncode == 1
    assert "start 1 failed with status 9" in done.stderr
    assert steps(cloud) == ["look", "ask", "stop", "setup"] * 2 + ["look", "ask"]


def test_the_end_of_an_earlier_run_is_not_that_of_one_that_never_started(cloud):
    (cloud.fake / "fail").write_text("scp 9")
    for state in ("done", "stopped", "failed 1"):
        cloud.states(tpu_vm=["READY"], run=[state])
        done = cloud.run(*LOOP[:-3], "--retries=1", *MAIN)
        assert done.returncode == 1 and "gave up after 1 new starts" in done.stderr, state


def test_a_dry_run_of_the_loop_shows_one_round(cloud):
    done = cloud.run(LOOP[0], "--dry-run", "--bucket=b", *LOOP[1:])
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == []
    shown = [words(one)[1:] for one in done.stdout.splitlines() if one.startswith("gcloud ")]
    calls = [tpu_words(call) for call in shown]
    assert [call[1] for call in calls] == ["create", "scp", "ssh", "ssh", "ssh", "describe", "ssh"]
    assert calls[2][4][-3:] == [cloud.git("rev-parse", "HEAD"), "b", ""]
