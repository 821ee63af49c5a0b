#!/usr/bin/env python3
"""Checks `folio serve` with OpenAI's own Python client, against the story model.

    python3 scripts/check_serve.py [--binary target/release/folio] [--record cli/tests/serve/openai_client.json]

With --record what the client sent, and the form of what it was content with, are written for the test that replays them without the client. The client comes from PyPI into a virtual environment below target/. Needs a built binary: `cargo build --release -p folio-cli`.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "openai-venv"
KEY = "check-serve"


def enter_venv():
    """Goes on in the virtual environment, which is made if it isn't there."""
    python = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
    if pathlib.Path(sys.prefix) == VENV:
        return
    if subprocess.run([python, "-c", "import openai"], capture_output=True).returncode if python.exists() else True:
        venv.create(VENV, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "openai"], check=True)
    sys.exit(subprocess.run([python, *sys.argv]).returncode)


def serve(binary, *options, key=KEY):
    """Starts a server on a free port. Returns it, and its address."""
    environment = {**os.environ, "FOLIO_API_KEY": key}
    command = [binary, "serve", "--port", "0", *options]
    log = (ROOT / "target" / "check_serve.log").open("w+")
    server = subprocess.Popen(command, stderr=log, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"^listening on (.*)$", pathlib.Path(log.name).read_text(), re.M)
        if found:
            return server, found[1]
        time.sleep(0.05)
    server.kill()
    sys.exit(f"the server doesn't listen: {pathlib.Path(log.name).read_text()}")


def raised(kind, call, **expected):
    """The call must raise this error of the client's."""
    try:
        call()
    except kind as error:
        for name, value in expected.items():
            assert getattr(error, name) == value, (name, getattr(error, name), value)
        return error
    raise AssertionError(f"no {kind.__name__}")


