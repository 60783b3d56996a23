"""The documentation says what the code does."""

import re
import shlex
from pathlib import Path

import pytest
from bundles import small_bundle
from commands_page import COMMANDS, PAGE, SERVING, helps, refreshed, refreshed_tables

from varedit_export.parity import measures
from varedit_reference.golden import recordings
from varedit_runtime.bundle import Bundle
from varedit_runtime.precision import FLOAT32, named

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = [".", "varedit_export", "reference/varedit_reference"]
FOLDERS += ["runtime/varedit_runtime", "runtime/varedit_serve"]


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """Return the table under a heading: each row's other cells by its first cell."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"# {heading}\n")[1].split("\n#")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines[2:]}


def test_the_commands_page_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == refreshed(page), "run `make docs`"


def test_the_tables_of_fields_and_limits_are_current() -> None:
    page = SERVING.read_text(encoding="utf-8")
    assert page == refreshed_tables(page), "run `make docs`"


@pytest.mark.parametrize(("name", "text"), [pytest.param(n, h, id=n) for n, h in helps()])
def test_every_help_has_examples_that_parse(name: str, text: str) -> None:
    lines = text.replace("\\\n", "").splitlines()
    examples = [line.split("|")[0] for line in lines if line.startswith("  varedit-")]
    assert any(example.startswith(f"  {name} ") for example in examples)
    for example in examples:
        command, first, *arguments = shlex.split(example)
        own = getattr(COMMANDS[command], "commands", None)
        if own is None:
            COMMANDS[command].make_context(command, [first, *arguments])
        elif first in own:
            own[first].make_context(first, arguments)
        else:
            own["edit"].make_context("edit", [first, *arguments])


def test_the_stages_have_the_inputs_and_outputs_that_are_said() -> None:
    (variant,) = Bundle.open(small_bundle()).manifest.variants
    scales = {stage for stage in variant.graphs if stage.startswith("scale_")}
    table = rows("architecture.md", "The stages")
    said = {tuple(re.findall("`(.+?)`", stage)): cells for stage, cells in table.items()}
    assert {stage for stages in said for stage in stages} | scales == set(variant.graphs)
    common = said["scale_00", "scale_01"]
    for stages, cells in said.items():
        graphs = [variant.graphs[stage] for stage in (scales if len(stages) > 1 else stages)]
        made = [g.inputs for g in graphs], [g.outputs for g in graphs]
        for place, cell in enumerate(cells):
            told = f"{cell} {common[place]}" if stages == ("scale",) else cell
            names = {re.sub(r"\.[ik]$", ".0", name) for name in re.findall("`(.+?)`", told)}
            assert names == {re.sub(r"\.\d+$", ".0", t.name) for of in made[place] for t in of}


@pytest.mark.parametrize(
    ("heading", "row", "tolerance"),
    [
        ("Gates of a bundle", "guided logits, every scale", measures.LOGITS),
        ("Gates of a bundle", "running sum", measures.SUMS),
        ("Gates of a bundle", "source tokens", measures.SUMS),
        ("Gates of a bundle", "text features, fp32", measures.FEATURES),
        ("Gates of a bundle", "text features, fp16", named("fp16").gates.features),
        ("Gates of a bundle", "text features, int8", named("int8").gates.features),
        ("Gates of a bundle", "share of bits that differ, 16", named("fp16").gates.bits),
        ("Gates of a bundle", "share of bits that differ, int8", named("int7").gates.bits),
        ("Gates of a bundle", "text features, fp16", named("fp8").gates.features),
        ("Gates of a bundle", "share of bits that differ, fp8", named("fp8").gates.bits),
        ("Gates of a bundle", "guided logits of every scale, fp8", named("fp8").gates.logits),
        ("Gates of a bundle", "the same, fp8", named("fp8").gates.blocks),
        ("Gates of a bundle", "text features, fp16", named("int8-gpu").gates.features),
        ("Gates of a bundle", "share of bits that differ, int8", named("int8-gpu").gates.bits),
        ("Gates of a bundle", "guided logits of every scale, int8", named("int8-gpu").gates.logits),
        ("Gates of a bundle", "the same, int8", named("int8-gpu").gates.blocks),
        ("Gates of a bundle", "guided logits of every scale, 16", named("fp16").gates.logits),
        ("Gates of a bundle", "guided logits of every scale, int8", named("int8").gates.logits),
        ("Gates of a bundle", "the same, int8", named("int8").gates.blocks),
        ("Gates of the reference", "encoder features", recordings.FEATURES),
        ("Gates of the reference", "quantiser", recordings.SIGN_MARGIN),
        ("Gates of the reference", "quantised sum", recordings.SUMS),
        ("Gates of the reference", "pooled text", recordings.CONDITION),
        ("Gates of the reference", "a block's output", recordings.LOGITS),
        ("Gates of the reference", "guided logits", recordings.LOGITS),
        ("Gates of the reference", "probability of bit 1", recordings.PROBABILITY),
    ],
)
def test_tolerances_are_those_of_the_code(heading: str, row: str, tolerance: float) -> None:
    (said,) = (c[0] for name, c in rows("numerics.md", heading).items() if name.startswith(row))
    number = said.removesuffix(" %")
    assert float(number) / (1 if said == number else 100) == tolerance


@pytest.mark.parametrize(
    ("row", "component", "product"),
    [
        ("products of the blocks", "transformer", "blocks.mlp_up"),
        ("residual stream", "transformer", "shared_modulation"),
        ("head, temperature", "transformer", "head"),
        ("text encoder: products", "text_encoder", "blocks.qkv"),
        ("text encoder: gated GELU", "text_encoder", "blocks.down"),
        ("image encoder", "image_encoder", "conv_in"),
        ("image encoder", "image_decoder", "conv_out"),
    ],
)
def test_types_are_those_of_the_code(row: str, component: str, product: str) -> None:
    (cells,) = (c for name, c in rows("numerics.md", "Types").items() if name.startswith(row))
    computed = {n: named(n).format(component, product).type for n in ("fp32", "fp16", "bf16")}
    fp32, fp16, bf16 = ("fp32" if t == FLOAT32 else "16 bits" for t in computed.values())
    integers = named("int8").format(component, product).storage is not None
    assert cells[:2] == [fp32, fp16 if fp16 == bf16 else f"fp16: {fp16}; bf16: {bf16}"]
    assert cells[2].startswith("8-bit integers" if integers else "fp32")
    factors = named("fp8").format(component, product).storage is not None
    assert cells[3].startswith("8-bit factors" if factors else fp16)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)}
    local = {link for link in links if link and "://" not in link}
    assert [link for link in sorted(local) if not (page.parent / link).exists()] == []


def test_where_to_look_names_files_that_are_there() -> None:
    cells = "".join(cell for cell, *_ in rows("architecture.md", "Where to change what").values())
    names = set(re.findall(r"`([\w/]+(?:\.py|/))`", cells))
    assert len(names) > 20
    missing = [n for n in names if not any((ROOT / f / n).exists() for f in FOLDERS)]
    assert missing == []


def test_the_security_page_names_tests_that_exist_and_every_fuzzer() -> None:
    named = set(re.findall(r"`(tests/\w+\.py)`", (ROOT / "docs" / "security.md").read_text()))
    assert named and all((ROOT / file).is_file() for file in named)
    tests = {f"tests/{path.name}": path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    fuzzers = {file for file, text in tests.items() if "\ndef test_fuzz_" in text}
    assert fuzzers <= named
