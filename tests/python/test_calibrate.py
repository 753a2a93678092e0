"""`compact calibrate`, what loads its files, and the gates of the selector seer: on the shipped checkpoint with short prompts."""

import importlib.util
import json
import pathlib

import numpy
import pytest
from safetensors.numpy import save_file

from conftest import ROOT, run

SMALL_PAGES = ["--page", 32, "--chunk", 256, "--sink", 32, "--window", 64]


def text_of(demo_dir, begin, characters=9000):
    return (demo_dir / "haystack.txt").read_text()[begin:begin + characters]


@pytest.fixture(scope="session")
def prompts(demo_dir, tmp_path_factory):
    """A folder to fit on, and prompts that the fit has not seen."""
    folder = tmp_path_factory.mktemp("prompts")
    held_out = tmp_path_factory.mktemp("held_out")
    for i in range(2):
        (folder / f"{i}.txt").write_text(text_of(demo_dir, 9000 * i))
        (held_out / f"{i}.txt").write_text(text_of(demo_dir, 40000 + 9000 * i))
    return {"fit": folder, "held_out": sorted(held_out.iterdir())}


def calibrate(cli, demo_dir, prompts, output, *arguments, expect=0):
    return run(cli, "calibrate", "-m", demo_dir, "--prompts", prompts["fit"], *SMALL_PAGES, "-o", output, *arguments, expect=expect)


@pytest.fixture(scope="session")
def calibration(cli, demo_dir, prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("calibration") / "mean_key.json"
    printed = calibrate(cli, demo_dir, prompts, output, "--target", "density=0.3", "--threads", 1)
    return {"file": output, "json": json.loads(output.read_text()), "printed": printed}


def recall_of(cli, demo_dir, files, selectors, out, *arguments):
    run(cli, "eval", "recall", "-m", demo_dir, "-p", *files, *(arguments or SMALL_PAGES), "--selector", *selectors, "--json", out)
    sums = {}
    for group in json.loads(out.read_text())["groups"]:
        for selector in group["selectors"]:
            sums.setdefault(selector["selector"], []).append(selector)
    return {name: {key: sum(s[key] for s in all_of) / len(all_of) for key in ("recall", "density")} for name, all_of in sums.items()}


def test_the_file_says_what_it_is_for(calibration):
    file = calibration["json"]
    assert file["format"] == "compact calibration 1" and file["selector"] == "mean-key" and file["page_tokens"] == 32
    assert file["fitted"]["prompts"] == 2 and file["fitted"]["target"] == "density=0.3"
    assert file["fitted"]["density"] == pytest.approx(0.3, rel=0.15), "after the union"
    heads = [head for layer in file["layers"] for head in layer["heads"]]
    assert len(file["layers"]) == 4 and len(heads) == 4 * 2  # two KV heads share a row each
    assert len({head["value"] for head in heads}) > 1, "heads differ: that is what a table is for"
    assert all(0 < head["density"] <= 1 and 0 < head["mass"] <= 1 for head in heads)
    assert "one value for all" in calibration["printed"]


def test_heads_of_their_own_thresholds_read_no_worse_than_one_threshold(cli, demo_dir, prompts, calibration, tmp_path):
    """On prompts that the fit has not seen, against single thresholds on both sides of its density."""
    thresholds = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.45]
    singles = [f"mean-key:budget=threshold={value}" for value in thresholds]
    fitted = f"mean-key:calibration={calibration['file']}"
    figures = recall_of(cli, demo_dir, prompts["held_out"], [fitted, *singles], tmp_path / "out.json")
    curve = sorted((figures[name]["density"], figures[name]["recall"]) for name in singles)
    densities, recalls = zip(*curve)
    own = figures[fitted]
    assert densities[0] < own["density"] < densities[-1]
    assert own["recall"] >= numpy.interp(own["density"], densities, recalls) - 0.002


