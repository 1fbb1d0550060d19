"""If a folder does not fit the model, the error says what is wrong, and nothing is overwritten."""

from __future__ import annotations

import json
import re
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import hecate
from hecate import state
from hecate.pretrained import files, load
from hecate.pretrained.conversion import Format
from tests.adapters.tiny import tiny_model
from tests.workers import Groups

EP = hecate.FSSDPConfig(policy="ep")
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a Mixtral, in one file."""
    tiny_model("mixtral", seed=3).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of a Mixtral, in several files."""
    tiny_model("mixtral", seed=3).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def change(folder: Path, function: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of the folder's only file by `function`."""
    tensors = load_file(folder / files.SINGLE)
    function(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / files.SINGLE, {"format": "pt"})


def build(architecture: str = "mixtral", **changes: Any) -> hecate.FSSDP:
    return hecate.fully_shard(tiny_model(architecture, seed=5, **changes), None, EP)


def assert_refused(engine: hecate.FSSDP, folder: Path, match: str) -> str:
    """Assert a ValueError that names the call, and an unchanged model; returns the message."""
    before = {name: value.clone() for name, value in engine.full_state_dict().items()}
    with pytest.raises(ValueError, match=match) as error:
        engine.load_pretrained(folder)
    after = engine.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_missing_keys(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(ATTENTION))
    assert_refused(build(), folder, f"lacks {re.escape(ATTENTION)}$")


def test_missing_experts(folder: Path) -> None:
    change(
        folder,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name and "experts" in name],
    )
    assert_refused(build(), folder, r"lacks model\.layers\.1\.mlp\.experts\.down_proj, model\.\S+gate_up_proj$")


def test_unknown_keys_at_most_ten_listed(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({f"model.other.{i}": torch.zeros(1) for i in range(13)}))
    message = assert_refused(build(), folder, "which the model does not know")
    assert message.count("model.other.") == 10
    assert "and 3 more" in message


def test_keys_that_the_model_class_ignores(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", seed=3)
    model.save_pretrained(tmp_path)
    extra = {f"model.layers.61.mlp.experts.{e}.up_proj.weight": torch.zeros(2, 2) for e in range(8)}
    change(
        tmp_path,
        lambda tensors: tensors.update(extra | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
    )
    engine = build("deepseek_v3")
    engine.load_pretrained(tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in engine.full_state_dict().items())


def test_missing_keys_that_the_model_class_ignores(folder: Path) -> None:
    """They keep their values, if they have any."""
    change(folder, lambda tensors: tensors.pop(ATTENTION))
    engine = build()
    before = engine.full_state_dict()[ATTENTION].clone()
    engine._format = replace(engine._format, ignored_missing=(r"q_proj",))
    names = {name: name for name in engine._names}
    with pytest.raises(ValueError, match=f"lacks {re.escape(ATTENTION)}$"):
        load.load_pretrained(folder, engine._training_state(), engine._format, needed={ATTENTION}, names=names)
    engine.load_pretrained(folder)
    assert torch.equal(engine.full_state_dict()[ATTENTION], before)


def test_one_expert_lacks(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(EXPERT))
    assert_refused(
        build(), folder, r"model\.layers\.1\.mlp\.experts\.gate_up_proj has 7 experts in the folder .*, 8 in"
    )


@pytest.mark.parametrize("original", [True, False])
def test_another_number_of_experts(tmp_path: Path, original: bool) -> None:
    """One tensor per expert, or stacked tensors."""
    tiny_model("mixtral", num_experts=6, num_local_experts=6).save_pretrained(tmp_path, save_original_format=original)
    assert_refused(build(), tmp_path, r"\.mlp\.experts\.\w+ has 6 experts in the folder .*, 8 in the model")


def test_another_shape(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({ATTENTION: torch.zeros(32, 31)}))
    assert_refused(build(), folder, rf"{re.escape(ATTENTION)} has shape \(32, 31\) in the folder .*, \(32, 32\) in the")


def test_another_shape_of_experts(tmp_path: Path) -> None:
    tiny_model("mixtral", intermediate_size=48).save_pretrained(tmp_path)
    assert_refused(build(), tmp_path, r"\.mlp\.experts\.\w+ has shape \(8, .*\) in the folder .*; must be equal")


def test_one_expert_of_another_shape(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({EXPERT: torch.zeros(31, 32)}))
    assert_refused(build(), folder, r"experts\.0\.w1\.weight, .* have shapes .*31, 32.*; must be equal")


def test_integers_for_floating_point(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({ATTENTION: torch.zeros(32, 32, dtype=torch.int8)}))
    assert_refused(
        build(), folder, rf"{re.escape(ATTENTION)} has dtype I8 in the folder, .* torch.float32 in the model"
    )


def test_eight_bits(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({ATTENTION: torch.zeros(32, 32).to(torch.float8_e4m3fn)}))
    assert_refused(build(), folder, f"{re.escape(ATTENTION)} has dtype F8_E4M3")


def test_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert_refused(build(), folder, r"quantized \(fp8\)")


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    """Both may be in the folder if they are equal."""
    model = tiny_model("ernie4_5_moe", seed=3)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    engine = build("ernie4_5_moe")
    engine.load_pretrained(tmp_path)
    assert torch.equal(engine.full_state_dict()["lm_head.weight"], model.lm_head.weight)
    change(tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert_refused(engine, tmp_path, "lm_head.weight and model.embed_tokens.weight are one tensor in the model")


def test_only_the_tied_name(tmp_path: Path) -> None:
    model = tiny_model("ernie4_5_moe", seed=3)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    engine = build("ernie4_5_moe")
    engine.load_pretrained(tmp_path)
    assert torch.equal(engine.full_state_dict()["model.embed_tokens.weight"], model.lm_head.weight)


# Damage.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [truncate, overwrite, Path.unlink])
def test_damaged_file_is_named(sharded: Path, damage: Callable[[Path], None]) -> None:
    file = sorted(sharded.glob("*.safetensors"))[3]
    damage(file)
    assert_refused(build(), sharded, f"file {file.name} is (damaged|missing)")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / files.INDEX).write_text(text)
    assert_refused(build(), sharded, f"file {re.escape(files.INDEX)} is damaged")


def test_index_lists_what_no_file_has(sharded: Path) -> None:
    index = json.loads((sharded / files.INDEX).read_text())
    index["weight_map"]["model.phantom"] = next(iter(index["weight_map"].values()))
    (sharded / files.INDEX).write_text(json.dumps(index))
    assert_refused(build(), sharded, "lists model.phantom, which is in none of its files")


def test_no_weights(tmp_path: Path) -> None:
    assert_refused(build(), tmp_path, f"must be a folder with {re.escape(files.SINGLE)} or {re.escape(files.INDEX)}")


def test_all_ranks_refuse_what_one_rank_cannot_read(groups: Groups, sharded: Path) -> None:
    groups(2).run(refuse_together, sharded)


def refuse_together(folder: Path) -> None:
    class Unreadable(files.WeightFiles):
        def __init__(self, folder: Path) -> None:
            if dist.get_rank() == 1:
                raise ValueError(f"{folder}: file model-00002 is damaged")
            super().__init__(folder)

    engine = build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "WeightFiles", Unreadable)
        assert_refused(engine, folder, "file model-00002 is damaged")


# Conversions.

MIXED = WeightConverter(
    [".experts.*.w1.weight", ".experts.*.w3.weight"],
    [".experts.gate_up_proj"],
    [ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)],
)
ACROSS = WeightConverter(".experts.*.w2.weight", ".experts.down_proj", [MergeModulelist(dim=0), Transpose(0, 1)])
JOINED = WeightConverter(".experts.*.w2.weight", ".experts.down_proj", [Concatenate(dim=0)])


