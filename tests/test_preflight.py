"""The preflight command and its roll call: real processes, and processes played by threads."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from flip_jax import config, preflight
from flip_jax.place import Place
from flip_jax.roll_call import Absent, RollCall

DEBUG = ("--config", "configs/debug.py")


def free_port():
    """A port that is free, as is the one below it."""
    while True:
        with socket.create_server(("", 0)) as upper:
            port = upper.getsockname()[1]
            try:
                with socket.create_server(("", port - 1)):
                    return port
            except OSError:
                continue


def start(*arguments, port, processes, process):
    """A preflight process with two simulated devices."""
    here = {
        "FLIP_JAX_COORDINATOR": f"localhost:{port}",
        "FLIP_JAX_PROCESSES": str(processes),
        "FLIP_JAX_PROCESS": str(process),
        "FLIP_JAX_CPU_DEVICES": "2",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flip_jax.preflight", *DEBUG, *arguments],
        cwd=preflight.ROOT,
        env=os.environ | here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """(exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=300) for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def test_two_processes_that_agree(tmp_path):
    common = {"port": free_port(), "processes": 2}
    workdir = tmp_path / "new" / "run"
    (first, out, err), (second, silent, _) = finish(
        *(start("--workdir", str(workdir), **common, process=process) for process in range(2))
    )
    assert (first, second) == (0, 0), err
    host = re.escape(socket.gethostname())
    patterns = (
        rf"processes: 0 {host}, 1 {host}",
        rf"python .*, flip_jax .*, jax {re.escape(jax.__version__)}, .*",
        r"commit \w+(-dirty)?",
        r"config [0-9a-f]{16}, vocabulary [0-9a-f]{16}, data drawn by the run",
        rf"{workdir} is one folder for all; free there: [0-9.]+ GiB",
        r"processes of JAX: 2, devices of each: 2 x cpu, mesh: data 4 x fsdp 1",
        r"the sum over all devices is right",
        r"preflight: all is well",
    )
    lines, others = (
        [line for line in text.splitlines() if not line.startswith("[Gloo]")]
        for text in (out, silent)
    )
    assert others == []
    assert len(lines) == len(patterns)
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(pattern, line)
    assert list(workdir.iterdir()) == []


def test_processes_of_different_configs_are_refused(tmp_path):
    common = {"port": free_port(), "processes": 2}
    ended = finish(
        start("--workdir", str(tmp_path), **common, process=0),
        start("--workdir", str(tmp_path), "--config.optim.lr=0.5", **common, process=1),
    )
    host = socket.gethostname()
    for status, _, err in ended:
        assert status == preflight.FAILED
        assert err == f"error: config.optim.lr differs: 3e-05 on 0 {host}; 0.5 on 1 {host}\n"


def test_a_process_that_was_not_started_is_named(tmp_path):
    """JAX itself ends the processes that are there with a stack trace that names nobody."""
    common = {"port": free_port(), "processes": 3}
    began = time.monotonic()
    ended = finish(
        *(start("--workdir", str(tmp_path), "--timeout", "8", **common, process=p) for p in (0, 2))
    )
    assert 8 < time.monotonic() - began < 60
    host = socket.gethostname()
    for status, _, err in ended:
        assert status == preflight.MISSING
        assert err == (
            "error: process 1 of 3 (not seen) did not answer within 8 s at stage 'start'; "
            f"processes seen: 0 {host}, 2 {host}\n"
        )


@pytest.fixture
def alone(monkeypatch):
    for name in ("COORDINATOR", "PROCESSES", "PROCESS", "DISTRIBUTED"):
        monkeypatch.delenv(f"FLIP_JAX_{name}", raising=False)
    monkeypatch.chdir(preflight.ROOT)


def run(capsys, *arguments):
    status = preflight.main([*DEBUG, *arguments])
    return status, capsys.readouterr()


