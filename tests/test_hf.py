"""Model classes of transformers: construction, saving, loading and bundled code, for many mixes of
components.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import distance
from hf_parts import MIXES, NANO, config_of, every_mix, generate, ids, logits, model_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lswt_core
from lswt_core import LswtConfig, LswtForCausalLM, Recipe, Registry
from lswt_core.errors import CheckpointError, PluginError, RecipeError
from lswt_core.hf.components import describe_components, model_tables
from lswt_core.hf.load import load_exported
from lswt_core.hf.save import save_model
from lswt_core.model.initialise import initialise

# ---------- what it is


@every_mix
@torch.no_grad()
def test_logits_are_the_decoders(mix: str) -> None:
    model = model_of(mix)
    states, _ = model.model.decoder(ids())
    assert distance(logits(model, ids()), model.model.decoder.vocabulary.logits(states)) == 0


@pytest.mark.slow
def test_auto_classes_know_the_models_after_an_explicit_import(tmp_path: Path) -> None:
    config_of("family").save_pretrained(tmp_path)
    program = f"""
import sys
import lswt_core
assert not {{"torch", "transformers"}} & set(sys.modules)
import lswt_core.cli.load_model
assert "transformers" not in sys.modules, "generate on a run does not need transformers"
from transformers import AutoConfig
import lswt_core.hf
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__module__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "lswt_core.hf.configuration", done.stderr


