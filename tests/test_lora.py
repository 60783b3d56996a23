"""LoRA adapters: which are read and refused; merged ones act as those that are applied beside."""

import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

import checkpoints
import msgspec
import pytest
import torch
import torch.nn.functional as F
from bundles import bundle_config
from checkpoints import RECORDED
from click.testing import CliRunner
from hub_stand_in import Repository, serve, use
from safetensors.torch import save_file
from small import random_edits, random_var
from torch import Tensor, nn

from varedit_export.cli import main
from varedit_export.describe import described
from varedit_export.manifest_model import manifest_of, sources_of
from varedit_export.options import BuildOptions
from varedit_export.resolve_options import plan_of
from varedit_export.sources import random_sources
from varedit_export.weights.lora import (
    Adapter,
    Merged,
    merge_loras,
    product_names,
    read_adapter,
    short_name,
)
from varedit_export.weights.names import parse
from varedit_reference.checkpoint import (
    FileLayout,
    NamedShape,
    assign,
    empty_transformer,
    own_layout,
    released_transformer,
)
from varedit_reference.transformer import VAR
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import CheckpointError, ConfigError, VareditError
from varedit_runtime.locate import embedded
from varedit_runtime.manifest import Manifest

CONFIG = bundle_config("tiny-2b")
WHOLE = checkpoints.CONFIG.transformer
RECORDED_CHUNKS = released_transformer(4, 2)
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "use_dora": False}
PRODUCTS = product_names(CONFIG.transformer)

Factors = dict[str, tuple[Tensor, Tensor]]  # A [rank, in] and B [out, rank] by the reference's name


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def random_factors(model: nn.Module, seed: int, rank: int = 2) -> Factors:
    """Draw factors for every product, as large as the weights are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.3

    return {
        name: (draw(rank, layer.in_features), draw(layer.out_features, rank))
        for name, layer in linears(model).items()
    }


FACTORS = random_factors(empty_transformer(CONFIG.transformer), seed=1)


def released(layout: FileLayout) -> Callable[[str], str]:
    """Return what a layout calls a module of the reference."""
    return lambda name: layout(NamedShape(f"{name}.weight", (1, 1))).name.removesuffix(".weight")


def peft(
    folder: Path, factors: Factors, layout: FileLayout = own_layout, **settings: object
) -> Path:
    """Write a folder as PEFT's save_pretrained does."""
    tensors = {}
    for name, (down, up) in factors.items():
        module = f"base_model.model.{released(layout)(name)}"
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def kohya(
    file: Path, factors: Factors, layout: FileLayout = own_layout, alpha: object = 6.0
) -> Path:
    """Write a file as kohya's scripts do."""
    tensors = {}
    for name, (down, up) in factors.items():
        module = f"lora_unet_{released(layout)(name).replace('.', '_')}"
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.as_tensor(alpha)
    save_file(tensors, file)
    return file


def of_head(file: Path, names: Sequence[str], metadata: dict[str, str] | None = None) -> Path:
    """Write a file of the head's factors under these names: down, up, and more tensors beside."""
    down, up = FACTORS["head"]
    tensors = dict(zip(names, [down, up, *(up.clone() for _ in names[2:])], strict=True))
    save_file(tensors, file, metadata)
    return file


def read(path: Path, scale: float = 1.0) -> Adapter:
    return read_adapter(path, scale, PRODUCTS)


def added(adapter: Adapter, name: str) -> Tensor:
    """Return what an adapter adds to a product's weight."""
    change = adapter.changes[f"{name}.weight"]
    return change.factor * change.up.float() @ change.down.float()


def assert_adds(adapter: Adapter, factors: Factors, factor: float) -> None:
    assert adapter.changes.keys() == {f"{name}.weight" for name in factors}
    for name, (down, up) in factors.items():
        torch.testing.assert_close(added(adapter, name), factor * up.float() @ down.float())


