"""Several machines, played by launchers of their own on this one: by hand and through the SLURM script."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
SRUN = """#!/usr/bin/env bash
# Stands for SLURM's: the command once for each machine of the job.
[ "$1" = --kill-on-bad-exit=1 ] && shift
for ((rank = 0; rank < SLURM_NNODES; rank++)); do SLURM_PROCID=$rank "$@" & done
wait -n && wait -n
"""
SCONTROL = "#!/usr/bin/env bash\n[ \"$1 $2\" = 'show hostnames' ] && printf '127.0.0.1\\nother\\n'\n"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def started(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(training={"images": 32, "checkpoint_every": 32})))
    return tmp_path / "tiny.yaml"


@pytest.mark.slow
def test_two_machines_train_one_run(recipe: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/multi_node.yaml"]
    where = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    run = ["scripts/train.py", str(recipe), f"training.output={tmp_path / 'run'}"]
    nodes = [
        subprocess.Popen(
            [*launch, *where, "--machine_rank", str(rank), *run], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (
        started(tmp_path / "run")["world_size"] == 2 and (tmp_path / "run" / "pipeline" / "model_index.json").exists()
    )


@pytest.mark.slow
def test_the_slurm_script_launches_on_every_machine_of_the_job(recipe: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7"}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "recipes/accelerate/slurm.sh", str(recipe), f"training.output={tmp_path / 'run'}"]
    environment = {**ENVIRONMENT, **job, "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert started(tmp_path / "run")["world_size"] == 2
