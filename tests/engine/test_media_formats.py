"""What FFmpeg opens of what a client sends as a video, by vLLM's own reader."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from service.engine.args import IN_ENGINE

OPENS = """
import json, time
from pathlib import Path
import cv2, numpy
from vllm_service import media_formats
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

media_formats.enable()
for name, codec in (("clip.mp4", "mp4v"), ("clip.avi", "MJPG"), ("clip.mkv", "XVID"), ("clip.mov", "mp4v")):
    writer = cv2.VideoWriter(name, cv2.VideoWriter_fourcc(*codec), 5, (64, 48))
    for _ in range(5):
        writer.write(numpy.zeros((48, 64, 3), numpy.uint8))
    writer.release()
texts = {
    "list": b"ffconcat version 1.0\\nfile clip.mp4\\n",
    "playlist": b"#EXTM3U\\n#EXT-X-TARGETDURATION:1\\n#EXTINF:1,\\nclip.mp4\\n#EXT-X-ENDLIST\\n",
    "stream": b"v=0\\no=- 0 0 IN IP4 127.0.0.1\\ns=x\\nc=IN IP4 127.0.0.1\\nt=0 0\\nm=video 6004 RTP/AVP 96\\n",
}
opened = {}
for name, data in {**{path.name: path.read_bytes() for path in Path().glob("clip.*")}, **texts}.items():
    began = time.monotonic()
    try:
        opened[name] = OpenCVVideoBackendMixin.open_video_capture(data).read()[0]
    except ValueError:
        opened[name] = False
    assert time.monotonic() - began < 3, name
print(json.dumps(opened))
"""


def test_video_that_is_a_text_about_files_or_streams_is_not_opened(engine_python: str, tmp_path: Path) -> None:
    """FFmpeg would read videos of this machine, or wait at ports that it opens: 10 s, and longer with packets."""
    done = subprocess.run(
        [engine_python, "-c", OPENS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(IN_ENGINE)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        **dict.fromkeys(("clip.mp4", "clip.avi", "clip.mkv", "clip.mov"), True),
        **dict.fromkeys(("list", "playlist", "stream"), False),
    }