@pytest.mark.parametrize(
    ("converter", "operation"), [(MIXED, "ErnieFuse"), (ACROSS, "Transpose"), (JOINED, r"Concatenate\(dim=0\)")]
)
def test_a_conversion_that_mixes_experts(folder: Path, converter: WeightConverter, operation: str) -> None:
    engine = build()
    usual = get_model_conversion_mapping(tiny_model("mixtral"), add_legacy=False)
    others = [t for t in usual if t.target_patterns != converter.target_patterns]
    engine._format = replace(engine._format, reads=(*others, converter), writes=(*others, converter))
    name = converter.target_patterns[0].split(".")[-1]
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts\.{name} cannot be made one .* has {operation}"):
        engine.load_pretrained(folder)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts\.{name} cannot be written one expert at a time"):
        engine.save_pretrained(folder)


# Saving.


@dataclass
class Writes:
    """A transform that only writes."""

    renaming: WeightRenaming

    def reverse_transform(self) -> WeightRenaming:
        return self.renaming


@pytest.mark.parametrize(
    ("pattern", "name", "message"),
    [
        # Two dense tensors, a dense one and an expert's, the experts of a layer, both halves of one's gate_up_proj.
        (r"^model\.norm\.weight", ATTENTION, "both make"),
        (r"^model\.norm\.weight", EXPERT, f"{re.escape(EXPERT)} would be written twice"),
        (r"experts\.\d+\.w1", "experts.5.w1", r"layers\.0\.\S+\.experts\.5\.w1\.weight.* would be written twice"),
        (r"(\d+)\.w3", r"\1.w1", r"\.w3\.weight become \S+\.w1\.weight; names must be distinct"),
    ],
)
def test_names_that_are_equal(folder: Path, pattern: str, name: str, message: str) -> None:
    engine = build()
    wrong = Writes(WeightRenaming(pattern, name))
    engine._format = replace(engine._format, writes=(*engine._format.writes, wrong))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        engine.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", ["5 apples", "0", -1, "1.5GB"])
def test_size_of_a_file(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ValueError, match=rf"save_pretrained.*max_shard_size={size!r}; must be"):
        build().save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_no_values_yet(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tiny_model("mixtral")
    engine = hecate.fully_shard(model, None, EP)
    with pytest.raises(RuntimeError, match="no values yet"):
        engine.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_leaves_the_one_before(groups: Groups, folder: Path, processes: int) -> None:
    """A limit on the size of files, on one rank only, stands in for a full disk."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if processes == 1:
        fill_disk(folder)
    else:
        groups(2).run(fill_disk, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def fill_disk(folder: Path) -> None:
    engine = build("gpt_oss")  # stacked: the ranks wait for each other while they write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not dist.is_initialized() or dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*\.safetensors"):
            engine.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("converter", "operation"), [(MIXED, "ErnieFuse"), (ACROSS, "Transpose"), (JOINED, r"Concatenate\(dim=0\)")]
)
def test_a_conversion_that_mixes_experts_is_told_before_training(converter: WeightConverter, operation: str) -> None:
    """As ERNIE-4.5-VL's does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "format_of", lambda model: Format(writes=(converter,)))
        name = converter.target_patterns[0].split(".")[-1]
        told = rf"save_pretrained will refuse .*\.0\.mlp\.experts\.{name} has {operation}"
        with pytest.warns(UserWarning, match=told):
            hecate.fully_shard(tiny_model("mixtral"))


def test_usual_conversions_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hecate.fully_shard(tiny_model("mixtral"))
