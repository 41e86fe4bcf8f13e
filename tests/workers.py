"""Two processes that stay for the whole test session, with one gloo group between them."""

import multiprocessing
import os
import pickle
import sys
import traceback
from contextlib import suppress
from pathlib import Path

__all__ = ["WorkerPool", "plain_sharded_gradient"]

WORLD_SIZE = 2
_ROOT = str(Path(__file__).resolve().parents[1])


class WorkerTracebackError(Exception):
    """Cause of an exception that a worker raised; its text is the worker's traceback."""


class WorkerPool:
    """Runs functions on two ranks.

    Lightning finds the group through the variables of torchelastic: inside a function write
    ``Trainer(accelerator="cpu", devices=2, strategy="ddp")`` (or ``make_trainer(**TWO_RANKS)``), as often as you like.
    """

    def __init__(self):
        self._processes, self._pipes = [], []
        self._store = None

    def run(self, function, *args, timeout=120):
        """Calls ``function(*args)`` on both ranks and returns the results in the order of the ranks.

        The function and its arguments travel by pickle, so it must be a module's own function. What a rank raises is
        raised here, with its traceback as the cause. There is no way to run on one process: a pool that cannot start
        raises.
        """
        if not self._processes:
            self._start(timeout)
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers = [self._receive(rank, timeout) for rank in range(WORLD_SIZE)]
        failed = [(rank, *answer[1:]) for rank, answer in enumerate(answers) if answer[0] != "fine"]
        if not failed:
            return [answer[1] for answer in answers]
        if any(answer[0] == "lost" for answer in answers):
            self.close()  # the other rank may hang in a collective: the next call starts anew
        rank, error, text = failed[0]
        raise error from WorkerTracebackError(f"\non rank {rank}:\n{text}")

    def close(self):
        """Ends both processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._processes, self._pipes = [], []
        self._store = None

    def _start(self, timeout):
        from torch.distributed import TCPStore

        # The store picks the port and keeps it, so no other process can take it in between.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # Torch and Lightning are imported once, in a process without threads of which the ranks are forked.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.quick"])
        for rank in range(WORLD_SIZE):
            pipe, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, other_end))
            process.start()
            other_end.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        for rank in range(WORLD_SIZE):
            outcome, value, *text = self._receive(rank, timeout)
            if outcome != "fine":
                self.close()
                raise RuntimeError(f"Rank {rank} of the worker pool did not start: {value}\n{''.join(text)}")

    def _receive(self, rank, timeout):
        try:
            if self._pipes[rank].poll(timeout):
                return pickle.loads(self._pipes[rank].recv_bytes())
            problem = f"no answer from rank {rank} within {timeout} s"
        except (EOFError, OSError):
            self._processes[rank].join(5)
            problem = f"rank {rank} ended with exit code {self._processes[rank].exitcode}"
        return "lost", RuntimeError(problem), "(no traceback)"


def plain_sharded_gradient():
    """Gradient of ``w x`` at x = 1 on all ranks, of a weight whose rows are split; 1 if ranks are averaged."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = torch.nn.Linear(1, WORLD_SIZE, bias=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    net(torch.ones(1, 1)).sum().backward()
    return net.weight.grad.full_tensor().mean().item()


def _serve(rank, port, pipe):
    if _ROOT not in sys.path:
        sys.path.insert(0, _ROOT)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",  # Lightning's sign of TorchElasticEnvironment
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    pipe.send_bytes(_answer(_join, port, rank))
    with suppress(EOFError, OSError):  # until the other end is closed
        while True:
            pipe.send_bytes(_answer(_run, pipe.recv_bytes()))
    os._exit(0)  # the interpreter's own end would wait for the group's threads


def _join(port, rank):
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from tests.quick import make_fits_quick

    torch.set_num_threads(1)
    make_fits_quick()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=30))


def _run(request):
    import torch.distributed as dist

    function, args = pickle.loads(request)
    if dist.get_world_size() != WORLD_SIZE:
        raise RuntimeError(f"The group has {dist.get_world_size()} processes, not {WORLD_SIZE}.")
    return function(*args)


def _answer(function, *args):
    try:
        # Plain pickle: the pipe's own would hand tensors over through shared memory, which ends with its process.
        return pickle.dumps(("fine", function(*args)))
    except BaseException as error:  # noqa: BLE001 # everything a test can raise travels to the test
        text = traceback.format_exc()
        try:
            return pickle.dumps(("failed", _picklable(error), text))
        except Exception:  # noqa: BLE001
            return pickle.dumps(("failed", RuntimeError(f"{type(error).__name__}: {error}"), text))


def _picklable(error):
    pickle.loads(pickle.dumps(error))
    return error