class Beside(nn.Module):
    """A product with adapters applied beside it: y = W x + b + s B A x."""

    def __init__(self, product: nn.Linear, changes: list[tuple[Tensor, Tensor, float]]) -> None:
        super().__init__()
        self.product, self.changes = product, changes

    def forward(self, x: Tensor, **bias: Tensor) -> Tensor:
        beside = [s * F.linear(F.linear(x, down), up) for down, up, s in self.changes]
        return self.product(x, **bias) + sum(beside)


def apply_beside(model: VAR, adapters: list[tuple[Factors, float]]) -> VAR:
    for name, layer in linears(model).items():
        parent, _, leaf = name.rpartition(".")
        changes = [(*factors[name], scale) for factors, scale in adapters]
        setattr(model.get_submodule(parent), leaf, Beside(layer, changes))
    return model


def logits(model: VAR) -> list[Tensor]:
    """Return the logits of all scales of two edits, whose bits are fixed."""
    edits = random_edits(CONFIG, (5, 3))

    def choose(scale: int, probability: Tensor) -> Tensor:
        return (torch.arange(probability.numel()) % 3 == 0).view(probability.shape)

    with torch.inference_mode():
        return [scale.logits for scale in edits.run(model, choose)]


def test_merged_is_as_applied_beside(tmp_path: Path) -> None:
    """Two adapters add."""
    model = random_var(CONFIG)
    others = random_factors(model, seed=2, rank=3)
    adapters = [
        read(peft(tmp_path / "style", FACTORS), 0.5),
        read(kohya(tmp_path / "hat.safetensors", others, alpha=None), -0.25),
    ]
    merged = assign(empty_transformer(CONFIG.transformer), Merged(model.state_dict(), adapters))
    plain = logits(model)
    beside = logits(apply_beside(model, [(FACTORS, 0.5 * 6 / 2), (others, -0.25)]))
    for ours, theirs, before in zip(logits(merged.eval()), beside, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (ours - before).abs().max() > 0.1


def test_every_product_can_be_adapted() -> None:
    names = {own.name.removesuffix(".weight") for own in PRODUCTS.values()}
    assert names == FACTORS.keys()
    inner = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    assert inner == {
        *(f"self_attention.{name}" for name in ("qkv", "projection")),
        *(f"cross_attention.{name}" for name in ("query", "kv", "projection")),
        *("mlp.0", "mlp.2"),
    }
    assert {"shared_modulation", "head_modulation", "head", "token_embedding"} < names


@pytest.mark.parametrize(
    "layout", [own_layout, released_transformer(4, None), released_transformer(4, 8)]
)
def test_modules_are_named_as_in_released_checkpoints_or_as_here(
    tmp_path: Path, layout: FileLayout
) -> None:
    assert_adds(read(peft(tmp_path / "peft", FACTORS, layout)), FACTORS, 3)
    assert_adds(read(kohya(tmp_path / "kohya.safetensors", FACTORS, layout)), FACTORS, 3)


def test_blocks_are_in_the_chunks_of_the_checkpoint(tmp_path: Path) -> None:
    """In two chunks of two, block_chunks.0.module.1 is block 1; in chunks of one, there is none."""
    model = empty_transformer(WHOLE)
    factors = {"blocks.1.mlp.0": random_factors(model, seed=3)["blocks.1.mlp.0"]}
    folder = peft(tmp_path / "peft", factors, RECORDED_CHUNKS)
    stored = ["block_chunks.0.module.0.x", "block_chunks.0.module.1.x", "block_chunks.1.module.0.x"]
    assert_adds(read_adapter(folder, 1.0, product_names(WHOLE, stored)), factors, 3)
    with pytest.raises(CheckpointError, match=r"1 unmatched \('.*block_chunks\.0\.module\.1\."):
        read_adapter(folder, 1.0, product_names(WHOLE))


def test_diffusers_names(tmp_path: Path) -> None:
    for prefix, one, two in [
        ("unet.", "lora.down", "lora.up"),
        ("transformer.", "lora_A.default", "lora_B.default"),
        ("", "lora_A", "lora_B"),
    ]:
        names = [f"{prefix}head.{factor}.weight" for factor in (one, two)]
        file = of_head(tmp_path / "x.safetensors", names)
        assert_adds(read(file), {"head": FACTORS["head"]}, 1)


def test_settings_that_diffusers_keeps_in_the_file(tmp_path: Path) -> None:
    names = [f"transformer.head.lora_{one}.weight" for one in "AB"]
    settings = {f"transformer.{name}": value for name, value in SETTINGS.items()}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    file = of_head(tmp_path / "x.safetensors", names, metadata)
    assert_adds(read(file), {"head": FACTORS["head"]}, 3)


def test_ranks_and_alphas_of_modules(tmp_path: Path) -> None:
    wide = random_factors(empty_transformer(CONFIG.transformer), seed=4, rank=4)
    factors = FACTORS | {"head": wide["head"]}
    alphas = {"^head": 8, "^mlp.0": 99, r"mlp\.0$": 10, "blocks.1.mlp.2": 12}
    folder = peft(tmp_path / "peft", factors, rank_pattern={"head": 4}, alpha_pattern=alphas)
    adapter = read(folder)
    factor = {name: adapter.changes[f"{name}.weight"].factor for name in factors}
    assert (factor["head"], factor["token_embedding"]) == (8 / 4, 6 / 2)
    assert (factor["blocks.0.mlp.0"], factor["blocks.1.mlp.0"]) == (10 / 2, 10 / 2)
    assert (factor["blocks.0.mlp.2"], factor["blocks.1.mlp.2"]) == (6 / 2, 12 / 2)


def test_the_first_of_several_patterns_counts(tmp_path: Path) -> None:
    """As in PEFT, in whatever way the names match."""
    factors = {name: FACTORS[name] for name in ("head", "blocks.0.mlp.0", "blocks.1.mlp.0")}
    alphas = {"mlp.0": 8, "blocks.0.mlp.0": 10, "^head$": 12, "head": 14, "0": 16, "lp.0": 18}
    for order, expected in [(1, (12, 8, 8)), (-1, (14, 16, 16))]:
        pattern = dict([*alphas.items()][::order])
        adapter = read(peft(tmp_path / str(order), factors, alpha_pattern=pattern))
        factor = [adapter.changes[f"{name}.weight"].factor for name in factors]
        assert factor == [alpha / 2 for alpha in expected]


def test_many_patterns_for_many_modules(tmp_path: Path) -> None:
    """A comparison of each name with each module would take minutes."""
    factors = {f"m.{i}": (torch.ones(2, 1), torch.ones(1, 2)) for i in range(4000)}
    products = {name: NamedShape(f"{name}.weight", (1, 1)) for name in factors}
    ranks, alphas = {f"{i:x}x": 3 for i in range(50_000)}, {f"{i:x}x": 5 for i in range(100_000)}
    folder = peft(tmp_path / "x", factors, rank_pattern=ranks, alpha_pattern=alphas | {"m.7": 8})
    changes = read_adapter(folder, 1.0, products).changes
    assert len(changes) == 4000
    assert (changes["m.6.weight"].factor, changes["m.7.weight"].factor) == (6 / 2, 8 / 2)


def test_settings_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = peft(tmp_path / "peft", FACTORS)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert_adds(read(folder), FACTORS, 3)


def test_factors_past_float32_are_refused(tmp_path: Path) -> None:
    """Each of alpha and scale is in range, their product is not."""
    style = peft(tmp_path / "style", FACTORS, lora_alpha=1.7e38)
    hat = kohya(tmp_path / "hat.safetensors", FACTORS, alpha=3e38)
    for path, scale in ((style, 1.7e38), (style, -1.7e38), (hat, 3e38), (hat, 3.0)):
        with pytest.raises(CheckpointError, match=r"times .*, past the range of float32: give"):
            read(path, scale)
    weight = torch.zeros(FACTORS["head"][1].shape[0], CONFIG.transformer.width)
    for path in (style, hat):
        assert Merged({"head.weight": weight}, [read(path, 1.0)])["head.weight"].any()


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_types_of_alphas(tmp_path: Path, dtype: torch.dtype) -> None:
    head = {"head": FACTORS["head"]}
    assert_adds(
        read(kohya(tmp_path / "x.safetensors", head, alpha=torch.tensor(6).to(dtype))), head, 3
    )


@pytest.mark.parametrize("part", ["alpha", "down", "up"])
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, torch.float8_e4m3fn),
        *(torch.complex64, torch.bool, torch.uint8, torch.uint64),
    ],
)
def test_other_types_are_refused(tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    down, up = FACTORS["head"]
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.ones(1)}
    name = next(name for name in tensors if part in name)
    shape = tensors[name].shape
    bytes_ = torch.ones(*shape[:-1], shape[-1] * dtype.itemsize, dtype=torch.uint8)
    tensors[name] = bytes_.view(dtype)
    save_file({f"unet.head.{n}": t for n, t in tensors.items()}, tmp_path / "x.safetensors")
    stored = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"{part} of 'unet.head' of .* is stored as {stored}"):
        read(tmp_path / "x.safetensors")


