"""Folders as transformers writes them: what FSSDP loads and saves is what `from_pretrained` loads, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel

import hecate
from hecate.pretrained import files
from hecate.pretrained.conversion import steps_to_read
from hecate.values.local import local_tensor
from tests.adapters.tiny import ARCHITECTURES, skip_unknown, tiny_config, tiny_model
from tests.checkpoint.runs import BALANCED, Run, plain_model
from tests.workers import Groups

Dense = Literal["fsdp", "replicate"]

EP = hecate.FSSDPConfig(policy="ep")

# Architecture, processes, size of a file, dense part, built on the meta device.
CASES = [
    ("mixtral", 2, "20KB", "fsdp", False),  # w1, w2, w3 of each expert
    ("mixtral", 3, "5GB", "replicate", True),
    ("qwen3_moe", 2, "5GB", "fsdp", True),
    ("deepseek_v3", 3, "20KB", "fsdp", True),  # a dense layer, a shared expert, a buffer
    ("gpt_oss", 2, "5GB", "fsdp", True),  # stacked in files too, transposed, with biases
    ("gpt_oss", 3, "20KB", "replicate", False),
    ("olmoe", 2, "20KB", "fsdp", False),
    ("granitemoe", 3, "20KB", "fsdp", True),  # stacked in files, by other names
    ("phimoe", 2, "20KB", "fsdp", True),  # renamed before and after conversion
    ("kimi_linear", 3, "20KB", "fsdp", True),  # dense tensors are converted too
    ("deepseek_v4", 2, "20KB", "fsdp", True),  # integers in a buffer
    ("ernie4_5_moe", 2, "5GB", "fsdp", True),  # tied embeddings
    ("cohere2_moe", 3, "20KB", "replicate", True),
]


@pytest.mark.parametrize(
    ("architecture", "processes", "size", "dense", "meta"),
    [pytest.param(*case, marks=skip_unknown(case[0])) for case in CASES],
)
def test_load_and_save_agree_with_transformers(
    groups: Groups, tmp_path: Path, architecture: str, processes: int, size: str, dense: Dense, meta: bool
) -> None:
    round_trip(groups, tmp_path, architecture, processes, size, dense, meta)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(groups: Groups, tmp_path: Path, architecture: str) -> None:
    round_trip(groups, tmp_path, architecture, 2, "20KB", "fsdp", True)


def round_trip(
    groups: Groups, tmp_path: Path, architecture: str, processes: int, size: str, dense: Dense, meta: bool
) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    tiny_model(architecture, seed=3).save_pretrained(source, max_shard_size=size)
    groups(processes).run(load_and_save, architecture, source, saved, size, dense, meta)
    assert_equal(weights_of(saved), weights_of(source))
    assert tensors_in(saved) == tensors_in(source)
    assert all(f.metadata() == {"format": "pt"} for f in open_files(saved))
    index = json.loads((saved / files.INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in saved.glob("*.safetensors")}
    if size == "20KB":
        assert all(len(f.keys()) == 1 or value_bytes(f) <= 20_000 for f in open_files(saved))
    else:
        assert len(open_files(saved)) == processes


def load_and_save(architecture: str, source: Path, saved: Path, size: str, dense: Dense, meta: bool) -> None:
    engine = build(architecture, meta, hecate.FSSDPConfig(policy="ep", dense=dense))
    engine.load_pretrained(source)
    assert_equal(engine.full_state_dict(), weights_of(source))
    shift_owners(engine)
    engine.load_pretrained(source)
    assert_equal(engine.full_state_dict(), weights_of(source))
    assert_same_outputs(engine.model, AutoModelForCausalLM.from_pretrained(source))
    engine.save_pretrained(saved, max_shard_size=size)


@torch.no_grad()
def assert_same_outputs(model: torch.nn.Module, expected: PreTrainedModel) -> None:
    """The result also has the right values for what no file contains, such as rotary frequencies."""
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    found = model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected.eval()(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


def build(architecture: str, meta: bool = False, config: hecate.FSSDPConfig = EP, **changes: Any) -> hecate.FSSDP:
    """A tiny model with weights that are not those of any folder, or none."""
    if meta:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
    else:
        model = tiny_model(architecture, seed=5, **changes)
    return hecate.fully_shard(model, None, config)


def shift_owners(engine: hecate.FSSDP) -> None:
    """Move every expert to the next device; its weights are garbage then."""
    for pool in engine.pools:
        owners = [(layer + 1) % pool.num_devices for layer in pool.owners]
        assert pool.fits(owners)
        pool.set_owners(owners)
        for parameter in pool.parameters.values():
            local_tensor(parameter).fill_(float("nan"))
            pool.clear_padding(parameter)


def weights_of(folder: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors as transformers loads them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return dict(model.state_dict())


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def open_files(folder: Path) -> list[Any]:
    return [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]


def value_bytes(file: Any) -> int:
    """Bytes of the values."""
    return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


def tensors_in(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> dtype and shape, over all files."""
    slices = {key: f.get_slice(key) for f in open_files(folder) for key in f.keys()}  # noqa: SIM118
    return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


# What a rank reads and writes.