def form(value, name=""):
    """The form of JSON: fields and types, without the values."""
    if isinstance(value, dict):
        if name == "top_logprobs" and "token" not in value:
            return {"*": "number"}  # the names are tokens
        return {name: form(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [form(part, name) for part in value[:1]]
    return {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}[type(value)]


class Recorder:
    """Keeps each request, and the form of its reply. What is large or depends on the server's load is left out."""

    # Those of the connection, of the machine, and the secret.
    OWN_HEADERS = {"authorization", "connection", "content-length", "host", "x-stainless-arch", "x-stainless-os", "x-stainless-runtime-version"}

    def __init__(self):
        self.calls = []
        self.is_on = True

    def hook(self, response):
        request = response.request
        body = request.read().decode()
        if not self.is_on or len(body) > 20_000:
            return
        call = {
            "method": request.method,
            "path": request.url.raw_path.decode(),
            "headers": {name: value for name, value in request.headers.items() if name not in self.OWN_HEADERS},
            "has_key": request.headers["authorization"] == f"Bearer {KEY}",
            "body": body,
            "status": response.status_code,
            "content_type": response.headers["content-type"],
        }
        if call["content_type"].startswith("application/json"):
            call["form"] = form(json.loads(response.read()))
        self.calls.append(call)


def check(base, recorder):
    import openai

    http = openai.DefaultHttpxClient(event_hooks={"response": [recorder.hook]})
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=http)
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").id == "stories"

    def complete(**options):
        return client.completions.create(**{"model": "stories", "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0, **options})

    whole = complete()
    assert whole.object == "text_completion" and whole.usage.completion_tokens == 20, whole
    assert whole.choices[0].finish_reason == "length" and len(whole.choices[0].text) > 40, whole
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    several = complete(n=3, temperature=0.9, seed=4)
    assert len({choice.text for choice in several.choices}) == 3, several
    assert several.choices == complete(n=3, temperature=0.9, seed=4).choices
    assert [len(complete(prompt=prompt).choices) for prompt in (["Tom", "Mia"], [5, 6], [[5], [6], [7]])] == [2, 1, 3]
    stop = whole.choices[0].text[20:26]
    stopped = complete(stop=[stop])
    assert stopped.choices[0].finish_reason == "stop" and stop not in stopped.choices[0].text
    assert whole.choices[0].text.startswith(stopped.choices[0].text)
    complete(extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1})

    story = "Tom hid the silver key under the old bridge. Mia gave the red lantern to Tom."
    messages = [
        {"role": "system", "content": story},
        {"role": "user", "content": [{"type": "text", "text": "Question: Where is the silver key?"}]},
        {"role": "assistant", "content": "Answer:"},
    ]

    def chat(**options):
        return client.chat.completions.create(**{"model": "stories", "messages": messages, "max_completion_tokens": 24, "temperature": 0, "stop": "\n", **options})

    answer = chat()
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant", answer
    assert answer.choices[0].finish_reason == "stop", answer
    print("asked where the silver key is:", answer.choices[0].message.content.strip())
    chunks = list(chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    with client.chat.completions.stream(model="stories", messages=messages, max_completion_tokens=24, temperature=0, stop="\n") as stream:
        assert stream.get_final_completion().choices[0].message.content == answer.choices[0].message.content

    told = complete(logprobs=2).choices[0].logprobs
    assert "".join(told.tokens) == whole.choices[0].text and all(len(top) == 2 for top in told.top_logprobs), told
    told = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    # The stop is cut off the text, but its tokens were drawn.
    assert "".join(token.token for token in told).removesuffix("\n") == answer.choices[0].message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in told), told

    raised(openai.NotFoundError, lambda: complete(model="gpt-4"), code="model_not_found", param="model")
    raised(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"), code="model_not_found")
    raised(openai.BadRequestError, lambda: complete(temperature=-1), param="temperature")
    raised(openai.BadRequestError, lambda: complete(logit_bias={"5": 1}), param="logit_bias", code="unsupported_parameter")
    raised(openai.BadRequestError, lambda: complete(logprobs=21), param="logprobs")
    raised(openai.BadRequestError, lambda: chat(tools=[{"type": "function", "function": {"name": "f"}}]), param="tools")
    raised(openai.BadRequestError, lambda: complete(prompt=[5] * 2000), param="prompt", code="context_length_exceeded")
    raised(openai.BadRequestError, lambda: chat(messages=[]), param="messages")
    stranger = client.with_options(api_key="wrong")
    raised(openai.AuthenticationError, lambda: stranger.models.list(), code="invalid_api_key")
    large = raised(openai.APIStatusError, lambda: complete(prompt="a" * (5 << 20)))
    assert large.status_code == 413 and large.request_id, large
    raised(openai.NotFoundError, lambda: client.embeddings.create(model="stories", input="a"))
    recorder.is_on = False
    # Two run, eight wait, and the next finds the queue full. Streams that are closed make room.
    held = [complete(stream=True, prompt=[1], max_tokens=900, extra_body={"ignore_eos": True}) for _ in range(2)]
    for stream in held:
        next(iter(stream))
    full = raised(openai.RateLimitError, lambda: complete(prompt=[[1]] * 9), code="queue_full")
    assert full.response.headers["retry-after"] == "1"
    for stream in held:
        stream.close()
    patient = client.with_options(max_retries=5)
    assert len(patient.completions.create(model="stories", prompt=[[1]] * 8, max_tokens=1).choices) == 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default=ROOT / "target" / "release" / "folio", type=pathlib.Path)
    parser.add_argument("--record", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    enter_venv()
    recorder = Recorder()
    start = time.monotonic()
    server, base = serve(arguments.binary, "--max-running", "2", "--max-queued", "8")
    ready = time.monotonic()
    try:
        check(base, recorder)
    finally:
        server.terminate()
        code = server.wait(60)
    assert code == 0, code
    if arguments.record:
        arguments.record.write_text(json.dumps(recorder.calls, indent=1) + "\n")
    print(f"OpenAI's client is content: {time.monotonic() - ready:.1f} s, after {ready - start:.1f} s of starting the server")


if __name__ == "__main__":
    main()