def test_numbers_of_modules_that_do_not_fit_are_not_read(tmp_path: Path) -> None:
    """Names and shapes come first: a small file can hold very many alphas."""
    bad = {f"lora_te_{i}.alpha": torch.tensor(torch.nan) for i in range(1000)}
    save_file(bad, tmp_path / "unknown.safetensors")
    with pytest.raises(CheckpointError, match="1000 unmatched"):
        read(tmp_path / "unknown.safetensors")
    wide = kohya(tmp_path / "wide.safetensors", FACTORS, alpha=[torch.nan, 1.0])
    with pytest.raises(CheckpointError, match=f"{len(FACTORS)} misshapen"):
        read(wide)


def test_rank_stabilised_adapters(tmp_path: Path) -> None:
    adapter = read(peft(tmp_path / "peft", FACTORS, use_rslora=True, fan_in_fan_out=True))
    assert_adds(adapter, FACTORS, 6 / 2**0.5)


def test_adapters_in_16_bit_types_are_merged_in_fp32(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        small = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in FACTORS.items()}
        adapter = read(kohya(tmp_path / f"{dtype}.safetensors", small, alpha=6))
        assert_adds(adapter, small, 3)
        weight = torch.ones(FACTORS["head"][1].shape[0], CONFIG.transformer.width, dtype=dtype)
        merged = Merged({"head.weight": weight}, [adapter])["head.weight"]
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged, 1 + added(adapter, "head"))


