"""Accuracy of a checkpoint per task and length, answered by the executable `compact` itself; JSON out.

    python evaluate_engine.py --compact build/release/compact --model assets/demo --corpus DIR --samples 200 --json accuracy.json

evaluate.py does the same in torch, for use while training; this one measures what a user gets. Same prompts (held-out prose,
same seed), RULER's score: the share of answers that occur in the output, ignoring case. Rows are printed as they are
done and the file is rewritten after each, so a run that is cut short keeps what it has.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

from tokenizers import Tokenizer

from data import Source
from evaluate import LIMITS, add_prompt_arguments, make_prompts


def run(arguments, prompt: pathlib.Path, out: pathlib.Path, selector: str, limit: int) -> dict:
    command = [arguments.compact, "run", "-m", arguments.model, "-p", prompt, "--selector", selector, "--max-tokens", limit,
               "--json", out, *arguments.flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compact", type=pathlib.Path, required=True, help="the executable")
    add_prompt_arguments(parser)
    parser.add_argument("--selectors", nargs="+", default=["dense", "mean-key"])
    parser.add_argument("--flags", nargs="*", default=[], help="further flags for `compact run`, after --flags")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    source = Source(arguments.corpus, "heldout")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prompt_file, out = pathlib.Path(scratch) / "prompt.txt", pathlib.Path(scratch) / "out.json"
        for length in arguments.lengths:
            for task in arguments.tasks:
                limit = LIMITS.get(task, 16)
                prompts = make_prompts(tokenizer, source, task, length, arguments.samples, arguments.seed, limit)
                for selector in arguments.selectors:
                    scores, runs = [], []
                    for prompt, _, answers in prompts:
                        prompt_file.write_text(prompt)
                        figures = run(arguments, prompt_file, out, selector, limit)
                        runs.append(figures)
                        scores.append(sum(a.lower() in figures["answer"].lower() for a in answers) / len(answers))
                    row = {"task": task, "tokens": length, "samples": len(scores), "seed": arguments.seed, "selector": selector,
                           "accuracy": round(100 * statistics.mean(scores), 2),
                           **{key: round(statistics.mean(run[key] for run in runs), 4)
                              for key in ("density", "union_inflation", "ttft_seconds", "attention_seconds")}}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
