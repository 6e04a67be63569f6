"""The server: OpenAI's shapes, answers as the engine gives them, and nothing that is sent without effect."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from http.client import HTTPConnection

import pytest
import uvicorn

import loracompose.serving.batcher as batcher_module
from loracompose.engine import Engine
from loracompose.serving.app import create_app
from loracompose.serving.batcher import Batcher, generate
from tests.serving.material import chatty_engine, chunks, client_of, said

PATIENCE = 20.0  # seconds until what never comes fails a test
CHAT = "/v1/chat/completions"
TEXTS = ["the french for a dog", "count every user in one query", "is it a positive review", "add two and six"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with chatty_engine(tmp_path_factory.mktemp("server")) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with client_of(engine) as client:
        yield client


def ask(client, text=TEXTS[0], **fields):
    found = client.post(CHAT, json={"messages": said(text), "max_tokens": 6, **fields})
    assert found.status_code == 200, found.text
    return found.json()


def refused(client, status, **fields):
    found = client.post(CHAT, json={"messages": said(TEXTS[0]), **fields})
    assert found.status_code == status, found.text
    return found.json()["error"]["message"]


def test_an_answer_is_the_engines_with_its_trace(client, engine):
    found = ask(client)
    (own,) = engine.generate([said(TEXTS[0])], max_new_tokens=6)
    assert found["object"] == "chat.completion"
    assert found["model"] == "auto"
    assert found["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": own.text}, "finish_reason": "length"}
    ]
    assert found["usage"] == {
        "prompt_tokens": own.prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": own.prompt_tokens + 6,
    }
    assert own.prompt_tokens == len("<user>|<assistant>") - 2 * len("<>") + len(TEXTS[0]) + 4
    assert [use["name"] for use in found["loracompose"]["adapters"]] == [use.name for use in own.adapters]
    assert found["loracompose"]["composer"] == own.composer


def test_a_model_is_retrieval_the_base_or_one_adapter(client, engine):
    listed = client.get("/v1/models").json()["data"]
    names = [model["id"] for model in listed]
    assert names == ["auto", engine.base.name, *(card.name for card in engine.index.cards)]
    for name, given in ((engine.base.name, {}), ("sql", {"sql": 1.0})):
        (own,) = engine.generate([said(TEXTS[0])], adapters=[given], max_new_tokens=6)
        found = ask(client, model=name)
        assert found["choices"][0]["message"]["content"] == own.text
        assert [use["name"] for use in found["loracompose"]["adapters"]] == list(given)


@pytest.mark.parametrize("given", [["sql", "mood"], {"sql": 0.7, "mood": 0.3}, ["sql", "sql", "mood"], []])
def test_a_set_by_hand_is_composed_as_the_request_says(client, engine, given):
    (own,) = engine.generate([said(TEXTS[0])], adapters=[given], composer="lego", max_new_tokens=6)
    found = ask(client, adapters=given, composer="lego")
    assert found["choices"][0]["message"]["content"] == own.text
    assert found["loracompose"]["composer"] == own.composer
    weights = {use["name"]: use["weight"] for use in found["loracompose"]["adapters"]}
    assert weights == pytest.approx({use.name: use.weight for use in own.adapters})


def test_retrieval_is_steered_and_shown(client, engine):
    assert len(ask(client, k=1)["loracompose"]["adapters"]) == 1
    without = ask(client, exclude=["french"], k=4)["loracompose"]["adapters"]
    assert {use["name"] for use in without} == {"sql", "mood", "sums"}
    found = client.post("/v1/retrieve", json={"prompts": TEXTS, "k": 2, "exclude": ["sums"]}).json()["data"]
    own = engine.retrieve(TEXTS, k=2, exclude=[{"sums"}] * 4)
    for i, row in enumerate(found):
        assert row["prompt"] == TEXTS[i]
        assert [use["name"] for use in row["adapters"]] == [match.card.name for match in own.for_prompt(i)]
        assert "sums" not in {use["name"] for use in row["adapters"]}


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_rows_of_one_batch_end_at_limits_of_their_own(engine, limit):
    with client_of(engine, window=0.2) as client:
        found: dict[int, dict] = {}

        def send(tokens):
            found[tokens] = ask(client, max_tokens=tokens)

        threads = [threading.Thread(target=send, args=(tokens,)) for tokens in (limit, 12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.get("/health").json()["batches"] == 1
    for tokens, own in found.items():
        (alone,) = engine.generate([said(TEXTS[0])], max_new_tokens=tokens)
        assert own["choices"][0]["message"]["content"] == alone.text
        assert own["usage"]["completion_tokens"] == tokens
        assert own["choices"][0]["finish_reason"] == "length"


def test_a_stream_says_the_same_in_pieces(client):
    whole = ask(client)["choices"][0]
    sent = client.post(CHAT, json={"messages": said(TEXTS[0]), "max_tokens": 6, "stream": True})
    assert sent.headers["content-type"].startswith("text/event-stream")
    *events, done = chunks(sent.text)
    assert done == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == whole["finish_reason"]


def test_a_stop_text_ends_an_answer_and_is_left_out_of_it(client):
    whole = ask(client, max_tokens=12)["choices"][0]["message"]["content"]
    stop = whole[4:6]
    expected = whole[: whole.index(stop)]
    for sent in (stop, [stop, "never said"]):
        choice = ask(client, max_tokens=12, stop=sent)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    streamed = client.post(CHAT, json={"messages": said(TEXTS[0]), "max_tokens": 12, "stop": stop, "stream": True})
    events = chunks(streamed.text)[:-1]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_sampling_is_drawn_anew_and_the_same_again_with_a_seed(client):
    drawn = {ask(client, temperature=1.0, max_tokens=12)["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(drawn) > 1
    seeded = [ask(client, temperature=1.0, seed=seed, n=2)["choices"] for seed in (3, 3, 4)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert [choice["index"] for choice in seeded[0]] == [0, 1]
    assert ask(client)["choices"] == ask(client)["choices"]  # greedy


def test_parts_of_a_message_are_one_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in (TEXTS[0][:5], TEXTS[0][5:])]}]
    found = client.post(CHAT, json={"messages": parts, "max_tokens": 6}).json()
    assert found["choices"] == ask(client)["choices"]


def test_what_cannot_be_answered_is_refused_with_the_reason(client, engine):
    assert "logit_bias: Extra inputs are not permitted" in refused(client, 400, logit_bias={})
    assert "frequency_penalty: Input should be 0" in refused(client, 400, frequency_penalty=1)
    assert "there is no model 'gpt-4'; GET /v1/models" in refused(client, 404, model="gpt-4")
    assert "there is no adapter 'nobody'" in refused(client, 404, adapters=["sql", "nobody"])
    assert "exclude: there is no adapter 'nobody'" in refused(client, 404, exclude=["sql", "nobody"])
    assert "magic" in refused(client, 404, composer="magic")
    assert "router" in refused(client, 400, composer="mole")
    assert "adapters are given and so is the model 'sql'" in refused(client, 400, adapters=["mood"], model="sql")
    assert "k, exclude and where steer retrieval" in refused(client, 400, adapters=["mood"], k=2)
    assert "top_p, seed and n belong to sampling" in refused(client, 400, seed=1)
    assert "a stream is one answer" in refused(client, 400, n=2, temperature=1, stream=True)
    assert "n is 17; this server generates 16 answers at once" in refused(client, 400, n=17, temperature=1)
    assert "k is 17; this server composes 16 adapters at most" in refused(client, 400, k=17)
    assert "must be 0, which is greedy decoding, or at least" in refused(client, 400, temperature=1e-9)
    assert "adapters.dict" in refused(client, 400, adapters={"sql": 1e9})
    assert "adapters" in refused(client, 400, adapters={"sql": "nan"})
    assert "max_tokens: Input should be greater than or equal to 1" in refused(client, 400, max_tokens=0)
    assert "stop.0: String should have at least 1 character" in refused(client, 400, stop="")
    assert "messages: List should have at least 1 item" in refused(client, 400, messages=[])
    assert "and end with the user" in refused(client, 400, messages=[{"role": "assistant", "content": "x"}])
    longest = engine.base.model.config.max_position_embeddings
    assert f"the model reads {longest} in all" in refused(client, 400, max_tokens=longest)
    assert client.post(CHAT, content=b"{").status_code == 400
    for found in (client.get("/v1/nothing"), client.get("/v1/models/nobody")):
        assert found.status_code == 404
        assert found.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/models/sql").json()["parent"] == engine.base.name  # it goes on


def test_a_base_with_a_slash_in_its_name_is_a_model(engine):
    named = replace(engine, base=replace(engine.base, name="org/base"))
    with client_of(named) as client:
        for path in ("org/base", "org%2Fbase"):
            assert client.get(f"/v1/models/{path}").json()["id"] == "org/base"
        assert ask(client, model="org/base")["loracompose"]["adapters"] == []


def test_null_is_the_default_and_what_changes_nothing_is_taken(client):
    fields = ("model", "temperature", "top_p", "n", "stop", "stream", "seed", "adapters", "k", "exclude", "where")
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "user": "somebody"}
    assert ask(client, **dict.fromkeys(fields), **neutral)["choices"] == ask(client)["choices"]


def test_what_fails_inside_is_logged_and_not_told(engine, monkeypatch, caplog):
    def breaks(engine, jobs, rows):
        raise KeyError("a bug")

    monkeypatch.setattr(batcher_module, "generate", breaks)
    with client_of(engine) as client:
        for stream in (False, True):
            said_500 = refused(client, 500, stream=stream)
            assert said_500 == "the server failed on this request; its log says why"
        assert client.get("/health").json()["failed"] == 2
    assert "KeyError: 'a bug'" in caplog.text


def test_a_seed_decides_nothing_for_others(client):
    later = []
    for _ in range(3):
        ask(client, temperature=1.0, seed=3)
        later.append(ask(client, temperature=1.0, max_tokens=12)["choices"][0]["message"]["content"])
    assert len(set(later)) > 1


def test_a_stream_may_count_its_tokens(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    sent = client.post(CHAT, json={"messages": said(TEXTS[0]), "max_tokens": 6, **options})
    *_, last, done = chunks(sent.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == ask(client)["usage"]


def test_streams_share_a_batch_with_others(engine):
    with client_of(engine, window=0.2) as client:
        found: dict[str, str] = {}

        def send(text, stream):
            sent = client.post(CHAT, json={"messages": said(text), "max_tokens": 6, "stream": stream})
            found[text] = (
                "".join(event["choices"][0]["delta"].get("content", "") for event in chunks(sent.text)[:-1])
                if stream
                else sent.json()["choices"][0]["message"]["content"]
            )

        threads = [threading.Thread(target=send, args=(text, i % 2 == 0)) for i, text in enumerate(TEXTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.get("/health").json()["batches"] == 1
    alone = engine.generate([said(text) for text in TEXTS], batch_size=1, max_new_tokens=6)
    assert found == {text: own.text for text, own in zip(TEXTS, alone, strict=True)}


def test_a_body_that_is_too_long_is_not_read(engine):
    body = json.dumps({"messages": said(TEXTS[0]), "user": "x" * 2**20}).encode()
    with client_of(engine) as client:
        kind = {"Content-Type": "application/json"}
        sent = client.post(CHAT, content=body, headers=kind)
        assert (sent.status_code, sent.json()["error"]["message"]) == (413, "a request may have 1048576 bytes")
        in_parts = client.post(
            CHAT, content=iter([body[: 2**19], body[2**19 :]]), headers=kind
        )  # its length is not said
        assert in_parts.status_code == 400
        assert client.get("/health").json()["answered"] == 0


@pytest.mark.parametrize("name", ["../pool/sql", "/etc", "./sql"])
def test_no_folder_is_opened_for_who_asks_over_the_wire(client, name):
    assert "there is no adapter" in refused(client, 404, adapters=[name])
    assert "there is no model" in refused(client, 404, model=name)


def test_a_key_opens_everything_but_the_state(engine):
    with client_of(engine, api_key="secret") as client:
        assert client.get("/health").status_code == 200
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
            found = client.get("/v1/models", headers=sent)
            assert found.status_code == 401
            assert "the API key is missing or wrong" in found.json()["error"]["message"]
        assert client.get("/docs").status_code == 401
        assert client.post(CHAT, content=b"{").status_code == 401  # before it is read
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    for key in ("", "schlüssel"):
        with pytest.raises(ValueError, match="printable ASCII"):
            create_app(engine, api_key=key)


def test_over_a_socket_a_stream_comes_in_pieces_and_who_leaves_is_not_answered(engine, monkeypatch):
    go, began = threading.Event(), threading.Event()

    def slow(engine, jobs, rows):
        began.set()
        assert go.wait(PATIENCE)
        return generate(engine, jobs, rows)

    monkeypatch.setattr(batcher_module, "generate", slow)
    batcher = Batcher(engine, window=0)
    server = uvicorn.Server(uvicorn.Config(create_app(engine, batcher), port=0, log_level="warning"))
    serving = threading.Thread(target=server.run)
    serving.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        body = {"messages": said(TEXTS[0]), "max_tokens": 4}

        def send():
            connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            return connection

        first = send()
        assert began.wait(PATIENCE)
        gone = send()
        until(lambda: batcher.counts.waiting == 1)
        gone.close()
        until(lambda: batcher.counts.waiting == 0)
        stays = send()
        until(lambda: batcher.counts.waiting == 1)
        go.set()
        assert {first.getresponse().status, stays.getresponse().status} == {200}
        assert (batcher.counts.answered, batcher.counts.dropped) == (2, 1)
        body["stream"] = True
        streamed = send().getresponse()
        assert streamed.headers["Transfer-Encoding"] == "chunked"
        assert chunks(streamed.read().decode())[-1] == "[DONE]"
    finally:
        go.set()
        server.should_exit = True
        serving.join(PATIENCE)
    assert not serving.is_alive()


def until(happens):
    """Wait for what another thread does."""
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_a_server_needs_an_index(engine):
    with pytest.raises(ValueError, match="finds adapters in an index"):
        client_of(Engine.from_pretrained(engine.base.model, tokenizer=engine.base.tokenizer)).__enter__()


@pytest.mark.parametrize("room", [0, 5])
def test_an_answer_that_the_model_ends_says_so_even_at_its_last_token(client, engine, room):
    answers = {text: ask(client, text, max_tokens=12)["choices"][0]["message"]["content"] for text in TEXTS}
    text, new = next((t, i) for t, said in answers.items() for i in range(1, 12) if said[i] not in said[:i])
    end, short = engine.base.tokenizer.convert_tokens_to_ids(answers[text][new]), answers[text][:new]
    own = engine.base.model.generation_config
    before, own.eos_token_id = own.eos_token_id, end
    try:
        found = ask(client, text, max_tokens=len(short) + 1 + room)
        sent = {"messages": said(text), "max_tokens": len(short) + 1 + room, "stream": True}
        streamed = client.post(CHAT, json=sent)
        cut_short = ask(client, text, max_tokens=len(short))["choices"][0]
    finally:
        own.eos_token_id = before
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == len(short)
    assert chunks(streamed.text)[-2]["choices"][0]["finish_reason"] == "stop"
    assert cut_short["finish_reason"] == "length"
    assert cut_short["message"]["content"] == short
