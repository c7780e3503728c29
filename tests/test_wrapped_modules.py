"""Adapters, hooks, quantisation, offloading: what takes a module's place is what computes."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import distance
from hf_parts import config_of, ids, logits, model_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lswt_core.hf.source_bundle import bundle_sources

LENGTHS = (1, 63, 64, 80, 500)
PROJECTIONS = ("query", "key", "value")


class Adapted(nn.Module):
    """A linear layer and a low-rank one beside it: LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(
            torch.linspace(-0.1, 0.2, 2 * base.in_features, dtype=base.weight.dtype)
            .view(2, -1)
            .sin()
        )
        self.b = nn.Parameter(torch.full((base.out_features, 2), 0.2, dtype=base.weight.dtype))

    @property
    def weight(self) -> Tensor:
        """What PEFT's layers show, too: the weight without the adapter."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Eighth(nn.Linear):
    """Weights in whole numbers of an eighth, as int8."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = nn.Parameter(
            (base.weight.detach() * 8).round().to(torch.int8), requires_grad=False
        )
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            x, self.weight.to(x.dtype) / 8, None if self.bias is None else self.bias.to(x.dtype)
        )


class Quarters(Tensor):
    """A weight of whole quarters that says it is of floating point. It can be multiplied by, no
    more.
    """

    @staticmethod
    def __new__(cls, weight: Tensor) -> Quarters:
        return weight.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.cat:
            raise NotImplementedError("aten.cat")
        plain = [one.as_subclass(Tensor) if isinstance(one, Quarters) else one for one in args]
        if function is nn.functional.linear:
            plain[1] = (plain[1] * 4).round() / 4
            return function(*plain, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def adapt(layer: nn.Linear) -> nn.Module:
    return Adapted(layer)


def hook(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, given, found: found * 1.5)
    return layer


def hook_before(layer: nn.Linear) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, given: (given[0] * 1.5,))
    return layer


def replace_forward(layer: nn.Linear) -> nn.Module:
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 1.5  # type: ignore[method-assign]
    return layer


def quantise(layer: nn.Linear) -> nn.Module:
    return Eighth(layer)


def exchange_weight(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(Quarters(layer.weight), requires_grad=False)
    return layer


@torch.no_grad()
def scale(layer: nn.Linear, *, bias: bool) -> None:
    layer.weight *= 1.5
    if bias:
        layer.bias *= 1.5


@torch.no_grad()
def rounded_to(layer: nn.Linear, share: int) -> None:
    layer.weight.copy_((layer.weight * share).round() / share)


@torch.no_grad()
def add_product(layer: nn.Linear) -> None:
    adapter = Adapted(layer)
    layer.weight += adapter.b @ adapter.a


# What takes a layer's place, and a change of its weights that does the same
WRAPPERS: dict[str, tuple[Callable[[nn.Linear], nn.Module], Callable[[nn.Linear], Any]]] = {
    "adapter": (adapt, add_product),
    "hook": (hook, lambda layer: scale(layer, bias=True)),
    "pre-hook": (hook_before, lambda layer: scale(layer, bias=False)),
    "forward": (replace_forward, lambda layer: scale(layer, bias=True)),
    "int8": (quantise, lambda layer: rounded_to(layer, 8)),
    "tensor": (exchange_weight, lambda layer: rounded_to(layer, 4)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The code that goes beside the weights of an exported model, imported by itself."""
    package = tmp_path_factory.mktemp("code") / "exported_lswt"
    package.mkdir()
    for name, text in {"__init__.py": "", **(bundle_sources(config_of("family")) or {})}.items():
        package.joinpath(name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        yield importlib.import_module("exported_lswt.modeling_lswt")
    for name in [name for name in sys.modules if name.startswith("exported_lswt")]:
        del sys.modules[name]


def models(code: str, exported: Any) -> tuple[Any, Any]:
    """A model and its double."""
    if code == "library":
        model: Any = model_of("family")
    else:
        model = (
            exported.LswtForCausalLM(exported.LswtConfig(recipe=config_of("family").recipe))
            .double()
            .eval()
        )
        model.load_state_dict(model_of("family").state_dict())
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("code", ["library", "exported"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_takes_the_place_of_a_projection_computes(
    wrapper: str, code: str, exported: Any
) -> None:
    model, expected = models(code, exported)
    wrap, merge = WRAPPERS[wrapper]
    for block, other in zip(model.model.decoder.blocks, expected.model.decoder.blocks, strict=True):
        for name in PROJECTIONS:
            setattr(block.attention, name, wrap(getattr(block.attention, name)))
            merge(getattr(other.attention, name))
    for length in LENGTHS:
        assert distance(logits(model, ids(1, length)), logits(expected, ids(1, length))) < 1e-11, (
            length
        )


@pytest.mark.parametrize("targets", [("query", "value"), PROJECTIONS])
def test_every_adapter_learns(targets: tuple[str, ...]) -> None:
    model = model_of("family", torch.float32)
    for block in model.model.decoder.blocks:
        for name in targets:
            setattr(block.attention, name, Adapted(getattr(block.attention, name)))
    model(ids(3, 40), labels=ids(3, 40)).loss.backward()
    assert all(
        module.b.grad is not None and module.b.grad.any()
        for module in model.modules()
        if isinstance(module, Adapted)
    )


class Products(TorchDispatchMode):
    """Counts products with weights."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wrapper", [None, "hook", "pre-hook", "forward"])
def test_plain_projections_are_one_product(wrapper: str | None) -> None:
    model, counts = model_of("family", torch.float32), []
    for wrap in (lambda layer: layer, WRAPPERS[wrapper][0] if wrapper else lambda layer: layer):
        wrap(model.model.decoder.blocks[0].attention.key)
        with Products() as products:
            logits(model, ids(1, 64))
        counts.append(products.count)
    assert counts[1] - counts[0] == (2 if wrapper else 0)


# ---------- the table


class AdaptedTable(nn.Module):
    """A table and a low-rank one beside it."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(
            torch.linspace(0, 9, 2 * base.num_embeddings, dtype=base.weight.dtype).view(-1, 2).sin()
        )
        self.b = nn.Parameter(
            torch.linspace(-1, 1, 2 * base.embedding_dim, dtype=base.weight.dtype).view(2, -1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + self.a[ids] @ self.b


class EighthTable(nn.Embedding):
    """Rows in whole numbers of an eighth, as int8."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = nn.Parameter(
            (base.weight.detach() * 8).round().to(torch.int8), requires_grad=False
        )
        self.dtype = base.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].to(self.dtype) / 8


