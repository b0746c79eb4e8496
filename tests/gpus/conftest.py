"""The real nvidia-ml-py on the fake library of tests/fake_nvml, one state file for each test."""

import asyncio
import ctypes
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_nvml import build, compiler
from tests.gpus.trees import Tree
from vram_manager.domain.snapshot import Gpus
from vram_manager.errors import SensorError
from vram_manager.gpus.all import AllGpus
from vram_manager.gpus.nvml import NvmlSensor
from vram_manager.simulator.nvml_state import NvmlState

ROOT = Path(__file__).parents[2]

READ_ONCE = """
import asyncio, pickle, sys
from vram_manager.errors import SensorError
from vram_manager.gpus.all import AllGpus
from vram_manager.gpus.nvml import NvmlSensor
try:
    answer = asyncio.run(NvmlSensor(deadline_seconds=60).read(with_processes=True))
except SensorError as error:
    answer = error
sys.stdout.buffer.write(pickle.dumps(answer))
"""


class ElasticLoop(asyncio.SelectorEventLoop):
    """A real event loop whose clock can be put forward: a wait of 30 s costs nothing."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class Bench:
    """One sensor on its own loop, and the state of the library that it reads."""

    def __init__(self, state: NvmlState, sensor: NvmlSensor | AllGpus, runner: asyncio.Runner) -> None:
        self.state = state
        self.sensor = sensor
        self.loop = runner.get_loop()
        self._runner = runner

    def read(self, *, with_processes: bool = False) -> Gpus:
        return self._runner.run(self.sensor.read(with_processes=with_processes))

    def refusal(self) -> SensorError:
        with pytest.raises(SensorError) as caught:
            self.read()
        return caught.value

    def put_clock_forward(self, seconds: float) -> None:
        self.loop.ahead += seconds

    def when_a_call_hangs(self, then: Callable[[], None]) -> None:
        """Runs `then` on the loop once a call is inside the library and stays there."""

        def look() -> None:
            if self.state.hanging:
                then()
            else:
                self.loop.call_soon(look)

        self.loop.call_soon(look)

    def close(self) -> None:
        """Closes the sensor and waits until its threads have ended."""
        self.sensor.close()
        for thread in threading.enumerate():
            if thread.name in ("nvml", "amdgpu/i915/xe"):
                thread.join(timeout=10)
                assert not thread.is_alive()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("the fake NVML library needs a C compiler (cc or gcc)")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("the fake NVML library needs a C compiler (cc or gcc)")
    return build(tmp_path_factory.mktemp("old_nvml"), old_driver=True)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[NvmlState]:
    with NvmlState(tmp_path / "nvml.state", gpus=2) as state:
        yield state


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Stands in for /sys and /proc."""
    return Tree(tmp_path)


@pytest.fixture
def proc(tree: Tree) -> Path:
    return tree.proc


@pytest.fixture
def on_the_fake(library: Path, state: NvmlState, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """Puts a sensor on its bench, over the fake library."""
    ctypes.CDLL(str(library))  # its soname now satisfies the loader, which nvidia-ml-py asks by that name
    monkeypatch.setenv("FAKE_NVML_STATE", str(state.path))
    with asyncio.Runner(loop_factory=ElasticLoop) as runner:
        benches: list[Bench] = []

        def bench(sensor: NvmlSensor | AllGpus) -> Bench:
            benches.append(Bench(state, sensor, runner))
            return benches[-1]

        try:
            yield bench
        finally:
            state.hang_ms = 0
            for one in benches:
                one.sensor.close()
            for one in benches:
                one.close()


@pytest.fixture
def bench(on_the_fake: Callable[..., Bench], tree: Tree) -> Bench:
    """NVML alone."""
    return on_the_fake(NvmlSensor(proc_root=tree.proc))


@pytest.fixture
def hybrid(on_the_fake: Callable[..., Bench], tree: Tree) -> Bench:
    """NVML on a machine whose GPUs may sleep."""
    return on_the_fake(NvmlSensor(proc_root=tree.proc, sys_root=tree.sys, gpu_sleep=True))


@pytest.fixture
def every(on_the_fake: Callable[..., Bench], tree: Tree) -> Bench:
    """Every vendor's GPUs."""
    return on_the_fake(AllGpus(proc_root=tree.proc, sys_root=tree.sys, tools_path=str(tree.bin)))


@pytest.fixture
def read_in_a_new_process(state: NvmlState) -> Callable[..., Gpus | SensorError]:
    """Reads once with processes, in a process that has loaded no NVML yet."""

    def read(*, library: Path | None = None, modules: Path | None = None) -> Gpus | SensorError:
        environment = os.environ | {"FAKE_NVML_STATE": str(state.path)}
        if modules is not None:
            environment["PYTHONPATH"] = str(modules)
        if library is not None:
            environment["LD_LIBRARY_PATH"] = str(library.parent)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONCE], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        return pickle.loads(done.stdout)

    return read