class Counting:
    """`safe_open` that keeps what was read, as (key, elements)."""

    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)
        self.read: list[tuple[str, int]] = READ

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_tensor(self, key: str) -> Tensor:
        tensor = self._file.get_tensor(key)
        self.read.append((key, tensor.numel()))
        return tensor

    def get_slice(self, key: str) -> CountingSlice:
        return CountingSlice(key, self._file.get_slice(key))


class CountingSlice:
    """A slice that is not read until it is indexed."""

    def __init__(self, key: str, part: Any) -> None:
        self._key, self._part = key, part
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        tensor = self._part[index]
        READ.append((self._key, tensor.numel()))
        return tensor


READ: list[tuple[str, int]] = []


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("dense", ["fsdp", "replicate"])
def test_a_rank_reads_what_it_owns_an_expert_at_a_time(
    groups: Groups, tmp_path: Path, architecture: str, processes: int, dense: Dense
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    groups(processes).run(count_reads, architecture, tmp_path / "source", dense)


def count_reads(architecture: str, source: Path, dense: Dense) -> None:
    engine = build(architecture, config=hecate.FSSDPConfig(policy="ep", dense=dense))
    READ.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "safe_open", Counting)
        engine.load_pretrained(source)
    (pool,) = engine.pools
    one = max(local_tensor(p)[0].numel() for p in pool.parameters.values())
    owned = sum(len(pool.owned(row)) for row in range(len(pool.specs)))
    experts = owned * sum(local_tensor(p)[0].numel() for p in pool.parameters.values())
    rest = [local_tensor(p).numel() for n, p in engine.model.named_parameters() if "hecate_pool" not in n]
    assert sum(n for _, n in READ) == experts + sum(rest)
    assert max(n for _, n in READ) <= max(one, *rest)
    if architecture == "mixtral":
        numbers = {(int(key.split(".")[2]), int(key.split(".")[5])) for key, _ in READ if ".experts." in key}
        assert numbers == {(row, e) for row in range(len(pool.specs)) for e in pool.owned(row).tolist()}


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_ranks_write_side_by_side_an_expert_at_a_time(groups: Groups, tmp_path: Path, architecture: str) -> None:
    written = groups(3).run(record_writes, architecture, tmp_path / "saved")
    stored = tensors_in(tmp_path / "saved")
    names = [{name for name, _, _ in one} for one in written]
    assert set.union(*names) == stored.keys()
    assert sum(map(len, names)) == len(stored)
    sizes = [sum(n for _, _, n in one) for one in written]
    assert max(sizes) < 0.5 * sum(sizes)
    for name, row, elements in (record for one in written for record in one):
        shape = stored[name][1]
        if architecture == "gpt_oss" and ".experts." in name:
            assert elements == torch.Size(shape[1:]).numel()
        else:
            assert (row, elements) == (0, torch.Size(shape).numel())


def record_writes(architecture: str, saved: Path) -> list[tuple[str, int, int]]:
    """(name, row, elements) of each write of this rank. If each expert is a separate tensor, a rank writes its own."""
    engine = build(architecture)
    records: list[tuple[str, int, int]] = []
    write: Callable[..., None] = files.ShardFile.write

    def recorded(self: files.ShardFile, name: str, tensor: Tensor, row: int = 0) -> None:
        records.append((name, row, tensor.numel()))
        write(self, name, tensor, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.ShardFile, "write", recorded)
        engine.save_pretrained(saved)
    if architecture == "mixtral":
        (pool,) = engine.pools
        keys = [name.split(".") for name, _, _ in records if ".experts." in name]
        own = {(row, e) for row in range(len(pool.specs)) for e in pool.owned(row).tolist()}
        assert {(int(key[2]), int(key[5])) for key in keys} == own
    return records


# Formats, dtypes, meshes.


def test_after_training_with_re_sharding(groups: Groups, tmp_path: Path) -> None:
    """What is saved is what was trained, wherever its owners are; and the next run may start from it."""
    for expected in groups(2).run(train_and_save, tmp_path / "saved"):
        assert_equal(weights_of(tmp_path / "saved"), expected)


def train_and_save(saved: Path) -> dict[str, Tensor]:
    config = hecate.FSSDPConfig(memory_slots=2, reshard_interval=1, cost=BALANCED.cost)
    model = tiny_model("mixtral")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(100)  # loads are uneven, so that experts move
    engine = hecate.fully_shard(model, None, config)
    initial = [owners.tolist() for owners in engine.pools[0].owners]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(input_ids=tokens)
    assert [owners.tolist() for owners in engine.pools[0].owners] != initial
    engine.save_pretrained(saved)
    trained = engine.full_state_dict()
    engine.load_pretrained(saved)
    assert_equal(engine.full_state_dict(), trained)
    return trained


def test_names_of_the_state_dict(tmp_path: Path) -> None:
    """A folder in them is loaded, and saved in them again, as transformers does."""
    tiny_model("mixtral").save_pretrained(tmp_path / "source", save_original_format=False)
    engine = build("mixtral")
    engine.save_pretrained(tmp_path / "fresh")
    assert any("experts.7.w1.weight" in key for key in tensors_in(tmp_path / "fresh"))
    engine.load_pretrained(tmp_path / "source")
    engine.save_pretrained(tmp_path / "saved")
    assert tensors_in(tmp_path / "saved") == tensors_in(tmp_path / "source")
    assert_equal(weights_of(tmp_path / "saved"), weights_of(tmp_path / "source"))


