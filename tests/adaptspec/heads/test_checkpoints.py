"""Files made by hand to each layout in use, and files that fit nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from adaptspec.errors import HeadsLoadError
from adaptspec.heads.checkpoints import HeadsFile, read_heads, write_heads
from adaptspec.heads.medusa import MedusaHeads

HIDDEN, VOCAB, HEADS, LAYERS = 8, 20, 3, 2
Tensors = dict[str, torch.Tensor]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def v2(prefix: str = "", heads: int = HEADS, layers: int = LAYERS) -> Tensors:
    """Blocks alone, as train_legacy saves them."""
    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            name = f"{prefix}{head}.{layer}.linear"
            seed = 10 * head + layer
            tensors[f"{name}.weight"] = drawn(HIDDEN, HIDDEN, seed=seed)
            tensors[f"{name}.bias"] = drawn(HIDDEN, seed=100 + seed)
    return tensors


def v1(prefix: str = "", heads: int = HEADS, layers: int = LAYERS) -> Tensors:
    """The reference's first layout: an LM head after each head's blocks."""
    tensors = v2(prefix, heads, layers)
    for head in range(heads):
        name = f"{prefix}{head}.{layers}.weight"
        tensors[name] = drawn(VOCAB, HIDDEN, seed=200 + head)
    return tensors


def vllm(prefix: str = "", outputs: int = HEADS, rows: int = VOCAB) -> Tensors:
    """vLLM's names; its blocks have no biases unless configured."""
    tensors = {}
    for head in range(HEADS):
        for layer in range(LAYERS):
            name = f"{prefix}blocks.{head}.layers.{layer}.weight"
            tensors[name] = drawn(HIDDEN, HIDDEN, seed=10 * head + layer)
    for head in range(outputs):
        name = f"{prefix}lm_heads.{head}.weight"
        tensors[name] = drawn(rows, HIDDEN, seed=200 + head)
    return tensors


def by_hand(
    hidden: torch.Tensor, tensors: Tensors, bias: bool, output: Callable[[int], Any]
) -> torch.Tensor:
    """The paper's formula, term by term, over tensors named by head and layer."""
    logits = []
    for head in range(HEADS):
        x = hidden
        for layer in range(LAYERS):
            name = f"{head}.{layer}.linear"
            moved = x @ tensors[f"{name}.weight"].T
            if bias:
                moved = moved + tensors[f"{name}.bias"]
            x = x + moved * torch.sigmoid(moved)
        logits.append(x @ output(head).T)
    return torch.stack(logits)


def read(folder: Path) -> HeadsFile:
    return read_heads(folder, HIDDEN, VOCAB)


def save_v1(folder: Path) -> Tensors:
    tensors = v1()
    torch.save(tensors, folder / "medusa_lm_head.pt")
    # What the published ones say.
    (folder / "config.json").write_text(
        json.dumps(
            {
                "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
                "medusa_num_heads": 2,
                "medusa_num_layers": 1,
            }
        )
    )
    return tensors


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_heads_with_their_own_lm_heads_are_counted_by_their_tensors(
    tmp_path: Path, suffix: str
) -> None:
    tensors = save_v1(tmp_path)
    if suffix == "safetensors":
        (tmp_path / "medusa_lm_head.pt").unlink()
        save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    found = read(tmp_path)
    assert (found.format, found.base) == ("v1", "lmsys/vicuna-7b-v1.3")
    assert (len(found.heads.blocks), found.heads.layers) == (HEADS, LAYERS)
    hidden = drawn(5, HIDDEN, seed=1)
    expected = by_hand(hidden, tensors, True, lambda k: tensors[f"{k}.2.weight"])
    torch.testing.assert_close(found.heads(hidden), expected)
    assert (found.paths, found.ranks) == (None, None)


def test_a_file_of_before_torch_1_6_is_read(tmp_path: Path) -> None:
    tensors = v1()
    path = tmp_path / "medusa_lm_head.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    weight = read(tmp_path).heads.state_dict()["blocks.2.1.linear.weight"]
    assert torch.equal(weight, tensors["2.1.linear.weight"])


