"""Readahead of weights: time from spawn to READY of the real engine with and without it. `python -m bench.readahead`.

The benchmark writes a random Qwen3 in eight shards once. Boots are interleaved and change their order every round, in
three states of its files: cold (evicted from the page cache, which is verified), warm (all in the page cache, which is
verified) and slow: cold, and on a volume of its own, a file system in a file that a blkio cgroup lets this benchmark
read at SLOW_MB_S. Slow is left out where this user may not mount such a file system: a throttled disk with the engine's
files on it would also delay its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.processes import free_port
from bench.report import Report
from service.engine import environment
from service.engine.args import EngineOptions, engine_command
from service.engine.process import EngineProcess, State
from service.hardware import check_disk_space
from service.memory import available_bytes
from service.registry.models import ModelSpec, Registry
from service.replica.readahead import Readahead, weight_files

SHARDS = 8
LIMIT_S = 300.0
SLOW_MB_S = 400
BLKIO = Path("/sys/fs/cgroup/blkio")
TARGETS = {"cold": 1.0, "warm": 1.02, "slow": 1.0}
# Run by the engine's Python, which has torch. Arguments: directory, GB, number of shards.
WRITE_MODEL = """
import json, pathlib, sys, torch
from safetensors.torch import save_file
root, gb, shards = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
config = json.loads((root / "config.json").read_text())
hidden, inner, heads, kv, size = 2048, 6144, 16, 2, 128
layer = {
    "self_attn.q_proj.weight": (heads * size, hidden), "self_attn.k_proj.weight": (kv * size, hidden),
    "self_attn.v_proj.weight": (kv * size, hidden), "self_attn.o_proj.weight": (hidden, heads * size),
    "self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,),
    "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
    "mlp.down_proj.weight": (hidden, inner),
    "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
}
count = max(round(gb * 1e9 / 2 / sum(torch.Size(shape).numel() for shape in layer.values())), shards)
config |= dict(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv,
               head_dim=size, num_hidden_layers=count, layer_types=["full_attention"] * count)
