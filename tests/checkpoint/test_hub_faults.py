"""Bad networks: whatever the Hub or what is between does, a run ends as it should or says in a line why not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint
from tests.hub_server import HubServer, Request

TOKEN = "hf_loopbackSecretToken"
ENTRIES = ("GET /api/models/org/name", "HEAD /org/name/resolve", "GET /org/name/resolve")
#: Statuses that the client does not wait for, and those that it tries again for a while.
FINAL, PASSING = (400, 401, 402, 403, 404, 409, 410, 418, 451), (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Fault:
    """What goes wrong; ``harmless`` if the run is to succeed all the same."""

    name: str
    make: Callable[[HubServer, HubServer], None]
    harmless: bool = False


def refused(entry: str, status: int) -> Fault:
    return Fault(f"{entry}: {status}", lambda hub, other: hub.broken.update({entry: status}))


def cut(count: int) -> Fault:
    """After so many bytes of each answer; a client that asks for the rest often enough has it in the end."""
    return Fault(f"cut after {count}", lambda hub, other: setattr(hub, "limit", count))


def header(entry: str, **headers: str) -> Fault:
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    def spoiled(request: Request) -> dict[str, str]:
        weights = request.path.endswith(".safetensors")  # files of one ETag would be one in the client's cache
        return names if weights and f"{request.method} {request.path}".startswith(entry) else {}

    return Fault(f"{entry}: {names}", lambda hub, other: setattr(hub, "spoil", spoiled))


def stalled(count: int) -> Fault:
    """After so many bytes of each answer, for good; the connection stays."""

    def wait(request: Request) -> None:
        if request.bytes_sent >= count:
            threading.Event().wait()

    def make(hub: HubServer, other: HubServer) -> None:
        hub.piece, hub.watch = 1000, wait

    return Fault(f"stalled after {count}", make)


def unanswered(entry: str) -> Fault:
    def wait(request: Request) -> None:
        if f"{request.method} {request.path}".startswith(entry):
            threading.Event().wait()

    return Fault(f"{entry}: no answer", lambda hub, other: setattr(hub, "meet", wait))


def dripping(count: int) -> Fault:
    """So many bytes at a time, whether they are wanted or not."""
    return Fault(f"{count} bytes at a time", lambda hub, other: setattr(hub, "piece", count), harmless=True)


def elsewhere(hub: HubServer, other: HubServer) -> None:
    hub.store = other.url


SHORT = [
    *(refused(entry, 403) for entry in ENTRIES),
    header(ENTRIES[1], ETag='"other"', X_Linked_ETag='"other"'),
    Fault("redirected to another host", elsewhere, harmless=True),
]
LONG = [
    *(refused(entry, status) for entry in ENTRIES for status in FINAL),
    *(refused(entry, status) for entry in ENTRIES for status in PASSING),
    header(ENTRIES[1], X_Linked_Size="7"),
    header(ENTRIES[2], Content_Length="9999999"),
    *(cut(count) for count in (0, 5000, 2000, 3000, 4000, 7000, 9000, 12_000, 20_000, 33_000)),
    *(header(ENTRIES[2], Content_Length=str(count)) for count in (0, 1, 8, 100, 5000)),
    *(header(entry, Location="http://127.0.0.1:9/x") for entry in ENTRIES),
    *(stalled(count) for count in (0, 3000)),
    *map(unanswered, ENTRIES),
    *(dripping(count) for count in (1, 7, 100)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repos") / "name"
    save_checkpoint(folder, llama_layers(2), LLAMA_CONFIG)
    return folder


@pytest.fixture
def hubs(folder: Path) -> Iterator[tuple[HubServer, HubServer]]:
    with HubServer({"org/name": folder}, token=TOKEN) as hub, HubServer({"org/name": folder}) as other:
        yield hub, other


def survives(fault: Fault, how: str, hubs: tuple[HubServer, HubServer], frodctl: Run, folder: Path) -> None:
    """The run ends well, or with one line and nothing half-made; afterwards the same command succeeds."""
    hub, other = hubs
    env = {"HF_HUB_OFFLINE": "0", **hub.env(folder / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    command = ("decompose", "org/name", *how.split(), "-o", "out.safetensors")
    fault.make(hub, other)
    done = frodctl(*command, env=env, cwd=folder)
    assert done.returncode == 0 if fault.harmless else done.returncode in (0, 1, 3), done.stderr
    made = folder / "out.safetensors"
    assert made.exists() == (done.returncode == 0)
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith("Error: org/name"), done.stderr
        assert "unexpected" not in done.stderr
    assert not any(request.authorization for request in other.requests)
    hub.broken.clear()
    hub.limit, hub.store, hub.spoil, hub.piece = None, None, lambda request: {}, 65_536
    hub.meet = hub.watch = lambda request: None
    again = frodctl(*command, "--force", env=env, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["", "--stream"])
@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_bad_networks(fault: Fault, how: str, hubs: tuple[HubServer, HubServer], frodctl: Run, tmp_path: Path) -> None:
    survives(fault, how, hubs, frodctl, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["", "--stream", "--dtype bfloat16"])
@pytest.mark.parametrize("fault", LONG, ids=lambda fault: fault.name)
def test_many_bad_networks(
    fault: Fault, how: str, hubs: tuple[HubServer, HubServer], frodctl: Run, tmp_path: Path
) -> None:
    survives(fault, how, hubs, frodctl, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["", "--stream"])
def test_a_body_that_never_ends_is_interrupted(
    how: str, hubs: tuple[HubServer, HubServer], frodctl: Run, tmp_path: Path
) -> None:
    """The client's threads wait for it, and the command does not wait for them."""
    hub, _ = hubs
    env = {"HF_HUB_OFFLINE": "0", **hub.env(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = ("decompose", "org/name", *how.split(), "-o", "out.safetensors")
    dripping = threading.Event()

    def drip(request: Request) -> None:
        dripping.set()
        time.sleep(1)

    hub.piece, hub.watch = 1, drip
    process = subprocess.Popen(
        [sys.executable, "-m", "frodctl", *command], env=env, cwd=tmp_path, stderr=subprocess.PIPE
    )
    assert dripping.wait(60)
    process.send_signal(signal.SIGINT)
    assert b"Interrupted; the same command resumes." in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not (tmp_path / "out.safetensors").exists()
    hub.piece, hub.watch = 65_536, lambda request: None
    assert frodctl(*command, env=env, cwd=tmp_path).returncode == 0
