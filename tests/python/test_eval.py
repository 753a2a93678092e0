"""`compact eval`: prompts against a second implementation of RULER, answers that do not depend on threads, shards or interruptions,
and what bad input gets."""

import json
import os
import signal
import subprocess
import time

import pytest
from tokenizers import Tokenizer

import ruler
from conftest import run

# A model of 128-token pages and 32K tokens answers short prompts densely; so small pages and chunks, and no crossover.
SPARSE = ["--page", 32, "--chunk", 256, "--sink", 32, "--window", 64, "--min-context", 0]


def ruler_command(demo_dir, *arguments):
    texts = {"--essays": demo_dir / "haystack.txt", "--words": demo_dir / "words.txt"}
    given = [part for flag, file in texts.items() if flag not in arguments for part in (flag, file)]
    return ["eval", "ruler", "-m", demo_dir, *given, *arguments]


def eval_ruler(cli, demo_dir, *arguments, expect=0):
    return run(cli, *ruler_command(demo_dir, *arguments), expect=expect)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(records):
    """Records without what differs from run to run, in an order of their own."""
    kept = [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in records]
    return sorted(kept, key=lambda record: (record["tokens"], record["task"], record["sample"], record["selector"]))


# ---- prompts

def sentence(stream, words=20):
    return " ".join(f"w{stream.below(5000)}" for _ in range(words)).capitalize() + "."


@pytest.fixture(scope="session")
def question_files(tmp_path_factory):
    """Made-up files in the forms of SQuAD 2.0 and HotpotQA: few documents, so that long prompts repeat them."""
    draws, folder = ruler.Stream("questions"), tmp_path_factory.mktemp("questions")
    squad = {"version": "v2.0", "data": [
        {"title": f"Article {a}", "paragraphs": [
            {"context": f"Paragraph {a}.{p} \u00e9: " + " ".join(sentence(draws) for _ in range(4)), "qas": [
                {"question": f"What does paragraph {a}.{p} say?", "id": "x", "is_impossible": q == 1,
                 "answers": [] if q == 1 else [{"text": f"answer {a}.{p}", "answer_start": 0}, {"text": f"ANSWER {a}.{p}!", "answer_start": 0}]}
                for q in range(2)]}
            for p in range(6)]}
        for a in range(3)]}
    titles = [[f"Title {i}", [sentence(draws), " " + sentence(draws)]] for i in range(30)]
    hotpot = [{"_id": "x", "question": f"Which title follows {i}?", "answer": f"Title {i + 1}",
               "context": [titles[j] for j in draws.sample(30, 5)]} for i in range(6)]
    for name, data in {"squad.json": squad, "hotpot.json": hotpot}.items():
        (folder / name).write_text(json.dumps(data))
    return {"qa_1": folder / "squad.json", "qa_2": folder / "hotpot.json"}


@pytest.fixture(scope="session")
def twin(demo_dir, question_files):
    tokenizer = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    twin = ruler.Ruler((demo_dir / "haystack.txt").read_text(), (demo_dir / "words.txt").read_text().split(),
                       lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
                       questions={"qa_1": ruler.read_squad(json.loads(question_files["qa_1"].read_text())),
                                  "qa_2": ruler.read_hotpot(json.loads(question_files["qa_2"].read_text()))})
    twin.tokenizer = tokenizer
    return twin


@pytest.mark.parametrize("task", ruler.GENERATE)
def test_prompts_are_rulers(cli, demo_dir, twin, question_files, tmp_path, task):
    out = tmp_path / "prompts.jsonl"
    eval_ruler(cli, demo_dir, "--tasks", task, "--lengths", 1500, 4096, "--samples", 3, "--prompts", out,
               "--qa-1", question_files["qa_1"], "--qa-2", question_files["qa_2"])
    prompts = json_lines(out)
    assert [(line["tokens"], line["sample"]) for line in prompts] == [(n, i) for n in (1500, 4096) for i in range(3)]
    for line in prompts:
        place = f"{task}, {line['tokens']} tokens, sample {line['sample']}, {line['haystack_units']} units"
        prompt, prefix, answers = twin.build(task, line["tokens"], line["sample"], line["haystack_units"])
        assert line["prompt"] == prompt, place
        assert line["answer_prefix"] == prefix, place
        assert line["answers"] == answers, place
        assert line["generate_tokens"] == ruler.GENERATE[task]
        # The haystack is the largest that fits.
        room = line["tokens"] - line["generate_tokens"]
        assert line["prompt_tokens"] == len(twin.tokenizer.encode(prompt + prefix).ids) <= room, place
        more, prefix, _ = twin.build(task, line["tokens"], line["sample"], line["haystack_units"] + 1)
        assert len(twin.tokenizer.encode(more + prefix).ids) > room, place


