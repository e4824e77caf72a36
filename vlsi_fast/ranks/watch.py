"""Say which rank died, and end the others; note SIGTERM, by which clusters ask a run to end.

A killed rank says nothing, and the others wait for it in a collective. So every rank has a thread that watches the
processes of its own machine and, where there are several machines, a word in torch's store by which they tell
each other. Linux only; elsewhere the collective's timeout remains.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers import TrainerCallback

from ..errors import StoppedEarly
from ..terminal import say
from .sharding import rank, world_size

KEY = "vlsi_fast/dead_rank"
LOOK_SECONDS = 5.0
"""Between looks at what other machines say."""
GRACE_SECONDS = 10.0
"""For the launcher, or this rank's own error, to end this rank before the thread does."""


INTERRUPTED = (signal.SIGINT, (128 + signal.SIGINT) << 8)
"""Wait statuses of a process that Ctrl-C has ended."""


@dataclass(frozen=True)
class Peer:
    """A rank's process. Processes of one `machine` see each other."""

    rank: int
    host: str
    pid: int
    machine: tuple

    def __str__(self) -> str:
        return f"rank {self.rank} of {world_size()} (host {self.host}, pid {self.pid})"


def _myself() -> Peer:
    host = socket.gethostname()
    node = next((os.environ[n] for n in ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID") if n in os.environ), "0")
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # containers of one host have process ids of their own
    except OSError:
        namespace = str(rank())
    return Peer(rank(), host, os.getpid(), (host, node, namespace))


def _ending(pid: int) -> int | None:
    """Wait status of a process that has ended and that its parent has not collected yet, else None."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            state, *fields = stream.read().rsplit(")", 1)[1].split()
        return int(fields[-1]) if state in "ZX" else None
    except (OSError, ValueError):
        return None


def _how(status: int | None) -> str:
    if status is None:  # its launcher has asked first, and says it
        return "is gone"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"was killed by signal {number} ({signal.Signals(number).name})"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


class Watch:
    """This rank's thread. `begin` and `end` enclose stages; `place` is what messages say of where the run is."""

    def __init__(self):
        self.place = "before training"
        self.training = False
        """Whether steps are made: SIGTERM then waits for the step, where the run can save; else it ends the process."""
        self.asked_to_leave = False
        """Whether SIGTERM has come while `training`."""
        self.me: Peer | None = None
        self.found = threading.Event()
        self.interrupted = False
        """Whether Ctrl-C has come, which the main thread may not know yet: it can be inside a collective."""
        self._thread: threading.Thread | None = None
        self._takes_sigterm = False

    def begin(self) -> None:
        """Start watching the other ranks, and for SIGTERM. Collective; a second call does nothing."""
        if not self._takes_sigterm:
            self.asked_to_leave = False
            self._takes_sigterm = threading.current_thread() is threading.main_thread() and (
                signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            )
            if self._takes_sigterm:
                signal.signal(signal.SIGTERM, _noted)
        if self._thread is not None or world_size() == 1 or not hasattr(os, "pidfd_open"):
            return
        self.me, everyone = _myself(), [None] * world_size()
        dist.all_gather_object(everyone, self.me)
        self._local = [p for p in everyone if p.machine == self.me.machine and p.rank != self.me.rank]
        self._first = everyone[0]
        self._several = len({p.machine for p in everyone}) > 1
        self._stopped, self._terminated, self.interrupted = threading.Event(), False, False
        self._inlet, self._outlet = socket.socketpair()
        self._inlet.setblocking(False)
        if self._takes_sigterm:
            # The launcher may end this rank before the thread has looked: it looks first, then ends the process.
            self._wakeup = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="vlsi-fast watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching: from here on ranks may end as they like."""
        if self._takes_sigterm and signal.getsignal(signal.SIGTERM) is _noted:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        takes_sigterm, self._takes_sigterm, self.training = self._takes_sigterm, False, False
        if self._thread is None:
            return
        self._stopped.set()
        self._inlet.send(b"\0")
        self._thread.join()
        if takes_sigterm:
            signal.set_wakeup_fd(self._wakeup)
        self._inlet.close()
        self._outlet.close()
        self._thread = None
        self.found.clear()

    def failed(self, error: BaseException) -> None:
        """Say which rank raised `error`, unless it is only the echo of another rank's death."""
        if self._thread is not None and self.found.wait(2.0 + LOOK_SECONDS * self._several):
            return
        me = self.me or _myself()
        first = (str(error).strip() or "no message").splitlines()[0]
        say(f"{me} failed in {self.place}: {type(error).__name__}: {first}")

    # ---- the thread ----

    def _run(self) -> None:
        poller, peers, store = select.poll(), {}, None
        for peer in self._local:
            try:
                descriptor = os.pidfd_open(peer.pid)
            except OSError:  # forbidden in this sandbox, or gone already: the collectives' errors remain
                continue
            peers[descriptor] = peer
            poller.register(descriptor, select.POLLIN)
        poller.register(self._outlet, select.POLLIN)
        try:
            while not self._stopped.is_set():
                ready = {descriptor for descriptor, _ in poller.poll(LOOK_SECONDS * 1000)}
                if self._outlet.fileno() in ready:
                    self._note(self._outlet.recv(4096))
                for descriptor in ready & peers.keys():
                    poller.unregister(descriptor)
                    self._lost(peers[descriptor], list(peers.values()))
                if self._terminated and not self.training and signal.getsignal(signal.SIGTERM) is _noted:
                    os._exit(128 + signal.SIGTERM)
                if self._several and not self._stopped.is_set():
                    store = self._ask(store)
        finally:
            for descriptor in peers:
                os.close(descriptor)

    def _lost(self, peer: Peer, local: list[Peer]) -> None:
        """A process of this machine has ended."""
        status = _ending(peer.pid)
        if status in (0, StoppedEarly.exit_code << 8) or self._stopped.is_set():
            return
        if status is None and self._stopped.wait(1.0):  # a launcher has collected it: perhaps the run just ended
            return
        self.interrupted |= status in INTERRUPTED
        line = f"{peer} {_how(status)} in {self.place}"
        self.found.set()
        alive = [p.rank for p in [self.me, *local] if p != peer and _ending(p.pid) is None]
        if not self.interrupted and self.me.rank == min(alive):
            say(line + _advice(status))
            if self._several:
                self._tell(line)
        self._give_up()

    def _ask(self, store):
        """Look at what other machines say; returns the connection."""
        try:
            store = store or self._connect()
            if not store.check([KEY]):
                return store
            line = store.get(KEY).decode()
        except RuntimeError:
            line = f"{self._first}, or its machine, is out of reach, seen in {self.place}"
        if self._stopped.wait(1.0):  # the run just ended
            return store
        self.found.set()
        if self.me.rank == min([self.me.rank, *(p.rank for p in self._local)]):
            say(line + _advice(None))
        self._give_up()
        return store

    def _tell(self, line: str) -> None:
        try:
            self._connect().set(KEY, line)
        except RuntimeError:
            pass  # rank 0 kept the store and is gone: others see that themselves

    def _connect(self):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=GRACE_SECONDS)
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)

    def _give_up(self) -> None:
        """End this rank, which can only wait in vain, unless someone else does it first."""
        until = time.monotonic() + GRACE_SECONDS
        while not self._terminated and time.monotonic() < until and not self._stopped.is_set():
            if select.select([self._outlet], [], [], 0.5)[0]:
                self._note(self._outlet.recv(4096))
        if not self._stopped.is_set():
            os._exit(128 + signal.SIGINT if self.interrupted else 1)

    def _note(self, signals: bytes) -> None:
        self._terminated |= signal.SIGTERM in signals
        self.asked_to_leave |= self._terminated and self.training
        self.interrupted |= signal.SIGINT in signals


class TellPlace(TrainerCallback):
    """Tells the watch the step, and every process group how long it may wait."""

    def __init__(self, stage: str, seconds: float):
        self.stage, self.seconds = stage, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        # torch gives groups that DeepSpeed makes for itself its own default, and CPU ranks are started without one.
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=self.seconds), group)

        watch.training = True

    def on_train_end(self, args, state, control, **kwargs):
        watch.training = False

    def on_step_begin(self, args, state, control, **kwargs):
        watch.place = f"stage {self.stage}, optimizer step {state.global_step + 1}"


def _noted(number, frame) -> None:
    """SIGTERM. Where other ranks are watched, the thread has it, too: this waits for the end of a collective."""
    if watch.training:
        watch.asked_to_leave = True
    elif watch._thread is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _advice(status: int | None) -> str:
    memory = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    hint = " (the kernel kills so where memory runs out: see dmesg)" if memory else ""
    return f"{hint}; this job ends, --resume continues from the last checkpoint"


watch = Watch()
"""The one of this process."""
