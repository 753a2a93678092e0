"""`compact eval compare`, `perplexity` and `longbench`: tables that follow from the work files, runs that go on where they stopped, named
errors. On the shipped checkpoint with short prompts."""

import json
import math
import xml.etree.ElementTree

import pytest

from conftest import run

SMALL_PAGES = ["--page", 32, "--chunk", 256, "--sink", 32, "--window", 64, "--min-context", 0]


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(value):
    if isinstance(value, list):
        return [without_times(part) for part in value]
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if not key.endswith("_seconds") and key != "speedup"}
    return value


# ---- compare

COMPARE = ["--tasks", "niah_single_2,vt", "--lengths", 1100, "--samples", 2, "--densities", 0.25, 0.5, *SMALL_PAGES, "--selector",
           "random:budget=top={},static:window={},mean-key:budget=density={},mean-key:share=0.2"]


def compare(cli, demo_dir, *arguments, expect=0):
    return run(cli, "eval", "compare", "-m", demo_dir, "--essays", demo_dir / "haystack.txt", "--words", demo_dir / "words.txt", *arguments,
               expect=expect)


@pytest.fixture(scope="session")
def compared(cli, demo_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    files = {name: folder / f"out.{name}" for name in ("json", "md", "svg", "jsonl")}
    printed = compare(cli, demo_dir, *COMPARE, "--threads", 1, "--work", files["jsonl"], "--json", files["json"], "--markdown", files["md"],
                      "--svg", files["svg"])
    assert printed == files["md"].read_text()
    return {"json": json.loads(files["json"].read_text()), "markdown": printed, "work": files["jsonl"], "svg": files["svg"].read_text()}


def test_every_selector_is_fitted_to_every_density(compared):
    rows = compared["json"]["rows"]
    assert rows[0]["spec"] == "dense" and rows[0]["density"] == 1 and rows[0]["recall"] == pytest.approx(1, abs=1e-5)
    assert sum(row["target"] == 0 for row in rows) == 2  # dense, and the selector without a number to fit
    fitted = [row for row in rows if row["target"] > 0]
    assert len(fitted) == 3 * 2
    for row in fitted:
        # Whole pages of 32 among some 30: a density is met to a page or so, on the fitting prompts.
        assert row["fitted_density"] == pytest.approx(row["target"], rel=0.12), row["spec"]
        assert "{}" not in row["spec"] and row["spec"].startswith(row["selector"].split("{}")[0])
        assert row["union_inflation"] >= 1 and 0 < row["recall"] < 1 and row["vs_oracle"] <= 1 + 1e-6
    recall = {(row["selector"].split(":")[0], row["target"]): row["recall"] for row in fitted}
    for target in (0.25, 0.5):
        assert recall["mean-key", target] > recall["random", target], "a selector is worth its cost only above chance"


def test_rows_are_the_answers_summed_up(compared):
    lines = json_lines(compared["work"])[1:]
    answers = [line for line in lines if "kind" not in line]
    specs = {row["spec"] for row in compared["json"]["rows"]}
    assert {answer["selector"] for answer in answers} == specs and len(answers) == len(specs) * 2 * 2
    for row in compared["json"]["rows"]:
        mine = [answer for answer in answers if answer["selector"] == row["spec"]]
        assert row["accuracy"] == pytest.approx(100 * sum(answer["score"] for answer in mine) / len(mine))
        assert row["density"] == pytest.approx(sum(a["listed_row_pages"] for a in mine) / sum(a["visible_row_pages"] for a in mine))
        assert row["step_seconds"] > row["select_seconds"] >= 0
        for task in ("niah_single_2", "vt"):
            scores = [answer["score"] for answer in mine if answer["task"] == task]
            assert row["tasks"][task] == pytest.approx(100 * sum(scores) / len(scores))
    state = {row["spec"].split(":")[0]: row["state_bytes_per_token"] for row in compared["json"]["rows"]}
    assert state["mean-key"] > 50 * state["static"], "page means are kept for the selector that reads them, and only for it"


def test_equal_accuracy_is_the_least_density_as_good_as_dense(compared):
    rows = {(row["selector"], row["spec"]): row for row in compared["json"]["rows"]}
    entries = compared["json"]["equal_accuracy"]
    assert {entry["selector"] for entry in entries} == {selector for selector, _ in rows} - {"dense"}
    for entry in entries:
        good = [row for (selector, _), row in rows.items() if selector == entry["selector"] and row["difference"] >= -1]
        assert ("spec" in entry) == bool(good)
        if good:
            assert entry["density"] == min(row["density"] for row in good)


def test_picture_is_well_formed(compared):
    root = xml.etree.ElementTree.fromstring(compared["svg"])
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    # A dot for each setting in both panels; dense has one in that of time.
    assert len(titles) == 2 * (len(compared["json"]["rows"]) - 1) + 1


def test_resumed_and_merged_runs_say_the_same(cli, demo_dir, compared, tmp_path):
    fits = tmp_path / "fits.jsonl"
    printed = compare(cli, demo_dir, *[0 if part == 2 else part for part in COMPARE], "--work", fits, "--svg", tmp_path / "recall.svg")
    assert "RULER |" in printed and "equal accuracy" not in printed
    assert all(line["kind"] == "setting" for line in json_lines(fits)[1:])
    shards = []
    for shard in range(2):  # each goes on from the fits
        shards.append(tmp_path / f"{shard}.jsonl")
        shards[-1].write_bytes(fits.read_bytes())
        compare(cli, demo_dir, *COMPARE, "--work", shards[-1], "--resume", "--shard", f"{shard}/2")
        assert shards[-1].read_bytes().startswith(fits.read_bytes())
    out = tmp_path / "out.json"
    run(cli, "eval", "merge", *shards, "--json", out, "--svg", tmp_path / "out.svg")
    merged = json.loads(out.read_text())
    order = lambda report: sorted((without_times(row) for row in report["rows"]), key=lambda row: row["spec"])
    assert order(merged) == order(compared["json"]) and merged["digest"] == compared["json"]["digest"]


def test_calibrations_are_named_by_the_density_that_they_are_for(cli, demo_dir, tmp_path):
    texts = ["--essays", demo_dir / "haystack.txt", "--words", demo_dir / "words.txt"]
    for density in (0.25, 0.5):
        run(cli, "calibrate", "-m", demo_dir, *texts, "--tasks", "vt", "--lengths", 1100, "--page", 32, "--chunk", 256, "--sink", 32, "--window", 64,
            "--target", f"density={density}", "-o", tmp_path / f"fit_{density}.json")
    small = COMPARE[:COMPARE.index("--selector")]
    compare(cli, demo_dir, *[0 if part == 2 else part for part in small], "--selector", f"mean-key:calibration={tmp_path}/fit_{{}}.json",
            "--json", tmp_path / "out.json")
    dense, quarter, half = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert quarter["spec"].endswith("fit_0.25.json") and half["spec"].endswith("fit_0.5.json") and quarter["selector"] == half["selector"]
    assert quarter["density"] < half["density"] < 1 and quarter["recall"] < half["recall"]


BAD_COMPARE = {
    "two numbers": (["--selector", "mean-key:share={}:lift={}"], "{} stands for the one number"),
    "a name": (["--selector", "{}"], "{} stands for the one number"),
    "unknown selector": (["--selector", "magic:share={}"], "known: dense"),
    "pages of its own": (["--selector", "mean-key:page=64"], "must be the same for all"),
    "density of 1": (["--densities", 1], "--densities: 1"),
    "tolerance": (["--tolerance", -1], "--tolerance is -1"),
    "fit task": (["--fit-tasks", "magic"], "magic"),
    "svg into nowhere": (["--svg", "/no/such/out.svg"], "/no/such/out.svg"),
}


@pytest.mark.parametrize("name", BAD_COMPARE)
def test_bad_compare_flag(cli, demo_dir, name):
    flags, text = BAD_COMPARE[name]
    assert text in compare(cli, demo_dir, *flags, expect=2)


# ---- perplexity

PERPLEXITY = ["--lengths", 700, "--samples", 2, "--bucket", 256, *SMALL_PAGES]


def perplexity(cli, demo_dir, *arguments, expect=0):
    return run(cli, "eval", "perplexity", "-m", demo_dir, "--text", demo_dir / "haystack.txt", *PERPLEXITY, *arguments, expect=expect)


@pytest.fixture(scope="session")
def losses(cli, demo_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    printed = perplexity(cli, demo_dir, "--selector", "dense,static,mean-key:share=0", "--work", folder / "work.jsonl", "--json", folder / "out.json")
    return {"json": json.loads((folder / "out.json").read_text()), "work": folder / "work.jsonl", "markdown": printed}


def test_perplexity_is_that_of_the_windows(losses):
    lines = json_lines(losses["work"])[1:]
    assert len(lines) == 3 * 2
    by_selector = {row["selector"]: row for row in losses["json"]["rows"]}
    for selector, row in by_selector.items():
        mine = [bucket for line in lines if line["selector"] == selector for bucket in line["buckets"]]
        tokens, nll = sum(b["tokens"] for b in mine), sum(b["nll"] for b in mine)
        assert tokens == row["predicted_tokens"] == 2 * 699  # all of a window but its first
        assert row["perplexity"] == pytest.approx(math.exp(nll / tokens))
        assert [b["begin"] for b in row["buckets"]] == [0, 256, 512]
    dense, static, keep_all = (by_selector[name] for name in ("dense", "static", "mean-key:share=0"))
    assert dense["ratio_to_dense"] == 1 and keep_all["density"] == 1
    assert keep_all["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5), "all pages kept: dense to rounding"
    assert static["density"] < 0.5 and static["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-4)
    # The first chunk has no past: nothing is selected there.
    assert static["buckets"][0]["perplexity"] == pytest.approx(dense["buckets"][0]["perplexity"], rel=1e-5)


def test_perplexity_of_chunks_of_another_size_is_the_same_when_dense(cli, demo_dir, losses, tmp_path):
    perplexity(cli, demo_dir, "--selector", "dense:chunk=100", "--json", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["perplexity"] == pytest.approx(losses["json"]["rows"][0]["perplexity"], rel=1e-5)


def test_perplexity_goes_on_and_merges(cli, demo_dir, losses, tmp_path):
    shards = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for shard, work in enumerate(shards):
        perplexity(cli, demo_dir, "--selector", "dense", "--shard", f"{shard}/2", "--work", work)
        perplexity(cli, demo_dir, "--selector", "dense,static,mean-key:share=0", "--shard", f"{shard}/2", "--work", work, "--resume")
    run(cli, "eval", "merge", *shards, "--json", tmp_path / "out.json")
    assert without_times(json.loads((tmp_path / "out.json").read_text())) == without_times(losses["json"])
    assert "--svg" in run(cli, "eval", "merge", *shards, "--svg", tmp_path / "out.svg", expect=2)


BAD_PERPLEXITY = {
    "text too short": (["--lengths", 10**6], "allowed: 1 to 0"),
    "length": (["--lengths", 1], "length is 1 tokens"),
    "bucket": (["--bucket", 0], "--bucket is 0"),
    "missing text": (["--text", "no/such/text.txt"], "no/such/text.txt"),
}


@pytest.mark.parametrize("name", BAD_PERPLEXITY)
def test_bad_perplexity_flag(cli, demo_dir, name):
    flags, text = BAD_PERPLEXITY[name]
    base = ["--text", demo_dir / "haystack.txt"] if "--text" not in flags else []
    assert text in run(cli, "eval", "perplexity", "-m", demo_dir, *base, *flags, expect=2)


# ---- LongBench v2

def longbench_entry(number, context):
    return {"_id": f"q{number}", "domain": "d", "sub_domain": "s", "difficulty": ["easy", "hard"][number % 2], "length": ["short", "medium", "long"][number % 3],
            "question": f"Question {number}?", "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four",
            "answer": "ABCD"[number % 4], "context": context}


@pytest.fixture(scope="session")
def longbench_file(demo_dir, tmp_path_factory):
    text = (demo_dir / "haystack.txt").read_text()
    path = tmp_path_factory.mktemp("longbench") / "data.json"
    path.write_text(json.dumps([longbench_entry(i, text[:1500 * (i + 1)]) for i in range(4)]))
    return path


def test_longbench_by_class(cli, demo_dir, longbench_file, tmp_path):
    command = ["eval", "longbench", "-m", demo_dir, "--data", longbench_file, "--max-prompt", 600, "--selector", "dense,static", *SMALL_PAGES]
    run(cli, *command, "--samples", 3, "--work", tmp_path / "work.jsonl")
    run(cli, *command, "--work", tmp_path / "work.jsonl", "--resume", "--json", tmp_path / "out.json")
    records = json_lines(tmp_path / "work.jsonl")[1:]
    assert len(records) == 4 * 2 and max(record["prompt_tokens"] for record in records) == 600, "the longest is cut to fit"
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    samples = {row["task"]: row["samples"] for row in rows if row["selector"] == "dense"}
    assert samples == {"all": 4, "easy": 2, "hard": 2, "short": 2, "medium": 1, "long": 1}
    for row in rows:
        mine = [r for r in records if r["selector"] == row["selector"] and (row["task"] == "all" or row["task"] in r["task"].split())]
        assert row["accuracy"] == pytest.approx(100 * sum(r["score"] for r in mine) / len(mine))
    run(cli, "eval", "merge", tmp_path / "work.jsonl", "--json", tmp_path / "merged.json")
    assert json.loads((tmp_path / "merged.json").read_text())["rows"] == rows


def damaged(**changes):
    entry = {**longbench_entry(0, "text"), **changes}
    return json.dumps([longbench_entry(1, "text"), {key: value for key, value in entry.items() if value is not None}])


BAD_LONGBENCH = {
    "not JSON": ("{", "not as in LongBench v2"),
    "no list": ('{"data": []}', "no list of questions"),
    "empty": ("[]", "no list of questions"),
    "a number": ("[1]", "entry 0: no object"),
    "no question": (damaged(question=None), "entry 1: question is no text"),
    "a choice of numbers": (damaged(choice_C=3), "entry 1: choice_C is no text"),
    "answer outside": (damaged(answer="E"), "entry 1: answer is 'E'\n  allowed: A, B, C, D"),
    "difficulty": (damaged(difficulty="odd"), "difficulty is 'odd'\n  allowed: easy, hard"),
    "length class": (damaged(length="huge"), "allowed: short, medium, long"),
}


@pytest.mark.parametrize("name", BAD_LONGBENCH)
def test_bad_longbench_file(cli, demo_dir, tmp_path, name):
    content, text = BAD_LONGBENCH[name]
    (tmp_path / "data.json").write_text(content)
    message = run(cli, "eval", "longbench", "-m", demo_dir, "--data", tmp_path / "data.json", expect=2)
    assert text in message and "data.json" in message


def test_bad_longbench_flag(cli, demo_dir, longbench_file):
    command = ["eval", "longbench", "-m", demo_dir, "--data", longbench_file]
    assert "--samples is 9" in run(cli, *command, "--samples", 9, expect=2)
    assert "--max-prompt is -1" in run(cli, *command, "--max-prompt", -1, expect=2)
    assert "no/such.json" in run(cli, "eval", "longbench", "-m", demo_dir, "--data", "no/such.json", expect=2)
