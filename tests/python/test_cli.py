"""The executable as a user meets it: what it prints and writes, and what bad input gets (exit code 2, a named error, nothing
half-written)."""

import json
import shutil
import struct

import pytest

from conftest import run


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("One of the special magic numbers for lamp is: 1234567. " * 20)
    return path


@pytest.fixture
def model(demo_dir, tmp_path):
    """A copy of the shipped checkpoint that a test may damage."""
    return pathlib_copy(demo_dir, tmp_path / "model")


def pathlib_copy(source, target):
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(source / name, target / name)
    return target


def test_run_writes_json_that_agrees_with_what_it_prints(cli, demo_dir, prompt, tmp_path):
    out = tmp_path / "out.json"
    svg = tmp_path / "out.svg"
    printed = run(cli, "run", "-m", demo_dir, "-p", prompt, "--max-tokens", 8, "--min-context", 0, "--chunk", 256, "--json", out,
                  "--svg", svg)
    figures = json.loads(out.read_text())
    assert {"answer", "prompt_tokens", "ttft_seconds", "attention_seconds", "density", "union_inflation", "selector", "mode",
            "backend"} <= figures.keys()
    assert figures["selector"] == "mean-key" and figures["mode"] == "adaptive" and figures["backend"] == "cpu"
    assert figures["prompt_tokens"] > 200
    assert 0 < figures["attention_seconds"] <= figures["ttft_seconds"]
    assert 0 < figures["density"] <= 1 <= figures["union_inflation"]
    assert printed.startswith(figures["answer"])
    assert f"density {figures['density']:.3f}" in printed
    assert svg.read_text().startswith("<svg")


def test_dense_density_is_one_and_threshold_zero_answers_like_dense(cli, demo_dir, prompt, tmp_path):
    figures = {}
    for name, flags in {"dense": ["--selector", "dense"], "all": ["--share", 0, "--min-context", 0]}.items():
        out = tmp_path / f"{name}.json"
        run(cli, "run", "-m", demo_dir, "-p", prompt, "--max-tokens", 8, "--chunk", 128, "--json", out, *flags)
        figures[name] = json.loads(out.read_text())
    assert figures["dense"]["density"] == 1 and figures["dense"]["mode"] == "dense"
    assert figures["all"]["density"] == 1
    assert figures["all"]["answer"] == figures["dense"]["answer"]


# Flags that keep few pages, flags that keep many, flags that keep all.
SELECTORS = {
    "sub-mean": (["--share", 0.3, "--lift", 0], ["--share", 0.01, "--lift", 0], ["--share", 0, "--lift", 0]),
    "xattention": (["--mass", 0.3], ["--mass", 0.95], ["--mass", 1]),
    "quoka": (["--kept-tokens", 16], ["--kept-tokens", 80], ["--kept-tokens", 100000]),
    "random": (["--share", 0.1], ["--share", 0.6], ["--share", 1]),
    "oracle": (["--budget", "top=0.1"], ["--budget", "top=0.6"], ["--budget", "mass=1"]),
}


@pytest.mark.parametrize("selector", SELECTORS)
def test_flags_of_a_selector_set_its_density(cli, demo_dir, prompt, tmp_path, selector):
    out = tmp_path / "out.json"
    shared = ["--max-tokens", 8, "--page", 16, "--chunk", 64, "--sink", 0, "--window", 0, "--min-context", 0, "--json", out]

    def figures(*flags):
        run(cli, "run", "-m", demo_dir, "-p", prompt, *shared, *flags)
        return json.loads(out.read_text())

    few, many, every = (figures("--selector", selector, *flags) for flags in SELECTORS[selector])
    assert few["selector"] == selector
    assert 0 < few["density"] < many["density"] < every["density"] == 1
    assert every["answer"] == figures("--selector", "dense")["answer"]


def test_random_draws_other_pages_with_another_seed(cli, demo_dir, prompt, tmp_path):
    pictures = []
    for seed in (1, 1, 2):
        svg = tmp_path / "pages.svg"
        run(cli, "run", "-m", demo_dir, "-p", prompt, "--max-tokens", 1, "--page", 16, "--chunk", 64, "--min-context", 0,
            "--sink", 0, "--window", 0, "--selector", "random", "--share", 0.3, "--select-seed", seed, "--svg", svg)
        pictures.append(svg.read_text())
    assert pictures[0] == pictures[1] != pictures[2]


def test_prompt_from_stdin_and_any_bytes(cli, demo_dir):
    run(cli, "run", "-m", demo_dir, "-p", "-", "--max-tokens", 2, stdin=b"caf\xe9 \xff\xfe \x00 \xf0\x9f\x98")


def test_doctor(cli, demo_dir, tmp_path):
    out = tmp_path / "doctor.json"
    text = run(cli, "doctor", "-m", demo_dir, "--json", out)
    assert "backend cpu" in text and "backend cuda" in text
    assert json.loads(out.read_text())["model"]["architecture"] == "LlamaForCausalLM"