def test_heads_without_outputs_use_the_targets_lm_head(tmp_path: Path) -> None:
    tensors = v2()
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    found = read(tmp_path)
    assert (found.format, found.heads.output, found.base) == ("v2", "base", None)
    lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    hidden = drawn(2, HIDDEN, seed=1)
    expected = by_hand(hidden, tensors, True, lambda _: lm_head.weight)
    torch.testing.assert_close(found.heads(hidden, lm_head), expected)


@pytest.mark.parametrize("shards", ["safetensors", "bin"])
def test_heads_inside_a_full_model_are_read_from_its_shards(
    tmp_path: Path, shards: str
) -> None:
    heads = v1("medusa_head.")
    names = sorted(heads)
    parts = [
        {name: heads[name] for name in names[:7]}
        | {"model.embed_tokens.weight": drawn(VOCAB, HIDDEN, seed=5)},
        {name: heads[name] for name in names[7:]}
        | {"lm_head.weight": drawn(VOCAB, HIDDEN, seed=6)},
    ]
    places = {}
    stem = "model" if shards == "safetensors" else "pytorch_model"
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-00003.{shards}"
        save = save_file if shards == "safetensors" else torch.save
        save(part, tmp_path / file)
        places.update(dict.fromkeys(part, file))
    # A shard without heads isn't opened: it needn't even be there.
    places["model.norm.weight"] = f"{stem}-00003-of-00003.{shards}"
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / f"{stem}.{shards}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    found = read(tmp_path)
    assert (found.format, found.heads.output) == ("model", "own")
    hidden = drawn(2, HIDDEN, seed=1)
    plain = v1()
    expected = by_hand(hidden, plain, True, lambda k: plain[f"{k}.2.weight"])
    torch.testing.assert_close(found.heads(hidden), expected)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_vllms_layout_is_read_with_its_prefix_and_without(
    tmp_path: Path, prefix: str
) -> None:
    save_file(vllm(prefix), tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert (found.format, found.heads.output) == ("vllm", "own")
    hidden = drawn(2, HIDDEN, seed=1)
    tensors = v2()
    expected = by_hand(
        hidden, tensors, False, lambda k: drawn(VOCAB, HIDDEN, seed=200 + k)
    )
    torch.testing.assert_close(found.heads(hidden), expected)


@pytest.mark.parametrize("name", ["lm_heads.0.weight", "lm_head.weight"])
def test_vllms_one_lm_head_serves_all_heads(tmp_path: Path, name: str) -> None:
    tensors = vllm(outputs=0)
    tensors[name] = drawn(VOCAB, HIDDEN, seed=3)
    save_file(tensors, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert found.heads.output == "joint"
    hidden = drawn(2, HIDDEN, seed=1)
    expected = by_hand(hidden, v2(), False, lambda _: tensors[name])
    torch.testing.assert_close(found.heads(hidden), expected)


@pytest.mark.parametrize("rows", [4, VOCAB])
def test_vllms_token_map_reduces_the_vocabulary(tmp_path: Path, rows: int) -> None:
    tensors = vllm(rows=rows)
    mapped = torch.tensor([3, 19, 0, 7])
    tensors["token_map"] = mapped
    save_file(tensors, tmp_path / "model.safetensors")
    heads = read(tmp_path).heads
    assert heads.draft_vocab == 4
    assert heads.token_map is not None
    assert heads.token_map.tolist() == mapped.tolist()
    for head in range(HEADS):
        stored = tensors[f"lm_heads.{head}.weight"]
        expected = stored if rows == 4 else stored[mapped]
        assert torch.equal(heads.state_dict()[f"outputs.{head}.weight"], expected)


def test_blocks_that_alias_one_another_become_independent(tmp_path: Path) -> None:
    """The reference builds ``[block] * layers``: one tensor under several names."""
    tensors = v1()
    for head in range(HEADS):
        for kind in ("weight", "bias"):
            tensors[f"{head}.1.linear.{kind}"] = tensors[f"{head}.0.linear.{kind}"]
    torch.save(tensors, tmp_path / "medusa_lm_head.pt")
    heads = read(tmp_path).heads
    first, second = (
        heads.state_dict()[f"blocks.0.{layer}.linear.weight"] for layer in (0, 1)
    )
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


PATHS = (((0,), 0.55), ((0, 0), 0.31), ((1,), 0.09), ((0, 0, 2), 0.04))
RANKS = ((0.55, 0.09), (0.4, 0.1), (0.3, 0.08))


def made(output: Any = "own", token_map: Any = None, bias: bool = True) -> MedusaHeads:
    size = VOCAB if token_map is None else len(token_map)
    torch.manual_seed(4)
    heads = MedusaHeads(HIDDEN, size, HEADS, LAYERS, output, token_map, bias)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads.to(torch.bfloat16)


def write(folder: Path, heads: MedusaHeads, **changed: Any) -> None:
    given: dict[str, Any] = {
        "base_model": "org/model",
        "vocab_size": VOCAB,
        "paths": PATHS,
        "ranks": RANKS,
        "record": {"steps": 7},
    }
    write_heads(folder, heads, **{**given, **changed})


@pytest.mark.parametrize(
    ("heads", "file", "layout"),
    [
        (made(), "medusa_lm_head.safetensors", "v1"),
        (made("base"), "medusa_lm_head.safetensors", "v2"),
        (made("joint"), "model.safetensors", "vllm"),
        (made("joint", [4, 2, 9], bias=False), "model.safetensors", "vllm"),
        (made("own", [4, 2, 9]), "model.safetensors", "vllm"),
    ],
    ids=["own", "base", "joint", "joint-mapped", "own-mapped"],
)
def test_what_is_written_is_read_back(
    tmp_path: Path, heads: MedusaHeads, file: str, layout: str
) -> None:
    folder = tmp_path / "deep" / "heads"
    write(folder, heads)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["adaptspec.json", "config.json", file]
    )
    found = read(folder)
    assert (found.format, found.base) == (layout, "org/model")
    assert (found.paths, found.ranks) == (PATHS, RANKS)
    assert (found.heads.output, found.heads.draft_vocab) == (
        heads.output,
        heads.draft_vocab,
    )
    state = found.heads.state_dict()
    assert list(state) == list(heads.state_dict())
    for name, tensor in heads.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype is tensor.dtype
    assert read(folder).digest == found.digest


def test_the_config_tells_other_loaders_the_true_counts(tmp_path: Path) -> None:
    write(tmp_path, made("own", [4, 2, 9]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["medusa_num_heads"] == config["num_heads"] == HEADS
    assert config["medusa_num_layers"] == config["num_hidden_layers"] == LAYERS
    assert (config["vocab_size"], config["truncated_vocab_size"]) == (VOCAB, 3)
    assert config["hidden_size"] == HIDDEN
    assert (config["original_lm_head"], config["medusa_fc_bias"]) == (False, True)
    assert config["medusa_choices"] == [list(path) for path, _ in PATHS]
    told = json.loads((tmp_path / "adaptspec.json").read_text())
    assert told["training"] == {"steps": 7}


def test_a_vllm_checkpoint_has_exactly_the_names_its_loader_takes(
    tmp_path: Path,
) -> None:
    write(tmp_path, made("joint", [4, 2, 9], bias=False))
    names = set(load_file(tmp_path / "model.safetensors"))
    blocks = {
        f"blocks.{head}.layers.{layer}.weight"
        for head in range(HEADS)
        for layer in range(LAYERS)
    }
    assert names == blocks | {"lm_heads.0.weight", "token_map"}


def test_the_digest_follows_weights_and_calibration(tmp_path: Path) -> None:
    digests = set()
    other = made()
    with torch.no_grad():
        other.blocks[0][0].linear.bias[0] += 1  # type: ignore[index]
    for number, (heads, paths) in enumerate(
        [(made(), PATHS), (made(), PATHS[:2]), (made(), None), (other, PATHS)]
    ):
        write(tmp_path / str(number), heads, paths=paths)
        digests.add(read(tmp_path / str(number)).digest)
    assert len(digests) == 4


def test_heads_are_written_again_in_another_layout(tmp_path: Path) -> None:
    write(tmp_path, made("joint"))
    write(tmp_path, made("own"))
    assert read(tmp_path).format == "v1"
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_of_others_are_not_replaced(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(HeadsLoadError, match=r"model\.safetensors isn't AdaptSpec's"):
        write(tmp_path, made("joint"))
    assert list(load_file(tmp_path / "model.safetensors")) == ["model.norm.weight"]


def test_a_write_that_stopped_half_way_is_not_taken_for_a_whole_one(
    tmp_path: Path,
) -> None:
    write(tmp_path, made())
    before = (tmp_path / "medusa_lm_head.safetensors").read_bytes()
    write(tmp_path, made(bias=False))
    (tmp_path / "medusa_lm_head.safetensors").write_bytes(before)
    with pytest.raises(HeadsLoadError, match="measured with other weights"):
        read(tmp_path)


Change = Callable[[Tensors], None]


def replaced(name: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


def dropped(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (
            v1,
            replaced("1.0.linear.weight", torch.ones(8, 9)),
            r"1\.0\.linear\.weight is \[8, 9\], and \[8, 8\]",
        ),
        (
            v1,
            replaced("0.0.linear.bias", torch.ones(9)),
            r"0\.0\.linear\.bias is \[9\]",
        ),
        (
            v1,
            replaced("2.2.weight", torch.ones(21, 8)),
            r"2\.2\.weight is \[21, 8\], and \[20, 8\]",
        ),
        (
            v1,
            replaced("2.2.weight", torch.ones(20, 8).int()),
            "floating-point numbers, got torch.int32",
        ),
        (v1, replaced("2.2.weight", torch.ones(20, 8).half()), "must have one type"),
        (v1, dropped("1.2.weight"), r"lacks 1\.2\.weight"),
        (v1, dropped("1.0.linear.bias"), r"lacks 1\.0\.linear\.bias"),
        (v2, dropped("2.1.linear.weight"), r"lacks 2\.1\.linear\.weight"),
        (
            v2,
            replaced("999999999.0.linear.weight", torch.ones(8, 8)),
            r"lacks 0*\d+\.\d\.linear",
        ),
        (
            v1,
            replaced("0.3.weight", torch.ones(20, 8)),
            r"0\.3\.weight must be named 0\.2\.weight",
        ),
        (
            v1,
            replaced("7.2.weight", torch.ones(20, 8)),
            r"7\.2\.weight belongs to none of the 3 heads",
        ),
        (v1, replaced("extra.weight", torch.ones(1)), r"extra\.weight is not part"),
        (
            v1,
            replaced("lm_head.weight", torch.ones(20, 8)),
            r"lm_head\.weight is not part",
        ),
        (
            vllm,
            replaced("0.0.linear.weight", torch.ones(8, 8)),
            r"0\.0\.linear\.weight is not part",
        ),
        (
            vllm,
            replaced("token_map", torch.tensor([1.0, 2.0])),
            "token_map must hold integers",
        ),
        (
            vllm,
            replaced("token_map", torch.tensor([1, 20])),
            r"token_map must hold token ids in 0\.\.19, got 1\.\.20",
        ),
        (
            vllm,
            replaced("token_map", torch.tensor([1, 1])),
            "token_map must hold each token once",
        ),
        (
            vllm,
            replaced("token_map", torch.ones(21).long()),
            "token_map must list up to 20",
        ),
        (vllm, dropped("lm_heads.1.weight"), r"lacks lm_heads\.1\.weight"),
        (lambda: vllm(outputs=0), lambda _: None, r"lacks lm_heads\.0\.weight"),
        (
            lambda: {"model.norm.weight": torch.ones(2)},
            lambda _: None,
            "holds no Medusa heads",
        ),
        (dict, lambda _: None, "holds no Medusa heads"),
    ],
)
def test_what_does_not_fit_is_refused_by_tensor(
    tmp_path: Path, build: Callable[[], Tensors], change: Change, message: str
) -> None:
    tensors = build()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HeadsLoadError, match=message):
        read(tmp_path)


def test_a_folder_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadsLoadError, match="holds no heads; looked for"):
        read(tmp_path)
    with pytest.raises(HeadsLoadError, match="no folder"):
        read(tmp_path / "missing")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    save_v1(tmp_path)
    path = tmp_path / "medusa_lm_head.pt"
    for damaged in (path.read_bytes()[:200], b"", b"junk"):
        path.write_bytes(damaged)
        with pytest.raises(HeadsLoadError, match=r"medusa_lm_head\.pt"):
            read(tmp_path)
    path = tmp_path / "medusa_lm_head.safetensors"
    for damaged in (b"\xff" * 64, b""):
        path.write_bytes(damaged)
        with pytest.raises(HeadsLoadError, match=r"medusa_lm_head\.safetensors"):
            read(tmp_path)


class Payload:
    """Code that a pickle would run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_pickle_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"0.0.linear.weight": Payload()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(HeadsLoadError, match="isn't unpickled"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.ones(1)], tmp_path / "medusa_lm_head.pt")
    with pytest.raises(HeadsLoadError, match="a dictionary of tensors"):
        read(tmp_path)


def test_an_index_that_leads_outside_its_folder_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"medusa_head.0.0.linear.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HeadsLoadError, match="in the same folder"):
        read(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(
    tmp_path: Path,
) -> None:
    save_file({"other": torch.ones(1)}, tmp_path / "a.safetensors")
    index = {"weight_map": {"medusa_head.0.0.linear.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HeadsLoadError, match=r"a\.safetensors lacks medusa_head"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 1 and kind 'medusa' are read, got 9"),
        ({"kind": "eagle"}, "got 1 and 'eagle'"),
        ({"paths": [[[0, 1], 0.5]]}, "after their beginning"),
        ({"paths": [[[0], 0.5], [[0], 0.5]]}, "must come once"),
        ({"paths": [[[20], 0.5]]}, r"\[\[ranks\], chance\]"),
        ({"paths": [[[0], 1.5]]}, r"\[\[ranks\], chance\]"),
        ({"paths": [[[0], float("nan")]]}, r"\[\[ranks\], chance\]"),
        ({"paths": [[[True], 0.5]]}, r"\[\[ranks\], chance\]"),
        ({"paths": {"0": 0.5}}, "paths must be a list"),
        ({"paths": [[[], 0.5]]}, "1..3 ranks"),
        ({"ranks": [[0.5]]}, "ranks must be 3 lists"),
        ({"ranks": [[0.5], [], [0.1]]}, "ranks must be 3 lists"),
    ],
)
def test_damage_in_the_calibration_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, made())
    path = tmp_path / "adaptspec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(HeadsLoadError, match=message) as raised:
        read(tmp_path)
    assert "adaptspec.json" in str(raised.value)


@pytest.mark.parametrize("name", ["adaptspec.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000])
def test_a_file_that_holds_no_json_object_is_refused_by_name(
    tmp_path: Path, name: str, text: str
) -> None:
    write(tmp_path, made())
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(HeadsLoadError, match=name):
        read(tmp_path)


def test_new_blocks_leave_the_hidden_state_as_it_is() -> None:
    heads = MedusaHeads(HIDDEN, VOCAB, HEADS, LAYERS, "joint")
    weight = drawn(VOCAB, HIDDEN, seed=3)
    heads.copy_outputs(weight)
    hidden = drawn(4, HIDDEN, seed=2)
    expected = functional.linear(hidden, weight).expand(HEADS, 4, VOCAB)
    torch.testing.assert_close(heads(hidden), expected)