def test_every_answer_is_in_its_prompt_and_samples_differ(cli, demo_dir, tmp_path):
    out = tmp_path / "prompts.jsonl"
    eval_ruler(cli, demo_dir, "--tasks", "generated", "--lengths", 2048, "--samples", 4, "--prompts", out)
    prompts = json_lines(out)
    assert {line["task"] for line in prompts} == set(ruler.GENERATE) - {"qa_1", "qa_2"}
    for line in prompts:
        assert all(answer in line["prompt"] for answer in line["answers"]), line["task"]
    assert len({line["prompt"] for line in prompts}) == len(prompts)


def test_a_sample_does_not_depend_on_what_else_is_asked(cli, demo_dir, tmp_path):
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    eval_ruler(cli, demo_dir, "--tasks", "vt", "--lengths", 2048, "--samples", 5, "--shard", "3/4", "--prompts", one)
    eval_ruler(cli, demo_dir, "--tasks", "niah_single_2,vt", "--lengths", 1024, 2048, "--samples", 6, "--prompts", many)
    wanted = [line for line in json_lines(many) if (line["task"], line["tokens"], line["sample"]) == ("vt", 2048, 3)]
    assert json_lines(one) == wanted and len(wanted) == 1
    eval_ruler(cli, demo_dir, "--tasks", "vt", "--lengths", 2048, "--samples", 5, "--shard", "3/4", "--seed", 7, "--prompts", one)
    assert json_lines(one)[0]["prompt"] != wanted[0]["prompt"]


# ---- answers

QUESTIONS = ["--tasks", "niah_single_2,vt", "--lengths", 1100, "--samples", 4, "--selector", "dense,mean-key:share=0.2", *SPARSE]


@pytest.fixture(scope="session")
def whole(cli, demo_dir, tmp_path_factory):
    """One run of everything, on one thread."""
    folder = tmp_path_factory.mktemp("whole")
    work, out, table = folder / "work.jsonl", folder / "out.json", folder / "out.md"
    printed = eval_ruler(cli, demo_dir, *QUESTIONS, "--threads", 1, "--work", work, "--json", out, "--markdown", table)
    assert printed == table.read_text()
    return {"work": work, "records": json_lines(work)[1:], "json": json.loads(out.read_text()), "markdown": printed}


def test_scores_are_rulers(whole):
    assert len(whole["records"]) == 2 * 4 * 2
    for record in whole["records"]:
        found = [answer.lower() in record["output"].lower() for answer in record["answers"]]
        assert record["score"] == sum(found) / len(found)
        assert record["tokens"] == 1100 and record["prompt_tokens"] + (30 if record["task"] == "vt" else 128) <= 1100
        assert 0 < record["attention_seconds"] < record["ttft_seconds"]
        visible, listed, wanted = (record[f"{name}_row_pages"] for name in ("visible", "listed", "wanted"))
        assert (listed == visible) if record["selector"] == "dense" else (0 < wanted <= listed < visible)
    scores = {selector: sum(r["score"] for r in whole["records"] if r["selector"] == selector and r["task"] == "niah_single_2")
              for selector in ("dense", "mean-key:share=0.2")}
    assert scores["dense"] > 0, "the shipped checkpoint finds needles: without one found, nothing here is tested"


