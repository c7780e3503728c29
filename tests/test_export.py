"""A run exported, read back by others, evaluated by lm-evaluation-harness and pushed to a Hub that
is a stand-in.
"""

from __future__ import annotations

import ast
import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from helpers import GOLDEN, PLUGINS, ROOT
from nano import NANO
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lswt_core import LswtForCausalLM, Registry, export_run
from lswt_core.__main__ import main
from lswt_core.errors import CheckpointError, DataError
from lswt_core.hf import source_bundle as bundle
from lswt_core.hf.push import push
from lswt_core.recipe.layer_selectors import LAYERED

RECIPE = (
    NANO
    + """
[memory.xl]
use = "xl-cache"
length = 24
[optimizer]
use = "sophia-g"
hessian_update_interval = 3
[schedule]
warmup_steps = 2
[tokenizer]
use = "bpe"
vocab_size = 320
[train]
batch_size = 2
seq_len = 16
steps = 6
precision = "float32"
[evaluate]
every = 3
tokens = 128
batch_size = 2
[sample]
tokens = 4
temperature = 0.7
"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    where = tmp_path_factory.mktemp("export")
    (where / "corpus").mkdir()
    for number in range(8):
        text = (
            f"It is a truth universally acknowledged, that number {number} must be in want of a"
            " successor. " * 12
        )
        (where / "corpus" / f"{number}.txt").write_text(text)
    (where / "nano.toml").write_text(RECIPE.format(corpus="corpus"))
    done = processes.run(
        "lswt_core.run", "nano.toml", "--out", "nano", cwd=where, LSWT_CACHE_DIR=where / "cache"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return where / "nano"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The run in the HuggingFace format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSWT_CACHE_DIR", str(run.parent / "cache"))
        patch.chdir(run.parent)
        return export_run(run, run.parent / "exported", address="me/nano").directory


def test_it_is_the_last_checkpoint(run: Path, exported: Path) -> None:
    (newest,) = sorted(run.joinpath("checkpoints").glob("step-????????"))[-1:]
    trained = load_file(newest / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LswtForCausalLM and not model.training
    for name, tensor in model.model.decoder.state_dict().items():
        assert tensor.equal(trained[f"decoder.{name}"].float()), name


def test_it_holds_what_a_model_on_the_hub_needs(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *(
            "README.md",
            "curves.png",
            "recipe.toml",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ),
        *("configuration_lswt.py", "modeling_lswt.py", "tokenizer.json", "tokenizer_config.json"),
    }
    config, generation = (
        json.loads((exported / name).read_text())
        for name in ("config.json", "generation_config.json")
    )
    assert config["bos_token_id"] == generation["bos_token_id"] == 0
    assert config["eos_token_id"] == generation["eos_token_id"] == 1
    assert generation["do_sample"] and generation["temperature"] == 0.7
    assert config["recipe"]["memory"]["xl"] == {"use": "xl-cache", "length": 24}


def test_text_in_text_out(exported: Path) -> None:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(exported),
        AutoModelForCausalLM.from_pretrained(exported),
    )
    inputs = tokenizer(
        ["It is", "It is a truth universally"],
        return_tensors="pt",
        padding=True,
        return_token_type_ids=False,
    )
    together = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    alone = model.generate(
        **tokenizer("It is", return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=8,
        do_sample=False,
    )
    assert together[0, -8:].equal(alone[0, -8:])
    assert isinstance(tokenizer.decode(together[1], skip_special_tokens=True), str)


def test_the_card_is_the_runs(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [entry["eval/loss"] for entry in last if "eval/loss" in entry][-1]
    for words in (
        "library_name: transformers",
        "AutoModelForCausalLM.from_pretrained('me/nano', trust_remote_code=True)",
        "![Curves of the run](curves.png)",
        f"| loss, nats per token | {loss:.4f} |",
        "| updates | 6 of 6 |",
        "| tokens seen | 192 |",
        "| `loss.simctg` | lswt-core",
        '[memory.xl]\nuse = "xl-cache"\nlength = 24',
    ):
        assert words in card, words
    cited = set(re.findall(r"@\w+\{(\w+),", card))
    offers = {(offer.kind, offer.name): offer for offer in Registry().offers()}
    expected = (
        ("positional", "rope"),
        ("memory", "xl-cache"),
        ("optimizer", "sophia-g"),
        ("loss", "simctg"),
        ("ffn", "swiglu"),
    )
    assert all(set(re.findall(r"@\w+\{(\w+),", offers[key].citation)) <= cited for key in expected)
    assert not {"hendrycks2016gelu", "loshchilov2019decoupled"} & cited, "only what is active"


@pytest.mark.slow
def test_the_cards_code_works(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("'me/nano'", repr(str(exported)))
    environment = os.environ | {"HF_MODULES_CACHE": str(exported.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and "Once upon a time" in done.stdout, done.stderr


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(run.parent / "cache"))
    monkeypatch.chdir(run.parent)
    before = sorted(run.parent.iterdir())
    with pytest.raises(CheckpointError, match=str(exported)):
        export_run(run, exported)
    monkeypatch.setattr("lswt_core.hf.export.PROBE_TOKENS", -1)
    with pytest.raises(RuntimeError):
        export_run(run, run.parent / "other")
    assert sorted(run.parent.iterdir()) == before


def test_our_own_decoders_read_it(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(run.parent / "cache"))
    monkeypatch.chdir(run.parent)
    printed = []
    for model in (run, exported):
        words = [
            "generate",
            str(model),
            "--prompt",
            "It is a",
            "--decode",
            "contrastive",
            "--tokens",
            "12",
            "--json",
        ]
        assert main(words) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0]["ids"] == printed[1]["ids"] and len(printed[0]["ids"]) == 12


def test_a_checkpoint_of_the_original_code_is_pointed_to_the_import(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = GOLDEN / "lswt_formats" / "seed_checkpoint"
    assert main(["generate", str(source), "--prompt", "It"]) == CheckpointError.exit_code
    assert f"python -m lswt_core import {source} OUT" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_what_to_do(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(exported, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert main(["generate", str(bare), "--prompt", "It"]) == CheckpointError.exit_code
    assert "--tokenizer NAME" in capsys.readouterr().err


def test_a_directory_without_a_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        assert main(["export", str(path), str(tmp_path / "out")]) == CheckpointError.exit_code
        assert str(path) in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evaluation_harness_evaluates_it(
    run: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["It is a truth", "universally acknowledged, that number 3 must be in want"]
    tmp_path.joinpath("texts.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in texts)
    )
    tmp_path.joinpath("task.yaml").write_text(
        "task: truths\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        f" {tmp_path / 'texts.jsonl'}}}}}\ntest_split: test\noutput_type:"
        " loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:"
        " [{metric: bits_per_byte}]\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    monkeypatch.setenv("LSWT_CACHE_DIR", str(run.parent / "cache"))
    monkeypatch.chdir(run.parent)
    tokenizer, loaded = (
        AutoTokenizer.from_pretrained(exported),
        AutoModelForCausalLM.from_pretrained(exported),
    )
    nats = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            nats -= float(
                loaded(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum()
            )
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    words = ["--task", "truths", "--task-dir", str(tmp_path), "--json", "--tokens", "200"]
    text = ["--text", str(tmp_path / "texts.jsonl")]
    capsys.readouterr()
    for model in ([str(run)], [str(exported), *text]):
        assert main(["evaluate", *model, *words]) == 0
        metric = json.loads(capsys.readouterr().out)["tasks"]["truths"]["bits_per_byte"]
        assert metric["value"] == pytest.approx(expected, rel=1e-4)
    assert main(["evaluate", str(run), "--task", "nothing"]) == 2
    assert "no such task" in capsys.readouterr().err


# ---------- to the Hub


class StandIn(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files speaks to; what it was sent lies in
    ``server.received``.
    """

    server: Any

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/me/nano"
        if self.headers["Authorization"] != "Bearer secret":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": address, "name": "me/nano"})
        elif self.path.endswith("/validate-yaml"):  # of the model card
            assert "library_name: transformers" in json.loads(body)["content"]
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {
                    "files": [
                        {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for path in files
                    ]
                }
            )
        else:
            assert "/commit/" in self.path, self.path
            sent = [json.loads(line)["value"] for line in body.splitlines()]
            self.server.received |= {
                value["path"]: base64.b64decode(value["content"])
                for value in sent
                if "path" in value
            }
            self.answer(
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{address}/commit/1",
                    "pullRequestUrl": None,
                }
            )

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Any]:
    """A stand-in for the Hub on this machine."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.received = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def command(run: Path, hub: Any, *more: str, key: str = "secret") -> processes.Done:
    """``export`` with the stand-in in the Hub's place."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_API_KEY": key,
        "LSWT_CACHE_DIR": str(run.parent / "cache"),
    }
    return processes.run("lswt_core", "export", run, *more, cwd=run.parent, **settings)


