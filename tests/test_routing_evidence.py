"""Routing of models of our own: weights that are wrapped, tied by hand, bare, or of a shape that misleads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import muon_dist
from muon_dist.routing import Override, Route, route

D, WORDS, PADDED, LENGTH = 32, 250, 256, 32
MUON, ADAMW = "muon", "adamw"


def routes_of(model: nn.Module, *overrides: Override) -> dict[str, Route]:
    return {r.fqn.removesuffix(".weight"): r for r in route(model, overrides).routes}


def check(model: nn.Module, **expected: tuple[str, str]) -> dict[str, Route]:
    """Every parameter with two axes or more is listed in `expected` (dots written as __) with algorithm and role."""
    found = routes_of(model)
    plain = {n: (r.algorithm, r.role) for n, r in found.items() if len(r.shape) > 1}
    assert plain == {name.replace("__", "."): value for name, value in expected.items()}
    return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


BLOCK = {"block__up": (MUON, "matrix"), "block__down": (MUON, "matrix")}


# Heads --------------------------------------------------------------------------------------------------------------


class PaddedVocabulary(nn.Module):
    """The head has more rows than the table, and nothing offers it. One table is as square as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, D), nn.Embedding(LENGTH, D)
        self.block, self.mix = Block(), nn.Linear(D, D, bias=False)
        self.out = nn.Linear(D, PADDED, bias=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        logits = self.out(self.mix(self.block(x)))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_head_of_a_padded_vocabulary() -> None:
    found = check(
        PaddedVocabulary(), words=(ADAMW, "table"), places=(ADAMW, "table"), mix=(MUON, "matrix"), out=(ADAMW, "head"),
        **BLOCK,
    )  # fmt: skip
    assert not any(r.doubt for r in found.values())


class Classifier(nn.Module):
    """As many classes as features: the shape says nothing, the loss does."""

    def __init__(self, bare_loss: bool) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(WORDS, D), Block()
        self.cls = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(0.1), nn.Linear(D, D))
        self.loss = nn.CrossEntropyLoss()
        self.bare_loss = bare_loss

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        return self.cls(self.block(self.words(ids)).mean(1))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.score(ids)
        return {"loss": self.loss(scores, targets), "answer": scores}


