"""The official client over loopback gets, whole and streamed, what whole passes give: a lost look-back would write another text."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from nengram.config import TableOptions
from nengram.errors import ConfigError
from nengram.hf.serve import served
from tests.conftest import run_command
from tests.hf.strong import PROMPTS, SAID
from tests.hf.test_loading import adapter, base, greedy  # noqa: F401 - fixtures

openai = pytest.importorskip("openai", reason="the other side of the test is the official client")
pytest.importorskip("fastapi")
TOKENS = 12


@pytest.fixture(scope="module")
def server(strong):
    with served(strong.folder, port=0, tables=TableOptions(table_tier="mapped")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def completion(client, prompt, **options):
    how = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0} | options
    answer = client.completions.create(model=client.models.list().data[0].id, **how)
    if options.get("stream"):
        return "".join(chunk.choices[0].text for chunk in answer)
    return answer.choices[0].text


def chat(client, **options):
    how = {"messages": SAID, "max_tokens": TOKENS, "temperature": 0} | options
    answer = client.chat.completions.create(model=client.models.list().data[0].id, **how)
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    return answer.choices[0].message.content


def text(strong, ids):
    return strong.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_what_whole_passes_give(client, strong, prompt, stream):
    ids = strong.ids(prompt)
    right = text(strong, strong.right(ids, TOKENS))
    assert completion(client, prompt, stream=stream) == right != text(strong, strong.lost(ids, TOKENS))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_chat_is_what_whole_passes_give(client, strong, stream):
    ids = strong.tokenizer.apply_chat_template(SAID, add_generation_prompt=True)["input_ids"]
    right = text(strong, strong.right(ids, TOKENS))
    assert chat(client, stream=stream) == right != text(strong, strong.lost(ids, TOKENS))


def test_requests_at_once_do_not_read_each_other(client, strong):
    prompts = PROMPTS * 2
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: completion(client, prompt), prompts))
    assert found == [text(strong, strong.right(strong.ids(prompt), TOKENS)) for prompt in prompts]


def post(server, path, body):
    request = urllib.request.Request(
        f"{server.url.removesuffix('/v1')}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_has_one_model_and_keeps_it(server, client, strong):
    assert [model.id for model in client.models.list()] == [str(strong.folder)]
    asked = {"prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    right = text(strong, strong.right(strong.ids(PROMPTS[0]), TOKENS))
    status, told = post(server, "/v1/completions", asked | {"model": "gpt2"})
    assert (status, "Server is pinned to" in told) == (400, True)
    assert "loads nothing else" in post(server, "/load_model", {"model": "gpt2"})[1]
    assert post(server, "/reset", {})[0] == 200
    assert json.loads(post(server, "/v1/completions", asked)[1])["choices"][0]["text"] == right


@pytest.mark.parametrize("tier", ["resident", "host"])
def test_the_tier_does_not_show(strong, tier):
    with served(strong.folder, port=0, tables=TableOptions(table_tier=tier)) as server:
        status, told = post(server, "/v1/completions", {"prompt": PROMPTS[1], "max_tokens": TOKENS, "temperature": 0})
    assert json.loads(told)["choices"][0]["text"] == text(strong, strong.right(strong.ids(PROMPTS[1]), TOKENS))


def test_a_memory_on_another_model_is_served(base, adapter, strong):  # noqa: F811
    folder, grafted = adapter
    asked = {"prompt": PROMPTS[2], "max_tokens": TOKENS, "temperature": 0}
    with served(base, adapters=[folder], port=0, tables=TableOptions(table_tier="mapped")) as server:
        told = post(server, "/v1/completions", asked)[1]
    expected = strong.tokenizer.decode(greedy(grafted, strong.ids(PROMPTS[2]), TOKENS), skip_special_tokens=True)
    assert json.loads(told)["choices"][0]["text"] == expected


def test_a_base_model_without_a_chat_template_chats(strong, tmp_path):
    for file in strong.folder.iterdir():
        if file.name != "chat_template.jinja":
            os.link(file, tmp_path / file.name)
    with served(tmp_path, port=0) as server:
        assert server.opened.tokenizer.chat_template
        asked = {"messages": SAID, "max_tokens": TOKENS, "temperature": 0}
        told = json.loads(post(server, "/v1/chat/completions", asked)[1])["choices"][0]["message"]["content"]
    assert told == text(strong, strong.right(strong.ids(SAID[0]["content"] + "\n"), TOKENS))


def test_continuous_batching_and_a_taken_port_are_one_line(server, strong, monkeypatch, capsys):
    code, out, err = run_command(monkeypatch, capsys, "serve", strong.folder, "--continuous-batching")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "look back into other requests' text" in err
    port = server.url.split(":")[-1].split("/")[0]
    code, out, err = run_command(monkeypatch, capsys, "serve", strong.folder, "--port", port)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot be listened on: Address already in use; choose another" in err
    with pytest.raises(ConfigError, match="cannot be listened on"), served(strong.folder, port=70_000):
        pass


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(strong, tmp_path):
    command = [sys.executable, "-c", "from nengram.cli import main; main()", "serve", str(strong.folder)]
    log = tmp_path / "log"
    with open(log, "w") as told:
        process = subprocess.Popen([*command, "--port", "0", "--table-tier", "mapped"], stderr=told, stdout=told)
    try:
        until = time.monotonic() + 120
        while "model name" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        url = next(
            word for word in log.read_text().split() if word.startswith("http://127.0.0.1") and word.endswith("/v1,")
        )
        with openai.OpenAI(base_url=url.rstrip(","), api_key="none") as client:
            assert completion(client, PROMPTS[0], stream=True) == text(
                strong, strong.right(strong.ids(PROMPTS[0]), TOKENS)
            )
        process.send_signal(2)
        assert process.wait(timeout=60) == 130
        assert "nengram: interrupted" in log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
