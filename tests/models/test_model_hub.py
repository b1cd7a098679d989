"""A checkpoint is found by its name, and a refusal of the Hub says what to do about it."""

import time

import checkpoints as make
import pytest
from fake_hub import COMMIT, GATED, MISSING, point_client_at, serving
from huggingface_hub import constants

from dspark_batch.errors import ModelError
from dspark_batch.models.hub import cached, locate

REPO = "somebody/target"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make.write_target(tmp_path_factory.mktemp("hub") / "target", make.qwen3(), shards=2)


@pytest.fixture
def hub(target, tmp_path, monkeypatch):
    with serving({REPO: target}) as server:
        point_client_at(monkeypatch, tmp_path / "cache", server)
        yield server


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_repository_is_downloaded_and_its_commit_named(hub, target, revision):
    found = locate(REPO + revision)
    assert found.source == f"{REPO}@{COMMIT}"
    assert contents(found.directory) == contents(target)


def test_a_download_tells_how_far_it_is(hub, target):
    told = []
    locate(REPO, on_download=told.append)
    size = sum(path.stat().st_size for path in target.iterdir())
    assert {each.name for each in told} == {REPO}
    assert [each.done_bytes for each in told] == sorted(each.done_bytes for each in told)
    assert told[-1].done_bytes == told[-1].total_bytes == size


def test_a_download_shows_no_other_bar_when_it_is_told(hub, capfd):
    locate(REPO, on_download=lambda download: None)
    assert capfd.readouterr() == ("", "")


def test_what_was_downloaded_is_found_without_a_network(hub, tmp_path, monkeypatch):
    before = locate(f"{REPO}@v1")
    point_client_at(monkeypatch, tmp_path / "cache")
    assert locate(f"{REPO}@v1") == locate(f"{REPO}@{COMMIT}") == cached(f"{REPO}@v1") == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(f"{REPO}@v1") == before


def test_code_is_fetched_only_where_it_may_run(hub, target):
    code = target / "modeling.py"
    code.write_text("raise SystemExit\n")
    try:
        assert not (locate(REPO).directory / "modeling.py").exists()
        assert (locate(REPO, with_code=True).directory / "modeling.py").exists()
    finally:
        code.unlink()


def refusal(name):
    with pytest.raises(ModelError) as caught:
        locate(name)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{name}: ")
    return text


def test_a_gated_repository_says_how_to_be_let_in(hub):
    text = refusal(GATED)
    assert "a gated repository" in text
    assert f"Accept its terms on {constants.ENDPOINT}/{GATED}, run `hf auth login`" in text


def test_an_unknown_repository_and_revision_are_told_apart(hub):
    assert "no such repository on the Hub, or it is private" in refusal(MISSING)
    assert "has no revision 'v9', expected one of its branches" in refusal(f"{REPO}@v9")


@pytest.mark.parametrize("name", ["a/b/c", "-odd/name", "one two"])
def test_what_is_no_id_is_not_asked_for(hub, name):
    assert "neither a directory nor a Hub id, ORG/NAME" in refusal(name)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["/no/such/place", "./models", "~/no-such-place"])
def test_a_path_that_is_not_there_is_not_asked_for(hub, name):
    assert "no such directory" in refusal(name)
    assert hub.asked == []


def test_without_a_network_and_a_cache_the_sentence_says_both(tmp_path, monkeypatch):
    point_client_at(monkeypatch, tmp_path / "cache")
    text = refusal(REPO)
    assert f"not in the local cache {tmp_path / 'cache'}, and the Hub did not give it" in text
    assert "Connect to the network and run the same command again" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to ask the Hub" in refusal(REPO)


def test_half_a_download_is_never_taken_for_a_whole_one(hub, target, monkeypatch):
    shard = "model-00002-of-00002.safetensors"
    hub.breaks.add(shard)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's between its tries
    assert "did not give it" in refusal(REPO)
    with pytest.raises(ModelError, match=shard):
        cached(REPO)
    hub.breaks.clear()
    assert contents(locate(REPO).directory) == contents(target)


def test_a_cache_without_the_repository_is_no_error(tmp_path, monkeypatch):
    point_client_at(monkeypatch, tmp_path / "cache")
    assert cached(REPO) is None
    assert cached("no id at all") is None
