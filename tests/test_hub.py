"""Weights from a hub: the real client, a small hub on the loopback address, and all that goes wrong."""

import hashlib
import io
import os
import subprocess
import sys
import time

import pytest
import torch
from fake_hub import COMMIT, serving
from model_strategies import random_model

from othello_gpt import GPTConfig, OthelloGPT
from othello_gpt.weights import WeightsError, save_pretrained, to_transformer_lens

SMALL = GPTConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=16)
REPO = "somebody/othello"


@pytest.fixture
def model():
    return random_model(SMALL)


@pytest.fixture
def hub(model, tmp_path):
    save_pretrained(model, tmp_path / "saved")
    file = io.BytesIO()
    torch.save(to_transformer_lens(model), file)
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with serving({REPO: files | {"synthetic_model.pth": file.getvalue()}}) as hub:
        yield hub


@pytest.fixture
def options(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its retries
    return dict(endpoint=hub.url, cache_dir=tmp_path / "cache", fold=False, dtype=torch.float64)


def assert_same(loaded, model):
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("filename", [None, "synthetic_model.pth"])
def test_a_repository_gives_its_model(model, options, filename):
    """Our own layout with its configuration, and a file in TransformerLens's."""
    assert_same(OthelloGPT.from_pretrained(REPO, filename=filename, **options), model)


def test_a_repository_needs_no_configuration(hub, model, options):
    """The tensors tell the sizes; config.json only has to agree where there is one."""
    del hub.repos[REPO]["config.json"]

    assert_same(OthelloGPT.from_pretrained(REPO, **options), model)


def test_a_pinned_commit_is_asked_for_once(hub, model, options):
    """The second time nothing leaves this machine, even with the hub gone."""
    for _ in range(2):
        before = len(hub.requests)
        loaded = OthelloGPT.from_pretrained(
            REPO, filename="synthetic_model.pth", revision=COMMIT, **options
        )
        assert_same(loaded, model)
    assert len(hub.requests) == before > 0


@pytest.mark.parametrize(
    ("repo", "extra", "message"),
    [
        ("somebody/else", {}, "check its name; a private one needs `token=`"),
        (
            "some.body/model-1.0",
            {},
            "cannot have model.safetensors of .some.body/model-1.0.: check its name",
        ),
        (REPO, {"filename": "other.pth"}, "has no file other.pth: give `filename=`"),
        (REPO, {"revision": "v9"}, "it has no revision 'v9'"),
        (
            REPO,
            {"local_files_only": True},
            "not in the local cache.*go online once, or give a file",
        ),
    ],
)
def test_what_is_not_there_is_named(options, repo, extra, message):
    """Repository, file, revision, or the network."""
    with pytest.raises(WeightsError, match=message):
        OthelloGPT.from_pretrained(repo, **options, **extra)


def test_a_cut_download_is_an_error_and_can_be_repeated(hub, model, options):
    """Whatever class the HTTP library raises, it is ours that comes out; and nothing bad is kept."""
    hub.cut = True
    with pytest.raises(WeightsError, match="cannot have synthetic_model.pth"):
        OthelloGPT.from_pretrained(REPO, filename="synthetic_model.pth", **options)
    hub.cut = False

    assert_same(OthelloGPT.from_pretrained(REPO, filename="synthetic_model.pth", **options), model)


def test_wrong_bytes_of_the_right_length_are_noticed_and_dropped(hub, model, options):
    """The client compares lengths only; the hash tells, and the next call downloads anew."""
    sha256 = hashlib.sha256(hub.repos[REPO]["synthetic_model.pth"]).hexdigest()
    load = dict(filename="synthetic_model.pth", sha256=sha256, **options)

    hub.spoilt = True
    with pytest.raises(WeightsError, match="It was removed from the cache: load again"):
        OthelloGPT.from_pretrained(REPO, **load)
    hub.spoilt = False
    assert_same(OthelloGPT.from_pretrained(REPO, **load), model)


def test_what_is_pushed_can_be_loaded(hub, model, options):
    """A round trip through a repository made by the way."""
    url = model.push_to_hub("me/mine", endpoint=hub.url, token="hf_test")

    assert url.endswith(f"me/mine/commit/{COMMIT}")
    assert_same(OthelloGPT.from_pretrained("me/mine", **options), model)


def test_offline_is_respected(hub, tmp_path):
    """With HF_HUB_OFFLINE nothing is asked, and the error says what to do."""
    code = (
        "from othello_gpt import OthelloGPT\n"
        f"OthelloGPT.from_pretrained('{REPO}', endpoint='{hub.url}', cache_dir=r'{tmp_path}')"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": "."}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )

    assert "WeightsError" in run.stderr
    assert "HF_HUB_OFFLINE" in run.stderr
    assert hub.requests == []


def test_a_repository_of_shards_gives_its_model(hub, model, options, tmp_path):
    """With nothing but its index and shards; and again without the hub, from the cache."""
    save_pretrained(model, tmp_path / "shards", shard_bytes=2500)
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    hub.repos["somebody/sharded"] = files

    assert len(files) > 4
    assert_same(OthelloGPT.from_pretrained("somebody/sharded", **options), model)
    before = len(hub.requests)
    offline = options | {"local_files_only": True}
    assert_same(OthelloGPT.from_pretrained("somebody/sharded", **offline), model)
    assert len(hub.requests) == before