@pytest.mark.parametrize("kind", ["scale", "up", "down", "rank", "alpha"])
def test_an_adapter_that_adds_nothing_leaves_every_bit(tmp_path: Path, kind: str) -> None:
    factors = FACTORS
    if kind == "rank":
        factors = random_factors(empty_transformer(CONFIG.transformer), 1, rank=0)
    elif kind in ("down", "up"):
        down, up = (0 if kind == zeroed else 1 for zeroed in ("down", "up"))
        factors = {name: (down * a, up * b) for name, (a, b) in FACTORS.items()}
    file = kohya(tmp_path / "x.safetensors", factors, alpha=0.0 if kind == "alpha" else 6.0)
    weight = -torch.zeros(16, CONFIG.transformer.width)
    merged = Merged({"head.weight": weight}, [read(file, 0.0 if kind == "scale" else 1.0)])
    assert merged["head.weight"].signbit().all()
    assert (list(merged), len(merged)) == (["head.weight"], 1)


def test_one_weight_is_made_at_a_time(tmp_path: Path) -> None:
    asked = []

    class Asked(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    weights = Asked(random_var(CONFIG).state_dict())
    merged = Merged(weights, [read(peft(tmp_path / "style", FACTORS), 0.5)] * 2)
    assert [merged[name].dtype for name in ("head.weight", "head.bias")] == [torch.float32] * 2
    assert asked == ["head.weight", "head.bias"]


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    (down, up), wrong = FACTORS["head"], torch.zeros(3, 5)
    twelve = [(i, one) for i in range(12) for one in ("up", "down")]
    tensors = {
        **{f"lora_unet_head.lora_{one}.weight": x for one, x in (("down", down), ("up", up))},
        **{f"unet.head.lora.{one}.weight": x for one, x in (("down", down), ("up", up))},
        **{f"lora_te_encoder_{i}.lora_{one}.weight": wrong for i, one in twelve},
        **{f"blocks.0.mlp.{name}.weight": wrong for name in ("0.lora_A", "0.lora_B", "2.lora_A")},
    }
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "x.safetensors")
    message = str(caught.value)
    assert "12 unmatched ('lora_te_encoder_0', 'lora_te_encoder_1'," in message
    assert message.count("lora_te_encoder") == 10
    assert "2 misshapen ('blocks.0.mlp.0' down [3, 5], up [3, 5] for [256, 64]" in message
    assert "1 repeated ('" in message
    assert len(message) < 2000


