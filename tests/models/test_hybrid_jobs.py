"""Whole jobs with a hybrid pair: audited, compared with mlx-lm, killed and resumed."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from golden_cases import GOLDEN, load_case
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dspark_batch.cli.main import main

CASE, TARGET = "qwen35_dflash_b16", "qwen35_tiny4"
NUM_ITEMS = 6
# The trained pair speaks no language: each token is a byte, as byte-level tokenizers write it.
PLAIN = {*range(33, 127)}
BYTES = {chr(token if token in PLAIN else 256 + token): token for token in range(127)}
BYTES[chr(256 + 33)] = 127  # the next one that is not plain, behind 32 others


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The options that name a hybrid target, with words for its tokens, and its drafter."""
    target = tmp_path_factory.mktemp("pair") / "target"
    shutil.copytree(GOLDEN / "targets" / TARGET, target)
    tokenizer = Tokenizer(models.BPE(BYTES, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    drafter = GOLDEN / CASE / "drafter"
    return ["--target", str(target), "--drafter", str(drafter), "--dtype", "float32"]


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def whole(names, tmp_path_factory):
    """A finished job, audited while it ran."""
    folder = tmp_path_factory.mktemp("job")
    known = load_case(CASE).prompt("greedy0")
    lines = [
        json.dumps({"prompt": "".join(chr(token) for token in known[: 14 + n] if token in PLAIN)})
        for n in range(NUM_ITEMS)
    ]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    assert main(job(folder, "out.jsonl", names)) == 0
    return folder


def job(folder, out, names):
    # A fixed draft length: the pace might find that drafts do not pay on a busy machine.
    fixed = ["--max-tokens", "16", "--slots", "3", "--draft-length", "7"]
    settings = [*fixed, "--verify-greedy", "-q"]
    return ["run", str(folder / "in.jsonl"), "-o", str(folder / out), *settings, *names]


def answers(path):
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["custom_id"], row["token_ids"], row["finish_reason"]) for row in rows]


def test_a_job_is_audited_while_it_runs(whole):
    report = json.loads((whole / "out.jsonl.run" / "report.json").read_text())["report"]
    assert len(answers(whole / "out.jsonl")) == report["verified"] == NUM_ITEMS
    assert report["mismatched"] == 0
    assert report["mean_acceptance_length"] > 1.1  # so drafts were accepted and rejected


@pytest.mark.parametrize("against", ["engine", "mlx-lm"])
def test_an_audit_agrees_with_plain_decoding_and_with_mlx_lm(whole, against):
    assert main(["verify", str(whole / "out.jsonl"), "--against", against, "-q"]) == 0


def test_killed_and_resumed_it_has_the_same_output(whole, names):
    command = [sys.executable, "-m", "dspark_batch", *job(whole, "killed.jsonl", names)]
    process = subprocess.Popen(command)
    rows = whole / "killed.jsonl.run" / "rows.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 2):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (whole / "killed.jsonl").exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert answers(whole / "killed.jsonl") == answers(whole / "out.jsonl")


def test_check_tells_what_a_slot_takes(whole, names, capsys):
    paths = [str(whole / "in.jsonl"), "-o", str(whole / "new.jsonl"), "--max-tokens", "24"]
    assert main(["check", *paths, *names]) == 0
    assert "of the target's cache" in capsys.readouterr().out