@pytest.mark.parametrize("rule", ["threshold", "top", "mass"])
def test_mass_is_kept_by_every_head(cli, demo_dir, prompts, tmp_path, rule):
    calibrate(cli, demo_dir, prompts, tmp_path / "out.json", "--target", "mass=0.9", "--selector", "sub-mean", "--rule", rule)
    file = json.loads((tmp_path / "out.json").read_text())
    assert file["selector"] == "sub-mean" and file["budget"] == rule
    assert all(head["mass"] >= 0.9 for layer in file["layers"] for head in layer["heads"])
    assert file["fitted"]["recall"] >= 0.9


def test_threads_do_not_change_the_fit(cli, demo_dir, prompts, calibration, tmp_path):
    calibrate(cli, demo_dir, prompts, tmp_path / "out.json", "--target", "density=0.3", "--threads", 3)
    assert json.loads((tmp_path / "out.json").read_text()) == calibration["json"]


def test_run_and_eval_load_it(cli, demo_dir, prompts, calibration, tmp_path):
    command = ["run", "-m", demo_dir, "-p", prompts["held_out"][0], *SMALL_PAGES, "--min-context", 0, "--max-tokens", 1]
    run(cli, *command, "--json", tmp_path / "one.json")
    run(cli, *command, "--calibration", calibration["file"], "--json", tmp_path / "own.json")
    one, own = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "own"))
    assert own["density"] != one["density"] and own["density"] == pytest.approx(0.3, rel=0.35)
    work = tmp_path / "work.jsonl"
    run(cli, "eval", "ruler", "-m", demo_dir, "--tasks", "vt", "--lengths", 1100, "--samples", 1, *SMALL_PAGES, "--selector", "mean-key",
        "--calibration", calibration["file"], "--work", work, cwd=ROOT)
    options = json.loads(work.read_text().splitlines()[0])["configuration"]["options"]
    assert len(options["calibration"]) == 16, "known by its content, not by its name"


def damaged(file, change):
    json_file = json.loads(json.dumps(file))
    change(json_file)
    return json.dumps(json_file)


BAD_CALIBRATION = {
    "not JSON": (lambda file: "{", [], "bad.json"),
    "another format": (lambda file: damaged(file, lambda j: j.update(format="x")), [], "format is"),
    "another checkpoint": (lambda file: damaged(file, lambda j: j.update(model="0123")), [], "fitted on checkpoint 0123"),
    "unknown selector": (lambda file: damaged(file, lambda j: j.update(selector="magic")), [], "known: dense"),
    "another selector": (lambda file: json.dumps(file), ["--selector", "sub-mean"], "fitted with --selector mean-key"),
    "another page": (lambda file: json.dumps(file), ["--page", 64], "fitted with --page 32; here it is 64"),
    "other scores": (lambda file: json.dumps(file), ["--vote", "mean"], "fitted with --vote"),
    "a budget": (lambda file: json.dumps(file), ["--budget", "top=0.1"], "brings the budget of every head"),
    "a share": (lambda file: json.dumps(file), ["--share", 0.1], "brings the budget of every head"),
    "a layer less": (lambda file: damaged(file, lambda j: j["layers"].pop()), [], "3 layers x 2 heads\n  allowed: 4 layers"),
    "a head less": (lambda file: damaged(file, lambda j: j["layers"][1]["heads"].pop()), [], "the same number for all"),
    "too many heads": (lambda file: damaged(file, lambda j: [layer["heads"].append(layer["heads"][0]) for layer in j["layers"]]), [],
                       "4 layers x 3 heads"),
    "another budget": (lambda file: damaged(file, lambda j: j.update(budget="best")), [], "allowed: threshold, top, mass"),
    "no layers": (lambda file: damaged(file, lambda j: j.update(layers=[])), [], "no layers"),
    "a threshold of text": (lambda file: damaged(file, lambda j: j["layers"][0]["heads"][0].update(value="x")), [],
                            "not a file of compact calibrate"),
    "a negative threshold": (lambda file: damaged(file, lambda j: j["layers"][0]["heads"][0].update(value=-1)), [], "a value is -1"),
}


