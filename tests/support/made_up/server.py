"""Forks a process for each job of a proof."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading

import made_up
from inr_kernels._core.proof import worker


def serve():
    """Serves at the address in sys.argv, until it is killed."""
    with made_up.installed(), socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("ready", flush=True)
        while True:
            threading.Thread(target=_answer, args=[server.accept()[0]], daemon=True).start()


def _answer(connection):
    with connection, contextlib.suppress(BrokenPipeError):
        connection.send(str(_status(connection)).encode())


def _status(connection):
    """The exit status of a job, negative for a signal."""
    job, (result, stderr), *_ = socket.recv_fds(connection, 1 << 16, 2)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(stderr, 2)
        worker.BUDGET = 0.02
        worker.main([job.decode(), str(result)])
    os.close(result)
    os.close(stderr)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if select.select([connection], [], [], 0.01)[0]:  # its client was killed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 0
