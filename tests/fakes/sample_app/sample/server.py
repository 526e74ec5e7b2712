"""A class with the service's structure: parameters, hooks around a snapshot, a web server, methods, an exit hook.

Every event is printed as one `TRACE {json}` line; the parameter `model` selects what goes wrong.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import modal

APP_NAME = os.environ.get("SAMPLE_APP", "sample")
PORT = int(os.environ.get("SAMPLE_PORT", "8000"))
SETTINGS = {
    "SAMPLE_APP": APP_NAME,
    "SAMPLE_PORT": str(PORT),
    "SAMPLE_NOTE": os.environ.get("SAMPLE_NOTE", "a b 'c'"),
}
CACHE = Path.home() / ".cache" / "sample"

app = modal.App(APP_NAME)
image = modal.Image.debian_slim().pip_install("nothing==1").env({"SAMPLE_LAYER": "1"}).env(SETTINGS)
cache = modal.Volume.from_name("sample-cache", create_if_missing=True, version=2)


def trace(event: str, **values: object) -> None:
    """Print the event with the values that tests compare."""
    place = {"task": os.environ.get("MODAL_TASK_ID"), "socket": os.environ.get("MODAL_SERVER_URL"), "at": time.time()}
    line = {"event": event, **place, **values}
    print("TRACE " + json.dumps(line), flush=True)  # noqa: T201 - a container's output is its log


def gpus() -> str:
    """Return what nvidia-smi lists."""
    return subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout.strip()


@app.cls(
    image=image,
    gpu=os.environ.get("SAMPLE_GPU", "H100:1"),
    volumes={"/root/.cache/sample": cache},
    scaledown_window=int(os.environ.get("SAMPLE_SCALEDOWN_WINDOW", "60")),
    max_containers=2,
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True} if os.environ.get("SAMPLE_GPU_SNAPSHOT") else {},
    secrets=[modal.Secret.from_name("sample-secret", required_keys=["TOKEN"])],
    startup_timeout=60,
    timeout=60,
)
@modal.concurrent(max_inputs=4)
class Server:
    """The class that the tests call."""

    model: str = modal.parameter(default="default-model")
    fast_boot: bool = modal.parameter(default=True)
    n_gpu: int = modal.parameter(default=1)

    @modal.enter(snap=True)
    def prepare(self) -> None:
        """Start a helper in a session of its own, write to the volume and commit."""
        if self.model == "fails-in-prepare":
            raise RuntimeError("boom in prepare")
        if self.model == "writes-much":
            (CACHE / "much.bin").write_bytes(b"x" * 200_000)
        if self.model == "slow-in-prepare":
            trace("slow")
            time.sleep(3)
        until = "time.sleep(600)" if self.model == "leaves-a-process" else "sys.stdin.read()"  # the end of this process
        command = [sys.executable, "-c", f"import sys, time; {until}"]
        self.helper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        (CACHE / f"{self.model}.txt").write_text("prepared")
        cache.commit()
        if self.model == "holds-a-file":
            self.held = (CACHE / "holds-a-file.txt").open()
        trace(
            "prepare", model=self.model, fast_boot=self.fast_boot, n_gpu=self.n_gpu, gpus=gpus(), child=self.helper.pid
        )

    @modal.enter(snap=False)
    def start(self) -> None:
        """Start the web server and wait until it listens."""
        if self.model == "holds-a-file":
            self.held.close()
        cache.reload()
        files = sorted(path.name for path in CACHE.iterdir())
        trace("start", gpus=gpus(), files=files, note=os.environ["SAMPLE_NOTE"], late=os.environ.get("LATE"))
        command = [sys.executable, "-m", "sample.web", str(PORT)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self.server.stdout is None or self.server.stdout.readline() != b"listening\n":
            raise RuntimeError("the web server did not start")

    @modal.web_server(port=PORT, startup_timeout=5, requires_proxy_auth=os.environ.get("SAMPLE_AUTH") == "1")
    def serve(self) -> None:
        """Answer HTTP."""
        trace("serve")

    @modal.method()
    async def complete(self, path: str, body: dict[str, object], seconds: float = 0.0) -> dict[str, object]:
        """Return the arguments after the given seconds; trace the beginning of a call that takes time."""
        try:
            if seconds:
                trace("working", path=path)
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            trace("cancelled", path=path)
            raise
        return {"path": path, "body": body, "model": self.model, "task": os.environ["MODAL_TASK_ID"]}

    @modal.method()
    async def count(self, n: int):  # type: ignore[no-untyped-def]
        """Yield n numbers."""
        for i in range(n):
            yield {"i": i, "model": self.model}

    @modal.method()
    async def fail(self) -> None:
        """Raise."""
        raise ValueError("told to fail")

    @modal.method()
    async def fetch(self, url: str) -> str:
        """Get a URL from inside the container."""
        return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())  # noqa: S310

    @modal.method()
    async def die(self) -> None:
        """Exit the container without running its hooks."""
        os._exit(7)

    @modal.method()
    async def hold_file_and(self, action: str) -> str:
        """Commit or reload while a file of the volume is open; return the error."""
        with (CACHE / "held.txt").open("w"):
            try:
                await getattr(cache, action).aio()
            except RuntimeError as error:
                return str(error)
        return "no error"

    @modal.method()
    async def write(self, name: str, text: str) -> None:
        """Write a file of the volume without a commit."""
        (CACHE / name).write_text(text)

    @modal.method()
    async def commit(self) -> None:
        """Commit what this container wrote."""
        await cache.commit.aio()

    @modal.method()
    async def reload(self) -> None:
        """Reload what other containers committed."""
        await cache.reload.aio()

    @modal.method()
    async def read(self, name: str) -> str | None:
        """Return what this container sees of a file of the volume."""
        return (CACHE / name).read_text() if (CACHE / name).exists() else None

    @modal.exit()
    def stop(self) -> None:
        """Stop the web server; the helper ends with this process, or the platform kills it."""
        (CACHE / "left-at-exit.txt").write_text(str(time.time()))
        self.server.terminate()
        trace("stop", code=self.server.wait(5))


@app.function(image=image)
def ping(text: str) -> str:
    """Return the text after `pong`."""
    return f"pong {text}"


@app.local_entrypoint()
def main(model: str = "from-entrypoint") -> None:
    """Call a variant, as `modal run` does."""
    variant = Server.with_options(gpu="H200")(model=model)
    trace("main", items=list(variant.count.remote_gen(2)), one=variant.complete.remote("/x", {"a": 1})["model"])
