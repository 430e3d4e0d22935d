"""Places, and what two or three small processes say to each other and when they end."""

import signal
import socket
import textwrap
import time

import pytest
from processes import VARIABLES, Processes

from flip_jax import distributed, main
from flip_jax.place import PLACE_VARIABLES, Place, find_place


def place(*values, **more):
    return find_place(dict(zip(PLACE_VARIABLES, values, strict=True)) | more)


def test_places():
    assert find_place({}) is None
    assert place("a.b:80", "3", "2") == Place("a.b:80", 3, 2)
    assert place("[::1]:80", "1", "0").coordinator == "[::1]:80"


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (("", "2", ""), {}, "FLIP_JAX_COORDINATOR, FLIP_JAX_PROCESS not set"),
        (("a", "2", "0"), {}, "FLIP_JAX_COORDINATOR=a: must be host:port"),
        (("a:0", "2", "0"), {}, "FLIP_JAX_COORDINATOR=a:0"),
        ((":80", "2", "0"), {}, "FLIP_JAX_COORDINATOR=:80"),
        (("a:66000", "2", "0"), {}, "FLIP_JAX_COORDINATOR=a:66000"),
        (("a:80", "two", "0"), {}, "FLIP_JAX_PROCESSES=two: must be a whole number from 1 on"),
        (("a:80", "0", "0"), {}, "FLIP_JAX_PROCESSES=0"),
        (("a:80", "2", "-1"), {}, "FLIP_JAX_PROCESS=-1: must be a whole number from 0 on"),
        (("a:80", "2", "2"), {}, "FLIP_JAX_PROCESS=2: must be 0 to 1, as FLIP_JAX_PROCESSES=2"),
        (("", "", ""), {"FLIP_JAX_DISTRIBUTED": "yes"}, "FLIP_JAX_DISTRIBUTED=yes: must be auto"),
        (("", "2", ""), {"FLIP_JAX_DISTRIBUTED": "auto"}, "auto and FLIP_JAX_PROCESSES are set"),
    ],
)
def test_bad_places(values, more, message):
    with pytest.raises(ValueError, match=message):
        place(*values, **more)


def test_auto_where_there_is_no_cluster():
    with pytest.raises(ValueError, match="JAX finds no cluster here; set FLIP_JAX_COORDINATOR"):
        find_place({"FLIP_JAX_DISTRIBUTED": "auto"})


def test_auto_asks_slurm(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[04-09]",
        "SLURM_NTASKS": "6",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "6",
    }.items():
        monkeypatch.setenv(name, value)
    found = find_place({"FLIP_JAX_DISTRIBUTED": "auto"})
    assert found == Place("node04:61517", 6, 5, [0])