def test_a_classifier_is_a_head_and_the_layer_before_it_is_not() -> None:
    check(
        Classifier(True), words=(ADAMW, "table"), cls__0=(MUON, "matrix"), cls__3=(ADAMW, "head"), **BLOCK
    )  # fmt: skip


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.project = nn.Embedding(WORDS, D), Block(), nn.Linear(D, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.project(self.block(self.words(ids)))


def test_a_final_projection_without_evidence_is_a_doubt_that_an_override_settles() -> None:
    found = check(Features(), words=(ADAMW, "table"), project=(MUON, "matrix"), **BLOCK)
    assert [n for n, r in found.items() if r.doubt] == ["project"]
    table = muon_dist.routing_table(Features())
    assert table.rows[0].pattern == "project.weight" and table.doubts == table.rows[:1]
    assert "write overrides=[Override(r'project', 'adamw')]" in table.rows[0].doubt
    for algorithm in (MUON, ADAMW):
        settled = routes_of(Features(), Override("project", algorithm))["project"]
        assert settled.algorithm == algorithm and not settled.doubt


def test_wrappers_of_the_whole_model_change_nothing() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    expected = {n: (r.algorithm, r.role, r.reason) for n, r in routes_of(PaddedVocabulary()).items()}
    for wrapper, prefix in ((Wrapper, "inner."), (torch.compile, "_orig_mod."), (nn.DataParallel, "module.")):
        found = routes_of(wrapper(PaddedVocabulary()))  # type: ignore[operator]
        assert {n.removeprefix(prefix): (r.algorithm, r.role, r.reason) for n, r in found.items()} == expected


class Checkpointed(PaddedVocabulary):
    """The body under gradient checkpointing, the head inside a list, the loss inside a method."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})

    def loss_of(self, x: torch.Tensor, targets: torch.Tensor, task: str) -> torch.Tensor:
        return F.cross_entropy(self.heads[task](x), targets)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, task: str = "a") -> Any:
        x = torch.utils.checkpoint.checkpoint(self.block, self.words(ids), use_reentrant=False)
        return self.loss_of(self.mix(x), targets, task) + F.cross_entropy(self.out(x), targets)


def test_heads_behind_methods_dictionaries_and_checkpointing() -> None:
    check(
        Checkpointed(), words=(ADAMW, "table"), places=(ADAMW, "table"), mix=(MUON, "matrix"), out=(ADAMW, "head"),
        heads__a=(ADAMW, "head"), heads__b=(ADAMW, "head"), **BLOCK,
    )  # fmt: skip


# Tables and ties ----------------------------------------------------------------------------------------------------


class BareTables(nn.Module):
    """Tables and weights that are bare parameters; the head is the transposed table."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.zeros(WORDS, D))
        self.places = nn.Parameter(torch.zeros(LENGTH, D))
        self.bias_of_distance = nn.Parameter(torch.zeros(2 * LENGTH, 4))
        self.right = nn.Parameter(torch.zeros(D, 2 * D))  # (in, out)
        self.left = nn.Parameter(torch.zeros(D, 2 * D))  # (out, in)
        self.prompt = nn.Parameter(torch.zeros(5, D))
        self.decay = nn.Parameter(torch.zeros(D, 8))
        self.register_buffer("distance", torch.zeros(LENGTH, LENGTH, dtype=torch.long))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words[ids] + self.places[: ids.shape[1]]
        x = torch.cat([self.prompt.expand(len(ids), -1, -1), x], dim=1)
        scores = x @ x.transpose(1, 2) + self.bias_of_distance[self.distance].sum(-1)
        x = F.linear(F.relu(scores.softmax(-1) @ x @ self.right), self.left.to(x.dtype))
        x = x * torch.exp(-torch.exp(self.decay)).sum(-1)
        return x @ self.words.t()


def test_bare_parameters_are_what_the_forward_does_with_them() -> None:
    found = check(
        BareTables(), words=(ADAMW, "table"), places=(ADAMW, "state"), bias_of_distance=(ADAMW, "table"),
        right=(MUON, "matrix"), left=(MUON, "matrix"), prompt=(ADAMW, "state"), decay=(ADAMW, "state"),
    )  # fmt: skip
    assert found["right"].transposed and not found["left"].transposed
    assert {n for n, r in found.items() if not r.decay} == {"places", "bias_of_distance", "prompt", "decay"}
    assert not any(r.doubt for r in found.values())


class TiedByHand(nn.Module):
    """The head is the embedding's weight; a Linear happens to have the shape of the table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, D), nn.Embedding(D, D)
        self.mix = nn.Linear(D, D, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return F.linear(x, self.words.weight)


def test_a_head_that_is_the_table_and_a_coincidence_of_shape() -> None:
    found = check(TiedByHand(), words=(ADAMW, "table"), places=(ADAMW, "table"), mix=(MUON, "matrix"))
    assert not any(r.doubt for r in found.values())


def test_two_parameters_with_one_memory_share_their_role_and_a_doubt() -> None:
    model = PaddedVocabulary()
    model.out = nn.Linear(D, WORDS, bias=False)
    model.out.weight.data = model.words.weight.data
    found = routes_of(model)
    for name, other in (("words", "out.weight"), ("out", "words.weight")):
        assert (found[name].algorithm, found[name].role) == (ADAMW, "table")
        assert other in found[name].doubt and "tie the Parameter" in found[name].doubt
    model.out.weight = model.words.weight
    tied = routes_of(model)
    assert tied["words"].aliases == ("out.weight",) and not tied["words"].doubt


# Wrapped weights ----------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (weight_norm, "parametrizations.weight.original1"),
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
        (parametrizations.orthogonal, "parametrizations.weight.original"),
        (
            lambda m: parametrize.register_parametrization(m, "weight", Halved()) and m,
            "parametrizations.weight.original",
        ),
        (nn.utils.weight_norm, "weight_v"),
        (nn.utils.spectral_norm, "weight_orig"),
        (lambda m: prune.identity(m, "weight"), "weight_orig"),
    ],
)
def test_a_wrapped_weight_is_what_it_was(wrap: Any, where: str) -> None:
    model = PaddedVocabulary()
    plain = {n: (r.algorithm, r.role) for n, r in routes_of(model).items()}
    for module in (model.block.up, model.mix, model.out):
        wrap(module)
    found = routes_of(model)
    for name in ("block.up", "mix", "out"):
        route_of = found[f"{name}.{where}"]
        assert (route_of.algorithm, route_of.role) == plain[name], name
    gains = [r for n, r in found.items() if n.endswith(("weight_g", "original0"))]
    assert all(r.algorithm == ADAMW for r in gains)


def test_a_wrapped_table_is_a_table() -> None:
    model = PaddedVocabulary()
    parametrize.register_parametrization(model.words, "weight", Halved())
    nn.utils.spectral_norm(model.places)
    found = routes_of(model)
    assert found["words.parametrizations.weight.original"].role == found["places.weight_orig"].role == "table"


class OwnLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(outputs, inputs))
        self.gain = nn.Parameter(torch.ones(outputs, 2))

    @property
    def quantized(self) -> torch.Tensor:
        return torch.round(self.w * 8).clamp(-8, 8) / 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.quantized) * self.gain.prod(-1)


class SubclassOfLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def test_linear_layers_of_ones_own() -> None:
    class Model(PaddedVocabulary):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Sequential(OwnLinear(D, D), SubclassOfLinear(D, D))  # type: ignore[assignment]
            self.out = OwnLinear(D, PADDED)  # type: ignore[assignment]

    check(
        Model(), words=(ADAMW, "table"), places=(ADAMW, "table"), mix__0__w=(MUON, "matrix"),
        mix__0__gain=(ADAMW, "state"), mix__1=(MUON, "matrix"), out__w=(ADAMW, "head"), out__gain=(ADAMW, "state"),
        **BLOCK,
    )  # fmt: skip


# Adapters -----------------------------------------------------------------------------------------------------------


class LoraOfBareFactors(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.zeros(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T * 2.0


class LoraOfLinears(nn.Module):
    """As PEFT keeps it: dictionaries of Linear, one entry for each adapter."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        self.active = ["default"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        for name in self.active:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            result = result + lora_B(lora_A(self.dropout[name](x))) * 2.0
        return result


class LoraAsParametrization(nn.Module):
    def __init__(self, outputs: int, inputs: int, rank: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


class RowsOfAnEmbedding(nn.Module):
    """As PEFT's trainable tokens: some rows are trained, and written over those of a frozen table."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.delta = nn.ParameterDict({"default": nn.Parameter(torch.zeros(7, base.embedding_dim))})
        self.register_buffer("index", torch.arange(7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.base_layer.weight.index_copy(dim=0, index=self.index, source=self.delta["default"])
        return F.embedding(ids, weight)


class LoraOfAnEmbedding(nn.Module):
    def __init__(self, base: nn.Embedding, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(rank, base.num_embeddings))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.zeros(base.embedding_dim, rank))})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        after = F.embedding(ids, self.lora_embedding_A["default"].T)
        return self.base_layer(ids) + after @ self.lora_embedding_B["default"].T


def test_adapters() -> None:
    model = PaddedVocabulary()
    model.block.up = LoraOfBareFactors(model.block.up)  # type: ignore[assignment]
    model.block.down = LoraOfLinears(model.block.down)  # type: ignore[assignment]
    parametrize.register_parametrization(model.mix, "weight", LoraAsParametrization(D, D))
    model.words = RowsOfAnEmbedding(model.words)  # type: ignore[assignment]
    model.places = LoraOfAnEmbedding(model.places)  # type: ignore[assignment]
    found = {n: (r.algorithm, r.role) for n, r in routes_of(model).items() if not r.frozen and len(r.shape) > 1}
    assert found == {
        "block.up.a": (MUON, "adapter"),
        "block.up.b": (MUON, "adapter"),
        "block.down.lora_A.default": (MUON, "adapter"),
        "block.down.lora_B.default": (MUON, "adapter"),
        "mix.parametrizations.weight.original": (MUON, "matrix"),
        "mix.parametrizations.weight.0.a": (ADAMW, "adapter"),  # it multiplies a weight, not an input
        "mix.parametrizations.weight.0.b": (ADAMW, "adapter"),
        "words.delta.default": (ADAMW, "state"),
        "places.lora_embedding_A.default": (ADAMW, "table"),
        "places.lora_embedding_B.default": (MUON, "adapter"),
        "out": (ADAMW, "head"),
    }
    assert not routes_of(model)["words.delta.default"].decay


# Experts and other products -----------------------------------------------------------------------------------------


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.first = nn.Parameter(torch.zeros(4, D, 2 * D))  # (experts, in, out)
        self.second = nn.Parameter(torch.zeros(4, D, 2 * D))  # (experts, out, in)
        self.bias = nn.Parameter(torch.zeros(4, 2 * D))
        self.heads = nn.Parameter(torch.zeros(D, 4, 8))  # one matrix (in, heads * size)
        self.slots = nn.Parameter(torch.zeros(3, 5, D))
        self.attention = nn.MultiheadAttention(D, 4, kdim=D // 2, vdim=D)
        self.memory = nn.LSTM(D, D, proj_size=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, _ = self.gate(x).softmax(-1).topk(2)
        h = torch.einsum("ebd,edf->ebf", x, self.first) + self.bias[:, None]
        h = torch.stack([F.linear(part, self.second[i]) for i, part in enumerate(h)])
        q = torch.einsum("bsd,dhk->bshk", h, self.heads)
        h, _ = self.attention(h + self.slots[0], h, h)
        h, _ = self.memory(h)
        return h.sum() + q.sum() + weight.sum()


def test_experts_and_other_products() -> None:
    found = check(
        Products(), gate=(MUON, "router"), first=(MUON, "experts"), second=(MUON, "experts"), bias=(ADAMW, "vector"),
        heads=(ADAMW, "state"), slots=(ADAMW, "state"), attention__q_proj_weight=(MUON, "matrix"),
        attention__k_proj_weight=(MUON, "matrix"), attention__v_proj_weight=(MUON, "matrix"),
        attention__out_proj=(MUON, "matrix"), memory__weight_ih_l0=(MUON, "matrix"),
        memory__weight_hh_l0=(MUON, "matrix"), memory__weight_hr_l0=(MUON, "matrix"),
    )  # fmt: skip
    assert found["first"].transposed and not found["second"].transposed


def test_without_source_a_bare_weight_is_a_doubt() -> None:
    names: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(  # a class whose source nobody can read
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.zeros(6, 6))\n"
        "        self.linear = nn.Linear(6, 6)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x @ self.w)\n",
        names,
    )
    found = check(names["Hidden"](), w=(ADAMW, "unknown"), linear=(MUON, "matrix"))
    assert "no evidence that it multiplies an input" in found["w"].doubt


def test_an_operation_that_cannot_be_read_is_a_doubt_by_name() -> None:
    class Model(PaddedVocabulary):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(D, D))

        def forward(self, ids: torch.Tensor, targets: Any = None) -> Any:
            return self.out(torch.ops.somewhere.fused_scan(self.words(ids), self.w))

    w = routes_of(Model())["w"]
    assert (w.algorithm, w.role) == (ADAMW, "unknown") and "passed to fused_scan" in w.reason and w.doubt


def test_an_operation_of_torch_that_a_framework_replaced_is_still_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO stage 3 puts a Python function in the place of `F.linear`."""
    real = F.linear

    def replaced(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        y = real(x, weight)
        y += torch.zeros(1) * weight.sum()
        return y

    expected = [(r.fqn, r.algorithm, r.role) for r in route(BareTables()).routes]
    monkeypatch.setattr(F, "linear", replaced)
    assert [(r.fqn, r.algorithm, r.role) for r in route(BareTables()).routes] == expected


# The table for people -----------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, D)
        self.layers = nn.ModuleList([Block() for _ in range(12)])
        self.layers[7].up = nn.Linear(D, 3 * D)
        self.layers[7].down = nn.Linear(3 * D, D)
        self.last = nn.Linear(D, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def test_the_table_is_folded_exactly_with_doubts_first() -> None:
    table = muon_dist.routing_table(Deep())
    rows = {r.pattern: r for r in table}
    assert table.rows[0].pattern == "last.weight" and table.rows[0].doubt
    assert rows["layers.{0-6,8-11}.up.weight"].shape == (2 * D, D)
    assert rows["layers.{0-6,8-11}.up.weight"].count == 11 and rows["layers.7.up.weight"].count == 1
    assert sum(r.count for r in table) == len(list(Deep().parameters()))
    assert rows["layers.{0-11}.norm.weight"].role == "norm"
    text = str(table).splitlines()
    assert text[1].split()[0] == "last.weight" and text[2].startswith("  DOUBT: its output leaves the model")
    assert text[-1].startswith("adamw: ")


def test_folding_over_two_numbers_names_no_parameter_too_many() -> None:
    class Experts(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 6) for _ in range(count)])

    model = nn.ModuleDict({"layers": nn.ModuleList([Experts(3), Experts(3), Experts(2)])})
    weights = {r.pattern: r.count for r in muon_dist.routing_table(model) if len(r.shape) == 2}
    assert weights == {"layers.{0-1}.experts.{0-2}.weight": 6, "layers.2.experts.{0-1}.weight": 2}


def test_an_own_loop_prints_the_table_once_and_warns_of_doubts(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(Features):
        def __init__(self) -> None:
            super().__init__()
            self.printed_once = nn.Linear(D, D)

    with pytest.warns(RuntimeWarning, match=r"project\.weight: its output leaves the model.*Override\(r'project'"):
        groups = muon_dist.param_groups(Mine(), lr=0.01)
    printed = capsys.readouterr().out
    assert "DOUBT" in printed and "printed_once.weight" in printed
    muon_dist.Muon(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        muon_dist.param_groups(Mine(), lr=0.01)
        muon_dist.param_groups(Mine(), lr=0.01, table=route(Mine()))
    assert capsys.readouterr().out == ""


def test_peft_where_it_is_installed() -> None:
    """The real layers of PEFT: adapters, a head that is trained whole, rows of a tied embedding."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    def config(**changes: Any) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=96, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **changes
        )

    def trained(model: nn.Module, **options: Any) -> dict[str, tuple[str, str]]:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
        rows = [r for r in muon_dist.routing_table(adapted) if not r.frozen]
        return {r.pattern.rpartition("model.")[2]: (r.algorithm, r.role) for r in rows}

    factors = {f"layers.{{0-1}}.self_attn.q_proj.lora_{x}.default.weight": (MUON, "adapter") for x in "AB"}
    classifier = LlamaForSequenceClassification(config(num_labels=3))
    assert trained(classifier, task_type="SEQ_CLS") == {
        **factors,
        "score.modules_to_save.default.weight": (ADAMW, "head"),
    }
    tied = LlamaForCausalLM(config(tie_word_embeddings=True))
    assert trained(tied, trainable_token_indices=[1, 2]) == {
        **factors,
        "embed_tokens.token_adapter.trainable_tokens_delta.default": (ADAMW, "state"),
    }
