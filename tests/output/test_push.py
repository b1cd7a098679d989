"""What goes to the Hub: rows, card and report in one commit; a licence only if one was given."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine, fake_opener
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import HfHubHTTPError
from small_jobs import prompts, start, write_lines

from dspark_batch.errors import UsageError
from dspark_batch.output.push import push_to_hub
from dspark_batch.record.run_dir import RunDir


class LocalHub:
    """Takes what HfApi takes, and keeps the files."""

    def __init__(self):
        self.files = {}
        self.commits = []
        self.private = None

    def create_repo(self, repo_id, **options):
        inspect.signature(HfApi.create_repo).bind(self, repo_id, **options)
        assert options.pop("repo_type") == "dataset"
        self.private = options["private"]
        return f"hub/datasets/{repo_id}"

    def upload_folder(self, **options):
        inspect.signature(HfApi.upload_folder).bind(self, **options)
        assert options["repo_type"] == "dataset"
        folder = Path(options["folder_path"])
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[path.relative_to(folder).as_posix()] = path.read_bytes()
        self.commits.append(options["commit_message"])


@pytest.fixture
def hub():
    return LocalHub()


@pytest.fixture
def out(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"), b"nope")
    opener = fake_opener(target_source="org/target@abc", drafter_source=f"{tmp_path}/drafter")
    start(tmp_path, opener=opener, temperature=0.5, system_prompt="Be | kind.\nAlways.")
    return str(tmp_path / "out.jsonl")


def card_of(hub):
    return hub.files["README.md"].decode()


def test_one_commit_has_the_rows_the_card_and_the_report(hub, out, tmp_path):
    assert push_to_hub(out, "me/set", hub=hub) == "hub/datasets/me/set"
    assert hub.commits == ["3 rows by dspark-batch"]
    assert set(hub.files) == {
        *("README.md", "report.json", "data/train-00000-of-00001.parquet"),
    }
    (tmp_path / "got.parquet").write_bytes(hub.files["data/train-00000-of-00001.parquet"])
    assert pq.read_table(tmp_path / "got.parquet")["id"].to_pylist() == ["id-a", "id-b", None]


def test_the_card_is_one_that_the_hub_reads(hub, out):
    push_to_hub(out, "me/set", licence="mit", hub=hub)
    read = DatasetCard(card_of(hub)).data.to_dict()
    assert read["license"] == "mit"
    [config] = read["configs"]
    assert config["data_files"] == ["data/train-00000-of-00001.parquet"]


def test_a_licence_is_never_guessed(hub, out):
    push_to_hub(out, "me/set", hub=hub)
    assert "licen" not in card_of(hub).lower()


def test_the_card_states_models_settings_and_acceptance(hub, out):
    push_to_hub(out, "me/set", hub=hub)
    card = card_of(hub)
    for line in (
        "| target | org/target@abc |",
        "| target digest | t0 |",
        "| temperature | 0.5 |",
        "| max_tokens | 512 |",
        '| system_prompt | "Be \\| kind.\\nAlways." |',
        "| failed: bad_record | 1 |",
        "| accept length | 2.75 tokens per round |",
        "1 rows have no answer",
    ):
        assert line in card


def test_the_card_states_what_audits_said(hub, tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    start(tmp_path, verify_greedy="all")
    out = str(tmp_path / "out.jsonl")
    found = [{"says": f"{tmp_path}/in.jsonl:1 is odd"}]
    audit = {"verdict": "tied", "against": "mlx-lm", "rows": 2, "replayed": 1, "findings": found}
    RunDir(out).write_audit(audit)
    push_to_hub(out, "me/set", hub=hub)
    _, _, told = card_of(hub).partition("## Audit")
    for line in (
        "| decoded again during the run | 2 answers |",
        "| equal to plain decoding | 2 |",
        "| verdict of dspark-batch verify | tied |",
        "| against | mlx-lm |",
    ):
        assert line in told
    assert str(tmp_path) not in card_of(hub)


def test_a_card_without_an_audit_claims_none(hub, out):
    push_to_hub(out, "me/set", hub=hub)
    assert "Audit" not in card_of(hub)


def test_no_path_of_this_machine_leaves_it(hub, out, tmp_path):
    push_to_hub(out, "me/set", columns=["id", "completion"], hub=hub)
    names = {name for name, content in hub.files.items() if str(tmp_path).encode() in content}
    assert names == set()


def test_a_private_set_is_made_private(hub, out):
    push_to_hub(out, "me/set", private=True, hub=hub)
    assert hub.private is True


def test_an_unfinished_output_stays_here(hub, tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, engine=FakeEngine(slots=1, dies_after=1))
    with pytest.raises(UsageError, match="is not finished; its command continues it"):
        push_to_hub(str(tmp_path / "out.jsonl"), "me/set", hub=hub)
    assert not hub.commits


def test_what_the_hub_refuses_is_one_sentence(hub, out, monkeypatch):
    def refuse(**options):
        raise HfHubHTTPError(
            "403 Forbidden\nmany\nlines",
            response=SimpleNamespace(headers={}, request=None, status_code=403),
        )

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(UsageError, match=r"me/set: cannot be written on the Hub \(403 Forbidden"):
        push_to_hub(out, "me/set", hub=hub)
