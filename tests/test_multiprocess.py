"""Whole runs of several processes: the numbers of one process, one end, any number at resuming."""

import collections
import itertools
import json
import random
import signal
import time

import jax
import numpy as np
import pytest
from processes import TESTS, Processes

from flip_jax import checkpoint, config
from flip_jax.data.sources import write_drawn

DEBUG = TESTS.parent / "configs" / "debug.py"
EPOCH = 6  # steps
CLOCK = {"pairs_per_second", "step_seconds", "data_wait_share"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Starts a run: processes, devices of each, workdir, fields of the config, variables."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_drawn(config.load(DEBUG).data.drawn, folder / "data")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }

    def start(count, devices, workdir, *fields, variables=None, each=None):
        def arguments(process):
            own = each(process) if each else []
            paths = ["--config", DEBUG, "--workdir", workdir, f"--config.data.path={data}"]
            return [TESTS / "noting_run.py", *paths, *fields, *own]

        return Processes(count, arguments, devices, **cache | (variables or {}))

    return start


def done(processes):
    """The outputs of a run that is to end well."""
    with processes:
        results = processes.results()
    assert [code for code, _ in results] == [0] * len(results), results
    return [output for _, output in results]


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def step_of(workdir):
    return checkpoint.read_meta(workdir)["step"]


def assert_same_bits(workdir, other):
    """Digests of params, optimizer state, twins and queue; evaluations; results."""
    assert checkpoint.read_meta(workdir)["arrays"] == checkpoint.read_meta(other)["arrays"]
    evaluations = [[r for r in lines(w) if "eval/mean_recall" in r] for w in (workdir, other)]
    assert evaluations[0] == evaluations[1]
    results = [(w / "results.json").read_text() for w in (workdir, other)]
    assert results[0] == results[1]


def assert_near(workdir, other, atol):
    params = [checkpoint.load_params(w) for w in (workdir, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), *params)


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The workdir of an unbroken run in one process of two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    done(run(0, 2, workdir))
    return workdir


@pytest.mark.slow
def test_two_processes_killed_end_as_one(run, alone, tmp_path):
    """SIGKILL to both some time after a checkpoint, then one process with as many devices."""
    with run(2, 1, tmp_path, variables={"PAUSE": "0.2"}) as processes:
        processes.wait_for_checkpoint(tmp_path, EPOCH)
        time.sleep(random.uniform(0, 1))
        processes.kill(0, 1)
        (_, output), (_, other) = processes.results()
    assert EPOCH <= step_of(tmp_path) < 3 * EPOCH, output
    # Process 1 printed nothing of its own, and wrote nothing.
    assert "step 0: mean recall" in output and "step" not in other
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1

    done(run(0, 2, tmp_path))
    assert_same_bits(tmp_path, alone)
    assert lines(tmp_path)[:3] == lines(alone)[:3]
    assert (tmp_path / "report.png").is_file()


def test_a_process_with_another_setting_is_named(run, tmp_path):
    rates = [[], ["--config.optim.lr=1e-4"]]
    with run(2, 1, tmp_path, each=rates.__getitem__) as processes:
        results = processes.results()
    for code, output in results:
        assert code == 1 and "config.optim.lr is 3e-05 on process 0 (" in output, output
        assert "but 0.0001 on process 1 (" in output and "Traceback" not in output
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.release
def test_the_split_into_processes_changes_no_bit(run, alone, tmp_path):
    """Four devices, parameters cut over two of them, of one host or of two; given weights."""
    splits = {count: tmp_path / str(count) for count in (0, 1, 2, 4)}
    for count, workdir in splits.items():
        fields = "--config.mesh.fsdp=2", f"--config.init.checkpoint={alone}"
        done(run(count, 4 // max(count, 1), workdir, *fields))
    for count in (2, 4):
        assert_same_bits(splits[count], splits[1])
        assert lines(splits[count]) == lines(splits[1])
    # A run that knows of no other processes adds up in another order: 1.5e-5 were seen.
    assert_near(splits[0], splits[1], 1e-4)


@pytest.mark.release
def test_any_number_of_processes_goes_on(run, tmp_path):
    """4 x 2 devices, 2 x 4, 1 x 8 and 1 x 1: every epoch has seen each record once."""
    notes, workdir, step = tmp_path / "notes", tmp_path / "run", 0
    notes.mkdir()
    epochs = "--config.epochs=10"
    stages = [(4, 2, []), (2, 4, ["--config.data.workers=1"]), (1, 8, ["--config.data.threads=1"])]
    for count, devices, fields in stages:  # the last process is asked to stop, all do
        variables = {"NOTES": str(notes), "PAUSE": "0.3"}
        with run(count, devices, workdir, epochs, *fields, variables=variables) as processes:
            processes.wait_for_step(workdir, step + 1)
            processes.kill(count - 1, how=signal.SIGTERM)
            results = processes.results()
        assert [code for code, _ in results] == [0] * count, results
        assert step < step_of(workdir) < 10 * EPOCH
        step = step_of(workdir)
        assert f"step {step} is saved" in results[0][1]
        assert f"process {count - 1} (" in results[0][1] and "asked to stop" in results[0][1]
    done(run(0, 1, workdir, epochs, variables={"NOTES": str(notes)}))

    texts = [path.read_text().splitlines() for path in notes.iterdir()]
    assert len(texts) == 4 + 2 + 1 + 1
    batches = [json.loads(line) for line in itertools.chain.from_iterable(texts)]
    seen = collections.Counter(itertools.chain.from_iterable(batches))
    assert seen == dict.fromkeys(range(48), 10)

    done(run(0, 1, tmp_path / "unbroken", epochs))
    assert step_of(workdir) == step_of(tmp_path / "unbroken") == 10 * EPOCH
    assert_near(workdir, tmp_path / "unbroken", 1e-3)


FAULTS = {
    "records:1:3": ("process 1 (", "48 records in a row cannot be used"),
    "disk:0:2": ("process 0 (", "No space left on device"),
    "bug:1:4": ("process 1 (", "KeyError: 'a mistake in the code'"),
}


@pytest.mark.release
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_ends_all(run, tmp_path, fault):
    with run(2, 1, tmp_path, variables={"FAULT": fault}) as processes:
        results = processes.results()
    for code, output in results:
        assert code == 1, output
        assert all(f in output for f in FAULTS[fault]) and "Check failure" not in output


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_names_the_records_of_all(run, tmp_path):
    fields = ["--config.optim.lr=1e30", "--config.optim.warmup_steps=0"]
    with run(2, 1, tmp_path, *fields) as processes:
        results = processes.results()
    for code, output in results:
        assert code == 1 and "not finite" in output, output
        assert output.splitlines()[-1].count("drawn:") == 8