@pytest.mark.parametrize("timeout", ["soon", "4", "nan"])
def test_bad_timeouts(monkeypatch, timeout):
    monkeypatch.setenv("FLIP_JAX_TIMEOUT", timeout)
    for name, value in zip(PLACE_VARIABLES, ("localhost:80", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"FLIP_JAX_TIMEOUT={timeout}: must be a number"):
        distributed.start()


def test_bad_device_count(monkeypatch):
    monkeypatch.setenv("FLIP_JAX_CPU_DEVICES", "0")
    with pytest.raises(ValueError, match="FLIP_JAX_CPU_DEVICES=0"):
        distributed.start()


def test_the_command_complains_before_it_starts(monkeypatch, capsys):
    monkeypatch.setenv("FLIP_JAX_COORDINATOR", "localhost:80")
    assert main.main(["--config", "configs/debug.py"]) == 1
    assert "FLIP_JAX_PROCESSES, FLIP_JAX_PROCESS not set" in capsys.readouterr().err


def test_one_process_needs_nobody(tmp_path):
    assert not any(name in distributed.os.environ for name in VARIABLES)
    with distributed.session():
        assert distributed.gather([1, "a"]) == [[1, "a"]]
        assert distributed.is_main()
        assert distributed.stops_at(3, True) and not distributed.stops_at(4, False)
        distributed.check_same({"a": "b"})
        distributed.check_shared(tmp_path / "none")
        assert not (tmp_path / "none").exists()


PREAMBLE = """
import os, signal, time
from flip_jax import distributed as d, peers
me = int(os.environ["FLIP_JAX_PROCESS"])
peers._HEARTBEAT_SECONDS = {heartbeat}
"""


def run(count, code, heartbeat=60, **options):
    """Exit status and output of processes that run `code`; `me` is the number of each."""
    code = PREAMBLE.format(heartbeat=heartbeat) + textwrap.dedent(code)
    with Processes(count, ["-c", code], **options) as processes:
        return processes.results(timeout=120)


def test_three_processes_talk(tmp_path):
    """Values, arrays, a folder."""
    found = run(
        3,
        f"""
        from pathlib import Path
        import numpy as np
        with d.session():
            d.check_same({{"a": "1"}})
            assert d.gather([me, "x"]) == [[0, "x"], [1, "x"], [2, "x"]]
            assert [d.gather(10 * me + i)[2] for i in range(12)] == list(range(20, 32))
            assert d.is_main() == (me == 0)
            d.check_shared(Path({str(tmp_path)!r}) / "new" / "run")
            own = {{"n": np.arange(3, dtype=np.int64) + me, "b": np.array([me == 0])}}
            of_main = d.of_main(own)
            assert of_main["n"].dtype == np.int64 and of_main["n"].tolist() == [0, 1, 2]
            assert of_main["b"].dtype == bool and of_main["b"].all()
        """,
        devices=2,
    )
    assert [code for code, _ in found] == [0, 0, 0], found
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_signal_to_one_stops_all_at_one_step():
    """Process 0 begins late, in something long; the others are at different steps all the time."""
    found = run(
        3,
        """
        from flip_jax.run import StopSignal
        with d.session(), StopSignal() as stop:
            d.gather(None)
            time.sleep(4 if me == 0 else 0)
            step = 5
            while not stop.due(step) and step < 400:
                step += 1
                time.sleep(0.02 * (1 + me))
                if me == 1 and step == 8:
                    os.kill(os.getpid(), signal.SIGTERM)
            assert d.gather(step) == [step] * 3 and 8 < step < 400
            assert not stop.requested or me == 1
        """,
    )
    assert [code for code, _ in found] == [0, 0, 0], found


def test_differences_are_named(tmp_path):
    found = run(
        3,
        """
        with d.session():
            d.check_same({"config.seed": "42" if me != 1 else "7", "data": "abc"})
        """,
    )
    assert [code for code, _ in found] == [1, 1, 1], found
    for _, output in found:
        assert "config.seed is 42 on process 0 (" in output and "but 7 on process 1 (" in output
        assert "data is" not in output and "the same command" in output
        assert "Traceback" not in output


def test_a_slow_end_is_waited_for():
    """JAX aborts a process whose process 0, with the coordinator, is gone first."""
    found = run(
        3,
        """
        if me == 2:
            at_once = peers._exit
            peers._exit = lambda: (time.sleep(0.4), at_once())
        with d.session():
            d.check_same({"a": str(me)})
        """,
    )
    assert [code for code, _ in found] == [1, 1, 1], found


def test_a_folder_of_its_own_is_named(tmp_path):
    found = run(
        2,
        f"""
        from pathlib import Path
        with d.session():
            d._SEEN_SECONDS = 3
            d.check_shared(Path({str(tmp_path)!r}) / "ab"[me])
        """,
    )
    for code, output in found:
        assert code == 1 and "process 1 (" in output and "cannot see" in output
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


COLLECTIVE = """
from jax.experimental.multihost_utils import process_allgather
import numpy as np
with d.session():
    process_allgather(np.ones(3))
    {fault}
    {wait}
"""
WAITS = {
    "devices": "process_allgather(np.ones(3))",
    "gather": "d.gather(0)",
    "sleep": "time.sleep(600)",
}


@pytest.mark.parametrize(("wait", "who"), [("devices", 1), ("gather", 0), ("sleep", 1)])
def test_an_error_of_one_ends_all(wait, who):
    """Whatever the others wait for, and also when process 0, which holds the store, is the one."""
    fault = f"if me == {who}: raise OSError(28, 'No space left on device')"
    start = time.monotonic()
    found = run(3, COLLECTIVE.format(fault=fault, wait=WAITS[wait]))
    assert time.monotonic() - start < 90
    for code, output in found:
        assert code == 1, output
        assert f"error: process {who} (" in output and "No space left on device" in output
        assert "Traceback" not in output and "Check failure" not in output


def test_an_unexpected_error_is_shown_where_it_is():
    fault = "assert me == 0, 'a mistake'"
    first, second = run(2, COLLECTIVE.format(fault=fault, wait=WAITS["sleep"]))
    assert first[0] == second[0] == 1
    assert "Traceback" in second[1] and "AssertionError: a mistake" in second[1]
    assert "error: process 1 (" in first[1] and "AssertionError: a mistake" in first[1]
    assert "Traceback" not in first[1]


@pytest.mark.slow
@pytest.mark.parametrize(("wait", "who"), [("devices", 1), ("gather", 0)])
def test_a_killed_process_ends_the_others(wait, who):
    fault = f"if me == {who}: os.kill(os.getpid(), signal.SIGKILL)"
    found = run(2, COLLECTIVE.format(fault=fault, wait=WAITS[wait]))
    assert found[who][0] == -signal.SIGKILL
    code, output = found[1 - who]
    assert code in (1, -signal.SIGABRT) and output
    if wait == "devices":
        assert code == 1 and "If another process was killed" in output


def test_sigterm_still_ends_a_process():
    """JAX's own handler would swallow it. The other one misses its heartbeats."""
    found = run(
        2,
        """
        with d.session():
            if me == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        """,
        heartbeat=10,
    )
    assert found[1][0] == -signal.SIGTERM and found[0][0] in (1, -signal.SIGABRT)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "absent"), [(2, 0), (2, 1)])
def test_who_does_not_come_is_told(count, absent):
    code = "import os, sys; from flip_jax import main\n" + (
        f"if os.environ['FLIP_JAX_PROCESS'] == '{absent}': sys.exit()\n"
        "sys.exit(main.main(['--config', 'configs/debug.py']))"
    )
    with Processes(count, ["-c", code], FLIP_JAX_TIMEOUT="5") as processes:
        found = processes.results()
    code, output = found[1 - absent]
    assert code == 1 and "Check failure" not in output
    if absent == 0:
        assert "process 0 does not answer at localhost, port " in output
    else:
        assert "not all 2 processes came" in output and "FLIP_JAX_TIMEOUT" in output


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = f"localhost:{port}"
        ((code, output),) = run(1, "with d.session(): pass", FLIP_JAX_COORDINATOR=address)
    assert code == 1 and f"cannot listen at port {port} (Address already in use)" in output