def test_ranks_are_those_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="misshapen"):
        read(peft(tmp_path / "peft", FACTORS, r=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "asks for peft_type 'LOHA': only plain LoRA"),
        ({"use_dora": True}, "asks for use_dora True"),
        ({"bias": "all"}, "asks for bias 'all'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save \['head'\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes",
        ),
        ({"rank_pattern": {r"blocks\.\d": 1}}, "is a regular expression"),
        ({"rank_pattern": {r"\w": 1}}, "is a regular expression"),
        ({"alpha_pattern": {"qkv\\": 1}}, "is a regular expression"),
        ({"alpha_pattern": {"(a+)+": 1}}, r"the pattern '\(a\+\)\+' is a regular expression"),
        ({"r": "two"}, "has no settings of a LoRA"),
        ({"r": -1}, "has no settings of a LoRA"),
        ({"lora_alpha": 1e300}, "has no settings of a LoRA"),
    ],
)
def test_other_kinds_of_peft_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(peft(tmp_path / "peft", FACTORS, own_layout, **settings))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_head.dora_scale", "DoRA"),
        ("base_model.model.head.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_head.hada_w1_a", "LoHa"),
        ("lora_unet_head.lokr_w1", "LoKr"),
        ("lora_unet_head.lora_mid.weight", "LoCon"),
        ("base_model.model.level_embedding.lora_embedding_A", "LoRA of embeddings"),
        ("base_model.model.head.lora_B.bias", "biases"),
        ("base_model.model.head.modules_to_save.default.weight", "whole modules"),
        ("base_model.model.head.weight", "other things than LoRA"),
    ],
)
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    of_head(
        tmp_path / "x.safetensors", ["unet.head.lora_A.weight", "unet.head.lora_B.weight", name]
    )
    with pytest.raises(CheckpointError, match=rf"holds {kind} \(1: '{name}'\): expected lora_A"):
        read(tmp_path / "x.safetensors")


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    names = [f"unet.head.lora_{one}.{name}.weight" for name in ("a", "b") for one in "AB"]
    of_head(tmp_path / "x.safetensors", names)
    with pytest.raises(CheckpointError, match="holds other things than LoRA"):
        read(tmp_path / "x.safetensors")


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    (tmp_path / "x.bin").write_bytes(b"pickle")
    alone = peft(tmp_path / "alone", FACTORS)
    (alone / "adapter_config.json").unlink()
    damaged = peft(tmp_path / "damaged", FACTORS)
    (damaged / "adapter_config.json").write_text("[" * 100_000)
    bad = {"head": (FACTORS["head"][0] * torch.nan, FACTORS["head"][1])}
    integers = {"head": (FACTORS["head"][0].int(), FACTORS["head"][1])}
    (tmp_path / "folder").mkdir()
    for path, message in [
        (tmp_path / "none.safetensors", "there are no weights at"),
        (tmp_path / "empty.safetensors", "holds other things than LoRA"),
        (tmp_path / "cut.safetensors", "not a whole safetensors file"),
        (tmp_path / "x.bin", r"is no \.safetensors file"),
        (tmp_path / "folder", r"expected adapter_model\.safetensors or pytorch_lora"),
        (alone, r"lacks adapter_config\.json beside it"),
        (damaged, "has no settings of a LoRA"),
        (
            kohya(tmp_path / "nan.safetensors", bad),
            r"down of 'lora_unet_head' of nan\.safetensors is nan",
        ),
        (
            kohya(tmp_path / "int.safetensors", integers),
            "down of 'lora_unet_head' of .* as int32",
        ),
        (kohya(tmp_path / "inf.safetensors", FACTORS, alpha=torch.inf), "alpha of '.* is inf"),
        (kohya(tmp_path / "two.safetensors", FACTORS, alpha=[1.0, 2.0]), r"alpha \[2\].* for"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read(path)


def test_places_and_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:2").write_bytes(b"")
    assert parse("x.safetensors") == ("x.safetensors", 1.0)
    assert parse("x.safetensors:-0.5") == ("x.safetensors", -0.5)
    assert parse("odd:2") == ("odd:2", 1.0)
    assert parse("hf://me/x") == ("hf://me/x", 1.0)
    assert parse("hf://me/x/y.safetensors@v1:2e-1") == ("hf://me/x/y.safetensors@v1", 0.2)
    for text in ("x:", "x:nan", "x:1e99", "x:half", ":1"):
        with pytest.raises(ConfigError, match="is no scale: give FILE or FILE:SCALE"):
            parse(text)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("loras/style.safetensors", "style"),
        ("loras/a hat.v2/adapter_model.safetensors", "a-hat-v2"),
        ("runs/flip/adapter.safetensors", "flip"),
        ("hf://me/hats@main", "hats"),
        ("loras/hats/", "hats"),
    ],
)
def test_folders_are_named_for_adapters(place: str, name: str) -> None:
    assert short_name(place) == name