(root / "config.json").write_text(json.dumps(config))
shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
shapes |= {f"model.layers.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}
shapes["model.norm.weight"] = (hidden,)
names, index = list(shapes), {}
for shard in range(shards):
    file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
    mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
    save_file({name: torch.ones(shapes[name], dtype=torch.bfloat16) if "norm" in name
               else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in mine},
              root / file, {"format": "pt"})
    index |= dict.fromkeys(mine, file)
(root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
"""


@dataclass(frozen=True)
class Boot:
    """Times of one boot in seconds; `ahead_s` and `ahead_gb` are zero without a readahead."""

    ready_s: float
    imported_s: float
    loading_s: float
    ahead_s: float = 0.0
    ahead_gb: float = 0.0


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4, help="size of the weights, 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--directory", help="directory on a disk for the weights (default: that of temporary files)")
    options = parser.parse_args()
    # raises SystemExit, so that the context managers delete the weights
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    env = environment.ensure()
    with (
        TemporaryDirectory(prefix="bench-readahead-", dir=options.directory) as name,
        _volume(Path(name), options.gb) as volume,
    ):
        model = _model(Path(name) / "model", options.gb, env.python)
        places = {"cold": model, "warm": model}
        if volume:
            places["slow"] = shutil.copytree(model, volume / "model")
        boots = _boots(places, options.gb, env, options.rounds)
    report = Report("readahead")
    report.add("size of the weights", options.gb, unit="GB")
    for state, target in TARGETS.items():
        if (state, True) in boots:
            _compare(report, state, target, boots[state, False], boots[state, True])
    return report.finish()


def _boots(
    places: dict[str, Path], gb: float, env: environment.EngineEnv, rounds: int
) -> dict[tuple[str, bool], list[Boot]]:
    found: dict[tuple[str, bool], list[Boot]] = defaultdict(list)
    _boot(places["warm"], gb, env, ahead=False)  # brings the engine's own files into the page cache
    for number in range(1, rounds + 1):
        for state, directory in places.items():
            for ahead in (False, True) if number % 2 else (True, False):
                with _state(state, directory):
                    found[state, ahead].append(boot := _boot(directory, gb, env, ahead))
                print(f"round {number}: {state}, {'read ahead' if ahead else 'none'}: {boot}", flush=True)
    return found


def _note_end(times: list[float]) -> None:
    """Record the time at which the readahead threads have ended."""
    for thread in threading.enumerate():
        if thread.name == "readahead":
            thread.join()
    times.append(time.monotonic())


def _compare(report: Report, state: str, target: float, plain: list[Boot], ahead: list[Boot]) -> None:
    for what, boots in ((f"{state}, none", plain), (f"{state}, read ahead", ahead)):
        report.sample(f"{what}: spawn to READY", [boot.ready_s for boot in boots])
        report.sample(f"{what}: imports", [boot.imported_s for boot in boots])
        report.sample(f"{what}: loading of weights, vLLM's own figure", [boot.loading_s for boot in boots])
    report.sample(f"{state}: the readahead itself", [boot.ahead_s for boot in ahead])
    report.add(f"{state}: read by it", statistics.median(boot.ahead_gb for boot in ahead), unit="GB")
    if state != "warm":
        report.add(f"{state}: its rate, GB/s", statistics.median(boot.ahead_gb / boot.ahead_s for boot in ahead))
    ratio = statistics.median(boot.ready_s for boot in ahead) / statistics.median(boot.ready_s for boot in plain)
    report.add(f"readahead / none, {state} cache: ratio of medians", ratio, target)


def _model(directory: Path, gb: float, python: str) -> Path:
    """Write a random Qwen3 with the tiny model's tokenizer."""
    check_disk_space(directory, 2.2 * gb + 1, "The benchmark's model", "give --gb or --directory")
    if available_bytes() < (2 * gb + 4) * 1e9:  # weights in the page cache and in the engine, and the engine itself
        raise SystemExit(f"{gb:g} GB of weights need {2 * gb + 4:g} GB of free memory; pass a lower --gb.")
    tiny = Registry.load().resolve("tiny").spec.directory
    directory.mkdir()
    assert tiny  # noqa: S101 - it ships with the package
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((tiny / name).read_bytes())
    subprocess.run([python, "-c", WRITE_MODEL, str(directory), str(gb), str(SHARDS)], check=True)
    return directory


def _boot(directory: Path, gb: float, env: environment.EngineEnv, ahead: bool) -> Boot:
    # of a repeated flag the last one counts: entries on a CPU get a KV cache of 2 GiB
    small = ("--kv-cache-memory-bytes", str(256 * 1024**2))
    spec = ModelSpec(key="random", path=str(directory), max_model_len=1024, weights_gb=gb, extra_args=small)
    command = engine_command(
        spec,
        directory,
        EngineOptions(port=free_port()),
        default_key="random",
        device=env.device,
        parent_env=os.environ,
    )
    events: dict[str, float] = {}
    engine = EngineProcess(
        command, python=env.python, on_event=lambda name, fields: events.update({name: float(fields["at"])})
    )
    readahead, read_by = Readahead(directory), [began := time.monotonic()]
    engine.spawn()
    try:
        if ahead:
            readahead.start()
            threading.Thread(target=_note_end, args=(read_by,), daemon=True).start()
        engine.release()
        engine.wait_for(State.READY, LIMIT_S)
        ready_s = time.monotonic() - began
    finally:
        readahead.stop()
        engine.stop(5)
    size = sum(file.stat().st_size for file in weight_files(directory))
    if ahead and (done := readahead.bytes_read + readahead.bytes_cached) != size:
        raise SystemExit(f"the readahead got through {done} of {size} bytes")
    loading = re.search(r"Loading weights took ([\d.]+) seconds", "\n".join(engine.log.lines))
    return Boot(
        ready_s=round(ready_s, 3),
        imported_s=round(events["imported"] - began, 3),
        loading_s=float(loading[1]) if loading else float("nan"),
        ahead_s=round(read_by[-1] - began, 4),
        ahead_gb=round(readahead.bytes_read / 1e9, 3),
    )


@contextlib.contextmanager
def _state(name: str, directory: Path) -> Iterator[None]:
    """Bring the files into a state and keep them in it until the context exits."""
    files = weight_files(directory)
    for file in files:
        if name == "warm":
            file.read_bytes()
        else:
            _evict(file)
    share = statistics.mean(_resident(file) for file in files)
    if share < 0.99 if name == "warm" else share > 0.01:
        raise SystemExit(
            f"{share:.0%} of the weights are in the page cache, which is not {name}; pass another --directory."
        )
    with _throttled(directory) if name == "slow" else contextlib.nullcontext():
        yield


def _evict(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # pages that are not on the disk yet cannot be evicted
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident(file: Path) -> float:
    """Return the share of a file that is in the page cache."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages
        )
        del first  # it would keep the map open
        if failed:
            raise SystemExit(f"mincore failed for {file}")
        return sum(page & 1 for page in pages) / len(pages)


@contextlib.contextmanager
def _volume(directory: Path, gb: float) -> Iterator[Path | None]:
    """Mount a new file system in a file for the model; yield its directory, or None where this user may not mount."""
    image, mount = directory / "volume.img", directory / "volume"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(round((gb * 1.1 + 0.5) * 1e9))
    made = _succeeds("mkfs.ext4", "-q", "-m", "0", str(image)) and BLKIO.is_dir()
    mounted = made and _succeeds("mount", "-o", "loop,noatime", str(image), str(mount))
    try:
        yield mount if mounted else None
    finally:
        if mounted:
            _succeeds("umount", str(mount))


def _succeeds(*command: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    return False


@contextlib.contextmanager
def _throttled(directory: Path) -> Iterator[None]:
    """Limit this process and its children to reading SLOW_MB_S from the volume mounted at the directory."""
    number = directory.stat().st_dev
    group = BLKIO / f"bench-readahead-{os.getpid()}"
    group.mkdir()
    try:
        throttle = f"{os.major(number)}:{os.minor(number)} {SLOW_MB_S * 10**6}"
        (group / "blkio.throttle.read_bps_device").write_text(throttle)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        _remove(group)


def _remove(group: Path) -> None:
    """Remove a cgroup as soon as its last process has ended."""
    deadline = time.monotonic() + 10
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