@pytest.mark.parametrize("name", BAD_CALIBRATION)
def test_bad_calibration(cli, demo_dir, prompts, calibration, tmp_path, name):
    damage, flags, text = BAD_CALIBRATION[name]
    (tmp_path / "bad.json").write_text(damage(calibration["json"]))
    pages = SMALL_PAGES if "--page" not in flags else SMALL_PAGES[2:]
    assert text in run(cli, "run", "-m", demo_dir, "-p", prompts["held_out"][0], *pages, "--calibration", tmp_path / "bad.json", *flags, expect=2)


BAD_CALIBRATE = {
    "rule": (["--rule", "density"], "allowed: threshold, top, mass"),
    "target": (["--target", "speed=2"], "--target is 'speed=2'"),
    "target of 1": (["--target", "density=1"], "above 0, below 1"),
    "no scores": (["--selector", "static"], "has no scores"),
    "a threshold of its own": (["--selector", "mean-key:share=0.1"], "calibrate finds the budget of every head"),
    "prompts too short": (["--chunk", 100000], "nothing to choose from"),
    "output into nowhere": (["-o", "/no/such/out.json"], "/no/such/out.json"),
    "missing prompts": (["--prompts", "no/such/prompt.txt"], "no/such/prompt.txt"),
}


@pytest.mark.parametrize("name", BAD_CALIBRATE)
def test_bad_calibrate_flag(cli, demo_dir, prompts, tmp_path, name):
    flags, text = BAD_CALIBRATE[name]
    base = {"--prompts": prompts["fit"], "-o": tmp_path / "out.json", "--page": 32}
    given = [part for flag, value in base.items() if flag not in flags for part in (flag, value)]
    assert text in run(cli, "calibrate", "-m", demo_dir, *given, *flags, expect=2)


# ---- gates

HEADS, KV_HEADS, DIM, LAYERS = 8, 2, 64, 4  # of the shipped checkpoint


def gate_maps(layout="single"):
    """Untrained gates: the mean key as it is, and where queries are mapped, their mean over the heads."""
    mean = numpy.concatenate([numpy.zeros((2 * DIM, DIM)), numpy.eye(DIM)]).astype(numpy.float32)
    maps = {}
    for n in range(LAYERS):
        name = f"model.layers.{n}.self_attn.attn_gate"
        maps[f"{name}.mask_linear_k.weight"] = numpy.stack([mean] * (HEADS if layout == "single" else KV_HEADS))
        if layout == "group":
            group = HEADS // KV_HEADS
            query = numpy.concatenate([numpy.eye(DIM)] * group).astype(numpy.float32) / group
            maps[f"{name}.mask_linear_q.weight"] = numpy.stack([query] * KV_HEADS)
        if layout == "double":
            maps[f"{name}.mask_linear_q.weight"] = numpy.stack([numpy.eye(DIM, dtype=numpy.float32)] * HEADS)
    return maps


GATE_PAGES = ["--page", 64, "--chunk", 256, "--sink", 64, "--window", 64]


@pytest.fixture(scope="session")
def gate_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    for layout in ("single", "double", "group"):
        save_file(gate_maps(layout), folder / f"{layout}.safetensors")
    return folder


def test_gates_choose_better_than_chance(cli, demo_dir, prompts, gate_files, tmp_path):
    spec = {layout: f"seer:gates={gate_files / layout}.safetensors:budget=density=0.35" for layout in ("single", "double", "group")}
    figures = recall_of(cli, demo_dir, prompts["held_out"], [*spec.values(), "random:budget=top=0.35"], tmp_path / "out.json", *GATE_PAGES)
    chance = figures["random:budget=top=0.35"]
    for layout in spec:
        assert figures[spec[layout]]["recall"] > chance["recall"], layout
    # Maps of the same numbers: queries as they are, and key maps that are equal anyway.
    assert figures[spec["single"]] == pytest.approx(figures[spec["double"]], rel=1e-4)