def test_rows_are_the_records_summed_up(whole):
    for row in whole["json"]["rows"]:
        mine = [r for r in whole["records"] if r["selector"] == row["selector"] and row["task"] in (r["task"], "mean of 2 tasks")]
        assert row["samples"] == len(mine)
        assert row["accuracy"] == pytest.approx(100 * sum(r["score"] for r in mine) / len(mine))
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        listed, wanted, visible = (sum(r[f"{name}_row_pages"] for r in mine) for name in ("listed", "wanted", "visible"))
        assert row["density"] == pytest.approx(listed / visible)
        assert row["union_inflation"] == pytest.approx(listed / wanted)
        assert row["ttft_seconds"] == pytest.approx(sum(r["ttft_seconds"] for r in mine) / len(mine))
        if row["selector"] == "dense":
            assert "difference" not in row
        else:
            dense = {(r["task"], r["sample"]): r["score"] for r in whole["records"] if r["selector"] == "dense"}
            difference = sum(r["score"] - dense[r["task"], r["sample"]] for r in mine) / len(mine)
            assert row["difference"] == pytest.approx(100 * difference)
            assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert len(whole["json"]["rows"]) == 6
    assert sum(line.startswith("| 1,100 |") for line in whole["markdown"].splitlines()) == 6


def test_same_answers_on_more_threads(cli, demo_dir, whole, tmp_path):
    work = tmp_path / "work.jsonl"
    eval_ruler(cli, demo_dir, *QUESTIONS, "--threads", 3, "--work", work)
    assert untimed(json_lines(work)[1:]) == untimed(whole["records"])


def test_shards_merge_into_the_whole(cli, demo_dir, whole, tmp_path):
    shards = []
    for shard in range(3):
        shards.append(tmp_path / f"{shard}.jsonl")
        eval_ruler(cli, demo_dir, *QUESTIONS, "--shard", f"{shard}/3", "--work", shards[-1])
    assert untimed(record for shard in shards for record in json_lines(shard)[1:]) == untimed(whole["records"])
    out = tmp_path / "merged.json"
    run(cli, "eval", "merge", *reversed(shards), "--json", out)
    merged = json.loads(out.read_text())
    assert merged["digest"] == whole["json"]["digest"] and merged["configuration"] == whole["json"]["configuration"]
    rows = lambda report: sorted((untimed_row(row) for row in report["rows"]), key=lambda row: (row["task"], row["selector"]))
    untimed_row = lambda row: {key: value for key, value in row.items() if not key.endswith("_seconds")}
    assert rows(merged) == rows(whole["json"])