def test_lswt_core_exports_what_it_names() -> None:
    for name in lswt_core.__all__:
        assert getattr(lswt_core, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Registri'"):
        lswt_core.Registri  # noqa: B018


def test_the_config_describes_the_model() -> None:
    config = config_of("family")
    assert (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    ) == (61, 32, 2, 2)
    assert config.memory_length == 64 and config.attention == "auto"
    assert config.recipe["ffn"] == {"use": "swiglu", "bias": True}, "every default is written out"
    component = config.components["positional/rope"]
    assert component["distribution"] == "lswt-core"
    assert component["version"] == lswt_core.__version__
    assert len(component["sha256"]) == 64


# ---------- saving, loading


@every_mix
def test_saving_and_loading_keeps_the_model(mix: str, tmp_path: Path) -> None:
    model = model_of(mix, torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LswtForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.recipe == model.config.recipe
    assert loaded.config.components == model.config.components
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert logits(loaded, ids()).equal(logits(model, ids()))
    backbone = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert backbone(ids()).last_hidden_state.equal(model.model(ids()).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_loads_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("frozen", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert not loaded.get_input_embeddings().weight.requires_grad
    assert distance(logits(loaded, ids()).double(), logits(model.to(dtype), ids()).double()) == 0


def test_large_models_are_saved_in_shards(tmp_path: Path) -> None:
    model = model_of("family", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids()).equal(logits(model, ids()))


def test_memory_length_and_attention_can_be_overridden(tmp_path: Path) -> None:
    model_of("family", torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, memory_length=7, attention="eager")
    assert loaded.model.decoder.memory_length == 7
    assert loaded.model.decoder.blocks[0].attention.backend.name == "eager"
    with pytest.raises(RecipeError, match="length"):
        AutoModelForCausalLM.from_pretrained(tmp_path, memory_length=0)
    model_of("no-memory", torch.float32).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="memories"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "none", memory_length=7)


@pytest.mark.parametrize("use", ["rope-pi", "rope-ntk", "rope-yarn"])
def test_rotary_positions_can_be_rescaled_for_longer_texts(use: str, tmp_path: Path) -> None:
    model, by_factor = model_of("reference-reversed", torch.float32), {}
    model.save_pretrained(tmp_path)
    for factor in (1.0, 4.0):
        config = AutoConfig.from_pretrained(tmp_path, memory_length=256)
        config.recipe["positional"] |= {"use": use, "factor": factor}
        stretched = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        assert (stretched.model.decoder.positional.name, stretched.model.decoder.memory_length) == (
            use,
            256,
        )
        by_factor[factor] = logits(stretched, ids())
    assert (
        by_factor[1.0].equal(logits(model, ids()))
        and distance(by_factor[4.0], by_factor[1.0]) > 1e-3
    )


def test_embeddings_can_be_resized() -> None:
    model = model_of("family", torch.float32)
    before = logits(model, ids())
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == model.config.recipe["embedding"]["vocab_size"] == 70
    after = logits(model, ids())
    assert after.shape[-1] == 70 and after[..., :61].equal(before)


def test_only_missing_weights_are_initialised(tmp_path: Path) -> None:
    model = model_of("family", torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = [name for name in weights if name.endswith((".query.bias", ".registers.keys"))]
    save_file(
        {name: tensor for name, tensor in weights.items() if name not in gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(gone)
    for name, tensor in loaded.state_dict().items():
        assert name in gone or tensor.equal(weights[name]), name
    drawn = loaded.state_dict()[next(name for name in gone if name.endswith("keys"))]
    assert 0.1 < float(drawn.std()) < 0.6, "N(0, 1/D), D = 16"


def test_a_new_model_is_initialised_as_in_training() -> None:
    model = LswtForCausalLM(config_of("family"))
    block = model.model.decoder.blocks[0]
    assert float(block.ffn.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not block.ffn.fc1.bias.any()
    assert block.ffn_norm.norm.weight.eq(1).all()
    assert float(block.attention.memory["registers"].keys.detach().std()) == pytest.approx(
        0.25, rel=0.3
    )


# ---------- components


def test_a_component_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    config = config_of("family")
    config.components["positional/spiral"] = {
        "distribution": "lswt-spiral",
        "version": "1.2",
        "sha256": "0",
    }
    with pytest.raises(
        PluginError,
        match=(
            r"positional/spiral of lswt-spiral 1\.2\n  fix: python -m pip install"
            r' "lswt-spiral==1\.2"'
        ),
    ):
        LswtForCausalLM(config)


def test_a_changed_source_of_a_component_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("family")
    config.components["ffn/swiglu"] |= {"version": "0.0.9", "sha256": "0"}
    with caplog.at_level(logging.WARNING):
        LswtForCausalLM(config)
    (record,) = caplog.records
    for part in ("ffn/swiglu", "0.0.9", lswt_core.__version__):
        assert part in record.getMessage()


def test_options_of_a_config_are_validated() -> None:
    config = config_of("family")
    config.recipe["positional"]["bass"] = 3
    with pytest.raises(RecipeError, match=r"positional\.bass"):
        LswtForCausalLM(config)


STRANGER = '''
"""A third-party positional encoding, with a buffer that is not saved."""
import torch
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import PositionalEncoding

class Waves(PositionalEncoding):
    """Scale by a wave of the distance to the next token."""
    name = "waves"
    def __init__(self, dims, *, amplitude: float = 0.1) -> None:
        super().__init__(dims)
        self.amplitude = amplitude
        self.register_buffer("phases", torch.empty(dims.d_head), persistent=False)
    def reset_parameters(self) -> None:
        self.phases.copy_(torch.linspace(0, 1, len(self.phases)))
    def rotate(self, x, at):
        return x * (1 + self.amplitude * torch.sin(at[:, None, None] + self.phases)).to(x.dtype)

@hookimpl
def lswt_components() -> list[type]:
    return [Waves]
'''


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed third-party distribution."""
    facts = tmp_path / "site" / "lswt_waves-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: lswt-waves\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[lswt]\nwaves = lswt_waves\n")
    (tmp_path / "site" / "lswt_waves.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_third_party_component_is_exported(stranger: None, tmp_path: Path) -> None:
    recipe = Recipe.from_dict(NANO | {"positional": {"use": "waves", "amplitude": 0.3}})
    model = LswtForCausalLM(
        LswtConfig(recipe=model_tables(recipe), components=describe_components(recipe))
    ).eval()
    initialise(model.model.decoder, seed=3, std=0.4)
    assert not save_model(model, tmp_path / "saved"), "its code stays with its package"
    assert not list(tmp_path.joinpath("saved").glob("*.py"))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "saved"), "auto_map")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.components["positional/waves"]["distribution"] == "lswt-waves"
    buffers = dict(loaded.named_buffers())
    assert buffers and all(tensor.equal(buffers[name]) for name, tensor in model.named_buffers())
    assert logits(loaded, ids()).equal(logits(model, ids()))


WITHOUT_US = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("lswt_"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
for name in sys.argv[2:]:
    path = f"{sys.argv[1]}/{name}"
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("code was run without being trusted")
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    ids = load_file(f"{path}/ids.safetensors")["ids"]
    with torch.no_grad():
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        text = model.generate(ids, max_new_tokens=5, **options)
        found = {"logits": model(ids).logits, "text": text}
        if name == "family":  # the model classes, which all mixes share
            backbone = AutoModel.from_pretrained(path, trust_remote_code=True)
            found["states"] = backbone(ids).last_hidden_state
            again = f"{path}-again"
            model.save_pretrained(again)
            reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
            found["again"] = reloaded(ids).logits
    save_file(found, f"{path}/found.safetensors")
assert not [name for name in sys.modules if name.startswith("lswt_")]
"""


@pytest.mark.slow
def test_models_of_our_own_components_load_without_this_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    models: dict[str, LswtForCausalLM] = {}
    for mix in MIXES:
        models[mix] = model_of(mix, torch.float32)
        assert save_model(models[mix], tmp_path / mix)
        save_file({"ids": ids()}, tmp_path / mix / "ids.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(tmp_path), *models],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    for mix, model in models.items():
        tensors = load_file(tmp_path / mix / "found.safetensors")
        assert tensors["logits"].equal(logits(model, ids())), mix
        assert tensors["text"].equal(generate(model, ids(), max_new_tokens=5))
    tensors = load_file(tmp_path / "family" / "found.safetensors")
    assert tensors["again"].equal(tensors["logits"])
    with torch.no_grad():
        assert tensors["states"].equal(models["family"].model(ids()).last_hidden_state)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        (
            "model.safetensors",
            b"\xff" * 9,
            "its weights cannot be read: .*\n  fix: export it again",
        ),
        ("model.safetensors", None, "its weights cannot be read: .*\n  fix: export it again"),
        (
            "config.json",
            b"\xff{",
            "describes no model that can be loaded here: .*\n  fix: name a run",
        ),
        ("config.json", None, "describes no model that can be loaded here: .*\n  fix: name a run"),
        ("config.json", b"{", "describes no model that can be loaded here: .*\n  fix: name a run"),
        ("config.json", b'{"model_type": "gpt2"}', "type 'gpt2', not one of .*\n  fix: name a run"),
    ],
)
def test_a_damaged_model_is_refused(
    file: str, content: bytes | None, why: str, tmp_path: Path
) -> None:
    save_model(model_of("family", torch.float32), tmp_path)
    tmp_path.joinpath("tokenizer.json").write_text("{}")
    tmp_path.joinpath(file).unlink()
    if content is not None:
        tmp_path.joinpath(file).write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        load_exported(tmp_path, Registry())


def test_bundled_code_is_not_run_if_the_library_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_model(model_of("family", torch.float32), tmp_path / "saved")
    tmp_path.joinpath("saved", "modeling_lswt.py").write_text(
        "raise AssertionError('this was run')"
    )
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is LswtForCausalLM
    assert (
        json.loads(tmp_path.joinpath("saved", "config.json").read_text())["auto_map"]["AutoModel"]
        == "modeling_lswt.LswtModel"
    )


def test_every_component_of_the_model_can_be_bundled() -> None:
    from lswt_core.hf.source_bundle import ModuleSource
    from lswt_core.recipe.layer_selectors import LAYERED

    modules = sorted(
        {
            offer.module
            for offer in Registry().offers()
            if offer.kind in LAYERED and offer.distribution == "lswt-core"
        }
    )
    owners: dict[str, str] = {}
    for module in modules:
        for name in ModuleSource(module).names:  # raises for an import under another name
            assert owners.setdefault(name, module) == module, (
                f"{name} is defined by {owners[name]} and {module}"
            )
