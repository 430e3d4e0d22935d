"""A `gcloud` that records its arguments and plays a TPU slice, for the tests of the launch scripts.

With workers, each is a home folder in which the commands that would go over ssh run for real, with
a `python` that plays flip_jax.main. Nothing reaches a cloud.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"
SLICE = ("--name", "my slice", "--zone", "zone-a", "--project", "my project")
CREATE = (*SLICE, "--type", "v6e-256")
MAIN = ("--", "--config", "configs/base.py")
# Arguments of flip_jax.main that a shell would spoil.
ODD = ("--config", "configs/it's.py", "--config.data.path=/mnt/a  b", "$HOME", "`id`", "x\ny", "")

# `describe` answers with the lines of FAKE/KIND.states one after the other, the last one for ever.
# ssh runs its command in all worker folders; without any it answers `worker.sh status` with the
# lines of FAKE/run.states, workers divided by commas. FAKE/fail: an action that fails, its status.
GCLOUD = f"""#!{sys.executable} -IS
import fcntl, json, os, pathlib, shutil, subprocess, sys

fake = pathlib.Path(os.environ["FAKE"])
words = sys.argv[1:]
if words[0] == "storage":
    (pathlib.Path(os.environ["HOME"]) / "copied").write_text(" ".join(words))
    sys.exit()
with open(fake / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
kind, action, name = words[2:5]
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
workers = sorted((fake / "workers").glob("*"))
if (fake / "fail").exists():
    failing, status = (fake / "fail").read_text().split()
    if action == failing:
        print("ERROR: no quota", file=sys.stderr)
        sys.exit(int(status))

def following(file):
    with open(file, "r+") as answers:  # the calls of several slices come at once
        fcntl.flock(answers, fcntl.LOCK_EX)
        first, *rest = answers.read().splitlines()
        if rest:
            answers.seek(0)
            answers.truncate()
            answers.write("\\n".join(rest))
    return first

if action == "describe":
    print("WARNING: a newer gcloud", file=sys.stderr)
    state = following(fake / f"{{kind}}.states")
    if state == "ABSENT":
        sys.exit(f"ERROR: (gcloud) NOT_FOUND: Resource {{name!r}} was not found.")
    if state == "BROKEN":
        sys.exit("ERROR: (gcloud) There was a problem refreshing your token")
    print(state)
elif action == "scp":
    for home in workers:
        shutil.copy(name, home / words[5].partition(":")[2])
elif action == "ssh" and workers:
    chosen = workers if flags["worker"] == "all" else [workers[int(flags["worker"])]]
    running = [
        subprocess.Popen(
            ["bash", "-c", flags["command"]], cwd=home, env=os.environ | {{"HOME": str(home)}}
        )
        for home in chosen
    ]
    sys.exit(next(filter(None, [command.wait() for command in running]), 0))
elif action == "ssh" and "worker.sh status" in flags["command"]:
    for number, state in enumerate(following(fake / "run.states").split(",")):
        print(f"state: {{state}} (worker-{{number}}, run train)")
"""

# As `python3` it makes an environment of itself. As flip_jax.main it runs until the file `end`,
# which holds its exit status, and says what flip_jax says when SIGTERM ends a run.
PYTHON = """#!/bin/bash
printf '%q ' "$@" >>"$HOME/python_calls"
echo >>"$HOME/python_calls"
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-c '*) exit "${PYTHON_TOO_OLD:-0}" ;;
  '-m flip_jax.preflight') echo "preflight $FLIP_JAX_DISTRIBUTED" ;;
  '-m flip_jax.main')
    if [[ -f $HOME/deaf ]]; then trap '' TERM; else
      trap 'echo "stopped: step 7 is saved"; exit "${SAVING:-0}"' TERM
    fi
    echo "training $FLIP_JAX_DISTRIBUTED in $PWD"
    until [[ -f $HOME/end ]]; do sleep 0.1; done
    exit "$(cat "$HOME/end")"
    ;;
esac
"""

UV = """#!/bin/bash
mkdir -p "${@: -1}/bin" && cp "$FAKE/bin/python3" "${@: -1}/bin/python"
"""


class Cloud:
    """A copy of launch in a git repository of its own, and a PATH on which gcloud is the fake."""

    def __init__(self, folder: Path):
        self.root, self.fake, self.homes = folder / "a repository", folder / "fake", []
        shutil.copytree(LAUNCH, self.root / "launch")
        (self.root / "code.py").write_text("committed")
        self.git("init", "-q")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "all")
        (self.fake / "workers").mkdir(parents=True)
        self.program("gcloud", GCLOUD)
        self.program("hostname", '#!/bin/bash\nbasename "$HOME"\n')

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(self.root), *identity, *words]
        return subprocess.check_output(command, text=True).strip()

    def program(self, name: str, text: str) -> None:
        """Puts a program on the PATH of the scripts."""
        file = self.fake / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def add_workers(self, count: int) -> list[Path]:
        """Home folders in which ssh runs its commands."""
        self.program("python3", PYTHON)
        self.homes = [self.fake / "workers" / f"w {number}" for number in range(count)]
        for home in self.homes:
            uv = home / ".local" / "bin" / "uv"
            uv.parent.mkdir(parents=True)
            uv.write_text(UV)
            uv.chmod(0o755)
        return self.homes

    def states(self, **states: list[str]) -> None:
        """What `describe` and `worker.sh status` will answer: tpu_vm, queued_resources, run."""
        for kind, answers in states.items():
            (self.fake / f"{kind.replace('_', '-')}.states").write_text("\n".join(answers))

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "FLIP_JAX_"))}
        path = f"{self.fake / 'bin'}:{clean['PATH']}"
        return subprocess.run(
            [self.root / "launch" / f"{script}.sh", *arguments],
            env=clean | {"FAKE": str(self.fake), "PATH": path} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[list]:
        """Words after `gcloud compute tpus` of the calls since the last look.

        The words of a `--command` are a list in the place of that flag.
        """
        file = self.fake / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [tpu_words(json.loads(line)) for line in lines]


def tpu_words(call: list[str]) -> list:
    assert call[:2] == ["compute", "tpus"]
    command = "--command="
    return [
        words(word.removeprefix(command)) if word.startswith(command) else word for word in call[2:]
    ]


def words(command: str) -> list[str]:
    """The words that bash makes of a command."""
    shell = ["bash", "-c", f"printf '%s\\0' {command}"]
    return subprocess.check_output(shell, text=True).split("\0")[:-1]