@pytest.mark.slow
def test_an_export_is_pushed_as_it_stands(run: Path, hub: Any, tmp_path: Path) -> None:
    done = command(run, hub, str(tmp_path / "out"), "--push", "me/nano")
    assert done.returncode == 0, done.stderr
    assert f"pushed to http://127.0.0.1:{hub.server_port}/me/nano" in done.stdout, done.stderr
    assert hub.received == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b"from_pretrained('me/nano'" in hub.received["README.md"]


@pytest.mark.slow
def test_a_dry_run_uploads_nothing(run: Path, hub: Any, tmp_path: Path) -> None:
    done = command(run, hub, str(tmp_path / "out"), "--push", "me/nano", "--dry-run")
    assert done.returncode == 0
    assert "would upload" in done.stdout
    assert "model.safetensors" in done.stdout
    assert not hub.received


@pytest.mark.slow
def test_a_push_that_fails_leaves_the_export_and_says_how_to_go_on(
    run: Path, hub: Any, tmp_path: Path
) -> None:
    done = command(run, hub, str(tmp_path / "out"), "--push", "me/nano", key="wrong")
    assert done.returncode == DataError.exit_code
    assert "HF_API_KEY" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not hub.received
    assert "Traceback" not in done.stderr


def test_readme_shows_the_commands() -> None:
    readme = (ROOT / ".github" / "guide.md").read_text()
    for words in (
        "python -m lswt_core export runs/quickstart",
        "--push",
        "python -m lswt_core import Avelina/lovelace-medium-alpha1",
    ):
        assert words in readme
    assert push.__doc__


def test_all_components_of_a_model_fit_into_one_file() -> None:
    offers = [
        offer
        for offer in Registry().offers()
        if offer.kind in LAYERED and offer.module.split(".")[0] in PLUGINS
    ]
    modules = bundle.sort_by_imports({bundle.MODELING, *(offer.module for offer in offers)})
    sources = [
        bundle.ModuleSource(module)
        for module in modules
        if module not in (bundle.CONFIGURATION, bundle.REPLACED)
    ]
    text = bundle.join_sources(sources, "All of them.", "pass")
    # raises SyntaxError if it is no program
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert len(classes) == len(set(classes))
    assert {Registry().load(offer).__name__ for offer in offers} <= set(classes)
