"""`mra exec -- transformers serve` as a user starts it: a chat with a picture, over HTTP on loopback."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from checkpoints import DATA, GOLDEN, add_tokenizer, arch_of, read_checkpoint, with_vocabulary, write_checkpoint

from mra_model.convert import convert
from mra_model.generation import generate_text, load_model
from mra_model.images import load_image

PHOTO = DATA / "llava_data" / "rocket.jpg"
QUESTION = "What is this?"
TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint whose vocabulary is that of the test tokenizer, 640 pieces."""
    root = tmp_path_factory.mktemp("served")
    source = write_checkpoint(root / "source", *with_vocabulary(*read_checkpoint(GOLDEN[0]), 640))
    add_tokenizer(source)
    convert(source, root / "llava-hr", arch=arch_of(GOLDEN[0]))
    return root / "llava-hr"


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server, which ends with the tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "mra", "exec", "--", "transformers", "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path_factory.mktemp("log") / "serve.log").open("w+") as log:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            _await(lambda: _answers(f"{address}/health"), process, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=10) as response:
            return response.status == 200
    except (URLError, TimeoutError, ConnectionError):
        return False


def _await(ready: Callable[[], bool], process: subprocess.Popen, log: IO[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            pytest.fail(f"the server ended or never answered: {log.read()[-3000:]}")
        time.sleep(0.5)


def chat(server: str, model: Path, content: list[dict[str, Any]], **options: Any) -> str:
    """What the assistant says, from one request of OpenAI's chat completions."""
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 0.0,
        **options,
    }
    request = Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=240) as response:
        text = response.read().decode()
    if not options.get("stream"):
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"].get("content") for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta for delta in deltas if delta)


def picture(file: Path) -> dict[str, Any]:
    """A picture's part of a message."""
    data = base64.b64encode(file.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def expected(folder: Path, pictures: list[Path]) -> str:
    """The answer of the same model in this process."""
    answer = generate_text(load_model(folder, None, "cpu"), QUESTION, [load_image(file) for file in pictures], TOKENS)
    return answer.strip()


def test_a_chat_with_a_picture(server: str, folder: Path) -> None:
    content = [picture(PHOTO), {"type": "text", "text": QUESTION}]
    answer = chat(server, folder, content)
    assert answer.strip() == expected(folder, [PHOTO])
    assert chat(server, folder, content, stream=True).strip() == answer.strip()
    # It saw the picture.
    assert answer.strip() != expected(folder, [])


def test_a_chat_without_one(server: str, folder: Path) -> None:
    assert chat(server, folder, [{"type": "text", "text": QUESTION}]).strip() == expected(folder, [])
