"""Loading without network, and the cards."""

import doctest
import re
import shutil
import socket
from pathlib import Path

import evaluate
import pytest
import yaml

from hf_ecif import metrics
from hf_ecif.errors import UserError

FOLDER = Path(metrics.__file__).parent

INPUTS = {
    "linear_datamodeling_score": {"predictions": [1, 3, 2], "references": [1, 2, 3]},
    "misalignment_detection": {"predictions": [0.1, 0.9], "references": [False, True]},
    "retrieval_recall": {"text_embeddings": [[1, 0], [0, 1]], "image_embeddings": [[1, 0], [0, 1]]},
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_names_are_the_folders():
    assert metrics.names() == sorted(INPUTS)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"no metric 'recall'.*retrieval_recall"):
        metrics.load("recall")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", INPUTS)
class TestLoading:
    def test_a_copy_of_the_folder_stands_on_its_own(self, name, tmp_path):
        shutil.copytree(FOLDER / name, tmp_path / name)
        copied = evaluate.load(str(tmp_path / name), cache_dir=str(tmp_path))
        installed = metrics.load(name, cache_dir=str(tmp_path))
        assert copied.compute(**INPUTS[name]) == installed.compute(**INPUTS[name])

    def test_batches_add_up(self, name, tmp_path):
        metric = metrics.load(name, cache_dir=str(tmp_path))
        whole = metric.compute(**INPUTS[name])
        for row in range(len(next(iter(INPUTS[name].values())))):
            metric.add_batch(**{key: values[row : row + 1] for key, values in INPUTS[name].items()})
        assert metric.compute() == whole


@pytest.mark.parametrize("name", INPUTS)
class TestCards:
    def test_examples_print_what_they_say(self, name):
        result = doctest.testfile(str(FOLDER / name / "README.md"), module_relative=False)
        assert result.attempted > 0
        assert result.failed == 0

    def test_head_is_that_of_an_evaluate_module(self, name):
        head = (FOLDER / name / "README.md").read_text().split("---\n")[1]
        assert {"evaluate", "metric"} <= set(yaml.safe_load(head)["tags"])

    def test_every_result_is_explained(self, name, tmp_path):
        card = (FOLDER / name / "README.md").read_text()
        metric = metrics.load(name, cache_dir=str(tmp_path))
        explained = set(re.findall(r"`([^`\n]+)`", card))
        results = {re.sub(r"@\d+", "@k", key) for key in metric.compute(**INPUTS[name])}
        assert results <= explained