@skip_unknown("granitemoe")
def test_of_a_model_from_pretrained(groups: Groups, tmp_path: Path) -> None:
    """A model is saved in the format in which it was loaded."""
    tiny_model("granitemoe").save_pretrained(tmp_path / "source", save_original_format=False)
    groups(2).run(load_with_transformers_and_save, tmp_path / "source", tmp_path / "saved")
    assert tensors_in(tmp_path / "saved") == tensors_in(tmp_path / "source")
    assert_equal(weights_of(tmp_path / "saved"), weights_of(tmp_path / "source"))


def load_with_transformers_and_save(source: Path, saved: Path) -> None:
    engine = hecate.fully_shard(AutoModelForCausalLM.from_pretrained(source), None, EP)
    engine.save_pretrained(saved)


@pytest.mark.parametrize("master", [None, torch.float32])
def test_values_are_cast_to_the_master_weights_dtype(tmp_path: Path, master: torch.dtype | None) -> None:
    """bfloat16 in files, float32 or bfloat16 in the model; and the folder says which."""
    tiny_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "source")
    model = tiny_model("qwen3_moe", seed=5).bfloat16()
    config = hecate.FSSDPConfig(policy="ep", master_dtype=master, param_dtype=torch.bfloat16)
    engine = hecate.fully_shard(model, None, config)
    engine.load_pretrained(tmp_path / "source")
    expected = weights_of(tmp_path / "source", dtype=master or torch.bfloat16)
    assert_equal(engine.full_state_dict(), expected)
    engine.save_pretrained(tmp_path / "saved")
    assert_equal(weights_of(tmp_path / "saved"), expected)


@pytest.mark.parametrize(("processes", "mesh"), [(2, (2,)), (2, (2, 1)), (3, (3,)), (4, (2, 2)), (1, None)])
def test_our_own_model(groups: Groups, tmp_path: Path, processes: int, mesh: tuple[int, ...] | None) -> None:
    """Names of the state dict, no config; tied parameters once; any mesh."""
    before = groups(processes).run(train_and_save_ours, mesh, tmp_path / "saved") if mesh else None
    if before is None:
        before = [train_and_save_ours(None, tmp_path / "saved")]
    stored = tensors_in(tmp_path / "saved")
    assert before[0].keys() - stored.keys() == {"head.weight"}
    assert not (tmp_path / "saved" / "config.json").exists()
    run = Run(seed=7, tied=True)
    run.engine.load_pretrained(tmp_path / "saved")
    assert_equal(run.engine.full_state_dict(), before[0])
    for after in groups(2).run(load_ours, tmp_path / "saved"):
        assert_equal(after, before[0])


def train_and_save_ours(mesh: tuple[int, ...] | None, saved: Path) -> dict[str, Tensor]:
    names = ("replicate", "shard")[2 - len(mesh or ()) :]
    model = plain_model()
    model.head.weight = model.tokens.weight
    device_mesh = None if mesh is None else init_device_mesh("cpu", mesh, mesh_dim_names=names)
    engine = hecate.fully_shard(model, device_mesh, EP)
    if mesh is not None:
        shift_owners(engine)
        fill(engine)
    engine.save_pretrained(saved, max_shard_size="2KB")
    return engine.full_state_dict()


def fill(engine: hecate.FSSDP) -> None:
    """Distinct values, the same in every replica."""
    for pool in engine.pools:
        for parameter in pool.parameters.values():
            local = local_tensor(parameter)
            local.copy_(torch.arange(local.numel()).view_as(local) + 1e6 * pool.rank)


def load_ours(saved: Path) -> dict[str, Tensor]:
    run = Run(seed=8, tied=True)
    run.engine.load_pretrained(saved)
    return run.engine.full_state_dict()


def test_what_lies_in_the_folder(groups: Groups, tmp_path: Path) -> None:
    """All files of an older model are replaced; a tokenizer in the folder is kept."""
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    groups(2).run(save_new, "mixtral", tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
    assert_equal(weights_of(tmp_path / "saved"), dict(tiny_model("mixtral", seed=5).state_dict()))
    assert len(open_files(tmp_path / "saved")) == 2


def save_new(architecture: str, saved: Path) -> None:
    build(architecture).save_pretrained(saved)


def test_a_step_is_named_by_what_it_reads() -> None:
    """Keys of experts belong together, in numerical order."""
    engine = build("mixtral", num_experts=12, num_local_experts=12)
    keys = [f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight" for e in range(12) for i in (1, 2, 3)]
    names = engine._training_state().weights()
    steps, unexpected, _ = steps_to_read(engine._format, keys[::-1], names)
    assert not unexpected
    assert {step.target for step in steps} == {f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}
    for step in steps:
        for read in step.sources.values():
            assert [int(key.split(".")[5]) for key in read] == list(range(12))