def test_fuzz_adapters_are_read_or_refused(
    tmp_path: Path, cases: Callable[[int], Iterator[Random]]
) -> None:
    good = peft(tmp_path / "good", {"head": FACTORS["head"]})
    settings = (good / "adapter_config.json").read_bytes()
    model = (good / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(model[:8], "little")
    read_whole = 0
    for random in cases(200):
        changed = {
            "adapter_config.json": bytearray(settings),
            "adapter_model.safetensors": bytearray(model),
        }
        for _ in range(random.randint(1, 3)):
            name = random.choice(sorted(changed))
            end = header if name.endswith("safetensors") else len(settings)
            changed[name][random.randrange(8 if end == header else 0, end)] = random.randrange(256)
        for name, content in changed.items():
            (good / name).write_bytes(content)
        try:
            read(good)
            read_whole += 1
        except VareditError as error:
            assert str(error).isprintable() and len(str(error)) <= 2000
    assert read_whole < 200


def written(folder: Path, loras: Sequence[str] = ()) -> bytes:
    """Return the transformer's weights file of a bundle of the recording, with adapters."""
    options = BuildOptions(
        config=RECORDED / "config.json",
        checkpoint=RECORDED / "var.pth",
        tokenizer=RECORDED / "vae.pth",
        loras=tuple(loras),
        output=folder,
    )
    transformer = plan_of(options).shared[0]
    path = folder / transformer.file
    path.parent.mkdir(parents=True)
    transformer.write(folder)
    return path.read_bytes()


def test_adapters_of_scale_zero_leave_every_byte(tmp_path: Path) -> None:
    factors = random_factors(empty_transformer(WHOLE), seed=5)
    style = peft(tmp_path / "style", factors, RECORDED_CHUNKS)
    plain = written(tmp_path / "plain")
    assert written(tmp_path / "none", [f"{style}:0", f"{style}:-0"]) == plain
    assert written(tmp_path / "some", [f"{style}:0.1"]) != plain


def test_a_bundle_says_which_adapters_are_merged(tmp_path: Path) -> None:
    nano = Bundle.open(embedded())
    config = sources_of(nano)[0].transformer
    factors = random_factors(empty_transformer(config), seed=6)
    style = peft(tmp_path / "style", factors)
    hat = kohya(tmp_path / "hat.safetensors", factors)
    plan = plan_of(BuildOptions("nano", loras=(f"{style}:0.5", hat)))
    manifest = manifest_of(plan, nano.manifest.variants, nano.manifest.files, ())
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest
    records = [*(manifest.model.loras or ())]
    assert [(one.file, one.scale) for one in records] == [
        ("style/adapter_model.safetensors", 0.5),
        ("hat.safetensors", 1.0),
    ]
    assert records[1].sha256 == sha256(hat.read_bytes()).hexdigest()
    shown = described(Bundle(nano.path, manifest, ""))
    assert f"hat.safetensors times 1, sha256 {records[1].sha256}" in shown


def test_the_command_takes_several(tmp_path: Path) -> None:
    style = peft(tmp_path / "style", FACTORS)
    recorded = ("--config", RECORDED / "config.json", "--random-weights", "0")
    arguments = ("build", *recorded, "--lora", style, "--lora", f"{tmp_path}/none:0.5")
    run = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert run.exit_code == 1
    assert f"\nError: {tmp_path}/none is no .safetensors file: adapters are" in run.stderr


def test_the_default_folder_is_not_that_of_none(tmp_path: Path) -> None:
    style = peft(tmp_path / "style", FACTORS)
    options = BuildOptions("tiny-2b", (256,), random_weights=0, loras=(f"{style}:0.5",))
    assert plan_of(options).request.target.name == "tiny-2b-256-random-lora-style"


def test_a_resumed_build_notices_other_adapters(tmp_path: Path) -> None:
    sources = random_sources(CONFIG, seed=0)
    style = peft(tmp_path / "style", FACTORS)

    def identity(*loras: tuple[Path, float]) -> str:
        return merge_loras(sources, loras, CONFIG.transformer, ()).identity

    identities = [identity(), identity((style, 1.0)), identity((style, 0.5))]
    identities.append(identity((style, 1.0), (style, 0.5)))
    (style / "adapter_config.json").write_text(json.dumps(SETTINGS | {"lora_alpha": 5}))
    identities.append(identity((style, 1.0)))
    assert len(set(identities)) == 5
    (style / "adapter_config.json").write_text(json.dumps(SETTINGS | {"inference_mode": True}))
    assert identity((style, 1.0)) == identities[1]


def test_adapters_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft(tmp_path / "style", {"head": FACTORS["head"]})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    nested = {f"b/{name}": content for name, content in files.items()}
    hat = kohya(tmp_path / "hat.safetensors", {"head": FACTORS["head"]}).read_bytes()
    repository = Repository({**files, **nested, "hat.safetensors": hat, "README.md": b"#"})
    with serve({"me/x": repository}) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        for place, names in [
            ("hf://me/x", files),
            ("hf://me/x/b:0.5", nested),
            ("hf://me/x/b/adapter_model.safetensors:0.5", nested),
            ("hf://me/x/hat.safetensors", ["adapter_config.json", "hat.safetensors"]),
        ]:
            options = BuildOptions(
                "tiny-2b", (256,), random_weights=0, loras=(place,), output=tmp_path / "out"
            )
            sources = plan_of(options).sources
            assert [one.file for one in sources.origins] == sorted(names)
            assert sources.loras[0].scale == (0.5 if place.endswith("0.5") else 1)
            plain = random_sources(CONFIG, seed=0).transformer["head.weight"]
            assert not torch.equal(sources.transformer["head.weight"], plain)
