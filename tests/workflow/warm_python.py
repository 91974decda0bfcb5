"""A `python` for the jobs of a workflow that has imported the installed packages already, and forks.

Half the time of a small job is importing torch and its like. `python -m castbench VERB ...` is run here in a
fork of a server that has them: castbench itself is imported anew from PYTHONPATH, in the job's environment
and folder. All else, and the verb that may ask the network, is run by the real interpreter. (The cluster's
tests and those of the Materials Project start every job by the real one.)
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from shlex import quote

LATER = (
    "transformers.models.bert.modeling_bert",
    "peft",
    "captum.attr",
    "torch._dynamo",
    "matplotlib.pyplot",
)
CLIENT = """
import json, os, signal, socket, sys
if sys.argv[1:3] != ["-m", "castbench"] or "prefetch_encoder" in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.path.join(os.path.dirname(__file__), "jobs"))
    job = json.dumps([sys.argv[3:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(job).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(job)
    process = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    status = server.recv(1)
sys.exit(status[0] if status else 137)  # nothing comes from a job that was killed
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Start the server; yields a folder with `python`, to be put first on the PATH."""
    address, client, program = folder / "jobs", folder / "client.py", folder / "python"
    client.write_text(CLIENT)
    # Not named behind #!, where no path may have a space.
    program.write_text(f'#!/bin/sh\nexec {quote(sys.executable)} -IS {quote(str(client))} "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"}
    environment |= {"HF_HUB_OFFLINE": "1"}  # read when the Hub's client is imported
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
    try:
        while not address.exists():
            assert server.poll() is None, "the server of jobs has ended"
            time.sleep(0.05)
        yield folder
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Run jobs, each in a fork."""
    from castbench.cli import VERBS

    path = sys.path[:]
    for module in (*VERBS.values(), *LATER):
        import_module(module)
    for name in [name for name in sys.modules if name.partition(".")[0] == "castbench"]:
        del sys.modules[name]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen()
        Path(f"{address}.new").rename(address)
        while True:
            connection, _ = listening.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:
                listening.close()
                run(connection, path)
            connection.close()


def run(connection: socket.socket, path: list[str]) -> None:
    """Be the job that a client asks for, and end."""
    status = 1
    try:
        size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
        job = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
        arguments, folder, environment = json.loads(job)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = [*environment["PYTHONPATH"].split(os.pathsep), *path]
        sys.argv[1:] = arguments
        connection.sendall(os.getpid().to_bytes(8, "big"))
        runpy.run_module("castbench", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(bytes([status & 255]))
        os._exit(status & 255)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.argv[1])