def test_gates_that_keep_all_are_dense(cli, demo_dir, gate_files, tmp_path):
    run(cli, "eval", "perplexity", "-m", demo_dir, "--text", demo_dir / "haystack.txt", "--lengths", 700, "--samples", 1, "--min-context", 0,
        *GATE_PAGES, "--selector", f"dense,seer:gates={gate_files}/single.safetensors:gate-threshold=0,"
        f"seer:gates={gate_files}/single.safetensors:gate-threshold=0.2", "--json", tmp_path / "out.json")
    dense, all_pages, few = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert all_pages["density"] == 1 and all_pages["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert few["density"] < 0.9 and few["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-5)


def without(maps, name):
    return {key: value for key, value in maps.items() if key != name}


K3 = "model.layers.3.self_attn.attn_gate.mask_linear_k.weight"
Q3 = K3.replace("_k", "_q")
BAD_GATES = {
    "a layer missing": (lambda: without(gate_maps(), K3), [], "tensor " + K3 + " is missing"),
    "another shape": (lambda: {**gate_maps(), K3: numpy.zeros((HEADS, DIM, DIM), numpy.float32)}, [], "allowed: [8, 192, 64]"),
    "another type": (lambda: {**gate_maps(), K3: gate_maps()[K3].astype(numpy.int32)}, [], "is I32"),
    "query maps in some layers": (lambda: without(gate_maps("group"), Q3), [], "in every layer, or in none"),
    "two layouts": (lambda: {**gate_maps("group"), Q3: gate_maps("double")[Q3]}, [], "allowed: [2, 256, 64]"),
    "small pages": (gate_maps, ["--page", 32], "a multiple of 64"),
    "for another selector": (gate_maps, ["--selector", "mean-key"], "--gates is for the selector seer"),
    "no gates": (gate_maps, ["--gates", ""], "seer without gates"),
}


@pytest.mark.parametrize("name", BAD_GATES)
def test_bad_gates(cli, demo_dir, prompts, tmp_path, name):
    make, flags, text = BAD_GATES[name]
    save_file(make(), tmp_path / "gates.safetensors")
    base = {"--selector": "seer", "--gates": tmp_path / "gates.safetensors", "--page": 64}
    given = [part for flag, value in base.items() if flag not in flags for part in (flag, value)]
    flags = [] if flags == ["--gates", ""] else flags
    given = [part for part in given if name != "no gates" or part not in ("--gates", tmp_path / "gates.safetensors")]
    assert text in run(cli, "run", "-m", demo_dir, "-p", prompts["held_out"][0], *given, *flags, expect=2)


def load_converter():
    spec = importlib.util.spec_from_file_location("convert_gates", ROOT / "tools" / "convert_gates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_converter_renames_and_refuses():
    converter = load_converter()
    published = {name.replace("model.", "base.model.", 1): value for name, value in gate_maps("group").items()}
    renamed = converter.renamed(published)
    assert set(renamed) == set(gate_maps("group")) and converter.check_layers(renamed, 0) == converter.check_layers(renamed, 4) == LAYERS
    for tensors, text in (({**published, "model.norm.weight": published[next(iter(published))]}, "no gate weights: model.norm.weight"),
                          ({next(iter(published)): numpy.zeros((2, 2))}, "allowed: [heads, inputs, outputs]")):
        with pytest.raises(ValueError, match=text.replace("[", r"\[").replace("]", r"\]")):
            converter.renamed(tensors)
    for layers, tensors, text in ((5, renamed, "missing"), (0, without(renamed, K3.replace("3", "1")), "missing"), (0, without(renamed, Q3), "in some layers"),
                                  (0, {}, "0 layers")):
        with pytest.raises(ValueError, match=text):
            converter.check_layers(tensors, layers)