def test_a_single_process_needs_no_network(alone, tmp_path, capsys):
    status, printed = run(capsys, f"--workdir={tmp_path}")
    assert (status, printed.err) == (0, "")
    assert "devices of each: 8 x cpu, mesh: data 8 x fsdp 1" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mesh.fsdp=3"], "ValueError: mesh.data=-1 x mesh.fsdp=3 does not make the 8"),
        (["--config.data.path=nowhere"], "FileNotFoundError: data folder nowhere does not exist"),
        (["--config.model.text.vocab_size=530"], "ValueError: config.model.text.vocab_size=530"),
        (["--config.init.checkpoint=gone"], "config.init.checkpoint=gone does not exist"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, alone, tmp_path, capsys):
    status, printed = run(capsys, f"--workdir={tmp_path}", *arguments)
    assert status == preflight.FAILED
    assert message in printed.err
    assert "all is well" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.rate=1"], "error: config.optim.rate does not exist"),
        (["--nonsense"], "error: unknown argument --nonsense"),
        (["--config.init.checkpoint="], "init.checkpoint='': must be a folder, or None"),
    ],
)
def test_wrong_options_are_told_apart(arguments, message, alone, tmp_path, capsys):
    status, printed = run(capsys, f"--workdir={tmp_path}", *arguments)
    assert (status, printed.out) == (preflight.WRONG, "")
    assert message in printed.err


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "a minute"])
def test_a_timeout_must_be_one(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        preflight.main([*DEBUG, f"--timeout={seconds}"])
    assert ended.value.code == preflight.WRONG
    assert f"{seconds}: must be a finite number above 0" in capsys.readouterr().err


def test_weights_that_differ_are_noticed(tmp_path):
    found = []
    for content in ("a", "ab", "a"):
        (tmp_path / "weights").write_text(content)
        cfg = config.override(config.load("configs/debug.py"), "init.vision", str(tmp_path))
        found.append(preflight.host_facts(cfg)["content of config.init.vision"])
    assert found[0] == found[2] != found[1]


def test_a_workdir_that_cannot_be_written(alone, tmp_path, capsys):
    (tmp_path / "file").touch()
    status, printed = run(capsys, f"--workdir={tmp_path / 'file'}")
    assert status == preflight.FAILED
    assert f"NotADirectoryError: [Errno 20] Not a directory: '{tmp_path / 'file'}" in printed.err


def test_a_wrong_sum_is_found(alone, tmp_path, capsys, monkeypatch):
    assert preflight.sum_over_devices(config.load("configs/debug.py")) == (36, 36)
    monkeypatch.setattr(preflight, "sum_over_devices", lambda cfg: (35, 36))
    status, printed = run(capsys, f"--workdir={tmp_path}")
    assert status == preflight.FAILED
    assert printed.err.endswith("the sum over all devices is 35, not 36\n")


def test_a_sum_that_hangs_is_given_up(alone, tmp_path, capsys, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(preflight, "sum_over_devices", lambda cfg: never.wait())
    status, printed = run(capsys, f"--workdir={tmp_path}", "--timeout=2")
    never.set()
    assert status == preflight.MISSING
    assert f"stage 'sum' did not end within 2 s on process 0 {socket.gethostname()}" in printed.err


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    assert preflight.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert preflight.commit() == head
    (tmp_path / ".commit").write_text("abc-dirty\n")
    assert preflight.commit() == "abc-dirty"


def together(calls, work):
    """work(call, process) for each roll call in a thread of its own: results or Absent."""

    def one(item):
        process, call = item
        try:
            with call:
                return work(call, process)
        except (Absent, preflight.Failed) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(one, enumerate(calls)))


def roll_calls(processes, count=None, timeout=20):
    """Roll calls of the first `count` of so many processes."""
    address = f"localhost:{free_port()}"
    return [
        RollCall(Place(address, processes, process), f"host-{process}", timeout)
        for process in range(processes if count is None else count)
    ]


def test_a_roll_call_gathers_in_order():
    def work(call, process):
        return call.gather("a", process), call.gather("b", "x" * 100_000 * process), call.hosts

    results = together(roll_calls(5), work)
    hosts = [f"host-{process}" for process in range(5)]
    assert results == [(list(range(5)), ["x" * 100_000 * p for p in range(5)], hosts)] * 5


def test_a_process_that_ends_is_named_at_once():
    def work(call, process):
        call.gather("a", None)
        return process if process == 1 else call.gather("b", None)

    began = time.monotonic()
    results = together(roll_calls(3), work)
    assert time.monotonic() - began < 10
    assert results[1] == 1
    for result in (results[0], results[2]):
        assert "process 1 of 3 (host-1) ended before stage 'b'" in str(result)


def test_an_answer_that_comes_early_is_kept():
    """Process 0 ends stage b, as process 1 is gone, before process 2 has read that of stage a."""

    def work(call, process):
        if process == 2:
            read = call._connect
            call._connect = lambda: slow(read())
        call.gather("a", None)
        return process if process == 1 else call.gather("b", None)

    def slow(line):
        wait = line.wait
        line.wait = lambda timeout: time.sleep(1) or wait(timeout)
        return line

    results = together(roll_calls(3), work)
    assert "process 1 of 3 (host-1) ended before stage 'b'" in str(results[2])


def test_without_process_0_that_one_is_named():
    call = RollCall(Place(f"localhost:{free_port()}", 2, 1), "host-1", 1)
    with call, pytest.raises(Absent, match=r"process 0 of 2 \(not seen\) did not answer at local"):
        call.gather("a", None)


def test_two_processes_of_one_number_and_other_counts():
    calls = roll_calls(3)
    calls[2] = RollCall(calls[1].place, "host-2", 20)
    for result in together(calls, lambda call, _: call.gather("a", None)):
        assert re.search("two processes say they are process 1: on host-[12] and on", str(result))
    calls = roll_calls(2)
    calls[1].place = Place(calls[0].place.coordinator, 3, 1)
    for result in together(calls, lambda call, _: call.gather("a", None)):
        assert "process 1 of 3 on host-1 is at stage 'a', process 0 of 2 on host-0" in str(result)


def test_strangers_at_the_port_are_ignored():
    calls = roll_calls(2)

    def work(call, process):
        if process == 1:
            for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""):
                while True:
                    try:
                        stranger = socket.create_connection(call.address)
                        break
                    except ConnectionRefusedError:
                        time.sleep(0.05)
                with stranger:
                    stranger.sendall(words)
        return call.gather("a", process)

    assert together(calls, work) == [[0, 1], [0, 1]]


def test_folders_that_are_not_shared(tmp_path):
    def work(call, process):
        return preflight._shared_folder(tmp_path / str(process % 2) / "token", call)

    for result in together(roll_calls(3, timeout=3), work):
        lines = str(result).splitlines()
        assert [
            re.search("process (.*) does not see what process (.*) wrote", line).groups()
            for line in lines
        ] == [
            ("0 host-0", "1 host-1"),
            ("1 host-1", "0 host-0, 2 host-2"),
            ("2 host-2", "1 host-1"),
        ]


def test_values_are_listed_with_their_holders():
    call = roll_calls(12)[0]
    call.hosts = [f"host-{process}" for process in range(12)]
    facts = [{"jax": "1", "python": "3"} for _ in range(12)]
    assert preflight.disagreements(facts, call) == []
    facts[4] = {"jax": "2"}
    jax_line, python_line = preflight.disagreements(facts, call)
    assert jax_line.startswith("jax differs: 1 on 0 host-0, 1 host-1, ")
    assert jax_line.endswith("8 host-8 and 3 more; 2 on 4 host-4")
    assert python_line.endswith("; - on 4 host-4")