def test_bench_step_sums_its_stages_at_the_wanted_density(cli, tmp_path):
    out, svg = tmp_path / "step.json", tmp_path / "step.svg"
    run(cli, "bench", "step", "--backend", "cpu", "--context", "8192,4096", "--chunk", "512", "--density", "0.2",
        "--repeats", "1", "--threads", "2", "--json", out, "--svg", svg)
    figures = json.loads(out.read_text())
    stages = [figures[f"{stage}_seconds"] for stage in ("select", "unite", "attention")]
    assert all(seconds > 0 for seconds in stages) and figures["step_seconds"] == pytest.approx(sum(stages))
    assert figures["dense_seconds"] > 0 and figures["context"] == 8192
    assert figures["density"] == pytest.approx(0.2, rel=0.1)
    assert [row["name"] for row in figures["contexts"][0]["modes"]] == ["dense", "paper", "tile", "adaptive", "default policy"]
    # Against the context: four series of two points each, and no panel of densities.
    picture = svg.read_text()
    assert picture.count("<circle") == 8 and "times dense" in picture and "step, ms" not in picture


@pytest.mark.parametrize("flags, message", [
    (["--context", "512"], "holds no past"), (["--backend", "tpu"], "allowed: cpu, cuda"),
    (["--requests", "2"], "--requests is 2 with --backend cpu"),
    (["--q-heads", "7"], "a multiple of 2"), (["--json", "/nowhere/step.json"], "/nowhere/step.json")])
def test_bench_step_names_what_is_wrong(cli, flags, message):
    assert message in run(cli, "bench", "step", *flags, expect=2)


def test_bench_prefill_sets_selectors_beside_dense(cli, demo_dir, tmp_path):
    out = tmp_path / "prefill.json"
    run(cli, "bench", "prefill", "-m", demo_dir, "--backend", "cpu", "--context", "2048,1024", "--min-context", "0",
        "--selector", "dense,static,static:chunk=512", "--json", out)
    figures = json.loads(out.read_text())
    assert figures["backend"] == "cpu" and figures["shape"]["head_dim"] == 64
    assert [(row["context"], row["chunk"]) for row in figures["rows"]] == [
        (1024, 1024), (1024, 1024), (1024, 512), (2048, 1024), (2048, 1024), (2048, 512)]
    dense, static, alone = figures["rows"][3:]
    assert dense["density"] == 1 and dense["speedup_to_dense"] == 1 and dense["tflops"] > 0
    assert static["density"] < 1 and static["speedup_to_dense"] == pytest.approx(dense["ttft_seconds"] / static["ttft_seconds"])
    assert "speedup_to_dense" not in alone  # no dense run of its chunk size
    for row in figures["rows"]:
        assert 0 < row["attention_seconds"] < row["ttft_seconds"]


@pytest.mark.parametrize("flags, message", [
    ([], "weights come from one place"), (["-m", "X", "--random-weights", "Y"], "weights come from one place"),
    (["--backend", "cpu", "--random-weights", "Y"], "--backend cuda"), (["-m", "X", "--context", "0"], "--context"),
    (["-m", "/nowhere", "--backend", "cpu"], "/nowhere")])
def test_bench_prefill_names_what_is_wrong(cli, flags, message):
    assert message in run(cli, "bench", "prefill", *flags, expect=2)


def test_bench_attention_is_for_a_gpu(cli):
    assert "bench attention times: cuda" in run(cli, "bench", "attention", "--backend", "cpu", expect=2)


def test_bench_select_is_for_a_gpu(cli):
    assert "see bench step" in run(cli, "bench", "select", "--backend", "cpu", expect=2)