def keep_away(module: nn.Module) -> None:
    """Hold a module's parameters elsewhere except while it is called, as accelerate does."""
    own, call = dict(module._parameters), module.forward
    away = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for name, p in own.items()
    }

    def forward(*args: Any, **kwargs: Any) -> Any:
        module._parameters.update(own)
        try:
            return call(*args, **kwargs)
        finally:
            module._parameters.update(away)

    module._parameters.update(away)
    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("mix", ["family", "frozen", "t5", "other-layers"])
def test_weights_that_are_elsewhere_until_a_module_is_called(mix: str) -> None:
    model = model_of(mix, torch.float32)
    expected = [logits(model, ids(1, length)) for length in (1, 80)]
    for module in model.modules():
        if module._parameters:
            keep_away(module)
    assert [
        logits(model, ids(1, length)).equal(one)
        for length, one in zip((1, 80), expected, strict=True)
    ] == [True, True]


@torch.no_grad()
def merge_table(table: nn.Embedding) -> None:
    adapter = AdaptedTable(table)
    table.weight += adapter.a @ adapter.b


TABLES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], Any]]] = {
    "adapter": (AdaptedTable, merge_table),
    "int8": (EighthTable, lambda table: rounded_to(table, 8)),
}


@pytest.mark.parametrize("code", ["library", "exported"])
@pytest.mark.parametrize("wrapper", TABLES)
def test_what_takes_the_place_of_the_table_serves_both_ends(
    wrapper: str, code: str, exported: Any
) -> None:
    model, expected = models(code, exported)
    wrap, merge = TABLES[wrapper]
    vocabulary, other = model.model.decoder.vocabulary, expected.model.decoder.vocabulary
    vocabulary.table = wrap(vocabulary.table)
    merge(other.table)
    assert distance(logits(model, ids()), logits(expected, ids())) < 1e-11
    states, _ = expected.model.decoder(ids())
    actual, total = (one.score(states, ids()).total for one in (vocabulary, other))
    assert distance(actual, total) < 1e-10


def test_an_adapter_of_the_table_learns_from_both_ends() -> None:
    vocabulary = model_of("family").model.decoder.vocabulary
    vocabulary.table = AdaptedTable(vocabulary.table)
    with torch.no_grad():
        states = torch.ones(1, 4, 32, dtype=torch.float64)
    vocabulary.score(states, ids(1, 4)).total.backward()
    assert vocabulary.table.a.grad.any(1).all(), "every row was predicted or might have been"


def test_a_hook_after_the_table_is_about_embedded_tokens() -> None:
    model, calls = model_of("family"), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, found: calls.append(found.shape)
    )
    logits(model, ids())
    assert calls == [(3, 12, 24)]


class Packed(nn.Module):
    """A layer whose weights are nowhere to be seen."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.packed = base.weight.detach().T

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed


class Narrow(Eighth):
    """Weights in a floating-point format that nothing is computed in."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.weight = nn.Parameter(
            (base.weight.detach() * 8).round().clamp(-16, 16).to(torch.float8_e4m3fn),
            requires_grad=False,
        )


@pytest.mark.parametrize(
    ("wrap", "merge"),
    [(Eighth, True), (Narrow, True), (Packed, False)],
    ids=["int8", "float8", "packed"],
)
def test_embeddings_are_never_rounded_to_what_weights_are_stored_in(
    wrap: Callable[[Any], nn.Module], merge: bool
) -> None:
    model = model_of("family")
    expected = copy.deepcopy(model)
    for name in ("input", "output"):
        vocabulary, other = (one.model.decoder.vocabulary for one in (model, expected))
        setattr(vocabulary, name, wrap(getattr(vocabulary, name)))
        if merge:
            rounded_to(getattr(other, name), 8)
    assert distance(logits(model, ids()), logits(expected, ids())) < 1e-11