def test_a_killed_run_goes_on_where_it_stopped(cli, demo_dir, whole, tmp_path):
    work = tmp_path / "work.jsonl"
    command = [cli, *map(str, ruler_command(demo_dir, *QUESTIONS, "--work", work))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not work.exists() or work.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # What a kill in the middle of a write leaves: the last line without its end.
    lines = work.read_bytes().splitlines(keepends=True)
    work.write_bytes(b"".join(lines[:4]) + lines[4][:len(lines[4]) // 2])
    kept = json_lines_of(lines[1:4])

    message = run(cli, *ruler_command(demo_dir, *QUESTIONS, "--work", work), expect=2)
    assert "exists" in message and "--resume" in message
    eval_ruler(cli, demo_dir, *QUESTIONS, "--work", work, "--resume")
    records = json_lines(work)[1:]
    assert records[:3] == kept, "answers of the killed run are kept as they are"
    assert untimed(records) == untimed(whole["records"])
    # Nothing is left to do: no answer is added, the table comes from the file.
    before = work.read_bytes()
    assert eval_ruler(cli, demo_dir, *QUESTIONS, "--work", work, "--resume").count("\n") == whole["markdown"].count("\n")
    assert work.read_bytes() == before


def json_lines_of(lines):
    return [json.loads(line) for line in lines]


def test_more_samples_continue_a_finished_file(cli, demo_dir, whole, tmp_path):
    work = tmp_path / "work.jsonl"
    fewer = [2 if part == 4 else part for part in QUESTIONS]
    eval_ruler(cli, demo_dir, *fewer, "--work", work)
    assert len(json_lines(work)) == 1 + 2 * 2 * 2
    eval_ruler(cli, demo_dir, *QUESTIONS, "--work", work, "--resume")
    assert untimed(json_lines(work)[1:]) == untimed(whole["records"])


def test_dense_final_chunk_is_counted_and_raises_density(cli, demo_dir, whole, tmp_path):
    out = tmp_path / "out.json"
    eval_ruler(cli, demo_dir, *QUESTIONS, "--final-chunk", "dense", "--json", out)
    rows = {(row["task"], row["selector"]): row for row in json.loads(out.read_text())["rows"]}
    for row in whole["json"]["rows"]:
        other = rows[row["task"], row["selector"]]
        if row["selector"] == "dense":
            assert other["dense_chunks"] == row["dense_chunks"]
        else:
            assert other["density"] > row["density"] and other["dense_chunks"] > row["dense_chunks"]


# ---- recall

RECALL = ["--tasks", "niah_single_2,vt", "--lengths", 1500, "--samples", 2, "--page", 32, "--chunk", 256, "--sink", 32, "--window", 64]
RECALL_SELECTORS = ["dense", "static", "mean-key", "mean-key:budget=density=0.2,min=1", "mean-key:mode=tile:budget=top=0.2",
                    "mean-key:mode=adaptive", "oracle:budget=top=0.2", "oracle:mode=tile:heads-per-unit=1:budget=top=0.2"]


def recall_command(demo_dir, *arguments):
    return ["recall" if part == "ruler" else part for part in ruler_command(demo_dir, *arguments)]


@pytest.fixture(scope="session")
def recall(cli, demo_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("recall") / "out.json"
    printed = run(cli, *recall_command(demo_dir, *RECALL, "--selector", *RECALL_SELECTORS, "--json", out))
    return {"json": json.loads(out.read_text()), "markdown": printed}


def every_sum(recall):
    for group in recall["json"]["groups"]:
        for selector in group["selectors"]:
            for layer in selector["layers"]:
                yield from ((f"{group['group']} {selector['selector']} layer {layer['layer']}", layer, False),
                            *((f"{selector['selector']} layer {layer['layer']} head {head['head']}", head, True) for head in layer["heads"]))
            yield f"{group['group']} {selector['selector']}", selector, False


def test_no_list_of_the_size_reads_more_than_the_oracle(recall):
    count = 0
    for place, sums, is_head in every_sum(recall):
        # The oracle's list is the best for its unit, which may not be the best for one head of it.
        if not is_head:
            assert sums["recall"] <= sums["oracle_recall"] + 1e-6, place
            assert sums["vs_oracle"] <= 1 + 1e-6, place
        assert max(sums["recall"], sums["oracle_recall"]) <= sums["row_oracle_recall"] + 1e-6, place
        assert 0 <= sums["recall"] <= 1 + 1e-5 and 0 <= sums["far_recall"] <= 1 + 1e-5, place
        count += 1
    assert count == 2 * len(RECALL_SELECTORS) * (1 + 4 * (1 + 8))


def test_selectors_whose_recall_is_known(recall):
    for group in recall["json"]["groups"]:
        assert [selector["selector"] for selector in group["selectors"]] == RECALL_SELECTORS
        by_name = {selector["selector"]: selector for selector in group["selectors"]}
        dense, static = by_name["dense"], by_name["static"]
        assert dense["recall"] == pytest.approx(1, abs=1e-5) and dense["vs_oracle"] == 1 and dense["density"] == 1
        # Nothing is chosen, so no list can choose better.
        assert static["recall"] == static["oracle_recall"] == static["row_oracle_recall"] and static["far_recall"] < 0.6
        # One query head and one query block a unit, of which the oracle selector takes the best pages: its own yardstick.
        alone = by_name["oracle:mode=tile:heads-per-unit=1:budget=top=0.2"]
        assert alone["vs_oracle"] > 0.99 and alone["recall"] <= alone["row_oracle_recall"]
        for name in ("mean-key", "oracle:budget=top=0.2"):
            assert static["recall"] < by_name[name]["recall"] < 1 and by_name[name]["union_inflation"] > 1
            assert 0 < by_name[name]["recall_p5"] <= by_name[name]["recall"]
        assert all(selector["nonfinite_rows"] == 0 for selector in group["selectors"])


def test_recall_says_the_same_on_any_number_of_threads(cli, demo_dir, recall, tmp_path):
    out = tmp_path / "out.json"
    run(cli, *recall_command(demo_dir, *RECALL, "--selector", ",".join(RECALL_SELECTORS), "--threads", 3, "--json", out))
    without_times = lambda value: ([without_times(part) for part in value] if isinstance(value, list) else
                                   {key: without_times(part) for key, part in value.items() if not key.endswith("_seconds")}
                                   if isinstance(value, dict) else value)
    assert without_times(json.loads(out.read_text())) == without_times(recall["json"])


def test_recall_of_text_files(cli, demo_dir, tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text((demo_dir / "haystack.txt").read_text()[:5000])
    out = tmp_path / "out.json"
    printed = run(cli, "eval", "recall", "-m", demo_dir, "-p", tmp_path / "one.txt", tmp_path / "two.txt", "--page", 64, "--chunk", 256,
                  "--json", out, "--markdown", tmp_path / "out.md")
    assert printed == (tmp_path / "out.md").read_text()
    groups = json.loads(out.read_text())["groups"]
    assert [group["group"] for group in groups] == [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    figures = lambda group: [(selector["recall"], selector["density"]) for selector in group["selectors"]]
    assert figures(groups[0]) == figures(groups[1])


BAD_RECALL = {
    "pages of its own": (["--selector", "mean-key,mean-key:page=64"], "must be the same for all"),
    "chunks of its own": (["--selector", "mean-key:chunk=64"], "must be the same for all"),
    "no selector": (["--selector", ","], "at least one"),
    "unknown budget": (["--selector", "mean-key:budget=best"], "budget"),
    "missing file": (["-p", "no/such/prompt.txt"], "no/such/prompt.txt"),
    "file and task": (["-p", "x", "--tasks", "vt"], "excludes"),
    "json into nowhere": (["--json", "/no/such/place.json"], "/no/such/place.json"),
}


@pytest.mark.parametrize("name", BAD_RECALL)
def test_bad_recall_flag(cli, demo_dir, name):
    flags, text = BAD_RECALL[name]
    assert text in run(cli, "eval", "recall", "-m", demo_dir, *flags, cwd=demo_dir.parents[1], expect=2)


# ---- bad input

BAD_RULER = {
    "unknown task": (["--tasks", "niah_single_9"], "niah_single_1, niah_single_2"),
    "a task twice": (["--tasks", "vt,vt"], "each once"),
    "no task": (["--tasks", ","], "at least one task"),
    "a length twice": (["--lengths", 700, 700], "each once"),
    "length of 0": (["--lengths", 0], "length is 0 tokens"),
    "more than the model's positions": (["--lengths", 10**6], "length is 1000000 tokens"),
    "too short for the prompt": (["--tasks", "vt", "--lengths", 300], "task vt does not fit into 300 tokens"),
    "no samples": (["--samples", 0], "0 samples"),
    "no questions": (["--tasks", "all"], "task qa_1 needs questions with documents\n  try: --qa-1 FILE"),
    "missing questions": (["--qa-2", "no/such/questions.json"], "no/such/questions.json"),
    "too short for a vocabulary": (["--tasks", "fwe", "--lengths", 200], "allowed: 250 tokens or more"),
    "too few words": (["--tasks", "cwe", "--lengths", 32768, "--words", "SHORT"], "--words FILE with more words"),
    "shard outside": (["--shard", "2/2"], "I from 0 to N - 1"),
    "shard no number": (["--shard", "first"], "--shard is 'first'"),
    "shard with a tail": (["--shard", "0/2x"], "--shard is '0/2x'"),
    "unknown selector": (["--selector", "magic"], "known: dense, static, "),
    "no selector": (["--selector", ","], "at least one"),
    "selector without a name": (["--selector", ":share=1"], "has no name"),
    "selector twice": (["--selector", "dense,dense"], "named twice"),
    "unknown flag of a selector": (["--selector", "mean-key:turbo=1"], "turbo"),
    "threads of a selector": (["--selector", "mean-key:threads=2"], "must be the same for all"),
    "bad value of a selector": (["--selector", "mean-key:share=0.1:alpha=0.1"], "one of them"),
    "final chunk": (["--final-chunk", "maybe"], "allowed: sparse, dense"),
    "missing essays": (["--essays", "no/such/essays.txt"], "no/such/essays.txt"),
    "missing words": (["--words", "no/such/words.txt"], "no/such/words.txt"),
    "three files of words": (["--words", "a", "b", "c"], "3 files of words"),
    "json into nowhere": (["--json", "/no/such/place.json"], "/no/such/place.json"),
    "work into nowhere": (["--work", "/no/such/work.jsonl"], "/no/such/work.jsonl"),
    "prompts into nowhere": (["--prompts", "/no/such/prompts.jsonl"], "/no/such/prompts.jsonl"),
}


@pytest.mark.parametrize("name", BAD_RULER)
def test_bad_flag_exits_2_with_a_named_error(cli, demo_dir, tmp_path, name):
    flags, text = BAD_RULER[name]
    short = tmp_path / "words.txt"
    short.write_text("".join(f"word{i}\n" for i in range(200)))
    flags = [short if part == "SHORT" else part for part in flags]
    base = [] if "--tasks" in flags else ["--tasks", "niah_single_2"]
    assert text in eval_ruler(cli, demo_dir, *base, *flags, expect=2)


def test_default_texts_that_are_not_there_are_asked_for_only_when_needed(cli, demo_dir, tmp_path):
    """The defaults are paths inside the source tree; from elsewhere they are missing."""
    command = ["eval", "ruler", "-m", demo_dir, "--lengths", 1024, "--samples", 1, "--prompts", tmp_path / "prompts.jsonl"]
    assert "task niah_single_2 needs prose" in run(cli, *command, "--tasks", "niah_single_2", cwd=tmp_path, expect=2)
    assert "--essays" in run(cli, *command, "--tasks", "niah_single_2", cwd=tmp_path, expect=2)
    message = run(cli, *command, "--tasks", "niah_single_1", cwd=tmp_path, expect=2)
    assert "needs words" in message and "--words" in message
    run(cli, *command, "--tasks", "vt", cwd=tmp_path)


BAD_QUESTIONS = {
    "not JSON": ("{", "not as in SQuAD 2.0 or HotpotQA"),
    "another object": ("{}", "no set of questions"),
    "no article": ('{"data": []}', "no question that has an answer"),
    "no paragraphs": ('{"data": [{"title": "x"}]}', "paragraphs"),
    "unanswerable only": ('{"data": [{"paragraphs": [{"context": "x", "qas": [{"question": "y", "is_impossible": true, "answers": []}]}]}]}',
                          "no question that has an answer"),
    "no answer": ('[{"question": "x", "context": []}]', "answer"),
    "a context of numbers": ('[{"question": "x", "answer": "y", "context": [[1, 2]]}]', "not as in SQuAD 2.0 or HotpotQA"),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_bad_questions(cli, demo_dir, tmp_path, name):
    content, text = BAD_QUESTIONS[name]
    (tmp_path / "questions.json").write_text(content)
    message = eval_ruler(cli, demo_dir, "--tasks", "qa_1", "--qa-1", tmp_path / "questions.json", expect=2)
    assert text in message and "questions.json" in message


def test_more_samples_than_questions(cli, demo_dir, question_files, tmp_path):
    for task, count in {"qa_1": 18, "qa_2": 6}.items():
        flags = ["--tasks", task, f"--{task.replace('_', '-')}", question_files[task], "--lengths", 2048, "--prompts", tmp_path / "out.jsonl"]
        assert f"allowed: 1 to {count}" in eval_ruler(cli, demo_dir, *flags, "--samples", count + 1, expect=2)
        eval_ruler(cli, demo_dir, *flags, "--samples", count)


def test_any_answer_of_a_question_counts(cli, demo_dir, question_files, tmp_path):
    work = tmp_path / "work.jsonl"
    eval_ruler(cli, demo_dir, "--tasks", "qa_1", "--qa-1", question_files["qa_1"], "--lengths", 1024, "--samples", 2, "--selector", "dense",
               "--work", work)
    header, *records = json_lines(work)
    assert header["configuration"]["qa_1"] != "none" and header["configuration"]["qa_2"] == "none"
    for record in records:
        assert record["score"] == float(any(answer.lower() in record["output"].lower() for answer in record["answers"]))


@pytest.mark.parametrize("flag, text", [("--essays", "words of prose"), ("--words", "allowed: 100 or more")])
def test_too_little_text(cli, demo_dir, tmp_path, flag, text):
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    assert text in eval_ruler(cli, demo_dir, "--tasks", "niah_single_2", flag, tmp_path / "short.txt", expect=2)


def test_work_file_of_another_configuration(cli, demo_dir, whole, tmp_path):
    work = tmp_path / "work.jsonl"
    work.write_bytes(whole["work"].read_bytes())
    for flags, text in {("--seed", 7): "seed is 42 there, here 7", ("--heads-per-unit", 2): "options.heads-per-unit is",
                        ("--final-chunk", "dense"): "final_chunk"}.items():
        assert text in eval_ruler(cli, demo_dir, *QUESTIONS, *flags, "--work", work, "--resume", expect=2)
    assert work.read_bytes() == whole["work"].read_bytes()


def test_work_file_in_use(cli, demo_dir, whole, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    work = tmp_path / "work.jsonl"
    work.write_bytes(whole["work"].read_bytes())
    with work.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use by another run" in eval_ruler(cli, demo_dir, *QUESTIONS, "--work", work, "--resume", expect=2)


def edited_header(data):
    header, *records = data.splitlines(keepends=True)
    json_header = json.loads(header)
    json_header["configuration"]["model"] = "another"
    return json.dumps(json_header).encode() + b"\n"


BAD_WORK = {
    "nothing at all": (lambda data: b"", "no complete line"),
    "cut inside its first line": (lambda data: data[:20], "no complete line"),
    "not ours": (lambda data: b'{"format": "something else"}\n', "not a work file"),
    "not JSON": (lambda data: b"hello\n", "line 1"),
    "broken in the middle": (lambda data: data.replace(b'"selector"', b'"selektor"', 1), "line 2: not a record of compact eval"),
    "a number as text": (lambda data: data.replace(b'"sample":0', b'"sample":"0"', 1), "line 2"),
    "no answers": (lambda data: data.splitlines(keepends=True)[0], "hold no answers"),
    "an answer twice": (lambda data: data + data.splitlines(keepends=True)[-1], "answered twice"),
}


@pytest.mark.parametrize("name", BAD_WORK)
def test_merge_of_a_bad_file(cli, whole, tmp_path, name):
    damage, text = BAD_WORK[name]
    (tmp_path / "work.jsonl").write_bytes(damage(whole["work"].read_bytes()))
    assert text in run(cli, "eval", "merge", tmp_path / "work.jsonl", expect=2)


def test_merge_of_files_that_do_not_belong_together(cli, whole, tmp_path):
    (tmp_path / "other.jsonl").write_bytes(edited_header(whole["work"].read_bytes()))
    message = run(cli, "eval", "merge", whole["work"], tmp_path / "other.jsonl", expect=2)
    assert "different configurations: model is" in message
    assert "answered twice" in run(cli, "eval", "merge", whole["work"], whole["work"], expect=2)
    assert "missing.jsonl" in run(cli, "eval", "merge", tmp_path / "missing.jsonl", expect=2)
    run(cli, "eval", "merge", expect=2)


def test_eval_needs_a_subcommand(cli):
    assert "subcommand" in run(cli, "eval", expect=2)
    assert "ruler" in run(cli, "eval", "--help")
