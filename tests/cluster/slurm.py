"""A Slurm cluster of one node with simulated GPUs, for as long as a command runs.

    python tests/cluster/slurm.py [--gpus 2] snakemake --workflow-profile workflow/profiles/slurm ...

Needs root and the packages slurm-wlm, slurm-client and munge (Debian). Every daemon listens on the loopback
interface alone. /etc/slurm must hold no configuration: Slurm's clients look there, whatever the environment
says. The node claims more cores and memory than the machine has, so that what a profile asks for fits.
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

ETC = Path("/etc/slurm")
OURS = "# Written by tests/cluster/slurm.py; removed when it ends.\n"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun")
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmdTimeout=30
KillWait=20
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000000 Gres=gpu:{gpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


def lack() -> str | None:
    """Why no cluster can be started here; None where it can."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=search_path())]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm slurm-client munge"
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    own = ETC / "slurm.conf"
    if own.exists() and not own.read_text().startswith(OURS):
        return f"{own} is of a cluster that is in use"
    return None


def search_path() -> str:
    """The path with the folders of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])


def free_ports(n: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Return when `condition` holds.

    Raises:
        TimeoutError: it does not for `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent does, even if that is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Cluster:
    """The daemons of a one-node cluster; a context manager that starts and ends them.

    Args:
        gpus: simulated cards.
    """

    def __init__(self, gpus: int = 2):
        self.gpus, self.host = gpus, socket.gethostname().split(".")[0]
        self.folder = Path(tempfile.mkdtemp(prefix="castbench-slurm-"))
        self.processes: dict[str, subprocess.Popen] = {}
        self.written: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start munged, slurmctld and slurmd, and wait until the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munged insists that others cannot write
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for i in range(self.gpus):
            (self.folder / f"gpu{i}").symlink_to(
                os.devnull
            )  # a device, else Slurm sets no CUDA_VISIBLE_DEVICES
        folder, ports = self.folder, free_ports(2)
        self.write(
            "slurm.conf", SLURM_CONF.format(host=self.host, folder=folder, ports=ports, gpus=self.gpus)
        )
        cards = f"gpu[0-{self.gpus - 1}]" if self.gpus > 1 else "gpu0"
        self.write("gres.conf", f"Name=gpu File={folder}/{cards}\n")
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
        self.daemon("munged", "--foreground", f"--key-file={key}", *options)
        wait_for((folder / "munge.socket").exists, "munged")
        self.daemon("slurmctld", "-D")
        self.start_node()
        wait_for(lambda: self.ask("sinfo", "-ho", "%T") == "idle", "the node is idle")

    def start_node(self) -> None:
        """Start the daemon of the node."""
        self.daemon("slurmd", "-D", "-N", self.host)

    def kill_node(self) -> None:
        """What the death of a node does: slurmd and all that it started are gone at once.

        Slurm's controller would find out at a next ping; here it is told.
        """
        slurmd = self.processes.pop("slurmd")
        for pid in [slurmd.pid, *self.jobs()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        slurmd.wait()
        self.ask("scontrol", "update", f"nodename={self.host}", "state=down", "reason=died")

    def jobs(self) -> list[int]:
        """Process ids of the running jobs: the step daemons of this cluster and their descendants."""
        parents = {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = file.read_text().partition(" (")[2].rpartition(") ")
                parents[int(file.parent.name)] = (name, int(rest.split()[1]))
            except OSError:
                continue  # it has ended
        found = {pid for pid, (name, _) in parents.items() if name == "slurmstepd" and self.owns(pid)}
        while more := {pid for pid, (_, parent) in parents.items() if parent in found} - found:
            found |= more
        return sorted(found)

    def process_of(self, *words: str) -> int:
        """The running job's Python process with these words on its command line."""
        for pid in reversed(self.jobs()):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "castbench" in line and set(words) <= set(line):
                return pid
        raise LookupError(words)

    def owns(self, pid: int) -> bool:
        """Whether a step daemon writes to this cluster's log."""
        try:
            return any(self.folder in file.readlink().parents for file in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            return False

    def ask(self, *command: str) -> str:
        """Standard output of one of Slurm's clients, without the last line end."""
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return ended.stdout.strip()

    def daemon(self, name: str, *arguments: str) -> None:
        """Start a daemon in the foreground of a session of its own."""
        program = shutil.which(name, path=search_path())
        with (self.folder / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [str(program), *arguments], stdout=output, stderr=output, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip

    def write(self, name: str, content: str) -> None:
        """Write a file that Slurm's clients look for."""
        ETC.mkdir(exist_ok=True)
        path = ETC / name
        path.write_text(OURS + content)
        self.written.append(path)

    def stop(self) -> None:
        """End the jobs, the daemons in reverse order, and remove what was written."""
        if "slurmctld" in self.processes:
            self.ask("scancel", "--state=PENDING", "--user=root")
        for pid in self.jobs():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in reversed(self.processes.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        for path in self.written:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    """Run a command beside a cluster."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2, help="simulated cards (default 2)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if reason := lack():
        print(reason, file=sys.stderr)
        return 1
    with Cluster(arguments.gpus):
        return subprocess.run(arguments.command).returncode


if __name__ == "__main__":
    raise SystemExit(main())