def test_demo_json_holds_both_runs(cli, demo_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was late, and the road was long. " * 700)
    out, svg = tmp_path / "demo.json", tmp_path / "demo.svg"
    printed = run(cli, "demo", "-m", demo_dir, "--text", text, "--tokens", 5000, "--json", out, "--svg", svg)
    figures = json.loads(out.read_text())
    assert figures["dense"]["density"] == 1 and figures["compact"]["density"] < 1
    assert len(figures["expected"]) == 7 and figures["expected"].isdigit()
    assert figures["dense"]["prompt_tokens"] == figures["compact"]["prompt_tokens"] > 4500
    assert "union inflation" in printed and "page of the fact asked for" in svg.read_text()


BAD_FLAGS = {
    "unknown selector": (["--selector", "magic"], "known: dense, static, "),
    "chunk of 0": (["--chunk", 0], "--chunk is 0"),
    "page no power of two": (["--page", 100], "allowed: 16, 32, 64, 128, 256"),
    "page too large": (["--page", 512], "allowed: 16, 32, 64, 128, 256"),
    "not a number": (["--chunk", "many"], "many"),
    "unknown flag": (["--turbo"], "turbo"),
    "unknown mode": (["--mode", "row"], "allowed: paper, span, tile, adaptive"),
    "span without its mode": (["--span", "64"], "--mode is adaptive and --span is 64"),
    "unknown backend": (["--backend", "tpu"], "allowed: cpu"),
    "unknown preset": (["--preset", "best"], "flashprefill-v1"),
    "unknown chat format": (["--chat", "irc"], "llama3"),
    "unknown kv type": (["--kv-dtype", "fp8"], "f32, bf16"),
    "two thresholds": (["--share", 0.1, "--alpha", 0.1], "one of them"),
    "negative sink": (["--sink", -1], "0 tokens or more"),
    "cache too small": (["--kv-pages", 1], "--kv-pages"),
    "heads per unit": (["--heads-per-unit", 3], "divisor"),
    "masks from nowhere": (["--selector", "external"], "SelectInput::external"),
    "share of random": (["--selector", "random", "--share", 2], "random: share is 2; allowed: 0 to 1"),
    "stride": (["--selector", "xattention", "--stride", 12], "stride is 12; allowed: a power of two"),
    "stride past the block": (["--selector", "xattention", "--stride", 32, "--page", 16, "--min-context", 0, "--chunk", 64],
                              "xattention: stride 32 and pages of 16 tokens"),
    "mass": (["--selector", "xattention", "--mass", -1], "mass is -1"),
    "picked queries": (["--selector", "quoka", "--picked-queries", 0], "picked_queries is 0"),
    "kept tokens": (["--selector", "quoka", "--kept-tokens", 0], "kept_tokens is 0"),
    "mass of cosines": (["--selector", "quoka", "--budget", "mass=0.5"], "any budget but a mass"),
    "score temperature": (["--selector", "sub-mean", "--score-temperature", 0], "sub-mean: temperature is 0"),
    "peak weight": (["--selector", "sub-mean", "--peak-weight", -1], "peak_weight is -1"),
    "coherence": (["--selector", "sub-mean", "--min-coherence", -1], "min_coherence is -1"),
    "probe stride": (["--selector", "sub-mean", "--probe-stride", -1], "probe_stride is -1"),
    "probe mass": (["--selector", "sub-mean", "--probe-mass", 0], "probe_mass is 0"),
    "temperature": (["--temperature", -1], "temperature is -1"),
    "json into nowhere": (["--json", "/no/such/place.json"], "/no/such/place.json"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flag_exits_2_with_a_named_error(cli, demo_dir, prompt, name):
    flags, text = BAD_FLAGS[name]
    assert text in run(cli, "run", "-m", demo_dir, "-p", prompt, *flags, expect=2)


def test_unreadable_prompt(cli, demo_dir, tmp_path):
    assert "missing.txt" in run(cli, "run", "-m", demo_dir, "-p", tmp_path / "missing.txt", expect=2)
    assert "directory" in run(cli, "run", "-m", demo_dir, "-p", tmp_path, expect=2)


def test_empty_prompt_is_its_begin_token_only(cli, demo_dir, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    run(cli, "run", "-m", demo_dir, "-p", tmp_path / "empty.txt", "--max-tokens", 1)


def test_prompt_longer_than_the_models_positions(cli, model, prompt):
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 64
    (model / "config.json").write_text(json.dumps(config))
    message = run(cli, "run", "-m", model, "-p", prompt, expect=2)
    assert "the model has 64 positions" in message and "shorter by" in message


def truncate_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_weights(model):
    (model / "model.safetensors").unlink()


def wrong_shape(model):
    config = json.loads((model / "config.json").read_text())
    config["intermediate_size"] += 1
    (model / "config.json").write_text(json.dumps(config))


def offsets_outside(model):
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])


def missing_shard(model):
    path = model / "model.safetensors"
    path.unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001.safetensors"}}))


def unknown_architecture(model):
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))


def unsupported_tokenizer(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "Unigram", "vocab": []}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def broken_json(model):
    (model / "config.json").write_text("{")


BAD_MODELS = {truncate_weights: "model.safetensors", remove_weights: "model.safetensors", wrong_shape: "mlp", offsets_outside: "offset",
              missing_shard: "model-00001.safetensors", unknown_architecture: "LlamaForCausalLM", unsupported_tokenizer: "Unigram",
              broken_json: "config.json"}


@pytest.mark.parametrize("damage", BAD_MODELS, ids=lambda damage: damage.__name__)
def test_bad_checkpoint_exits_2_and_writes_nothing(cli, model, prompt, tmp_path, damage):
    damage(model)
    out = tmp_path / "out.json"
    assert BAD_MODELS[damage] in run(cli, "run", "-m", model, "-p", prompt, "--json", out, expect=2)
    assert not out.exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_missing_model_directory(cli, prompt):
    assert "no/such/model" in run(cli, "run", "-m", "no/such/model", "-p", prompt, expect=2)
